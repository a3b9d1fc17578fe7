"""The synthetic knees: layout, labels, determinism, and lesions where lesions.json says."""

import csv
import json
import sys

import numpy as np
import pytest
from conftest import PLANES, assert_one_line_error, run_script
from scipy import ndimage

from data.phantom import knee, prepare
from data.phantom.anatomy import draw_knee
from data.phantom.lesions import draw_labels, draw_lesions
from data.phantom.scanner import Cut, Pose, averaged, place, scan

SCRIPT = "data/phantom/prepare.py"
TASKS = ("abnormal", "acl", "meniscus")
ACL_TEAR = {"abnormal": 1, "acl": 1, "meniscus": 0}


knee.GRID = 1.6  # mm; half the usual resolution draws a knee eight times faster


def make(out, *more, exams=6, valid=5):
    """Run the script with the coarse grid, in this process and its workers."""
    argv = sys.argv
    sys.argv = [SCRIPT, "--exams", str(exams), "--valid", str(valid), "--size", "64",
                "--out", str(out), *map(str, more)]  # fmt: skip
    try:
        prepare.main()
    finally:
        sys.argv = argv
    return out


@pytest.fixture(scope="module")
def knees(tmp_path_factory):
    return make(tmp_path_factory.mktemp("knees"), "--workers", 2)


@pytest.fixture(scope="module")
def places(knees):
    return json.loads((knees / "lesions.json").read_text())


def labels(out, split, task):
    with open(out / f"{split}-{task}.csv", newline="") as file:
        return {int(exam_id): int(label) for exam_id, label in csv.reader(file)}


def test_layout(knees):
    for split, ids in (("train", range(6)), ("valid", range(6, 11))):
        for task in TASKS:
            assert list(labels(knees, split, task)) == list(ids)
            assert set(labels(knees, split, task).values()) == {0, 1}
        for plane in PLANES:
            files = sorted(path.name for path in (knees / split / plane).iterdir())
            assert files == [f"{exam_id:04d}.npy" for exam_id in ids]
            for name in files:
                volume = np.load(knees / split / plane / name)
                assert volume.dtype == np.uint8 and volume.shape[1:] == (64, 64)
                assert 17 <= len(volume) <= 30 and volume.max() > 150


def test_numbers_of_slices_differ(places):
    counts = [g["slices"] for entry in places.values() for g in entry["planes"].values()]
    assert len(set(counts)) > 3 and 20 <= np.mean(counts) <= 26


def test_same_bytes_for_any_number_of_workers(knees, tmp_path):
    make(tmp_path, "--workers", 1)
    made = [path.relative_to(knees) for path in knees.rglob("*") if path.is_file()]
    assert len(made) == 11 * 3 + 6 + 2
    for path in made:
        assert (knees / path).read_bytes() == (tmp_path / path).read_bytes()


def test_another_seed_gives_another_knee(tmp_path):
    for seed in (0, 1):
        prepare.make_exam(0, "train", ACL_TEAR, seed, 64, tmp_path / str(seed))
    first, second = (tmp_path / str(seed) / "train/sagittal/0000.npy" for seed in (0, 1))
    assert first.read_bytes() != second.read_bytes()


@pytest.mark.parametrize("n", [5, 6, 60, 200, 1130])
def test_prevalences_are_mrnets(n):
    rows = draw_labels(np.random.default_rng(0), n)
    for task, share in (("abnormal", 0.80), ("acl", 0.20), ("meniscus", 0.37)):
        count = sum(row[task] for row in rows)
        assert abs(count - share * n) <= 0.5 and 0 < count < n
    assert all(row["abnormal"] for row in rows if row["acl"] or row["meniscus"])


def test_a_third_of_the_meniscal_tears_is_a_thin_line_and_nothing_else():
    for n, share in ((60, 7 / 22), (1130, 139 / 418), (6000, 740 / 2220)):  # exact but for rounding
        rows = draw_labels(np.random.default_rng(0), n)
        assert sum(row["subtle_tear"] for row in rows) == share * sum(r["meniscus"] for r in rows)
        assert all(row["meniscus"] for row in rows if row["subtle_tear"])
    rng = np.random.default_rng(0)
    drawn = [draw_lesions(rng, row | {"acl": 1}) for row in rows if row["meniscus"]]
    subtle = [one for one in drawn if one["meniscus"]["width"] < 1]
    assert 3 * len(subtle) == len(drawn)
    for one in subtle:
        assert max(one["extrusion"].values()) <= 1.5 and one["cyst"] is None
        assert one["meniscus"]["handle"] is None and not one["meniscus"]["displaced"]
    others = [one for one in drawn if one["meniscus"]["width"] > 1]
    assert np.mean([one["cyst"] is not None for one in others]) == pytest.approx(0.40, abs=0.04)
    small = [one for one in drawn if max(one["acl"]["radii"]) < 5.5]
    assert len(small) / len(drawn) == pytest.approx(0.08, abs=0.02)
    assert np.mean([one["acl"]["partial"] for one in drawn]) == pytest.approx(0.43, abs=0.035)


