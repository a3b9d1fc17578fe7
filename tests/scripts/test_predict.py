"""predict.py: the same numbers as training printed, missing planes, resuming, hostile files."""

import json
import math
import os
import pickle
import shutil
import tracemalloc
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PLANES, assert_one_line_error, rows_of, run_process, run_script, write_exams

from model import MRNet
from mrnet.errors import InputError
from mrnet.files import as_cell, from_cell
from mrnet.inference.answering import Options
from mrnet.inference.exams import Exam, FolderExams, exam_of_files, open_exams
from mrnet.inference.task_models import Network, TaskModels
from mrnet.networks.saved import digest_of, read_checkpoint, write_checkpoint
from mrnet.training.checkpoint import load_model, save_model
from predict import Answer, make_row, models_of


def predict(trained, *args):
    models = ("--models-dir", trained[0] / "models", "--precision", "fp32")
    return run_script("predict.py", *models, *args)


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    """All 30 exams of the tiny phantom predicted: folder with all.csv, and what was said."""
    out = tmp_path_factory.mktemp("predicted")
    done = predict(trained, trained[0] / "data", "--out", out / "all.csv")
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


@pytest.fixture
def valid(trained, tmp_path):
    """A copy of the ten validation exams, for tests that damage it."""
    shutil.copytree(trained[0] / "data" / "valid", tmp_path / "scans")
    shutil.copy(trained[0] / "data" / "dataset.json", tmp_path / "scans")
    return tmp_path / "scans"


def test_same_numbers_as_training_wrote(trained, whole):
    written = {
        (r["split"], int(r["id"])): r
        for r in rows_of(trained[0] / "models" / "acl-predictions.csv")
    }
    rows = rows_of(whole[0] / "all.csv")
    assert len(rows) == len(written) == 30
    for row in rows:
        other = written[row["source"], int(row["exam"])]
        for name in (*PLANES, "stack"):
            assert float(row[name]) == pytest.approx(float(other[name]), abs=1e-6)
        positive = float(row["stack"]) >= float(row["threshold"])
        assert row["decision"] == ("positive" if positive else "negative")
        assert row["planes"] == "+".join(PLANES) and row["missing"] == row["note"] == ""
    assert "30 exams" in whole[1] and "exams/s" in whole[1]


def test_missing_planes_are_said_and_stacked_without(trained, valid, tmp_path):
    name = sorted(p.stem for p in (valid / "axial").iterdir())[0]
    (valid / "coronal" / f"{name}.npy").unlink()
    done = predict(trained, valid, "--out", tmp_path / "p.csv")
    assert done.returncode == 0, done.stderr
    row = next(r for r in rows_of(tmp_path / "p.csv") if r["exam"] == name)
    assert row["coronal"] == "" and row["missing"] == "coronal"
    assert row["planes"] == "axial+sagittal" and "no coronal volume" in row["note"]
    stack = json.loads((trained[0] / "models" / "acl-stack.json").read_text())
    fit = stack["combinations"]["axial+sagittal"]
    a, b = fit["coefficients"]
    score = a * float(row["axial"]) + b * float(row["sagittal"]) + fit["intercept"]
    assert float(row["stack"]) == pytest.approx(1 / (1 + math.exp(-score)), abs=1e-6)
    assert float(row["threshold"]) == pytest.approx(fit["threshold"], abs=1e-6)


def test_lines_of_json_say_the_same(trained, whole):
    done = predict(trained, trained[0] / "data", "--jsonl")
    assert done.returncode == 0
    for line, row in zip(done.stdout.splitlines(), rows_of(whole[0] / "all.csv"), strict=True):
        content = json.loads(line)
        assert content["exam"] == row["exam"] and content["missing"] == []
        assert content["stack"] == pytest.approx(float(row["stack"]), abs=1e-8)


