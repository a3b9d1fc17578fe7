"""Which exams train a network, select its epoch and report on it: protocols, folds, groups.

`article` selects the epoch on the validation exams that are reported (optimistic); `held-out`
selects it on a tenth of the training exams. With folds, each network is trained without its fold,
whose exams are out-of-fold for it. Exams of one group (a patient, a scanner) are never split.
"""

from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from dataloader import MRDataset
from mrnet.errors import InputError, counted
from mrnet.files import write_csv
from mrnet.layout.labels import GROUPS, is_positive
from mrnet.layout.names import list_runs

PROTOCOLS = ("article", "held-out")
TUNING_PARTS = 10  # held-out: one part in ten of the training exams selects the epoch
TUNING_SEED = 1000  # added to the seed, so that folds and tuning exams do not depend on each other


def split_exams(labels, parts, seed, groups=None):
    """Stratified folds: the rows that each of `parts` leaves out, int arrays that cover all rows.

    Args:
        labels: float (n,) or (n, tasks), 0 to 1 or unknown (NaN). With several findings the folds
            are stratified by their combinations.
        groups: (n,), exams of one group go to one fold; None where each exam is one of its own.

    Raises:
        InputError: too few exams or groups of a class: a fold would hold one class only.
    """
    columns = labels.reshape(len(labels), -1).T  # (n, tasks) -> (tasks, n)
    rarer = min(rarer_class(column) for column in columns)
    if rarer < parts:
        raise InputError(
            f"{parts} folds of {len(labels)} exams: the rarer class has {counted(rarer, 'exam')}, "
            f"so a fold would hold one class only; use at most {counted(rarer, 'fold')}"
        )
    rows, labels = np.zeros(len(labels)), strata(columns, parts)
    if groups is None or len(set(groups)) == len(labels):
        folds = StratifiedKFold(parts, shuffle=True, random_state=seed).split(rows, labels)
    else:
        if len(set(groups)) < parts:
            raise InputError(
                f"{parts} folds of {counted(len(set(groups)), 'group')} (train-{GROUPS}.csv): use "
                "fewer folds, or correct the groups"
            )
        folds = StratifiedGroupKFold(parts, shuffle=True, random_state=seed)
        folds = folds.split(rows, labels, groups)
    left_out = [out for _, out in folds]
    if any(rarer_class(column[out]) == 0 for column in columns for out in left_out):
        raise InputError(
            f"{parts} folds of {len(labels)} exams in {counted(len(set(groups)), 'group')}: a "
            f"fold would hold one class only; use fewer folds, or correct train-{GROUPS}.csv"
        )
    return left_out


def rarer_class(labels):
    """Number of exams of the rarer class, those with unknown labels left out; labels (n,)."""
    return int(min(is_positive(labels).sum(), (labels < 0.5).sum()))


def strata(columns, parts):
    """The class that folds are stratified by: labels (tasks, n) -> int (n,).

    Combinations of findings that fewer than `parts` exams have are one class together.
    """
    classes = is_positive(columns) + 2 * np.isnan(columns)  # 0, 1, or 2 for unknown
    _, codes, counts = np.unique(classes, axis=1, return_inverse=True, return_counts=True)
    codes = codes.reshape(-1)
    return np.where(counts[codes] < parts, -1, codes)


@dataclass
class Split:
    """The exams of one network."""

    seed: int
    fold: int  # 1 to folds; 0 where there is one network only
    train_set: MRDataset
    selection_set: MRDataset  # selects the epoch and stops the training
    valid_set: MRDataset
    out_of_fold: list  # ids of the training exams that this network is not trained on
    tuning: list  # ids of those in `selection_set`, where these are not the validation exams
    suffix: str  # of its files, a Run's

    @property
    def selected_on(self):
        """What the selection exams are called in tables and curves: "valid" or "tune"."""
        return "valid" if self.selection_set is self.valid_set else "tune"

    @property
    def data_sets(self):
        return {"train": self.train_set, "selection": self.selection_set, "valid": self.valid_set}

    def finding(self, task):
        """`data_sets` for one finding of several."""
        return {name: exams.finding(task) for name, exams in self.data_sets.items()}

    def random_seed(self, epoch=0):
        """Seed of everything random in an epoch: it follows from seed, fold and epoch, so resuming
        an epoch needs no generator's state."""
        return (self.seed * 1009 + self.fold) * 100_003 + epoch


