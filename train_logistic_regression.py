"""Combine the three planes' networks of one task: logistic regression on their predictions.

    python train_logistic_regression.py                        # task acl, MRNet under data/
    python train_logistic_regression.py --task meniscus --data-dir data/phantom
    python train_logistic_regression.py --folds 5 --repeat 3   # what train.py made with these

Loads models/<task>-{axial,coronal,sagittal}*.pt, predicts training exams (without augmentation) and
validation exams, fits scikit-learn's LogisticRegression on the training predictions, reports AUC
with its interval, operating points and calibration, and writes models/<task>-stack.json,
<task>-predictions.csv, <task>-results.json, <task>-roc.png, <task>-reliability.png and
logs/<task>/stack/<time>/.

With `--folds 1`, the article's way, the regression is fitted on exams that the networks have learnt
from. With `--folds K` each training exam is predicted by the network that never saw it, and the K
networks are averaged for every other exam.

Sources: the article, section on combining the planes (its script was never published); Bien et al.,
PLOS Medicine 2018: logistic regression on the three planes' probabilities. Out-of-fold stacking:
Wolpert, "Stacked generalization", Neural Networks 5(2), 1992.
"""

import argparse
import csv
import io
import json
import statistics
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression

import engine
from checkpoint import (
    COMBINATIONS,
    atomic,
    digest_of,
    load_model,
    model_path,
    run_suffix,
    save_stack,
    stack_path,
    write_text,
)
from common.errors import InputError
from dataloader import PLANES, SPLITS, MRDataset
from figures import reliability_figure, roc_figure
from metrics import auc_difference, auc_interval, choose_threshold, summary

STACK = "stack"
STAR = "*"  # beside each threshold: how it was chosen is said below


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--task", default="acl", help="any task whose three planes are trained")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path("data"),
        help="the folder that the planes were trained on",
    )
    parser.add_argument(
        "--features",
        choices=("probability", "logit"),
        default="probability",
        help="what the regression is fed; the article and Stanford feed probabilities",
    )
    parser.add_argument("--folds", type=int, default=1, help="as given to train.py")
    parser.add_argument("--repeat", type=int, default=1, help="as given to train.py")
    parser.add_argument("--seed", type=int, default=0, help="as given to train.py")
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
    engine.add_machine_arguments(parser)
    args = parser.parse_args()
    if args.folds < 1 or args.repeat < 1:
        parser.error("--folds and --repeat are at least 1")
    if args.sensitivity is not None and not 0 < args.sensitivity <= 1:
        parser.error("--sensitivity is above 0 and at most 1")
    return args


def members_of(args, plane, seed):
    """Paths of one plane's networks for one seed: one, or one a fold."""
    named = seed if args.repeat > 1 else None
    folds = range(1, args.folds + 1) if args.folds > 1 else [0]
    return [
        model_path(args.models_dir, args.task, plane, run_suffix(fold, args.folds, named))
        for fold in folds
    ]


def check_members(args, seeds):
    """Name the planes that are not trained, with the command that trains them."""
    for plane in PLANES:
        for seed in seeds:
            for path in members_of(args, plane, seed):
                unfinished = path.with_suffix(".state").is_file()
                if unfinished or not path.is_file():
                    more = f" --folds {args.folds}" if args.folds > 1 else ""
                    more += f" --repeat {args.repeat}" if args.repeat > 1 else ""
                    raise InputError(
                        f"{path}: the {plane} plane of {args.task} is not trained"
                        f"{' to its end' if unfinished else ''}. Run python train.py --task "
                        f"{args.task} --plane {plane} --data-dir {args.data_dir} --models-dir "
                        f"{args.models_dir} --seed {args.seed}{more} --resume, with the recipe of "
                        "the other planes"
                    )


def check_network(path, about, sets, fold, folds, seed):
    """Refuse a network that was trained on other exams, another fold or another seed.

    Raises:
        InputError: with what it was trained on.
    """
    wanted = {"seed": seed, "fold": fold, "folds": folds}
    have = {"folds": about.get("arguments", {}).get("folds", folds)}
    have |= {name: about.get(name, wanted[name]) for name in ("seed", "fold")}
    other = [f"{name} {have[name]}" for name in wanted if have[name] != wanted[name]]
    if other:
        raise InputError(
            f"{path}: was trained with {', '.join(other)}; give --seed, --folds and --repeat as "
            "train.py had them, or train it again"
        )
    splits = {"valid": sets["valid"]}
    # Earlier versions did not tell which exams chose the epoch.
    if "tuning" in about or about["protocol"] == "article":
        unused = {*about["held_out"], *about.get("tuning", ())}
        ids = sets["train"].ids
        rows = [row for row, exam_id in enumerate(ids) if exam_id not in unused]
        splits["train"] = sets["train"].subset(rows)
    for split, exams in splits.items():
        if not exams.has_fingerprint(about["data"].get(split, "")):
            beside = "beside other validation" if split == "valid" else "on other training"
            raise InputError(
                f"{path}: was trained {beside} exams than {sets[split].root} holds; give the "
                "--data-dir that it was trained on, or train it again"
            )


