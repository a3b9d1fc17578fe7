"""Combine the three planes' networks of a task: logistic regression on their predictions.

    python train_logistic_regression.py                        # task acl, MRNet under data/
    python train_logistic_regression.py --task meniscus --data-dir data/phantom
    python train_logistic_regression.py --task abnormal acl meniscus           # one after the other
    python train_logistic_regression.py --folds 5 --repeat 3   # what train.py made with these
    python train_logistic_regression.py --recipes article vgg16                # planes x recipes
    python train_logistic_regression.py --planes sagittal axial+coronal        # networks that join

Loads models/<task>-{axial,coronal,sagittal}*.pt, predicts training exams (without augmentation) and
validation exams, fits scikit-learn's LogisticRegression on the training predictions, reports AUC
with its interval, operating points and calibration, and writes models/<task>-stack.json,
<task>-predictions.csv, <task>-results.json, <task>-roc.png, <task>-reliability.png and
logs/<task>/stack/<time>/. With other recipes the stack's name has them:
<task>-stack-article+vgg16.json; `predict.py --recipes article vgg16` then answers with it.

With `--folds 1`, the article's way, the regression is fitted on exams that the networks were
trained on. With `--folds K` it is fitted on out-of-fold predictions: each training exam is
predicted by the network that was not trained on it; for other exams the K networks are averaged.
The stack's own figures on training exams are then cross-fitted: each fold's exams are stacked by a
regression that was fitted on the other folds'.

Sources: the article, section on combining the planes (its script was never published); Bien et al.,
PLOS Medicine 2018: logistic regression on the three planes' probabilities. Out-of-fold stacking:
Wolpert, "Stacked generalization", Neural Networks 5(2), 1992.
"""

import argparse
import glob
import statistics
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
from tabulate import tabulate

from mrnet.documents import as_json
from mrnet.errors import InputError
from mrnet.evaluation.figures import reliability_figure, roc_figure
from mrnet.evaluation.metrics import answered, roc_auc
from mrnet.files import atomic, write_csv, write_text
from mrnet.layout.arguments import add_recipes_argument, plane_name
from mrnet.layout.description import read_own_labels
from mrnet.layout.names import (
    PREDICTIONS,
    RESULTS,
    column_name,
    stack_name,
    stack_path,
    start_of_results,
)
from mrnet.layout.planes import SPLITS, in_order, planes_of
from mrnet.networks.saved import digest_of
from mrnet.runtime import cli
from mrnet.runtime.devices import pick_device, pick_precision
from mrnet.stacking.caveats import (
    STAR,
    below_chance,
    derived_caveats,
    list_caveats,
    threshold_source,
)
from mrnet.stacking.fitting import (
    folds_of,
    join_seeds,
    labels_of,
    make_stack,
    names_untuned,
    tuning_mask,
)
from mrnet.stacking.predictions import BaseModels, check_base_models, predict_columns
from mrnet.stacking.results import FORMAT, GAIN, RATES, evaluate_scores
from mrnet.stacking.stacking import DIGITS, FEATURES, STACK, cross_fitted, order_of, save_stack
from mrnet.training.checkpoint import load_model
from mrnet.training.config import selection_of
from mrnet.training.datasets import all_tasks, exams_of_any, labelled_sets
from mrnet.training.logs import open_writer