def fingerprints_of(data_sets):
    """{name: MRDataset.fingerprint()} of {name: MRDataset}."""
    return {name: exams.fingerprint() for name, exams in data_sets.items()}


def plan_splits(train_set, valid_set, protocol, folds, seeds, select="auc"):
    """A Split for each network: folds within seeds.

    Args:
        protocol: one of PROTOCOLS.
        folds: int; 1 for a single network that is trained on all training exams.
        seeds: range of int.
        select: one of SELECTIONS; exams that select an epoch must have a label of each finding.

    Raises:
        InputError: too few exams of a class, or none with a label of a finding to select on.
    """
    ids, labels, groups = train_set.listed
    groups, splits = np.array(groups), []

    def there(rows):
        """The same exams as rows of `train_set`, less those that it has no volume of."""
        return train_set.rows_of([ids[row] for row in rows])

    def left_out():
        """The rows that each network is not trained on, in the order of `list_runs`."""
        for seed in seeds:
            yield from split_exams(labels, folds, seed, groups) if folds > 1 else [()]

    for run, out in zip(list_runs(folds, seeds), left_out(), strict=True):
        rows = np.setdiff1d(np.arange(len(ids)), out)
        selection_set, tuning = valid_set, ()
        if protocol == "held-out":
            tuning = tuning_rows(labels, rows, run.seed, groups)
            selection_set = train_set.subset(there(tuning), transform=None)
            rows = np.setdiff1d(rows, tuning)
        splits.append(
            Split(
                seed=run.seed,
                fold=run.fold,
                train_set=train_set.subset(there(rows), transform=train_set.transform),
                selection_set=selection_set,
                valid_set=valid_set,
                out_of_fold=[train_set.ids[row] for row in there(out)],
                tuning=[train_set.ids[row] for row in there(tuning)],
                suffix=run.suffix,
            )
        )
    for split in splits if select == "auc" else ():
        check_selection(split)
    return splits


def check_selection(split):
    """Raise InputError where the exams that select a Split's epoch have no label of one of the
    findings: a plane that many exams lack may have lost all of them."""
    exams = split.selection_set
    for task, column in zip(exams.tasks, exams.labels.T, strict=True):
        if np.isnan(column).all():
            other = ", or use --protocol article" if split.selected_on == "tune" else ""
            raise InputError(
                f"none of the {len(exams)} exams that select the epoch has both this plane and a "
                f"label of {task}; leave this finding out{other}"
            )


def numbered(splits, wanted=None):
    """(number from 1, Split) of each of `splits`, or only of those whose numbers are wanted.

    Raises:
        InputError: there is no such number.
    """
    if wrong := [number for number in wanted or () if number > len(splits)]:
        raise InputError(f"--networks {wrong[0]}: --folds and --repeat make {len(splits)} only")
    pairs = list(enumerate(splits, start=1))
    return [pair for pair in pairs if pair[0] in wanted] if wanted else pairs


def tuning_rows(labels, rows, seed, groups):
    """The part of `rows` that selects the epoch: int array.

    Args:
        labels: (n,) or (n, tasks); groups: (n,), of all training exams.
        rows: int array, the training exams that are not out-of-fold.

    Raises:
        InputError: fewer than TUNING_PARTS exams of a class.
    """
    ours = labels[rows]
    for column in ours.reshape(len(ours), -1).T:
        if rarer_class(column) < TUNING_PARTS:
            raise InputError(
                f"--protocol held-out: needs {TUNING_PARTS} training exams of each class (there "
                f"are {len(column)}, {int(is_positive(column).sum())} positive); use --protocol "
                "article"
            )
    return rows[split_exams(ours, TUNING_PARTS, seed + TUNING_SEED, groups[rows])[0]]


def write_folds(path_of, splits):
    """CSVs of seed,id,fold: which network was not trained on which exam; none without folds.

    Args:
        path_of: function of a seed, the path of its CSV.
    """
    rows = {}
    for one in splits:
        rows.setdefault(one.seed, []).extend((one.seed, i, one.fold) for i in one.out_of_fold)
    for seed, found in rows.items():
        if found:
            write_csv(path_of(seed), [("seed", "id", "fold"), *found])
