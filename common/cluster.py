"""The jobs of common/jobs.py on the nodes of a Ray cluster: `--cluster ray`, docs/cluster.md.

Ray shares out cores and GPUs, and runs a lost node's jobs again elsewhere; each job resumes from
what it finds in its --models-dir. That folder is shared by all nodes, or with `fetch` each job has
one of its own, to which its files are sent and from which they come back.
"""

import os
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from common.devices import pick_device
from common.errors import InputError
from common.files import write_bytes
from common.jobs import BAD_INPUT, ROOT, Done, Jobs, finish, start

TRIES = 5  # on other nodes, where one is lost
LOOK = 0.5  # s between looks at what has ended
LOG = ".output"  # name of a job's log among its files


class RayJobs(Jobs):
    """Runs jobs on a Ray cluster: as Jobs does, but for where.

    Args:
        threads: cores and torch threads of each job.
        gpus: of each job, a part of one or 0.
        fetch: bring each job's files to its node and back, where nodes share no folder.

    Raises:
        InputError: no Ray, or no cluster.
    """

    def __init__(self, threads=1, gpus=0.0, fetch=False):
        super().__init__(at_once=1, threads=threads)
        self.ray, self.fetch, self.running = connect(), fetch, {}  # {reference: Job}
        cluster = self.ray.cluster_resources()
        gpus = gpus if cluster.get("GPU") else 0.0
        room = [cluster["CPU"] // threads] + ([cluster["GPU"] // gpus] if gpus else [])
        self.at_once = int(min(room))
        if self.at_once < 1:
            raise InputError(f"no node of the Ray cluster has {threads} cores; give fewer")
        options = {"num_cpus": threads, "num_gpus": gpus, "max_retries": TRIES}
        self.remote = self.ray.remote(**options)(run_on_node)

    def results(self, jobs):
        """Hand all jobs to Ray, and yield the Done of each, or None, as it ends."""
        for job in jobs:
            sent = read_files(models_dir_of(job), job.files) if self.fetch else None
            self.running[self.remote.remote(job, self.threads, os.getcwd(), sent)] = job
        while self.running:
            ended, _ = self.ray.wait(list(self.running), timeout=LOOK)
            for reference in ended:
                job = self.running[reference]
                try:
                    done, files = self.ray.get(reference)
                except self.ray.exceptions.RayError as error:  # lost too often, or cancelled
                    note(job, f"Ray: {type(error).__name__}")
                    done, files = Done(job, 1, 0.0, 0.0, 0), {}
                if LOG in files:
                    note(job, files.pop(LOG).decode(errors="replace").rstrip())
                for name, content in files.items():
                    write_bytes(models_dir_of(job) / name, content)
                del self.running[reference]
                yield None if self.stopped_by and done.status else done

    def stop(self, number, frame=None):
        self.stopped_by = number
        for reference in list(self.running):
            with suppress(self.ray.exceptions.RayError):
                self.ray.cancel(reference, force=False)


class Machines(NamedTuple):
    """Where jobs run: the values of `cli.add_jobs_arguments`."""

    jobs: int | None
    threads: int | None
    jobs_per_gpu: int
    cluster: str | None
    fetch: bool

    def pick(self, device, at_once):
        """Jobs, of this machine or of a cluster.

        Args:
            device: "auto", "cpu" or "cuda".
            at_once: jobs on this machine's CPU where their number was not given.

        Raises:
            InputError: as RayJobs, or --fetch without a cluster.
        """
        if self.cluster:
            share = 0.0 if device == "cpu" else 1 / self.jobs_per_gpu
            return RayJobs(self.threads or 1, share, self.fetch)
        if self.fetch:
            raise InputError("--fetch is for --cluster; leave it out")
        if pick_device(device).type == "cpu":
            return Jobs(self.jobs or at_once, self.threads or 0)
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or range(torch.cuda.device_count())
        gpus = gpus.split(",") if isinstance(gpus, str) else list(map(str, gpus))
        return Jobs(self.jobs or len(gpus) * self.jobs_per_gpu, self.threads or 0, gpus)


def connect():
    """The module ray, connected to the cluster of this machine or of RAY_ADDRESS."""
    try:
        import ray
    except ImportError:
        raise InputError(
            "--cluster ray needs Ray: pip install -r requirements-cluster.txt"
        ) from None
    if not ray.is_initialized():
        try:
            ray.init(
                address="auto",
                log_to_driver=False,
                logging_level="ERROR",
                runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},  # the same on every node
            )
        except ConnectionError:
            raise InputError(
                "no Ray cluster runs here: `ray start --head` on this machine, or RAY_ADDRESS; "
                "see docs/cluster.md"
            ) from None
    return ray


def note(job, text):
    """Add a line to a job's log."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "a", encoding="utf-8") as log:
        log.write(f"{text}\n")


def models_dir_of(job):
    """The value of a job's --models-dir."""
    return Path(job.arguments[job.arguments.index("--models-dir") + 1])


def read_files(folder, pattern="*"):
    """{name: bytes} of the files in a folder, but the hidden ones."""
    paths = [path for path in folder.glob(pattern) if path.is_file() and path.name[0] != "."]
    return {path.name: path.read_bytes() for path in paths}


def run_on_node(job, threads, folder, sent=None):
    """Run a job, on a node of the cluster: Done, and {name: bytes} of what it wrote.

    Args:
        folder: that the job's paths are relative to.
        sent: {name: bytes} that it finds in a --models-dir of its own; None where that is shared.
    """
    os.chdir(folder)
    if sent is None:
        return run_here(job, threads), {}
    with tempfile.TemporaryDirectory(prefix="mrnet-job-") as folder:
        for name, content in sent.items():
            write_bytes(Path(folder) / name, content)
        words = list(job.arguments)
        words[words.index("--models-dir") + 1] = folder
        if "--logs-dir" in words:
            words[words.index("--logs-dir") + 1] = str(Path(folder) / ".logs")
        here = job._replace(arguments=tuple(words), log=Path(folder) / LOG)
        done = run_here(here, threads)
        files = read_files(Path(folder)) | {LOG: here.log.read_bytes()}
    return done._replace(job=job), files


def run_here(job, threads):
    """Run a job's process, twice where it fails and its input is not bad: Done.

    Ray's way to stop a task is an interrupt; the process then gets a SIGTERM and saves its state.
    """
    job.log.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(2):
        began = time.perf_counter()
        with open(job.log, "ab") as log:
            process = start(job.arguments, log, threads)
            try:
                done = finish(job, process, began)
            except KeyboardInterrupt:
                process.send_signal(signal.SIGTERM)
                return finish(job, process, began)
        if done.status in (0, BAD_INPUT):
            break
    return done
