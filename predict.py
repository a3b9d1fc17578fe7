"""Predict exams with the saved models: probability per plane and stacked, and the verdict.

    python predict.py data/phantom --out predictions.csv        # a data folder, every saved task
    python predict.py ~/scans --task acl --out scans.csv        # DICOM, a folder or a zip
    python predict.py knee7-axial.npy knee7-sagittal.npy        # one exam's planes, to the terminal
    python predict.py exams --out exams.jsonl --jsonl --resume  # go on after an interruption

One row for each exam and task. Planes may be missing: a stack has a logistic regression for each
set of planes, and the row says which ones were used. An exam that cannot be read is named on
stderr, the others go on, and the exit status is 1. Memory stays constant: what is kept of an exam
is its name. Research use only, not a medical device.
"""

import argparse
import csv
import io
import json
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from tqdm import tqdm

import engine
from checkpoint import load_task, saved_tasks
from dataloader import PLANES, InputError, read_volume
from exams import open_exams

COLUMNS = ("exam", "split", "task", *PLANES, "stack", "threshold", "verdict", "planes", "missing")
COLUMNS += ("note",)
DIGITS = 8  # of a probability


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "exams",
        nargs="+",
        type=Path,
        metavar="EXAMS",
        help="a folder in MRNet's layout (with or without train and valid), a folder or zip of "
        "DICOM or NIfTI (converted first, into a temporary folder), or one exam's .npy files",
    )
    parser.add_argument(
        "--task", action="append", help="may be repeated; without it, every task with a saved model"
    )
    parser.add_argument(
        "--plane", choices=PLANES, help="of a single .npy file whose path does not tell it"
    )

    files = parser.add_argument_group("files")
    files.add_argument(
        "--models-dir", type=Path, default=Path("models"), help="where train.py wrote"
    )
    files.add_argument("--out", type=Path, default=Path("-"), help="file to write; - is stdout")
    files.add_argument(
        "--jsonl",
        action="store_true",
        help="one JSON object a line instead of CSV: null where CSV has nothing, lists of planes",
    )
    existing = files.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="skip the exams that --out holds and append the others; use the same models. Exams "
        "that failed are tried again",
    )
    existing.add_argument("--overwrite", action="store_true", help="replace --out")

    machine = parser.add_argument_group("machine")
    engine.add_machine_arguments(machine)
    args = parser.parse_args()
    if str(args.out) == "-" and (args.resume or args.overwrite):
        parser.error("--resume and --overwrite need a file as --out")
    return args


def predict_exam(exam, tasks, device, precision):
    """Rows of one exam, one a task, and how many slices went through a network.

    Raises:
        InputError: a volume cannot be used; a wrong one must not pass for a missing one.
    """
    if not exam.name.isprintable() or not exam.split.isprintable():
        raise InputError(f"{exam.split}/{exam.name!a}: give it a name of printable characters")
    volumes = {plane: read_volume(path) for plane, path in exam.paths.items()}
    rows, slices = [], 0
    for models in tasks:
        probabilities = {}
        for plane in PLANES:
            if plane in volumes and plane in models.networks:
                networks = models.networks[plane]
                probabilities[plane] = engine.predict_volume(
                    networks, volumes[plane], device, precision
                )
                slices += len(volumes[plane]) * len(networks)
        rows.append(make_row(exam, models, probabilities))
    return rows, slices


def make_row(exam, models, probabilities):
    """Dict of COLUMNS: floats, strings, lists of planes, None for what there is not."""
    row = dict.fromkeys(COLUMNS) | {"exam": exam.name, "split": exam.split, "task": models.task}
    row |= {plane: round(p, DIGITS) for plane, p in probabilities.items()}
    row["planes"] = list(probabilities)
    row["missing"] = [plane for plane in PLANES if plane not in probabilities]
    notes = [f"no {plane} model" for plane in exam.paths if plane not in models.networks]
    notes += [f"no {plane} volume" for plane in models.networks if plane not in exam.paths]
    if models.stack is None:
        notes.append("no stack, so no verdict")
    elif probabilities:
        stacked, row["threshold"], row["verdict"] = engine.verdict(models.stack, probabilities)
        row["stack"] = round(stacked, DIGITS)
    row["note"] = "; ".join(notes) or None
    return row


