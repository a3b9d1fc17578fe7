"""What every command line shares: arguments, the start-up block, progress, signals, exit status."""

import argparse
import errno
import math
import os
import select
import shlex
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from mrnet.errors import InputError, Interrupted, RunError, is_out_of_memory, printable
from mrnet.runtime.provenance import git_sha, versions

PRECISIONS = ("auto", "fp32", "bf16")

# --- arguments ------------------------------------------------------------------------------------


def make_parser(docstring):
    """A parser that is described by a script's docstring: its first line above the arguments, the
    rest, with example commands, below."""
    description, _, epilog = docstring.partition("\n\n")
    return Parser(
        prog=script_name(), description=description, epilog=epilog, formatter_class=HelpFormatter
    )


class Parser(argparse.ArgumentParser):
    """argparse's; while it reads a recipe, `source`, a fault is the recipe's."""

    source = None

    def error(self, message):
        if self.source:
            raise InputError(f"recipe {self.source}: {message}; correct it")
        self.exit(2, f"{self.prog}: error: {message}\n")  # argparse prints its usage, too


def script_name():
    """How the running script is called: "train.py" or "python -m tools.check"."""
    path = Path(sys.argv[0])
    return f"python -m tools.{path.stem}" if path.parent.name == "tools" else path.name


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults are shown where there are any, the docstring's lines are kept."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def add_machine_arguments(parser):
    """--device and --precision, the same for every script that runs a network."""
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
        help="auto: a GPU if there is one, NVIDIA's (cuda) or Apple's (mps)",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="auto takes bf16 where the device has it: about twice as fast, and AUCs differ by no "
        "more than those of two seeds",
    )


def add_parallel_arguments(parser, what, by_default):
    """--jobs, --threads, --jobs-per-gpu, --cluster: for what runs in several processes.

    Args:
        what: they do, in the plural.
        by_default: how many without --jobs.
    """
    add = parser.add_argument_group("side by side").add_argument
    jobs = f"{what} side by side; by default {by_default}; not with --cluster"
    add("--jobs", type=process_count, help=jobs)
    threads = "of each process; by default OMP_NUM_THREADS, or the cores are shared out; on a "
    threads += "cluster one"
    add("--threads", type=process_count, help=threads)
    each = f"{what} side by side on each GPU"
    add("--jobs-per-gpu", type=process_count, default=1, metavar="N", help=each)
    cluster = f"on the nodes of a Ray cluster, as many {what} as it has room for "
    cluster += "(docs/cluster.md); pip install -r requirements-cluster.txt"
    add("--cluster", choices=("ray",), help=cluster)


def add_jobs_arguments(parser):
    """--jobs, --threads, --jobs-per-gpu, --cluster: for what trains many networks."""
    by_default = (
        "one a core on a CPU, as far as memory allows, and on GPUs what --jobs-per-gpu says"
    )
    add_parallel_arguments(parser, "networks", by_default)


