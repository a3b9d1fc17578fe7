"""A list of exams that several runs predict, each a part of it: `predict.py --part 2/4`.

Part 2 of 4 is every fourth exam from the second on. Beside its rows a run writes OUT.part.json,
which tells the whole list, so that `python -m tools.merge` can say what is missing.
"""

import argparse
import csv
import hashlib
import itertools
import json
from pathlib import Path
from typing import NamedTuple

from common.errors import InputError
from common.files import from_cell, write_text

FIELDS = ("source", "exam", "task", "model", "error")


class Part(NamedTuple):
    """One of several equal parts of a list."""

    number: int  # from 1
    of: int

    def take(self, items):
        """The part of a list that is its own."""
        return items[self.number - 1 :: self.of]


def part_argument(text):
    """Value of an option: "2/4" as a Part."""
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part such as 2/4")
    return Part(int(number), int(of))


def digest_of(keys):
    """Hash of a list of exams' (source, name), hexadecimal."""
    total = hashlib.blake2b(digest_size=16)
    for source, name in keys:
        total.update(f"{source}\0{name}\n".encode(errors="surrogateescape"))
    return total.hexdigest()


def write_part(out, part, keys):
    """Tell beside a file of rows which part of which list it holds.

    Args:
        out: Path of the rows.
        keys: (source, name) of all exams, of every part.
    """
    if len(set(keys)) < len(keys):
        raise InputError(f"{out}: two exams of the list have the same name; rename one")
    about = part._asdict() | {"exams": len(keys), "list": digest_of(keys)}
    write_text(beside(out), json.dumps(about) + "\n")


def beside(out):
    return Path(f"{out}.part.json")


class Exam(NamedTuple):
    """What a part says of one exam."""

    key: tuple  # (source, name)
    tasks: tuple
    model: str  # hash of networks, stacks and options
    error: str
    lines: list  # its rows as they are


class Rows:
    """The rows of one part, exam by exam.

    Args:
        path: what predict.py --part wrote, CSV or JSON lines.

    Raises:
        InputError: it is not such a file, or what lies beside it is not.
    """

    def __init__(self, path):
        self.path = path
        try:
            about = json.loads(beside(path).read_text(encoding="utf-8"))
            self.part = Part(int(about["number"]), int(about["of"]))
            self.count, self.list = int(about["exams"]), str(about["list"])
            with open(path, encoding="utf-8") as file:
                first = file.readline()
        except FileNotFoundError as error:
            raise InputError(
                f"{error.filename}: no such file; give what predict.py --part wrote"
            ) from None
        except (OSError, ValueError, LookupError, TypeError):
            raise InputError(f"{path}: damaged, or not of a part; run it again") from None
        self.head = "" if first.startswith("{") else first  # JSON lines have none

    def fields(self, line):
        """A row's source, exam, task, model and error."""
        try:
            if not line.endswith("\n"):
                raise ValueError
            if self.head:
                head, cells = csv.reader([self.head, line])
                row = dict(zip(head, map(from_cell, cells), strict=True))
            else:
                row = json.loads(line)
            return tuple(row[name] or "" for name in FIELDS)
        except (ValueError, LookupError, TypeError, csv.Error):
            raise InputError(
                f"{self.path}: ends in the middle, or is damaged; run its part again with --resume"
            ) from None

    def exams(self):
        """Yields an Exam for each."""
        with open(self.path, newline="", encoding="utf-8") as file:
            if self.head:
                file.readline()
            rows = ((self.fields(line), line) for line in file)
            for key, members in itertools.groupby(rows, key=lambda row: row[0][:2]):
                members = list(members)
                _, _, tasks, models, errors = zip(*(fields for fields, _ in members), strict=True)
                error = next(filter(None, errors), "")
                yield Exam(key, tasks, models[0], error, [line for _, line in members])
