"""Nothing is lost: real processes, real signals, a real full disk; see docs/reliability.md."""

import fcntl
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time

import numpy as np
import pytest
import torch
from conftest import (
    PLANES,
    ROOT,
    assert_one_line_error,
    assert_same_training,
    run_script,
    small_file_system,
    write_exams,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from mrnet.networks.saved import STATE_FORMAT, read_checkpoint
from mrnet.runtime import cli
from mrnet.runtime.jobs import Job, Jobs
from mrnet.training.checkpoint import load_model

RECIPE = ("--task", "acl", "--plane", "axial", "--no-pretrained", "--lr", "1e-4", "--log-every",
          "5", "--patience", "99", "--precision", "fp32")  # fmt: skip


def arguments(work, *more, models="models"):
    return [*RECIPE, "--data-dir", work / "data", "--models-dir", work / models, "--logs-dir",
            work / f"{models}-logs", *more]  # fmt: skip


@pytest.fixture
def work(tmp_path):
    write_exams(tmp_path / "data")
    return tmp_path


def model_of(work, models="models"):
    return torch.load(work / models / "acl-axial.pt", weights_only=True)


# --- kills ----------------------------------------------------------------------------------------

# Imports once, then forks a real process for each run: importing torch takes longer than training.
LAUNCHER = """
import os, resource, runpy, signal, sys
import train
sys.modules.pop("train")
for line in sys.stdin:
    output, limit, *argv = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if not child:
        signal.alarm(120)
        out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1), os.dup2(out, 2)
        os.setsid()
        if limit != "-":
            used = 4096 * int(open("/proc/self/statm").read().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (used + int(limit),) * 2)
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Launcher:
    """Runs train.py in processes that start in a moment."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER], cwd=ROOT, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def start(self, output, argv, limit="-"):
        """-> process id."""
        words = [str(output), str(limit), str(ROOT / "train.py"), *map(str, argv)]
        self.process.stdin.write("\t".join(words) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self):
        """-> exit status, negative for a signal."""
        return int(self.process.stdout.readline())

    def run(self, output, argv, limit="-"):
        self.start(output, argv, limit)
        return self.wait()


@pytest.fixture(scope="module")
def launcher():
    one = Launcher()
    yield one
    one.process.stdin.close()
    one.process.wait()


def epochs_said(text):
    """[(epoch, whether it was the best), ...] of a run's lines."""
    lines = re.findall(r"^ +(\d+) .*?( saved)?$", text, re.M)
    return [(int(epoch), bool(best)) for epoch, best in lines]


@pytest.mark.parametrize(
    "kills_wanted, epochs", [(4, 6), pytest.param(50, 40, marks=pytest.mark.slow)]
)
@pytest.mark.whole
def test_kills_lose_nothing(work, launcher, kills_wanted, epochs):
    """SIGKILL at random moments, within epochs and while files are written, then to the end."""
    assert (
        launcher.run(work / "whole.txt", arguments(work, "--epochs", epochs, models="whole")) == 0
    )
    argv = arguments(work, "--epochs", epochs, "--resume")
    moments, kills, done, best = random.Random(0), 0, 0, 0
    path = work / "models" / "acl-axial.pt"
    while kills < kills_wanted:
        output = work / f"run{kills}.txt"
        child = launcher.start(output, argv)
        time.sleep(moments.uniform(0.0, 0.8))
        os.kill(child, signal.SIGKILL)
        assert launcher.wait() == -signal.SIGKILL
        kills += 1
        said = epochs_said(output.read_text()) if output.exists() else []
        if said:
            assert said[0][0] in (done, done + 1)  # at most one epoch is repeated
            done = said[-1][0]
            best = max([best, *(epoch for epoch, is_best in said if is_best)])
        if done == epochs:  # it must not finish before it was killed often enough
            shutil.rmtree(work / "models")
            shutil.rmtree(work / "models-logs")
            done = best = 0
        if best:
            assert load_model(path)[1]["epoch"] >= best
        if path.with_suffix(".state").exists():
            read_checkpoint(path.with_suffix(".state"), expected=STATE_FORMAT)
    assert launcher.run(work / "last.txt", argv) == 0
    assert_same_training(model_of(work), model_of(work, "whole"))
    assert not list((work / "models").glob(".*.tmp")) and not list(path.parent.glob("*.state"))
    (log,) = (work / "models-logs" / "acl" / "axial").iterdir()
    for folder, tag in ((log, "auc/train"), (log / "within-epoch", "within-epoch/train-loss")):
        steps = [point.step for point in EventAccumulator(str(folder)).Reload().Scalars(tag)]
        assert len(steps) == len(set(steps)) and steps == sorted(steps)
    assert steps[-1] == epochs * 12


# --- signals --------------------------------------------------------------------------------------


@pytest.fixture
def signals_heard():
    """A background shell starts its children with SIGINT ignored, and what is ignored stays so."""
    before = {n: signal.signal(n, signal.SIG_DFL) for n in (signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.usefixtures("signals_heard")
def test_a_signal_ends_the_training_after_its_step(work, monkeypatch, number, status):
    """Sent to the process in the seventh of twelve steps of the second epoch."""
    dropout = ("--epochs", 3, "--dropout", 0.3)  # its random numbers are drawn within an epoch
    assert run_script("train.py", *arguments(work, *dropout, models="whole")).returncode == 0
    steps, real = [], train.training_step

    def step(*args):
        steps.append(1)
        if len(steps) == 12 + 7:
            os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(train, "training_step", step)
    done = run_script("train.py", *arguments(work, *dropout))
    assert done.returncode == status and len(steps) == 19
    assert "--dropout 0.3 --resume" in done.stderr.splitlines()[-1]
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)
    done = run_script("train.py", *arguments(work, *dropout, "--resume"))
    assert done.returncode == 0 and "after epoch 1\n" in done.stdout
    assert len(steps) == 19 + 24  # the second epoch begins anew
    assert_same_training(model_of(work), model_of(work, "whole"))


@pytest.mark.whole
def test_a_second_signal_stops_at_once(work, launcher):
    child = launcher.start(work / "out.txt", arguments(work, "--epochs", 10_000))
    deadline = time.monotonic() + 60
    while not (work / "models" / "acl-axial.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child, signal.SIGTERM)
    os.kill(child, signal.SIGTERM)
    assert launcher.wait() in (-signal.SIGTERM, 143)
    load_model(work / "models" / "acl-axial.pt")


@pytest.mark.parametrize("number, status", [(signal.SIGHUP, 129), (signal.SIGINT, 130)])
@pytest.mark.usefixtures("signals_heard")
@pytest.mark.whole
def test_a_signal_ends_the_training_where_nobody_reads_the_output(work, number, status):
    """SIGHUP: the kernel's, of a terminal that is closed. SIGINT: Ctrl-C in `2>&1 | tee`."""
    reader, writer = os.openpty() if number == signal.SIGHUP else os.pipe()
    command = [sys.executable, ROOT / "train.py", *arguments(work, "--epochs", 10_000)]
    running = subprocess.Popen(
        list(map(str, command)),
        stdin=writer if number == signal.SIGHUP else subprocess.DEVNULL,
        stdout=writer,
        stderr=writer,
        start_new_session=True,
        preexec_fn=lambda: os.isatty(0) and fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(writer)
    said = b""
    while not re.search(rb"^ +1 .* saved", said, re.M):
        more = os.read(reader, 10_000)
        assert more, said
        said += more
    os.close(reader)
    if number == signal.SIGINT:
        running.send_signal(number)
    try:
        assert running.wait(120) == status
    finally:
        running.kill()
    state = read_checkpoint(work / "models" / "acl-axial.state", expected=STATE_FORMAT)["training"]
    assert state["epoch"] >= 1 and len(state["history"]) == state["epoch"]


@pytest.mark.parametrize(
    "script, number", [("predict", signal.SIGTERM), ("explain", signal.SIGHUP)]
)
@pytest.mark.usefixtures("signals_heard")
@pytest.mark.whole
def test_a_signal_leaves_no_converted_exams_of_patients(tmp_path, script, number):
    code = f"""
import os, sys, tempfile, time
from contextlib import contextmanager
import {script} as script
from mrnet.runtime import cli

@contextmanager
def exams(*args):
    with tempfile.TemporaryDirectory(dir={str(tmp_path)!r}) as folder:
        open(folder + "/0001.npy", "w")
        os.kill(os.getpid(), {int(number)})
        time.sleep(60)
        yield

script.open_fit_exams, script.load_tasks = exams, lambda *args: []
sys.argv = ["{script}.py", "scans"]
cli.exit_with_status(lambda: script.run(script.parse_arguments()))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 128 + number and done.stderr.startswith(f"{script}.py: interrupted.")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("signals_heard")
def test_reproduce_passes_a_signal_on_and_repeats_nothing(work):
    """Interrupted in its second network, started again: the first is not trained again."""
    recipe = ["--no-pretrained", "--epochs", "2", "--lr", "1e-4"]
    files = ("--data-dir", work / "data", "--models-dir", work / "models", "--logs-dir",
             work / "logs", "--jobs", "1")  # fmt: skip
    command = [sys.executable, ROOT / "reproduce.py", *files, "--", *recipe]
    first = subprocess.Popen(
        [*map(str, command)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    finished, begun = [], []
    while not (finished and begun) and time.monotonic() < deadline:
        time.sleep(0.02)
        begun = list((work / "models").glob("*.state"))
        models = (work / "models").glob("*.pt")
        finished = [path for path in models if path.with_suffix(".state") not in begun]
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=120)
    assert first.returncode == 130 and "Start it again" in said
    (path,) = finished
    before = path.read_bytes()
    done = run_script("reproduce.py", *files, "--", *recipe)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == before
    output = (work / "models" / "output" / f"{path.stem}-1.txt").read_text()
    assert "finished before" in output and "3 networks, 1 at a time" in done.stdout
    table = (work / "models" / "results.md").read_text()
    for words in ("ours, stack", "optimistic", "Bien et al.", "0.965", "0.95"):
        assert words in table
    assert all((work / "models" / f"acl-{plane}.pt").exists() for plane in PLANES)


@pytest.mark.slow
def test_networks_side_by_side_are_those_of_one_after_the_other(work):
    recipe = ["--no-pretrained", "--epochs", "1", "--folds", "2", "--precision", "fp32"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for models, jobs in (("one", "1"), ("three", "3")):
        command = [sys.executable, ROOT / "reproduce.py", "--data-dir", work / "data",
                   "--models-dir", work / models, "--logs-dir", work / "logs", "--jobs", jobs,
                   "--", *recipe]  # fmt: skip
        done = subprocess.run(list(map(str, command)), capture_output=True, env=environment)
        assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (work / "one").glob("*.pt"))
    assert len(names) == 6
    for name in names:
        one, three = (torch.load(work / m / name, weights_only=True) for m in ("one", "three"))
        assert_same_training(one, three)


@pytest.mark.whole
def test_a_failed_network_is_named_and_the_others_are_trained(work):
    (work / "data" / "train" / "coronal" / "0003.npy").write_bytes(b"no volume")
    done = run_script("reproduce.py", "--data-dir", work / "data", "--models-dir",
                      work / "models", "--logs-dir", work / "logs", "--", "--no-pretrained",
                      "--epochs", "1")  # fmt: skip
    assert_one_line_error(done, "1 of 3 networks failed", "acl, coronal", "0003.npy", status=1)
    assert sorted(path.name for path in (work / "models").glob("*.pt")) == [
        "acl-axial.pt", "acl-sagittal.pt",
    ]  # fmt: skip


def test_a_job_that_fails_for_no_lasting_reason_is_tried_again(tmp_path):
    code = f"import pathlib, sys; p = pathlib.Path({str(tmp_path / 'tried')!r})\n"
    code += "if not p.exists(): p.touch(); sys.exit(1)\n"
    again = Job("again", ("-c", code), tmp_path / "again.txt")
    bad = Job("bad", ("-c", "import sys; print('tried'); sys.exit(2)"), tmp_path / "bad.txt")
    assert {done.job.name: done.status for done in Jobs(2).run([again, bad])} == {
        "again": 0, "bad": 2,
    }  # fmt: skip
    assert (tmp_path / "bad.txt").read_text().count("\ntried") == 1


# --- resources ------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 45 MB: room for one model and one state, not for a second state."""
    with small_file_system(tmp_path / "small", "45m") as folder:
        yield folder


def test_a_full_disk_stops_in_one_line_and_keeps_the_best(work, small_disk):
    more = ("--models-dir", small_disk, "--epochs", 3)
    done = run_script("train.py", *arguments(work), *more)
    assert_one_line_error(done, "No space left on device", status=1)
    assert load_model(small_disk / "acl-axial.pt")[1]["epoch"] == 1
    assert not list(small_disk.glob(".*.tmp"))
    # With room again it goes on, to the same end.
    shutil.copytree(small_disk, work / "models")
    assert run_script("train.py", *arguments(work, "--epochs", 3, "--resume")).returncode == 0
    run_script("train.py", *arguments(work, "--epochs", 3, models="whole"))
    assert_same_training(model_of(work), model_of(work, "whole"))


@pytest.mark.whole
def test_out_of_memory_in_one_line(tmp_path, launcher):
    work = tmp_path
    write_exams(work / "data")
    large = np.zeros((900, 256, 256), np.uint8)
    large[:, 0] = 1
    np.save(work / "data" / "train" / "axial" / "0003.npy", large)
    argv = arguments(work, "--epochs", 1, "--cache", "disk")
    assert launcher.run(work / "out.txt", argv, limit=600_000_000) == 1
    last = (work / "out.txt").read_text().splitlines()[-1]
    assert "out of memory" in last and "--slices 0.5" in last


@pytest.mark.parametrize("said", ["could not create a primitive", "can't allocate memory"])
def test_every_way_to_run_out_of_memory_is_said(said, capsys):
    """Which one comes depends on what asks first: oneDNN's words tell nothing."""

    def main():
        raise RuntimeError(said)

    with pytest.raises(SystemExit) as end:
        cli.exit_with_status(main)
    assert end.value.code == 1 and "out of memory" in capsys.readouterr().err


def test_logs_that_cannot_be_written(work):
    (work / "models-logs").write_text("a file where the folder should be")
    done = run_script("train.py", *arguments(work, "--epochs", 1))
    assert done.returncode == 0 and "NONE" in done.stdout and done.stderr == ""
    assert (work / "models" / "acl-axial.pt").exists()


@pytest.mark.parametrize("everything", [False, True])
def test_data_that_disappear_while_training(work, monkeypatch, everything):
    steps, real = [], train.training_step

    def step(*args):
        steps.append(1)
        if len(steps) == 14:
            folder = work / "data" / "train" / "axial"
            shutil.rmtree(folder) if everything else (folder / "0005.npy").unlink()
        return real(*args)

    monkeypatch.setattr(train, "training_step", step)
    done = run_script("train.py", *arguments(work, "--epochs", 3, "--cache", "disk"))
    assert_one_line_error(done, ".npy", "no such volume")
    assert load_model(work / "models" / "acl-axial.pt")[1]["epoch"] == 1


@pytest.mark.parametrize("damage", ["truncated", "other", "parts"])
def test_a_damaged_state_is_named(work, monkeypatch, damage):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate_model", interrupt)
        assert run_script("train.py", *arguments(work)).returncode == 130
    path = work / "models" / "acl-axial.state"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "other":
        torch.save({"format": "mrnet-training-0"}, path)
    else:
        content = read_checkpoint(path, expected=STATE_FORMAT)
        del content["training"]["optimizer"]
        torch.save(content, path)
    done = run_script("train.py", *arguments(work, "--resume"))
    assert_one_line_error(done, "acl-axial.state")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_output_that_is_closed_from_the_start_is_no_fault(tmp_path, closed):
    code = "import os, sys; from mrnet.runtime import cli; from mrnet.errors import InputError\n"
    code += (
        "def main():\n sys.stdout.write('x'); sys.stderr.flush()\n os.system('echo y || touch bad')"
    )
    code += "\n raise InputError('wrong')\ncli.exit_with_status(main)"
    command = f'PYTHONPATH={shlex.quote(str(ROOT))} {shlex.quote(sys.executable)} -c "$0" {closed}'
    done = subprocess.run(
        ["sh", "-c", command, code], capture_output=True, text=True, cwd=tmp_path, timeout=100
    )
    assert done.returncode == 2 and not any(tmp_path.iterdir())
    assert "Traceback" not in done.stderr
    assert ("error: wrong" in done.stderr) == (closed == ">&-")