@pytest.mark.parametrize("jsonl", [(), ("--jsonl",)])
@pytest.mark.parametrize("kept", [0.0, 0.03, 0.5, 0.97])
def test_resumed_file_is_the_uninterrupted_one(trained, whole, tmp_path, kept, jsonl):
    out = tmp_path / "p"
    assert predict(trained, trained[0] / "data", "--out", out, *jsonl).returncode == 0
    full = out.read_bytes()
    out.write_bytes(full[: int(kept * len(full))])  # as a kill in mid-line leaves it
    done = predict(trained, trained[0] / "data", "--out", out, "--resume", *jsonl)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == full


FORMULAS = ("=1+1", '=HYPERLINK("x","y")', "@SUM(1)", "+cmd|' '!A1", "-2+3", "'=1")
NO_FORMULAS = ("0007", "-2.5", "+1e-3", "-", "knee-7", "3=4", "")


@pytest.mark.parametrize("text", FORMULAS + NO_FORMULAS)
def test_no_cell_is_a_formula(text):
    cell = as_cell(text)
    assert cell == (f"'{text}" if text in FORMULAS else text) and from_cell(cell) == text


def test_exams_named_like_formulas(trained, tmp_path):
    (tmp_path / "data" / "axial").mkdir(parents=True)
    shutil.copy(trained[0] / "data" / "dataset.json", tmp_path / "data")
    for name in FORMULAS:
        source = trained[0] / "data" / "valid" / "axial" / "0020.npy"
        shutil.copy(source, tmp_path / "data" / "axial" / f"{name}.npy")
    out = tmp_path / "p.csv"
    assert predict(trained, tmp_path / "data", "--out", out).returncode == 0
    cells = [row["exam"] for row in rows_of(out)]
    assert sorted(cells) == sorted(f"'{name}" for name in FORMULAS)
    before = out.read_bytes()
    done = predict(trained, tmp_path / "data", "--out", out, "--resume")
    assert "6 were there" in done.stdout and out.read_bytes() == before


def test_an_existing_file_stays(trained, tmp_path):
    out = tmp_path / "p.csv"
    out.write_text("precious")
    done = predict(trained, trained[0] / "data", "--out", out)
    assert_one_line_error(done, "p.csv", "--resume", "--overwrite")
    done = predict(trained, trained[0] / "data", "--out", out, "--resume")
    assert_one_line_error(done, "p.csv", "not written by this command")
    assert out.read_text() == "precious"
    assert predict(trained, trained[0] / "data", "--out", out, "--overwrite").returncode == 0


