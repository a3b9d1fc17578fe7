"""A list of exams that several runs predict, each a part of it: `predict.py --part 2/4`.

Part 2 of 4 is every fourth exam from the second on. Beside its rows a run that has come to its end
writes OUT.part.json, which tells the whole list, so that `python -m tools.merge` can say what is
missing.
"""

import argparse
import csv
import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from common.documents import parse_json
from common.errors import InputError
from common.files import atomic, from_cell, write_text

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


def list_digest(keys):
    """Hash of a list of exams' (source, name), hexadecimal."""
    total = hashlib.blake2b(digest_size=16)
    for source, name in keys:
        total.update(f"{source}\0{name}\n".encode(errors="surrogateescape"))
    return total.hexdigest()


def write_part(out, part, keys):
    """Tell beside a file of rows, which are all there, which part of which list it holds.

    Args:
        out: Path of the rows.
        keys: (source, name) of all exams, of every part.
    """
    about = part._asdict() | {"exams": len(keys), "list": list_digest(keys)}
    write_text(beside(out), json.dumps(about) + "\n")


def check_names(keys):
    """Raise InputError where two of all exams' (source, name) are the same."""
    if len(set(keys)) < len(keys):
        source, name = next(key for key, count in Counter(keys).items() if count > 1)
        raise InputError(f"{source}/{name}: two exams of the list have this name; rename one")


def beside(out):
    """Path of what tells which part a file of rows holds; not there before its run has ended."""
    return Path(f"{out}.part.json")


class ExamRows(NamedTuple):
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
            about = parse_json(beside(path).read_text(encoding="utf-8"))
            self.part = Part(int(about["number"]), int(about["of"]))
            self.count, self.list = int(about["exams"]), str(about["list"])
            with open(path, encoding="utf-8") as file:
                first = file.readline()
        except FileNotFoundError as error:
            raise InputError(
                f"{error.filename}: no such file; give what predict.py --part wrote, after its run "
                "has ended"
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
                row = parse_json(line)
            return tuple(row[name] or "" for name in FIELDS)
        except (ValueError, LookupError, TypeError, csv.Error):
            raise InputError(
                f"{self.path}: ends in the middle, or is damaged; run its part again with --resume"
            ) from None

    def exams(self):
        """Yields an ExamRows for each."""
        with open(self.path, newline="", encoding="utf-8") as file:
            if self.head:
                file.readline()
            rows = ((self.fields(line), line) for line in file)
            for key, members in itertools.groupby(rows, key=lambda row: row[0][:2]):
                members = list(members)
                _, _, tasks, models, errors = zip(*(fields for fields, _ in members), strict=True)
                error = next(filter(None, errors), "")
                yield ExamRows(key, tasks, models[0], error, [line for _, line in members])


def sorted_parts(found):
    """The parts of one list by number: list of Rows.

    Raises:
        InputError: of different lists, or one is missing or there twice.
    """
    first = found[0]
    for one in found:
        if (one.part.of, one.count, one.list) != (first.part.of, first.count, first.list):
            raise InputError(
                f"{one.path}: part {one.part.number}/{one.part.of} of another list of exams than "
                f"{first.path}; exams came or went between the runs: run each part again with "
                "--resume"
            )
    by_number = {}
    for one in found:
        if one.part.number in by_number:
            raise InputError(
                f"{one.path}: part {one.part.number}, as {by_number[one.part.number].path}; give "
                "each part once"
            )
        by_number[one.part.number] = one
    lacking = [str(n) for n in range(1, first.part.of + 1) if n not in by_number]
    if lacking:
        raise InputError(f"part {', '.join(lacking)} of {first.part.of} is missing; give it, too")
    return [by_number[number] for number in sorted(by_number)]


def merged(parts):
    """Yields the ExamRows of every exam in the order of the list.

    Raises:
        InputError: a part lacks exams or rows, has others, or was predicted by other networks.
    """
    streams, keys, first = [one.exams() for one in parts], [], None
    for place in range(parts[0].count):
        part = parts[place % len(parts)]
        try:
            exam = next(streams[place % len(parts)])
        except StopIteration:
            wanted = len(part.part.take(range(part.count)))
            raise InputError(
                f"{part.path}: {place // len(parts)} of {wanted} exams; run its part again with "
                "--resume"
            ) from None
        first = first or exam
        if exam.tasks != first.tasks:
            raise InputError(
                f"{part.path}: exam {exam.key[1]} has rows of {', '.join(exam.tasks)} only, not of "
                f"{', '.join(first.tasks)}; run its part again with --resume"
            )
        if exam.model != first.model:
            raise InputError(
                f"{part.path}: exam {exam.key[1]} was predicted by other networks than those of "
                f"{parts[0].path}, or on another kind of device; run its part again with --resume"
            )
        keys.append(exam.key)
        yield exam
    for one, stream in zip(parts, streams, strict=True):
        if next(stream, None) is not None:
            raise InputError(f"{one.path}: more exams than the list has; run it with --resume")
    if list_digest(keys) != parts[0].list:
        raise InputError("other exams than the list has; run each part again with --resume")


def merge(paths, out):
    """Write the rows of all parts of one list into one file, as one run would have, and say so.

    Args:
        paths: of the parts, in any order; they lie unchanged.

    Returns:
        how many exams have an error.

    Raises:
        InputError: as `sorted_parts` and `merged`; nothing is written.
    """
    parts = sorted_parts([Rows(path) for path in paths])
    heads = {one.head for one in parts}
    if len(heads) > 1:
        raise InputError("the parts have different columns; predict them with the same options")
    count, failed = 0, 0
    with atomic(out) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        file.write(heads.pop())
        for exam in merged(parts):
            file.writelines(exam.lines)
            count, failed = count + 1, failed + bool(exam.error)
    print(f"{out}: {count} exams from {len(parts)} parts, each once")
    return failed
