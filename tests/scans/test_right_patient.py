"""The right patient, the right knee, or no answer: one test or more for each numbered point.

The points are the rows of docs/reliability.md's second table.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pydicom
import pytest
from conftest import (
    PLANES,
    QUICK,
    ROOT,
    assert_one_line_error,
    finding_of,
    needs_make,
    predict_exams,
    rows_of,
    run_process,
    run_script,
    small_file_system,
    write_exams,
)
from hospital import KNEE, code_of, name_of, write_series, write_study
from sklearn.linear_model import LogisticRegression

from data.dicom.prepare import number_exams, write_groups
from dataloader import MRDataset
from mrnet.errors import InputError
from mrnet.evaluation.metrics import choose_threshold, sigmoid
from mrnet.inference.task_models import Network
from mrnet.layout.names import exam_name
from mrnet.layout.volumes import write_volume
from mrnet.networks import weights
from mrnet.networks.saved import read_checkpoint, write_checkpoint
from mrnet.runtime import cli, devices, jobs, machine
from mrnet.scans.command import Report
from mrnet.scans.register import Register
from mrnet.scans.series import Patient
from mrnet.scans.studies import Choice, Exam, Study, find_exams, volumes_of
from mrnet.scans.words import sides_in
from mrnet.training.checkpoint import load_model
from mrnet.training.memory import bytes_of_a_job
from mrnet.training.splits import split_exams
from train import evaluate_model, train_model


def predict(trained, *args):
    models = ("--models-dir", trained[0] / "models", "--precision", "fp32", "--allow-synthetic")
    return run_script("predict.py", *models, *args)


def prepare(*args):
    return run_process("data/dicom/prepare.py", *args)


def train(exams, *more, plane="axial", models="models"):
    files = ("--data-dir", exams, "--models-dir", exams.parent / models, "--logs-dir",
             exams.parent / "logs", "--precision", "fp32")  # fmt: skip
    return run_script("train.py", "--task", "acl", "--plane", plane, *files, *QUICK, *more)


def stack(exams, *more, models="models"):
    return run_script("train_logistic_regression.py", "--data-dir", exams, "--models-dir",
                      exams.parent / models, "--logs-dir", exams.parent / "logs",
                      "--precision", "fp32", *more)  # fmt: skip


# --- 1: names -------------------------------------------------------------------------------------


def test_1_a_study_that_arrives_later_takes_nobodys_row(trained, tmp_path):
    inbox, out = tmp_path / "inbox", tmp_path / "x.csv"
    for number in (5, 7):
        write_study(inbox, number, "one")
    assert predict(trained, inbox, "--out", out).returncode == 0
    write_study(inbox, 3, "one")  # sorts before both
    shutil.rmtree(inbox / "study07")
    assert predict(trained, inbox, "--out", out, "--resume").returncode == 0
    assert [row["source"] for row in rows_of(out)] == ["study03", "study05"]
    assert len({row["exam"] for row in rows_of(out)}) == 2
    fresh = tmp_path / "fresh.csv"
    assert predict(trained, inbox, "--out", fresh).returncode == 0
    assert out.read_bytes() == fresh.read_bytes()


@pytest.mark.whole
def test_1_a_name_does_not_depend_on_what_lies_beside_it(trained, tmp_path):
    for number in (1, 2, 3):
        write_study(tmp_path / "inbox", number, "one")
    names = {}
    for source in ("inbox", "inbox/study02", "inbox/study03"):
        done = predict(trained, tmp_path / source)
        for row in csv.DictReader(done.stdout.splitlines()):
            assert names.setdefault(row["input"], row["exam"]) == row["exam"]
    assert len(set(names.values())) == 3
    assert set(names.values()) == {
        name_of(f"1.2.826.0.1.{1000 + n}", "LR"[n % 2]) for n in (1, 2, 3)
    }


@pytest.mark.whole
def test_1_no_page_replaces_another_exams(trained, tmp_path):
    args = ("--task", "acl", "--models-dir", trained[0] / "models", "--out", tmp_path / "report",
            "--allow-synthetic", "--precision", "fp32")  # fmt: skip
    for number in (7, 8):
        write_study(tmp_path, number, "one")
        done = run_script("explain.py", tmp_path / f"study{number:02d}", *args)
        assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "report").glob("*-acl.html"))) == 2
    # Two data folders have exams of the same number.
    for name in ("one", "two"):
        write_exams(tmp_path / name, seed=len(name) + ord(name[0]))
    assert run_script("explain.py", tmp_path / "one", "--exam", "3", *args).returncode == 0
    page = (tmp_path / "report" / "0003-acl.html").read_bytes()
    done = run_script("explain.py", tmp_path / "two", "--exam", "3", *args)
    assert_one_line_error(done, "0003-acl.html", "another exam", "--overwrite")
    assert (tmp_path / "report" / "0003-acl.html").read_bytes() == page
    assert run_script("explain.py", tmp_path / "one", "--exam", "3", *args).returncode == 0


def test_1_no_identifier_in_rows(trained, tmp_path):
    write_study(tmp_path / "inbox", 4, "both")
    done = predict(trained, tmp_path / "inbox", "--jsonl")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2
    for secret in ("1.2.826", "SECRET", "P4", "19610203"):
        assert secret not in done.stdout + done.stderr


# --- 2, 3: numbers and groups ---------------------------------------------------------------------


def import_both_splits(tmp_path, patients=None):
    """README's workflow: train, then valid, each of four studies -> data folder."""
    kinds = patients or ("one", "one")
    for split, numbers, kind in (("train", range(4), kinds[0]), ("valid", range(4, 8), kinds[1])):
        for number in numbers:
            write_study(tmp_path / split, number, kind)
        labels = tmp_path / f"{split}.csv"
        lines = [f"study{n:02d},acl,{n % 2}" for n in numbers]
        labels.write_text("\n".join(["exam,task,label", *lines, ""]))
        options = ("--split", split, "--labels", labels)
        done = prepare(tmp_path / split, tmp_path / "mine", *options)
        assert done.returncode == 0, done.stderr
    return tmp_path / "mine"


