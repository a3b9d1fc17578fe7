"""Train one task on one plane, as the article does, and keep the best model.

    python train.py --task acl --plane sagittal                            # MRNet under data/
    python train.py --task acl --plane axial --data-dir data/phantom --lr 1e-4 --epochs 10
    python train.py --task acl --plane sagittal --resume                   # after an interruption

Writes models/<task>-<plane>.pt (the epoch with the best validation AUC, about 10 MB) and
logs/<task>/<plane>/<time>/ for `tensorboard --logdir logs`.

The default recipe is the article's ("How to train an MRI classifier with PyTorch"): Adam, lr 1e-5,
weight decay 0.1, one exam a step, class-weighted cross-entropy, rotation, shift and flip, learning
rate times 0.3 after 3 epochs without a better validation loss, stop after 5. README tells where the
article's code differs and why.
"""

import argparse
import math
import os
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

import engine
from checkpoint import (
    imagenet_features,
    load_model,
    model_path,
    read_checkpoint,
    save_model,
    write_checkpoint,
)
from dataloader import INTENSITIES, PLANES, Augmentation, InputError, MRDataset
from figures import exam_picture, roc_figure
from metrics import roc_auc
from model import MRNet

LR, WEIGHT_DECAY, EPOCHS, PATIENCE = 1e-5, 0.1, 50, 5  # the article's
PLATEAU_PATIENCE, PLATEAU_FACTOR, PLATEAU_THRESHOLD = 3, 0.3, 1e-4  # the article's
STEP_EPOCHS, STEP_FACTOR = 3, 0.5  # the article's
STATE_FORMAT = "mrnet-training-1"


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--task",
        required=True,
        help="any NAME with train-NAME.csv in the data folder; MRNet's: abnormal, acl, meniscus",
    )
    data.add_argument(
        "--plane",
        required=True,
        choices=PLANES,
        help="the article found sagittal best for ACL; train all three to stack them",
    )
    data.add_argument(
        "--data-dir", type=Path, default=Path("data"), help="folder in MRNet's layout"
    )
    data.add_argument(
        "--intensity",
        choices=INTENSITIES,
        default="standardized",
        help="raw feeds 0-255 to the network as the article did; it learns worse",
    )
    data.add_argument(
        "--augment",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="rotate, shift and flip training exams; leave it on, exams are few",
    )

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument(
        "--epochs",
        type=positive_int,
        default=EPOCHS,
        help="at most; early stopping ends most runs sooner",
    )
    recipe.add_argument(
        "--lr",
        type=positive_float,
        default=LR,
        help="1e-5 suits MRNet's 1,130 exams; some hundred exams want 1e-4; above is unstable",
    )
    recipe.add_argument(
        "--weight-decay",
        type=nonnegative_float,
        default=WEIGHT_DECAY,
        help="L2 inside Adam, as in the article",
    )
    recipe.add_argument(
        "--lr-scheduler",
        choices=("plateau", "step", "none"),
        default="plateau",
        help=f"plateau: x {PLATEAU_FACTOR} after {PLATEAU_PATIENCE} epochs without a better "
        f"validation loss; step: x {STEP_FACTOR} every {STEP_EPOCHS} epochs",
    )
    recipe.add_argument(
        "--patience",
        type=positive_int,
        default=PATIENCE,
        help="stop after so many epochs without a better validation loss",
    )
    recipe.add_argument(
        "--dropout",
        type=probability,
        default=0.0,
        help="before the classifier; the article's text has it, its code does not",
    )
    recipe.add_argument(
        "--pretrained",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="start from ImageNet; --no-pretrained starts from random weights, learns far slower",
    )
    recipe.add_argument(
        "--seed", type=int, default=0, help="fixes order, augmentation and initial classifier"
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    machine.add_argument(
        "--precision",
        choices=engine.PRECISIONS,
        default="auto",
        help="auto takes bf16 where the device has it: about twice as fast, same AUC",
    )

    machine.add_argument(
        "--cache",
        choices=engine.CACHES,
        default="auto",
        help="where volumes stay between epochs; auto: the first with room; disk always works",
    )

    files = parser.add_argument_group("files")
    files.add_argument("--models-dir", type=Path, default=Path("models"))
    files.add_argument("--logs-dir", type=Path, default=Path("logs"), help="for TensorBoard")
    files.add_argument(
        "--log-every",
        type=positive_int,
        default=100,
        help="steps between two points of the curves within an epoch",
    )
    files.add_argument(
        "--resume",
        action="store_true",
        help="go on after the last whole epoch of an interrupted run with these arguments",
    )
    return parser.parse_args()


def number(text, kind, good, wanted):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not good(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


def positive_int(text):
    return number(text, int, lambda v: v >= 1, "a whole number of at least 1")


def positive_float(text):
    return number(text, float, lambda v: 0 < v < math.inf, "a number above 0")


def nonnegative_float(text):
    return number(text, float, lambda v: 0 <= v < math.inf, "a number of at least 0")


def probability(text):
    return number(text, float, lambda v: 0 <= v < 1, "a number from 0 to below 1")


def make_scheduler(name, optimizer):
    """The article's learning-rate schedules; each is stepped once an epoch."""
    schedules = torch.optim.lr_scheduler
    if name == "plateau":
        return schedules.ReduceLROnPlateau(
            optimizer, patience=PLATEAU_PATIENCE, factor=PLATEAU_FACTOR, threshold=PLATEAU_THRESHOLD
        )
    if name == "step":
        return schedules.StepLR(optimizer, step_size=STEP_EPOCHS, gamma=STEP_FACTOR)
    return schedules.ConstantLR(optimizer, factor=1.0)


class Training:
    """Everything that changes from epoch to epoch, and nothing else: what a resumed run needs."""

    def __init__(self, args, device):
        torch.manual_seed(args.seed)
        features = imagenet_features() if args.pretrained else None
        self.model = MRNet(features, dropout=args.dropout).to(device)
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True
        )
        self.scheduler = make_scheduler(args.lr_scheduler, self.optimizer)
        self.epoch = 0  # epochs done
        self.best_loss, self.bad_epochs = math.inf, 0  # for early stopping
        self.best_auc, self.best_epoch = -math.inf, 0  # for the model that is kept
        self.log_dir = ""

    PLAIN = ("epoch", "best_loss", "bad_epochs", "best_auc", "best_epoch", "log_dir")
    PARTS = ("model", "optimizer", "scheduler")

    def state(self):
        plain = {name: getattr(self, name) for name in self.PLAIN}
        return plain | {name: getattr(self, name).state_dict() for name in self.PARTS}

    def restore(self, state):
        for name in self.PLAIN:
            setattr(self, name, state[name])
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])