class PlaneLogits(NamedTuple):
    """What one plane's networks of one seed say."""

    train: np.ndarray  # float64 (n, 1): of the network that did not see the exam, with folds
    valid: np.ndarray  # float64 (m, networks)
    protocols: set
    tuning: list  # ids of the exams that chose the epoch, where it is one network


def predict_plane(args, plane, seed, sets, device, precision):
    """One plane's logits for one seed: PlaneLogits.

    Training exams are predicted by the network that did not see them where there is one (folds),
    else by the only network; validation exams by all networks.
    """
    train_set, valid_set = sets["train"], sets["valid"]
    out, valid = np.full(len(train_set), np.nan), []
    members, protocols, tuning = members_of(args, plane, seed), set(), []
    for number, path in enumerate(members, start=1):
        model, about = load_model(path, args.task, plane)
        check_network(path, about, sets, number if args.folds > 1 else 0, args.folds, seed)
        train_set.intensity = valid_set.intensity = about["intensity"]
        rows = train_set.rows_of(about["held_out"]) if args.folds > 1 else range(len(train_set))
        model = model.to(device)
        out[rows] = engine.predict(model, train_set.subset(rows), device, precision, path.stem)
        valid.append(engine.predict(model, valid_set, device, precision, path.stem))
        protocols.add(about["protocol"])
        tuning = about.get("tuning", []) if args.folds == 1 else []
    if np.isnan(out).any():
        raise InputError(f"{members[0]}: its folds leave training exams out; train all folds again")
    valid = np.stack(valid, axis=1).astype(np.float64)
    return PlaneLogits(out[:, None], valid, protocols, tuning)


def fit_combinations(args, logits, labels, tuning):
    """A regression for each set of planes, so that an exam that lacks a plane has one too.

    Args:
        logits: {plane: float64 (n, networks)} of the training exams.
        tuning: bool (n,), the exams that thresholds are chosen on and regressions not fitted on;
            all False: both are done on all exams.

    Returns:
        {"axial+coronal+sagittal": {"coefficients", "intercept", "threshold"}, ...}
    """
    combinations = {}
    for name in COMBINATIONS:
        x = engine.stack_features(args.features, name.split("+"), logits)
        fitted = LogisticRegression().fit(x[~tuning], labels[~tuning])
        combinations[name] = {
            "coefficients": fitted.coef_[0].tolist(),
            "intercept": float(fitted.intercept_[0]),
            "threshold": threshold_for(args, labels, fitted.predict_proba(x)[:, 1], tuning),
        }
    return combinations


def threshold_for(args, labels, probabilities, tuning):
    """A threshold chosen on training predictions, never on the exams that are reported."""
    if tuning.any():
        labels, probabilities = labels[tuning], probabilities[tuning]
    if args.sensitivity is None:
        return choose_threshold(labels, probabilities)
    return choose_threshold(labels, probabilities, "sensitivity", args.sensitivity)


def make_stack(args, logits, labels, tuning):
    """Fit and apply one stack.

    Args:
        logits: {split: {plane: float64 (n, networks)}}.
        tuning: as `fit_combinations` takes it.

    Returns:
        the stack as `checkpoint.save_stack` takes it, {split: {name: probabilities}} with the
        planes and the stack, and {name: threshold}.
    """
    stack = {
        "task": args.task,
        "features": args.features,
        "combinations": fit_combinations(args, logits["train"], labels["train"], tuning),
    }
    scores, thresholds = {}, {}
    for split in SPLITS:
        planes = logits[split].items()
        scores[split] = {plane: engine.sigmoid(values).mean(axis=1) for plane, values in planes}
        scores[split][STACK], thresholds[STACK] = engine.combine(stack, logits[split])
    for plane in PLANES:
        p = scores["train"][plane]
        thresholds[plane] = threshold_for(args, labels["train"], p, tuning)
    return stack, scores, thresholds


