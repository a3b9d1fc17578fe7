"""Combine the networks of a finding: features, logistic regression, thresholds, decision, files.

A stack has a logistic regression for each set of planes that an exam may have. It is JSON, and
holds the hashes of the networks that it was fitted on.

Sources: Bien et al., PLOS Medicine 2018: logistic regression on the three planes' probabilities.
Out-of-fold stacking: Wolpert, "Stacked generalization", Neural Networks 5(2), 1992.
"""

import hashlib
import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from common.checkpoint import digest_of, load_model, model_path
from common.engine import sigmoid
from common.errors import InputError
from common.files import write_text
from common.metrics import choose_threshold
from dataloader import PLANES

FORMAT = "mrnet-stack-3"
FORMATS = (FORMAT, "mrnet-stack-2", "mrnet-stack-1")  # that can be read
ROUNDED_LOGITS = "mrnet-stack-1"  # its logits had gone through rounded probabilities
FEATURES = ("probability", "logit")
# Each set of planes that an exam may have.
COMBINATIONS = [
    "+".join(planes)
    for size in range(1, len(PLANES) + 1)
    for planes in itertools.combinations(PLANES, size)
]


# --- fit and apply --------------------------------------------------------------------------------


def stack_features(kind, planes, logits):
    """Inputs of the regression: {plane: (n, networks)} -> float64 (n, planes).

    Args:
        kind: "probability", the mean of the networks' probabilities, or "logit", of their logits.
    """
    values = sigmoid if kind == "probability" else np.asarray
    return np.stack([values(logits[plane]).mean(axis=1) for plane in planes], axis=1)


def fit_combinations(kind, logits, labels, tuning, sensitivity=None):
    """Fit a regression for each set of planes, so that an exam that lacks a plane has one too.

    Args:
        kind: as `stack_features`.
        logits: {plane: float64 (n, networks)} of the training exams.
        labels: float32 (n,), 0 or 1.
        tuning: bool (n,), the exams that thresholds are chosen on and regressions not fitted on;
            all False: both are done on all exams.
        sensitivity: as `threshold_for`.

    Returns:
        {"axial+coronal+sagittal": {"coefficients", "intercept", "threshold"}, ...}
    """
    combinations = {}
    for name in COMBINATIONS:
        x = stack_features(kind, name.split("+"), logits)
        fitted = LogisticRegression().fit(x[~tuning], labels[~tuning])
        probabilities = fitted.predict_proba(x)[:, 1]
        combinations[name] = {
            "coefficients": fitted.coef_[0].tolist(),
            "intercept": float(fitted.intercept_[0]),
            "threshold": threshold_for(labels, probabilities, tuning, sensitivity),
        }
    return combinations


def threshold_for(labels, probabilities, tuning, sensitivity=None):
    """A threshold chosen on training predictions, never on the exams that are reported.

    Args:
        labels, probabilities: (n,).
        tuning: bool (n,), the exams to choose on; all of them if all False.
        sensitivity: to reach on these exams; None for the greatest sensitivity + specificity.
    """
    if tuning.any():
        labels, probabilities = labels[tuning], probabilities[tuning]
    if sensitivity is None:
        return choose_threshold(labels, probabilities)
    return choose_threshold(labels, probabilities, "sensitivity", sensitivity)


def combine(stack, logits):
    """Apply a stack to the planes that exist.

    Args:
        stack: dict as `load_stack` returns it.
        logits: {plane: float64 (n, networks)}, at least one plane.

    Returns:
        float64 (n,) stacked probability, and the threshold of this set of planes.
    """
    planes = [plane for plane in PLANES if plane in logits]
    combination = stack["combinations"]["+".join(planes)]
    features = stack_features(stack["features"], planes, logits)
    score = features @ np.asarray(combination["coefficients"]) + combination["intercept"]
    return expit(score), combination["threshold"]


class Decision(NamedTuple):
    """A stack's answer for one exam."""

    probability: float
    threshold: float
    label: str  # "positive" or "negative"


def decide(stack, logits):
    """The Decision of a stack for one exam.

    Args:
        stack: dict as `load_stack` returns it.
        logits: {plane: [float, one for each network]}, at least one plane.
    """
    columns = {plane: np.array([values]) for plane, values in logits.items()}
    (stacked,), threshold = combine(stack, columns)
    return Decision(float(stacked), threshold, "positive" if stacked >= threshold else "negative")


# --- files ----------------------------------------------------------------------------------------


def stack_path(models_dir, task):
    """Path of a task's stack."""
    return Path(models_dir) / f"{task}-stack.json"


def save_stack(path, stack):
    """Write a stack (plain dict) as JSON."""
    write_text(path, json.dumps({"format": FORMAT, **stack}, indent=2) + "\n")


