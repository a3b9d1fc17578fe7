"""data/medmnist/prepare.py on files of MedMNIST's format, made here; no set is needed."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_one_line_error

from dataloader import MRDataset
from mrnet.layout.planes import PLANES


def write_set(path, **other):
    """An .npz as MedMNIST's; in train_images[0] only the slices 2 to 4 of axis 0 hold anything."""
    rng, arrays = np.random.default_rng(0), {}
    for part, n in (("train", 6), ("val", 4), ("test", 5)):
        arrays[f"{part}_images"] = rng.integers(1, 256, (n, 8, 9, 10), dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(n) % 2).astype(np.uint8)[:, None]
    arrays["train_images"][0, :2] = arrays["train_images"][0, 5:] = 0
    arrays["train_images"][2] = 0
    np.savez_compressed(path, **(arrays | other))
    return arrays


def prepare(*arguments):
    command = [sys.executable, ROOT / "data/medmnist/prepare.py", *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True)


@pytest.mark.parametrize("valid", ["val", "test"])
def test_exams_are_the_volumes_slices(tmp_path, valid):
    arrays = write_set(tmp_path / "adrenalmnist3d.npz")
    done = prepare(
        tmp_path / "adrenalmnist3d.npz", tmp_path / "out", "--size", 64, "--valid", valid
    )
    assert done.returncode == 0, done.stderr
    assert "left out train exam 2: blank" in done.stdout
    for axis, plane in enumerate(PLANES):
        train, other = (MRDataset(tmp_path / "out", "adrenal", plane, t) for t in (True, False))
        assert train.ids == list("01345") and other.ids[0] == "6"  # after the training exams
        known = np.delete(arrays["train_labels"][:, 0], 2)
        np.testing.assert_array_equal(train.labels[:, 0], known)
        np.testing.assert_array_equal(other.labels[:, 0], arrays[f"{valid}_labels"][:, 0])
        expected = np.moveaxis(arrays[f"{valid}_images"][1], axis, 0)
        enlarged = F.interpolate(
            torch.from_numpy(expected.astype(np.float32))[:, None], (64, 64), mode="bilinear"
        )
        difference = other.volume(1).float() - enlarged[:, 0]
        assert difference.abs().max() <= 1  # Pillow rounds after each direction
    assert [len(MRDataset(tmp_path / "out", "adrenal", p).volume(0)) for p in PLANES] == [3, 9, 10]


def test_no_folder_of_other_exams_is_written_over(tmp_path):
    write_set(tmp_path / "adrenalmnist3d.npz")
    knee = tmp_path / "out" / "train" / "axial" / "0000.npy"
    knee.parent.mkdir(parents=True)
    knee.write_bytes(b"a knee")
    arguments = tmp_path / "adrenalmnist3d.npz", tmp_path / "out", "--size", 64
    done = prepare(*arguments)
    assert done.returncode == 2 and "--overwrite" in done.stderr and knee.read_bytes() == b"a knee"
    assert prepare(*arguments, "--overwrite").returncode == 0 and knee.read_bytes() != b"a knee"


@pytest.mark.parametrize(
    "other, words",
    [
        ({"val_labels": np.arange(4)}, "two classes"),
        ({"train_images": np.zeros((6, 28, 28), np.uint8)}, "3-D"),
        ({"train_images": np.array([{}] * 6)}, "download it again"),
        ({"train_labels": np.zeros(3)}, "with 3 labels"),
        ({"train_images": np.zeros((6, 513, 2, 2), np.uint8)}, "(513, 2, 2) voxels"),
        ({"more": np.zeros(2**29, np.uint8)}, "unpacks to 512 MiB"),
    ],
)
def test_another_file_is_refused_in_one_line(tmp_path, other, words):
    write_set(tmp_path / "set.npz", **other)
    assert_one_line_error(prepare(tmp_path / "set.npz", tmp_path / "out"), words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kept", [0, 100, -30])
def test_a_truncated_file_is_refused_in_one_line(tmp_path, kept):
    write_set(tmp_path / "set.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "set.npz").read_bytes()[:kept])
    assert_one_line_error(prepare(tmp_path / "cut.npz", tmp_path / "out"), "cut.npz")
    assert_one_line_error(prepare(tmp_path / "none.npz", tmp_path / "out"), "none.npz")
