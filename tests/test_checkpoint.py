"""Saved models, AlexNet's features, and files that would run code."""

import os
import pickle

import numpy as np
import pytest
import torch

from common import checkpoint, weights
from common.checkpoint import load_model, save_model
from common.errors import InputError
from common.files import atomic
from common.pickles import ArrayUnpickler
from model import MRNet

METADATA = {
    "task": "acl",
    "plane": "axial",
    "intensity": "standardized",
    "protocol": "article",
    "epoch": 3,
    "out_of_fold": [],
    "data": {"valid": "0123456789abcdef"},
    "metrics": {},
}


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_saved_model_is_small_and_the_same(tmp_path):
    model, path = MRNet().eval(), tmp_path / "acl-axial.pt"
    save_model(path, model, METADATA)
    assert path.stat().st_size < 10.5e6
    loaded, metadata = load_model(path)
    x = torch.randn(1, 3, 1, 64, 64)
    assert metadata == METADATA and torch.equal(model(x), loaded(x))
    assert set(torch.load(path, weights_only=True)) == {"format", "model", "metadata"}


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps({"format": checkpoint.FORMAT})])
def test_damaged_model_is_named(tmp_path, content):
    path = tmp_path / "m.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match="m.pt"):
        load_model(path)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {"format": "other"},
        {"format": checkpoint.FORMAT},
        {"format": checkpoint.FORMAT, "model": {"x": torch.zeros(1)}, "metadata": METADATA},
    ],
)
def test_foreign_file_is_named(tmp_path, content):
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(InputError, match="m.pt"):
        load_model(tmp_path / "m.pt")


def test_truncated_model_is_named(tmp_path):
    path = tmp_path / "m.pt"
    save_model(path, MRNet(), METADATA)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(InputError, match="m.pt"):
        load_model(path)


def test_hostile_model_does_not_run(tmp_path):
    torch.save({"format": checkpoint.FORMAT, "model": Hostile(tmp_path / "ran")}, tmp_path / "m.pt")
    with pytest.raises(InputError):
        load_model(tmp_path / "m.pt")
    assert not (tmp_path / "ran").exists()


def test_array_unpickler_admits_arrays_only(tmp_path):
    arrays = {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}
    with open(tmp_path / "a", "wb") as file:  # as NumPy 1 wrote it
        file.write(pickle.dumps(arrays, protocol=3).replace(b"numpy._core", b"numpy.core"))
    with open(tmp_path / "a", "rb") as file:
        kernel = ArrayUnpickler(file).load()["kernel"].array()
    np.testing.assert_array_equal(kernel, arrays["kernel"])
    (tmp_path / "b").write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    with open(tmp_path / "b", "rb") as file, pytest.raises(pickle.UnpicklingError):
        ArrayUnpickler(file).load()
    assert not (tmp_path / "ran").exists()


def test_imagenet_features_are_the_published_numbers():
    try:
        features = weights.imagenet_features()
    except InputError as error:
        pytest.skip(f"no cache and no network: {error}")
    np.testing.assert_allclose(
        features["0.weight"][0, 0, 0, :3].numpy(), [0.11864, 0.09407, 0.09544], atol=5e-6
    )
    MRNet(features)  # strict: every layer, every shape


def test_without_weights_the_run_stops(tmp_path, monkeypatch):
    def refused():
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(weights, "SOURCES", {"nowhere": refused})
    with pytest.raises(InputError, match="no route to host.*--no-pretrained"):
        weights.imagenet_features()


def test_atomic_keeps_the_old_file_on_failure(tmp_path):
    path = tmp_path / "f.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["f.txt"]
