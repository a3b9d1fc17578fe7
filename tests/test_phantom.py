"""The synthetic knees: layout, labels, determinism, and lesions where lesions.json says."""

import csv
import importlib.util
import json

import numpy as np
import pytest
from conftest import ROOT, run_process

PLANES = ("axial", "coronal", "sagittal")
TASKS = ("abnormal", "acl", "meniscus")


def load_script():
    spec = importlib.util.spec_from_file_location("phantom", ROOT / "data/phantom/prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


phantom = load_script()


def make(out, *more):
    return run_process("data/phantom/prepare.py", "--exams", 8, "--valid", 5, "--size", 64,
                      "--out", out, *more)  # fmt: skip


@pytest.fixture(scope="module")
def knees(tmp_path_factory):
    out = tmp_path_factory.mktemp("knees")
    assert make(out).returncode == 0
    return out


def labels(out, split, task):
    with open(out / f"{split}-{task}.csv", newline="") as file:
        return {int(exam_id): int(label) for exam_id, label in csv.reader(file)}


def test_layout(knees):
    for split, ids in (("train", range(8)), ("valid", range(8, 13))):
        for task in TASKS:
            assert list(labels(knees, split, task)) == list(ids)
            assert set(labels(knees, split, task).values()) == {0, 1}
        for plane in PLANES:
            for exam_id in ids:
                volume = np.load(knees / split / plane / f"{exam_id:04d}.npy")
                assert volume.dtype == np.uint8 and volume.shape[1:] == (64, 64)
                assert 15 <= len(volume) <= 30 and volume.max() > 100


def test_same_bytes_for_any_number_of_workers(knees, tmp_path):
    assert make(tmp_path, "--workers", 1).returncode == 0
    for path in knees.rglob("*.*"):
        assert path.read_bytes() == (tmp_path / path.relative_to(knees)).read_bytes()


def test_another_seed_gives_other_knees(knees, tmp_path):
    assert make(tmp_path, "--seed", 1).returncode == 0
    name = "train/sagittal/0000.npy"
    assert (knees / name).read_bytes() != (tmp_path / name).read_bytes()


@pytest.mark.parametrize("n", [5, 60, 200, 1130])
def test_prevalences_are_mrnets(n):
    rows = phantom.draw_labels(np.random.default_rng(0), n)
    for task, share in (("abnormal", 0.80), ("acl", 0.20), ("meniscus", 0.37)):
        count = sum(row[task] for row in rows)
        assert abs(count - share * n) <= 1 and 0 < count < n
    assert all(row["abnormal"] for row in rows if row["acl"] or row["meniscus"])


def test_lesions_are_those_of_the_labels(knees):
    lesions = json.loads((knees / "lesions.json").read_text())
    for split in ("train", "valid"):
        for task in ("acl", "meniscus"):
            for exam_id, label in labels(knees, split, task).items():
                tasks = {lesion["task"] for lesion in lesions[str(exam_id)]["lesions"]}
                assert (task in tasks) == bool(label)
        for exam_id, label in labels(knees, split, "abnormal").items():
            assert bool(lesions[str(exam_id)]["lesions"]) == bool(label)


def test_a_lesion_is_one_place_in_three_planes(knees):
    for entry in json.loads((knees / "lesions.json").read_text()).values():
        for lesion in entry["lesions"]:
            places = []
            for plane, found in lesion["planes"].items():
                g = entry["planes"][plane]
                mm = np.array(found["centre"]) * g["step_mm"] + g["start_mm"]
                patient = np.empty(3)
                patient[g["axes"]] = mm * g["directions"]
                places.append(patient)
            np.testing.assert_allclose(places[0], places[1], atol=0.1)
            np.testing.assert_allclose(places[0], places[2], atol=0.1)


@pytest.mark.parametrize("seed", range(4))
def test_torn_acl_is_brighter_than_the_same_knee_untorn_at_the_noted_place(seed):
    wrong = phantom.draw_lesions(
        np.random.default_rng(seed), {"abnormal": 1, "acl": 1, "meniscus": 0}
    )
    torn = phantom.draw_knee(np.random.default_rng(seed), wrong)
    intact = phantom.draw_knee(np.random.default_rng(seed), wrong | {"acl": None})
    pose = phantom.Pose(np.random.default_rng(seed), side=1)
    points = next(points for _, task, points in torn.lesions if task == "acl")
    for plane in PLANES:
        rngs = [np.random.default_rng(seed) for _ in range(2)]
        (volume, geometry), (healthy, _) = (
            phantom.scan(knee, pose, plane, 128, rng)
            for knee, rng in zip((torn, intact), rngs, strict=True)
        )
        s, r, c = np.rint(phantom.place(pose.to_patient(points), geometry)["centre"]).astype(int)
        change = volume[s].astype(float) - healthy[s]
        assert change[r - 3 : r + 4, c - 3 : c + 4].mean() > 20
        # and nothing else in the exam has changed as much
        found = np.unravel_index(np.abs(volume.astype(float) - healthy).argmax(), volume.shape)
        assert np.hypot(found[1] - r, found[2] - c) * geometry["step_mm"][1] < 15


def test_left_is_the_mirror_of_right():
    pose = phantom.Pose(np.random.default_rng(0), side=1)
    mirrored = phantom.Pose(np.random.default_rng(0), side=-1)
    pose.matrix = mirrored.matrix = np.eye(3)
    mirrored.matrix = np.diag([-1.0, 1, 1])
    for each in (pose, mirrored):
        each.shift, each.wave = np.zeros(3), (np.zeros((3, 3)), np.zeros(3), np.zeros(3))
    lateral = np.array([[30.0, 0, 0]])
    np.testing.assert_allclose(pose.to_patient(lateral), [[30, 0, 0]])  # left knee: to the left
    np.testing.assert_allclose(mirrored.to_patient(lateral), [[-30, 0, 0]])


def test_pose_goes_there_and_back():
    pose = phantom.Pose(np.random.default_rng(3), side=-1)
    points = np.random.default_rng(0).uniform(-50, 50, (200, 3))
    np.testing.assert_allclose(pose.to_knee(pose.to_patient(points)), points, atol=1e-3)


def test_another_data_set_is_not_written_over(exams):
    before = (exams / "train-acl.csv").read_text()
    done = make(exams)
    assert done.returncode == 2 and "another data set" in done.stderr.splitlines()[-1]
    assert (exams / "train-acl.csv").read_text() == before


@pytest.mark.parametrize("flag, value", [("--exams", "0"), ("--size", "10"), ("--workers", "-1")])
def test_bad_arguments(tmp_path, flag, value):
    done = make(tmp_path, flag, value)
    assert done.returncode == 2 and flag in done.stderr


def test_out_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    done = make(tmp_path / "file" / "folder")
    assert done.returncode == 2 and "cannot write" in done.stderr