def test_2_training_and_validation_exams_have_numbers_of_their_own(tmp_path):
    mine = import_both_splits(tmp_path)
    done = run_script("tools/check.py", mine)
    assert done.returncode == 0, done.stdout
    ids = [(mine / f"{split}-acl.csv").read_text().split() for split in ("train", "valid")]
    assert ids == [["0,0", "1,1", "2,0", "3,1"], ["4,0", "5,1", "6,0", "7,1"]]
    # The same exams again are known, into the other split they are refused.
    assert "exams that were there: 4" in prepare(tmp_path / "valid", mine).stdout
    done = prepare(tmp_path / "train", mine, "--split", "valid")
    assert_one_line_error(done, "train already")


def test_3_importers_tell_patients_apart(tmp_path):
    mine = import_both_splits(tmp_path, ("same patient", "same patient"))
    groups = dict(line.split(",") for line in (mine / "train-groups.csv").read_text().split())
    assert groups["0"] == groups["1"] != groups["2"] == groups["3"]
    valid = dict(line.split(",") for line in (mine / "valid-groups.csv").read_text().split())
    assert not set(valid.values()) & set(groups.values())
    for path in mine.rglob("*"):
        assert path.suffix == ".npy" or path.is_dir() or "P0" not in path.read_text()
    # A patient of the training exams among the validation exams.
    with open(mine / "valid-groups.csv", "a") as file:
        file.write(f"99,{groups['0']}\n")
    done = run_script("tools/check.py", mine)
    assert done.returncode == 2 and "group" in done.stdout and "both splits" in done.stdout


def exam_of(name, number, issuer=""):
    return Exam(name, "", Study(patients={Patient(number, issuer)}), "L", [], "")


def test_3_a_patient_whose_issuer_one_study_leaves_out_is_one_group(tmp_path):
    """In folders that several runs wrote to, one of them with a corrected number."""
    key = b"key"
    for split, exams in (
        ("train", [exam_of("a", "p", "H"), exam_of("b", "q"), exam_of("c", "q"), exam_of("d", "")]),
        ("valid", [exam_of("e", "p")]),
        ("train", [exam_of("b", "r", "H")]),
    ):
        register, *_ = number_exams(exams, tmp_path, split, False, key, Report())
        for exam in exams:
            write_volume(tmp_path / split / f"axial/{register.number(exam.name):04d}.npy",
                         np.zeros(1))  # fmt: skip
        register.save()
    write_groups(tmp_path, Register(tmp_path))
    assert (tmp_path / "train-groups.csv").read_text() == "0,0\n1,1\n2,2\n3,3\n"
    assert (tmp_path / "valid-groups.csv").read_text() == "4,0\n"


def test_3_a_register_of_an_earlier_version_is_refused(tmp_path):
    """Some of its patients are hashed with their number's issuer, and would be taken for two."""
    (tmp_path / "exams.csv").write_text("id,exam,patient\n0,0123456789abcdef-L,aa\n")
    with pytest.raises(InputError, match="exams.csv: .*earlier version.*into a new folder"):
        Register(tmp_path)


def test_3_both_knees_of_a_study_that_names_nobody_are_one_group(tmp_path):
    register = Register(tmp_path)
    for name in (exam_name("1.2", "L"), exam_name("1.3", "L"), exam_name("1.2", "R")):
        register.number(name)
    assert register.groups() == {0: 0, 1: 1, 2: 0}


def test_3_two_knees_of_one_study_are_one_group(tmp_path):
    write_study(tmp_path / "scans", 0, "both")
    write_study(tmp_path / "scans", 1, "one")
    assert prepare(tmp_path / "scans", tmp_path / "mine").returncode == 0
    assert (tmp_path / "mine/valid-groups.csv").read_text() == "0,0\n1,0\n2,1\n"


@pytest.mark.parametrize("seed", range(3))
def test_3_no_group_stands_in_two_folds(tmp_path, seed):
    exams = write_exams(tmp_path / "data", train=36)
    rows = "".join(f"{i},{i // 2}\n" for i in range(36))  # pairs
    (exams / "train-groups.csv").write_text(rows)
    data = MRDataset(exams, "acl", "axial")
    groups = np.array(data.groups)
    folds = split_exams(data.labels, 4, seed, groups)
    assert sorted(np.concatenate(folds)) == list(range(36))
    for out in folds:
        assert not set(groups[out]) & set(np.delete(groups, out))
        assert set(data.labels[out, 0]) == {0, 1}