def parse_arguments():
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--task",
        nargs="+",
        default=["acl"],
        help="tasks whose planes are trained, or all: a stack each, and networks that differ in "
        "their last layer alone (of train.py with several tasks, of one epoch) are asked once",
    )
    parser.add_argument(
        "--planes",
        nargs="+",
        type=planes_argument,
        metavar="PLANE",
        help="what train.py had as --plane, joined by + where it was several; default: axial, "
        "coronal, sagittal and every further plane of the data folder",
    )
    add_recipes_argument(parser)
    parser.add_argument(
        "--data-dir",
        type=Path,
        help="the folder that the planes were trained on; default: as their models have it",
    )
    parser.add_argument(
        "--features",
        choices=FEATURES,
        default="probability",
        help="inputs of the regression; the article and Stanford use probabilities",
    )
    add = parser.add_argument
    add("--folds", type=cli.positive_int, default=1, help="number of folds used with train.py")
    add("--repeat", type=cli.positive_int, default=1, help="number of seeds used with train.py")
    add("--seed", type=cli.count, default=0, help="first of these seeds")
    parser.add_argument(
        "--sensitivity",
        type=float,
        default=None,
        help="choose each threshold for this sensitivity on training predictions; by default "
        "for the greatest sensitivity + specificity (Youden)",
    )
    parser.add_argument(
        "--models-dir", type=Path, default=Path("models"), help="where train.py wrote"
    )
    parser.add_argument("--logs-dir", type=Path, default=Path("logs"), help="for TensorBoard")
    cli.add_machine_arguments(parser)
    args = parser.parse_args()
    args.data_dir = args.data_dir or trained_on(args.models_dir, args.task, args.recipes)
    args.planes = args.planes or planes_of(args.data_dir)
    if args.sensitivity is not None and not 0 < args.sensitivity <= 1:
        parser.error("--sensitivity is above 0 and at most 1")
    return args


def trained_on(models_dir, tasks, recipes):
    """The data folder of the networks of some tasks, or of all of them, as their files have it;
    `data` where there are none.

    Raises:
        InputError: they were trained on several, or theirs is no more there.
    """
    found = {}
    for task in "*" if tasks == ["all"] else map(glob.escape, tasks):
        for path in sorted(models_dir.glob(f"{task}-*.pt")):
            metadata = load_model(path)[1]
            is_asked = task == "*" or metadata["task"] in tasks
            if is_asked and metadata["recipe"] in recipes and "data_dir" in metadata:
                found.setdefault(metadata["data_dir"], path)
    if len(found) > 1:
        words = " and ".join(f"{path.name} on {folder}" for folder, path in found.items())
        raise InputError(f"{models_dir}: {words} were trained; give --data-dir")
    folder = Path(next(iter(found), "data"))
    if found and not folder.is_dir():
        raise InputError(f"{folder}: the networks' data folder is not there; give --data-dir")
    return folder


def planes_argument(text):
    """Value of an option: planes joined by +, in their order whatever the given one."""
    planes = [plane_name(plane) for plane in text.split("+")]
    if len(set(planes)) < len(planes):
        raise argparse.ArgumentTypeError(f"{text!r} has a plane twice")
    return "+".join(in_order(planes))


def run(args):
    """Predict, fit, report and write everything, of one finding after the other."""
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    wanted = sorted(set(args.planes), key=order_of)
    columns = {column_name(planes, r): planes for r in args.recipes for planes in wanted}
    tasks = all_tasks(args.data_dir) if args.task == ["all"] else dict.fromkeys(args.task)
    findings = [
        BaseModels(args.models_dir, task, columns, args.folds, args.repeat, args.seed)
        for task in tasks
    ]
    sets = {one.task: labelled_sets(args.data_dir, one.task, wanted) for one in findings}
    exams = {task: exams_of_any(found, args.data_dir, task) for task, found in sets.items()}
    for one in findings:
        check_base_models(one, args.data_dir)
    read_own_labels(args.data_dir)  # a damaged file is refused before the networks are asked
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    about = {"folds": args.folds, "recipes": args.recipes}
    about |= cli.print_start_up(vars(args), device, precision)
    # Predict with the networks; then fit, evaluate and report finding by finding.
    found = predict_columns(findings, sets, exams, device, precision)
    for one in findings:
        task = one.task
        fit = partial(make_stack, task, args.features, sensitivity=args.sensitivity)
        ours = about | {"arguments": arguments | {"task": task}}
        stack_finding(one, exams[task], found[task], fit, ours, args.logs_dir)


