"""The table of all findings: AUC of each plane and the stack, and their mean over the findings.

Labels that a data set has of its own and labels that were derived, from reports or by another
network, are tables of their own: a figure of both says nothing about either. Which are which stands
in <data folder>/own-labels.csv (data/rsna/prepare.py); without it all labels are alike.
"""

from typing import NamedTuple

import numpy as np
from tabulate import tabulate

from mrnet.evaluation.metrics import answered, auc_interval, mean_auc_interval
from mrnet.reports.report import PUBLISHED

ALL, OWN, DERIVED = "", "the set's own labels", "derived labels"


class Part(NamedTuple):
    """The validation exams whose labels have one origin."""

    title: str  # ALL, OWN or DERIVED
    ids: list
    labels: np.ndarray  # float64 (n, findings), 0, 1 or NaN where there is no such label
    scores: dict  # {column, and "stack": float64 (n, findings)}, NaN where there is no answer


def parts_of(found, own):
    """The Part of all exams, or those of own and of derived labels.

    Args:
        found: [Results], one a finding.
        own: as `description.read_own_labels` returns it.
    """
    ids = sorted({exam_id for results in found for exam_id in results.ids}, key=int)
    row_of = {exam_id: row for row, exam_id in enumerate(ids)}
    names = list(dict.fromkeys(name for results in found for name in results.rows))
    labels = np.full((len(ids), len(found)), np.nan)
    scores = {name: np.full(labels.shape, np.nan) for name in names}
    is_own = np.zeros(labels.shape, bool)
    for k, results in enumerate(found):
        rows = [row_of[exam_id] for exam_id in results.ids]
        labels[rows, k] = results.labels
        for name in results.rows:
            scores[name][rows, k] = results.scores[name]
        is_own[rows, k] = [i in (own or {}).get(results.task, ()) for i in results.ids]
    if own is None:
        return [Part(ALL, ids, labels, scores)]
    pairs = (OWN, is_own), (DERIVED, ~is_own)
    return [Part(title, ids, np.where(kept, labels, np.nan), scores) for title, kept in pairs]


def means_of(part):
    """{column, and "stack": {"value", "low", "high", "findings", "n"}}: the mean AUC over the
    findings that have both classes; a column without any is left out."""
    means = {}
    for name, scores in part.scores.items():
        kept = [k for k in range(scores.shape[1]) if has_both_classes(part, name, k)]
        if kept:
            interval = mean_auc_interval(part.labels[:, kept], scores[:, kept])
            known = ~np.isnan(part.labels[:, kept]) & ~np.isnan(scores[:, kept])
            n = int(known.any(axis=1).sum())
            means[name] = interval._asdict() | {"findings": len(kept), "n": n}
    return means


def has_both_classes(part, name, finding):
    """Whether an AUC of this column and finding (its index) exists."""
    known = ~np.isnan(part.labels[:, finding]) & ~np.isnan(part.scores[name][:, finding])
    return len(np.unique(part.labels[known, finding])) == 2


def rows_of(part, protocol, means):
    """Rows of the table: who, protocol, a cell for each finding, the mean."""
    counts = [f"{(~np.isnan(column)).sum()} ({int(np.nansum(column))})" for column in part.labels.T]
    origin = f", {part.title}" if part.title else ""
    yield [f"exams (positive){origin}", "", *counts, ""]
    for name, scores in part.scores.items():
        cells = []
        for k in range(scores.shape[1]):
            cell = "-"
            if has_both_classes(part, name, k):
                known = ~np.isnan(part.labels[:, k])
                pair = answered(part.labels[known, k], scores[known, k])
                cell = "{:.3f} [{:.3f}, {:.3f}]".format(*auc_interval(*pair))
            cells.append(cell)
        mean = means.get(name)
        cells.append("{value:.3f} [{low:.3f}, {high:.3f}]".format(**mean) if mean else "-")
        yield [f"ours, {name}{origin}", protocol, *cells]


def markdown(found, own=None):
    """The table beside the published figures, and the means.

    Args:
        found: [Results], one a finding.
        own: as `read_own_labels` returns it.

    Returns:
        text, and {title of a part, "all" where there is one only: means_of it}.
    """
    first = found[0].content
    protocol = f"{first['protocol']}, folds {first['folds']}"
    if any(results.selection for results in found):
        protocol += " (optimistic)"
    rows, means = [], {}
    for part in parts_of(found, own):
        means[part.title or "all"] = means_of(part)
        rows += rows_of(part, protocol, means[part.title or "all"])
    tasks = [results.task for results in found]
    for who, how, figures in PUBLISHED:
        cells = [f"{figures[task]:.3f}" if task in figures else "" for task in tasks]
        if any(cells):
            rows.append([who, how, *cells, ""])
    heads = ["who", "protocol", *tasks, f"mean of {len(tasks)}"]
    if len(tasks) == 1:
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    table = tabulate(rows, heads, tablefmt="pipe", disable_numparse=True)
    notes = "Validation AUC [95 % interval, DeLong]"
    if len(tasks) > 1:
        notes += "; the mean's from all of them and their correlations"
    fewer = {m["findings"] for one in means.values() for m in one.values()} - {len(tasks)}
    if any(len({m["n"] for m in one.values()}) > 1 for one in means.values()):
        notes += "; a plane's figures are of the exams that have it"
    if fewer:
        notes += "; a mean leaves out the findings that have one class only (-)"
    return f"{table}\n\n{notes}. Published figures are those of MRNet's exams.\n", means
