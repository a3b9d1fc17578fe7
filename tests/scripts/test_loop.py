"""The loops: a step is Adam's, caches change no result and precisions little, seeds decide."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from conftest import predict_exams, write_exams
from sklearn.metrics import roc_auc_score

from dataloader import Augmentation, MRDataset
from model import MRNet
from mrnet.errors import InputError
from mrnet.evaluation.metrics import metrics_of
from mrnet.runtime import devices
from mrnet.training.config import Config
from mrnet.training.datasets import DEVICE_ROOM, cache_volumes
from mrnet.training.train_state import TrainState
from train import train_model, training_step

CPU = torch.device("cpu")
CONFIG = Config("acl", "axial")


def one_epoch(exams, seed=0):
    torch.manual_seed(seed)
    model = MRNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5, weight_decay=0.1)
    state = TrainState(model, optimizer, None, exams.tasks)
    step, seen = partial(training_step, model, optimizer, CONFIG), []

    def watched(exams, volume, *rest):
        seen.append(next(i for i in range(len(exams)) if torch.equal(exams.volume(i), volume)))
        return step(exams, volume, *rest)

    (_, logits, losses), _ = train_model(state, watched, exams, CONFIG)
    return model, (np.array(seen), logits, losses)


def test_an_epoch_is_adam_on_the_weighted_loss_written_out(shared_exams):
    exams = MRDataset(shared_exams, "acl", "axial")
    model, (order, logits, losses) = one_epoch(exams)
    torch.manual_seed(0)
    reference = MRNet()
    adam = torch.optim.Adam(reference.parameters(), lr=1e-5, weight_decay=0.1, foreach=False)
    assert sorted(order) == list(range(12))
    for step, i in enumerate(order):
        volume, label, weight = exams[i]
        logit = reference(volume[None].expand(1, -1, 3, -1, -1))[0, 0]
        p = torch.sigmoid(logit)
        loss = -weight * (label * p.log() + (1 - label) * (1 - p).log())
        adam.zero_grad()
        loss.sum().backward()
        adam.step()
        assert logits[step, 0] == pytest.approx(logit.item(), abs=2e-4)
        assert losses[step, 0] == pytest.approx(loss.item(), abs=2e-4)


def test_caches_give_the_same_numbers(shared_exams, capsys):
    results = []
    for where in ("disk", "memory", "auto", "device"):
        exams = MRDataset(shared_exams, "acl", "axial", transform=Augmentation())
        if where == "memory":
            exams.cache("cpu")
        else:
            cache_volumes([exams], where, CPU)
        assert (exams.cached[0] is None) == (where != "memory")
        if where in ("disk", "memory"):  # what the others are on a CPU
            results.append(one_epoch(exams)[1])
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))
    assert "cache      disk" in capsys.readouterr().out


def test_cache_without_room_is_refused_or_falls_back(shared_exams, monkeypatch, capsys):
    exams = MRDataset(shared_exams, "acl", "axial")
    room = DEVICE_ROOM + exams.nbytes - 1
    monkeypatch.setattr(devices.torch.cuda, "mem_get_info", lambda device: (room, room))
    with pytest.raises(InputError, match="--cache device.*--cache disk"):
        cache_volumes([exams], "device", torch.device("cuda"))
    cache_volumes([exams], "auto", torch.device("cuda"))
    assert "cache      disk" in capsys.readouterr().out


def test_same_seed_same_numbers_other_seed_others(shared_exams):
    exams = MRDataset(shared_exams, "acl", "axial", transform=Augmentation())
    one, two, other = (one_epoch(exams, seed=seed)[1] for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not np.array_equal(one[1], other[1])


@pytest.mark.skipif(not devices.has_bf16(CPU), reason="this CPU has no bf16")
def test_bf16_is_close_to_fp32(shared_exams):
    exams = MRDataset(shared_exams, "acl", "axial")
    model = MRNet()
    fp32, bf16 = (predict_exams(model, exams, CPU, p) for p in ("fp32", "bf16"))
    assert fp32.dtype == np.float32 and len(fp32) == len(exams)
    np.testing.assert_allclose(bf16, fp32, atol=5e-3)


def test_bf16_where_there_is_none(monkeypatch):
    monkeypatch.setattr(devices, "has_bf16", lambda device: False)
    assert devices.pick_precision("auto", CPU) == "fp32"
    with pytest.raises(InputError, match="--precision bf16"):
        devices.pick_precision("bf16", CPU)


def test_predictions_do_not_depend_on_the_other_exams(tmp_path):
    exams = MRDataset(write_exams(tmp_path / "data"), "acl", "axial")
    model = MRNet()
    whole = predict_exams(model, exams, CPU, "fp32")
    part = predict_exams(model, copy.copy(exams).subset([4, 2]), CPU, "fp32")
    np.testing.assert_array_equal(part, whole[[4, 2]])


def test_metrics_leave_out_unknown_labels():
    nan = np.nan
    labels = np.array([[1, 0], [0, nan], [nan, 1], [0.7, 1], [0, nan], [nan, 0]], np.float32)
    logits = np.array([[2, -1], [1, 9], [-9, 0.5], [0.5, -2], [-1, 9], [9, 1]], np.float32)
    losses = np.array([[1, 2], [2, 99], [99, 4], [4, 1], [3, 99], [99, 5]], np.float32)
    found = metrics_of(("acl", "cyst"), labels, logits, losses)
    acl, cyst = [0, 1, 3, 4], [0, 2, 3, 5]  # the rows whose label is known
    assert found == {
        "acl": {"loss": 2.5, "auc": roc_auc_score([1, 0, 1, 0], logits[acl, 0])},
        "cyst": {"loss": 3.0, "auc": roc_auc_score([0, 1, 1, 0], logits[cyst, 1])},
    }