def stack_finding(base_models, exams, found, fit, about, logs_dir):
    """Fit a finding's stack, evaluate it, report it: in print and in files.

    Args:
        exams: {split: MRDataset}.
        found: {column: [ColumnLogits, one per seed]}.
        fit: function of logits, labels and tuning, `make_stack` with the rest of its arguments.
        about: dict, written beside the figures: "folds", "recipes", "arguments" and more.
    """
    labels = {split: labels_of(exams[split]) for split in SPLITS}
    trainings = [a for ones in found.values() for one in ones for a in one.trainings]
    # One optimistic network makes the stack optimistic.
    optimistic = [one for one in trainings if one["protocol"] == "article"]
    protocol = (optimistic or trainings)[0]["protocol"]
    fit = partial(fit, labels=labels)
    # Fit.
    folds, repeat = base_models.folds, base_models.repeat
    aucs = seeds_aucs(found, exams, fit) if repeat > 1 else None
    tuning = tuning_mask(exams["train"], found)
    logits = join_seeds(found)
    stack, scores, thresholds, own = fit(logits=logits, tuning=tuning)
    task, kind = base_models.task, stack["features"]
    if folds > 1:  # the regression too was fitted on others, as each plane's network was
        known = folds_of(exams["train"], found)
        scores["train"][STACK] = cross_fitted(kind, logits["train"], labels["train"], known)
    untuned = names_untuned(stack["combinations"], scores["train"], labels["train"], tuning)
    chosen = threshold_source(tuning, untuned, selection_of(trainings), folds, repeat)
    # Evaluate.
    rows = evaluate_scores(labels, scores, thresholds, own)
    report = about | {
        "protocol": protocol,
        "thresholds": chosen,
        "data": {split: exams[split].fingerprint() for split in SPLITS},
    }
    groups, derived = exams["valid"].groups, [*derived_caveats(exams), *below_chance(rows)]
    decided = selection_of(optimistic)
    caveats = list_caveats(decided, folds, chosen, scores["valid"], groups, derived)
    # Report.
    title = f"{task}: protocol {protocol}, folds {folds}, stacked on {kind}"
    training_auc = "out-of-fold AUC" if folds > 1 else "train AUC"
    print_report(title, labels, rows, training_auc, caveats)
    whole, ids = thresholds[STACK], exams["valid"].ids
    others = {i: t for i, t in zip(ids, own.tolist(), strict=True) if t != whole}
    results = {"task": task, "valid": rows, "caveats": caveats, "other_thresholds": others} | report
    if aucs is not None:
        results["stack_auc_of_seeds"] = aucs
    names = {c: [path.name for path in base_models.all_paths(c)] for c in base_models.columns}
    digests = {n: d for ones in found.values() for one in ones for n, d in one.digests.items()}
    check_base_models(base_models, exams["train"].root)  # as when it began, minutes ago
    stack |= report | {"base_models": names, "digests": digests}
    save_stack(stack_path(base_models.models_dir, task, report["recipes"]), stack)
    write_results(base_models, logs_dir, results | {"digests": digests}, exams, scores)


def seeds_aucs(found, exams, fit):
    """Validation AUC of a stack for each seed alone; prints them with mean and SD.

    Args:
        exams: {split: MRDataset}.
        fit: function of logits and tuning, `make_stack` with the rest of its arguments.
    """
    aucs = []
    for k in range(len(next(iter(found.values())))):
        seed = {column: [ones[k]] for column, ones in found.items()}
        _, scores, *_ = fit(logits=join_seeds(seed), tuning=tuning_mask(exams["train"], seed))
        labels = labels_of(exams["valid"])
        aucs.append(roc_auc(labels, scores["valid"][STACK]))
    print(f"stack of each seed, validation AUC: {', '.join(f'{auc:.4f}' for auc in aucs)}")
    mean, sd = statistics.mean(aucs), statistics.stdev(aucs)
    print(f"{len(aucs)} seeds: mean {mean:.4f}, SD {sd:.4f}")
    print("the table below is their ensemble: each plane's networks averaged, then stacked")
    return aucs


