"""Independent commands side by side on one machine, each in a process and with a log of its own;
and calls of a function in several processes. On several machines: mrnet/runtime/cluster.py.
"""

import multiprocessing
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from joblib import Parallel, delayed
from tqdm import tqdm

from mrnet.errors import Interrupted, RunError
from mrnet.files import named_in_errors
from mrnet.runtime.cli import catch_signals, output_may_end
from mrnet.runtime.machine import available_memory, usable_cores

BAD_INPUT = 2  # exit status: trying again would not help


class Job(NamedTuple):
    """One run of one of the project's scripts."""

    name: str
    arguments: tuple  # of Python: the script and its arguments
    log: Path  # gets all that it prints
    work: float = 1.0  # how long it takes, in any unit: the longest begin first


class JobResult(NamedTuple):
    """A job that has ended."""

    job: Job
    status: int  # of its process
    seconds: float | None  # wall clock; None where it was lost with its machine
    cpu_seconds: float | None  # of all its threads: its time on one core with nothing beside it
    peak_memory: int  # bytes, resident

    @property
    def is_fine(self):
        """Whether there is nothing to try again."""
        return self.status == 0


class Jobs:
    """Runs jobs, several at a time.

    Args:
        at_once: how many.
        threads: of torch in each; 0 takes OMP_NUM_THREADS, or shares the machine's cores out.
        gpus: names of the GPUs, as CUDA_VISIBLE_DEVICES has them, to which the jobs are shared out
            evenly; empty where they take none.
    """

    def __init__(self, at_once, threads=0, gpus=()):
        self.at_once = at_once
        asked = os.environ.get("OMP_NUM_THREADS", "")
        self.threads = threads or (int(asked) if asked.isdecimal() else 0)
        self.threads = self.threads or max(1, usable_cores() // at_once)
        self.running, self.stopped_by = {}, 0  # {process: Job}; number of a signal
        # The GPU of each of those that run side by side; None for any.
        self.places = [gpus[k % len(gpus)] if gpus else None for k in range(at_once)]
        self.free = queue.SimpleQueue()
        for place in self.places:
            self.free.put(place)

    def run(self, jobs):
        """Run jobs, those with most work first; yields JobResult as each ends, and says so.

        A job that fails is tried once more, unless its input is bad. A signal is passed on to what
        runs, which stops after its step, and no other job starts.

        Raises:
            Interrupted: by a signal, when all that ran has ended.
        """
        jobs = sorted(jobs, key=lambda job: -job.work)  # stable
        before, began = catch_signals(self.stop), time.perf_counter()
        left = sum(job.work for job in jobs)
        bar = tqdm(total=len(jobs), unit="job", disable=not sys.stderr.isatty(), dynamic_ncols=True)
        try:
            count, done_work = 0, 0.0
            for done in self.results(jobs):
                names = [job.name for job in list(self.running.values())]  # threads change it
                with output_may_end():
                    bar.set_description(", ".join(names[: self.at_once][:4]))
                    bar.update()
                if done is None:
                    continue
                count, done_work = count + 1, done_work + done.job.work
                rest = (time.perf_counter() - began) * (left - done_work) / done_work
                what = "" if done.is_fine else f", FAILED with status {done.status}"
                took = "" if done.seconds is None else f"  {done.seconds:.0f} s"
                with output_may_end():
                    tqdm.write(
                        f"{count}/{len(jobs)}  {done.job.name}{what}{took}"
                        + (f", about {rest / 60:.0f} min left" if count < len(jobs) else "")
                    )
                yield done
        finally:
            # Whoever takes the results has failed. A second signal would stop a job at once.
            if self.running and not self.stopped_by:
                self.stop(signal.SIGTERM)
            for number, handler in before.items():
                signal.signal(number, handler)
            with output_may_end():
                bar.close()
        if self.stopped_by:
            raise Interrupted(self.stopped_by, "Start it again: what is finished is not repeated")

    def results(self, jobs):
        """Begin jobs in their order, and yield the JobResult of each, or None, as it ends."""
        parallel = Parallel(self.at_once, "threading", return_as="generator_unordered")
        return parallel(delayed(self.run_one)(job) for job in jobs)

    def stop(self, number, frame=None):
        self.stopped_by = number
        for process in list(self.running):
            send_signal(process, number)

    def run_one(self, job):
        """Run one job to its end: JobResult; None if a signal came before it began."""
        if self.stopped_by:
            return None
        return with_one_retry(partial(self.try_one, job), lambda: self.stopped_by)

    def try_one(self, job):
        """Run a job's process: JobResult."""
        began = time.perf_counter()
        gpu = self.free.get()
        process = start(job, self.threads, gpu)
        self.running[process] = job
        if self.stopped_by:  # between the question above and now
            send_signal(process, self.stopped_by)
        done = finish(job, process, began)
        del self.running[process]
        self.free.put(gpu)
        return done

    def map(self, function, items):
        """Call a function with each item, in as many processes as `at_once` says, which end with
        this one: yields (item, result) in the order of the items.

        Args:
            function: of a module, or a partial of one; as its items and results it can be pickled.
            items: iterator, read as far ahead as keeps the processes busy.

        Raises:
            RunError: a process was lost. What the function raises is raised here.
        """
        context = multiprocessing.get_context("spawn")  # a fork may not use CUDA
        gpus = context.SimpleQueue()
        for place in self.places:
            gpus.put(place)
        about = {"initializer": prepare_process, "initargs": (self.threads, gpus)}
        pool = ProcessPoolExecutor(self.at_once, context, **about)

        def submit(item):
            # Processes start here, and inherit the mask: Ctrl-C and a closed terminal end them
            # through their owner.
            if not hasattr(signal, "pthread_sigmask"):  # Windows
                return pool.submit(function, item)
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
            try:
                return pool.submit(function, item)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

        try:
            yield from in_order(submit, items, 2 * self.at_once)
        except BrokenProcessPool:
            raise RunError(
                "one of the processes ended before its work was done; if memory was short, give "
                "fewer --jobs"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def prepare_process(threads, gpus):
    """Prepare a process of `Jobs.map`.

    Args:
        threads: of torch.
        gpus: queue of the GPUs, one for each process: the only one that it may see; None for any.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where no mask could be inherited
    gpu = gpus.get()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.set_num_threads(threads)
    threading.Thread(target=end_with_owner, daemon=True).start()


def end_with_owner():
    """End this process when the one that started it has ended, even if it was killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


def in_order(submit, items, most):
    """Yields (item, result) in the order of the items, each as soon as it and those before it are
    there.

    Args:
        submit: function of an item: Future of its result.
        most: results that are waited for at a time.
    """
    waiting = deque()
    for item in items:
        waiting.append((item, submit(item)))
        while waiting and (len(waiting) == most or waiting[0][1].done()):
            item, future = waiting.popleft()
            yield item, future.result()
    for item, future in waiting:
        yield item, future.result()


def most_at_once(count, bytes_each):
    """How many of `count` networks of some bytes to train side by side on a CPU: one a core as far
    as memory allows."""
    return int(max(1, min(usable_cores(), available_memory() // bytes_each, count)))


def with_one_retry(attempt, is_stopped):
    """The JobResult of a job that is tried once more if it fails, unless its input is bad: the
    status of the second time, and the time of both.

    Args:
        attempt: function that runs the job's process: JobResult.
        is_stopped: function that tells whether jobs shall stop.
    """
    done = attempt()
    if done.is_fine or done.status == BAD_INPUT or is_stopped():
        return done
    again = attempt()
    return again._replace(
        seconds=done.seconds + again.seconds,
        cpu_seconds=None if again.cpu_seconds is None else done.cpu_seconds + again.cpu_seconds,
        peak_memory=max(done.peak_memory, again.peak_memory),
    )


# --- one process ----------------------------------------------------------------------------------


def start(job, threads, gpu=None):
    """Start a job's process, which ends with this one, even if this one is killed: Popen.

    Args:
        threads: of torch.
        gpu: the only one that it may see, as CUDA_VISIBLE_DEVICES has it; None for any.
    """
    job.log.parent.mkdir(parents=True, exist_ok=True)
    # Linux: the kernel kills what has lost its parent. The lock of its model is free then, and the
    # next run goes on from its state.
    prefix = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
    variables = {"OMP_NUM_THREADS": str(threads)}
    variables |= {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    with named_in_errors(job.log), open(job.log, "ab") as log:
        log.write(f"\n$ python {shlex.join(job.arguments)}\n".encode())
        log.flush()
        return subprocess.Popen(
            [*prefix, sys.executable, *job.arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | variables,
            start_new_session=True,  # Ctrl-C reaches it through its owner, once
        )


def send_signal(process, number):
    """Send a signal to a job's process, which may have ended. Popen.send_signal would then reap it,
    and `finish` find no child."""
    if process.returncode is None:
        with suppress(OSError):
            os.kill(process.pid, number)


def finish(job, process, began, is_waited_for=True):
    """Wait for the end of a job's process: JobResult; or None where it has not ended and is not
    waited for.

    Args:
        began: time.perf_counter() at its start.
    """
    if not hasattr(os, "wait4"):  # Windows, where its time and memory are not known
        if process.poll() is None and not is_waited_for:
            return None
        return JobResult(job, process.wait(), time.perf_counter() - began, None, 0)
    pid, status, usage = os.wait4(process.pid, 0 if is_waited_for else os.WNOHANG)
    if pid == 0:
        return None
    process.returncode = os.waitstatus_to_exitcode(status)
    scale = 1 if sys.platform == "darwin" else 1024  # getrusage(2): KiB on Linux
    return JobResult(
        job,
        process.returncode,
        time.perf_counter() - began,
        usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss * scale,
    )


def failures(failed, jobs):
    """One line about the jobs that failed: how many, why the last did, and what to do."""
    log = failed[-1].log
    if log.is_file():
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        why = f"'{lines[-1] if lines else ''}' ({log})"
    else:  # on the disk of another machine
        why = f"a log that is not here ({log}: all machines must share --models-dir)"
    return (
        f"{len(failed)} of {len(jobs)} networks failed, the last, {failed[-1].name}, with {why}; "
        "correct that and start again, the others are not repeated"
    )
