"""The table of a sweep: each recipe's out-of-fold AUC against the article's, with intervals.

    python -m tools.sweep_table benchmarks/search         # what tools/sweep.py wrote there
    python -m tools.sweep_table benchmarks/final --plot docs/recipes.png
    python -m tools.sweep_table benchmarks/final --without benchmarks/search
    python -m tools.sweep_table benchmarks/final --against fast

Each row is a column of networks (a plane, or planes joined by +) or the stack of a recipe's
columns; every exam is predicted by networks that were not trained on it. A stack's regression is
fitted on the out-of-fold predictions of the other folds (cross-fitted): never on the labels that it
is judged by, though the networks of the other folds were trained on these.

AUC: over all exams at once (mean and standard deviation over the seeds), and within the folds, each
of which has a network of its own. Each row is compared with the article's of the same column or,
where that recipe has none such (joint networks), with its stack. The difference is that of the mean
AUCs, with DeLong's paired 95 % interval; with two seeds or more what they change in this difference
is added (`metrics.mean_auc_difference`), and p is adjusted for the number of rows (Holm). Time is
that of one core with nothing beside it (user + system time), "–" where no network's is known;
memory is the largest resident size.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

import numpy as np
from scipy.special import expit, logit
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it finds its own folder only

from mrnet.documents import Count, Rule, check, parse_json
from mrnet.errors import InputError, one_line
from mrnet.evaluation.figures import cost_figure
from mrnet.evaluation.metrics import Difference, brier, holm, mean_auc_difference, roc_auc
from mrnet.files import atomic, read_text
from mrnet.layout.names import ARTICLE
from mrnet.runtime import cli
from mrnet.stacking.stacking import STACK, cross_fitted

FORMAT = "mrnet-sweep-2"  # of a sweep's files


class NetworkResult(TypedDict):
    """What one network has predicted, and what it took."""

    planes: str
    seed: Count
    fold: Annotated[int, Rule(lambda fold: fold >= 1, "a whole number of at least 1")]
    logits: dict[str, dict[str, float]]  # {finding: {id: logit}} of exams it was not trained on
    seconds: float | None  # None where an interrupted run had begun it
    cpu_seconds: float | None
    peak_memory: Count  # bytes
    precision: str


class RecipeResults(TypedDict):
    """NAME.json of a sweep."""

    format: Literal[FORMAT]
    task: str
    folds: Count
    protocol: str
    recipe: dict[str, Any]
    networks: list[NetworkResult]


class SweepExams(TypedDict):
    """sweep.json of a sweep."""

    format: Literal[FORMAT]
    labels: dict[str, dict[str, Literal[0, 1]]]  # {finding: {id: label}}
    grouped: dict[str, Count]  # {finding: number of exams that share a group}
    exams: dict[str, str]  # {finding and planes: hash of ids, labels and voxels}


def parse_arguments():
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("folder", type=Path, help="what tools/sweep.py wrote")
    against = "recipe that the others are compared with"
    add("--against", metavar="RECIPE", default=ARTICLE, help=against)
    without = "leave out the exams that this sweep has predicted: what its recipes were chosen on "
    without += "cannot judge the choice"
    add("--without", type=Path, metavar="FOLDER", help=without)
    plot = "also draw AUC against training time: a PNG, one a finding where they are several"
    add("--plot", type=Path, help=plot)
    return parser.parse_args()


# --- what a sweep wrote ---------------------------------------------------------------------------


def read_result(path, kind):
    """The content of one of a sweep's files, SweepExams or RecipeResults (`kind`).

    Raises:
        InputError: there is none, it is damaged, or an earlier version's.
    """
    try:
        check(kind, content := parse_json(read_text(path)), is_open=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give a folder that tools/sweep.py wrote") from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: damaged, or not of format {FORMAT} ({one_line(error)}); restore it, or move "
            "it away and run tools/sweep.py again"
        ) from None
    return content


def read_results(folder):
    """The content of a sweep's sweep.json, and {recipe: [what each of its networks predicted]}.

    Raises:
        InputError: not such a folder.
    """
    exams = read_result(folder / "sweep.json", SweepExams)
    paths = sorted(path for path in folder.glob("*.json") if path.name != "sweep.json")
    return exams, {path.stem: read_result(path, RecipeResults)["networks"] for path in paths}


# --- rows -----------------------------------------------------------------------------------------


class Row(NamedTuple):
    """What one line of the table is about."""

    recipe: str
    column: str  # planes of its networks, or "stack"
    logits: np.ndarray  # float64 (seeds, n), NaN where there is none
    folds: np.ndarray  # int (seeds, n), from 1; 0 where there is none
    cpu_seconds: float  # mean of its networks', of a stack their sum; NaN where not known
    peak_memory: float  # bytes

    @property
    def seeds(self):
        """Those with predictions, bool (seeds,)."""
        return ~np.isnan(self.logits).all(axis=1)


def list_rows(task, labels, recipes):
    """int (n,) labels of a finding, and every Row of it: columns of networks, then stacks. A seed
    with fewer networks than another of its column has only begun and is left out; a line says so.

    Args:
        labels: {id: 0 or 1}.
        recipes: as `read_results`.
    """
    truth, rows = np.array(list(labels.values())), []
    seeds = 1 + max((one["seed"] for found in recipes.values() for one in found), default=0)
    for recipe, found in recipes.items():
        columns = {}
        for network in found:
            columns.setdefault(network["planes"], []).append(network)
        ours = [make_row(recipe, planes, networks, task, [*labels], seeds)
                for planes, networks in columns.items()]  # fmt: skip
        rows += ours
        if len(ours) > 1:
            rows.append(make_stack(ours, truth))
    return truth, [row for row in rows if row.seeds.any()]


def make_row(recipe, planes, networks, task, ids, seeds):
    """The Row of some networks of one recipe and the same planes.

    Args:
        ids: of all exams.
        seeds: how many there are in the sweep.
    """
    place = {exam_id: i for i, exam_id in enumerate(ids)}
    logits, folds = np.full((seeds, len(ids)), np.nan), np.zeros((seeds, len(ids)), int)
    counts = Counter(one["seed"] for one in networks)
    most = max(counts.values())
    for seed, count in counts.items():
        if count < most:
            print(f"left out: {recipe}, {planes}, seed {seed}: {count} of {most} networks so far")
    for one in networks:
        if counts[one["seed"]] == most:
            where = [place[exam_id] for exam_id in one["logits"][task]]
            logits[one["seed"], where] = list(one["logits"][task].values())
            folds[one["seed"], where] = one["fold"]
    known = [one["cpu_seconds"] for one in networks if one["cpu_seconds"] is not None]
    seconds = np.mean(known) if known else np.nan
    return Row(recipe, planes, logits, folds, seconds, max(one["peak_memory"] for one in networks))


def make_stack(rows, truth):
    """The Row of the stack of one recipe's Rows, of those seeds that have the same folds in all.

    Args:
        truth: int (n,) labels.
    """
    logits = np.full(rows[0].logits.shape, np.nan)
    folds = np.max([row.folds for row in rows], axis=0)  # the same in all planes that an exam has
    for seed, fold in enumerate(folds):
        if all(set(row.folds[seed]) | {0} == set(fold) | {0} for row in rows):
            ours = {row.column: {row.column: row.logits[seed][:, None]} for row in rows}
            logits[seed] = logit(cross_fitted("probability", ours, truth, fold))
    folds = np.where(np.isnan(logits), 0, folds)
    seconds, memory = sum(row.cpu_seconds for row in rows), max(row.peak_memory for row in rows)
    return Row(rows[0].recipe, STACK, logits, folds, seconds, memory)


# --- lines ----------------------------------------------------------------------------------------


class Line(NamedTuple):
    """One line of the table."""

    row: Row
    aucs: list  # of each seed
    in_folds: float  # mean AUC within the folds of all seeds: each fold is one network's
    brier: float  # mean over the seeds
    time: float | None  # of that of the row it is compared with; NaN where one is not known
    gain: Difference | None  # to that row
    adjusted: float | None  # p of the gain for the number of lines

    def cells(self):
        """Text of each column of the table."""
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


def compare(truth, rows, against=ARTICLE):
    """The Lines of some Rows, best of each column first.

    Args:
        truth: int (n,) labels.
        against: recipe that the others are compared with.

    Raises:
        InputError: it has no Row.
    """
    bases = {row.column: row for row in rows if row.recipe == against}
    if not bases:
        raise InputError(f"no networks of recipe {against}; give another --against")
    lines = []
    for row in rows:
        base = bases.get(row.column) or bases.get(STACK)
        runs = [(truth[~np.isnan(run)], run[~np.isnan(run)]) for run in row.logits[row.seeds]]
        lines.append(
            Line(
                row,
                [roc_auc(*run) for run in runs],
                auc_in_folds(truth, row),
                float(np.mean([brier(labels, expit(run)) for labels, run in runs])),
                row.cpu_seconds / base.cpu_seconds if base else None,
                difference(truth, row, base) if base and row.recipe != against else None,
                None,
            )
        )
    compared = [i for i, line in enumerate(lines) if line.gain]
    for i, p in zip(compared, holm([lines[i].gain.p for i in compared]), strict=True):
        lines[i] = lines[i]._replace(adjusted=p)
    return sorted(lines, key=lambda line: (line.row.column, -np.mean(line.aucs)))


def difference(truth, row, base):
    """Difference of the AUCs of two Rows, of the seeds that both have, on the exams that all of
    these have predicted; None without such a seed."""
    both = row.seeds & base.seeds
    if not both.any():
        return None
    a, b = row.logits[both], base.logits[both]
    known = ~np.isnan(np.concatenate([a, b])).any(axis=0)
    return mean_auc_difference(truth[known], a[:, known], b[:, known])


def auc_in_folds(truth, row):
    """Mean AUC within the folds of all seeds that have exams of both classes, NaN without any."""
    found = []
    for logits, folds in zip(row.logits, row.folds, strict=True):
        for number in np.unique(folds[folds > 0]):
            there = folds == number
            if len(set(truth[there])) == 2:
                found.append(roc_auc(truth[there], logits[there]))
    return float(np.mean(found)) if found else np.nan


def leave_out(rows, ids, without):
    """The Rows without the exams that another sweep has predicted, and which these are: bool (n,).

    Args:
        ids: of the exams, in the order of the rows' logits.
        without: folder of the other sweep.
    """
    _, recipes = read_results(without)
    networks = [network for found in recipes.values() for network in found]
    used = {exam_id for one in networks for found in one["logits"].values() for exam_id in found}
    out = np.array([exam_id in used for exam_id in ids])
    rows = [
        row._replace(logits=np.where(out, np.nan, row.logits), folds=np.where(out, 0, row.folds))
        for row in rows
    ]
    return [row for row in rows if row.seeds.any()], out


# --- output ---------------------------------------------------------------------------------------


def cost_points(lines):
    """What `figures.cost_figure` draws: each line whose time is known, with the interval of its
    difference as a bar around its AUC."""
    points = {}
    for line in lines:
        if line.time is not None and line.time > 0:
            auc, gain = np.mean(line.aucs), line.gain
            ends = (auc - gain.value + gain.low, auc - gain.value + gain.high) if gain else None
            points[line.row.recipe, line.row.column] = line.time, auc, ends
    return points


def caveats(task, exams, recipes):
    """Lines about what the intervals do not cover: exams of one group, several precisions."""
    count = exams["grouped"][task]
    if count:
        yield (
            f"{count} of the {len(exams['labels'][task])} exams share a group with another "
            "(train-groups.csv): intervals and p take exams as independent and are too narrow"
        )
    counts = Counter(network["precision"] for found in recipes.values() for network in found)
    if len(counts) > 1:
        words = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        yield f"networks by precision: {words}"


def print_table(folder, against=ARTICLE, without=None, plot=None):
    """Print the table of each finding, and draw AUC against time."""
    exams, recipes = read_results(folder)
    networks = sum(map(len, recipes.values()))
    for task, labels in exams["labels"].items():
        print()
        truth, rows = list_rows(task, labels, recipes)
        left = np.ones(len(labels), bool)
        if without:
            rows, out = leave_out(rows, labels, without)
            left = ~out
            print(f"without {out.sum()} exams that {without} has predicted")
        print(f"{task}: {left.sum()} exams, {truth[left].sum()} positive; {networks} networks")
        for words in caveats(task, exams, recipes):
            print(words)
        lines = compare(truth, rows, against)
        heads = ("recipe", "network", "AUC (SD)", "in a fold", f"- {against} [95 %]", "p", "Holm",
                 "Brier", "time", "GB")  # fmt: skip
        cells = [line.cells() for line in lines]
        print(tabulate(cells, heads, tablefmt="pipe", disable_numparse=True))
        if plot:
            figure = cost_figure(cost_points(lines), against)
            path = plot.with_stem(f"{plot.stem}-{task}") if len(exams["labels"]) > 1 else plot
            with atomic(path) as temporary:
                figure.savefig(temporary, format="png", dpi=150)


def run(args):
    print_table(args.folder, args.against, args.without, args.plot)


if __name__ == "__main__":
    cli.exit_with_status(lambda: run(parse_arguments()))