def tuning_rows(sets, found):
    """The training exams that thresholds are chosen on: bool (n,), all False where there are none.

    Those that chose the epoch of the only network of each plane: no network learnt from them, and
    what is applied later is these very networks.

    Args:
        found: list of PlaneLogits.
    """
    train_set = sets[PLANES[0]]["train"]
    tuning = np.zeros(len(train_set), bool)
    if len(found) == len(PLANES) and len({frozenset(one.tuning) for one in found}) == 1:
        tuning[train_set.rows_of(found[0].tuning)] = True
    return tuning


def threshold_source(args, tuning):
    """Which predictions the thresholds were chosen on, and what that means for new exams."""
    if tuning.any():
        return (
            f"chosen on {int(tuning.sum())} training exams that no network learnt from; "
            "they chose the epochs"
        )
    if args.folds > 1:
        return (
            f"chosen on out-of-fold predictions of single networks and applied to means "
            f"of {args.folds * args.repeat}, which vary less: at new exams sensitivity and "
            "specificity may differ from those meant"
        )
    return (
        "chosen on exams that the networks had learnt from, so not to be trusted at new "
        "exams; --folds, or --protocol held-out, gives better ones"
    )


def print_report(args, labels, scores, thresholds, protocol, said):
    """One row for each plane and the stack; returns the numbers for results.json.

    Args:
        said: lines of `caveats`.
    """
    counts = {s: f"{len(labels[s])} exams, {int(labels[s].sum())} positive" for s in SPLITS}
    print(f"\n{args.task}: training {counts['train']}; validation {counts['valid']}")
    print(f"protocol {protocol}, folds {args.folds}, stacked on each plane's {args.features}\n")
    fitted = "out-of-fold AUC" if args.folds > 1 else "train AUC"
    print(
        f"{'':<9} {fitted:>15}  {'valid AUC [95 %]':>20}  {'threshold':>9}  {'sensitivity':>11}  "
        f"{'specificity':>11}  {'accuracy':>8}  {'at 0.5: sens, spec, acc':>23}  {'Brier':>6}  "
        f"{'ECE':>5}"
    )
    rows = {}
    for name in scores["valid"]:
        p = scores["valid"][name]
        row = summary(labels["valid"], p, thresholds[name])
        half = summary(labels["valid"], p, 0.5)
        row["train_auc"] = auc_interval(labels["train"], scores["train"][name]).value
        row |= {f"{key}_at_half": half[key] for key in ("sensitivity", "specificity", "accuracy")}
        rows[name] = row
        print(
            f"{name:<9} {row['train_auc']:15.4f}  {row['auc']:6.4f} [{row['auc_low']:.3f}, "
            f"{row['auc_high']:.3f}]  {row['threshold']:8.3f}{STAR}  {row['sensitivity']:11.3f}  "
            f"{row['specificity']:11.3f}  {row['accuracy']:8.3f}  "
            f"{half['sensitivity']:9.3f} {half['specificity']:6.3f} {half['accuracy']:6.3f}  "
            f"{row['brier']:6.3f}  {row['ece']:5.3f}"
        )
    best = max(PLANES, key=lambda plane: rows[plane]["train_auc"])
    gain = auc_difference(labels["valid"], scores["valid"][STACK], scores["valid"][best])
    print(
        f"\nstack against {best}, the plane with the best training AUC: {gain.value:+.4f} "
        f"[{gain.low:+.3f}, {gain.high:+.3f}], p = {gain.p:.2g} (paired DeLong)"
    )
    for line in said:
        print(line)
    return rows | {"stack against best plane": {"plane": best} | gain._asdict()}


def caveats(args, protocol, chosen):
    """What a reader must know before believing the table.

    Args:
        chosen: `threshold_source`.
    """
    said = [f"{STAR} thresholds: {chosen}"]
    if protocol == "article":
        said.append("OPTIMISTIC: the epochs were chosen on the validation exams reported here")
    if args.folds == 1:
        said.append("the stack was fitted on exams that the networks had learnt from (the article)")
    return said


