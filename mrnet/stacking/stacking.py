"""Combine the networks of a finding: features, logistic regression, thresholds, decision, files.

Its inputs are columns: a plane's networks of one recipe ("sagittal", "sagittal-vgg16"), or those
that join several planes ("axial+sagittal"). A stack has a logistic regression for each set of
planes that an exam may have. It is JSON, and holds the hashes of the networks that it was fitted
on.

Sources: Bien et al., PLOS Medicine 2018: logistic regression on the three planes' probabilities.
Out-of-fold stacking: Wolpert, "Stacked generalization", Neural Networks 5(2), 1992.
"""

import itertools
from contextlib import suppress
from typing import Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from mrnet.documents import Digest, FileName, Probability, as_json, check, parse_json
from mrnet.errors import InputError, one_line
from mrnet.evaluation.metrics import choose_threshold, sigmoid
from mrnet.files import read_text, write_text
from mrnet.layout.names import ARTICLE, stack_path
from mrnet.layout.planes import ALL_PLANES, in_order

FORMAT = "mrnet-stack-6"
FEATURES = ("probability", "logit")
STACK = "stack"  # its column, beside those of planes
DIGITS = 8  # of a probability, where it is written


# --- fit and apply --------------------------------------------------------------------------------


def combinations_of(planes):
    """Each set of planes that an exam may have, joined by +, small ones first: list.

    Args:
        planes: all of them, container.
    """
    ours = in_order(planes)
    sizes = range(1, len(ours) + 1)
    return ["+".join(part) for size in sizes for part in itertools.combinations(ours, size)]


def order_of(planes):
    """Sort key of planes joined by +: single ones first, then as `combinations_of`."""
    places = [ALL_PLANES.index(plane) for plane in planes.split("+")]
    return len(places), places


def is_combination_name(name):
    """Whether `name` is a set of planes as `combinations_of` writes it."""
    return name != "" and "+".join(in_order(name.split("+"))) == name


def stack_features(kind, logits):
    """Inputs of the regression: [(n, networks) of each column] -> float64 (n, columns).

    Args:
        kind: "probability", the mean of the networks' probabilities, or "logit", of their logits.
    """
    values = sigmoid if kind == "probability" else np.asarray
    return np.stack([values(one).mean(axis=1) for one in logits], axis=1)


def restrict(planes, there):
    """The planes of "axial+sagittal" that an exam has, in the same form; "" for none.

    Args:
        there: container of planes.
    """
    return "+".join(plane for plane in planes.split("+") if plane in there)


def fit_combinations(kind, logits, labels, tuning, sensitivity=None):
    """Fit a regression for each set of planes, so that an exam that lacks a plane has one too.

    Args:
        kind: as `stack_features`.
        logits: {column: {planes: float64 (n, networks)}} of the training exams: first from all the
            planes that the column's networks take, then from those sets of planes that they can
            also do with. Sets of planes that no column can do with get no regression. NaN for
            exams that lack a plane: a regression is fitted on those that have all of its planes.
        labels: float32 (n,), 0 or 1.
        tuning: bool (n,), the exams that thresholds are chosen on and regressions not fitted on;
            all False: both are done on all exams.
        sensitivity: as `threshold_for`.

    Returns:
        {"axial+coronal+sagittal": {"columns", "coefficients", "intercept", "threshold",
        "tuned"}, ...}; tuned: whether the tuning exams chose the threshold.
    """
    combinations, has = {}, planes_of_exams(logits)
    possible = {plane for found in logits.values() for plane in next(iter(found)).split("+")}
    for name in combinations_of(possible):
        columns = {
            column: found[key]
            for column, found in logits.items()
            if (key := restrict(next(iter(found)), name.split("+"))) in found
        }
        if not columns:
            continue
        x = stack_features(kind, columns.values())
        there = np.array([set(name.split("+")) <= set(planes.split("+")) for planes in has])
        there &= np.isfinite(x).all(axis=1)
        if not of_both_classes(labels[there & ~tuning]):
            continue  # too few exams have all of these planes
        fitted = LogisticRegression().fit(x[there & ~tuning], labels[there & ~tuning])
        probabilities = fitted.predict_proba(x[there])[:, 1]
        combinations[name] = {
            "columns": list(columns),
            "coefficients": fitted.coef_[0].tolist(),
            "intercept": float(fitted.intercept_[0]),
            "threshold": threshold_for(labels[there], probabilities, tuning[there], sensitivity),
            "tuned": of_both_classes(labels[there & tuning]),
        }
    return combinations


