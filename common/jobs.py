"""Independent commands side by side on one machine, each in a process and with a log of its own."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from joblib import Parallel, delayed

from common.cli import catch_signals
from common.errors import Interrupted

ROOT = Path(__file__).parent.parent


class Job(NamedTuple):
    """One run of one of the project's scripts."""

    name: str
    arguments: tuple  # of Python: the script and its arguments
    log: Path  # gets all that it prints


class Done(NamedTuple):
    """A job that has ended."""

    job: Job
    status: int  # of its process
    seconds: float  # wall clock
    cpu_seconds: float  # of all its threads: what it would take on one core with nothing beside it
    peak_memory: int  # bytes, resident


class Jobs:
    """Runs jobs, several at a time.

    Args:
        at_once: how many.
        threads: of torch in each; 0 shares the machine's cores out.
    """

    def __init__(self, at_once, threads=0):
        self.at_once = at_once
        self.threads = threads or max(1, (os.cpu_count() or 1) // at_once)
        self.running, self.stopped_by = [], 0

    def run(self, jobs):
        """Run jobs in their order; yields Done as each ends.

        A signal is passed on to what runs, which stops after its step with status 128 and more,
        and no other job starts.

        Raises:
            Interrupted: by a signal, when all that ran has ended.
        """
        before = catch_signals(self.stop)
        try:
            parallel = Parallel(self.at_once, "threading", return_as="generator_unordered")
            for done in parallel(delayed(self.run_one)(job) for job in jobs):
                if done is not None:
                    yield done
        finally:
            for process in list(self.running):  # whoever takes the results has failed
                process.terminate()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.stopped_by:
            raise Interrupted(self.stopped_by, "Start it again: what is finished is not repeated")

    def stop(self, number, frame):
        self.stopped_by = number
        for process in list(self.running):
            process.send_signal(number)

    def run_one(self, job):
        """Run one job to its end: Done; None if a signal came before it began."""
        if self.stopped_by:
            return None
        job.log.parent.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        with open(job.log, "ab") as log:
            log.write(f"\n$ python {shlex.join(job.arguments)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                [sys.executable, *job.arguments],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(self.threads)},
                start_new_session=True,  # Ctrl-C reaches it through `stop`, once
            )
            self.running.append(process)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            self.running.remove(process)
        scale = 1 if sys.platform == "darwin" else 1024  # getrusage(2): KiB on Linux
        return Done(
            job,
            process.returncode,
            time.perf_counter() - began,
            usage.ru_utime + usage.ru_stime,
            usage.ru_maxrss * scale,
        )
