"""Combine the three planes' networks of one task: logistic regression on their probabilities.

    python train_logistic_regression.py                        # task acl, MRNet under data/
    python train_logistic_regression.py --task meniscus --data-dir data/phantom

Loads models/<task>-{axial,coronal,sagittal}.pt, predicts all training exams (without augmentation)
and validation exams, fits scikit-learn's LogisticRegression on the training predictions, and writes
models/<task>-stack.json, models/<task>-predictions.csv and logs/<task>/stack/<time>/.

Source: the article, section on combining the planes (its script was never published); Bien et al.,
PLOS Medicine 2018, "the predictions from the three series were combined by logistic regression".
"""

import argparse
import csv
import io
from datetime import datetime
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from torch.utils.tensorboard import SummaryWriter

import engine
from checkpoint import load_model, model_path, save_stack, write_text
from dataloader import PLANES, InputError, MRDataset, read_labels
from figures import roc_figure
from metrics import roc_auc

SPLITS = ("train", "valid")


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
    parser.add_argument("--models-dir", type=Path, default=Path("models"))
    parser.add_argument("--logs-dir", type=Path, default=Path("logs"), help="for TensorBoard")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=engine.PRECISIONS, default="auto")
    return parser.parse_args()


def load_planes(args):
    """The three planes' models and what they say of themselves: {plane: (model, about)}."""
    missing = [p for p in PLANES if not model_path(args.models_dir, args.task, p).is_file()]
    if missing:
        commands = "; ".join(
            f"python train.py --task {args.task} --plane {p} --data-dir {args.data_dir}"
            for p in missing
        )
        raise InputError(
            f"{args.models_dir}: no {args.task} model for {', '.join(missing)}. Run {commands}"
        )
    return {plane: load_model(model_path(args.models_dir, args.task, plane)) for plane in PLANES}


def predict_split(args, planes, split, device, precision):
    """Each plane's probability for each exam of a split: float64 (n, 3)."""
    columns = []
    for plane, (model, about) in planes.items():
        exams = MRDataset(
            args.data_dir, args.task, plane, train=split == "train", intensity=about["intensity"]
        )
        if exams.fingerprint() != about["data"][split]:
            print(f"warning: {plane} was trained on other exams than {args.data_dir} holds")
        logits = engine.predict(model.to(device), exams, device, precision, f"{plane} {split}")
        columns.append(engine.sigmoid(logits))
    return np.stack(columns, axis=1)


def print_table(task, labels, scores):
    """One row for each plane and the stack: AUC on both splits."""
    counts = {s: f"{len(labels[s])} exams, {int(labels[s].sum())} positive" for s in SPLITS}
    print(f"\n{task}: training {counts['train']}; validation {counts['valid']}\n")
    print(f"{'':<10}  {'train AUC':>9}  {'valid AUC':>9}")
    for name in scores["valid"]:
        aucs = (roc_auc(labels[split], scores[split][name]) for split in SPLITS)
        print(f"{name:<10}  " + "  ".join(f"{auc:9.4f}" for auc in aucs))
    print(
        "\noptimistic: the planes' epochs were chosen on these validation exams, and the stack was "
        "fitted\non predictions for exams that the networks had learnt from, as in the article"
    )


def predictions_csv(args, labels, scores):
    """Each exam's probabilities, both splits, as CSV text."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["split", "id", "label", *scores["valid"]])
    for split in SPLITS:
        ids, _ = read_labels(args.data_dir, args.task, split)
        for i, exam_id in enumerate(ids):
            values = (f"{column[i]:.8f}" for column in scores[split].values())
            rows.writerow([split, exam_id, int(labels[split][i]), *values])
    return text.getvalue()


def main():
    args = parse_arguments()
    device = engine.pick_device(args.device)
    precision = engine.pick_precision(args.precision, device)
    labels = {split: read_labels(args.data_dir, args.task, split)[1] for split in SPLITS}
    planes = load_planes(args)
    engine.start_up(args, device, precision)

    features = {split: predict_split(args, planes, split, device, precision) for split in SPLITS}
    stack = LogisticRegression().fit(features["train"], labels["train"])
    scores = {}
    for split in SPLITS:
        scores[split] = dict(zip(PLANES, features[split].T, strict=True))
        scores[split]["stack"] = stack.predict_proba(features[split])[:, 1]
    print_table(args.task, labels, scores)

    stack_path = args.models_dir / f"{args.task}-stack.json"
    save_stack(
        stack_path,
        {
            "task": args.task,
            "planes": list(PLANES),
            "features": "probability",
            "coefficients": stack.coef_[0].tolist(),
            "intercept": float(stack.intercept_[0]),
            "metrics": {
                split: {
                    name: roc_auc(labels[split], values) for name, values in scores[split].items()
                }
                for split in SPLITS
            },
            "data": planes[PLANES[0]][1]["data"],
            "git": engine.git_sha(),
            "versions": engine.versions(),
        },
    )
    predictions_path = args.models_dir / f"{args.task}-predictions.csv"
    write_text(predictions_path, predictions_csv(args, labels, scores))
    log_dir = args.logs_dir / args.task / "stack" / f"{datetime.now():%Y%m%d-%H%M%S}"
    with SummaryWriter(log_dir) as writer:
        writer.add_figure("roc", roc_figure(labels["valid"], scores["valid"]))
        writer.add_pr_curve("precision-recall", labels["valid"], scores["valid"]["stack"])
        for name, values in scores["valid"].items():
            writer.add_scalar(f"valid-auc/{name}", roc_auc(labels["valid"], values))
    print(f"\nstack        {stack_path}\npredictions  {predictions_path}\nlogs         {log_dir}")


if __name__ == "__main__":
    engine.run(main)