def planes_of_exams(logits):
    """The planes that each exam has, joined by +: str (n,).

    Args:
        logits: {column: {planes: float64 (n, networks)}}, as `fit_combinations` takes them.
    """
    n = len(next(iter(next(iter(logits.values())).values())))
    there = [set() for _ in range(n)]
    for found in logits.values():
        # With plane dropout the full set is evaluated for every exam, so only the subsets tell
        # which planes an exam has.
        for planes in list(found)[1:] or found:
            for row in np.flatnonzero(np.isfinite(found[planes][:, 0])):
                there[row].update(planes.split("+"))
    return np.array(["+".join(in_order(one)) for one in there])


def combine_all(stack, logits):
    """Apply a stack to exams, each with the planes that it has; logits as above.

    Returns:
        float64 (n,) stacked probabilities, and the threshold of each, (n,): NaN where the stack has
        no regression for the planes that an exam has.
    """
    there = planes_of_exams(logits)
    stacked, thresholds = np.full((2, len(there)), np.nan)
    for planes in np.unique(there):
        rows = there == planes
        ours = {
            column: found[key][rows]
            for column, found in logits.items()
            if (key := restrict(next(iter(found)), planes.split("+"))) in found
        }
        with suppress(KeyError):  # no regression of these planes
            stacked[rows], thresholds[rows] = combine(stack, planes.split("+"), ours)
    return stacked, thresholds


def cross_fitted(kind, logits, labels, folds):
    """What regressions that were not fitted on a training exam say about it: each fold's exams are
    stacked by those of the other folds' exams.

    Args:
        kind, logits, labels: as `fit_combinations` takes them.
        folds: int (n,), of each exam.

    Returns:
        float64 (n,) stacked probabilities, NaN where the other folds' exams are too few for a
        regression of the planes that an exam has.
    """
    stacked = np.empty(len(labels))
    for fold in np.unique(folds):
        others = folds != fold
        nobody = np.zeros(others.sum(), bool)
        fitted = fit_combinations(kind, take_exams(logits, others), labels[others], nobody)
        stack = {"features": kind, "combinations": fitted}
        stacked[~others], _ = combine_all(stack, take_exams(logits, ~others))
    return stacked


def take_exams(logits, rows):
    """The logits of some exams: {column: {planes: (n, networks)}} -> the same, less exams."""
    return {
        column: {planes: values[rows] for planes, values in found.items()}
        for column, found in logits.items()
    }


def threshold_for(labels, probabilities, tuning, sensitivity=None):
    """A threshold chosen on training predictions, never on the exams that are reported.

    Args:
        labels, probabilities: (n,).
        tuning: bool (n,), the exams to choose on; all of them if these are not of both classes.
        sensitivity: as `choose_threshold` takes it.
    """
    if of_both_classes(labels[tuning]):
        labels, probabilities = labels[tuning], probabilities[tuning]
    return choose_threshold(labels, probabilities, sensitivity)


def of_both_classes(labels):
    """Whether there are positive and negative labels; labels (n,), 0 or 1."""
    return len(set(labels)) == 2


def combine(stack, planes, logits):
    """Apply a stack to the planes that exist.

    Args:
        stack: a Stack.
        planes: of the exams, container of at least one.
        logits: {column: float64 (n, networks)}.

    Returns:
        float64 (n,) stacked probability, and the threshold of this set of planes.

    Raises:
        KeyError: the stack has no regression for this set of planes.
    """
    combination = stack["combinations"][combination_of(stack, planes)]
    columns = [logits[column] for column in combination["columns"]]
    features = stack_features(stack["features"], columns)
    score = features @ np.asarray(combination["coefficients"]) + combination["intercept"]
    return expit(score), combination["threshold"]


def combination_of(stack, planes):
    """The largest set of planes within `planes` that a stack has a regression for.

    Raises:
        KeyError: it has none.
    """
    within = [name for name in stack["combinations"] if set(name.split("+")) <= set(planes)]
    if not within:
        raise KeyError("+".join(planes))
    return largest_combination(within)


def largest_combination(names):
    """The set of most planes; of equals the first."""
    return max(names, key=lambda name: name.count("+"))


