"""Jobs side by side on one machine: GPUs, and whatever is killed."""

import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import QUICK, ROOT, contents, write_exams

from mrnet.runtime import cluster
from mrnet.runtime.jobs import Job, JobResult, Jobs, failures, finish, start
from mrnet.training.memory import bytes_of_a_job


def test_gpus_are_shared_out_evenly(tmp_path):
    code = "import os, time; time.sleep(0.5); print('gpu', os.environ['CUDA_VISIBLE_DEVICES'])"
    jobs = [Job(str(n), ("-c", code), tmp_path / f"{n}.txt") for n in range(8)]
    assert all(done.status == 0 for done in Jobs(4, 1, ("0", "3")).run(jobs))
    assert Counter(job.log.read_text().split()[-1] for job in jobs) == {"0": 4, "3": 4}


@pytest.mark.parametrize(
    "text, words", [("a\nb\n", "with 'b' ("), ("", "with '' ("), (None, "--models-dir")]
)
def test_a_failure_is_named_even_without_its_log(tmp_path, text, words):
    job = Job("acl, axial", ("x",), tmp_path / "log.txt")
    if text is not None:
        job.log.write_text(text)
    said = failures([job], [job, job])
    assert said.startswith("1 of 2 networks failed, the last, acl, axial, with ")
    assert words in said and str(job.log) in said


def test_a_jobs_memory_is_that_of_its_backbone():
    (path,) = (ROOT / "benchmarks").glob("backbones-*.csv")  # measured
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            measured = 1e9 * float(row["GB at 61"])
            assert measured <= bytes_of_a_job(row["backbone"]) <= 2.2 * measured, row["backbone"]
    assert bytes_of_a_job("alexnet", planes=3) > bytes_of_a_job("alexnet")


def test_jobs_share_out_the_cores_that_they_may_use():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from mrnet.runtime.jobs import Jobs, most_at_once\n"
    code += "print(most_at_once(9, 1), Jobs(1).threads)"
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("needs Linux's affinity")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "1"], done.stderr


@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs util-linux's setpriv")
def test_jobs_end_with_a_driver_that_is_killed(tmp_path):
    code = f"import time; open({str(tmp_path / 'began')!r}, 'w'); time.sleep(60)"
    driver = "from pathlib import Path; from mrnet.runtime.jobs import Job, Jobs\n"
    driver += f"list(Jobs(1).run([Job('a', ('-c', {code!r}), Path({str(tmp_path / 'a.txt')!r}))]))"
    running = subprocess.Popen([sys.executable, "-c", driver], cwd=ROOT)
    while not (tmp_path / "began").exists():
        time.sleep(0.05)
    children = psutil.Process(running.pid).children(recursive=True)
    (child,) = (one.pid for one in children if code in one.cmdline())
    running.send_signal(signal.SIGKILL)
    running.wait()
    for _ in range(100):
        if not is_alive(child):
            break
        time.sleep(0.05)
    assert not is_alive(child)


def test_jobs_that_were_asked_to_stop_save_where_nobody_reads_the_output(tmp_path):
    """The first that ends is said to a pipe that nobody reads; the second is still saving then."""
    code = "import signal, sys, time; from pathlib import Path; folder, rest = sys.argv[1:]\n"
    code += "def save(number, frame):\n"
    code += "    signal.signal(number, signal.SIG_DFL); time.sleep(float(rest))\n"
    code += "    (folder / f'saved{rest}').touch(); sys.exit(143)\n"
    code += "folder = Path(folder); signal.signal(signal.SIGTERM, save)\n"
    code += "(folder / f'began{rest}').touch(); time.sleep(60)"
    driver = "from pathlib import Path; from mrnet.runtime import cli\n"
    driver += "from mrnet.runtime.jobs import Job, Jobs\n"
    driver += f"code, folder = {code!r}, {str(tmp_path)!r}\n"
    driver += "jobs = [Job(s, ('-c', code, folder, s), Path(folder, s)) for s in ('0', '2')]\n"
    driver += "cli.exit_with_status(lambda: list(Jobs(2, 1).run(jobs)))"
    reader, writer = os.pipe()
    running = subprocess.Popen([sys.executable, "-c", driver], cwd=ROOT, stdout=writer,
                               stderr=writer)  # fmt: skip
    os.close(writer)
    while len(list(tmp_path.glob("began*"))) < 2 and running.poll() is None:
        time.sleep(0.05)
    os.close(reader)
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 143
    assert sorted(path.name for path in tmp_path.glob("saved*")) == ["saved0", "saved2"]


