"""Train one task on one plane, as the article does, and save the best model.

    python train.py --task acl --plane sagittal                            # MRNet under data/
    python train.py --task acl --plane axial --data-dir data/phantom --lr 1e-4 --epochs 10
    python train.py --task acl --plane sagittal --resume                   # after an interruption
    python train.py --task acl --plane sagittal --protocol held-out --folds 5 --repeat 3

Writes models/<task>-<plane>.pt (the epoch with the best AUC on the validation exams, or with
`--protocol held-out` on the tuning exams; about 10 MB) and
logs/<task>/<plane>/<time>/ for `tensorboard --logdir logs`.

The default recipe is the article's ("How to train an MRI classifier with PyTorch"): Adam, lr 1e-5,
weight decay 0.1, one exam per step, class-weighted binary cross-entropy, rotation, shift and flip,
learning rate times 0.3 after 3 epochs without a better validation loss, stop after 5.
docs/differences.md lists where the article's code differs and why; common/splits.py describes
protocols and folds.

run -> train_network (one network) -> train_epochs (its epochs) -> train_model and evaluate_model
(one pass over the exams) -> common/engine.py (the loop, the loss, the optimizer's step).
"""

import argparse
import time
from dataclasses import MISSING, asdict, fields
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import cli, engine
from common.checkpoint import (
    TrainState,
    check_writable,
    is_finished,
    load_model,
    lock,
    model_path,
    restore_state,
    save_model,
)
from common.config import Config
from common.devices import CACHES, GraphedSteps, cache_volumes, pick_device, pick_precision
from common.errors import InputError, Interrupted, RunError
from common.logs import TrainingLog
from common.metrics import auc_interval, roc_auc
from common.splits import PROTOCOLS, plan_splits, write_folds
from common.weights import imagenet_features
from dataloader import INTENSITIES, PLANES, Augmentation, MRDataset, grey_levels
from model import MRNet

PLATEAU_PATIENCE, PLATEAU_FACTOR, PLATEAU_THRESHOLD = 3, 0.3, 1e-4  # the article's
STEP_EPOCHS, STEP_FACTOR = 3, 0.5  # the article's
SCHEDULERS = ("plateau", "step", "none")


def parse_arguments():
    parser = cli.make_parser(__doc__)  # the recipe's defaults are in common/config.py
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("data").add_argument
    add(
        "--task",
        required=True,
        help="any NAME with train-NAME.csv in the data folder; MRNet's: abnormal, acl, meniscus",
    )
    add(
        "--plane",
        required=True,
        choices=PLANES,
        help="the article found sagittal best for ACL; train all three to stack them",
    )
    add("--data-dir", type=Path, default=Path("data"), help="folder in MRNet's layout")
    raw = "raw gives the network 0-255 as the article did; it learns worse"
    add("--intensity", choices=INTENSITIES, help=raw)
    augment = "rotate, shift and flip training exams; leave it on, exams are few"
    add("--augment", action=switch, help=augment)

    add = parser.add_argument_group("recipe").add_argument
    add("--epochs", type=cli.positive_int, help="at most; early stopping ends most runs sooner")
    lr = "1e-5 suits MRNet's 1,130 exams; with 200, 3e-5 to 1e-4; higher values are unstable"
    add("--lr", type=cli.positive_float, help=lr)
    l2 = "L2 inside Adam, as in the article"
    add("--weight-decay", type=cli.nonnegative_float, help=l2)
    add(
        "--lr-scheduler",
        choices=SCHEDULERS,
        help=f"plateau: x {PLATEAU_FACTOR} after {PLATEAU_PATIENCE} epochs without a better "
        f"loss; step: x {STEP_FACTOR} every {STEP_EPOCHS} epochs",
    )
    patience = "stop after this many epochs without a better loss"
    add("--patience", type=cli.positive_int, help=patience)
    dropout = "before the classifier; the article's text has it, its code does not"
    add("--dropout", type=cli.probability, help=dropout)
    weights = "weight positives by negatives/positives, as the article's text asks"
    add("--class-weights", action=switch, help=weights)
    imagenet = "start from ImageNet; --no-pretrained starts from random weights, learns far slower"
    add("--pretrained", action=switch, help=imagenet)
    add("--seed", type=cli.seed_number, help="fixes order, augmentation and initial classifier")

    add = parser.add_argument_group("protocol").add_argument
    add(
        "--protocol",
        choices=PROTOCOLS,
        help="what selects the epoch and stops the training: the validation exams themselves "
        "(optimistic) or a held-out part of the training exams",
    )
    add(
        "--folds",
        type=cli.positive_int,
        help="number of networks, each trained without its fold of the training exams; 3 to 5 "
        "for honest stacking, 1 is the article's",
    )
    seeds = "number of seeds, from --seed on; differences below their spread are noise"
    add("--repeat", type=cli.positive_int, help=seeds)

    machine = parser.add_argument_group("machine")
    cli.add_machine_arguments(machine)
    cache = "where volumes are cached between epochs; auto: the first with room; disk always works"
    machine.add_argument("--cache", choices=CACHES, default="auto", help=cache)
    graphs = "replay whole steps as CUDA graphs: for a GPU that waits for Python"
    machine.add_argument("--cuda-graphs", action=switch, help=graphs)

    add = parser.add_argument_group("files").add_argument
    models = "for models and the state of a training"
    add("--models-dir", type=Path, default=Path("models"), help=models)
    add("--logs-dir", type=Path, default=Path("logs"), help="for TensorBoard")
    points = "steps between two points of the curves within an epoch"
    add("--log-every", type=cli.positive_int, default=100, help=points)
    resume = "skip trainings that are finished, continue one that was interrupted"
    add("--resume", action="store_true", help=resume)
    article = {f.name: f.default for f in fields(Config) if f.default is not MISSING}
    parser.set_defaults(**article | {"device": "auto", "precision": "auto"})
    return parser.parse_args()


