"""What train_logistic_regression.py and train.py wrote about a finding, read back."""

import csv
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.checkpoint import digest_of, load_model
from common.config import selection_of
from common.datasets import exams_of_any, labelled_sets
from common.errors import InputError, one_line
from common.files import open_regular, read_text
from common.labels import is_positive
from common.metrics import answered, auc_difference, operating_point, roc_auc, summary
from common.names import RESULTS, predictions_path, results_path
from common.planes import SPLITS
from common.stacking import STACK, load_stack, order_of

NEEDED = {"data", "digests", "other_thresholds"}  # keys of the figures, beside those below


GAIN = "stack against best plane"
RATES = ("sensitivity", "specificity", "accuracy")


def evaluate_scores(labels, scores, thresholds, own):
    """Metrics of each plane and the stack on the validation exams, and the stack's gain.

    Args:
        labels: {split: float32 (n,)}.
        scores, thresholds, own: as `train_logistic_regression.make_stack` returns them.

    Returns:
        {name: dict of numbers} with the planes, the stack and "stack against best plane".
    """
    rows = {}
    for name in scores["valid"]:
        known, p = answered(labels["valid"], scores["valid"][name])
        row = summary(known, p, thresholds[name])
        called = p >= (own if name == STACK else thresholds[name])  # as predict.py decides
        decided = operating_point(known, called.astype(float), 0.5)
        for key in RATES:
            row |= zip((key, f"{key}_low", f"{key}_high"), getattr(decided, key), strict=True)
        row |= {key: getattr(decided, key) for key in ("tp", "fp", "tn", "fn")}
        row["train_auc"] = roc_auc(*answered(labels["train"], scores["train"][name]))
        half = operating_point(known, p, 0.5)
        row |= {f"{key}_at_half": getattr(half, key).value for key in RATES}
        rows[name] = row
    columns = [name for name in rows if name != STACK]
    best = max(columns, key=lambda column: rows[column]["train_auc"])
    both = answered(labels["valid"], scores["valid"][STACK], scores["valid"][best])
    gain = auc_difference(*both)
    return rows | {GAIN: {"plane": best} | gain._asdict()}


class Results(NamedTuple):
    """A finding's stack: its figures, its predictions, its networks."""

    folder: Path  # of the models
    task: str
    content: dict  # of <task>-results.json
    ids: list  # of the validation exams, without leading zeros
    labels: np.ndarray  # float64 (n,) 0 or 1
    train_ids: list  # of the training exams that the stack was fitted on
    train_labels: np.ndarray
    train_scores: dict  # as `scores`
    scores: dict  # {column, and "stack": probabilities float64 (n,), NaN where a plane lacks}
    stack: dict  # as stacking.load_stack returns it
    networks: list  # of each network (column, metadata)

    @property
    def rows(self):
        """{column, and "stack": metrics of the validation exams}"""
        return {name: row for name, row in self.content["valid"].items() if "auc" in row}

    @property
    def called(self):
        """Whether the stack calls each exam positive, as predict.py does: bool (n,). An exam that
        lacks a plane has the threshold of the planes that it has."""
        whole, others = self.rows[STACK]["threshold"], self.content["other_thresholds"]
        thresholds = np.array([others.get(exam_id, whole) for exam_id in self.ids])
        return self.scores[STACK] >= thresholds

    @property
    def selection(self):
        """What the validation exams decided in the trainings: `selection_of`; "" for nothing."""
        optimistic = [one for _, one in self.networks if one["protocol"] == "article"]
        return selection_of([one["arguments"] for one in optimistic])

    def trained_on(self, column, metadata):
        """The training exams that one of the networks was trained on: bool (n,). Those of its
        fold and those that selected its epoch are not; nor those that lack its planes."""
        unused = {*metadata["out_of_fold"], *metadata["tuning"]}
        is_used = np.array([exam_id not in unused for exam_id in self.train_ids])
        return is_used & ~np.isnan(self.train_scores[column])

    @property
    def data_dir(self):
        """The data folder that the stack was fitted on."""
        return Path(self.content["arguments"]["data_dir"])

    def why_not_at(self, data_dir):
        """Why the exams of a data folder are not those that the stack was fitted on, "" if they
        are: others may have the same numbers."""
        wanted = sorted({metadata["plane"] for _, metadata in self.networks}, key=order_of)
        try:
            exams = exams_of_any(labelled_sets(data_dir, self.task, wanted), data_dir, self.task)
        except InputError as error:
            return one_line(error)
        if all(exams[split].fingerprint() == self.content["data"][split] for split in SPLITS):
            return ""
        return f"{data_dir} has other exams or labels than those that the stack was fitted on"