@pytest.mark.parametrize("thickness, n", [(0.4, 1), (2.2, 3), (3.7, 3), (4.4, 5), (5.5, 5)])
def test_a_thick_slice_is_the_mean_of_some_voxels(thickness, n):
    volume = np.random.default_rng(0).random((9, 12, 7), np.float32)
    for axis in range(3):
        wanted = ndimage.uniform_filter1d(volume, n, axis)
        inner = tuple(slice(n // 2, -(n // 2) or None) if k == axis else slice(None)
                      for k in range(3))  # fmt: skip
        found = averaged(volume, axis, thickness)
        np.testing.assert_allclose(found[inner], wanted[inner], atol=1e-6)
        assert found.shape == volume.shape and np.array_equal(
            np.take(found, [0, -1], axis), np.take(volume, [0, -1], axis)
        )


def test_lesions_are_those_of_the_labels(knees, places):
    for split in ("train", "valid"):
        for task in ("acl", "meniscus"):
            for exam_id, label in labels(knees, split, task).items():
                found = [lesion["kind"] for lesion in places[str(exam_id)]["lesions"]]
                assert found.count(task) == label
                tasks = [lesion["task"] for lesion in places[str(exam_id)]["lesions"]]
                assert (task in tasks) == bool(label)
        for exam_id, label in labels(knees, split, "abnormal").items():
            assert bool(places[str(exam_id)]["lesions"]) == bool(label)


def test_a_lesion_is_one_place_in_three_planes(places):
    for entry in places.values():
        for lesion in entry["lesions"]:
            for plane, found in lesion["planes"].items():
                g = entry["planes"][plane]
                mm = np.array(found["centre"]) * g["step_mm"] + g["start_mm"]
                patient = np.empty(3)
                patient[g["axes"]] = mm * g["directions"]
                np.testing.assert_allclose(patient, lesion["mm"], atol=0.1)
                assert np.all(np.array(found["low"]) <= found["high"])


def test_a_lesion_shows_in_some_slices_only(places):
    for entry in places.values():
        for lesion in entry["lesions"]:
            for plane, found in lesion["planes"].items():
                assert len(found["visible"]) < entry["planes"][plane]["slices"]
            assert any(found["visible"] for found in lesion["planes"].values())


@pytest.mark.parametrize("seed", range(4))
def test_a_torn_acl_is_brighter_than_the_same_knee_untorn_at_the_noted_place(seed, monkeypatch):
    monkeypatch.setattr(knee, "GRID", 0.8)  # partial tears are small
    lesions = draw_lesions(np.random.default_rng(seed), ACL_TEAR)
    torn = draw_knee(np.random.default_rng(seed), lesions)
    intact = draw_knee(np.random.default_rng(seed), lesions | {"acl": None})
    pose = Pose(np.random.default_rng(seed), side=1)
    points = next(points for kind, _, points in torn.lesions if kind == "acl")
    for plane in PLANES:
        (volume, geometry), (healthy, _) = (
            scan(drawn, pose, plane, Cut(128), np.random.default_rng(seed))
            for drawn in (torn, intact)
        )
        found = place(pose.to_patient(points), geometry, torn.grid)
        s, r, c = np.rint(found["centre"]).astype(int)
        change = volume.astype(float) - healthy
        assert change[s, r - 3 : r + 4, c - 3 : c + 4].mean() > 20
        assert s in found["visible"]
        # The rest of the knee is the same: what changed lies round that place, within 25 mm.
        _, rows, columns = np.nonzero(np.abs(change) > 40)
        apart = np.hypot(rows - r, columns - c) * geometry["step_mm"][1]
        assert np.quantile(apart, 0.99) < 25


def fibula_is_left_in_the_picture(side):
    """The side of an axial picture on which the fibula's marrow lies, from the geometry alone."""
    pose = Pose(np.random.default_rng(0), side)
    (x, _, _), = pose.to_patient(np.array([[37.0, 18.0, -24.0]]))  # fmt: skip
    return x < 0  # columns grow to the patient's left


def test_left_and_right_knees_are_mirrored():
    assert not fibula_is_left_in_the_picture(side=1)  # a left knee: lateral is the patient's left
    assert fibula_is_left_in_the_picture(side=-1)


def test_pose_goes_there_and_back():
    pose = Pose(np.random.default_rng(3), side=-1)
    points = np.random.default_rng(0).uniform(-50, 50, (200, 3))
    np.testing.assert_allclose(pose.to_knee(pose.to_patient(points)), points, atol=1e-3)


@pytest.mark.whole
def interrupt(*args, **more):
    raise KeyboardInterrupt


def test_an_interrupted_run_leaves_no_csv(knees, tmp_path, monkeypatch):
    make(tmp_path, "--workers", 1, exams=5)
    monkeypatch.setattr(prepare, "make_exam", interrupt)
    words = ("--exams", 5, "--valid", 5, "--size", 64, "--workers", 1, "--out", tmp_path)
    assert run_script(SCRIPT, *words).returncode == 130
    assert not list(tmp_path.glob("*.csv"))
    monkeypatch.undo()
    make(tmp_path, "--workers", 1, exams=5)  # and the next run may go on in that folder
    assert len(list(tmp_path.glob("*.csv"))) == 6


@pytest.mark.parametrize("gone", ["*.csv", "*/*/*.npy"])
def test_another_data_set_is_not_written_over(exams, gone):
    for path in exams.glob(gone):
        path.unlink()
    before = {path: path.read_bytes() for path in exams.rglob("*") if path.is_file()}
    assert_one_line_error(run_script(SCRIPT, "--out", exams), "another data set", "--out")
    assert before == {path: path.read_bytes() for path in exams.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "flag, value", [("--exams", 0), ("--valid", "x"), ("--size", 10), ("--workers", -1)]
)
def test_bad_arguments(tmp_path, flag, value):
    assert_one_line_error(run_script(SCRIPT, "--out", tmp_path, flag, value), flag)
    assert not list(tmp_path.iterdir())


def test_out_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    done = run_script(SCRIPT, "--out", tmp_path / "file" / "folder")
    assert_one_line_error(done, "cannot write")
