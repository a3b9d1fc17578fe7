"""What train_logistic_regression.py and train.py wrote about a finding, read back."""

import csv
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

import numpy as np

from mrnet.documents import Count, Digest, FileName, FilePath, Probability, check, parse_json
from mrnet.errors import InputError, one_line
from mrnet.evaluation.metrics import answered, auc_difference, operating_point, roc_auc, summary
from mrnet.files import open_regular, read_text
from mrnet.layout.labels import is_positive
from mrnet.layout.names import RESULTS, predictions_path, results_path
from mrnet.layout.planes import SPLITS
from mrnet.networks.saved import digest_of
from mrnet.stacking.stacking import DIGITS, STACK, largest_combination, load_stack, order_of
from mrnet.training.checkpoint import load_model
from mrnet.training.config import selection_of
from mrnet.training.datasets import exams_of_any, labelled_sets

FORMAT = "mrnet-results-1"
FIELDS = ("split", "id", "label")  # of a predictions.csv, before the columns
ROUNDING = 10.0**-DIGITS  # at most, of a probability in a predictions.csv


GAIN = "stack against best plane"
RATES = ("sensitivity", "specificity", "accuracy")
INTERVALS = [f"{key}{end}" for key in ("auc", *RATES) for end in ("", "_low", "_high")]
Row = TypedDict(
    "Row",
    dict.fromkeys(("n", "positives", "tp", "fp", "tn", "fn"), Count)
    | dict.fromkeys((*INTERVALS, *(f"{key}_at_half" for key in RATES)), Probability)
    | dict.fromkeys(("threshold", "average_precision", "brier", "ece", "train_auc"), Probability),
)
Gain = TypedDict("Gain", {"plane": str, **dict.fromkeys(("value", "low", "high", "p"), float)})
Arguments = TypedDict("Arguments", {"data_dir": FilePath, **dict.fromkeys(
    ("task", "planes", "recipes", "features", "folds", "repeat", "seed", "sensitivity",
     "models_dir", "logs_dir", "device", "precision"), Any)})  # fmt: skip


class Content(TypedDict):
    """What train_logistic_regression.py writes as <task>-results.json."""

    format: Literal[FORMAT]
    task: str
    recipes: list[str]
    valid: dict[str, Row | Gain]  # as `evaluate_scores`
    caveats: list[str]
    other_thresholds: dict[str, Probability]  # {id: threshold} of exams that lack a plane
    folds: int
    git: str
    versions: dict[str, str]
    machine: str
    arguments: Arguments
    protocol: str
    thresholds: str  # which predictions chose them
    data: dict[str, str]  # {split: fingerprint of its exams}
    digests: dict[FileName, Digest]  # of the networks
    predictions: Digest  # of the predictions.csv beside it
    stack_auc_of_seeds: NotRequired[list[Probability]]


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
    content: Content
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


def read_content(path):
    """The Content of a <task>-results.json.

    Raises:
        InputError: damaged, or of another version.
    """
    path = Path(path)
    try:
        content = parse_json(read_text(path))
        check(Content, content)
        check(Row, content["valid"].get(STACK), f"valid.{STACK}")
        check(Gain, content["valid"].get(GAIN), f"valid.{GAIN}")
        if path != results_path(path.parent, content["task"], content["recipes"]):
            raise ValueError("task or recipes: not those of its file name")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: damaged, or of another version ({one_line(error)}); run "
            "train_logistic_regression.py again"
        ) from None
    return content


def read_results(path):
    """The Results of a <task>-results.json and of the files beside it.

    Raises:
        InputError: damaged, edited, or a file beside it is missing, damaged or of another run, a
            network among them.
    """
    path, again = Path(path), "run train_logistic_regression.py again"
    content = read_content(path)
    task, recipes = content["task"], content["recipes"]
    predictions = predictions_path(path.parent, task, recipes)
    ids, labels, scores = read_predictions(predictions)
    train_ids, train_labels, train_scores = read_predictions(predictions, "train")
    if digest_of(predictions) != content["predictions"]:
        raise InputError(f"{predictions}: edited, or not of {path.name}; {again}")
    stack = load_stack(path.parent, task, recipes)
    if any(content[key] != stack.get(key) for key in ("digests", "data", "thresholds")):
        raise InputError(f"{path}: not of the stack beside it; {again}")
    both = {"train": train_labels, "valid": labels}, {"train": train_scores, "valid": scores}
    try:
        check_figures(content, stack, ids, *both)
    except ValueError as error:
        why = one_line(error)
        raise InputError(f"{path}: not of {predictions.name} ({why}); {again}") from None
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
    train = train_ids, train_labels, train_scores
    return Results(path.parent, task, content, ids, labels, *train, scores, stack, networks)