def predictions_csv(sets, scores):
    """Each exam's probabilities, both splits, as CSV text."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["split", "id", "label", *scores["valid"]])
    for split in SPLITS:
        for i, exam_id in enumerate(sets[split].ids):
            values = (f"{column[i]:.9f}" for column in scores[split].values())
            rows.writerow([split, exam_id, int(sets[split].labels[i]), *values])
    return text.getvalue()


def save_figures(args, labels, scores):
    """ROC curves and reliability diagram, as PNG and for TensorBoard."""
    figures = {
        "roc": roc_figure(labels["valid"], scores["valid"], band=STACK),
        "reliability": reliability_figure(labels["valid"], scores["valid"][STACK], args.task),
    }
    for name, figure in figures.items():
        path = args.models_dir / f"{args.task}-{name}.png"
        with atomic(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    log_dir = args.logs_dir / args.task / "stack" / f"{datetime.now():%Y%m%d-%H%M%S}"
    with engine.open_writer(log_dir) as writer:
        for name, figure in figures.items():
            writer.add_figure(name, figure)
        writer.add_pr_curve("precision-recall", labels["valid"], scores["valid"][STACK])
        for name, values in scores["valid"].items():
            writer.add_scalar(f"valid-auc/{name}", auc_interval(labels["valid"], values).value)
    return log_dir


def main():
    args = parse_arguments()
    device = engine.pick_device(args.device)
    precision = engine.pick_precision(args.precision, device)
    seeds = range(args.seed, args.seed + args.repeat)
    sets = {
        plane: {
            split: MRDataset(args.data_dir, args.task, plane, train=split == "train")
            for split in SPLITS
        }
        for plane in PLANES
    }
    labels = {split: sets[PLANES[0]][split].labels for split in SPLITS}
    check_members(args, seeds)
    commit = engine.start_up(args, device, precision)

    found = {  # plane -> [PlaneLogits, one a seed]
        plane: [predict_plane(args, plane, seed, sets[plane], device, precision) for seed in seeds]
        for plane in PLANES
    }
    every = [one for ones in found.values() for one in ones]
    protocols = set().union(*(one.protocols for one in every))
    # One optimistic network makes the stack optimistic.
    protocol = "article" if "article" in protocols else protocols.pop()
    if args.repeat > 1:
        aucs = []
        for k, seed in enumerate(seeds):
            one = {s: {plane: getattr(found[plane][k], s) for plane in PLANES} for s in SPLITS}
            tuning = tuning_rows(sets, [found[plane][k] for plane in PLANES])
            _, scores, _ = make_stack(args, one, labels, tuning)
            aucs.append(auc_interval(labels["valid"], scores["valid"][STACK]).value)
            print(f"seed {seed}: stack, validation AUC {aucs[-1]:.4f}")
        spread = statistics.stdev(aucs)
        print(f"{args.repeat} seeds: mean {statistics.mean(aucs):.4f}, deviation {spread:.4f}")
        print("the table below is their ensemble: each plane's networks averaged, then stacked")
    logits = {
        split: {
            plane: np.concatenate([getattr(one, split) for one in found[plane]], axis=1)
            for plane in PLANES
        }
        for split in SPLITS
    }
    tuning = tuning_rows(sets, every)
    stack, scores, thresholds = make_stack(args, logits, labels, tuning)
    chosen = threshold_source(args, tuning)
    said = caveats(args, protocol, chosen)
    rows = print_report(args, labels, scores, thresholds, protocol, said)

    path = stack_path(args.models_dir, args.task)
    provenance = {
        "protocol": protocol,
        "folds": args.folds,
        "thresholds": chosen,
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "data": {split: sets[PLANES[0]][split].fingerprint() for split in SPLITS},
        "git": commit,
        "versions": engine.versions(),
    }
    members = {p: [m.name for seed in seeds for m in members_of(args, p, seed)] for p in PLANES}
    digests = {
        name: digest_of(args.models_dir / name) for names in members.values() for name in names
    }
    save_stack(path, stack | {"members": members, "digests": digests} | provenance)
    results = {"task": args.task, "valid": rows, "caveats": said} | provenance
    if args.repeat > 1:
        results["stack_auc_of_seeds"] = aucs
    results_path = args.models_dir / f"{args.task}-results.json"
    write_text(results_path, json.dumps(results, indent=2) + "\n")
    predictions_path = args.models_dir / f"{args.task}-predictions.csv"
    write_text(predictions_path, predictions_csv(sets[PLANES[0]], scores))
    log_dir = save_figures(args, labels, scores)
    print(
        f"\nstack        {path}\nresults      {results_path}\npredictions  {predictions_path}\n"
        f"figures      {args.models_dir / args.task}-roc.png, -reliability.png\n"
        f"logs         {log_dir}"
    )


if __name__ == "__main__":
    engine.run(main)