def parse_number(text, kind, is_valid, expected):
    """An argument's text as a number. Raises ArgumentTypeError with what is expected."""
    try:
        value = kind(text) if text.isascii() else None
    except ValueError:
        value = None
    if value is None or not is_valid(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return value


def positive_int(text):
    expected = "a whole number of at least 1 and below 2^31"
    return parse_number(text, int, lambda v: 1 <= v < 2**31, expected)


def process_count(text):
    """Value of an option: how many processes or threads."""
    return parse_number(text, int, lambda v: 1 <= v <= 1000, "a whole number from 1 to 1000")


def count(text):
    return parse_number(text, int, lambda v: 0 <= v < 2**31, "a whole number from 0 to below 2^31")


def part(text):
    return parse_number(text, float, lambda v: 0 < v <= 1, "a number above 0 and at most 1")


def positive_float(text):
    return parse_number(text, float, lambda v: 0 < v < math.inf, "a number above 0")


def nonnegative_float(text):
    return parse_number(text, float, lambda v: 0 <= v < math.inf, "a number of at least 0")


def probability(text):
    return parse_number(text, float, lambda v: 0 <= v < 1, "a number from 0 to below 1")


# --- what is printed ------------------------------------------------------------------------------


def print_start_up(arguments, device, precision):
    """Print the start-up block: device, versions, commit, arguments.

    Args:
        arguments: {name: value} as argparse has them.

    Returns:
        dict of plain values: "git", the commit as `git_sha`, "versions" and "machine".
    """
    from mrnet.runtime.devices import device_name  # with torch, which importers do without

    about = {"git": git_sha(), "versions": versions(), "machine": device_name(device)}
    print(f"device     {device} ({about['machine']}), {precision}")
    print("versions   " + " ".join(f"{name} {n}" for name, n in about["versions"].items()))
    print(f"commit     {about['git']}")
    plain = {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in arguments.items()}
    print("arguments  " + " ".join(f"{k}={v}" for k, v in sorted(plain.items())))
    return about


def progress(items, what, total=None):
    """A progress bar on a terminal, nothing in a file."""
    return tqdm(
        items,
        desc=what,
        total=total,
        leave=False,
        disable=not sys.stderr.isatty(),
        unit="exam",
        dynamic_ncols=True,
    )


@contextmanager
def output_may_end():
    """Within it no print fails, so that what was computed is saved all the same.

    Where nobody reads stdout or stderr any more, because its terminal was closed or Ctrl-C has
    ended the `tee` behind it too, the null device takes its place: later prints, progress bars and
    the interpreter's last flush cannot fail either.
    """
    try:
        yield
    except OSError:  # of a full disk, say: no line
        drop_closed_output()
    except (ValueError, RuntimeError) as error:
        # No line of a signal's handler that prints within another print.
        if not any(words in str(error) for words in ("closed file", "reentrant call")):
            raise


def drop_closed_output():
    """Put the null device in the place of stdout and of stderr where nobody reads it any more."""
    for number in (1, 2):
        if not has_reader(number):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


def open_closed_output():
    """Put the null device in the place of stdout and of stderr if they were closed from the start,
    as by `>&-`; for the processes that are started from this one, too."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, "w"))


def has_reader(number):
    """Whether a file descriptor is no pipe or terminal whose other end was closed."""
    if not hasattr(select, "poll"):  # on Windows nothing tells before a write fails
        return True
    poll = select.poll()
    poll.register(number, select.POLLOUT)
    ended = select.POLLERR | select.POLLHUP | select.POLLNVAL
    return not any(event & ended for _, event in poll.poll(0))


# --- signals --------------------------------------------------------------------------------------


@contextmanager
def stop_after_step():
    """Within it the first SIGINT, SIGTERM or SIGHUP requests a stop after the current step; a
    second one stops at once. Signals that were ignored from the start, as by nohup, stay ignored.

    Yields:
        list that is empty until a stop is requested, then holds the signal's number.
    """
    stop_requested = []

    def request(number, frame):
        stop_requested.append(number)
        restore()
        with output_may_end():
            print(
                "\nstopping after this step; repeat the signal (Ctrl-C) to stop immediately",
                file=sys.stderr,
            )

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    before = catch_signals(request)
    try:
        yield stop_requested
    finally:
        restore()


@contextmanager
def unwind_on_signals():
    """Within it a SIGTERM or SIGHUP ends what runs as Ctrl-C does, and not at once, so that
    temporary folders go with it: they may hold patients' exams. Repeated ones change nothing.

    Raises:
        Interrupted: by one of them, with the message of the KeyboardInterrupt that it became.
    """
    stopped_by = []

    def end(number, frame):
        if not stopped_by:
            stopped_by.append(number)
            raise KeyboardInterrupt

    before = catch_signals(end, ("SIGTERM", "SIGHUP"))
    try:
        yield
    except KeyboardInterrupt as error:
        if stopped_by:
            raise Interrupted(stopped_by[0], str(error)) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def catch_signals(handler, names=("SIGINT", "SIGTERM", "SIGHUP")):
    """Install `handler` for signals; returns {number: previous handler}."""
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]  # not on Windows
    numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in numbers}


def resume_with():
    """The message with the command line that resumes this run."""
    words = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
    return "Resume with: " + shlex.join(["python", Path(sys.argv[0]).name, *words, "--resume"])


# --- exit status ----------------------------------------------------------------------------------

FILE_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO, errno.EISDIR,
               errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)  # fmt: skip


def exit_with_status(main):
    """Call `main` and exit with the project's status: one line on stderr instead of a traceback.

    0 done; 1 the run failed for a reason outside the code; 2 bad input; 128 + n stopped by signal n
    (130 Ctrl-C). A defect of the code keeps its traceback.
    """
    open_closed_output()
    try:
        main()
    except (Exception, KeyboardInterrupt) as error:
        outcome = status_of(error)
        if outcome is None:
            raise
        status, message = outcome
        lines = map(printable, message.split("\n"))  # a file's name may hold anything
        with output_may_end():
            print(f"{script_name()}: " + "\n".join(lines), file=sys.stderr)
            sys.stdout.flush()  # at its end the interpreter would replace the status by its own
        sys.exit(status)
    sys.exit(0)


def status_of(error):
    """(exit status, one line) of an exception that has a cause outside the code, else None."""
    match error:
        case InputError():
            return 2, f"error: {error}"
        case RunError():
            return 1, f"failed: {error}"
        case Interrupted():
            return 128 + error.number, f"interrupted. {error}".strip()
        case KeyboardInterrupt():
            return 130, f"interrupted. {error}".strip()
        case RuntimeError() if type(error).__name__ == "OutOfMemoryError":  # torch's
            return 1, "failed: out of device memory; try --cache disk, --no-cuda-graphs, bf16"
        case BrokenPipeError():  # the reader of our output has ended, as `| head` does
            drop_closed_output()
            return 1, "failed: the output pipe was closed"
        case OSError() if error.errno in FILE_FAULTS:
            where = error.filename or "what is printed, or the logs"  # all others name their file
            return 1, f"failed: {where}: {error.strerror}"
    if is_out_of_memory(error):
        return 1, "failed: out of memory; close other programs, or train with --slices 0.5"
    return None
