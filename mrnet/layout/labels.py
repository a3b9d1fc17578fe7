"""The CSVs of a data folder: labels, their weights and groups (data/README.md). Without torch."""

import csv
import math
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mrnet.errors import InputError, counted, one_line
from mrnet.files import open_regular
from mrnet.layout.planes import SPLITS

OWN_LABELS = "own-labels.csv"  # rows of id, task: labels of the set itself, beside derived ones

UNKNOWN = float("nan")  # label of an exam that nobody has read for this finding
MOST_WEIGHT = 1000.0  # of one label
GROUPS = "groups"  # <split>-groups.csv holds no labels


class OneClassOnly(InputError):
    """A task whose exams are all positive, or all negative, or none."""


HOW_TO_GET_DATA = (
    "MRNet: register at https://stanfordmlgroup.github.io/competitions/mrnet and unzip it into "
    "data/; or make synthetic knees with `python data/phantom/prepare.py` and give "
    "data/phantom as the data folder"
)


def tasks(root_dir):
    """Names with both train-<task>.csv and valid-<task>.csv in `root_dir`, sorted.

    Raises:
        InputError: no such folder, or no task in it, with how to get data.
    """
    root = Path(root_dir)
    if not root.is_dir():
        raise InputError(f"{root}: no such data folder. {HOW_TO_GET_DATA}")
    names = tasks_in(root)
    if joined := [name for name in names if "+" in name]:
        raise InputError(
            f"{root}/train-{joined[0]}.csv: + joins the names of several tasks; rename the task"
        )
    if not names:
        below = [
            folder for folder in sorted(root.iterdir()) if folder.is_dir() and tasks_in(folder)
        ]
        if below:
            where = shlex.quote(str(below[0]))
            raise InputError(f"{root}: the data set is in {below[0]}; give --data-dir {where}")
        raise InputError(f"{root}: no train-<task>.csv with a valid-<task>.csv. {HOW_TO_GET_DATA}")
    return names


def tasks_in(root):
    """As `tasks`, without its checks; [] where there are none."""
    names = {p.name[len("train-") : -len(".csv")] for p in root.glob("train-*.csv")} - {GROUPS}
    return sorted(name for name in names if (root / f"valid-{name}.csv").is_file())


def trainable(root_dir):
    """The tasks that have labels of both classes in both splits, and why the others have not.

    Returns:
        list of names, sorted, and {name: one line}.

    Raises:
        InputError: as `tasks`, a CSV is faulty, or no task can be trained.
    """
    found, why = [], {}
    for task in tasks(root_dir):
        try:
            for split in SPLITS:
                read_labels(root_dir, task, split)
            found.append(task)
        except OneClassOnly as error:  # any other fault is one of the files
            why[task] = str(error)
    if not found:
        raise InputError(next(iter(why.values())))
    return found, why


class LabelRow(NamedTuple):
    """A row of a CSV of labels, `id,label` or `id,label,weight`; a faulty one has a fault only."""

    exam_id: str | None = None  # without leading zeros
    label: float | None = None  # 0 to 1, or UNKNOWN where it is empty
    weight: float = 1.0  # of its loss: how far the label is trusted
    fault: str | None = None  # what is wrong and how to fix it, one line


def is_exam_number(text):
    """Whether a text is an exam's number: up to 12 of the digits 0 to 9, where str.isdigit and int
    take those of any script."""
    return bool(re.fullmatch(r"\s*[0-9]{1,12}\s*", text, re.ASCII))


def exam_number(text):
    """An exam's number as int.

    Raises:
        ValueError: it is none.
    """
    if not is_exam_number(text):
        raise ValueError(f"{text!r:.40} is not an exam's number")
    return int(text)


def id_of(text):
    """An exam's number without leading zeros, as CSVs have it: "7" of "0007"; other names as they
    are."""
    return text.strip().lstrip("0") or "0"


def label_rows(root_dir, task, split):
    """Read the CSV of one split row by row: yields a LabelRow for each."""
    path = Path(root_dir) / f"{split}-{task}.csv"
    seen = set()
    try:
        with open_regular(path, "r", newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.reader(file), start=1):
                if not row:
                    continue
                where = f"{path}, line {number}"
                fault, weight = None, 1.0
                if len(row) not in (2, 3) or not is_exam_number(row[0]):
                    fault = f"{where}: expected `id,label` with a whole-number id"
                    if number == 1 and len(row) > 1 and parse_label(row[1]) is None:
                        fault = f"{path}: line 1 is a header; delete it"
                    yield LabelRow(fault=fault)
                    continue
                exam_id, label = id_of(row[0]), parse_label(row[1])
                if len(row) == 3:
                    weight = parse_weight(row[2])
                if label is None:
                    fault = f"label {row[1]!r:.40} is not from 0 to 1, or empty"
                elif weight is None:
                    fault = f"weight {row[2]!r:.40} is not a number above 0, at most {MOST_WEIGHT}"
                elif exam_id in seen:
                    fault = f"id {exam_id} is listed twice; keep one row"
                yield (
                    LabelRow(fault=f"{where}: {fault}")
                    if fault
                    else LabelRow(exam_id, label, weight)
                )
                seen.add(exam_id)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = one_line(error)
        yield LabelRow(
            fault=f"{path}: cannot be read as a CSV of `id,label` ({reason}); create it again"
        )


