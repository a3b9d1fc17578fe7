"""One finding's stack, from its networks' predictions: fit it, apply it, choose thresholds."""

import numpy as np

from mrnet.errors import InputError
from mrnet.evaluation.metrics import answered, sigmoid
from mrnet.layout.labels import is_positive
from mrnet.layout.planes import SPLITS
from mrnet.stacking.stacking import (
    STACK,
    combine_all,
    fit_combinations,
    largest_combination,
    of_both_classes,
    planes_of_exams,
    threshold_for,
)


def make_stack(task, kind, logits, labels, tuning, sensitivity=None):
    """Fit and apply one stack.

    Args:
        kind: one of FEATURES.
        logits: {split: {column: {planes: float64 (n, networks)}}}, as ColumnLogits has them.
        labels: {split: float32 (n,)}.
        tuning, sensitivity: as `stacking.fit_combinations` takes them.

    Returns:
        the stack as `stacking.save_stack` takes it, {split: {name: probabilities}} with the
        columns and the stack, {name: threshold}, and the stack's threshold of each validation exam,
        (m,): another where it lacks a plane.

    Raises:
        InputError: `refuse_unanswered`.
    """
    combinations = fit_combinations(kind, logits["train"], labels["train"], tuning, sensitivity)
    stack = {"task": task, "features": kind, "combinations": combinations}
    scores, thresholds = {}, {}
    for split in SPLITS:
        whole = {column: next(iter(found.values())) for column, found in logits[split].items()}
        scores[split] = {column: sigmoid(values).mean(axis=1) for column, values in whole.items()}
        scores[split][STACK], own = combine_all(stack, logits[split])
        refuse_unanswered(task, split, logits[split], scores[split][STACK])
    for column in logits["train"]:
        found = answered(labels["train"], scores["train"][column], np.where(tuning, 1.0, 0.0))
        known, p, ours = found
        thresholds[column] = threshold_for(known, p, ours > 0, sensitivity)
    thresholds[STACK] = combinations[largest_combination(combinations)]["threshold"]
    return stack, scores, thresholds, own


def refuse_unanswered(task, split, logits, stacked):
    """Raise InputError for exams with planes that no regression could be fitted for, which a table
    of all exams must not leave out.

    Args:
        logits: {column: {planes: float64 (n, networks)}}.
        stacked: float64 (n,), NaN for such exams.
    """
    if len(planes := np.unique(planes_of_exams(logits)[np.isnan(stacked)])):
        raise InputError(
            f"{task}: {np.isnan(stacked).sum()} {split} exams have only {' or '.join(planes)}, and "
            "the training exams that have these planes are of one class, so they cannot be "
            f"stacked; leave them out of {split}-{task}.csv"
        )


def tuning_mask(train_set, found):
    """The training exams that thresholds are chosen on: bool (n,), all False where there are none.

    Those that were kept to select the epoch of the only network of each column: no network was
    trained on them, and what is applied later is these very networks.

    Args:
        found: {column: [ColumnLogits, one per seed]}.
    """
    tuning = np.zeros(len(train_set), bool)
    if max(len(ones) for ones in found.values()) > 1:
        return tuning
    found = [one for ones in found.values() for one in ones]
    rows = train_set.rows_of(set().union(*(one.tuning for one in found)))
    for one in found:  # each has all of those exams that it has planes of
        logits = next(iter(one.train.values()))[rows, 0]
        if np.isfinite(logits).sum() != len(train_set.rows_of(one.tuning)):
            return tuning
    tuning[rows] = True
    return tuning


def folds_of(train_set, found):
    """The fold of each training exam, int (n,): that of the first seed where there are several.

    Args:
        found: {column: [ColumnLogits, one per seed]}; an exam that lacks a plane is in those of its
            other planes only.
    """
    known = {}
    for first, *_ in found.values():
        known = first.folds | known
    return np.array([known[exam_id] for exam_id in train_set.ids])


def names_untuned(combinations, scores, labels, tuning):
    """Columns and sets of planes whose thresholds the tuning exams could not choose, because those
    that have these planes are of one class.

    Args:
        combinations: as `stacking.fit_combinations` returns them.
        scores: {column: probabilities (n,)} of the training exams, NaN where planes are missing.
        labels: float32 (n,).
        tuning: bool (n,).
    """
    chosen = {
        column: of_both_classes(labels[tuning & ~np.isnan(values)])
        for column, values in scores.items()
        if column != STACK
    }
    chosen |= {planes: one["tuned"] for planes, one in combinations.items()}
    return [name for name, is_tuned in chosen.items() if not is_tuned]


def join_seeds(found):
    """Put the logits of several seeds side by side.

    Args:
        found: {column: [ColumnLogits, one per seed]}.

    Returns:
        {split: {column: {planes: float64 (n, networks)}}}
    """
    return {
        split: {
            column: {
                planes: np.concatenate([getattr(one, split)[planes] for one in ones], axis=1)
                for planes in getattr(ones[0], split)
            }
            for column, ones in found.items()
        }
        for split in SPLITS
    }


def labels_of(exams):
    """Labels of the only finding, 0 or 1: float32 (n,)."""
    return is_positive(exams.labels[:, 0]).astype(np.float32)
