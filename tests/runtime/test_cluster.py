"""Jobs on a Ray cluster: two raylets on this machine, nodes of one core each."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
import torch
from conftest import (
    QUICK,
    ROOT,
    assert_one_line_error,
    contents,
    run_process,
    run_script,
    write_exams,
)
from hospital import write_study

from mrnet.errors import InputError, Interrupted
from mrnet.runtime.jobs import Job

ray = pytest.importorskip("ray", reason="pip install -r requirements-cluster.txt")
pytestmark = pytest.mark.whole


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes; the first has the head. Yields its ray.cluster_utils.Cluster."""
    from ray.cluster_utils import Cluster

    limits = {"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args=limits)
    found.add_node(num_cpus=1, object_store_memory=100_000_000)
    monkeypatch.setenv("RAY_ADDRESS", found.address)
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    yield found
    ray.shutdown()
    found.shutdown()


def test_jobs_are_shared_out_over_the_nodes(cluster, tmp_path):
    from mrnet.runtime.cluster import RayJobs

    code = "import os, psutil, time; time.sleep(3); print(psutil.Process(os.getppid()).ppid())"
    jobs = [Job(str(n), ("-c", code), tmp_path / f"{n}.txt") for n in range(4)]
    bad = Job("bad", ("-c", "import sys; print('tried'); sys.exit(2)"), tmp_path / "bad.txt")
    runner = RayJobs()
    assert runner.at_once == 2
    done = {one.job.name: one for one in runner.run([*jobs, bad])}
    assert {name: one.status for name, one in done.items()} == {
        "0": 0, "1": 0, "2": 0, "3": 0, "bad": 2,
    }  # fmt: skip
    raylets = {job.log.read_text().split()[-1] for job in jobs}  # whose workers they ran in
    assert len(raylets) == 2
    assert (tmp_path / "bad.txt").read_text().count("\ntried") == 1
    assert all(one.seconds > 3 and one.peak_memory > 1e6 for name, one in done.items()
               if name != "bad")  # fmt: skip


def test_a_lost_nodes_jobs_run_again_elsewhere(cluster, tmp_path):
    from mrnet.runtime.cluster import RayJobs

    code = "import os, time; print('began', flush=True); time.sleep(4)\n"
    jobs = [Job(str(n), ("-c", code), tmp_path / f"{n}.txt") for n in range(2)]
    second = cluster.worker_nodes - {cluster.head_node}
    runner, killed = RayJobs(), []

    def kill():
        while not all(job.log.exists() and "began" in job.log.read_text() for job in jobs):
            time.sleep(0.1)
        (node,) = second
        node.kill_raylet()  # SIGKILL
        killed.append(time.time())

    thread = threading.Thread(target=kill)
    thread.start()
    done = list(runner.run(jobs))
    thread.join()
    assert killed and [one.status for one in done] == [0, 0]
    began = Counter(job.log.read_text().count("\nbegan") for job in jobs)
    assert began == {1: 1, 2: 1}  # the other node's job was not disturbed


def test_an_archive_is_predicted_on_the_nodes(cluster, trained, tmp_path):
    """From scans that the first machine converts; a node is lost in the middle."""
    for study in range(8):
        write_study(tmp_path / "scans", study, "one")
    words = [tmp_path / "scans", "--models-dir", trained[0] / "models", "--precision", "fp32",
             "--allow-synthetic"]  # fmt: skip
    one = tmp_path / "one.csv"
    assert run_script("predict.py", *words, "--out", one).returncode == 0
    command = [sys.executable, "predict.py", *words, "--out", tmp_path / "rows.csv"]
    command = [*map(str, command), "--cluster", "ray"]
    running = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "rows.csv").exists() or b"\n" not in (tmp_path / "rows.csv").read_bytes():
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.05)
    (node,) = cluster.worker_nodes - {cluster.head_node}
    node.kill_raylet()  # SIGKILL
    said = running.communicate(timeout=300)[1]
    assert running.returncode == 1 and "machine was lost" in said.splitlines()[-1], said
    rows = (tmp_path / "rows.csv").read_bytes()
    assert one.read_bytes().startswith(rows) and b"\n" in rows
    done = subprocess.run([*command, "--resume"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rows.csv").read_bytes() == one.read_bytes()


def test_what_a_call_on_a_node_raises_is_raised_here(cluster, tmp_path, monkeypatch):
    from mrnet.runtime.cluster import RayJobs

    def call(item):
        if item == 3:
            raise InputError("no three")
        return os.getcwd(), torch.get_num_threads()

    monkeypatch.chdir(tmp_path)
    found = []
    with pytest.raises(InputError, match="^no three$"):
        found.extend(RayJobs().map(call, range(5)))
    found = list(RayJobs().map(call, range(3)))
    assert found == [(item, (str(tmp_path), 1)) for item in range(3)]


def reproduce(work, models, *words):
    command = ["reproduce.py", "--data-dir", work / "data", "--models-dir", work / models,
               "--logs-dir", work / "logs", *words]  # fmt: skip
    command = [sys.executable, *map(str, command), "--", "--precision", "fp32", *QUICK]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)


def test_a_signal_reaches_the_nodes(cluster, tmp_path):
    """What runs gets a SIGTERM; what waits does not begin."""
    from mrnet.runtime.cluster import RayJobs

    code = "import os, signal, sys, time; from pathlib import Path\n"
    code += f"here = Path({str(tmp_path)!r}, f'began{{os.getpid()}}')\n"
    code += "def end(*args): here.write_text('saved'); sys.exit(143)\n"
    code += "signal.signal(signal.SIGTERM, end); here.touch(); time.sleep(60)\n"
    jobs = [Job(str(n), ("-c", code), tmp_path / f"{n}.txt") for n in range(3)]
    runner, stopped = RayJobs(), []

    def stop():
        while len(list(tmp_path.glob("began*"))) < 2:
            time.sleep(0.1)
        runner.stop(signal.SIGTERM)
        stopped.append(time.perf_counter())

    threading.Thread(target=stop).start()
    with pytest.raises(Interrupted):
        assert all(done.status == 143 for done in runner.run(jobs))
    assert time.perf_counter() - stopped[0] < 30
    assert [path.read_text() for path in tmp_path.glob("began*")] == ["saved", "saved"]


def test_what_no_machine_has_room_for_is_refused(cluster):
    from mrnet.runtime.cluster import RayJobs, room_of

    with pytest.raises(InputError, match="no machine of the Ray cluster has room for .* 2 cores"):
        RayJobs(threads=2)
    assert [room_of({"CPU": 8.0, "GPU": 2.0}, 1, n) for n in (0, 1, 3)] == [8, 2, 6]
    assert room_of({"GPU": 1.0}, 1, 5) == 0


@pytest.mark.slow
def test_networks_of_a_cluster_that_loses_a_node_are_those_of_one_machine(cluster, tmp_path):
    """Nine networks of the phantom; a node is killed in the middle. The weights are those of a
    serial run to the last bit, and what was finished is not trained again."""
    phantom = ("--exams", 40, "--valid", 10, "--size", 64, "--out", tmp_path / "data")
    assert run_process("data/phantom/prepare.py", *phantom).returncode == 0
    done = reproduce(tmp_path, "serial", "--jobs", "1", "--threads", "1")
    assert done.returncode == 0, done.stderr
    serial = contents(tmp_path / "serial")
    assert len(serial) == 9
    models, finished = tmp_path / "models", []

    def kill():
        while len(finished) < 3:
            time.sleep(0.1)
            finished[:] = [
                p.stem for p in models.glob("*.pt") if not p.with_suffix(".state").exists()
            ]
        (node,) = cluster.worker_nodes - {cluster.head_node}
        node.kill_raylet()  # SIGKILL

    thread = threading.Thread(target=kill)
    thread.start()
    done = reproduce(tmp_path, "models", "--cluster", "ray")
    thread.join()
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(models) == serial
    for name in finished:  # a job that was killed while it ended is asked again, and has finished
        text = (models / "output" / f"{name}-1.txt").read_text()
        assert text.count("\n$ python") - text.count("\nfinished before") == 1
    assert reproduce(tmp_path, "models", "--cluster", "ray").returncode == 0
    texts = [path.read_text() for path in (models / "output").iterdir()]
    assert len(texts) == 9
    assert all("\nfinished before" in text.split("\n$ python")[-1] for text in texts)
    assert contents(models) == serial and not list(models.glob("*.state"))


def test_no_cluster_and_no_ray_are_said(tmp_path, monkeypatch):
    write_exams(tmp_path / "data")
    command = ("reproduce.py", "--data-dir", tmp_path / "data", "--models-dir", tmp_path / "models")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", raise_connection_error)
    done = run_script(*command, "--cluster", "ray")
    assert_one_line_error(done, "no Ray cluster runs here", "ray start --head")
    monkeypatch.setitem(sys.modules, "ray", None)
    done = run_script(*command, "--cluster", "ray")
    assert_one_line_error(done, "pip install -r requirements-cluster.txt")


def raise_connection_error(**options):
    raise ConnectionError
