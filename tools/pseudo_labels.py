"""What networks say about exams that they were not trained on, as labels for the next networks.

    python predict.py data/rsna --models-dir models/reproduce --out rows.csv
    python -m tools.pseudo_labels ~/rsna/train.csv --rows rows.csv --out teacher.csv
    python data/rsna/prepare.py ~/rsna data/rsna2 --labels reports.csv --labels teacher.csv

Reads the <task>-predictions.csv that train_logistic_regression.py wrote beside the networks, takes
the training exams' out-of-fold probabilities of the stack, and writes a CSV with train.csv's
columns, a probability or nothing each. Networks without folds saw every training exam, and theirs
are refused. A training study whose label is unknown was in no fold and has no such probability:
--rows, what predict.py says about the same data folder, is the answer of all folds' networks, none
of which saw a label of it; it is taken for these studies only. Validation exams get none, so that
no network is judged by what networks say: give what labels them (reports.csv) as well. For RSNA's
knee set, whose studies' UIDs are turned into the exams' names.
"""

import csv
import math
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it finds its own folder only

from mrnet.errors import InputError
from mrnet.files import open_regular, write_csv
from mrnet.inference.submission import task_of
from mrnet.layout.arguments import add_recipes_argument
from mrnet.layout.labels import exam_number, label_rows
from mrnet.layout.names import exam_name, predictions_path, results_path
from mrnet.runtime import cli
from mrnet.scans.register import Register
from mrnet.scans.rsna_tables import FINDINGS, STUDY, read_table
from mrnet.stacking.results import read_content, read_predictions
from mrnet.stacking.stacking import STACK

DIGITS = 4  # of a probability


def parse_arguments():
    parser = cli.make_parser(__doc__)
    parser.add_argument("studies", type=Path, help="the set's train.csv: the studies to label")
    parser.add_argument(
        "--data-dir", type=Path, default=Path("data/rsna"), help="what prepare.py made of the set"
    )
    parser.add_argument(
        "--models-dir", type=Path, default=Path("models/reproduce"), help="networks with folds"
    )
    add_recipes_argument(parser)
    rows = "CSV that predict.py wrote of --data-dir with these networks: labels for the training "
    rows += "studies that have none"
    parser.add_argument("--rows", type=Path, metavar="CSV", help=rows)
    parser.add_argument("--out", type=Path, required=True, help="CSV to write")
    return parser.parse_args()


def out_of_fold(models_dir, task, recipes):
    """{exam's number: probability} of the training exams with a label, None where the other folds
    have no answer; {} where the task has no stack.

    Raises:
        InputError: the networks have no folds, or a file is damaged.
    """
    results = results_path(models_dir, task, recipes)
    path = predictions_path(models_dir, task, recipes)
    if not results.is_file():
        return {}
    if read_content(results)["folds"] < 2:
        raise InputError(
            f"{results}: networks without folds were trained on these exams; train with --folds 5"
        )
    ids, _, scores = read_predictions(path, "train")
    answers = (None if math.isnan(p) else p for p in scores[STACK].tolist())
    return dict(zip(map(exam_number, ids), answers, strict=True))


def answers_in(path):
    """{task: {exam's number: probability}} of the training exams in a file of predict.py's.

    Raises:
        InputError: no such file, or without an answer about a training exam.
    """
    found = defaultdict(dict)
    try:
        with open_regular(path, "r", newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["source"].split("/")[-1] == "train" and row["stack"]:
                    found[row["task"]][exam_number(row["exam"])] = float(row["stack"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, csv.Error):
        raise InputError(f"{path}: not a CSV of predict.py; make it with --out") from None
    if not found:
        raise InputError(
            f"{path}: no stack's answer about an exam in train/; give predict.py the data folder"
        )
    return found


def without_label(answers, data_dir, task):
    """Of {exam's number: probability} those whose exam has no label of the task, which networks may
    have seen."""
    if not (data_dir / f"train-{task}.csv").is_file():
        return answers
    rows = label_rows(data_dir, task, "train")
    seen = {int(row.exam_id) for row in rows if not row.fault and not math.isnan(row.label)}
    return {number: value for number, value in answers.items() if number not in seen}


def run(args):
    """Write one row a study, in the order of the studies' file."""
    studies = [row[STUDY] for row in read_table(args.studies, (STUDY,)).rows]
    register = Register(args.data_dir)
    if not register.rows:
        raise InputError(f"{register.path}: no register of a prepared set; see --data-dir")
    numbers = {exam: number for exam, (number, _) in register.rows.items()}
    answers = answers_in(args.rows) if args.rows else {}
    own, columns = {}, {}
    for name in FINDINGS:
        task = task_of(name)
        own[name] = out_of_fold(args.models_dir, task, args.recipes)
        others = without_label(answers.get(task, {}), args.data_dir, task)
        columns[name] = others | own[name]
    if not any(own.values()):
        raise InputError(f"{args.models_dir}: no stack of any finding; run reproduce.py first")
    rows = []
    for uid in studies:
        number = numbers.get(exam_name(uid))
        found = [column.get(number) for column in columns.values()]
        rows.append([uid, *("" if value is None else f"{value:.{DIGITS}f}" for value in found)])
    write_csv(args.out, [[STUDY, *FINDINGS], *rows])
    for name, column in columns.items():
        others = len(column) - len(own[name])
        there = len(own[name]) - list(own[name].values()).count(None)
        words = f"{there} exams out of fold, {others} without a label"
        print(f"{name:<17} {words if column else 'no stack'}")
    labelled = sum(any(row[1:]) for row in rows)
    print(f"written  {args.out}: {len(rows)} studies, {labelled} of them with a label")


if __name__ == "__main__":
    cli.exit_with_status(lambda: run(parse_arguments()))