class Files(NamedTuple):
    """Where a training writes."""

    models_dir: Path
    logs_dir: Path
    log_every: int  # steps
    resume: bool


def run(args):
    """Train every network that the arguments ask for: one, or one for each fold and seed."""
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    check_writable(args.models_dir)
    args.device, args.precision = device.type, precision  # what "auto" became
    commit = cli.print_start_up(vars(args), device, precision)
    config = Config(**{field.name: getattr(args, field.name) for field in fields(Config)})
    files = Files(args.models_dir, args.logs_dir, args.log_every, args.resume)
    train_set, valid_set = load_exams(config, args.data_dir)
    cached = cache_volumes(
        (train_set, valid_set), args.cache, device, partial(cli.progress, what="reading")
    )
    if config.cuda_graphs and (device.type != "cuda" or cached != "device"):
        raise InputError("--cuda-graphs: needs --device cuda and room for --cache device")
    for exams in (train_set, valid_set):
        exams.fingerprint()  # hashes the voxels once, before subsets are taken
    provenance = {"git": commit, "versions": cli.versions(), "dataset": train_set.description}
    provenance["data_dir"] = str(args.data_dir)
    seeds = range(config.seed, config.seed + config.repeat)
    splits = plan_splits(train_set, valid_set, config.protocol, config.folds, seeds)
    write_folds(args.models_dir / f"{config.task}-folds.csv", splits)
    for number, split in enumerate(splits, start=1):
        if len(splits) > 1:
            print(f"\n-- network {number} of {len(splits)}: seed {split.seed}, fold {split.fold}")
        with lock(model_path(files.models_dir, config.task, config.plane, split.suffix)):
            train_network(config, split, files, provenance)


def train_network(config, split, files, provenance):
    """Train one network to its end, or to where a signal leaves it to be resumed.

    Args:
        config: Config.
        split: splits.Split, the exams of this network.
        files: Files.
        provenance: dict of plain values for its metadata: commit at the start, versions, data set.
    """
    path = model_path(files.models_dir, config.task, config.plane, split.suffix)
    state_path = path.with_suffix(".state")
    about = asdict(config), split.data_sets
    if files.resume and not state_path.is_file() and is_finished(path, *about):
        print(f"\nfinished before: {path}")
        return
    state = start_state(config, split)
    done = None
    if files.resume and restore_state(state_path, state, *about):
        done = state.epoch, state.epoch * len(split.train_set)
        steps = f" and {len(state.partial_epoch['logits'])} steps" if state.partial_epoch else ""
        print(f"\nresumed {state_path} after epoch {state.epoch}{steps}")
    state.log_dir = state.log_dir or new_log_dir(config, split, files)
    save_state = partial(state.save, state_path, asdict(config), split.fingerprints())
    save_state()  # before the first model: a model without a state beside it is a finished one
    with (
        TrainingLog(state.log_dir, files.log_every, done) as log,
        cli.stop_after_step() as stop_requested,
    ):
        if state.epoch == 0:
            log.add_images("an augmented training exam", augmented_exam(config, split), 1)
        try:
            for epoch in train_epochs(config, split, state, stop_requested):
                if epoch is not None:
                    if epoch.is_best:
                        save_model(path, state.model, describe(config, split, epoch, provenance))
                    print(epoch, flush=True)
                    log.add_steps(epoch.number, *epoch.steps)
                    log.add_epoch(epoch.number, epoch.metrics, epoch.lr, epoch.exams_per_second)
                save_state()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(cli.resume_with()) from None
        if not stop_requested:
            if state.bad_epochs >= config.patience:
                metric = f"{split.selected_on} loss"
                print(f"stopped: {metric} has not improved for {config.patience} epochs")
            report_best_model(config, split, path, state.log_dir, log)
            state_path.unlink(missing_ok=True)
        if stop_requested:  # perhaps while reporting: another network may be next
            raise Interrupted(stop_requested[0], cli.resume_with())