def as_text(row, jsonl):
    """A row of `make_row` as a line of CSV or JSON."""
    if jsonl:
        return json.dumps(row) + "\n"
    cells = ("+".join(v) if isinstance(v, list) else v for v in row.values())
    return csv_line(f"{v:.{DIGITS}f}" if isinstance(v, float) else v for v in cells)


def csv_line(cells):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def as_row(line):
    """A line of CSV as a dict of COLUMNS."""
    return dict(zip(COLUMNS, *csv.reader([line]), strict=True))


def finished_exams(path, tasks, jsonl):
    """What an interrupted run has written; its half-written end is cut off.

    Args:
        tasks: names of the tasks that each exam needs a row of.

    Returns:
        set of "split/exam".

    Raises:
        InputError: not a file that this command would write.
    """
    header = b"" if jsonl else csv_line(COLUMNS).encode()
    done, rows = set(), []
    try:
        with open(path, "rb+") as file:
            first = file.readline() if header else b""
            if not header.startswith(first):
                raise ValueError
            whole = len(header) if first == header else 0
            size = whole
            for line in file if first == header else ():
                if not line.endswith(b"\n"):
                    break
                size += len(line)
                text = line.decode()
                row = json.loads(text) if jsonl else as_row(text)
                if list(row) != list(COLUMNS):
                    raise ValueError
                rows.append(row["task"])
                if len(rows) == len(tasks):
                    if rows != tasks:
                        raise ValueError
                    done.add(f"{row['split'] or ''}/{row['exam']}")
                    rows, whole = [], size
            file.truncate(whole)
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, TypeError, csv.Error):
        raise InputError(
            f"{path}: not written by this command with tasks {', '.join(tasks)}; give another "
            "--out, the same arguments, or --overwrite"
        ) from None
    return done


def open_output(args):
    """The file --out, opened to append with --resume.

    Raises:
        InputError: it cannot be written.
    """
    try:
        return open(args.out, "a" if args.resume else "w", encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{args.out}: cannot be written ({error.strerror}); give another --out"
        ) from None


def main():
    args = parse_arguments()
    device = engine.pick_device(args.device)
    precision = engine.pick_precision(args.precision, device)
    # Pipelines get rows and nothing else.
    to_stdout = str(args.out) == "-"
    say = partial(print, file=sys.stderr if to_stdout else sys.stdout)
    names = sorted(set(args.task)) if args.task else saved_tasks(args.models_dir)
    tasks = [load_task(args.models_dir, name, device) for name in names]
    done = finished_exams(args.out, names, args.jsonl) if args.resume else set()
    if not to_stdout and args.out.exists() and not (args.resume or args.overwrite):
        raise InputError(f"{args.out}: exists; --resume goes on with it, --overwrite replaces it")
    with (
        open_exams(args.exams, args.plane, say) as (exams, failed),
        nullcontext(sys.stdout) if to_stdout else open_output(args) as file,
    ):
        if not to_stdout:
            engine.start_up(args, device, precision)
        if not args.jsonl and (to_stdout or file.tell() == 0):
            file.write(csv_line(COLUMNS))
        began, predicted, slices = time.perf_counter(), 0, 0
        for exam in engine.progress(exams, "predict", total=len(exams)):
            if f"{exam.split}/{exam.name}" in done:
                continue
            try:
                rows, more = predict_exam(exam, tasks, device, precision)
            except InputError as error:
                failed += 1
                tqdm.write(f"error: {error}", file=sys.stderr)
                continue
            predicted, slices = predicted + 1, slices + more
            file.write("".join(as_text(row, args.jsonl) for row in rows))
            file.flush()
    seconds = time.perf_counter() - began
    skipped = f", {len(done)} were there" if done else ""
    say(
        f"{predicted} exams{skipped}, {slices} slices in {seconds:.1f} s: "
        f"{predicted / seconds:.1f} exams/s, {1000 * seconds / max(slices, 1):.2f} ms a slice"
    )
    if failed:
        raise engine.RunError(f"{failed} exams or volumes could not be used, named above")


if __name__ == "__main__":
    engine.run(main)
