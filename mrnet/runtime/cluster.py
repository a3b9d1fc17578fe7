"""The jobs of jobs.py on the nodes of a Ray cluster: `--cluster ray`, docs/cluster.md.

Ray shares out cores and GPUs, and runs a lost node's jobs again elsewhere; each job resumes from
what it finds in its --models-dir, a folder that all nodes share.
"""

import math
import os
import queue
import signal
import time
from functools import partial
from typing import NamedTuple

import torch

from mrnet.errors import InputError, RunError, one_line
from mrnet.files import ROOT
from mrnet.runtime.devices import pick_device
from mrnet.runtime.jobs import (
    JobResult,
    Jobs,
    finish,
    in_order,
    most_at_once,
    send_signal,
    start,
    with_one_retry,
)

TRIES = 5  # on other nodes, where one is lost
POLL_SECONDS = 0.5  # between queries of the jobs that have ended, and of the flag
NEVER_ENDED = -1  # status of a job that was lost with its machine


class RayJobs(Jobs):
    """Runs jobs on a Ray cluster: as Jobs does, but for where.

    Args:
        threads: cores and torch threads of each job.
        jobs_per_gpu: side by side on each GPU; 0 for none on GPUs.

    Raises:
        InputError: no Ray, or no cluster.
    """

    def __init__(self, threads=1, jobs_per_gpu=0):
        super().__init__(at_once=1, threads=threads)
        self.ray, self.running = connect(), {}  # {reference: Job}
        has_gpus = any(node.get("GPU") for node in self.alive())
        self.jobs_per_gpu = jobs_per_gpu if has_gpus else 0
        self.at_once = self.room()
        if self.at_once < 1:
            raise InputError(
                f"no machine of the Ray cluster has room for a network of {threads} cores; give "
                "fewer --threads, or start more machines"
            )
        # Ray counts in parts of 1/10000: rounded down, so that all fit.
        self.share = math.floor(10_000 / self.jobs_per_gpu) / 10_000 if self.jobs_per_gpu else 0
        self.flag = self.ray.remote(num_cpus=0, max_restarts=-1)(StopFlag).remote()

    def alive(self):
        """Resources of the nodes that are there now: list of {name: float}."""
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]

    def room(self):
        """How many jobs these nodes have room for."""
        return sum(room_of(node, self.threads, self.jobs_per_gpu) for node in self.alive())

    def results(self, jobs):
        """Hand all jobs to Ray, and yield the JobResult of each, or None, as it ends."""
        options = {"num_cpus": self.threads, "num_gpus": self.share, "max_retries": TRIES}
        run = self.ray.remote(**options)(run_on_node).remote
        self.running = {run(job, self.threads, os.getcwd(), self.flag): job for job in jobs}
        while self.running:
            ended, _ = self.ray.wait(list(self.running), timeout=POLL_SECONDS)
            for reference in ended:
                job = self.running.pop(reference)
                try:
                    yield self.ray.get(reference)
                except self.ray.exceptions.RayError as error:  # lost too often, or no such folder
                    note(job, f"Ray: {one_line(error.__cause__ or error)}")
                    yield JobResult(job, NEVER_ENDED, None, None, 0)

    def map(self, function, items):
        """As Jobs.map, in actors that stay on their nodes."""
        actor = self.ray.remote(num_cpus=self.threads, num_gpus=self.share)(Caller)
        actors = [actor.remote(function, self.threads, os.getcwd()) for _ in range(self.at_once)]
        free = queue.SimpleQueue()
        for one in actors:
            free.put(one)

        def submit(item):
            one = free.get()
            future = one.call.remote(item).future()
            future.add_done_callback(lambda _: free.put(one))
            return future

        try:
            yield from in_order(submit, items, 2 * self.at_once)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self.ray.exceptions.RayError as error:
            raise RunError(f"a process or machine was lost (Ray: {one_line(error)})") from None
        finally:
            for one in actors:
                self.ray.kill(one)

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


class Caller:
    """An actor of Ray that calls a function.

    Args:
        threads: of torch.
        folder: that paths are relative to.
    """

    def __init__(self, function, threads, folder):
        os.chdir(folder)
        torch.set_num_threads(threads)
        self.function = function

    def call(self, item):
        return self.function(item)


class Machines(NamedTuple):
    """Where jobs run: the values of `cli.add_parallel_arguments`."""

    jobs: int | None
    threads: int | None
    jobs_per_gpu: int
    cluster: str | None

    @classmethod
    def of(cls, values):
        """Machines of {name: value} as argparse has them, others among them."""
        return cls(*(values[name] for name in cls._fields))

    def pick(self, device, count, bytes_each):
        """Jobs, of this machine or of a cluster.

        Args:
            device: "auto", "cpu" or "cuda".
            count: jobs that there are.
            bytes_each: memory that each takes on a CPU.

        Raises:
            InputError: as RayJobs, or --jobs with a cluster.
        """
        if self.cluster and self.jobs:
            raise InputError("--jobs: not with --cluster, which takes as many as it has room for")
        if self.cluster:
            per_gpu = 0 if device == "cpu" else self.jobs_per_gpu
            return RayJobs(self.threads or 1, per_gpu)
        if pick_device(device).type == "cpu":
            at_once = self.jobs or most_at_once(count, bytes_each)
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


def run_on_node(job, threads, folder, flag):
    """Run a job, on a node of the cluster: JobResult, or None if it did not begin.

    Args:
        folder: that the job's paths are relative to.
        flag: actor of StopFlag.
    """
    os.chdir(folder)
    return run_here(job, threads, flag)


def run_here(job, threads, flag):
    """Run a job to its end: JobResult, or None if the flag was set before."""
    if is_set(flag):
        return None
    return with_one_retry(partial(try_here, job, threads, flag), partial(is_set, flag))


def try_here(job, threads, flag):
    """Run a job's process: JobResult. When the flag is set, it gets SIGTERM and saves its state."""
    began, asked = time.perf_counter(), False
    process = start(job, threads)
    while (done := finish(job, process, began, is_waited_for=False)) is None:
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
