"""A long list of exams predicted by several processes: `predict.py --jobs 4`, `--cluster ray`.

Each process is `predict.py --part` (common/parts.py) with rows and a log of its own in OUT.parts/,
where it goes on after an interruption; at the end the rows are put together.
"""

import errno
import os
import re
import shutil
import sys
from pathlib import Path

from common import cli
from common.errors import InputError, Interrupted, RunError
from common.exams import check_there
from common.files import alone_at
from common.jobs import ROOT, Job, failures
from common.parts import beside, merge

# What the processes get from here, or not at all.
OWN = ("exams", "out", "resume", "overwrite", "part", "submission", "jobs", "threads", "cluster",
       "jobs_per_gpu")  # fmt: skip
ROWS = re.compile(r"part[0-9]+of([0-9]+)\.rows")


def words_of(values):
    """A command line of predict.py, without the options of OWN.

    Args:
        values: {name: value} as argparse has them.
    """
    words = []
    for name, value in values.items():
        option = f"--{name.replace('_', '-')}"
        if name in OWN or value is None or value is False:
            continue
        if value is True:
            words.append(option)
        elif name == "task":  # may be repeated
            words += [f"{option}={task}" for task in value]
        elif isinstance(value, list):
            words += [option, *map(str, value)]
        else:
            words.append(f"{option}={value}")
    return words


def make_jobs(values, folder, count):
    """A Job for each of `count` parts, whose rows and log are in `folder`."""
    jobs, words = [], words_of(values)
    exams = [str(path) for path in values["exams"]]
    for number in range(1, count + 1):
        rows = folder / f"part{number}of{count}.rows"
        own = (f"--part={number}/{count}", f"--out={rows}", "--resume")
        arguments = (str(ROOT / "predict.py"), *words, *own, "--", *exams)
        log = rows.with_suffix(".txt")
        jobs.append(Job(f"part {number}", arguments, log, ended=beside(rows)))
    return jobs


def rows_of(job):
    """Path of a part's rows."""
    return job.log.with_suffix(".rows")


def folder_of(out):
    """Path of the parts of a file of rows."""
    return Path(f"{out}.parts")


def parts_left(out):
    """In how many parts an interrupted run has left its rows; 0 for none."""
    folder = folder_of(out)
    found = [ROWS.fullmatch(path.name) for path in folder.glob("part*.rows")]
    return max((int(match[1]) for match in found if match), default=0)


def made_folder(out):
    """The folder of the parts, made where it is not there yet.

    Raises:
        InputError: it cannot be.
    """
    folder = folder_of(out)
    try:
        if out.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise unwritable(out, error) from None
    return folder


def unwritable(out, error):
    return InputError(f"{out}: cannot be written ({error.strerror}); give another --out")


def alone_with_rows(out):
    """Within it no other run writes these rows. Raises InputError where one does."""
    return alone_at(out, f"{out}: another run predicts it; wait for that one")


def prepare_rows(jobs, out, resume):
    """Let each part begin with what is its own of the rows that are there, or with none."""
    for job in jobs:
        path = rows_of(job)
        job.ended.unlink(missing_ok=True)
        if resume and out.exists() and not path.exists():
            shutil.copy(out, path)
        elif not resume:
            path.write_bytes(b"")


def clean_up(folder, jobs, logs):
    """Remove the parts' rows, and their `logs` if so, and the folder if nothing else is in it."""
    for job in jobs:
        for path in (rows_of(job), job.ended, *([job.log] if logs else [])):
            path.unlink(missing_ok=True)
    if logs and not any(folder.iterdir()):
        folder.rmdir()


def problems_in(log):
    """Lines of a log's last run that name what could not be used, or was used all the same."""
    text = log.read_text(encoding="utf-8", errors="replace").rpartition("\n$ python ")[2]
    return [line for line in text.splitlines() if line.startswith(("error: ", "warning: "))]


def predict_in_parts(values, out, runner, resume):
    """Predict all exams in as many parts as `runner` runs side by side, write their rows, and name
    on stderr what could not be used, and what was warned of.

    Args:
        values: {name: value} of predict.py's arguments.
        out: Path of the rows.
        runner: jobs.Jobs.
        resume: keep the rows of `out`, and of a run that was interrupted, whose number of parts
            stays.

    Returns:
        whether all could be used.

    Raises:
        InputError: an exam is not there, `out` cannot be written, or rows of an interrupted run are
            there and neither `resume` nor values["overwrite"] is given.
        RunError: a part failed.
        Interrupted: by a signal.
    """
    check_there(values["exams"])
    for path in values["exams"]:
        if path.suffix == ".npy":
            raise InputError(f"{path}: one exam has no parts; leave out --jobs and --cluster")
    left = parts_left(out)
    if left and not (resume or values["overwrite"]):
        raise InputError(f"{folder_of(out)}: of an interrupted run; --resume continues it, "
                         "--overwrite begins anew")  # fmt: skip
    folder = made_folder(out)
    jobs = make_jobs(values, folder, left or runner.at_once)
    prepare_rows(jobs, out, resume)
    print(f"{len(jobs)} parts; what they print: {folder}", flush=True)
    try:
        ended = list(runner.run(jobs))
    except Interrupted as error:
        raise Interrupted(error.number, cli.resume_with()) from None
    if failed := [done.job for done in ended if not done.is_fine]:
        raise RunError(failures(failed, jobs, "parts", "start again with --resume"))
    merge([rows_of(job) for job in jobs], out)
    said = dict.fromkeys(line for job in jobs for line in problems_in(job.log))  # each once
    print("".join(f"{line}\n" for line in said), end="", file=sys.stderr)
    is_whole = all(done.status == 0 for done in ended)
    clean_up(folder, jobs, logs=is_whole)
    return is_whole
