"""The table of a sweep: each recipe's out-of-fold AUC against the article's, with intervals.

    python -m tools.sweep_table benchmarks/search         # what tools/sweep.py wrote there
    python -m tools.sweep_table benchmarks/final --plot docs/recipes.png
    python -m tools.sweep_table benchmarks/final --without benchmarks/search

Each row is a column of networks (a plane, or planes joined by +) or a stack of columns; every exam
is predicted by networks that were not trained on it. A stack's regression is fitted on the
out-of-fold predictions of the other folds (cross-fitted): never on the labels that it is judged by,
though the networks of the other folds were trained on these.

AUC: over all exams at once (mean and standard deviation over the seeds), and within the folds, each
of which has a network of its own. The difference to the article's recipe is that of the mean AUCs,
with DeLong's paired 95 % interval; with two seeds or more what they change in this difference is
added (`metrics.mean_auc_difference`), and p is adjusted for the number of rows (Holm). Time is that
of one core with nothing beside it (user + system time), "–" where no network's is known because the
sweep was killed; memory is the largest resident size.
"""

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, StratifiedKFold, cross_val_predict
from tabulate import tabulate

from common import cli
from common.errors import InputError, one_line
from common.figures import cost_figure
from common.files import atomic, read_text
from common.metrics import Difference, brier, holm, mean_auc_difference, roc_auc
from common.names import ARTICLE
from common.stacking import STACK

HEADS = ("recipe", "network", "AUC (SD)", "in a fold", "- article's [95 %]", "p", "Holm", "Brier",
         "time", "GB")  # fmt: skip
VIEWS = ", views"  # end of the name of a row of means over random views
CERTAIN = 0.05  # of dropping a recipe that is behind by chance, after one fold
AVERAGED_FOLDS = 5  # of the stack of averaged seeds, whose folds differ


def parse_arguments():
    parser = cli.make_parser(__doc__)
    parser.add_argument("folder", type=Path, help="what tools/sweep.py wrote")
    plot = "also draw AUC against training time: a PNG, one a finding where they are several"
    parser.add_argument("--plot", type=Path, help=plot)
    parser.add_argument(
        "--without",
        type=Path,
        metavar="FOLDER",
        help="leave out the exams that this sweep has predicted: what its recipes were chosen on "
        "cannot judge the choice",
    )
    return parser.parse_args()


class Row(NamedTuple):
    """One line of the table before it is compared."""

    recipe: str
    column: str  # planes of its networks, or "stack"
    scores: np.ndarray  # float64 (seeds, n) probabilities, NaN where there are none yet
    folds: np.ndarray  # int (seeds, n), 0 where there is none
    cpu_seconds: list  # of each network, where known; of a stack: of those of one fold, summed
    peak_memory: float  # bytes
    is_average: bool = False  # its one run is of averaged seeds, not of the first seed

    @property
    def known(self):
        """Of how many exams each seed has predictions: int (seeds,)."""
        return (~np.isnan(self.scores)).sum(axis=1)

    @property
    def complete(self):
        """The seeds that have as many predictions as the fullest, bool (seeds,): with others that
        have just begun, seeds would be compared on the few exams that all have predicted."""
        return (self.known > 0) & (self.known == self.known.max())

    @property
    def mean_seconds(self):
        """Mean of `cpu_seconds`, NaN where none is known."""
        return np.mean(self.cpu_seconds) if self.cpu_seconds else np.nan

    @property
    def runs(self):
        """The complete seeds: float64 (runs, n), int (runs, n) folds."""
        return self.scores[self.complete], self.folds[self.complete]


class Line(NamedTuple):
    """One line of the table."""

    row: Row
    aucs: list  # of each seed
    in_folds: float  # mean AUC within the folds of all seeds: each fold is one network's
    gain: Difference | None  # to the article's recipe
    adjusted: float | None  # p of the gain for the number of lines
    brier: float
    time: float | None  # of the article's, NaN where one of them is not known

    def cells(self):
        """Text of each of HEADS."""
        spread = f" ({np.std(self.aucs, ddof=1):.3f})" if len(self.aucs) > 1 else ""
        gain = ["", "", ""]
        if self.gain:
            interval = f"[{self.gain.low:+.3f}, {self.gain.high:+.3f}]"
            gain = [f"{self.gain.value:+.3f} {interval}", f"{self.gain.p:.4f}"]
            gain.append(f"{self.adjusted:.3f}")
        time = "" if self.time is None else "–" if np.isnan(self.time) else f"{self.time:.2f}"
        return [
            self.row.recipe, self.row.column, f"{np.mean(self.aucs):.3f}{spread}",
            f"{self.in_folds:.3f}", *gain, f"{self.brier:.3f}",
            time, f"{self.row.peak_memory / 1e9:.1f}",
        ]  # fmt: skip


