"""Planes beside axial, coronal and sagittal: further series such as sagittal-t1."""

import csv
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import PLANES, QUICK, assert_one_line_error, finding_of, run_script, write_exams

from mrnet.errors import InputError
from mrnet.inference.exams import exam_of_files
from mrnet.inference.task_models import load_task, saved_columns
from mrnet.layout.planes import ALL_PLANES, planes_of
from mrnet.training.augmentation import make_augmentation
from mrnet.training.checkpoint import load_model

T1 = "sagittal-t1"
pytestmark = pytest.mark.whole


def files(work):
    return ("--data-dir", work / "data", "--models-dir", work / "models", "--logs-dir",
            work / "logs")  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Exams with a fourth plane, which one exam lacks; the only plane that shows the finding."""
    work = tmp_path_factory.mktemp("series")
    data = write_exams(work / "data")
    for split in ("train", "valid"):
        shutil.copytree(data / split / "sagittal", data / split / T1)
        for path in (data / split / "sagittal").glob("*.npy"):
            volume = np.load(path)
            volume[0] = volume[1]
            np.save(path, volume)
    done = run_script("reproduce.py", *files(work), "--", "--precision", "fp32", *QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    return work


def test_all_planes_of_the_folder_are_trained_and_stacked(work):
    columns = saved_columns(work / "models", ["article"])
    assert columns == {"acl": [*PLANES, T1]}
    models = load_task(work / "models", "acl", ["article"])
    assert models.planes == [*PLANES, T1]
    combinations = models.stack["combinations"]
    assert len(combinations) == 15 and combinations["+".join((*PLANES, T1))]["columns"] == [
        *PLANES, T1,
    ]  # fmt: skip
    assert load_model(work / "models" / f"acl-{T1}.pt")[1]["plane"] == T1
    rows = json.loads((work / "models" / "results.json").read_text())["acl"]["valid"]
    assert [*rows][:5] == [*PLANES, T1, "stack"]
    assert f"\n| ours, {T1} " in (work / "models" / "results.md").read_text()


def test_predictions_have_a_column_of_it(work, tmp_path):
    out = tmp_path / "rows.csv"
    command = ("predict.py", work / "data/valid", "--models-dir", work / "models", "--precision",
               "fp32", "--out", out)  # fmt: skip
    assert run_script(*command).returncode == 0
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    with open(work / "models" / "acl-predictions.csv", newline="") as file:
        wanted = {row["id"]: row for row in csv.DictReader(file) if row["split"] == "valid"}
    assert len(rows) == len(wanted) == 8
    for row in rows:
        assert row["planes"] == "+".join((*PLANES, T1)) and row["missing"] == ""
        for name in (*PLANES, T1, "stack"):
            probability = float(wanted[str(int(row["exam"]))][name])
            assert float(row[name]) == pytest.approx(probability, abs=1e-6)
    again = run_script(*command, "--resume")
    assert "0 exams, 8 were there" in again.stdout
    folder = tmp_path / "some"
    for plane in (*PLANES[:2], T1):
        shutil.copytree(work / "data/valid" / plane, folder / plane)
    done = run_script("predict.py", folder, "--models-dir", work / "models", "--jsonl")
    rows = list(map(json.loads, done.stdout.splitlines()))
    assert {(*row["planes"], *row["missing"]) for row in rows} == {
        (*PLANES[:2], T1, "sagittal"),
    }  # fmt: skip
    assert all(row["decision"] for row in rows)


def test_it_is_explained(work, tmp_path):
    command = ("explain.py", work / "data/valid", "--models-dir", work / "models", "--precision",
               "fp32", "--out", tmp_path)  # fmt: skip
    assert run_script(*command, "--exam", "12", "--task", "acl").returncode == 0
    finding = finding_of(tmp_path / "0012-acl.html")
    assert [one["plane"] for one in finding["planes"]] == [*PLANES, T1]
    assert finding["missing"] == []
    done = run_script(*command[:-1], tmp_path / "all", "--all", "--task", "acl")
    assert done.returncode == 0, done.stderr


def test_the_folder_is_checked_with_it(work, tmp_path):
    data = shutil.copytree(work / "data", tmp_path / "data")
    assert "no faults" in run_script("tools/check.py", data).stdout
    (data / "valid" / T1 / "0013.npy").unlink()
    done = run_script("tools/check.py", data)
    assert f"exam 13: {T1} is missing (found: axial" in done.stdout and f"\n{T1}" in done.stdout
    assert planes_of(data) == [*PLANES, T1] and planes_of(tmp_path) == [*PLANES]


def test_a_name_is_of_a_plane_or_of_a_recipe_never_of_both(work, tmp_path):
    recipe = tmp_path / "t1.toml"
    recipe.write_text("lr = 1e-4\n")
    words = ("train.py", "--task", "acl", "--plane", "sagittal", *files(work), "--recipe")
    assert_one_line_error(run_script(*words, recipe), "t1.toml", "rename the recipe")
    recipe.rename(tmp_path / "t1-long.toml")
    done = run_script(*words, tmp_path / "t1-long.toml")
    assert_one_line_error(done, "rename the recipe")
    for name in ("acl-sagittal-best.pt", "acl-coronal+axial.pt", "acl-axial-fold1of2.pt"):
        (tmp_path / name).touch()  # another recipe, no order of planes, a fold
    (tmp_path / f"medial-meniscus-axial+{T1}-best.pt").touch()
    assert saved_columns(tmp_path, ["article"]) == {}
    assert saved_columns(tmp_path, ["best"]) == {
        "acl": ["sagittal-best"], "medial-meniscus": [f"axial+{T1}-best"],
    }  # fmt: skip


def test_a_file_names_its_series(tmp_path):
    names = [tmp_path / f"knee7-{plane}.npy" for plane in ("sagittal", T1)]
    assert exam_of_files(names) == ("knee7", {"sagittal": names[0], T1: names[1]})
    for name, plane in (("sagittal-greyscale", "sagittal"), ("k_Sagittal-T1", T1)):
        assert list(exam_of_files([tmp_path / f"{name}.npy"])[1]) == [plane]
    for name in ("knee7-sagittal_t1", "knee7-t1-sagittal", "knee7 sagittal t1"):
        with pytest.raises(InputError, match="which plane is it"):
            exam_of_files([tmp_path / f"{name}.npy"])


def test_left_and_right_are_where_its_plane_has_them():
    for plane in ALL_PLANES:
        view = plane.split("-")[0]
        assert make_augmentation("anatomical", plane).mirror == (
            "slices" if view == "sagittal" else "columns"
        )


@pytest.mark.parametrize("plane", ["sagittal", T1, "coronal", "coronal-t1"])
def test_a_mirrored_knee_is_mirrored_back_in_its_own_plane(plane, monkeypatch):
    """Slices of sagittal series change their order, pictures of the others their columns."""
    pytest.importorskip("highdicom", reason="pip install -r requirements-dicom-results.txt")
    from mrnet.reports import dicom_results

    volume = np.arange(3, dtype=np.uint8)[:, None, None] * 10 + np.zeros((1, 256, 256), np.uint8)
    volume[:, :, 0] += 1
    monkeypatch.setattr(dicom_results, "overlay", lambda grey, *_: np.stack([grey] * 3, axis=-1))
    burnt = []
    monkeypatch.setattr(
        dicom_results, "burn_in", lambda picture, words: burnt.append(words[1]) or picture
    )
    monkeypatch.setattr(
        dicom_results, "secondary_capture", lambda picture, *_: SimpleNamespace(picture=picture)
    )
    place = {"positions": [(0, 0, z) for z in range(3)], "mirrored": True}
    one = SimpleNamespace(volume=volume, maps=None, backbone=None, slice_sums=[0, 1, 2],
                          probability=0.5, plane=plane, title=plane, column=plane, scale=1.0,
                          neighbours=False)  # fmt: skip
    finding = SimpleNamespace(task="acl", models=SimpleNamespace(is_synthetic=False))
    origin = dicom_results.Origin(None, {plane: place}, "R", "")
    images = dicom_results.heat_map_series(finding, one, origin)
    levels = [image.picture[5, 5, 0] for image in images]
    column = [bool(image.picture[5, 0, 0] % 10) for image in images]
    if plane.startswith("sagittal"):
        assert levels == [20, 10, 0] and all(column)
        # The first in the patient's order is the page's last, and says so.
        assert burnt[0] == "page's slice 3 of 3: +2.00"
    else:
        assert levels == [0, 10, 20] and not any(column)
        assert burnt[0] == "slice 1 of 3: +0.00"
