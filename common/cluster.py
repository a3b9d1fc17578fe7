"""The jobs of common/jobs.py on the nodes of a Ray cluster: `--cluster ray`, docs/cluster.md.

Ray shares out cores and GPUs, and runs a lost node's jobs again elsewhere; each job resumes from
what it finds in its --models-dir. That folder is shared by all nodes, or with `fetch` each job has
one of its own, to which its files are sent and from which they come back.
"""

import math
import os
import signal
import tempfile
import time
from collections import deque
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from common.devices import pick_device
from common.errors import InputError, one_line
from common.files import write_bytes
from common.jobs import (
    ROOT,
    Done,
    Jobs,
    bytes_of_a_job,
    finish,
    most_at_once,
    send_signal,
    start,
    with_one_retry,
)

TRIES = 5  # on other nodes, where one is lost
POLL_SECONDS = 0.5  # between queries of the jobs that have ended, and of the flag
NEVER_ENDED = -1  # status of a job that was lost with its machine
LOG = ".output"  # name of a job's log among its files


class RayJobs(Jobs):
    """Runs jobs on a Ray cluster: as Jobs does, but for where.

    Args:
        threads: cores and torch threads of each job.
        jobs_per_gpu: side by side on each GPU; 0 for none on GPUs.
        fetch: bring each job's files to its node and back, where nodes share no folder.

    Raises:
        InputError: no Ray, or no cluster.
    """

    def __init__(self, threads=1, jobs_per_gpu=0, fetch=False):
        super().__init__(at_once=1, threads=threads)
        self.ray, self.fetch = connect(), fetch
        self.running, self.sent = {}, {}  # {reference: Job}, {reference: names of its files}
        has_gpus = any(node.get("GPU") for node in self.alive())
        self.jobs_per_gpu = jobs_per_gpu if has_gpus else 0
        self.at_once = self.room()
        if self.at_once < 1:
            raise InputError(
                f"no machine of the Ray cluster has room for a network of {threads} cores; give "
                "fewer --threads, or start more machines"
            )
        # Ray counts in parts of 1/10000: rounded down, so that all fit.
        share = math.floor(10_000 / self.jobs_per_gpu) / 10_000 if self.jobs_per_gpu else 0
        options = {"num_cpus": threads, "num_gpus": share, "max_retries": TRIES}
        self.remote = self.ray.remote(**options)(run_on_node)
        self.flag = self.ray.remote(num_cpus=0, max_restarts=-1)(StopFlag).remote()

    def alive(self):
        """Resources of the nodes that are there now: list of {name: float}."""
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]

    def room(self):
        """How many jobs these nodes have room for."""
        return sum(room_of(node, self.threads, self.jobs_per_gpu) for node in self.alive())

    def results(self, jobs):
        """Hand jobs to Ray, and yield the Done of each, or None, as it ends. With `fetch` some of
        those that wait are kept back: Ray holds the files of all that it has."""
        waiting = deque(jobs)
        while waiting or self.running:
            most = max(1, 2 * self.room()) if self.fetch else math.inf
            while waiting and len(self.running) < most:
                self.submit(waiting.popleft())
            ended, _ = self.ray.wait(list(self.running), timeout=POLL_SECONDS)
            for reference in ended:
                job, sent = self.running[reference], self.sent.pop(reference)
                try:
                    done, files = self.ray.get(reference)
                    take_back(job, sent, files)
                except self.ray.exceptions.RayError as error:  # lost too often, or no such folder
                    note(job, f"Ray: {one_line(error.__cause__ or error)}")
                    done = Done(job, NEVER_ENDED, None, None, 0)
                del self.running[reference]
                yield done
            if self.stopped_by:
                waiting.clear()

    def submit(self, job):
        """Hand a job to Ray, with `fetch` and its files as they are now."""
        sent = read_files(models_dir_of(job), job.files) if self.fetch else None
        reference = self.remote.remote(job, self.threads, os.getcwd(), self.flag, sent)
        self.running[reference], self.sent[reference] = job, set(sent or ())

    def stop(self, number, frame=None):
        self.stopped_by = number
        self.flag.set.remote()


