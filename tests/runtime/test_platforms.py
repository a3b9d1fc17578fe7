"""Machines that are not here: a Mac's GPU, Windows, a bare Linux."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import FILES, ROOT, assert_one_line_error, run_script
from torch import nn

from dataloader import MRDataset
from model import MRNet
from mrnet.errors import InputError
from mrnet.networks.backbones import BACKBONES
from mrnet.runtime.devices import pick_device, pick_precision
from mrnet.runtime.jobs import Jobs
from mrnet.training import datasets
from mrnet.training.datasets import cache_volumes


@pytest.fixture
def mac(monkeypatch):
    """A machine with Apple's GPU and no other, as far as torch says; calls of os.execv."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(os, "execv", lambda *words: calls.append(words))
    monkeypatch.delenv("PYTORCH_ENABLE_MPS_FALLBACK", raising=False)
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    return calls


def test_auto_takes_apples_gpu_in_fp32(mac):
    assert pick_device("auto").type == "mps" and mac == []
    assert pick_precision("auto", torch.device("mps")) == "fp32"
    with pytest.raises(InputError, match="--precision bf16: this mps has no bfloat16 units"):
        pick_precision("bf16", torch.device("mps"))


def test_apples_gpu_leaves_what_it_lacks_to_the_cpu(mac, monkeypatch, capsys):
    """torch reads the setting when it is loaded, so the command starts again with it."""
    monkeypatch.delenv("PYTORCH_ENABLE_MPS_FALLBACK")
    pick_device("mps")
    assert mac == [(sys.executable, [sys.executable, *sys.orig_argv[1:]])]
    assert os.environ["PYTORCH_ENABLE_MPS_FALLBACK"] == "1"
    assert "what it lacks runs on the CPU" in capsys.readouterr().out
    pick_device("mps")
    assert len(mac) == 1


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    done = run_script("train.py", "--task", "acl", "--plane", "axial", "--device", "mps")
    assert_one_line_error(done, "--device mps: no MPS device here; use --device cpu")


@pytest.mark.parametrize("room, where", [(8e9, "device"), (3e9, "disk")])
def test_volumes_are_kept_on_apples_gpu_where_there_is_room(
    shared_exams, monkeypatch, capsys, room, where
):
    exams, kept = MRDataset(shared_exams, "acl", "axial"), []
    monkeypatch.setattr(datasets, "available_memory", lambda: room)
    monkeypatch.setattr(exams, "cache", lambda device, progress: kept.append(device.type))
    assert cache_volumes([exams], "auto", torch.device("mps")) == where
    assert kept == (["mps"] if where == "device" else [])


@pytest.mark.parametrize("name", BACKBONES)
def test_no_network_has_an_adaptive_maximum(name):
    """It was wrong on Apple's GPU for sizes that do not divide (pytorch/pytorch issue 190064)."""
    for pooling in ("max", "mean", "attention"):
        network = MRNet(backbone=name, pooling=pooling)
        assert not any(isinstance(one, nn.AdaptiveMaxPool2d) for one in network.modules())
    for path in FILES:
        assert "adaptive_max_pool" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("asked, given, wanted", [("3", 0, 3), ("3", 2, 2), ("many", 2, 2)])
def test_the_users_number_of_threads_is_that_of_every_process(monkeypatch, asked, given, wanted):
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert Jobs(1, given).threads == wanted


# What Python on Windows has not, and a driver that runs one of the commands without it.
WITHOUT = """
import builtins, multiprocessing, os, runpy, select, signal, sys
for module, names in (
    (os, "wait4 fork forkpty getuid sched_getaffinity mkfifo killpg"),
    (select, "poll epoll"),
    (signal, "pthread_sigmask SIGHUP SIGUSR1 SIGALRM alarm setitimer"),
):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
def no_links(*words, **more):
    raise OSError("symbolic links need a right of their own")
os.symlink = no_links
opened = open
def no_proc(path, *words, **more):
    if str(path).startswith("/proc"):
        raise FileNotFoundError(path)
    return opened(path, *words, **more)
builtins.open = no_proc
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.whole
def test_the_commands_run_without_what_windows_lacks(tmp_path):
    driver, data, models = tmp_path / "driver.py", tmp_path / "data", tmp_path / "models"
    driver.write_text(WITHOUT)
    variables = {name: value for name, value in os.environ.items() if name != "PATH"}
    variables |= {"PATH": "", "USERNAME": "someone"}  # no setpriv

    def run(script, *words):
        command = [sys.executable, driver, ROOT / script, *words]
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, env=variables
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("data/phantom/prepare.py", "--exams", 12, "--valid", 8, "--size", 64, "--out", data)
    files = ("--data-dir", data, "--models-dir", models)
    for plane in ("axial", "coronal", "sagittal"):
        run("train.py", "--task", "acl", "--plane", plane, "--no-pretrained", "--epochs", "1",
            *files, "--logs-dir", tmp_path / "logs")  # fmt: skip
    assert "stack" in run("train_logistic_regression.py", "--task", "acl", *files)
    answer = ("--models-dir", models, "--allow-synthetic")
    for jobs in (1, 2):
        run("predict.py", data, *answer, "--jobs", jobs, "--out", tmp_path / f"{jobs}.csv")
    assert (tmp_path / "1.csv").read_bytes() == (tmp_path / "2.csv").read_bytes()
    run("explain.py", data, "--all", *answer, "--out", tmp_path / "pages")
    assert (tmp_path / "pages" / "index.html").is_file()
    options = ("--no-pretrained", "--epochs", "1", "--logs-dir", tmp_path / "logs")
    run("reproduce.py", "--data-dir", data, "--models-dir", tmp_path / "all", "--jobs", "2", "--",
        *options)  # fmt: skip