class Epoch(NamedTuple):
    """What one epoch gave."""

    number: int  # from 1
    lr: float
    steps: tuple  # labels, logits, weighted losses of the steps, float32 (n,) each, in their order
    metrics: dict  # {"train", and "valid" or "tune": {"loss", "auc"}}
    exams_per_second: float  # of training
    seconds: float  # of training and evaluation
    is_best: bool  # the best AUC so far

    def __str__(self):
        """A line of the table that `train_epochs` begins."""
        train, selected = self.metrics.values()
        return (
            f"{self.number:5d}  {train['loss']:10.4f}  {train['auc']:9.4f}  "
            f"{selected['loss']:10.4f}  {selected['auc']:9.4f}  {self.lr:7.1e}  "
            f"{self.seconds:7.1f}  {self.exams_per_second:7.1f}{'  best' if self.is_best else ''}"
        )


def train_epochs(config, split, state, stop_requested):
    """The loop over epochs: train, evaluate, step the schedule.

    Yields:
        an Epoch after each; None if a stop was requested within one, and then it ends.
    """
    step = engine.TrainingStep(
        state.model, state.optimizer, torch.device(config.device), config.precision
    )
    step = GraphedSteps(step) if config.cuda_graphs else step
    print(
        f"\n{'epoch':>5}  {'train loss':>10}  {'train auc':>9}  {split.selected_on + ' loss':>10}  "
        f"{split.selected_on + ' auc':>9}  {'lr':>7}  {'seconds':>7}  {'exams/s':>7}",
        flush=True,
    )
    while state.epoch < config.epochs and state.bad_epochs < config.patience:
        began, lr = time.perf_counter(), state.lr
        what = f"epoch {state.epoch + 1}/{config.epochs}"
        before = len(state.partial_epoch["logits"]) if state.partial_epoch else 0
        torch.manual_seed(split.random_seed(state.epoch + 1))
        steps, train = train_model(state, step, split.train_set, what, stop_requested)
        if train is None:
            yield None
            return
        speed = (len(split.train_set) - before) / (time.perf_counter() - began)
        selected, _ = evaluate_model(state.model, split.selection_set, config, what)
        is_best = state.update(selected)  # steps the schedule, counts for early stopping
        metrics = {"train": train, split.selected_on: selected}
        seconds = time.perf_counter() - began
        yield Epoch(state.epoch, lr, steps, metrics, speed, seconds, is_best)
        if stop_requested:
            return


def train_model(state, step, exams, what, stop_requested=()):
    """One epoch of training (the article's `train_model`).

    The loop is `engine.train_epoch`; forward, loss, backward and update: `engine.training_step`.

    Args:
        state: TrainState; its `epoch` or, if a stop was requested, its `partial_epoch` is updated.
        step: engine.TrainingStep, or GraphedSteps.
        exams: MRDataset.
        what: title of the progress bar.

    Returns:
        labels, logits, weighted losses of the steps, float32 (n,) each, and {"loss", "auc"}; None
        for the latter if a stop was requested before the end.

    Raises:
        RunError: the loss is infinite or not a number.
    """
    order, logits, losses = engine.train_epoch(
        step, exams, what, state.partial_epoch, stop_requested
    )
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        raise RunError(
            f"the loss became {losses[bad[0]]} in epoch {state.epoch + 1} at "
            f"{exams.paths[order[bad[0]]]}; look at that exam, or lower --lr. "
            "The models of earlier epochs are kept"
        )
    labels = exams.labels[order[: len(losses)]]
    if len(losses) < len(order):
        results = {"logits": torch.from_numpy(logits), "losses": torch.from_numpy(losses)}
        state.partial_epoch = results | engine.random_states(step.device)
        return (labels, logits, losses), None
    state.epoch, state.partial_epoch = state.epoch + 1, None
    metrics = {"loss": float(losses.mean()), "auc": roc_auc(labels, logits)}
    return (labels, logits, losses), metrics


