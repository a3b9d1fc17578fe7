"""Predict exams with the saved models: probability per plane and stacked, and the decision.

    python predict.py data/phantom --out predictions.csv        # a data folder, every saved task
    python predict.py ~/scans --task acl --out scans.csv        # DICOM, a folder or a zip
    python predict.py knee7-axial.npy knee7-sagittal.npy        # one exam's planes, to the terminal
    python predict.py ~/inbox --out inbox.csv --resume          # after studies came, went or broke
    python predict.py ~/rsna/test_series --submission ~/rsna/sample_submission.csv --out mine.csv
    python predict.py ~/archive --jobs 4 --out all.csv          # in four processes

One row for each exam and task. An exam's name is the same in every run: a file's name, or for DICOM
a hash of its study with the knee's side. Planes that were never scanned may be missing: a stack has
a logistic regression for each set of planes, and the row says which ones were used. Where a plane
was scanned and cannot be used, the row says why and has no decision (--partial also decides from
the other planes); such exams are named on stderr, the others go on, and the exit status is 1.
Memory stays constant: what is kept of an exam is its name. Research use only, not a medical device.

Columns: exam, source (its folder), task; a probability for each plane; joint, that of networks that
join several planes; stack, threshold, decision; planes that were used, planes that are missing;
note, such as a plane without volume or model, why there is no decision, and what the importer of
DICOM warned of, such as a series passed over; error, what could not be used; trained_on, the
networks' data sets; model and input, hashes of networks and of the exam.
"""

import csv
import re
import sys
import time
from collections import Counter
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from mrnet.documents import as_json, parse_json
from mrnet.errors import InputError, RunError, count_unusable, counted, one_line, printable
from mrnet.evaluation.metrics import sigmoid
from mrnet.files import (
    alone_at,
    atomic,
    csv_line,
    find_target,
    from_cell,
    named_in_errors,
    open_regular,
    unwritable,
)
from mrnet.inference.answering import (
    Options,
    add_exam_arguments,
    load_once,
    load_tasks,
    model_of,
    open_fit_exams,
)
from mrnet.inference.exams import check_there, is_rsna, read_planes
from mrnet.inference.submission import JOINT, refreshed, sample_for, submit
from mrnet.inference.task_models import saved_tasks
from mrnet.layout.description import describe_dataset, describe_datasets
from mrnet.layout.planes import PLANES, in_order
from mrnet.runtime import cli
from mrnet.runtime.cluster import Machines
from mrnet.runtime.devices import pick_device, pick_precision
from mrnet.runtime.machine import usable_cores
from mrnet.stacking.stacking import DIGITS, decide
from mrnet.training.memory import bytes_of_a_job

BEFORE = ("exam", "source", "task")  # columns, then one for each plane
AFTER = (JOINT, "stack", "threshold", "decision", "planes", "missing")
# What could not be used; what the networks were trained on; hashes of models and of the input.
AFTER += ("note", "error", "trained_on", "model", "input")


def parse_arguments():
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "exams",
        nargs="+",
        type=Path,
        metavar="EXAMS",
        help="a folder in MRNet's layout (with or without train and valid), a folder or zip of "
        "DICOM or NIfTI (converted one by one, into a temporary folder), or one exam's .npy files",
    )
    parser.add_argument(
        "--task", action="append", help="may be repeated; without it, every task with a saved model"
    )

    add_exam_arguments(parser)
    add_file_arguments(parser)

    machine = parser.add_argument_group("machine")
    cli.add_machine_arguments(machine)
    workers = "processes that read and decode scans while the networks compute, about 500 MB each, "
    workers += "by default one, of RSNA's set half the cores, at most 8, and one for each of --jobs"
    machine.add_argument("--workers", type=cli.process_count, help=workers)
    cli.add_parallel_arguments(parser, "processes", "one")
    args = parser.parse_args()
    if str(args.out) == "-" and (args.resume or args.overwrite):
        parser.error("--resume and --overwrite need a file as --out")
    if (args.threads or args.jobs_per_gpu > 1) and not (args.jobs or args.cluster):
        parser.error("--threads and --jobs-per-gpu are for the processes of --jobs or --cluster")
    if args.submission and (str(args.out) == "-" or args.jsonl or args.task):
        parser.error("--submission needs a file as --out, and neither --jsonl nor --task")
    return args


