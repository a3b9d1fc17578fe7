"""Compare two sets of predictions for the same exams: a difference, or chance?

    python -m tools.compare models/acl-predictions.csv other/acl-predictions.csv

Reads the CSVs that train_logistic_regression.py writes and prints, for each plane and the stack,
the validation AUC of both, their difference with its 95 % interval and p (paired DeLong), and both
Brier scores.
"""

import sys
from pathlib import Path

from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it finds its own folder only

from mrnet.errors import InputError
from mrnet.evaluation.metrics import answered, auc_difference, brier, roc_auc
from mrnet.runtime import cli
from mrnet.stacking.results import read_predictions


def parse_arguments():
    parser = cli.make_parser(__doc__)
    parser.add_argument("first", type=Path, help="<task>-predictions.csv of one run")
    parser.add_argument("second", type=Path, help="of another run, on the same exams")
    return parser.parse_args()


def run(args):
    """Print one row for each plane and the stack."""
    ids, labels, first = read_predictions(args.first)
    other_ids, other_labels, second = read_predictions(args.second)
    if ids != other_ids or (labels != other_labels).any():
        raise InputError(
            f"{args.second}: other exams or labels than {args.first}; "
            "give predictions of the same exams"
        )
    print(f"{len(labels)} validation exams, {int(labels.sum())} positive")
    rows = []
    for name in (name for name in first if name in second):
        known, *pair = answered(labels, first[name], second[name])
        gain = auc_difference(known, pair[1], pair[0])
        interval = f"{gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"
        aucs = [roc_auc(known, scores) for scores in pair]
        errors = [brier(known, scores) for scores in pair]
        rows.append([name, *aucs, interval, f"{gain.p:.2f}", *errors])
    heads = ["", "AUC first", "AUC second", "second - first [95 %]", "p", "Brier first"]
    heads += ["Brier second"]
    print(tabulate(rows, heads, floatfmt=".4f", disable_numparse=[4]))


if __name__ == "__main__":
    cli.exit_with_status(lambda: run(parse_arguments()))