def read_about(folder):
    """The content of a sweep's sweep.json, as tools/sweep.py's `write_about` has it.

    Raises:
        InputError: there is none.
    """
    try:
        return json.loads(read_text(folder / "sweep.json"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no results of a sweep ({one_line(error)})") from None


def read_results(folder):
    """What a sweep wrote.

    Returns:
        {finding: {id: 0 or 1}} of the training exams, {name of a stack: its table}, {recipe:
        content of its file}.

    Raises:
        InputError: not such a folder.
    """
    about = read_about(folder)
    try:
        recipes = {
            path.stem: json.loads(read_text(path))
            for path in sorted(folder.glob("*.json"))
            if path.name != "sweep.json"
        }
        return about["labels"], about["stacks"], recipes
    except (OSError, ValueError, LookupError) as error:
        raise InputError(f"{folder}: no results of a sweep ({one_line(error)})") from None


def place_of(key, content):
    """Planes, seed from 0 and fold from 0 of a network by its key in a recipe's file."""
    planes, number = key.rsplit(" ", 1)
    return planes, *divmod(int(number) - 1, content["folds"])


def ids_of(network):
    """{finding: ids of the exams that a network has predicted}; one list in earlier versions."""
    ids = network["ids"]
    return ids if isinstance(ids, dict) else dict.fromkeys(network["logits"], ids)


def columns_of(labels, recipes, task, which="logits"):
    """{(recipe, planes): Row} of the networks' own predictions. All have the same number of seeds,
    NaN where a recipe has fewer: what is compared is of the same seed.

    Args:
        which: "logits", or "views" for the means over random views.
    """
    ids = {exam_id: row for row, exam_id in enumerate(labels[task])}
    rows = {}
    seeds = {place_of(key, one)[1] for one in recipes.values() for key in one["networks"]}
    shape = max(seeds, default=-1) + 1, len(ids)
    for name, content in recipes.items():
        for key, network in content["networks"].items():
            if not network.get(which):
                continue
            planes, seed, fold = place_of(key, content)
            if (name, planes) not in rows:
                empty = np.full(shape, np.nan), np.zeros(shape, int)
                rows[name, planes] = Row(name, planes, *empty, [], 0.0)
            row = rows[name, planes]
            pairs = zip(ids_of(network)[task], network[which][task], strict=True)
            known = [(ids[exam_id], value) for exam_id, value in pairs if exam_id in ids]
            where, values = map(list, zip(*known, strict=True))
            row.scores[seed, where], row.folds[seed, where] = expit(values), fold + 1
            if network["cpu_seconds"] is not None:
                row.cpu_seconds.append(network["cpu_seconds"])
            most = max(row.peak_memory, network["peak_memory"])
            rows[name, planes] = row._replace(peak_memory=most)
    return rows


def stack_row(name, rows, labels, features="probability", average_seeds=False):
    """The Row of a stack of some columns' Rows.

    Args:
        labels: int (n,).
        features: "probability" or "logit", as train_logistic_regression.py has them.
        average_seeds: stack the means over the seeds that all columns have: one run.
    """
    x = np.stack([row.scores for row in rows], axis=-1)  # (seeds, n, columns)
    folds = rows[0].folds
    complete = ~np.isnan(x).any(axis=(1, 2))  # (seeds,)
    if features == "logit":
        x = logit(x)
    if average_seeds:
        x = x[complete].mean(axis=0, keepdims=True) if complete.any() else x[:1]
        splits = StratifiedKFold(AVERAGED_FOLDS, shuffle=True, random_state=0)
        folds = np.zeros((1, len(labels)), int)
        for number, (_, out) in enumerate(splits.split(x[0], labels), start=1):
            folds[0, out] = number
    scores = np.full(folds.shape, np.nan)
    for s, fold in enumerate(folds):
        if not np.isnan(x[s]).any():
            given = {"cv": PredefinedSplit(fold), "method": "predict_proba"}
            scores[s] = cross_val_predict(LogisticRegression(), x[s], labels, **given)[:, 1]
    seconds = sum(row.mean_seconds for row in rows)
    seconds *= complete.sum() if average_seeds else 1
    memory = max(row.peak_memory for row in rows)
    return Row(name, STACK, scores, folds, [seconds], memory, average_seeds)


def all_rows(labels, stacks, recipes, task):
    """Every Row of a finding: networks, each recipe's stack of single columns, the stacks asked
    for; those without any prediction are left out."""
    truth = np.array(list(labels[task].values()))
    columns = columns_of(labels, recipes, task)
    seen = columns_of(labels, recipes, task, "views")
    rows = list(columns.values())
    asked = {name: {"recipes": [name]} for name in recipes} | stacks
    for name, table in asked.items():
        options = {key: value for key, value in table.items() if key != "recipes"}
        for title, found in ((name, columns), (name + VIEWS, seen)):
            parts = [row for (recipe, _), row in found.items() if recipe in table["recipes"]]
            same = all(same_folds(row, parts[0]) for row in parts)
            if len(parts) > 1 and same:
                rows.append(stack_row(title, parts, truth, **options))
    rows += [row._replace(recipe=row.recipe + VIEWS) for row in seen.values()]
    return truth, rows


def same_folds(row, other):
    """Whether two Rows have the same folds, as far as both have predicted."""
    both = (row.folds > 0) & (other.folds > 0)
    return np.array_equal(row.folds[both], other.folds[both])


def bases_of(rows):
    """{(recipe, column): the article's Row that it is compared with}: of the same column or, where
    the article's recipe has none such (joint networks), of its stack."""
    article = {row.column: row for row in rows if row.recipe == ARTICLE}
    bases = {(r.recipe, r.column): article.get(r.column) or article.get(STACK) for r in rows}
    return {key: base for key, base in bases.items() if base is not None}


def differences(truth, rows, bases):
    """{(recipe, column): Difference of its AUC and the article's}, on the exams of both."""
    pairs = {
        (row.recipe, row.column): runs_of(row, bases[row.recipe, row.column])
        for row in rows
        if row.recipe != ARTICLE and (row.recipe, row.column) in bases
    }
    return {
        key: mean_auc_difference(truth[known], runs, others)
        for key, (runs, others, known) in pairs.items()
        if len(runs)  # a complete seed in common
    }


def runs_of(row, base):
    """The runs that both of two Rows have, on the exams that all of them have predicted.

    Returns:
        scores (runs, m), scores of the base (runs, m), bool (n,). Where one's single run is of
        averaged seeds it stands beside each of the other.
    """
    if row.is_average == base.is_average:
        both = row.complete & base.complete
        a, b = row.scores[both], base.scores[both]
    else:
        a, b = np.broadcast_arrays(row.runs[0], base.runs[0])
    known = ~np.isnan(np.concatenate([a, b])).any(axis=0)
    return a[:, known], b[:, known], known


def auc_in_folds(truth, row):
    """Mean AUC within the folds of all seeds that have exams of both classes, NaN without any."""
    found = []
    for scores, folds in zip(*row.runs, strict=True):
        for number in np.unique(folds[folds > 0]):
            there = folds == number
            if len(set(truth[there])) == 2:
                found.append(roc_auc(truth[there], scores[there]))
    return float(np.mean(found)) if found else np.nan


def lines_of(truth, rows):
    """The Lines of some Rows, best of each column first; Rows without predictions have none."""
    rows, bases = [row for row in rows if len(row.runs[0])], bases_of(rows)
    gains = differences(truth, rows, bases)
    adjusted = dict(zip(gains, holm([gain.p for gain in gains.values()]), strict=True))
    lines = []
    for row in rows:
        key, runs = (row.recipe, row.column), row.runs[0]
        known = [~np.isnan(run) for run in runs]
        pairs = [(truth[k], run[k]) for k, run in zip(known, runs, strict=True)]
        time = row.mean_seconds / bases[key].mean_seconds if key in bases else None
        lines.append(
            Line(
                row,
                [roc_auc(*pair) for pair in pairs],
                auc_in_folds(truth, row),
                gains.get(key),
                adjusted.get(key),
                float(np.mean([brier(*pair) for pair in pairs])),
                time,
            )
        )
    return sorted(lines, key=lambda line: (line.row.column, -np.mean(line.aucs)))


def dropped_recipes(folder):
    """The recipes that are behind the best on the exams that both have predicted, in every column
    and finding that they have; never the article's. The best is the best of many: p is multiplied
    by their number (Bonferroni)."""
    labels, _, recipes = read_results(folder)
    behind, there = set(), set()
    for task in labels:
        truth = np.array(list(labels[task].values()))
        columns = columns_of(labels, recipes, task)
        for (name, planes), row in columns.items():
            rivals = [r for (n, p), r in columns.items() if p == planes and n != name]
            gains = [mean_auc_difference(truth[known], a, b)
                     for a, b, known in (runs_of(rival, row) for rival in rivals)
                     if len(a) and len(set(truth[known])) == 2]  # fmt: skip
            best = max(gains, key=lambda gain: gain.value, default=None)
            lost = best is not None and best.value > 0 and best.p * len(gains) < CERTAIN
            (behind if lost else there).add(name)
    return behind - there - {ARTICLE}


def cost_points(lines):
    """What `figures.cost_figure` draws: each row but those of random views, with the interval of
    its difference to the article's as a bar around its AUC."""
    points = {}
    for line in lines:
        if line.time is not None and line.time > 0 and not line.row.recipe.endswith(VIEWS):
            auc, gain = np.mean(line.aucs), line.gain
            ends = (auc - gain.value + gain.low, auc - gain.value + gain.high) if gain else None
            points[line.row.recipe, line.row.column] = line.time, auc, ends
    return points


def leave_out(rows, ids, without):
    """The Rows without the exams that another sweep has predicted, and which these are: bool (n,).

    Args:
        ids: of the exams, in the order of the rows' scores.
        without: folder of the other sweep.
    """
    _, _, recipes = read_results(without)
    networks = [network for one in recipes.values() for network in one["networks"].values()]
    used = {exam_id for one in networks for each in ids_of(one).values() for exam_id in each}
    out = np.array([exam_id in used for exam_id in ids])
    rows = [
        row._replace(scores=np.where(out, np.nan, row.scores), folds=np.where(out, 0, row.folds))
        for row in rows
    ]
    return rows, out


def in_company(about, task):
    """A line where exams of one group (a patient, a scanner) are taken as independent, or None."""
    count = about.get("in_company", {}).get(task)  # earlier versions did not record it
    return count and (
        f"{count} of the {len(about['labels'][task])} exams share a group with another "
        "(train-groups.csv): intervals and p take exams as independent and are too narrow"
    )


def mixed_precision(recipes):
    """A line where networks were trained in several precisions, or None."""
    counts = Counter(
        network.get("precision", "not known")
        for content in recipes.values()
        for network in content["networks"].values()
    )
    words = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    return f"networks by precision: {words}" if len(counts) > 1 else None


def begun(rows):
    """A line for each Row with seeds that are left out because they have only begun."""
    for row in rows:
        if row.recipe.endswith(VIEWS):  # the same networks
            continue
        for seed in np.flatnonzero((row.known > 0) & ~row.complete):
            yield (
                f"left out: {row.recipe}, {row.column}, seed {seed}: {row.known[seed]} exams of "
                f"{row.known.max()} so far"
            )


def print_lines(truth, rows):
    """Print some Rows as a table -> their Lines."""
    lines = lines_of(truth, rows)
    cells = [line.cells() for line in lines]
    print(tabulate(cells, HEADS, tablefmt="pipe", disable_numparse=True))
    return lines


def print_table(folder, plot=None, without=None):
    """Print the table of each finding, and draw AUC against time."""
    about = read_about(folder)
    labels, stacks, recipes = read_results(folder)
    for task, known in labels.items():
        truth, rows = all_rows(labels, stacks, recipes, task)
        networks = sum(len(content["networks"]) for content in recipes.values())
        left = np.ones(len(known), bool)
        if without:
            rows, out = leave_out(rows, known, without)
            left = ~out
            print(f"\nwithout {out.sum()} exams that {without} has predicted")
        print(f"\n{task}: {left.sum()} exams, {truth[left].sum()} positive; {networks} networks")
        caveats = in_company(about, task), mixed_precision(recipes), *begun(rows)
        for words in filter(None, caveats):
            print(words)
        lines = print_lines(truth, rows)
        if plot:
            figure = cost_figure(cost_points(lines))
            path = plot.with_stem(f"{plot.stem}-{task}") if len(labels) > 1 else plot
            with atomic(path) as temporary:
                figure.savefig(temporary, format="png", dpi=150)


def run(args):
    print_table(args.folder, args.plot, args.without)


if __name__ == "__main__":
    cli.exit_with_status(lambda: run(parse_arguments()))