def recipe_of(args):
    """The arguments that change the result, as plain values; a resumed run must agree on them."""
    machine = ("models_dir", "logs_dir", "log_every", "resume", "device", "epochs", "cache")
    return {
        k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in machine
    }


def check_writable(folder):
    """Refuse before the first epoch what would fail after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"{folder}: cannot write models there ({error.strerror}); give another --models-dir"
        ) from None


def resume(training, args, state_path):
    """Take up the state of an interrupted run."""
    if not state_path.is_file():
        raise InputError(f"{state_path}: nothing to resume; start without --resume")
    state = read_checkpoint(state_path, wanted=STATE_FORMAT)
    mine, theirs = recipe_of(args), state["recipe"]
    other = [k for k in mine if mine[k] != theirs.get(k)]
    if other:
        said = ", ".join(f"--{k.replace('_', '-')} {theirs.get(k)}" for k in other)
        raise InputError(f"{state_path}: was trained with {said}; resume with the same arguments")
    training.restore(state["training"])
    print(f"resumed    {state_path} after epoch {training.epoch}")


def log_epoch(writer, training, args, exams, order, logits, losses, valid, seconds):
    """Curves within the epoch (running means, from the steps' own logits) and of the epoch."""
    epoch, n, labels = training.epoch, len(order), exams.labels[order]
    for end in [*range(args.log_every, n, args.log_every), n]:
        step = (epoch - 1) * n + end
        writer.add_scalar("within-epoch/train-loss", losses[:end].mean(), step)
        if len(set(labels[:end])) == 2:
            writer.add_scalar("within-epoch/train-auc", roc_auc(labels[:end], logits[:end]), step)
    writer.add_scalars("loss", {"train": losses.mean(), "valid": valid["loss"]}, epoch)
    writer.add_scalars("auc", {"train": roc_auc(labels, logits), "valid": valid["auc"]}, epoch)
    writer.add_scalar("learning-rate", valid["lr"], epoch)
    writer.add_scalar("exams-per-second", n / seconds, epoch)
    writer.flush()


def one_epoch(training, args, train_set, valid_set, device, precision, writer):
    """Train, evaluate, step the schedule, print one line, keep the best model."""
    began = time.perf_counter()
    training.epoch += 1
    # Everything random in an epoch follows from the seed and the epoch's number.
    torch.manual_seed(args.seed * 1_000_003 + training.epoch)
    what = f"epoch {training.epoch}/{args.epochs}"
    lr = training.optimizer.param_groups[0]["lr"]
    order, logits, losses = engine.train_epoch(
        training.model, train_set, training.optimizer, device, precision, what
    )
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        raise engine.RunError(
            f"the loss became {losses[bad[0]]} in epoch {training.epoch} at "
            f"{train_set.paths[order[bad[0]]]}; look at that exam, or lower --lr. "
            "The models of earlier epochs are kept"
        )
    seconds = time.perf_counter() - began
    valid_logits = engine.predict(training.model, valid_set, device, precision, f"{what} valid")
    valid = {
        "loss": float(engine.losses_of(valid_set, valid_logits).mean()),
        "auc": roc_auc(valid_set.labels, valid_logits),
        "lr": lr,
    }
    train = {"loss": float(losses.mean()), "auc": roc_auc(train_set.labels[order], logits)}
    training.scheduler.step(*([valid["loss"]] if args.lr_scheduler == "plateau" else []))

    if valid["loss"] < training.best_loss:
        training.best_loss, training.bad_epochs = valid["loss"], 0
    else:
        training.bad_epochs += 1
    better = valid["auc"] > training.best_auc
    if better:
        training.best_auc, training.best_epoch = valid["auc"], training.epoch
        save_model(
            model_path(args.models_dir, args.task, args.plane),
            training.model,
            {
                "task": args.task,
                "plane": args.plane,
                "intensity": args.intensity,
                "pretrained": args.pretrained,
                "precision": precision,
                "epoch": training.epoch,
                "metrics": {
                    "train_loss": train["loss"],
                    "train_auc": train["auc"],
                    "valid_loss": valid["loss"],
                    "valid_auc": valid["auc"],
                },
                "arguments": recipe_of(args),
                "class_weights": list(train_set.class_weights),
                "data": {"train": train_set.fingerprint(), "valid": valid_set.fingerprint()},
                "git": engine.git_sha(),
                "versions": engine.versions(),
            },
        )
    print(
        f"{training.epoch:5d}  {train['loss']:10.4f}  {train['auc']:9.4f}  {valid['loss']:10.4f}  "
        f"{valid['auc']:9.4f}  {lr:7.1e}  {time.perf_counter() - began:7.1f}  "
        f"{len(order) / seconds:7.1f}"
        f"{'  best' if better else ''}",
        flush=True,
    )
    log_epoch(writer, training, args, train_set, order, logits, losses, valid, seconds)


def log_end(writer, training, args, valid_set, device, precision):
    """Curves of the best model, and the arguments beside the final metrics."""
    model, _ = load_model(model_path(args.models_dir, args.task, args.plane))
    probabilities = engine.sigmoid(engine.predict(model.to(device), valid_set, device, precision))
    writer.add_pr_curve("precision-recall", valid_set.labels, probabilities, training.best_epoch)
    title = f"{args.task}, {args.plane}, epoch {training.best_epoch}"
    figure = roc_figure(valid_set.labels, {title: probabilities})
    writer.add_figure("roc", figure, training.best_epoch)
    writer.add_hparams(
        recipe_of(args),
        {
            "best/valid-auc": training.best_auc,
            "best/valid-loss": training.best_loss,
            "best/epoch": training.best_epoch,
        },
        run_name=".",
    )


def main():
    args = parse_arguments()
    device = engine.pick_device(args.device)
    precision = engine.pick_precision(args.precision, device)
    check_writable(args.models_dir)
    engine.start_up(args, device, precision)
    train_set, valid_set = (
        MRDataset(
            args.data_dir,
            args.task,
            args.plane,
            train=train,
            transform=Augmentation() if train and args.augment else None,
            intensity=args.intensity,
        )
        for train in (True, False)
    )
    for exams in (train_set, valid_set):
        slices = [shape[0] for shape in exams.shapes]
        print(
            f"{exams.split:<10} {len(exams)} exams, {int(exams.labels.sum())} positive, "
            f"{min(slices)} to {max(slices)} slices"
        )
    print("class weights  negative {:g}, positive {:.3f}".format(*train_set.class_weights))
    engine.keep_volumes((train_set, valid_set), args.cache, device)
    if not args.pretrained:
        print("weights    RANDOM (--no-pretrained): no ImageNet features")

    training = Training(args, device)
    state_path = args.models_dir / f"{args.task}-{args.plane}.state"
    if args.resume:
        resume(training, args, state_path)
    training.log_dir = training.log_dir or str(
        args.logs_dir / args.task / args.plane / f"{datetime.now():%Y%m%d-%H%M%S}"
    )
    writer = SummaryWriter(training.log_dir, purge_step=training.epoch + 1 if args.resume else None)
    writer.add_image("an augmented training exam", exam_picture(train_set[0][0], args.intensity))
    print(
        f"\n{'epoch':>5}  {'train loss':>10}  {'train auc':>9}  {'valid loss':>10}  "
        f"{'valid auc':>9}  {'lr':>7}  {'seconds':>7}  {'exams/s':>7}"
    )
    try:
        while training.epoch < args.epochs and training.bad_epochs < args.patience:
            one_epoch(training, args, train_set, valid_set, device, precision, writer)
            write_checkpoint(
                state_path,
                {"format": STATE_FORMAT, "recipe": recipe_of(args), "training": training.state()},
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Go on with the same command and --resume") from None
    if training.bad_epochs >= args.patience:
        print(f"stopped: validation loss has not improved for {args.patience} epochs")
    log_end(writer, training, args, valid_set, device, precision)
    writer.close()
    state_path.unlink(missing_ok=True)
    print(
        f"\nbest validation AUC {training.best_auc:.4f} (epoch {training.best_epoch}; optimistic: "
        "the epoch was chosen on these exams)"
    )
    print(f"model  {model_path(args.models_dir, args.task, args.plane)}\nlogs   {training.log_dir}")


if __name__ == "__main__":
    engine.run(main)
