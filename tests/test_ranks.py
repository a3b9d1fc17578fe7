"""One network trained by several processes: the same losses as one process, signals, resuming.

Real processes that torchrun starts, joined by gloo on the CPU.
"""

import os
import signal
import subprocess
import sys
import time
from unittest.mock import MagicMock

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, content_of, let_planes_lack, run_process, run_script, write_exams
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import engine, ranks

pytestmark = pytest.mark.whole

TRAIN = ("--plane", "sagittal", "--no-pretrained", "--lr", "1e-4", "--accumulate", "4",
         "--precision", "fp32", "--device", "cpu")  # fmt: skip


def files_of(folder, data, *more):
    return ("--task", "acl", "--data-dir", data, "--models-dir", folder / "models", "--logs-dir",
            folder / "logs", *TRAIN, *more)  # fmt: skip


def torchrun(count, *arguments):
    """The command, to be run with one thread for each process."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return [*start, str(count), str(ROOT / "train.py"), *map(str, arguments)]


def run_ranks(count, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(torchrun(count, *arguments), capture_output=True, text=True, timeout=300,
                          env=environment)  # fmt: skip


def model_of(folder, name="acl-sagittal"):
    return torch.load(folder / "models" / f"{name}.pt", weights_only=True)


def points(folder, tag):
    (run,) = (folder / "logs/acl").glob("*/*/within-epoch")
    return [point.value for point in EventAccumulator(str(run)).Reload().Scalars(tag)]


def assert_same_training(one, other, epochs, tolerance=1e-5):
    """Losses of every epoch, the same AUCs of the same exams, the weights nearly."""
    ours, theirs = (model["metadata"]["history"] for model in (one, other))
    assert len(ours) == len(theirs) == epochs
    for a, b in zip(ours, theirs, strict=True):
        for split in ("train", "valid"):
            assert b[split]["loss"] == pytest.approx(a[split]["loss"], abs=tolerance)
            assert b[split]["auc"] == pytest.approx(a[split]["auc"], abs=1e-9)
    for name, weight in one["model"].items():
        assert torch.allclose(weight, other["model"][name], atol=tolerance), name


def test_two_ranks_train_as_one_process_over_20_steps(tmp_path):
    data = write_exams(tmp_path / "data", train=38, valid=7)  # the last steps have 2 exams
    more = ("--epochs", 2, "--log-every", 4, "--augment", "strong")
    alone = run_process("train.py", *files_of(tmp_path / "one", data, *more))
    assert alone.returncode == 0, alone.stderr
    done = run_ranks(2, *files_of(tmp_path / "two", data, *more))
    assert done.returncode == 0, done.stderr
    assert "2 ranks" not in alone.stdout and done.stdout.count("ranks      2") == 1
    assert done.stdout.count("validation AUC") == 1  # the first rank alone prints
    ours, theirs = (points(tmp_path / n, "within-epoch/train-loss") for n in ("one", "two"))
    assert len(ours) == 20
    assert np.allclose(ours, theirs, atol=1e-5)
    assert_same_training(model_of(tmp_path / "one"), model_of(tmp_path / "two"), 2)
    names = sorted(path.name for path in (tmp_path / "two/models").glob("[!.]*"))
    assert names == ["acl-sagittal.pt"]


def test_a_rank_without_exams_and_planes_that_are_dropped(tmp_path):
    """The last of 13 exams, in steps of 4, leaves two of three ranks nothing; a plane dropped in
    all exams of a step is not updated, as in one process."""
    data = write_exams(tmp_path / "data", train=13, valid=8)
    let_planes_lack(data)
    more = ("--plane", "axial", "sagittal", "--plane-dropout", "0.7", "--epochs", 2)
    more += ("--average-weights", "0.5", "--optimizer", "adamw", "--lr-scheduler", "cosine")
    alone = run_process("train.py", *files_of(tmp_path / "one", data, *more))
    done = run_ranks(3, *files_of(tmp_path / "three", data, *more))
    assert (alone.returncode, done.returncode) == (0, 0), done.stderr
    names = [model_of(tmp_path / n, "acl-axial+sagittal") for n in ("one", "three")]
    assert_same_training(*names, 2)


@pytest.mark.parametrize("then", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_signal_reaches_all_and_another_number_of_ranks_goes_on(tmp_path, then):
    data = write_exams(tmp_path / "data", train=300, valid=8)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    few = ("--epochs", 1, "--lr", "1e-5")  # rounding grows with the rate over 75 steps
    assert run_script("train.py", *files_of(whole, data, *few)).returncode == 0
    arguments = files_of(stopped, data, *few)
    process = subprocess.Popen(torchrun(2, *arguments), stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.STDOUT,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    state = stopped / "models/acl-sagittal.state"
    while not state.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    time.sleep(0.5)
    ranks_of = psutil.Process(process.pid).children(recursive=True)
    (second,) = (p for p in ranks_of if p.environ().get("RANK") == "1")
    second.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert "Resume with: torchrun --nproc-per-node 2" in said
    left = torch.load(state, weights_only=True)["training"]["partial_epoch"]
    assert left is not None and 0 < len(left["logits"]) < 300, said
    if then == 1:
        done = run_script("train.py", *arguments, "--resume")
    else:
        done = run_ranks(then, *arguments, "--resume")
    assert done.returncode == 0 and "resumed" in done.stdout, done.stderr
    assert_same_training(model_of(whole), model_of(stopped), 1, tolerance=1e-4)
    again = run_ranks(2, *arguments, "--resume")
    assert "finished before" in again.stdout
    assert content_of(stopped / "models/acl-sagittal.pt")


def test_more_ranks_than_exams_in_a_step(tmp_path, shared_exams):
    arguments = files_of(tmp_path, shared_exams, "--accumulate", 1)
    done = run_ranks(2, *arguments)
    assert done.returncode != 0
    assert "error: 2 ranks share the exams of a step: give --accumulate 2" in done.stderr
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_resumed_epoch_draws_what_one_without_a_stop_does(monkeypatch, rank):
    """Of each rank; only the first one's generator is saved, and loaded by all."""
    ours, saved, stop = {"rank": 0}, {}, []
    monkeypatch.setattr(ranks, "rank", lambda: ours["rank"])

    def step(_exams, _rows, _views, targets, _weights):
        if stop and len(drawn) == 4:
            saved.update(engine.random_states(step.device))
        drawn.append(torch.rand(()).item())  # as dropout does
        return targets.clone(), targets.clone()

    step.model, step.device = torch.nn.Identity(), torch.device("cpu")
    exams = MagicMock(targets=np.zeros((10, 1), np.float32), weights=np.ones((10, 1), np.float32))
    exams.__len__.return_value = 10

    def epoch(**more):
        torch.manual_seed(7)
        engine.train_epoch(step, exams, **more)
        return list(drawn)

    drawn, stop = [], [1]
    epoch()  # the first rank's states, after four steps
    drawn, stop, ours["rank"] = [], [], rank
    whole = epoch()
    drawn = []
    rest = epoch(partial_epoch=saved | dict.fromkeys(("logits", "losses"), torch.zeros(4, 1)))
    assert len(set(whole)) == 10 and rest == whole[4:]


def test_one_process_is_all_of_its_ranks():
    assert (ranks.rank(), ranks.world_size(), ranks.is_first()) == (0, 1, True)
    assert ranks.share([3, 4, 5]) == [3, 4, 5]
    stop = []
    assert not ranks.any_stops(stop) and ranks.any_stops([15])


def test_a_signal_while_ranks_compare_is_for_the_next_time(monkeypatch):
    """Otherwise this rank stops and the others go on, without it."""
    stop = []
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks.dist, "all_reduce", lambda number, how: stop.append(15))
    assert not ranks.any_stops(stop)
    monkeypatch.setattr(ranks.dist, "all_reduce", lambda number, how: None)
    assert ranks.any_stops(stop)