def find_results(sources):
    """Paths of the *-results.json that folders hold, or that are named themselves.

    Raises:
        InputError: a folder without any, or no such file.
    """
    found = []
    for source in map(Path, sources):
        paths = sorted(source.glob(f"*{RESULTS}")) if source.is_dir() else [source]
        if not paths or not all(path.is_file() and path.name.endswith(RESULTS) for path in paths):
            raise InputError(
                f"{source}: no results of a stack; give a folder of models, or a <task>{RESULTS} "
                "that train_logistic_regression.py wrote"
            )
        found += paths
    return found


def read_results(path):
    """The Results of a <task>-results.json and of the files beside it.

    Raises:
        InputError: damaged, or a file beside it is missing, damaged or of another run, a network
            among them.
    """
    path = Path(path)
    try:
        content = json.loads(read_text(path))
        task, recipes = content["task"], content["recipes"]
        count, _ = content["valid"][STACK]["n"], content["arguments"]["data_dir"]
        if path != results_path(path.parent, task, recipes) or not content.keys() >= NEEDED:
            raise ValueError
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise InputError(
            f"{path}: damaged, or of another version; run train_logistic_regression.py again"
        ) from None
    predictions = predictions_path(path.parent, task, recipes)
    ids, labels, scores = read_predictions(predictions)
    if len(ids) != count:
        raise InputError(
            f"{predictions}: not of {path.name}; run train_logistic_regression.py again"
        )
    stack = load_stack(path.parent, task, recipes)
    if content["digests"] != stack["digests"]:
        again = "run train_logistic_regression.py again"
        raise InputError(f"{path}: not of the stack beside it; {again}")
    networks = [
        (column, load_model(path.with_name(name), task, column)[1])
        for column, names in stack["base_models"].items()
        for name in names
    ]
    for name, digest in content["digests"].items():
        if digest_of(path.with_name(name)) != digest:
            raise InputError(
                f"{path.with_name(name)}: trained again after the stack was fitted; run "
                f"train_logistic_regression.py --task {task} again"
            )
    train = read_predictions(predictions, "train")
    return Results(path.parent, task, content, ids, labels, *train, scores, stack, networks)


def read_predictions(path, split="valid"):
    """The exams of one split of a predictions.csv.

    Returns:
        ids, labels float64 (n,) 0 or 1, and {name: probabilities float64 (n,)}, sorted by id; NaN
        where a plane's networks have no answer.

    Raises:
        InputError: not such a file.
    """
    try:
        with open_regular(path, "r", newline="", encoding="utf-8") as file:
            rows = sorted(
                (row for row in csv.DictReader(file) if row["split"] == split),
                key=lambda row: row["id"],
            )
        labels = is_positive(np.array([float(row["label"]) for row in rows])).astype(float)
        names = [name for name in rows[0] if name not in ("split", "id", "label")]
        scores = {name: np.array([float(row[name] or "nan") for row in rows]) for name in names}
        is_whole = np.isfinite(scores[STACK]).all() or split != "valid"
        if not is_whole or np.isinf(list(scores.values())).any():
            raise ValueError
    except (OSError, LookupError, TypeError, ValueError, csv.Error):
        raise InputError(
            f"{path}: no predictions of {split} exams; train_logistic_regression.py writes them"
        ) from None
    return [row["id"] for row in rows], labels, scores