def evaluate_model(model, exams, config, what="evaluate"):
    """Predict some exams without augmentation (the article's `evaluate_model`).

    Returns:
        {"loss": mean weighted loss, "auc"}, and logits float32 (n,).

    Raises:
        RunError: a prediction is infinite or not a number.
    """
    logits = engine.predict(model, exams, torch.device(config.device), config.precision, what)
    losses = engine.exam_losses(exams.labels, exams.weights, logits)
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        raise RunError(
            f"the logit of {exams.paths[bad[0]]} is {logits[bad[0]]}: the network diverged; "
            "lower --lr. The models of earlier epochs are kept"
        )
    return {"loss": float(losses.mean()), "auc": roc_auc(exams.labels, logits)}, logits


def load_exams(config, data_dir):
    """The training and the validation exams, two MRDatasets; prints what they are."""
    train_set, valid_set = (
        MRDataset(
            data_dir,
            config.task,
            config.plane,
            train=train,
            transform=Augmentation() if train and config.augment else None,
            intensity=config.intensity,
        )
        for train in (True, False)
    )
    if not config.class_weights:
        for exams in (train_set, valid_set):
            exams.set_class_weights(1.0, 1.0)
    cli.print_exams(train_set, valid_set)
    if not config.pretrained:
        print("weights    RANDOM (--no-pretrained): no ImageNet features")
    return train_set, valid_set


def start_state(config, split):
    """TrainState before the first epoch: the network, Adam and the learning-rate schedule."""
    torch.manual_seed(split.random_seed())
    features = imagenet_features() if config.pretrained else None
    device = torch.device(config.device)
    model = MRNet(features, dropout=config.dropout).to(device)
    graphs = config.cuda_graphs
    optimizer = torch.optim.Adam(
        model.parameters(),
        lr=torch.tensor(config.lr, device=device) if graphs else config.lr,
        weight_decay=config.weight_decay,
        fused=True,
        capturable=graphs,
    )
    return TrainState(model, optimizer, make_scheduler(config.lr_scheduler, optimizer))


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


def new_log_dir(config, split, files):
    name = f"{config.plane}{split.suffix}"
    return str(files.logs_dir / config.task / name / f"{datetime.now():%Y%m%d-%H%M%S}")


def augmented_exam(config, split):
    """The first training exam as the network gets it, as grey levels: float32 0..1 (s, 1, H, W)."""
    torch.manual_seed(split.random_seed())
    return (grey_levels(split.train_set[0][0], config.intensity) / 255).clamp(0, 1)


def describe(config, split, epoch, provenance):
    """Metadata of a saved model: plain values only."""
    return {
        "task": config.task,
        "plane": config.plane,
        "intensity": config.intensity,
        "pretrained": config.pretrained,
        "precision": config.precision,
        "epoch": epoch.number,
        "seed": split.seed,
        "fold": split.fold,
        "out_of_fold": split.out_of_fold,
        "tuning": split.tuning,
        "protocol": config.protocol,
        "metrics": epoch.metrics,
        "arguments": asdict(config),
        "class_weights": list(split.train_set.class_weights),
        "data": split.fingerprints(),
    } | provenance


def report_best_model(config, split, path, log_dir, log):
    """Evaluate the best model on the validation exams, log its curves, print where things are."""
    model, metadata = load_model(path)
    device = torch.device(config.device)
    model.to(device)
    valid, logits = evaluate_model(model, split.valid_set, config)
    metadata["metrics"]["valid"] = valid
    metadata["arguments"] = asdict(config)  # epochs may have been added since that epoch
    save_model(path, model, metadata)
    labels, epoch = split.valid_set.labels, metadata["epoch"]
    title = f"{config.task}, {config.plane}, epoch {epoch}"
    log.add_result(title, labels, engine.sigmoid(logits), metadata, asdict(config))
    log.add_heat_maps(model, split.valid_set, epoch, device)
    low, high = auc_interval(labels, logits)[1:]
    note = "optimistic: these exams selected the epoch"
    if split.selected_on == "tune":
        note = "the epoch was selected on other exams"
    print(
        f"\nvalidation AUC {valid['auc']:.4f} [{low:.3f}, {high:.3f}], epoch {epoch} "
        f"({note})\nmodel  {path}\nlogs   {log_dir}"
    )


if __name__ == "__main__":
    cli.exit_with_status(lambda: run(parse_arguments()))
