"""Saved models, AlexNet's features, and files that would run code."""

import errno
import math
import os
import pickle
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import metadata_of

from model import MRNet
from mrnet.errors import InputError
from mrnet.files import atomic, write_text
from mrnet.networks import weights
from mrnet.networks.pickles import ArrayUnpickler
from mrnet.networks.saved import FORMAT, STATE_FORMAT, read_checkpoint, write_checkpoint
from mrnet.training import checkpoint
from mrnet.training.checkpoint import load_model, save_model
from mrnet.training.config import Config
from mrnet.training.train_state import TrainState, check_same, restore_state

METADATA = metadata_of()


def test_a_model_that_lacks_an_option_is_refused(tmp_path):
    """What an earlier version did where it had no option is not guessed."""
    arguments = {name: METADATA["arguments"][name] for name in METADATA["arguments"] if
                 name != "freeze"}  # fmt: skip
    save_model(tmp_path / "acl-axial.pt", MRNet(), METADATA | {"arguments": arguments})
    with pytest.raises(InputError, match="acl-axial.pt: .*earlier version.*train again"):
        load_model(tmp_path / "acl-axial.pt")


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


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps({"format": FORMAT})])
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
        {"format": FORMAT},
        {"format": FORMAT, "model": {"x": torch.zeros(1)}, "metadata": METADATA},
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


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
    ids=["cpu", "gpu"],
)
def test_no_file_is_to_blame_for_a_lack_of_memory(tmp_path, monkeypatch, error):
    """While a file is read, a network takes its weights, a state is restored."""

    def fail(*_, **__):
        raise error

    path = tmp_path / "m.pt"
    save_model(path, MRNet(), METADATA)
    for owner, name in ((torch, "load"), (MRNet, "load_state_dict")):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="memory"):
            patch.setattr(owner, name, fail)
            load_model(path)
    config = asdict(Config("acl", "axial"))
    content = {"format": STATE_FORMAT, "config": config, "data": {}, "training": {}}
    torch.save(content, path)
    state = SimpleNamespace(restore=fail)
    with pytest.raises(RuntimeError, match="memory"):
        restore_state(path, state, config, {})


def test_hostile_model_does_not_run(tmp_path):
    torch.save({"format": FORMAT, "model": Hostile(tmp_path / "ran")}, tmp_path / "m.pt")
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
        features = weights.imagenet_features("alexnet")
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
    monkeypatch.setattr(weights, "sources", lambda backbone: {"nowhere": refused})
    with pytest.raises(InputError, match="no route to host.*--no-pretrained"):
        weights.imagenet_features("alexnet")


def test_atomic_keeps_the_old_file_on_failure(tmp_path):
    path = tmp_path / "f.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["f.txt"]


def test_a_link_is_followed_and_what_is_no_regular_file_is_refused(tmp_path):
    target, link, folder = (tmp_path / name for name in ("target.txt", "link.txt", "folder"))
    link.symlink_to(target.name)
    for text in ("new", "newer"):  # at first the link leads to nothing yet
        write_text(link, text)
        assert link.is_symlink() and target.read_text() == text
    folder.mkdir()
    pipe, loop = tmp_path / "pipe", tmp_path / "loop"
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    device = tmp_path / "device"
    device.symlink_to("/dev/full")
    for path in (folder, pipe, loop, device):
        with pytest.raises(InputError, match=f"{path}: exists and is not a regular file"):
            write_text(path, "x")
    assert not Path("/dev/full").is_file() and pipe.is_fifo() and loop.is_symlink()


