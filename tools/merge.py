"""Put together what `predict.py --part` wrote on several machines.

    python predict.py ~/archive --part 1/4 --out part1.csv         # on the first machine, and so on
    python -m tools.merge part*.csv --out all.csv

Refuses unless every exam of the list is there exactly once, predicted by the same networks; the
rows are then those of one run over the whole list, in its order. A part that was killed goes on
with --resume.
"""

import sys
from pathlib import Path

from common import cli
from common.errors import InputError
from common.files import atomic
from common.parts import Rows, digest_of


def parse_arguments():
    parser = cli.make_parser(__doc__)
    parts = "what predict.py --part wrote, with the .part.json beside each; in any order"
    parser.add_argument("parts", nargs="+", type=Path, metavar="PART", help=parts)
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    return parser.parse_args()


def in_order(found):
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
    """Yields the parts.Exam of every exam in the order of the list.

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
    if digest_of(keys) != parts[0].list:
        raise InputError("other exams than the list has; run each part again with --resume")


def run(args):
    """Check and write all rows."""
    if args.out.exists() and not args.overwrite:
        raise InputError(f"{args.out}: exists; --overwrite replaces it")
    parts = in_order([Rows(path) for path in args.parts])
    heads = {one.head for one in parts}
    if len(heads) > 1:
        raise InputError("the parts have different columns; predict them with the same options")
    count, failed = 0, 0
    with atomic(args.out) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        file.write(heads.pop())
        for exam in merged(parts):
            file.writelines(exam.lines)
            count, failed = count + 1, failed + bool(exam.error)
    print(f"{args.out}: {count} exams from {len(parts)} parts, each once")
    if failed:
        print(f"{failed} of them with an `error`, named there", file=sys.stderr)


if __name__ == "__main__":
    cli.exit_with_status(lambda: run(parse_arguments()))