def parse_label(text):
    """A label's text as float: 0 (negative) to 1 (positive), UNKNOWN if empty, None if neither."""
    text = text.strip()
    if not text:
        return UNKNOWN
    if not re.fullmatch(r"[01]|[01]?\.[0-9]+", text, re.ASCII) or float(text) > 1:
        return None
    return float(text)


def parse_weight(text):
    """A label's weight as float, above 0 and at most MOST_WEIGHT; None if it is neither."""
    try:
        weight = float(text) if text.isascii() else math.nan
    except ValueError:
        return None
    return weight if 0 < weight <= MOST_WEIGHT else None


def read_rows(root_dir, task, split):
    """The CSV of one split: list of LabelRow, none with a fault.

    Raises:
        InputError: as `read_labels`.
    """
    root, known = Path(root_dir), tasks(root_dir)
    if task not in known:
        names = [f"{half}-{task}.csv" for half in SPLITS]
        missing = " and ".join(name for name in names if not (root / name).is_file())
        raise InputError(
            f"{root}: no task '{task}' without {missing}; tasks here: {', '.join(known)}"
        )
    rows = []
    for row in label_rows(root, task, split):
        if row.fault:
            raise InputError(row.fault)
        rows.append(row)
    labels = known_labels(rows).values()
    if len({is_positive(label) for label in labels}) < 2:
        raise OneClassOnly(
            f"{root}/{split}-{task}.csv: {counted(len(labels), 'exam')} of one class only; "
            "training and AUC need both 0 and 1"
        )
    return rows


def known_labels(rows):
    """{id: label} of LabelRows, without those that are unknown."""
    return {row.exam_id: row.label for row in rows if not math.isnan(row.label)}


def read_labels(root_dir, task, split):
    """Ids and labels of one split; exams whose label is unknown (empty) are left out.

    Returns:
        ids: list of str without leading zeros, in the order of the file.
        labels: float32 (n,), 0 to 1.

    Raises:
        InputError: folder, task or file missing, a row that is not `id,label`, a label below 0 or
            above 1, an id twice, or one class only (from 0.5 on is positive).
    """
    labels = known_labels(read_rows(root_dir, task, split))
    return list(labels), np.fromiter(labels.values(), np.float32, len(labels))


def is_positive(labels):
    """Whether labels 0 to 1 count as positive where there are two classes only: from 0.5 on."""
    return labels >= 0.5


def read_groups(root_dir, split):
    """{id without leading zeros: group} of <split>-groups.csv, rows of id, group; {} without it.

    Exams of one group (a patient, a scanner) are never split between training and testing.

    Raises:
        InputError: a row that is not `id,group`, or an id twice.
    """
    path, groups = Path(root_dir) / f"{split}-{GROUPS}.csv", {}
    if not path.exists():
        return groups
    try:
        with open_regular(path, "r", newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.reader(file), start=1):
                if row and (len(row) != 2 or not is_exam_number(row[0]) or not row[1].strip()):
                    hint = "; if it is a header, delete it" if number == 1 else ""
                    raise InputError(f"{path}, line {number}: expected `id,group`{hint}")
                exam_id = id_of(row[0]) if row else None
                if exam_id in groups:
                    raise InputError(f"{path}, line {number}: id {exam_id} is listed twice")
                if row:
                    groups[exam_id] = row[1].strip()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)}); create it again") from None
    return groups


def compare_groups(root_dir, split, groups, ids):
    """Compare `read_groups` with the exams.

    Args:
        ids: of the exams, without leading zeros.

    Returns:
        one line on the exams that have no group, "" where there are none or no file.

    Raises:
        InputError: none of the exams has a group.
    """
    alone, path = sum(exam_id not in groups for exam_id in ids), f"{split}-{GROUPS}.csv"
    if not groups or not alone:
        return ""
    if alone == len(ids):
        raise InputError(
            f"{Path(root_dir) / path}: names none of the {counted(len(ids), 'exam')}, such as "
            f"{ids[0]}; correct its ids"
        )
    has, each = ("has", "it counts") if alone == 1 else ("have", "each counts")
    return f"{alone} of {counted(len(ids), 'exam')} {has} no group ({path}); {each} as one"