def test_a_full_disk_names_the_file(tmp_path):
    path = tmp_path / "f.txt"
    with pytest.raises(OSError, match="No space left on device: '.*f.txt'"), atomic(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_lock_removes_what_a_killed_run_left_of_its_own_files(tmp_path):
    ours = [".acl-axial-v1.pt.abcdefgh.tmp", ".acl-axial-v1.state.ab_defgh.tmp"]
    others = [".acl-axial-v1.2.pt.abcdefgh.tmp", ".acl-axial-v1.2.state.abcdefgh.tmp"]
    for name in (*ours, *others):
        (tmp_path / name).touch()
    with checkpoint.lock(tmp_path / "acl-axial-v1.pt"):
        assert {path.name for path in tmp_path.glob(".*.tmp")} == set(others)


@pytest.mark.parametrize("kind, expected", [("model", FORMAT), ("training", STATE_FORMAT)])
def test_files_of_other_versions_are_refused_in_one_line(tmp_path, kind, expected):
    path = tmp_path / "acl-axial.pt"
    save_model(path, MRNet(), METADATA)
    content = read_checkpoint(path)
    for version in (1, 2, 99):
        write_checkpoint(path, content | {"format": f"mrnet-{kind}-{version}"})
        wanted = f"{path}: not a {expected} file.* version, delete it and train again"
        with pytest.raises(InputError, match=wanted) as caught:
            read_checkpoint(path, expected)
        assert "\n" not in str(caught.value)


def a_state(lr=1e-3):
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    return TrainState(model, optimizer, scheduler, ["acl"])


def test_early_stopping_counts_epochs_without_a_better_loss():
    state = a_state()
    story = [(0.5, 0.6), (0.4, 0.7), (0.4, 0.7), (0.45, 0.9), (0.3, 0.8)]
    best, bad = [], []
    for epoch, (loss, auc) in enumerate(story, start=1):
        state.epoch = epoch
        best.append(state.update({"acl": {"loss": loss, "auc": auc}}))
        bad.append(state.bad_epochs)
    assert best == [["acl"], ["acl"], [], ["acl"], []] and bad == [0, 0, 1, 2, 0]
    assert (state.best_loss, state.best_auc) == (0.3, {"acl": 0.9})
    assert state.lr == pytest.approx(1e-3 * 0.5**2)  # the plateau schedule heard the losses


def test_a_state_is_restored_with_this_machines_settings(tmp_path):
    state = a_state()
    state.model(torch.ones(2, 3)).sum().backward()
    state.optimizer.step()
    state.epoch, state.best_auc, state.log_dir = 2, {"acl": 0.7}, "logs/x"
    path = tmp_path / "acl-axial.state"
    state.save(path, {"lr": 1e-3}, {"train": "f"})
    content = read_checkpoint(path, STATE_FORMAT)
    assert content["config"] == {"lr": 1e-3} and content["data"] == {"train": "f"}
    other = a_state(lr=torch.tensor(0.1))
    for group in other.optimizer.param_groups:
        group["capturable"] = True
    other.restore(content["training"])
    assert (other.epoch, other.best_auc, other.log_dir) == (2, {"acl": 0.7}, "logs/x")
    (group,) = other.optimizer.param_groups
    assert torch.is_tensor(group["lr"]) and other.lr == pytest.approx(1e-3)
    assert group["capturable"] is True
    assert torch.equal(other.model.weight, state.model.weight)
    assert len(other.optimizer.state) == 2


def test_exams_of_one_class_select_by_their_loss():
    """They have no AUC in any epoch; without a choice no model would ever be saved."""
    state, best = a_state(), []
    for loss in (0.5, 0.7, 0.4):
        best.append(state.update({"acl": {"loss": loss, "auc": float("nan")}}))
    assert best == [["acl"], [], ["acl"]]


@pytest.mark.parametrize(
    "schedule, warmup, may_grow",
    [("plateau", 0.0, True), ("none", 0.0, True), ("none", 0.1, False), ("cosine", 0.0, False)],
)
def test_epochs_are_added_where_no_schedule_was_planned_for_their_number(
    tmp_path, schedule, warmup, may_grow
):
    path, state = tmp_path / "acl-axial.state", a_state()
    config = asdict(Config("acl", "axial", lr_scheduler=schedule, warmup=warmup, epochs=10))
    state.save(path, config, {})
    assert restore_state(path, a_state(), config, {})
    with nullcontext() if may_grow else pytest.raises(InputError, match="--epochs 10"):
        assert restore_state(path, a_state(), config | {"epochs": 50}, {})


def test_each_finding_has_its_own_best_epoch():
    state = a_state()
    state.best_auc = {"acl": 0.5, "meniscus": 0.9}
    selected = {"acl": {"loss": 0.4, "auc": 0.6}, "meniscus": {"loss": 0.8, "auc": 0.8}}
    assert state.update(selected) == ["acl"]
    assert state.best_auc == {"acl": 0.6, "meniscus": 0.9} and state.best_loss == pytest.approx(0.6)


class Exams:
    """Stands in for an MRDataset."""

    def __init__(self, of_exams):
        self.of_exams = of_exams

    def fingerprint(self):
        return self.of_exams


def test_what_a_resumed_run_must_agree_on():
    config = {"lr": 1e-4, "lr_scheduler": "step", "device": "cpu", "epochs": 3}
    config |= {"precision": "fp32", "cuda_graphs": False, "repeat": 2}
    sets, prints = {"train": Exams("a"), "valid": Exams("b")}, {"train": "a", "valid": "b"}
    same = ("x.pt", config, sets)
    check_same(*same, (config, prints))
    check_same(*same, (config | {"epochs": 2}, prints), ignore=["epochs"])
    check_same(*same, (config | {"repeat": 3, "cuda_graphs": True}, prints))
    for change, words in (
        ({"epochs": 2}, "--epochs 2"),
        ({"lr_scheduler": "none", "lr": 1.0}, "--lr 1.0, --lr-scheduler none"),
        ({"device": "cuda"}, "--device cuda"),
    ):
        with pytest.raises(InputError, match=f"x.pt: was trained with {words};"):
            check_same(*same, (config | change, prints))
    for other in ({"train": "a"}, {"train": "a", "valid": "c"}, prints | {"more": "d"}):
        with pytest.raises(InputError, match="other exams"):
            check_same(*same, (config, other))


@pytest.mark.parametrize("name", ["classifier.bias", "pretrained_model.bn1.running_mean"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nothing_that_is_not_finite_is_loaded(tmp_path, name, value):
    """Neither a parameter nor a buffer."""
    model = MRNet(backbone="resnet18")
    model.state_dict()[name][0] = value
    metadata = metadata_of()
    metadata["architecture"] |= {"backbone": "resnet18"}
    save_model(tmp_path / "m.pt", model, metadata)
    with pytest.raises(InputError, match=f"m.pt: .*{name} holds values that are not finite"):
        load_model(tmp_path / "m.pt")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"seed": "0"}, "metadata.seed: a whole number"),
        ({"epoch": True}, "metadata.epoch: a whole number"),
        ({"prevalence": float("nan")}, "metadata.prevalence: a number"),
        ({"tuning": [3]}, "metadata.tuning.0: a text"),
        ({"data": {"valid": 1}}, "metadata.data.valid: a text"),
        ({"arguments": METADATA["arguments"] | {"folds": "x"}}, "metadata.arguments.folds: a wh"),
        (
            {"architecture": METADATA["architecture"] | {"dropout": "x"}},
            "architecture.dropout: a n",
        ),
        ({"history": "none"}, "metadata.history: a list"),
        ({"machine": ["x"]}, "metadata.machine: a text"),
    ],
)
def test_metadata_of_a_wrong_type_are_named(tmp_path, change, words):
    save_model(tmp_path / "m.pt", MRNet(), METADATA | change)
    with pytest.raises(InputError, match=rf"m.pt: incomplete, or of an .*\(.*{words}"):
        load_model(tmp_path / "m.pt")
