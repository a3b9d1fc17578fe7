"""The validation exams as a sweep's networks see them: looked at once, for the final recipes.

    python -m tools.sweep_valid benchmarks/final-seeds

A recipe is chosen out of fold (`tools/sweep_table.py`), never here: validation exams are too few to
tell recipes apart, and whoever looks twice has chosen by them. Of each seed the networks of all
folds are averaged, which saw four fifths of the training exams each where there are five, and a
recipe's planes are stacked by the regression of their out-of-fold probabilities, as
train_logistic_regression.py does. The columns are those of the sweep's table.
"""

import sys
from pathlib import Path

import numpy as np
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it finds its own folder only

from common import cli
from common.errors import InputError
from common.stacking import STACK
from tools.sweep_table import Row, columns_of, place_of, print_lines, read_about, read_results


def parse_arguments():
    parser = cli.make_parser(__doc__)
    parser.add_argument("folder", type=Path, help="what tools/sweep.py wrote")
    return parser.parse_args()


def read_valid_labels(folder):
    """{finding: {id: 0 or 1}} of the validation exams.

    Raises:
        InputError: an earlier version's sweep, which did not record them.
    """
    labels = read_about(folder).get("valid")
    if labels is None:
        raise InputError(
            f"{folder / 'sweep.json'}: has no labels of the validation exams; run tools/sweep.py "
            "again with the same sweep, data and --out, which trains nothing that is there"
        )
    return labels


def valid_row(row, content, task, ids):
    """The Row of the validation exams, means over the folds, from that of the training exams.

    Args:
        content: of its recipe's file.
        ids: of the validation exams.

    Raises:
        InputError: an earlier version's networks, which do not say of which exams they are.
    """
    place = {exam_id: i for i, exam_id in enumerate(ids)}
    seen = [[] for _ in row.scores]
    for key, network in content["networks"].items():
        planes, seed, _ = place_of(key, content)
        if planes != row.column:
            continue
        of_network = network.get("valid_ids", {}).get(task, ids)
        if len(of_network) != len(network["valid"][task]):
            raise InputError(
                f"{row.recipe}, {key}: {len(network['valid'][task])} of {len(ids)} validation "
                "exams, and nothing tells which; train it again"
            )
        scores = np.full(len(ids), np.nan)
        for exam_id, value in zip(of_network, expit(network["valid"][task]), strict=True):
            if exam_id in place:  # its label is known
                scores[place[exam_id]] = value
        seen[seed].append(scores)
    scores = np.full((len(seen), len(ids)), np.nan)
    for seed in np.flatnonzero(row.complete):
        scores[seed] = np.mean(seen[seed], axis=0)
    return row._replace(scores=scores, folds=np.where(np.isnan(scores), 0, 1))


def valid_stack(rows, valid_rows, truth):
    """The Row of a recipe's stack on the validation exams, fitted on the training exams.

    Args:
        rows, valid_rows: of its planes, in the same order.
        truth: int (n,) of the training exams.
    """
    x, x_valid = (np.stack([one.scores for one in each], axis=-1) for each in (rows, valid_rows))
    scores = np.full(x_valid.shape[:2], np.nan)
    for seed in range(len(x)):
        there = ~np.isnan(x[seed]).any(axis=1)
        valid = ~np.isnan(x_valid[seed]).any(axis=1)
        if there.any() and valid.any():
            fitted = LogisticRegression().fit(x[seed, there], truth[there])
            scores[seed, valid] = fitted.predict_proba(x_valid[seed, valid])[:, 1]
    seconds = sum(row.mean_seconds for row in rows)
    memory = max(row.peak_memory for row in rows)
    return Row(rows[0].recipe, STACK, scores, np.where(np.isnan(scores), 0, 1), [seconds], memory)


def all_valid_rows(labels, valid_labels, recipes, task):
    """int (n,) labels of the validation exams, and every Row of a finding on them."""
    truth, valid_truth = (np.array(list(of[task].values())) for of in (labels, valid_labels))
    columns = columns_of(labels, recipes, task)
    found = {
        key: valid_row(row, recipes[key[0]], task, list(valid_labels[task]))
        for key, row in columns.items()
    }
    rows = list(found.values())
    for recipe in recipes:
        keys = [key for key in columns if key[0] == recipe]
        if len(keys) > 1:
            parts = ([of[key] for key in keys] for of in (columns, found))
            rows.append(valid_stack(*parts, truth))
    return valid_truth, rows


def run(args):
    labels, _, recipes = read_results(args.folder)
    valid_labels = read_valid_labels(args.folder)
    for task in labels:
        truth, rows = all_valid_rows(labels, valid_labels, recipes, task)
        print(f"\n{task}: {len(truth)} validation exams, {truth.sum()} positive")
        print_lines(truth, rows)


if __name__ == "__main__":
    cli.exit_with_status(lambda: run(parse_arguments()))
