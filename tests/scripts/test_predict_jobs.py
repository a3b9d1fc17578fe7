"""predict.py --jobs: the file of one process, whoever is killed."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future

import numpy as np
import psutil
import pytest
import torch
from conftest import PLANES, ROOT, assert_one_line_error, run_script, small_file_system
from hospital import write_study

from mrnet.errors import RunError
from mrnet.files import alone_at
from mrnet.inference.answering import Options
from mrnet.runtime.jobs import Jobs, in_order
from predict import predict_beside_others


def predict(work, exams, out, *more):
    return run_script("predict.py", exams, "--models-dir", work / "models", "--precision", "fp32",
                      "--allow-synthetic", "--out", out, *more)  # fmt: skip


@pytest.fixture(scope="module")
def archive(trained, tmp_path_factory):
    """A folder of 30 exams of a few slices, and their rows by one process, bytes."""
    folder = tmp_path_factory.mktemp("archive")
    for source in (trained[0] / "data" / "valid").glob("*/*.npy"):
        plane = folder / "exams" / source.parent.name
        plane.mkdir(parents=True, exist_ok=True)
        for k in range(3):
            np.save(plane / f"{source.stem}{k}.npy", np.load(source)[k : k + 6])
    done = predict(trained[0], folder / "exams", folder / "one.csv")
    assert done.returncode == 0, done.stderr
    return folder / "exams", (folder / "one.csv").read_bytes()


# --- the processes --------------------------------------------------------------------------------


class Late(Future):
    """Is done when somebody waits for it."""

    def result(self):
        self.set_result(10)
        return super().result()


def test_results_come_in_order_as_soon_as_they_are_there():
    begun = []

    def submit(item):
        begun.append(item)
        future = Late() if item == 1 else Future()
        if item != 1:
            future.set_result(item * 10)
        return future

    found = in_order(submit, range(5), 3)
    assert next(found) == (0, 0) and begun == [0]
    assert next(found) == (1, 10) and begun == [0, 1, 2, 3]  # no more than three at a time
    assert list(found) == [(2, 20), (3, 30), (4, 40)]


def describe_process(seconds):
    time.sleep(seconds)
    return os.environ["CUDA_VISIBLE_DEVICES"], torch.get_num_threads(), os.getpid()


@pytest.mark.whole
def test_processes_share_out_gpus_and_have_their_threads():
    found = [said for _, said in Jobs(2, 3, ("0", "3")).map(describe_process, [9.0, *[0.1] * 5])]
    assert {(gpu, threads) for gpu, threads, _ in found} == {("0", 3), ("3", 3)}
    assert len({pid for *_, pid in found}) == 2


def fail(item):
    raise RunError(f"no {item}")


@pytest.mark.whole
def test_what_a_process_raises_is_raised_here():
    with pytest.raises(RunError, match="no 7"):
        list(Jobs(1).map(fail, [7]))


# --- whole runs -----------------------------------------------------------------------------------


@pytest.mark.whole
@pytest.mark.parametrize("more", [(), ("--jsonl", "--partial")])
def test_jobs_predict_what_one_process_predicts(trained, archive, tmp_path, more):
    one, out = tmp_path / "one", tmp_path / "all"
    one.write_bytes(archive[1])
    if more:
        assert predict(trained[0], archive[0], one, "--overwrite", *more).returncode == 0
    done = predict(trained[0], archive[0], out, "--jobs", 3, "--threads", 1, *more)
    assert done.returncode == 0 and "30 exams" in done.stdout, done.stderr
    assert out.read_bytes() == one.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"all", "one"}
    lines = one.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join([*lines[10:20], lines[20][:30]]) if more else b"".join(lines[:11]))
    done = predict(trained[0], archive[0], out, "--jobs", 2, "--resume", *more)
    assert done.returncode == 0 and "20 exams, 10 were there" in done.stdout, done.stderr
    assert out.read_bytes() == one.read_bytes()


@pytest.mark.whole
def test_jobs_name_what_cannot_be_used(trained, archive, tmp_path):
    exams, out, one = tmp_path / "exams", tmp_path / "all.csv", tmp_path / "one.csv"
    for plane in PLANES:
        (exams / plane).mkdir(parents=True)
        for path in sorted((archive[0] / plane).iterdir())[:8]:
            shutil.copy(path, exams / plane)
    (exams / "axial" / "00201.npy").write_bytes(b"no volume")
    done = predict(trained[0], exams, out, "--jobs", 2)
    assert done.returncode == 1
    first, last = done.stderr.splitlines()
    assert first.startswith("error: 00201: ") and "00201.npy" in first and "1 exam could" in last
    assert predict(trained[0], exams, one).returncode == 1
    assert out.read_bytes() == one.read_bytes()


@pytest.mark.whole
def test_jobs_with_bad_input_start_no_process(trained, tmp_path, monkeypatch):
    work = trained[0]
    monkeypatch.setattr(Jobs, "map", lambda *args: pytest.fail("a process was started"))
    for alone in (("--threads", 2), ("--jobs-per-gpu", 2)):
        done = predict(work, work / "data", tmp_path / "x.csv", *alone)
        assert done.returncode == 2 and "--threads and --jobs-per-gpu are for" in done.stderr
    done = predict(work, tmp_path / "none", tmp_path / "x.csv", "--jobs", 2)
    assert_one_line_error(done, "none: no such file")
    for out, why in ((tmp_path / "none/x.csv", "cannot be written"), (tmp_path, "exists and is")):
        done = predict(work, work / "data", out, "--overwrite", "--jobs", 2)
        assert_one_line_error(done, f"{out}: {why}")
    (tmp_path / "y.csv").touch()
    done = predict(work, work / "data", tmp_path / "y.csv", "--jobs", 2)
    assert_one_line_error(done, "y.csv: exists; --resume")
    assert {path.name for path in tmp_path.iterdir()} == {"y.csv"}


@pytest.mark.whole
def test_networks_that_are_trained_again_meanwhile_are_not_used(trained):
    networks, options = (trained[0] / "models", ("acl",), ("article",), "cpu"), Options(
        torch.device("cpu"), "fp32", False
    )  # fmt: skip
    with pytest.raises(RunError, match="not the networks that this run began with"):
        predict_beside_others(None, networks, options, "another hash")


@pytest.mark.whole
def test_two_runs_do_not_write_one_file(trained, tmp_path):
    """Such as a cron job that lasts longer than an hour, with --resume."""
    work, out = trained[0], tmp_path / "x.csv"
    with alone_at(out, ""):
        for how in (("--resume",), ("--overwrite",), ("--resume", "--jobs", 2)):
            done = predict(work, work / "data", out, *how)
            assert_one_line_error(done, "x.csv: another run predicts it; wait for that one")
    with alone_at(tmp_path / "pages", ""):
        done = run_script("explain.py", work / "data", "--all", "--models-dir", work / "models",
                          "--out", tmp_path / "pages")  # fmt: skip
    assert_one_line_error(done, "another run writes pages there; wait for that one")
    assert {path.name for path in tmp_path.rglob("*")} == {"pages"}


# --- kills ----------------------------------------------------------------------------------------


class Running:
    """predict.py --jobs 2 as a process, whose temporary files lie in `folder`/tmp.

    Args:
        words: more of its arguments.
    """

    def __init__(self, work, exams, folder, *words):
        self.out, self.temporary = folder / "rows.csv", folder / "tmp"
        self.temporary.mkdir(exist_ok=True)
        self.words = [exams, "--models-dir", work / "models", "--precision", "fp32",
                      "--allow-synthetic", "--out", self.out, *words]  # fmt: skip
        command = [sys.executable, ROOT / "predict.py", *self.words, "--jobs", 2, "--threads", 1]
        self.process = subprocess.Popen(
            list(map(str, command)), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            env=os.environ | {"TMPDIR": str(self.temporary)}, start_new_session=True,
            # A background shell starts its children with SIGINT ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        self.descendants = []

    def wait_for_rows(self, count=1):
        while not self.out.exists() or self.out.read_bytes().count(b"\n") <= count:
            assert self.process.poll() is None, self.process.stderr.read()
            time.sleep(0.01)
        self.descendants = psutil.Process(self.process.pid).children(recursive=True)

    @property
    def workers(self):
        """The processes that predict."""
        return [one for one in self.descendants if is_worker(one)]

    def end(self, status):
        """Check that it ends with `status`, and all its processes with it. Returns its stderr."""
        said = self.process.communicate(timeout=120)[1]
        assert self.process.returncode == status, said
        assert psutil.wait_procs(self.descendants, timeout=20)[1] == []
        assert "Traceback" not in said
        return said

    def check(self, one):
        """Its rows are the first of those of one process, `one`, and --resume makes them all."""
        rows = self.out.read_bytes()
        assert one.startswith(rows) and rows.count(b"\n") < one.count(b"\n")
        done = run_script("predict.py", *self.words, "--resume", "--jobs", 2)
        assert done.returncode == 0, done.stderr
        assert self.out.read_bytes() == one


def is_worker(process):
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return False


@pytest.mark.whole
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_the_rows_and_ends_all_processes(trained, archive, tmp_path, number):
    """Ctrl-C reaches the whole group, here while its processes start."""
    running = Running(trained[0], archive[0], tmp_path)
    if number == signal.SIGINT:
        while len(running.workers) < 2:
            time.sleep(0.01)
            running.descendants = psutil.Process(running.process.pid).children()
        time.sleep(0.5)
        os.killpg(running.process.pid, number)
    else:
        running.wait_for_rows()
        running.process.send_signal(number)
    (line,) = running.end(128 + number).splitlines()
    assert "saved in" in line and "Resume with: python predict.py" in line
    running.check(archive[1])


@pytest.mark.whole
def test_rows_and_processes_of_a_run_that_is_killed(trained, archive, tmp_path):
    running = Running(trained[0], archive[0], tmp_path)
    running.wait_for_rows()
    running.process.kill()
    running.end(-signal.SIGKILL)
    running.check(archive[1])


@pytest.mark.whole
def test_a_process_that_is_killed_leaves_no_converted_exams_of_patients(trained, tmp_path):
    for study in range(8):
        write_study(tmp_path / "scans", study, "one")
    one = tmp_path / "one.csv"
    assert predict(trained[0], tmp_path / "scans", one).returncode == 0
    running = Running(trained[0], tmp_path / "scans", tmp_path)
    running.wait_for_rows()
    assert list(running.temporary.glob("mrnet-*/*/*.npy"))
    assert 1 <= len(running.workers) <= 2
    running.workers[0].kill()
    line = running.end(1).splitlines()[-1]
    assert "ended before its work" in line and "saved in" in line and "--resume" in line
    assert not list(running.temporary.glob("mrnet-*/"))
    running.check(one.read_bytes())


@pytest.mark.whole
def test_a_full_disk_keeps_the_rows(trained, archive, tmp_path):
    with small_file_system(tmp_path / "small", "4k") as folder:
        running = Running(trained[0], archive[0], tmp_path, "--out", folder / "rows.csv")
        (line,) = running.end(1).splitlines()
        assert "No space left on device" in line
        rows = (folder / "rows.csv").read_bytes()
        assert archive[1].startswith(rows) and rows.count(b"\n") > 1


@pytest.mark.slow
def test_twenty_thousand_studies_of_which_some_processes_are_killed(trained, tmp_path):
    """The rows are those of one process, and no process grows with the number of exams."""
    work, n = trained[0], 20_000
    folder = tmp_path / "exams" / "axial"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for k in range(n):
        np.save(folder / f"{k:05d}.npy", rng.integers(0, 256, (2, 64, 64), dtype=np.uint8))
    one = tmp_path / "one.csv"
    assert predict(work, tmp_path / "exams", one).returncode == 0
    memory = {}  # of each process: rows, resident bytes, and those of them that no file holds
    for victim in ("worker", "owner", "worker", None):
        running = Running(work, tmp_path / "exams", tmp_path, "--resume")
        before = lines_of(running.out)
        running.wait_for_rows(before + 1)
        wanted = before + random.randint(500, 3000)
        while running.process.poll() is None:
            time.sleep(0.05)
            lines = lines_of(running.out)
            for process in (psutil.Process(running.process.pid), *running.workers):
                memory.setdefault(process.pid, []).append((lines, *memory_of(process)))
            if victim and lines > wanted:
                (running.process if victim == "owner" else running.workers[0]).kill()
                break
        running.end({"worker": 1, "owner": -signal.SIGKILL, None: 0}[victim])
    assert running.out.read_bytes() == one.read_bytes()
    seen = [[one for one in found if len(one) == 3] for found in memory.values()]
    long = [found for found in seen if found[-1][0] - found[0][0] > 2000]
    assert len(long) >= 3
    for found in long:
        early = np.max([sizes for lines, *sizes in found if lines < found[0][0] + 500], axis=0)
        late = np.max([sizes for _, *sizes in found], axis=0)
        print(f"MB resident, private: {early / 1e6} within 500 exams, then {late / 1e6}")
        assert np.all(late > 1e8) and np.all(late < early + (30e6, 10e6))


def lines_of(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def memory_of(process):
    """Bytes of a process: resident, and those of them that no file holds; () once it has ended."""
    try:
        memory = process.memory_info()
    except psutil.Error:
        return ()
    return (memory.rss, memory.rss - memory.shared) if memory.rss else ()