class Decision(NamedTuple):
    """A stack's answer for one exam."""

    probability: float
    threshold: float
    label: str  # "positive" or "negative"
    planes: list  # that it was made from


def decide(stack, planes, logits):
    """The Decision of a stack for one exam; None if it cannot do with these planes.

    Args:
        stack: a Stack.
        planes: of the exam, container of at least one.
        logits: {column: [float, one for each network]}.
    """
    columns = {column: np.array([values]) for column, values in logits.items()}
    try:
        used = combination_of(stack, planes).split("+")
    except KeyError:
        return None
    (stacked,), threshold = combine(stack, used, columns)
    label = "positive" if stacked >= threshold else "negative"
    return Decision(float(stacked), threshold, label, used)


# --- files ----------------------------------------------------------------------------------------


class Combination(TypedDict):
    """The regression of a set of planes."""

    columns: list[str]
    coefficients: list[float]  # of each column
    intercept: float
    threshold: Probability
    tuned: NotRequired[bool]  # whether the tuning exams chose the threshold


class Stack(TypedDict):
    """What save_stack writes."""

    format: Literal[FORMAT]
    task: str
    features: Literal[FEATURES]
    combinations: dict[str, Combination]  # of each set of planes, such as "axial+sagittal"
    base_models: dict[str, list[FileName]]  # of each column's networks
    digests: dict[FileName, Digest]  # of these files
    thresholds: str  # which predictions chose them
    # How it was made; `predict.py` does not need it.
    folds: NotRequired[int]
    recipes: NotRequired[list[str]]
    git: NotRequired[str]
    versions: NotRequired[dict[str, str]]
    machine: NotRequired[str]
    arguments: NotRequired[dict]
    protocol: NotRequired[str]
    data: NotRequired[dict[str, str]]


def save_stack(path, stack):
    """Write a Stack, all but its format, as JSON."""
    write_text(path, as_json({"format": FORMAT, **stack}, indent=2) + "\n")


def load_stack(models_dir, task, recipes):
    """A task's Stack.

    Raises:
        InputError: missing, damaged, of another version, or not a stack of this task.
    """
    path = stack_path(models_dir, task, recipes)
    again = f"train_logistic_regression.py --task {task}"
    again += f" --recipes {' '.join(recipes)}" if tuple(recipes) != (ARTICLE,) else ""
    try:
        stack = parse_json(read_text(path))
        check(Stack, stack)
        check_stack(stack, task)
    except FileNotFoundError:
        raise InputError(f"{path}: no such stack; run `python {again}`") from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: damaged, of another version, or not a stack of {task} ({one_line(error)}); "
            "run train_logistic_regression.py again"
        ) from None
    return stack


def check_stack(stack, task):
    """Refuse a Stack whose parts do not fit together. Raises ValueError."""
    files = [name for names in stack["base_models"].values() for name in names]
    columns = {column: planes_in(column) for column in stack["base_models"]}
    for is_wrong, fault in (
        (stack["task"] != task, f"task: it is of {stack['task']!r:.40}"),
        (not stack["combinations"], "combinations: there are none"),
        (not all(stack["base_models"].values()), "base_models: a column has no networks"),
        (not all(columns.values()), "base_models: a column's name has no plane"),
        (sorted(files) != sorted(stack["digests"]), "digests: not one of each of base_models"),
    ):
        if is_wrong:
            raise ValueError(fault)
    for name, one in stack["combinations"].items():
        place = f"combinations.{name:.40}"
        if not is_combination_name(name):
            raise ValueError(f"{place}: not a set of planes")
        if not 0 < len(set(one["columns"])) == len(one["columns"]) == len(one["coefficients"]):
            raise ValueError(f"{place}: not one coefficient of each of some columns")
        for column in one["columns"]:
            if not columns.get(column, set()) & set(name.split("+")):
                raise ValueError(
                    f"{place}.columns: no networks of {column!r:.40} that take one of its planes"
                )


def planes_in(column):
    """The planes that a column's networks take, by its name: set, empty for no column's."""
    names = column.split("+")
    # A recipe's name follows the last plane, whose own may have a sequence: "sagittal-t1-best".
    parts = names[-1].split("-")
    last = ["-".join(parts[:n]) for n in (2, 1) if "-".join(parts[:n]) in ALL_PLANES]
    planes = [*names[:-1], *last[:1]]
    return set(planes) if last and set(planes) <= set(ALL_PLANES) else set()
