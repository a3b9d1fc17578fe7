"""A challenge's submission: one row a study and one column a finding, as a sample file has them."""

import csv
import re
import sys
import threading
import time
from contextlib import contextmanager
from typing import NamedTuple

from tqdm import tqdm

from mrnet.errors import InputError, one_line
from mrnet.files import open_regular, unwritable, write_csv
from mrnet.layout.names import exam_name
from mrnet.layout.planes import in_order

DIGITS = 6  # of a probability
REFRESH = 60  # s between two writes of a submission
JOINT = "joint"  # column of the probability of networks that join several planes
UNTRAINED = 0.5  # probability of a finding that there are no networks for
SIDES = ("", "L", "R")  # an exam's name ends in its knee's side where that is known


class Sample(NamedTuple):
    """What a submission must have."""

    head: list  # names of the columns, the first is of the study
    studies: list  # UIDs, in the order of the file

    @property
    def tasks(self):
        """The task of each column but the first: "Medial Meniscus" is medial-meniscus."""
        return [task_of(column) for column in self.head[1:]]


def task_of(column):
    """A column's name as a task's: small letters, words joined by -, no apostrophes."""
    words = re.sub(r"['\u2019`]", "", column).casefold()
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def read_sample(path):
    """A sample submission: Sample.

    Raises:
        InputError: it cannot be read, has no columns of findings, or a study twice.
    """
    try:
        with open_regular(path, "r", newline="", encoding="utf-8-sig") as file:
            head, *rows = [row for row in csv.reader(file) if row]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a CSV ({type(error).__name__})") from None
    studies = [row[0].strip() for row in rows]
    if len(head) < 2 or not studies or len(set(studies)) < len(studies):
        raise InputError(
            f"{path}: {len(studies)} studies, {len(set(studies))} of them different, and "
            f"{len(head) - 1} findings; give the challenge's sample_submission.csv"
        )
    return Sample(head, studies)


def write_submission(path, sample, answers, prevalences):
    """Write a submission in the sample's order of rows and columns.

    Args:
        answers: {(exam's name, task): probability}.
        prevalences: {task: probability} for a study without an answer; a task that is not there
            is UNTRAINED.

    Returns:
        {study UID: tasks of `prevalences` without an answer}, of the studies that have such.
    """
    rows, lacking = [sample.head], {}
    for uid in sample.studies:
        cells = []
        for task in sample.tasks:
            keys = [(exam_name(uid, side), task) for side in SIDES]
            found = [answers[key] for key in keys if key in answers]
            if task not in prevalences:
                found = [UNTRAINED]
            elif len(found) != 1:  # none; or two knees, and nothing says which is asked for
                lacking.setdefault(uid, []).append(task)
                found = [prevalences[task]]
            cells.append(f"{found[0]:.{DIGITS}f}")
        rows.append([uid, *cells])
    write_csv(path, rows)
    return lacking


def sample_for(path, out, may_replace):
    """The sample of a submission that is to be written to `out`.

    Raises:
        InputError: no such sample, or `out` is a folder or a file that may not be replaced.
    """
    sample = read_sample(path)
    if out.is_dir():
        raise InputError(f"{out}: a folder; give --out a file in it")
    if out.exists() and out.samefile(path):
        raise InputError(f"{out}: the sample itself; give another --out")
    if out.exists() and not may_replace:
        raise InputError(f"{out}: exists; give another --out, --resume or --overwrite")
    return sample


def answers_in(path):
    """{(exam, task): probability} of a file of rows, of which the last may be half written."""
    answers = {}
    with open_regular(path, "r", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(line for line in file if line.endswith("\n")):
            planes = [row[name] for name in (*in_order(row), JOINT) if row[name]]
            found = [row["stack"]] if row["stack"] else planes
            if found:
                answers[row["exam"], row["task"]] = sum(map(float, found)) / len(found)
    return answers


@contextmanager
def refreshed(path, sample, rows, tasks, resume):
    """Within it there is a submission whenever a time limit ends the run: the training prevalence
    of every finding at first, and every REFRESH seconds the answers that there are by then. One
    that was there stays until then.

    Args:
        path, sample, rows, tasks: as `submit` takes them.
        resume: whether rows from before the start count.

    Raises:
        InputError: it cannot be written.
    """
    prevalences = {models.task: models.prevalence for models in tasks}
    start, was_there, known = 0 if resume else time.time(), path.exists(), {}
    ended = threading.Event()

    def refresh():
        while not ended.wait(REFRESH):
            try:
                if rows.exists() and rows.stat().st_mtime >= start:
                    known.update(answers_in(rows))
                if known:
                    write_submission(path, sample, known, prevalences)
            except (OSError, ValueError, LookupError, TypeError, csv.Error) as error:
                tqdm.write(f"warning: {path}: not refreshed ({one_line(error)})", file=sys.stderr)

    thread = threading.Thread(target=refresh, daemon=True)
    if not was_there:
        try:
            write_submission(path, sample, {}, prevalences)
        except OSError as error:
            raise unwritable(path, error) from None
    words = "an earlier one" if was_there else "the training prevalence of each finding"
    print(f"written  {path}: {words} for now, refreshed every {REFRESH} s")
    thread.start()
    try:
        yield
    except InputError:
        if not (was_there or known):  # the exams were refused: no submission
            path.unlink(missing_ok=True)
        raise
    finally:
        ended.set()
        thread.join()


def submit(path, sample, rows, tasks):
    """Write a submission from a file of rows, and name what it has no answer for.

    Returns:
        One line on findings without models, which have UNTRAINED, and on studies without an
        answer, which have the training prevalence; "" where there are none.
    """
    answers = answers_in(rows)
    prevalences = {models.task: models.prevalence for models in tasks}
    untrained = [task for task in sample.tasks if task not in prevalences]
    for task in untrained:
        print(f"error: {task}: no models, {UNTRAINED} for every study instead", file=sys.stderr)
    lacking = write_submission(path, sample, answers, prevalences)
    for uid, names in lacking.items():
        print(f"error: study {uid}: no answer, the prevalence of {', '.join(names)} instead",
              file=sys.stderr)  # fmt: skip
    print(f"written  {path}: {len(sample.studies)} studies, {len(sample.tasks)} findings")
    why = [f"{len(untrained)} of {len(sample.tasks)} findings have no models"] if untrained else []
    if lacking:
        why.append(f"{len(lacking)} of {len(sample.studies)} studies have no answer")
    return f"{' and '.join(why)}, named above" if why else ""