def load_stack(models_dir, task):
    """A task's stack.

    Returns:
        dict with at least `task`; `features`, "probability" or "logit"; `base_models`, the file
        names of each plane's networks; `digests`, the SHA-256 of each of these files; and
        `combinations`, for each set of planes ("axial+sagittal") its `coefficients`, `intercept`
        and `threshold`.

    Raises:
        InputError: missing, damaged, or not a stack of this task.
    """
    path = stack_path(models_dir, task)
    try:
        stack = json.loads(path.read_text(encoding="utf-8"))
        if "members" in stack:  # as earlier versions called them
            stack["base_models"] = stack.pop("members")
        is_valid = is_stack(stack) and stack["task"] == task
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such stack; run `python train_logistic_regression.py --task {task}`"
        ) from None
    except (OSError, ArithmeticError, ValueError, LookupError, TypeError, AttributeError,
            RecursionError):  # fmt: skip
        is_valid = False
    if not is_valid:
        raise InputError(
            f"{path}: damaged, or not a stack of {task}; run train_logistic_regression.py again"
        )
    if stack["format"] == ROUNDED_LOGITS and stack["features"] == "logit":
        raise InputError(
            f"{path}: fitted on rounded logits by an earlier version; run "
            f"`python train_logistic_regression.py --task {task} --features logit` again"
        )
    return stack


def is_stack(content):
    """Whether parsed JSON has all that `load_stack` promises; raises many kinds if not."""
    return (
        content["format"] in FORMATS
        and content["features"] in FEATURES
        and content["combinations"].keys() == set(COMBINATIONS)
        and all(is_combination(planes, c) for planes, c in content["combinations"].items())
        and content["base_models"].keys() <= set(PLANES)
        and isinstance(content["digests"], dict)
        and all(is_file_name(f) for files in content["base_models"].values() for f in files)
    )


def is_combination(planes, content):
    """Whether a combination of `planes` holds finite numbers, one coefficient per plane."""
    numbers = [*content["coefficients"], content["intercept"], content["threshold"]]
    return len(numbers) == len(planes.split("+")) + 2 and all(
        type(number) in (int, float) and math.isfinite(number) for number in numbers
    )


def is_file_name(name):
    """Whether a network's file name stays in its folder."""
    return isinstance(name, str) and Path(name).name == name and name.endswith(".pt")


# --- everything of a task -------------------------------------------------------------------------


class TaskModels(NamedTuple):
    """Everything saved for one task."""

    task: str
    networks: dict  # plane -> [(MRNet in evaluation mode, its intensity), ...]; several with folds
    stack: dict | None  # as `load_stack` returns it
    digest: str  # of the files of all networks and the stack, 12 hex digits
    datasets: list  # that the networks were trained on: dataset.json's content, None if unknown

    @property
    def is_synthetic(self):
        """Whether any of the networks was trained on synthetic exams."""
        return any(dataset is not None and dataset["synthetic"] for dataset in self.datasets)


def saved_tasks(models_dir):
    """Names of the tasks that have a stack or a model of a plane, sorted.

    Raises:
        InputError: there is none.
    """
    folder = Path(models_dir)
    endings = ["-stack.json", *(f"-{plane}.pt" for plane in PLANES)]
    names = {p.name.removesuffix(end) for end in endings for p in folder.glob(f"*{end}")}
    if not names:
        raise InputError(
            f"{folder}: no saved models; run `make demo`, or train.py and "
            "train_logistic_regression.py, or give another --models-dir"
        )
    return sorted(names)


def load_task(models_dir, task, device="cpu"):
    """The networks of a task, on `device`, and its stack if there is one: TaskModels.

    Raises:
        InputError: no such task, or a saved model that is damaged or of another task or plane.
    """
    folder = Path(models_dir)
    if task not in saved_tasks(folder):
        raise InputError(
            f"{folder}: no models of task '{task}'; tasks here: {', '.join(saved_tasks(folder))}"
        )
    stack = load_stack(folder, task) if stack_path(folder, task).is_file() else None
    if stack:
        paths = {
            plane: [folder / name for name in names]
            for plane, names in stack["base_models"].items()
        }
    else:
        paths = {plane: [model_path(folder, task, plane)] for plane in PLANES}
        paths = {plane: found for plane, found in paths.items() if found[0].is_file()}
    networks, digests, datasets = {}, [], []
    for plane in paths:
        loaded = [load_model(path, task, plane) for path in paths[plane]]
        for path in paths[plane]:
            digests.append(digest_of(path))
            if stack and stack["digests"].get(path.name) != digests[-1]:
                raise InputError(
                    f"{path}: trained again after the stack was fitted; run python "
                    f"train_logistic_regression.py --task {task} with the same arguments"
                )
        networks[plane] = [(model.to(device), meta["intensity"]) for model, meta in loaded]
        for _, meta in loaded:
            if meta.get("dataset") not in datasets:
                datasets.append(meta.get("dataset"))
    if stack:
        digests.append(digest_of(stack_path(folder, task)))
    digest = hashlib.sha256(" ".join(digests).encode()).hexdigest()[:12]
    return TaskModels(task, networks, stack, digest, datasets)
