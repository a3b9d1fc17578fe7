"""A challenge's submission: one row a study and one column a finding, as a sample file has them."""

import csv
import re
from typing import NamedTuple

from common.errors import InputError
from common.files import write_csv
from data.common import exam_name

DIGITS = 6  # of a probability
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
        with open(path, newline="", encoding="utf-8-sig") as file:
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