def print_report(title, labels, rows, training_auc, caveats):
    """The table of `evaluate_scores`.

    Args:
        title: line above the table.
        training_auc: title of the column of AUCs on training exams.
        caveats: lines below the table.
    """
    counts = {s: f"{len(labels[s])} exams, {int(labels[s].sum())} positive" for s in SPLITS}
    print(f"\ntraining {counts['train']}; validation {counts['valid']}\n{title}\n")
    table = []
    for name in (name for name in rows if name != GAIN):
        row = rows[name]
        auc = f"{row['auc']:.4f} [{row['auc_low']:.3f}, {row['auc_high']:.3f}]"
        point = [f"{row[key]:.3f}" for key in RATES]
        half = [row[f"{key}_at_half"] for key in RATES]
        at_half = " ".join(f"{value:.3f}" for value in half)
        errors = [f"{row['brier']:.3f}", f"{row['ece']:.3f}"]
        threshold = f"{row['threshold']:.3f}{STAR}"
        table.append([name, f"{row['train_auc']:.4f}", auc, threshold, *point, at_half, *errors])
    heads = ["", training_auc, "valid AUC [95 %]", "threshold", "sensitivity", "specificity",
             "accuracy", "at 0.5: sens, spec, acc", "Brier", "ECE"]  # fmt: skip
    print(tabulate(table, heads, disable_numparse=True, colalign=["left"] + ["right"] * 9))
    gain = rows[GAIN]
    print(
        f"\nstack against {gain['plane']}, the plane with the best training AUC: "
        f"{gain['value']:+.4f} [{gain['low']:+.3f}, {gain['high']:+.3f}], p = {gain['p']:.2g} "
        "(paired DeLong)"
    )
    print(*caveats, sep="\n")


def write_results(base_models, logs_dir, results, exams, scores):
    """Write results, predictions and figures, and print where they are.

    Args:
        results: plain dict.
        exams: {split: MRDataset}.
        scores: as `make_stack` returns them.
    """
    models_dir, task, recipes = base_models.models_dir, base_models.task, results["recipes"]
    name = stack_name(recipes)
    start = start_of_results(models_dir, task, recipes)
    table, predictions = (f"{start}{end}" for end in (RESULTS, PREDICTIONS))
    write_csv(predictions, prediction_rows(exams, scores))
    content = {"format": FORMAT} | results | {"predictions": digest_of(predictions)}
    write_text(table, as_json(content, indent=2) + "\n")
    log_dir = logs_dir / task / name / f"{datetime.now():%Y%m%d-%H%M%S}"
    labels = {split: labels_of(exams[split]) for split in SPLITS}
    save_figures(start, log_dir, task, labels, scores)
    stack = stack_path(models_dir, task, recipes)
    print(
        f"\nstack        {stack}\nresults      {table}\n"
        f"predictions  {predictions}\n"
        f"figures      {start}-roc.png, -reliability.png\nlogs         {log_dir}"
    )


def prediction_rows(sets, scores):
    """Each exam's probabilities, both splits, below a row of titles."""
    yield ["split", "id", "label", *scores["valid"]]
    for split in SPLITS:
        for i, exam_id in enumerate(sets[split].ids):
            values = (column[i] for column in scores[split].values())
            values = ("" if np.isnan(value) else f"{value:.{DIGITS}f}" for value in values)
            yield [split, exam_id, f"{sets[split].labels[i, 0]:g}", *values]


def save_figures(start, log_dir, task, labels, scores):
    """ROC curves and reliability diagram, as PNG and for TensorBoard.

    Args:
        start: of the pictures' paths, before "-roc.png".
    """
    figures = {
        "roc": roc_figure(labels["valid"], scores["valid"], band=STACK),
        "reliability": reliability_figure(labels["valid"], scores["valid"][STACK], task),
    }
    for name, figure in figures.items():
        with atomic(Path(f"{start}-{name}.png")) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    with open_writer(log_dir) as writer:
        for name, figure in figures.items():
            writer.add_figure(name, figure)
        writer.add_pr_curve("precision-recall", labels["valid"], scores["valid"][STACK])
        for name, values in scores["valid"].items():
            auc = roc_auc(*answered(labels["valid"], values))
            writer.add_scalar(f"valid-auc/{name}", auc)


if __name__ == "__main__":
    cli.exit_with_status(lambda: run(parse_arguments()))