class Evil:
    """What runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def hostile(path, proof):
    np.save(path, np.array([Evil(proof)], dtype=object), allow_pickle=True)


def truncated(path, proof):
    path.write_bytes(path.read_bytes()[:-100])


def bare_pickle(path, proof):
    path.write_bytes(pickle.dumps(Evil(proof)))


def flat(path, proof):
    np.save(path, np.zeros(70, np.uint8))


@pytest.mark.parametrize("damage", [hostile, truncated, bare_pickle, flat])
def test_a_bad_exam_is_named_and_the_others_go_on(trained, valid, tmp_path, damage):
    bad = sorted((valid / "axial").iterdir())[3]
    damage(bad, tmp_path / "proof")
    done = predict(trained, valid, "--out", tmp_path / "p.csv")
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 2 and str(bad) in lines[0] and "1 exam could" in lines[1]
    rows = {row["exam"]: row for row in rows_of(tmp_path / "p.csv")}
    assert len(rows) == 10 and [n for n, row in rows.items() if row["error"]] == [bad.stem]
    row = rows[bad.stem]
    assert row["stack"] == row["decision"] == row["axial"] == "" and row["coronal"]
    assert str(bad) in row["error"] and row["missing"] == "axial"
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("script", ["predict.py", "explain.py"])
def test_a_network_whose_logit_is_not_finite_decides_nothing(trained, valid, tmp_path, script):
    models = tmp_path / "models"
    shutil.copytree(trained[0] / "models", models)
    model, metadata = load_model(models / "acl-axial.pt")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1e12
    save_model(models / "acl-axial.pt", model, metadata)
    stack = json.loads((models / "acl-stack.json").read_text())
    stack["digests"]["acl-axial.pt"] = digest_of(models / "acl-axial.pt")
    (models / "acl-stack.json").write_text(json.dumps(stack))
    more = ["--jsonl", "--out", tmp_path / "rows"] if script == "predict.py" else ["--all"]
    out = ["--out", tmp_path / "pages"] if script == "explain.py" else []
    done = run_script(script, valid, "--models-dir", models, *more, *out)
    assert done.returncode == 1 and "exams" in done.stderr.splitlines()[-1]
    if script == "predict.py":
        lines = (tmp_path / "rows").read_text().splitlines()
        rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
        assert all(row["decision"] is row["axial"] is None and row["sagittal"] for row in rows)
        assert "axial: the logit of a network of axial is nan" in rows[0]["error"]
    else:
        (row, *_) = map(json.loads, (tmp_path / "pages" / "exams.jsonl").read_text().splitlines())
        assert "the logit of a network of axial is nan" in row["error"]
        assert row["findings"]["acl"]["decision"] is None


def test_slices_beyond_what_the_networks_saw():
    network = Network(MRNet(), ("axial",), "raw", "grey", False, "", {"axial": [20, 30]})
    models = TaskModels("acl", {"axial": [network]}, None, "", [None], 0.5)
    volumes = {n: np.zeros((n, 64, 64), np.uint8) for n in (1, 9, 10, 60, 61)}
    warned = {n: models.slice_warnings({"axial": volume}) for n, volume in volumes.items()}
    assert warned[10] == warned[60] == []
    assert warned[9] == ["axial has 9 slices, the training exams have 20 to 30"] and warned[61]
    models.check_volume("x.npy", volumes[9], "axial")
    with pytest.raises(InputError, match="x.npy: a single slice, .* 20 to 30; give the whole"):
        models.check_volume("x.npy", volumes[1], "axial")
    network = network._replace(slices={"axial": [4, 30]})
    models._replace(networks={"axial": [network]}).check_volume("x.npy", volumes[1], "axial")


def test_files_of_one_exam(trained, whole, tmp_path):
    row = rows_of(whole[0] / "all.csv")[0]
    for plane in PLANES:
        source = trained[0] / "data" / row["source"] / plane / f"{row['exam']}.npy"
        shutil.copy(source, tmp_path / f"knee7-{plane}.npy")
    shutil.copy(trained[0] / "data" / "dataset.json", tmp_path)
    done = predict(trained, *(tmp_path / f"knee7-{plane}.npy" for plane in PLANES), "--jsonl")
    content = json.loads(done.stdout)
    assert content["exam"] == "knee7"
    assert content["stack"] == pytest.approx(float(row["stack"]), abs=1e-8)


def test_which_plane_a_file_is(tmp_path):
    for plane in PLANES:
        (tmp_path / plane).mkdir()
    paths = [tmp_path / "axial" / "7.npy", tmp_path / "coronal" / "7.npy"]
    assert exam_of_files(paths) == ("7", {"axial": paths[0], "coronal": paths[1]})
    path = tmp_path / "x.npy"
    assert exam_of_files([path], "sagittal") == ("x", {"sagittal": path})
    path = tmp_path / "sagittal" / "7-sagittal-t1.npy"
    assert exam_of_files([path]) == ("7-sagittal-t1", {"sagittal": path})  # the folder tells
    path = tmp_path / "coronal-t1.npy"
    assert exam_of_files([path], "coronal") == ("coronal-t1", {"coronal": path})
    assert list(exam_of_files([path])[1]) == ["coronal-t1"]
    named = tmp_path / "7-sagittal.npy"
    assert exam_of_files([named]) == ("7", {"sagittal": named})
    # Each has an exam 7 of its own.
    other = tmp_path / "another set"
    for path in (other / "sagittal" / "7.npy", other / "7-sagittal.npy"):
        with pytest.raises(InputError, match="not of the same exam"):
            exam_of_files([*paths, path])
    with pytest.raises(InputError, match="not of the same exam"):
        exam_of_files([named, other / "7-axial.npy"])


@pytest.mark.parametrize("name, plane", [
    ("axial/7.npy", "coronal"), ("axial/7-sagittal.npy", None), ("7-axial.npy", "sagittal"),
])  # fmt: skip
def test_planes_that_contradict_each_other_are_refused(tmp_path, name, plane):
    with pytest.raises(InputError, match="contradict"):
        exam_of_files([tmp_path / name], plane)


def test_several_sets_of_joined_planes_and_the_planes_of_a_decision():
    """One column has the mean of all networks that join planes; a stack without a regression for
    the planes that an exam has says which it took."""
    planes = [("axial", "coronal"), ("axial", "sagittal")]
    columns = {"+".join(p): [Network(None, p, "raw", "grey", False, "", {})] for p in planes}
    combination = {"columns": ["axial+coronal"], "coefficients": [2.0], "intercept": -1.0,
                   "threshold": 0.3}  # fmt: skip
    stack = {"features": "probability", "combinations": {"axial+coronal": combination}}
    models = TaskModels("acl", columns, stack, "", [None], 0.5)
    exam = Exam("7", "", dict.fromkeys(PLANES), {}, "hash")
    answer = Answer([*PLANES], {}, {"axial+coronal": [0.0], "axial+sagittal": [np.log(3)]})
    row = make_row(exam, models, answer, Options(None, "fp32", False))
    assert row["joint"] == pytest.approx((0.5 + 0.75) / 2)
    assert row["stack"] == pytest.approx(0.5) and row["decision"] == "positive"
    assert "decided from axial and coronal" in row["note"]
    answer = answer._replace(planes=["axial", "coronal"])
    assert make_row(exam, models, answer, Options(None, "fp32", False))["note"] is None


def test_files_that_do_not_fit_together(trained, tmp_path):
    for name in ("x.npy", "a-axial.npy", "b-coronal.npy"):
        np.save(tmp_path / name, np.zeros((2, 64, 64), np.uint8))
    assert_one_line_error(predict(trained, tmp_path / "x.npy"), "x.npy", "--plane")
    done = predict(trained, tmp_path / "a-axial.npy", tmp_path / "b-coronal.npy")
    assert_one_line_error(done, "b-coronal.npy", "same exam")


def zip_of(path, name):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"")


@pytest.mark.parametrize("name, write", [
    ("new/1.dcm", Path.touch), ("new/axial/1.DCM", Path.touch), ("new/knee.nii.gz", Path.touch),
    ("new/IM0001", lambda path: path.write_bytes(bytes(128) + b"DICM")),  # PS3.10 7.1
    ("new/bare", lambda path: path.write_bytes(b"\x08\0\x05\0CS\x0a\0ISO_IR 100" + bytes(200))),
    ("new/study.zip", lambda path: zip_of(path, "IM0001")),
    ("new/nifti.zip", lambda path: zip_of(path, "a/b.NII.gz")),
])  # fmt: skip
def test_a_scan_beside_npy_exams_is_not_passed_over(tmp_path, name, write):
    write_exams(tmp_path / "inbox", train=2, valid=1)
    (tmp_path / "inbox" / name).parent.mkdir(parents=True)
    write(tmp_path / "inbox" / name)
    with pytest.raises(InputError) as error, open_exams([tmp_path / "inbox"]):
        pass
    words = str(error.value)
    assert name in words and "train/axial" in words and "give" in words and "\n" not in words


def test_what_is_no_scan_beside_npy_exams_is_no_reason(exams):
    """Texts, pictures, the download that the exams were unpacked from, a link back."""
    zip_of(exams / "MRNet-v1.0.zip", "MRNet-v1.0/train/axial/0000.npy")
    zip_of(exams / "reports.zip", "reports/1.pdf")
    (exams / "broken.zip").touch()
    for name in ("notes.txt", "._1.dcm", "knee.png", "empty"):
        (exams / name).write_bytes(b"x" * 200)
    (exams / "train" / "axial" / "back").symlink_to(exams)
    (exams / "again").symlink_to(exams)
    (exams / "gone").symlink_to(exams / "nowhere")
    with open_exams([exams]) as found:
        assert len(found) == 20


def test_nothing_there(trained, tmp_path):
    assert_one_line_error(predict(trained, tmp_path / "none"), "none", "no such")
    (tmp_path / "empty").mkdir()
    assert_one_line_error(predict(trained, tmp_path / "empty"), "empty", "DICOM")
    done = run_script("predict.py", tmp_path / "empty", "--models-dir", tmp_path / "empty")
    assert_one_line_error(done, "no saved models", "train.py")
    assert_one_line_error(predict(trained, tmp_path / "empty", "--task", "cyst"), "cyst", "acl")


def test_a_model_of_another_plane_task_or_version(trained, tmp_path):
    models = tmp_path / "models"
    shutil.copytree(trained[0] / "models", models)
    args = ("predict.py", trained[0] / "data", "--models-dir", models)
    shutil.copy(models / "acl-axial.pt", models / "acl-coronal.pt")
    assert_one_line_error(run_script(*args), "acl-coronal.pt", "axial", "train again")
    content = read_checkpoint(models / "acl-axial.pt")
    write_checkpoint(models / "acl-coronal.pt", content | {"format": "mrnet-model-2"})
    assert_one_line_error(run_script(*args), "acl-coronal.pt", "version")
    torch.save(Evil(tmp_path / "proof"), models / "acl-coronal.pt")
    assert_one_line_error(run_script(*args), "acl-coronal.pt")
    assert not (tmp_path / "proof").exists()


def test_a_network_trained_after_the_stack(trained, tmp_path):
    models = tmp_path / "models"
    shutil.copytree(trained[0] / "models", models)
    content = read_checkpoint(models / "acl-axial.pt")
    content["model"]["classifier.bias"] += 1
    write_checkpoint(models / "acl-axial.pt", content)
    done = run_script("predict.py", trained[0] / "data", "--models-dir", models)
    assert_one_line_error(done, "acl-axial.pt", "after the stack", "train_logistic_regression.py")


def test_a_rows_model_is_that_of_its_own_networks():
    options = Options(torch.device("cpu"), "fp32", False)
    pairs = zip("aca", "123", strict=True)
    acl, cyst, other = (SimpleNamespace(task=task, digest=digest) for task, digest in pairs)
    assert models_of([acl, cyst], options)["a"] == models_of([acl], options)["a"]
    assert models_of([other, cyst], options)["a"] != models_of([acl, cyst], options)["a"]


def test_rows_go_to_regular_files_only(trained, tmp_path):
    for out in (Path("/dev/full"), tmp_path):
        done = predict(trained, trained[0] / "data", "--out", out, "--overwrite")
        assert_one_line_error(done, f"{out}: exists and is not a regular file")


def test_names_of_many_exams_take_little_memory(tmp_path):
    """Some 10 MB for 100,000 exams; a list of paths would take ten times as much."""
    folder = tmp_path / "valid" / "axial"
    folder.mkdir(parents=True)
    for i in range(5000):
        (folder / f"{i:06d}.npy").touch()
    tracemalloc.start()
    try:
        exams = FolderExams(tmp_path)
        count = sum(1 for _ in exams)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == len(exams) == 5000
    assert kept < 5000 * 150 and peak < 5000 * 400  # bytes an exam


def test_standard_output_holds_rows_only(trained):
    done = run_process(
        "predict.py", trained[0] / "data", "--models-dir", trained[0] / "models", "--jsonl"
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 30
    assert "exams/s" in done.stderr