def check_figures(content, stack, ids, labels, scores):
    """Refuse figures that the predictions do not give.

    Each is computed from the probabilities as they were written, and from those that are moved by
    what rounding may have changed, all for and all against the labels.

    Args:
        content: Content.
        ids: of the validation exams.
        labels: {split: float64 (n,)}.
        scores: {split: {column, and "stack": float64 (n,)}}.

    Raises:
        ValueError: with the first figure that is wrong.
    """
    written, others = content["valid"], content["other_thresholds"]
    if written.keys() - {GAIN} != scores["valid"].keys():
        raise ValueError("valid: other columns")
    thresholds = {name: written[name]["threshold"] for name in scores["valid"]}
    fitted = stack["combinations"]
    if thresholds[STACK] != fitted[largest_combination(fitted)]["threshold"]:
        raise ValueError(f"valid.{STACK}.threshold: not the stack's")
    if not set(others.values()) <= {one["threshold"] for one in fitted.values()}:
        raise ValueError("other_thresholds: not the stack's")
    if not others.keys() <= set(ids):
        raise ValueError("other_thresholds: of other exams")
    own = np.array([others.get(exam_id, thresholds[STACK]) for exam_id in ids])
    found = []
    for shift in (0, -ROUNDING, ROUNDING):
        moved = {
            split: {
                name: np.clip(values + shift * (2 * labels[split] - 1), 0, 1)
                for name, values in columns.items()
            }
            for split, columns in scores.items()
        }
        found.append(evaluate_scores(labels, moved, thresholds, own))
    planes = [one[GAIN].pop("plane") for one in found]
    if written[GAIN]["plane"] not in planes:
        raise ValueError(f"valid.{GAIN}.plane: not the best")
    for name in scores["valid"]:
        check_row(f"valid.{name}", written[name], [one[name] for one in found])
    if set(planes) == {written[GAIN]["plane"]}:
        check_row(f"valid.{GAIN}", written[GAIN], [one[GAIN] for one in found])


def check_row(place, written, found):
    """Refuse a row's figures that are far from all of those that were found, by more than these
    differ. Raises ValueError."""
    for key in found[0]:
        values = [one[key] for one in found]
        slack = max(values) - min(values) + 1e-6
        if not min(values) - slack <= written[key] <= max(values) + slack:
            raise ValueError(f"{place}.{key}: {written[key]}, and not {values[0]:.8g}")


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
            reader = csv.DictReader(file, strict=True)
            names = [name for name in reader.fieldnames or () if name not in FIELDS]
            rows = [
                (row["id"], [probability_in(row, name) for name in ("label", *names)])
                for row in reader
                if row["split"] == split
            ]
        ids, values = zip(*sorted(rows), strict=True)
        labels, *columns = np.array(values).T
        scores = dict(zip(names, columns, strict=True))
        if len(set(ids)) < len(ids) or not all(map(str.isdecimal, ids)):
            raise ValueError("an id that is there twice, or is no number")
        stack = scores[STACK]
        if np.isnan(labels).any() or (split == "valid" and np.isnan(stack).any()):
            raise ValueError("an exam without a label or without the stack's probability")
    except (OSError, LookupError, TypeError, ValueError, csv.Error) as error:
        raise InputError(
            f"{path}: no predictions of {split} exams ({one_line(error)}); "
            "train_logistic_regression.py writes them"
        ) from None
    return list(ids), is_positive(labels).astype(float), scores


def probability_in(row, name):
    """A cell as a number from 0 to 1, NaN if it is empty. Raises ValueError."""
    try:
        value = float(row[name] or "nan")
    except ValueError:
        value = math.inf
    if row[name] and not 0 <= value <= 1:  # nor if it says nan
        raise ValueError(f"exam {row['id']!r:.40}, {name}: {row[name]!r:.40} is not from 0 to 1")
    return value
