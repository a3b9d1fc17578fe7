"""What limits a stack's figures: a line each, printed below its table and kept with its results."""

from collections import Counter

import numpy as np

from mrnet.evaluation.metrics import BELOW_CHANCE
from mrnet.layout.description import read_own_labels
from mrnet.stacking.results import GAIN
from mrnet.training.config import SELECTED

STAR = "*"  # beside each threshold: explained below the table


def threshold_source(tuning, untuned, decided, folds, repeat):
    """Which predictions the thresholds were chosen on, and what that means for new exams.

    Args:
        tuning: bool (n,), the training exams that were meant to choose them.
        untuned: `names_untuned`.
        decided: by these exams in the trainings, as `selection_of` says it.
    """
    if tuning.any():
        but = (
            f"; but of {', '.join(untuned)}, whose tuning exams are of one class, on all training "
            "exams with these planes, so not to be trusted on new exams"
        )
        return (
            f"chosen on {int(tuning.sum())} training exams that no network was trained on"
            f"{f'; they {decided}' if decided else ''}{but if untuned else ''}"
        )
    if folds > 1:
        return (
            "chosen on out-of-fold predictions of single networks and applied to means "
            f"of {folds * repeat}, which vary less: on new exams sensitivity and "
            "specificity may differ from those aimed at"
        )
    return (
        "chosen on exams that the networks were trained on, so not to be trusted on new exams; "
        "folds, or the protocol held-out, give better ones"
    )


def list_caveats(decided, folds, thresholds, scores, groups, derived=()):
    """What limits the table's figures, one line each.

    Args:
        decided: by the validation exams in the trainings, as `selection_of` says it.
        thresholds: `threshold_source`.
        scores: {column: probabilities (n,)} of the validation exams.
        groups: of the validation exams, list.
        derived: more lines, of `derived_caveats` and `below_chance`.
    """
    caveats = [f"{STAR} thresholds: {thresholds}"]
    lacking = np.isnan(list(scores.values())).any(axis=0)
    if lacking.any():
        caveats.append(
            f"{lacking.sum()} of {len(lacking)} validation exams lack a plane: a plane's figures "
            "are of the exams that have it, the stack's of all"
        )
    sizes = Counter(groups)
    if in_company := sum(size for size in sizes.values() if size > 1):
        caveats.append(
            f"{in_company} of the {len(groups)} validation exams share a group (a patient, a "
            "scanner) with another (valid-groups.csv): intervals take exams as independent and are "
            "too narrow"
        )
    caveats += derived
    if decided == SELECTED:
        caveats.append("OPTIMISTIC: the epochs were selected on the validation exams reported here")
    elif decided:
        caveats.append(f"OPTIMISTIC: the validation exams reported here {decided}")
    if folds == 1:
        caveats.append(
            "the stack was fitted on exams that the networks were trained on (the article)"
        )
    return caveats


def below_chance(rows):
    """A line on the planes, and the stack, that are worse than chance; none where there are none.

    Args:
        rows: as `evaluate_scores` returns them.
    """
    names = [name for name in rows if name != GAIN and rows[name]["auc_high"] < 0.5]
    if names:
        yield f"WARNING: {', '.join(names)}: {BELOW_CHANCE}"


def derived_caveats(exams):
    """Lines on labels of one finding that are not the set's own; none where all are alike.

    Args:
        exams: {split: MRDataset}.

    Raises:
        InputError: `read_own_labels`.
    """
    for split, name in (("valid", "validation"), ("train", "training")):
        (task,), own = exams[split].tasks, read_own_labels(exams[split].root)
        count = len(exams[split].ids)
        derived = 0 if own is None else len(set(exams[split].ids) - own.get(task, set()))
        if derived:
            which = "an AUC on both kinds says nothing about either"
            if derived == count:
                which = "agreement with them is measured, not truth"
            yield (
                f"{derived} of the {count} {name} labels are derived, not the set's own "
                f"(own-labels.csv): {which}"
            )