def test_a_signal_does_not_lose_a_job_that_has_just_ended(tmp_path, monkeypatch):
    job, runner, started = Job("a", ("-c", ""), tmp_path / "a.txt"), Jobs(1, 1), []

    def ended(process):
        while is_alive(process.pid):
            time.sleep(0.05)
        return True

    process = start(job, 1)
    assert ended(process)
    runner.running[process] = job
    runner.stop(signal.SIGTERM)
    assert finish(job, process, 0.0).status == 0
    monkeypatch.setattr(cluster, "start", lambda *of: started.append(start(*of)) or started[-1])
    monkeypatch.setattr(cluster, "is_set", lambda flag: ended(started[-1]))  # then it is asked
    assert cluster.try_here(job, 1, None).status == 0


class LocalRay:
    """Stands in for ray, a node of one core: "lost" never ends."""

    class exceptions:
        RayError = RuntimeError

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": 1.0}}]

    def remote(self, **options):
        return lambda what: SimpleNamespace(remote=lambda *arguments: arguments)

    def wait(self, references, timeout):
        return references[:1], references[1:]

    def get(self, reference):
        job, *_ = reference
        if job.name == "lost":
            raise RuntimeError
        return JobResult(job, 0, 1.0, 1.0, 0)


def test_no_time_is_known_of_a_job_that_is_lost_with_its_node(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "connect", LocalRay)
    jobs = [Job(name, ("x",), tmp_path / f"{name}.txt") for name in ("1", "lost")]
    one, lost = cluster.RayJobs().run(jobs)
    assert one.is_fine and one.seconds == 1.0
    assert lost.job == jobs[1] and not lost.is_fine and lost.seconds is lost.cpu_seconds is None
    assert jobs[1].log.read_text() == "Ray: RuntimeError\n"


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"


@pytest.mark.slow
def test_a_hundred_kills_of_jobs_and_drivers_change_nothing(tmp_path):
    """Thirty tiny networks; jobs and drivers get SIGKILL at random moments. The end result is that
    of an undisturbed run."""
    write_exams(tmp_path / "data", train=30)
    random.seed(0)

    def start(models):
        command = ["reproduce.py", "--data-dir", tmp_path / "data", "--models-dir",
                   tmp_path / models, "--logs-dir", tmp_path / "logs", "--", "--folds", "5",
                   "--repeat", "2", "--precision", "fp32", *QUICK]  # fmt: skip
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, **silent)

    assert start("whole").wait() == 0
    kills = Counter()
    running = start("killed")
    while kills.total() < 100:
        time.sleep(random.uniform(0.2, 5.0))
        jobs = [child for child in psutil.Process(running.pid).children() if is_alive(child.pid)]
        if not jobs:
            pass  # it starts, or ends
        elif random.random() < 0.8:
            random.choice(jobs).kill()
            kills["job"] += 1
        else:
            running.kill()
            kills["driver"] += 1
        if running.poll() is not None or not is_alive(running.pid):
            running.wait()
            running = start("killed")
    for _ in range(3):  # a job that was killed twice has failed, and is trained by the next run
        if running.wait() == 0:
            break
        running = start("killed")
    print(dict(kills))
    assert len(contents(tmp_path / "whole")) == 30
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    results = [(tmp_path / models / "results.md").read_text() for models in ("killed", "whole")]
    assert results[0] == results[1]
