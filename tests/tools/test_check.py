"""check.py: every fault at once, on a folder that has all of them."""

import shutil

import numpy as np
import pytest
from conftest import PLANES, run_script, write_exams


def check(root):
    return run_script("tools/check.py", root)


def test_sound_exams_have_no_fault(exams):
    done = check(exams)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no faults" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["acl", "train", "12", "4", "33", "%", "0", "0"] in rows
    assert ["acl", "valid", "8", "3", "38", "%", "0", "0"] in rows  # ids 12 to 19: 12, 15, 18
    assert any(row[:3] == ["axial", "train", "12"] and row[-1] == "64x64" for row in rows)


def test_every_fault_at_once(exams):
    write_exams(exams, task="cyst", train=11, valid=8)
    (exams / "valid-cyst.csv").write_text("11,0\n12,0\n")
    labels = exams / "train-acl.csv"
    labels.write_text(labels.read_text() + "5,1\n12,0\n13,2\nx,1\n")
    train, valid = exams / "train" / "axial", exams / "valid" / "axial"
    (train / "0000.npy").unlink()
    (train / "0001.npy").write_bytes((train / "0001.npy").read_bytes()[:-10])
    np.save(train / "0002.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(train / "0003.npy", np.full((3, 64, 64), 0.5))
    np.save(train / "0004.npy", np.zeros((64, 64), np.uint8))
    np.save(train / "0005.npy", np.full((3, 64, 64), 7, np.uint8))
    shutil.copy(train / "0006.npy", valid / "0013.npy")
    np.save(train / "0099.npy", np.load(train / "0007.npy") + 1)
    for plane in PLANES[1:]:
        (exams / "valid" / plane / "0014.npy").unlink()

    done = check(exams)
    assert done.returncode == 2
    lines = done.stdout.splitlines()
    for words in (
        ("axial/0000.npy", "no such volume"),
        ("axial/0001.npy", "not a whole"),
        ("axial/0002.npy", "not a whole"),
        ("axial/0003.npy", "float64"),
        ("axial/0004.npy", "2 dimensions"),
        ("axial/0005.npy", "every voxel is 7"),
        ("axial/0006.npy", "valid/axial/0013.npy", "LEAKS"),
        ("axial/0099.npy", "no train CSV"),
        ("0014.npy", "exam 14: coronal, sagittal are missing (found: axial)"),
        ("train-acl.csv, line 13", "id 5", "twice"),
        ("train-acl.csv, line 15", "'2'"),
        ("train-acl.csv, line 16", "whole-number id"),
        ("valid-acl.csv", "also in train-acl.csv", "12"),
        ("valid-cyst.csv", "one class only"),
        ("valid-cyst.csv", "lacks"),
    ):
        assert any(all(word in line for word in words) for line in lines), words
    assert "faults" in done.stderr and len(done.stderr.splitlines()) == 1


def test_groups_are_compared_with_the_exams(exams):
    path = exams / "train-groups.csv"
    path.write_text("1000,a\n1001,b\n")
    done = check(exams)
    assert f"{path}: names none of the 12 exams" in done.stdout
    assert done.stderr.endswith(": 1 fault, printed above\n")
    path.write_text("0,a\n1,a\n")
    done = check(exams)
    assert done.returncode == 0
    assert "note: 10 of 12 exams have no group (train-groups.csv); each counts" in done.stdout


def test_a_set_of_one_plane_is_sound_and_fortran_order_too(exams):
    for split in ("train", "valid"):
        for plane in PLANES[:2]:
            shutil.rmtree(exams / split / plane)
    path = exams / "train" / "sagittal" / "0001.npy"
    np.save(path, np.asfortranarray(np.load(path)))
    done = check(exams)
    assert done.returncode == 0, done.stdout
    (exams / "train-cyst.csv").write_text("0,1\n1,0\n")
    done = check(exams)
    assert done.returncode == 2 and "no valid-cyst.csv" in done.stdout


@pytest.mark.parametrize("name", ["none", "empty"])
def test_no_data_in_one_line(tmp_path, name):
    (tmp_path / "empty").mkdir()
    done = check(tmp_path / name)
    assert done.returncode == 2 and "phantom" in done.stderr and done.stdout == ""


def test_unknown_and_soft_labels_are_counted(exams):
    (exams / "train-acl.csv").write_text("".join(f"{i},\n" for i in range(4))
                                         + "".join(f"{i},0.{i}\n" for i in range(4, 10))
                                         + "10,1\n11,0\n")  # fmt: skip
    done = run_script("tools/check.py", exams)
    assert done.returncode == 0, done.stdout
    row = next(line.split() for line in done.stdout.splitlines() if line.startswith("acl  "))
    # 0.5 to 0.9 and 1 are positive
    assert row == ["acl", "train", "8", "6", "75", "%", "4", "6"]