def room_of(node, threads, jobs_per_gpu):
    """How many jobs a node has room for; `node` as Ray has its resources."""
    room = int(node.get("CPU", 0) // threads)
    return min(room, int(node.get("GPU", 0) * jobs_per_gpu)) if jobs_per_gpu else room


class StopFlag:
    """An actor of Ray that all nodes ask whether jobs shall stop."""

    def __init__(self):
        self.stopped = False

    def set(self):
        self.stopped = True

    def is_set(self):
        return self.stopped


class Machines(NamedTuple):
    """Where jobs run: the values of `cli.add_parallel_arguments` and of --fetch."""

    jobs: int | None
    threads: int | None
    jobs_per_gpu: int
    cluster: str | None
    fetch: bool = False

    @classmethod
    def of(cls, values):
        """Machines of {name: value} as argparse has them, others among them."""
        return cls(**{name: values[name] for name in cls._fields if name in values})

    def pick(self, device, count, bytes_each=None):
        """Jobs, of this machine or of a cluster.

        Args:
            device: "auto", "cpu" or "cuda".
            count: jobs that there are.
            bytes_each: memory that each takes on a CPU; by default a training of the article's.

        Raises:
            InputError: as RayJobs, --fetch without a cluster, or --jobs with one.
        """
        if self.cluster and self.jobs:
            raise InputError("--jobs: not with --cluster, which takes as many as it has room for")
        if self.cluster:
            per_gpu = 0 if device == "cpu" else self.jobs_per_gpu
            return RayJobs(self.threads or 1, per_gpu, self.fetch)
        if self.fetch:
            raise InputError("--fetch is for --cluster; leave it out")
        if pick_device(device).type == "cpu":
            at_once = self.jobs or most_at_once(count, bytes_each or bytes_of_a_job())
            return Jobs(at_once, self.threads or 0)
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = named.split(",") if named else list(map(str, range(torch.cuda.device_count())))
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


def read_files(folder, names):
    """{name: bytes} of the files that are there."""
    paths = {name: folder / name for name in names}
    return {name: path.read_bytes() for name, path in paths.items() if path.is_file()}


def take_back(job, sent, files):
    """Put a job's files into its --models-dir.

    Args:
        sent: names of those that it began with; what it has removed is removed.
        files: {name: bytes} of those that it wrote, and its LOG; {} if it never began.
    """
    if LOG not in files:
        return
    note(job, files.pop(LOG).decode(errors="replace").rstrip())
    folder = models_dir_of(job)
    for name, content in files.items():
        write_bytes(folder / name, content)
    for name in sent - files.keys():
        (folder / name).unlink(missing_ok=True)


def run_on_node(job, threads, folder, flag, sent=None):
    """Run a job, on a node of the cluster: Done, or None if it did not begin; and the files of
    `take_back`.

    Args:
        folder: that the job's paths are relative to.
        flag: actor of StopFlag.
        sent: {name: bytes} that it finds in a --models-dir of its own; None where that is shared.
    """
    os.chdir(folder)
    if sent is None:
        return run_here(job, threads, flag), {}
    with tempfile.TemporaryDirectory(prefix="mrnet-job-") as own:
        for name, content in sent.items():
            write_bytes(Path(own) / name, content)
        words = with_own_folder(job.arguments, own, sent)
        here = job._replace(arguments=words, log=Path(own) / LOG)
        done = run_here(here, threads, flag)
        if done is None:
            return None, {}
        return done._replace(job=job), read_files(Path(own), (*job.files, LOG))


def with_own_folder(arguments, own, names):
    """A job's arguments with `own` as --models-dir, its logs and a recipe of its files within. What
    else lies in the shared folder, such as the data, stays there.

    Args:
        names: of its files, relative to the folder.
    """
    words = list(arguments)
    places = {word: place + 1 for place, word in enumerate(words)}  # of the options' values
    shared, words[places["--models-dir"]] = words[places["--models-dir"]], own
    if "--logs-dir" in places:
        words[places["--logs-dir"]] = f"{own}/logs"
    if "--recipe" in places:
        recipe = words[places["--recipe"]].removeprefix(f"{shared}/")
        if recipe in names:
            words[places["--recipe"]] = f"{own}/{recipe}"
    return tuple(words)


def run_here(job, threads, flag):
    """Run a job to its end: Done, or None if the flag was set before."""
    if is_set(flag):
        return None
    return with_one_retry(partial(try_here, job, threads, flag), partial(is_set, flag))


def try_here(job, threads, flag):
    """Run a job's process: Done. When the flag is set, it gets a SIGTERM and saves its state."""
    began, asked = time.perf_counter(), False
    process = start(job, threads)
    while (done := finish(job, process, began, os.WNOHANG)) is None:
        time.sleep(POLL_SECONDS)
        if not asked and is_set(flag):
            send_signal(process, signal.SIGTERM)
            asked = True
    return done


def is_set(flag):
    """Whether a StopFlag is set; one that was lost with its node is not."""
    import ray

    try:
        return ray.get(flag.is_set.remote())
    except ray.exceptions.RayError:
        return False