def test_3_training_keeps_groups_together(tmp_path):
    exams = write_exams(tmp_path / "data", train=84)
    (exams / "train-groups.csv").write_text("".join(f"{i},{i // 2}\n" for i in range(84)))
    done = train(exams, "--folds", "2", "--protocol", "held-out", "--epochs", "1")
    assert done.returncode == 0, done.stderr
    for fold in (1, 2):
        _, metadata = load_model(exams.parent / "models" / f"acl-axial-fold{fold}of2.pt")
        parts = [{int(i) // 2 for i in metadata[name]} for name in ("out_of_fold", "tuning")]
        unused = {int(i) for name in ("out_of_fold", "tuning") for i in metadata[name]}
        parts.append({i // 2 for i in set(range(84)) - unused})
        assert all(parts) and sum(map(len, parts)) == 42  # none is counted twice


# --- 4: knees -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["both", "both untold"])
def test_4_each_knee_is_an_exam_of_its_own(trained, tmp_path, monkeypatch, kind):
    from hospital import code_said, predict_code

    monkeypatch.setattr(Network, "logit", predict_code)
    expected = write_study(tmp_path, 6, kind)
    done = predict(trained, tmp_path)
    rows = {row["exam"]: row for row in csv.DictReader(done.stdout.splitlines())}
    assert rows.keys() == expected.keys() and len(rows) == 2
    for name, row in rows.items():
        assert {plane: code_said(row[plane]) for plane in PLANES} == expected[name].codes


def test_4_one_knee_without_laterality_has_the_side_of_its_place(trained, tmp_path):
    for number in (0, 1):
        write_study(tmp_path, number, "one untold")
    rows = list(csv.DictReader(predict(trained, tmp_path).stdout.splitlines()))
    assert [row["exam"][-2:] for row in rows] == ["-L", "-R"]


@pytest.mark.parametrize(
    ("title", "sides"),
    [("MRI KNEE RT WO CONTRAST", "R"), ("MR Knie li.", "L"), ("IRM genou droit", "R"),
     ("RM RODILLA IZQUIERDA", "L"), ("t2_sag_knee_R", "R"), ("LEFT SAG PD FS", "L"),
     ("MRI LOW EXT JT LT WO", "L"), ("RM ginocchio dx", "R"), ("MRI KNEE W/O CONT RT", "R"),
     ("MR KNEES LEFT AND RIGHT", "LR"), ("MRI KNEES LT AND RT", "LR"), ("KNEE R>L", "LR"),
     ("COR PD FS R-L KNEE", "LR"), ("bilateral knee R L", "LR"), ("ginocchio dx sx", "LR"),
     ("KNEE AX PD R/L", ""), ("RT PD FS SAG", ""), ("T2 TSE RT EXT TRIG", ""),
     ("KNEE RE-SCAN", ""), ("LOWER EXTREMITY L-SPINE", ""), ("MR KNEE", ""), ("brightness", "")],
)  # fmt: skip
def test_4_titles_tell_the_side(title, sides):
    assert sides_in(title) == set(sides)


@pytest.mark.parametrize(
    ("x", "tags", "side"),
    [(0.0, {"StudyDescription": "MR KNEE RT"}, "R"),
     (0.0, {"StudyDescription": "MR KNEE RT", "SeriesDescription": "LEFT PD FS"}, "L"),
     (0.0, {"ProtocolName": "PD left knee"}, "L"),
     (0.0, {}, ""),
     (KNEE, {"StudyDescription": "MR KNEE LT"}, "L"),
     (KNEE, {"StudyDescription": "MR KNEE RT"}, "L"),
     (0.0, {"SeriesDescription": "PD R>L", "ProtocolName": "knee"}, ""),
     (0.0, {"SeriesDescription": "PD left", "ProtocolName": "knee right",
            "StudyDescription": "MR KNEE LT"}, ""),
     (0.0, {"StudyDescription": "MR KNEE RT", "Laterality": "L"}, "L")],
)  # fmt: skip
def test_4_one_knee_in_the_middle_has_the_side_that_it_is_called(tmp_path, x, tags, side):
    for number, plane in enumerate(PLANES):
        for path in scan(tmp_path, plane, x, number):
            ds = pydicom.dcmread(path)
            for name, value in tags.items():
                setattr(ds, name, value)
            ds.save_as(path)
    report = Report(collect=True)
    (exam,) = find_exams(tmp_path, report)
    volumes, *_ = volumes_of(exam, Choice([], "pad"), report, "exam")
    said = "\n".join(text for _, text in report.take())
    assert exam.side == side and sorted(volumes) == sorted(PLANES)
    contradicted = "Laterality" in tags or (x and "RT" in tags["StudyDescription"])
    assert said.count("a left knee by its Laterality or place, but") == 3 * bool(contradicted)


def test_4_series_that_are_called_left_and_right_are_no_exam(tmp_path):
    for number, (plane, called) in enumerate(zip(PLANES, ("left", "left", "right"), strict=True)):
        scan(tmp_path, plane, 0.0, number, description=f"PD FS {called} {plane}")
    (exam,) = find_exams(tmp_path, Report(collect=True))
    assert exam.side == "" and "called left and right knee" in exam.refused


def scan(folder, plane, x, number, study="1.2.826.7", **more):
    more = {"FrameOfReferenceUID": "1.2.9", "description": f"PD FS {plane}"} | more
    return write_series(folder, code_of(1, "L", plane), plane, x, f"{study}.{number}", study=study,
                        number=number, **more)  # fmt: skip


def test_4_what_does_not_overlap_is_never_one_exam(trained, tmp_path):
    """Laterality says left of series that lie at both sides; frames of reference that differ."""
    for number, (plane, x) in enumerate(zip(PLANES, (KNEE, KNEE, -KNEE), strict=True)):
        scan(tmp_path / "a", plane, x, number, Laterality="L")
    done = predict(trained, tmp_path / "a")
    (row,) = csv.DictReader(done.stdout.splitlines())
    assert done.returncode == 1 and row["decision"] == row["stack"] == ""
    assert "do not overlap in space" in row["error"]
    for number, plane in enumerate(PLANES):
        scan(tmp_path / "b", plane, 0.0, number, FrameOfReferenceUID=f"1.2.9.{number % 2}")
    done = predict(trained, tmp_path / "b")
    (row,) = csv.DictReader(done.stdout.splitlines())
    assert done.returncode == 1 and row["decision"] == "" and "frames of reference" in row["error"]


def with_calf(folder, planes=PLANES, z=-250.0, **more):
    """A knee's series, and an axial one z mm from them: its only exam, and what is said."""
    for number, plane in enumerate((*planes, "axial")):
        for path in scan(folder, plane, KNEE, number, StudyDescription="MR KNEE", **more):
            if number == len(planes):
                ds = pydicom.dcmread(path)
                ds.ImagePositionPatient[2] += z
                ds.SeriesDescription = "AX STIR CALF"
                ds.save_as(path)
    report = Report(collect=True)
    (exam,) = find_exams(folder, report)
    volumes, *_ = volumes_of(exam, Choice([], "pad"), report, "exam")
    return exam, volumes, "\n".join(text for _, text in report.take())


@pytest.mark.parametrize("tags", [{"Laterality": "L"}, {}])
def test_4_one_series_of_another_place_is_left_out(tmp_path, tags):
    exam, volumes, said = with_calf(tmp_path / "calf", **tags)
    assert exam.side == "L" and sorted(volumes) == sorted(PLANES)
    assert "warning: exam: left out series 3 'AX STIR CALF', " in said
    assert "axial: series 0 " in said
    assert "left out" not in with_calf(tmp_path / "same", z=0.0, **tags)[2]


@pytest.mark.parametrize("tags", [{"Laterality": "L"}, {}])
def test_4_the_only_series_of_a_plane_is_not_left_out(tmp_path, tags):
    """Which series are of the knee is not known then; nor without a clear majority."""
    for planes in (("coronal", "sagittal"), ("axial",)):
        exam, volumes, said = with_calf(tmp_path / planes[0], planes, **tags)
        assert not volumes and "do not overlap in space" in exam.refused and exam.refused in said


def test_4_a_field_of_view_with_both_knees_is_refused(trained, tmp_path):
    for number, plane in enumerate(PLANES):
        for path in scan(tmp_path, plane, 0.0, number):
            ds = pydicom.dcmread(path)
            if plane != "sagittal":
                ds.PixelSpacing = [4.0, 9.0]  # 360 mm from right to left
                ds.ImagePositionPatient[0] = -175
            ds.save_as(path)
    done = predict(trained, tmp_path)
    (row,) = csv.DictReader(done.stdout.splitlines())
    assert done.returncode == 1 and row["decision"] == "" and "both knees" in row["error"]
    assert len(row["error"].splitlines()) == 1 and row["planes"] == "sagittal"


# --- 5: planes that cannot be used ----------------------------------------------------------------


def test_5_a_usable_series_comes_before_a_time_series(trained, tmp_path):
    """Two fat-suppressed ones, the first with five time points at each place."""
    for number, plane in enumerate(PLANES):
        scan(tmp_path / "a", plane, KNEE, number)
    scan(tmp_path / "b", "sagittal", KNEE, 8, times=5)
    done = predict(trained, tmp_path, "--out", tmp_path / "x.csv")
    assert done.returncode == 0, done.stderr
    (row,) = rows_of(tmp_path / "x.csv")
    assert row["decision"] and row["planes"] == "+".join(PLANES)
    assert (
        "sagittal: series 2 'PD FS sagittal'" in done.stdout
        and "not taken: series 8" in done.stdout
    )


def test_5_the_second_choice_is_tried_and_said(trained, tmp_path):
    from hospital import damage_pixels

    for number, plane in enumerate(PLANES):
        scan(tmp_path / "a", plane, KNEE, number)
    damage_pixels(scan(tmp_path / "b", "axial", KNEE, 7, description="PD FS axial again")[0])
    for path in (tmp_path / "a").glob("1282670-*"):  # the healthy axial one is the second choice
        path.unlink()
    scan(tmp_path / "c", "axial", KNEE, 9, description="PD axial")
    done = predict(trained, tmp_path, "--out", tmp_path / "x.csv")
    assert done.returncode == 0, done.stderr
    assert "passed over" in done.stderr and "100 of 3200 bytes" in done.stderr
    assert rows_of(tmp_path / "x.csv")[0]["planes"] == "+".join(PLANES)


def test_5_no_decision_without_a_plane_that_was_there(trained, tmp_path):
    expected = write_study(tmp_path / "scans", 9, "damaged")
    done = predict(trained, tmp_path / "scans", "--out", tmp_path / "x.csv")
    (row,) = rows_of(tmp_path / "x.csv")
    assert done.returncode == 1 and row["exam"] in expected
    assert row["stack"] == row["threshold"] == row["decision"] == "" and row["axial"]
    assert "coronal" in row["error"] and row["missing"] == "coronal"
    done = predict(trained, tmp_path / "scans", "--out", tmp_path / "y.csv", "--partial")
    (row,) = rows_of(tmp_path / "y.csv")
    assert done.returncode == 1 and row["decision"] and row["note"].startswith("partial")
    args = ("--task", "acl", "--models-dir", trained[0] / "models", "--out", tmp_path / "report",
            "--allow-synthetic")  # fmt: skip
    done = run_script("explain.py", tmp_path / "scans", *args)
    assert done.returncode == 1 and "no decision" in done.stderr


def test_5_a_plane_whose_files_cannot_be_read_is_not_a_missing_one(trained, tmp_path):
    for number, plane in enumerate(PLANES):
        paths = scan(tmp_path / plane, plane, KNEE, number)
        for path in paths if plane == "coronal" else ():
            path.write_bytes(path.read_bytes()[:400])
    done = predict(trained, tmp_path, "--out", tmp_path / "x.csv")
    (row,) = rows_of(tmp_path / "x.csv")
    assert done.returncode == 1 and row["decision"] == "" and "cannot be read: 6" in row["error"]


# --- 6: a full disk -------------------------------------------------------------------------------


@pytest.fixture
def full_disk(tmp_path):
    with small_file_system(tmp_path / "full", "2m") as folder:
        yield folder


def test_6_a_full_disk_is_said_and_no_exam_vanishes(trained, tmp_path, full_disk, monkeypatch):
    for number in range(4):
        write_study(tmp_path / "scans", number, "one untold")
    (full_disk / "other").write_bytes(bytes(1_500_000))
    monkeypatch.setenv("TMPDIR", str(full_disk))
    monkeypatch.setattr("tempfile.tempdir", None)
    done = predict(trained, tmp_path / "scans", "--out", tmp_path / "x.csv")
    assert done.returncode == 1 and "No space left on device" in done.stderr.splitlines()[-1]
    rows = rows_of(tmp_path / "x.csv")
    assert [row["source"] for row in rows] == [f"study{n:02d}" for n in range(4)]
    assert all("No space left" in row["error"] and row["decision"] == "" for row in rows)


def test_6_the_importer_counts_what_a_full_disk_left_out(tmp_path, full_disk):
    for number in range(4):
        write_study(tmp_path / "scans", number, "one untold")
    done = prepare(tmp_path / "scans", full_disk / "mine")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "No space left on device" in last
    assert "3 of 4 exams are not written" in last
    planes = [path.parent.name for path in full_disk.rglob("*.npy")]
    assert sorted(planes) == sorted(PLANES)  # one exam whole, no half of the second
    shutil.copytree(full_disk / "mine", tmp_path / "mine")
    done = prepare(tmp_path / "scans", tmp_path / "mine")
    assert done.returncode == 0 and "3 of 3 exams" in done.stdout
    assert len(list((tmp_path / "mine").rglob("*.npy"))) == 12


# --- 7: what the networks were trained on ---------------------------------------------------------


@pytest.mark.whole
def test_7_networks_that_saw_synthetic_knees_refuse_patients(trained, tmp_path):
    write_study(tmp_path / "scans", 1, "one")
    models = ("--models-dir", trained[0] / "models")
    done = run_script("predict.py", tmp_path / "scans", *models)
    assert_one_line_error(done, "synthetic exams (phantom)", "--allow-synthetic")
    assert done.stdout == ""
    args = (tmp_path / "scans", "--task", "acl", *models, "--out", tmp_path / "report")
    assert_one_line_error(run_script("explain.py", *args), "--allow-synthetic")
    done = predict(trained, tmp_path / "scans")
    (row,) = csv.DictReader(done.stdout.splitlines())
    assert "SYNTHETIC" in row["trained_on"]
    done = run_script("explain.py", *args, "--allow-synthetic")
    assert done.returncode == 0 and "SYNTHETIC" in done.stdout
    (page,) = (tmp_path / "report").glob("*.html")
    assert '"synthetic": true' in page.read_text() and "SYNTHETIC" in page.read_text()
    metadata = load_model(trained[0] / "models" / "acl-axial.pt")[1]
    assert metadata["dataset"]["name"] == "phantom" and metadata["dataset"]["licence"] == "MIT"


def test_7_exams_in_another_orientation_are_refused(trained, tmp_path):
    shutil.copytree(trained[0] / "data", tmp_path / "data")
    path = tmp_path / "data" / "dataset.json"
    dataset = json.loads(path.read_text())
    assert dataset["orientation"] == {"axial": "IPL", "coronal": "PIL", "sagittal": "LIP"}
    dataset["orientation"]["coronal"] = "PIR"
    path.write_text(json.dumps(dataset))
    done = predict(trained, tmp_path / "data")
    assert_one_line_error(done, "coronal", "PIR", "PIL")


def test_7_every_importer_describes_its_exams(tmp_path):
    write_study(tmp_path / "scans", 1, "one")
    assert prepare(tmp_path / "scans", tmp_path / "mine").returncode == 0
    content = json.loads((tmp_path / "mine" / "dataset.json").read_text())
    assert content["synthetic"] is False and content["orientation"]["sagittal"] == "LIP"
    done = run_process("data/phantom/prepare.py", "--out", tmp_path / "mine", "--exams", "5")
    assert done.returncode == 2  # synthetic exams do not go among these


# --- 8, 9: thresholds and logits ------------------------------------------------------------------


def predictions(exams, split):
    rows = rows_of(exams.parent / "models" / "acl-predictions.csv")
    return {row["id"]: row for row in rows if row["split"] == split}


@pytest.mark.whole
def test_8_thresholds_come_from_exams_that_no_network_were_trained_on(tmp_path):
    exams = write_exams(tmp_path / "data", train=60)
    for plane in PLANES:
        assert train(exams, "--protocol", "held-out", plane=plane).returncode == 0
    done = stack(exams)
    assert done.returncode == 0, done.stdout + done.stderr
    tuning = load_model(tmp_path / "models" / "acl-axial.pt")[1]["tuning"]
    rows = [predictions(exams, "train")[i] for i in tuning]
    labels = np.array([int(row["label"]) for row in rows])
    fitted = json.loads((tmp_path / "models" / "acl-stack.json").read_text())
    threshold = fitted["combinations"]["axial+coronal+sagittal"]["threshold"]
    wanted = choose_threshold(labels, np.array([float(row["stack"]) for row in rows]))
    assert threshold == pytest.approx(wanted, abs=1e-6)
    assert f"{len(tuning)} training exams that no network was trained on" in fitted["thresholds"]
    # The regression is fitted on the others.
    others = [row for i, row in predictions(exams, "train").items() if i not in tuning]
    x = np.array([[float(row[plane]) for plane in PLANES] for row in others])
    y = np.array([int(row["label"]) for row in others])
    reference = LogisticRegression().fit(x, y)
    found = fitted["combinations"]["axial+coronal+sagittal"]["coefficients"]
    np.testing.assert_allclose(found, reference.coef_[0], atol=1e-4)


def test_8_a_threshold_that_cannot_be_trusted_says_so(trained):
    _, said = trained
    assert re.search(r"^stack .*\d\.\d{3}\*", said["stack"].stdout, re.M)
    assert "* thresholds: chosen on exams that the networks were trained on" in said["stack"].stdout
    results = json.loads((trained[0] / "models" / "acl-results.json").read_text())
    assert "trained on" in results["thresholds"]


@pytest.mark.whole
def test_8_folds_say_what_their_thresholds_are_applied_to(exams):
    for plane in PLANES:
        assert train(exams, "--folds", "2", "--epochs", "1", plane=plane).returncode == 0
    assert "applied to means of 2" in stack(exams, "--folds", "2").stdout


@pytest.mark.whole
def test_9_logits_stay_as_they_are(trained, tmp_path):
    """Networks so sure that a float32 probability is 1: the regression sees 37 as 37."""
    shutil.copytree(trained[0] / "models", tmp_path / "models")
    shutil.copytree(trained[0] / "data", tmp_path / "data")
    exams, x = tmp_path / "data", {}
    for plane in PLANES:
        path = tmp_path / "models" / f"acl-{plane}.pt"
        content = read_checkpoint(path)
        content["model"]["classifier.weight"] *= 2000
        content["model"]["classifier.bias"] += 30
        write_checkpoint(path, content)
        data = MRDataset(exams, "acl", plane)
        found = predict_exams(load_model(path)[0], data, devices.pick_device("cpu"), "fp32")
        x[plane] = found[:, 0]
    assert max(np.abs(values).max() for values in x.values()) > 37
    done = stack(exams, "--features", "logit")
    assert done.returncode == 0, done.stdout + done.stderr
    columns = np.stack([x[plane] for plane in PLANES], axis=1).astype(float)
    reference = LogisticRegression().fit(columns, data.labels[:, 0])
    fitted = json.loads((tmp_path / "models" / "acl-stack.json").read_text())
    found = fitted["combinations"]["axial+coronal+sagittal"]["coefficients"]
    np.testing.assert_allclose(found, reference.coef_[0], rtol=1e-3, atol=1e-6)


@pytest.mark.whole
def test_9_the_page_is_true_for_several_networks(exams):
    for plane in PLANES:
        assert train(exams, "--folds", "2", "--epochs", "1", plane=plane).returncode == 0
    models = sorted((exams.parent / "models").glob("*.pt"))
    for path in models[::2]:  # one network of each plane is surer than the other
        content = read_checkpoint(path)
        content["model"]["classifier.bias"] += 3
        write_checkpoint(path, content)
    assert stack(exams, "--folds", "2").returncode == 0
    out = exams.parent / "report"
    done = run_script("explain.py", exams, "--exam", "valid/13", "--task", "acl", "--models-dir",
                      exams.parent / "models", "--out", out, "--precision", "fp32")  # fmt: skip
    assert done.returncode == 0, done.stderr
    planes = finding_of(out / "0013-acl.html")["planes"]
    assert [one["plane"] for one in planes] == [*PLANES]
    for one in planes:
        data = MRDataset(exams, "acl", one["plane"], train=False)
        row, logits = data.rows_of(["13"]), []
        for path in models:
            model, metadata = load_model(path)
            if metadata["plane"] == one["plane"]:
                found = predict_exams(model, data.subset(row), devices.pick_device("cpu"), "fp32")
                logits.append(found.item())
        assert one["networks"] == len(logits) == 2
        assert one["logit"] == pytest.approx(np.mean(logits), abs=1e-5)
        assert one["probability"] == pytest.approx(sigmoid(logits).mean(), abs=1e-6)
        assert abs(one["probability"] - sigmoid(one["logit"])) > 0.01


# --- 10: what a resumed run must agree on ---------------------------------------------------------


def test_10_resume_refuses_another_precision(exams):
    assert train(exams).returncode == 0
    path = exams.parent / "models" / "acl-axial.pt"
    content = read_checkpoint(path)
    content["metadata"]["precision"] = "bf16"
    content["metadata"]["arguments"]["precision"] = "bf16"
    write_checkpoint(path, content)
    assert_one_line_error(train(exams, "--resume"), "acl-axial.pt", "--precision bf16")


def test_10_resume_refuses_other_voxels(exams):
    assert train(exams).returncode == 0
    path = exams / "train" / "axial" / "0004.npy"
    volume = np.load(path)
    volume[0, 0, 0] ^= 1
    np.save(path, volume)
    assert_one_line_error(train(exams, "--resume"), "acl-axial.pt", "other exams")


def test_10_the_commit_is_that_of_the_start(exams, monkeypatch):
    shas = iter(f"commit{i}" for i in range(99))
    monkeypatch.setattr(cli, "git_sha", lambda: next(shas))
    assert train(exams).returncode == 0
    assert load_model(exams.parent / "models" / "acl-axial.pt")[1]["git"] == "commit0"


@pytest.mark.parametrize("change", ["voxel", "seed", "folds"])
def test_10_the_stack_checks_what_its_networks_were_trained_on(exams, change):
    for plane in PLANES:
        assert train(exams, "--epochs", "1", plane=plane).returncode == 0
    if change == "voxel":
        path = exams / "train" / "coronal" / "0004.npy"
        volume = np.load(path)
        volume[0, 0, 0] ^= 1
        np.save(path, volume)
        assert_one_line_error(stack(exams), "acl-coronal.pt", "training exams differ")
        return
    if change == "seed":
        assert_one_line_error(stack(exams, "--seed", "3"), "acl-axial.pt", "seed 0")
        return
    path = exams.parent / "models" / "acl-axial.pt"
    content = read_checkpoint(path)
    content["metadata"]["arguments"]["folds"] = 3
    write_checkpoint(path, content)
    assert_one_line_error(stack(exams), "acl-axial.pt", "folds 3")


# --- 11: one's own file ---------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["precious", '{"exam": 5}', '{"other": "x", "y": 1', "{" * 50])
def test_11_a_foreign_line_without_an_end_is_left_alone(trained, tmp_path, text):
    out = tmp_path / "notes.jsonl"
    out.write_text(text)
    done = predict(trained, trained[0] / "data", "--out", out, "--jsonl", "--resume")
    assert_one_line_error(done, "notes.jsonl", "not written by this command")
    assert out.read_text() == text


# --- 12: memory of a container --------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_12_memory_is_that_of_the_container(tmp_path, version):
    (tmp_path / "proc/self").mkdir(parents=True)
    line, folder = ("0::/a/b\n", "sys/fs/cgroup") if version == 2 else (
        "4:cpu:/x\n9:memory:/a/b\n", "sys/fs/cgroup/memory")  # fmt: skip
    (tmp_path / "proc/self/cgroup").write_text(line)
    limit, usage, stat = ("memory.max", "memory.current", "inactive_file") if version == 2 else (
        "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")  # fmt: skip
    for place, most in (("a", "700000000"), ("a/b", "max" if version == 2 else str(2**63 - 4096))):
        (tmp_path / folder / place).mkdir(parents=True)
        (tmp_path / folder / place / limit).write_text(f"{most}\n")
        (tmp_path / folder / place / usage).write_text("500000000\n")
        (tmp_path / folder / place / "memory.stat").write_text(f"anon 1\n{stat} 100000000\n")
    assert machine.available_memory(tmp_path) == 300_000_000
    assert machine.available_memory(tmp_path / "nowhere") > 300_000_000


@pytest.mark.parametrize("version", [1, 2])
def test_12_cores_are_those_of_the_containers_quota(tmp_path, monkeypatch, version):
    """Half a core more than one is two; the group above has none, its own the least."""
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert machine.usable_cores(tmp_path) == 8
    (tmp_path / "proc/self").mkdir(parents=True)
    line, folder = ("0::/a/b\n", "sys/fs/cgroup") if version == 2 else (
        "9:memory:/x\n4:cpu,cpuacct:/a/b\n", "sys/fs/cgroup/cpu")  # fmt: skip
    (tmp_path / "proc/self/cgroup").write_text(line)
    for place, quota in ((".", None), ("a", 400_000), ("a/b", 150_000)):
        group = tmp_path / folder / place
        group.mkdir(parents=True, exist_ok=True)
        if version == 2:
            (group / "cpu.max").write_text(f"{quota or 'max'} 100000\n")
        else:
            (group / "cpu.cfs_quota_us").write_text(f"{quota or -1}\n")
            (group / "cpu.cfs_period_us").write_text("100000\n")
    assert machine.usable_cores(tmp_path) == 2
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {5}, raising=False)
    assert machine.usable_cores(tmp_path) == 1


def test_12_jobs_are_as_many_as_the_container_has_room_for(monkeypatch):
    monkeypatch.setattr(jobs, "usable_cores", lambda: 8)
    for room, wanted in ((1.5e9, 1), (7e9, 3), (1e12, 8)):
        monkeypatch.setattr(jobs, "available_memory", lambda room=room: room)
        assert jobs.most_at_once(9, bytes_of_a_job()) == wanted


# --- 13: see test_benchmark.py --------------------------------------------------------------------


class Stream:
    """A standard output that tells what has been flushed."""

    def __init__(self):
        self.text, self.seen = "", ""

    def write(self, text):
        self.text += text

    def flush(self):
        self.seen = self.text


def test_13_the_head_of_the_table_is_there_before_the_first_epoch(exams, monkeypatch):
    stream, seen, real = Stream(), [], train_model

    def epoch(*args):
        seen.append(stream.seen)
        return real(*args)

    monkeypatch.setattr("train.train_model", epoch)
    monkeypatch.setattr("contextlib.redirect_stdout", lambda _: redirect(stream))
    assert train(exams, "--epochs", "1").returncode == 0
    assert "train loss" in seen[0].splitlines()[-1]


class redirect:
    def __init__(self, stream):
        self.stream = stream

    def __enter__(self):
        self.before, sys.stdout = sys.stdout, self.stream

    def __exit__(self, *error):
        sys.stdout = self.before


# --- 14 -------------------------------------------------------------------------------------------


def test_14_a_download_that_fails_without_a_word(tmp_path, monkeypatch):
    from mrnet.errors import InputError

    def silent():
        raise OSError

    monkeypatch.setattr(weights, "cache_file", lambda backbone: tmp_path / "features.pt")
    monkeypatch.setattr(weights, "sources", lambda backbone: {"nowhere": silent})
    with pytest.raises(InputError, match="nowhere: OSError"):
        weights.imagenet_features("alexnet")


def test_14_the_last_exam_has_a_label(shared_exams):
    exams = MRDataset(shared_exams, "acl", "axial")
    last, same = exams[-1], exams[len(exams) - 1]
    assert last[1].shape == last[2].shape == (1,) and last[1] == same[1] and last[2] == same[2]
    assert (last[0] == same[0]).all()
    with pytest.raises(IndexError):
        exams[len(exams)]


@pytest.mark.whole
def test_14_closing_the_terminal_ends_the_training(tmp_path):
    import signal
    import time

    exams = write_exams(tmp_path / "data")
    files = ("--data-dir", exams, "--models-dir", tmp_path / "models", "--logs-dir",
             tmp_path / "logs")  # fmt: skip
    command = [sys.executable, ROOT / "reproduce.py", *files, "--", "--no-pretrained", "--epochs",
               "100000", "--patience", "100000"]  # fmt: skip
    parent = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "models").glob("*.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.send_signal(signal.SIGHUP)
    _, said = parent.communicate(timeout=60)  # waits for the child, too: it has the same stderr
    assert parent.returncode == 128 + signal.SIGHUP and "Start it again" in said
    assert list((tmp_path / "models").glob("acl-*.state"))


@needs_make
def test_14_make_clean_keeps_trained_models(tmp_path):
    for name in ("Makefile", "models", "logs"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, tmp_path)
        else:
            (tmp_path / name).mkdir()
            (tmp_path / name / "acl-axial.pt").write_text("precious")
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, env=os.environ | {"VENV": ""})
    assert (tmp_path / "models" / "acl-axial.pt").read_text() == "precious"


@needs_make
def test_14_lint_checks_the_formatting():
    lint = subprocess.run(
        ["make", "--dry-run", "lint", "VENV="], cwd=ROOT, capture_output=True, text=True
    )
    assert "ruff format --check" in lint.stdout


# --- 15: faults that no test saw ------------------------------------------------------------------


def write_riddles(root, exams=20):
    """Exams whose labels can only be memorised: each its own blobs, labels drawn by lot."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(exams) % 2)
    rows = {"train": "", "valid": ""}
    for i, label in enumerate(labels):
        coarse = rng.integers(0, 256, (2, 4, 4), dtype=np.uint8)
        # The validation exams are the same, so that the epoch that is kept knows most by heart.
        for split, number in (("train", i), ("valid", exams + i)):
            for plane in PLANES:
                folder = root / split / plane
                folder.mkdir(parents=True, exist_ok=True)
                volume = coarse.repeat(16, axis=1).repeat(16, axis=2)
                np.save(folder / f"{number:04d}.npy", volume)
            rows[split] += f"{number},{label}\n"
    for split, text in rows.items():
        (root / f"{split}-acl.csv").write_text(text)
    return root


MEMORISE = ("--folds", "2", "--augment", "none", "--lr", "3e-4", "--patience", "99",
            "--weight-decay", "0", "--lr-scheduler", "none")  # fmt: skip


@pytest.fixture(scope="module")
def memorised(tmp_path_factory):
    """Two folds of the axial plane that know by heart what they have seen, stacked."""
    exams = write_riddles(tmp_path_factory.mktemp("riddles") / "data")
    for plane in PLANES:
        epochs = "30" if plane == "axial" else "1"
        done = train(exams, *MEMORISE, "--epochs", epochs, plane=plane)
        assert done.returncode == 0, done.stderr
    return exams


def logits_of(exams, fold):
    """The training exams, their logits by the axial network of one fold, and its held-out rows."""
    model, metadata = load_model(exams.parent / "models" / f"acl-axial-fold{fold}of2.pt")
    data = MRDataset(exams, "acl", "axial")
    logits = predict_exams(model, data, devices.pick_device("cpu"), "fp32")[:, 0]
    return data, logits, data.rows_of(metadata["out_of_fold"])


@pytest.mark.whole
def test_15a_a_network_has_not_learnt_its_own_fold(memorised):
    from sklearn.metrics import roc_auc_score

    for fold in (1, 2):
        data, logits, out = logits_of(memorised, fold)
        seen = np.setdiff1d(np.arange(len(data)), out)
        assert len(out) == len(seen) == 10
        assert roc_auc_score(data.labels[seen], logits[seen]) > 0.95
        assert roc_auc_score(data.labels[out], logits[out]) < 0.85


@pytest.mark.whole
def test_15b_out_of_fold_predictions_are_each_exams_own_networks(memorised):
    assert stack(memorised, "--folds", "2").returncode == 0
    written = predictions(memorised, "train")
    for fold, other in ((1, 2), (2, 1)):
        data, logits, out = logits_of(memorised, fold)
        _, others, _ = logits_of(memorised, other)
        for row in out:
            p = float(written[data.ids[row]]["axial"])
            assert p == pytest.approx(sigmoid(logits[row]), abs=1e-6)
        assert np.abs(sigmoid(logits[out]) - sigmoid(others[out])).max() > 0.1


def test_15c_training_stops_after_epochs_without_a_better_loss(exams, monkeypatch):
    losses = iter([1.0, 0.8, 0.9, 0.7, 0.75, 0.7, 0.71, 0.1, 0.1, 0.1])

    def evaluate(model, exams, config, what):
        metrics, logits = evaluate_model(model, exams, config, what)
        return {"acl": metrics["acl"] | {"loss": next(losses)}}, logits

    monkeypatch.setattr("train.evaluate_model", evaluate)
    done = train(exams, "--epochs", "10", "--patience", "3")
    assert done.returncode == 0, done.stderr
    epochs = re.findall(r"^ +(\d+)  ", done.stdout, re.M)
    assert epochs == [str(i) for i in range(1, 8)]  # 0.7 in the fourth, then three no better
    assert "stopped: valid loss has not improved for 3 epochs" in done.stdout


def cell_places(layers):
    """Middle of the first cell of a stack of layers and the step between two, in px, by the
    arithmetic of receptive fields (Araujo et al., Distill 2019, doi:10.23915/distill.00021)."""
    first, step = 0.0, 1
    for layer in layers:
        if hasattr(layer, "kernel_size"):
            kernel, stride, padding = (
                value[0] if isinstance(value, tuple) else value
                for value in (layer.kernel_size, layer.stride, layer.padding)
            )
            first += ((kernel - 1) / 2 - padding) * step
            step *= stride
    return first, step


@pytest.mark.parametrize("size", [128, 160, 256, 320])
def test_15d_the_summit_of_a_map_is_where_the_bright_spot_is(size):
    import torch

    from dataloader import preprocess
    from model import MRNet
    from mrnet.networks.receptive_fields import upsample_maps
    from tools.pointing_game import strongest_voxel

    torch.manual_seed(2)
    model = MRNet().eval()
    with torch.no_grad():  # sees brightness only
        for name, weights in model.named_parameters():
            weights.abs_() if name.endswith("weight") else weights.zero_()
    first, step = cell_places(model.pretrained_model)
    for cell in range(1, int((size - 1 - first) // step)):
        for shift in (-6, 0, 6):  # near a cell's middle: between two cells both are as bright
            row, column = int(first + step * cell) + shift, int(first + step) - shift
            volume = np.zeros((3, size, size), np.uint8)
            volume[1, row - 4 : row + 5, column - 4 : column + 5] = 255
            maps, _ = model.heat_maps(preprocess(torch.from_numpy(volume), "raw"))
            summit = strongest_voxel(maps, "alexnet")
            assert summit[0] == 1 and np.abs(summit[1:] - (row, column)).max() <= 6
            if first + step * (cell + 1) > size - step / 2:
                continue  # beyond the last cell's middle the map stays as high
            big = upsample_maps(maps, size, size, "alexnet")[1]
            top = np.argwhere(big == big.max()).mean(axis=0)
            assert np.abs(top - (row, column)).max() <= 8