def add_file_arguments(parser):
    """--out, --jsonl, --submission, --resume, --overwrite."""
    files = parser.add_argument_group("files")
    files.add_argument("--out", type=Path, default=Path("-"), help="file to write; - is stdout")
    files.add_argument(
        "--jsonl",
        action="store_true",
        help="one JSON object a line instead of CSV: null where CSV has nothing, lists of planes",
    )
    submission = "a challenge's sample submission: --out gets its rows and columns in its order, a "
    submission += (
        "probability each; the usual rows lie beside it (OUT-rows.csv). Sets --partial, and "
    )
    submission += "what has no answer is named: a study gets the training prevalence, a finding "
    submission += "without models 0.5. It is there from the start and refreshed every minute"
    files.add_argument("--submission", type=Path, metavar="SAMPLE", help=submission)
    existing = files.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="keep the rows of --out whose exam and models have not changed and predict the rest: "
        "the file ends as a run from the start would leave it",
    )
    existing.add_argument("--overwrite", action="store_true", help="replace --out")


def default_importers(source, at_once):
    """How many processes read scans.

    Args:
        source: Path of the scans.
        at_once: processes that predict.
    """
    if at_once > 1:
        return min(at_once, usable_cores())
    return min(8, max(1, usable_cores() // 2)) if is_rsna(source) else 1


def columns_for(tasks):
    """Titles of the columns for some TaskModels: MRNet's planes and any other that they take."""
    return *BEFORE, *in_order({*PLANES, *(p for models in tasks for p in models.planes)}), *AFTER


def predict_exam(exam, tasks, options):
    """Rows of one exam, one a task, and how many slices went through a network."""
    rows, read, blank = [], {}, dict.fromkeys(columns_for(tasks))
    known = {}  # features that networks of several tasks have in common
    for models in tasks:
        volumes, unusable = read_planes(exam, models, read)
        logits = models.logits(volumes, options.device, options.precision, known)
        volumes, unusable, logits = models.leave_out_diverged(volumes, unusable, logits)
        answer = Answer(list(volumes), unusable, logits, models.slice_warnings(volumes))
        rows.append(blank | make_row(exam, models, answer, options))
    return rows, sum(len(read[plane]) for body in known for plane in body.planes)


class Answer(NamedTuple):
    """What the networks of one task said about one exam."""

    planes: list  # that they were given
    unusable: dict  # {plane: why not}, of planes that any of them takes
    logits: dict  # {column: [one of each network]}
    warnings: list | tuple = ()  # lines on what was used although it is unusual


def make_row(exam, models, answer, options):
    """Dict of some of the columns: floats, strings, lists of planes, None for what there is not."""
    used, unusable = answer.planes, answer.unusable
    row = {"exam": printable(exam.name), "source": printable(exam.source), "task": models.task}
    row["input"] = exam.input
    said = {}  # logits; all sets of planes that networks join are one column
    for planes, columns in models.by_planes.items():
        name = planes[0] if len(planes) == 1 else JOINT
        said[name] = said.get(name, []) + [v for c in columns for v in answer.logits.get(c, ())]
    row |= {k: round(float(sigmoid(v).mean()), DIGITS) for k, v in said.items() if v}
    row["planes"] = used
    row["missing"] = [p for p in in_order({*PLANES, *models.planes}) if p not in used]
    notes = [f"no {plane} model" for plane in exam.paths if plane not in models.planes]
    absent = [p for p in models.planes if p not in exam.paths and p not in unusable]
    notes += [f"no {plane} volume" for plane in absent]
    if models.stack is None:
        notes.append("no stack, so no decision")
    elif used and (options.partial or not unusable):
        decision = decide(models.stack, used, answer.logits)
        if decision is None:
            notes.append(f"the networks need more planes than {' and '.join(used)}, so no decision")
        else:
            row["stack"] = round(decision.probability, DIGITS)
            row["threshold"], row["decision"] = decision.threshold, decision.label
            notes += ["partial"] if unusable else []
            if decision.planes != used:
                notes.append(f"decided from {' and '.join(decision.planes)}")
    notes += [*exam.warnings, *answer.warnings]
    row["note"] = printable("; ".join(notes)) or None
    row["error"] = describe_unusable(unusable)
    row["trained_on"] = "; ".join(describe_dataset(found) for found in models.datasets) or None
    return row


def describe_unusable(unusable):
    """{plane: why} in one line, or None."""
    planes = {}
    for plane, why in unusable.items():
        planes.setdefault(why, []).append(plane)
    reasons = (f"{' and '.join(names)}: {why}" for why, names in planes.items())
    return printable("; ".join(reasons)) or None


def as_text(row, jsonl):
    """A row of `make_row` as a line of CSV or JSON."""
    if jsonl:
        return as_json(row) + "\n"
    cells = ("+".join(v) if isinstance(v, list) else v for v in row.values())
    return csv_line(f"{v:.{DIGITS}f}" if isinstance(v, float) else v for v in cells)


def models_of(tasks, options):
    """{task: column `model` of its rows}, by its own networks alone."""
    return {models.task: model_of([models], options) for models in tasks}


def as_row(line, columns):
    """A line of CSV as a dict."""
    (cells,) = csv.reader([line])
    return dict(zip(columns, map(from_cell, cells), strict=True))


class Saved(NamedTuple):
    """Position of one exam's rows in a file of predictions, in bytes."""

    input: str
    begin: int
    end: int


def saved_exams(path, columns, hashes, jsonl):
    """What an earlier run has written; its half-written end is cut off.

    Args:
        columns: as `columns_for`.
        hashes: {task: expected value of column `model`}; an exam with rows of other networks or
            options is ignored.

    Returns:
        {(source, exam): Saved} of the exams with all rows and no error, in the order of the file.

    Raises:
        InputError: not a file that this command would write; it stays as it is.
    """
    header = b"" if jsonl else csv_line(columns).encode()
    saved, rows, size = {}, [], 0
    try:
        with open_regular(path, "rb+", most=None) as file:
            for line in file:
                if not line.endswith(b"\n"):
                    check_start(line, header if size == 0 else b"", columns, jsonl)
                    break
                begin, size = size, size + len(line)
                if begin == 0 and header:
                    if line != header:
                        raise ValueError
                    continue
                row = parse_json(line) if jsonl else as_row(line.decode(), columns)
                if list(row) != list(columns):
                    raise ValueError
                key = row["source"] or "", row["exam"]
                if rows and rows[0][0] != key:
                    rows = []
                rows.append((key, row["task"], row["error"], row["model"], row["input"], begin))
                if [task for _, task, *_ in rows] == list(hashes):
                    is_ours = all(model == hashes[task] for _, task, _, model, *_ in rows)
                    if not any(error for _, _, error, *_ in rows) and is_ours:
                        saved[key] = Saved(row["input"], rows[0][-1], size)
                    rows = []
            file.truncate(size)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, csv.Error, RecursionError):
        raise InputError(
            f"{path}: not written by this command; give another --out, or --overwrite"
        ) from None
    return saved


def check_start(line, header, columns, jsonl):
    """Raise ValueError where a line without an end cannot be the beginning of one of ours."""
    if header:
        if not header.startswith(line):
            raise ValueError
    elif jsonl:
        start = f'{{"{columns[0]}": "'.encode()
        names = [name.encode() for name in columns]
        found = re.findall(rb'[{,] ?"([a-z0-9_-]+)": ', line)
        if not (line.startswith(start) or start.startswith(line)) or found != names[: len(found)]:
            raise ValueError
        if line.endswith(b"}") and list(parse_json(line)) != list(columns):
            raise ValueError


def put_in_order(path, saved, keys, header):
    """Rewrite a file of predictions: the rows of `keys`, in this order, and nothing else."""
    with (
        open_regular(path, most=None) as file,
        atomic(path) as temporary,
        open(temporary, "wb") as ordered,
    ):
        ordered.write(header.encode())
        for key in keys:
            file.seek(saved[key].begin)
            ordered.write(file.read(saved[key].end - saved[key].begin))


def open_output(path, resume):
    """The file of predictions, opened to append if `resume`.

    Raises:
        InputError: it cannot be written.
    """
    try:
        return open(path, "a" if resume else "w", encoding="utf-8", newline="")
    except OSError as error:
        raise unwritable(path, error) from None


def changed(exams, saved, counts):
    """Yields the exams whose rows are not in `saved`, and counts the others as "kept"."""
    known = {key: one.input for key, one in saved.items()}
    for exam in cli.progress(exams.each(known), "predict", total=len(exams)):
        if exam.unchanged:
            counts["kept"] += 1
        else:
            yield exam


def predict_each(exams, tasks, options):
    """Yields (exam, `predict_exam`'s rows and slices) of each exam."""
    for exam in exams:
        yield exam, predict_exam(exam, tasks, options)


def predict_beside_others(exam, saved_networks, options, hashes):
    """`predict_exam` in a process of --jobs or --cluster, which loads the networks once.

    Args:
        saved_networks: arguments of `load_once`.
        hashes: `models_of` the networks that the run began with.

    Raises:
        RunError: the networks are others.
    """
    tasks = load_once(*saved_networks)
    if models_of(tasks, options) != hashes:
        raise RunError(f"{saved_networks[0]}: not the networks that this run began with")
    return predict_exam(exam, tasks, options)


def predict_all(exams, predict, saved, file, as_line):
    """Write the rows of every exam that `saved` has not.

    Args:
        predict: function of an iterator of exams: yields (exam, rows and slices) in their order.
        saved: {(source, name): Saved}, brought up to date.
        file: text, at its end.
        as_line: function of a row: its text.

    Returns:
        Counter: exams "predicted", "kept" as they were, "failed" (not all planes could be used),
        and "slices".
    """
    counts = Counter()
    place = 0 if file is sys.stdout else file.tell()
    with closing(predict(changed(exams, saved, counts))) as predicted:
        for exam, (rows, slices) in predicted:
            errors = [row["error"] for row in rows if row["error"]]
            if errors:
                counts["failed"] += 1
                name = printable(f"{exam.source}/{exam.name}".lstrip("/"))
                tqdm.write(f"error: {name}: {errors[0]}", file=sys.stderr)
            counts["predicted"] += 1
            counts["slices"] += slices
            text = "".join(map(as_line, rows))
            with named_in_errors("stdout" if file is sys.stdout else file.name):
                file.write(text)
                file.flush()
            begin, place = place, place + len(text.encode())
            saved[exam.key] = Saved(exam.input, begin, place)
            exams.remove(exam)
    return counts


def write_rows(exams, predict, out, saved, header, as_line):
    """Predict into a file, or to stdout.

    Args:
        predict, as_line: as `predict_all`.
        out: Path; - is stdout.
        saved: {(source, name): Saved} to keep of what is there; None to begin anew.
        header: first line of the file.

    Returns:
        Counter as `predict_all`, and seconds.
    """
    to_stdout, resume = str(out) == "-", saved is not None
    saved = saved or {}
    with nullcontext(sys.stdout) if to_stdout else open_output(out, resume) as file:
        if to_stdout or file.tell() == 0:
            file.write(header)
        began = time.perf_counter()
        try:
            counts = predict_all(exams, predict, saved, file, as_line)
        except (KeyboardInterrupt, RunError) as error:
            if to_stdout:
                raise
            why = f"{error}; " if str(error) else ""
            message = f"{why}{counted(len(saved), 'exam')} saved in {out}. {cli.resume_with()}"
            raise type(error)(message) from None
        seconds = time.perf_counter() - began
    if resume:
        put_in_order(out, saved, exams, header)
    return counts, seconds


def why_not_all(exams, counts):
    """What could not be used, one line; "" where all could; `counts` as `predict_all`."""
    if exams.fault:
        return f"{exams.fault}; {counted(counts['failed'], 'exam')} without an answer, see `error`"
    return count_unusable(counts["failed"], exams.failed)


@cli.unwind_on_signals()
def run(args):
    """Predict, write the rows, and list what could not be used."""
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    args.device, args.precision = device.type, precision  # what "auto" became
    submission, sample = args.out, None
    if args.submission:
        sample = sample_for(args.submission, args.out, args.resume or args.overwrite)
        trained = saved_tasks(args.models_dir, args.recipes)
        args.task = [task for task in sample.tasks if task in trained] or sample.tasks
        args.partial = True
        args.out = args.out.with_name(f"{args.out.stem}-rows.csv")
        check_there(args.exams)
    options = Options(device, precision, args.partial)
    to_stdout, side_by_side = str(args.out) == "-", bool(args.cluster) or (args.jobs or 1) > 1
    where = torch.device("cpu") if side_by_side else device
    tasks = load_tasks(args.models_dir, args.task, where, args.recipes)
    hashes = models_of(tasks, options)
    if not to_stdout:
        find_target(args.out)
    if not (to_stdout or args.resume or args.overwrite) and args.out.exists():
        raise InputError(f"{args.out}: exists; --resume continues it, --overwrite replaces it")
    predict, at_once = partial(predict_each, tasks=tasks, options=options), 1
    if side_by_side:
        runner = Machines.of(vars(args)).pick(device.type, args.jobs, bytes_of_a_job())
        networks = args.models_dir, tuple(hashes), tuple(args.recipes), device.type
        about = {"saved_networks": networks, "options": options, "hashes": hashes}
        predict = partial(runner.map, partial(predict_beside_others, **about))
        at_once = runner.at_once
    args.workers = args.workers or default_importers(args.exams[0], at_once)
    header = "" if args.jsonl else csv_line(columns_for(tasks))

    def as_line(row):
        return as_text(row | {"model": hashes[row["task"]]}, args.jsonl)

    busy = f"{args.out}: another run predicts it; wait for that one"
    live = refreshed(submission, sample, args.out, tasks, args.resume) if sample else nullcontext()
    with nullcontext() if to_stdout else alone_at(args.out, busy):
        with live:
            saved = None
            if args.resume:
                saved = saved_exams(args.out, columns_for(tasks), hashes, args.jsonl)
            # Pipelines get rows and nothing else.
            log = partial(print, file=sys.stderr) if to_stdout else print
            if not to_stdout:
                cli.print_start_up(vars(args), device, precision)
                for models in tasks:
                    print_models(models)
            about = args.plane, tasks, args.allow_synthetic, log, args.workers
            with open_fit_exams(args.exams, *about) as exams:
                counts, seconds = write_rows(exams, predict, args.out, saved, header, as_line)
            log(summary_line(counts, seconds))
            unusable = why_not_all(exams, counts)
        if sample:
            why = unusable, submit(submission, sample, args.out, tasks)
            unusable = "; ".join(filter(None, why))
        if unusable:
            raise RunError(unusable)


def summary_line(counts, seconds):
    """What was done, and how fast; `counts` as `predict_all` returns it."""
    kept = f", {counts['kept']} were there" if counts["kept"] else ""
    line = f"{counted(counts['predicted'], 'exam')}{kept}"
    if counts["slices"]:
        line += f", {counts['slices']} slices in {seconds:.1f} s: "
        line += f"{counts['predicted'] / seconds:.1f} exams/s, "
        line += f"{1000 * seconds / counts['slices']:.2f} ms per slice"
    return line


def print_models(models):
    """Print what the networks were trained on and how the threshold was chosen."""
    for dataset in describe_datasets(models.datasets):
        print(f"{models.task:<10} trained on {dataset}")
    if models.stack:
        threshold = models.stack["thresholds"]
        print(f"{'':<10} threshold {one_line(threshold)}")


if __name__ == "__main__":
    cli.exit_with_status(lambda: run(parse_arguments()))
