"""Train one task on one plane, as the article does, and keep the best model.

    python train.py --task acl --plane sagittal                            # MRNet under data/
    python train.py --task acl --plane axial --data-dir data/phantom --lr 1e-4 --epochs 10
    python train.py --task acl --plane sagittal --resume                   # after an interruption
    python train.py --task acl --plane sagittal --protocol held-out --folds 5 --repeat 3

Writes models/<task>-<plane>.pt (the epoch with the best validation AUC, about 10 MB) and
logs/<task>/<plane>/<time>/ for `tensorboard --logdir logs`.

The default recipe is the article's ("How to train an MRI classifier with PyTorch"): Adam, lr 1e-5,
weight decay 0.1, one exam a step, class-weighted cross-entropy, rotation, shift and flip, learning
rate times 0.3 after 3 epochs without a better validation loss, stop after 5. README tells where the
article's code differs and why.

Protocols: `article` chooses the epoch on the validation exams that it reports (optimistic);
`held-out` chooses it on a tenth of the training exams and touches the validation exams once.
`--folds K` trains K networks, each without a K-th of the training exams, for honest stacking.
"""

import argparse
import math
import os
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

import engine
from checkpoint import (
    claimed,
    imagenet_features,
    load_model,
    model_path,
    read_checkpoint,
    run_suffix,
    save_model,
    write_checkpoint,
    write_text,
)
from common.errors import InputError
from dataloader import INTENSITIES, PLANES, Augmentation, MRDataset, grey_levels, split_exams
from metrics import auc_interval, roc_auc
from model import MRNet

LR, WEIGHT_DECAY, EPOCHS, PATIENCE = 1e-5, 0.1, 50, 5  # the article's
PLATEAU_PATIENCE, PLATEAU_FACTOR, PLATEAU_THRESHOLD = 3, 0.3, 1e-4  # the article's
STEP_EPOCHS, STEP_FACTOR = 3, 0.5  # the article's
STATE_FORMAT = "mrnet-training-1"
LATER = ("precision", "device", "cuda_graphs")  # of the recipe, not told by earlier versions
PROTOCOLS = ("article", "held-out")
TUNING_PARTS = 10  # held-out: one part in ten of the training exams chooses the epoch


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
        "--class-weights",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="weigh positives by negatives/positives, as the article's text asks",
    )
    recipe.add_argument(
        "--pretrained",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="start from ImageNet; --no-pretrained starts from random weights, learns far slower",
    )
    recipe.add_argument(
        "--seed", type=seed, default=0, help="fixes order, augmentation and initial classifier"
    )

    protocol = parser.add_argument_group("protocol")
    protocol.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="article",
        help="what chooses the epoch and stops the run: the validation exams themselves "
        "(optimistic) or a held-out part of the training exams",
    )
    protocol.add_argument(
        "--folds",
        type=positive_int,
        default=1,
        help="train so many networks, each without its fold of the training exams; 3 to 5 for "
        "honest stacking, 1 is the article's",
    )
    protocol.add_argument(
        "--repeat",
        type=positive_int,
        default=1,
        help="train with so many seeds, from --seed on; differences below their spread are noise",
    )

    machine = parser.add_argument_group("machine")
    engine.add_machine_arguments(machine)

    machine.add_argument(
        "--cache",
        choices=engine.CACHES,
        default="auto",
        help="where volumes stay between epochs; auto: the first with room; disk always works",
    )

    machine.add_argument(
        "--cuda-graphs",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="replay whole steps as CUDA graphs: for a GPU that waits for Python",
    )

    files = parser.add_argument_group("files")
    files.add_argument(
        "--models-dir", type=Path, default=Path("models"), help="for models and the state of a run"
    )
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
        help="skip trainings that are finished, go on after the last whole epoch of one that was "
        "interrupted",
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


def seed(text):
    return number(text, int, lambda v: 0 <= v < 2**31, "a whole number from 0 to below 2^31")


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


@dataclass
class Run:
    """One network to train: its exams and the names of its files."""

    seed: int
    fold: int  # 1 to folds; 0 where there is one network only
    train_set: MRDataset
    choose_set: MRDataset  # chooses the epoch and stops the run
    valid_set: MRDataset
    held_out: list  # ids of the training exams that this network never sees
    tuning: list  # ids of those that choose its epoch, where no validation exams do
    suffix: str
    origin: dict  # what the run came from: commit at its start, versions, dataset.json

    @property
    def chosen_on(self):
        return "valid" if self.choose_set is self.valid_set else "tune"


def plan_runs(args, train_set, valid_set, origin):
    """All networks that the arguments ask for: folds within seeds.

    Exams of one group stand on one side of every cut.
    """
    groups = np.array(train_set.groups)
    runs = []
    for seed in range(args.seed, args.seed + args.repeat):
        held_out_rows = [np.array([], int)]
        if args.folds > 1:
            held_out_rows = split_exams(train_set.labels, args.folds, seed, groups)
        for number, out in enumerate(held_out_rows):
            rows = np.setdiff1d(np.arange(len(train_set)), out)
            choose_set, tuning = valid_set, np.array([], int)
            if args.protocol == "held-out":
                # A cut of its own seed: folds and tuning exams must not depend on each other.
                labels = train_set.labels[rows]
                if min((labels == 0).sum(), (labels == 1).sum()) < TUNING_PARTS:
                    raise InputError(
                        f"--protocol held-out: needs {TUNING_PARTS} training exams of each class "
                        f"(there are {len(labels)}, {int(labels.sum())} positive); use "
                        "--protocol article"
                    )
                tuning = rows[split_exams(labels, TUNING_PARTS, seed + 1000, groups[rows])[0]]
                choose_set = train_set.subset(tuning, transform=None)
                rows = np.setdiff1d(rows, tuning)
            fold = number + 1 if args.folds > 1 else 0
            runs.append(
                Run(
                    seed=seed,
                    fold=fold,
                    train_set=train_set.subset(rows, transform=train_set.transform),
                    choose_set=choose_set,
                    valid_set=valid_set,
                    held_out=[train_set.ids[row] for row in out],
                    tuning=[train_set.ids[row] for row in tuning],
                    origin=origin,
                    suffix=run_suffix(fold, args.folds, seed if args.repeat > 1 else None),
                )
            )
    return runs


def write_folds(args, runs):
    """models/<task>-folds.csv: which network never saw which training exam."""
    rows = [f"{run.seed},{exam_id},{run.fold}\n" for run in runs for exam_id in run.held_out]
    if rows:
        write_text(args.models_dir / f"{args.task}-folds.csv", "seed,id,fold\n" + "".join(rows))


class Training:
    """Everything that changes from epoch to epoch, and nothing else: what a resumed run needs."""

    PLAIN = ("epoch", "best_loss", "bad_epochs", "best_auc", "best_epoch", "log_dir", "part")
    PARTS = ("model", "optimizer", "scheduler")

    def __init__(self, args, run, device):
        torch.manual_seed(random_state(run))
        features = imagenet_features() if args.pretrained else None
        self.model = MRNet(features, dropout=args.dropout).to(device)
        graphs = args.cuda_graphs
        self.optimizer = torch.optim.Adam(
            self.model.parameters(),
            lr=torch.tensor(args.lr, device=device) if graphs else args.lr,
            weight_decay=args.weight_decay,
            fused=True,
            capturable=graphs,
        )
        self.graphs = None
        self.scheduler = make_scheduler(args.lr_scheduler, self.optimizer)
        self.epoch = 0  # epochs done
        self.best_loss, self.bad_epochs = math.inf, 0  # for early stopping
        self.best_auc, self.best_epoch = -math.inf, 0  # for the model that is kept
        self.log_dir = ""
        self.part = None  # of an epoch that a signal interrupted, as engine.train_epoch takes it

    def state(self):
        plain = {name: getattr(self, name) for name in self.PLAIN}
        return plain | {name: getattr(self, name).state_dict() for name in self.PARTS}

    def restore(self, state):
        for name in self.PLAIN:
            setattr(self, name, state[name])
        settings = [dict(group) for group in self.optimizer.param_groups]
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        # The optimizer's state comes with the settings of the machine that it ran on: keep ours,
        # and the learning rate in the tensor that CUDA graphs read.
        for group, ours in zip(self.optimizer.param_groups, settings, strict=True):
            lr = float(group["lr"])
            group |= {name: ours[name] for name in ("fused", "capturable", "foreach")}
            group["lr"] = ours["lr"].fill_(lr) if torch.is_tensor(ours["lr"]) else lr
        self.graphs = None  # they hold the addresses of the tensors that were replaced


def random_state(run, epoch=0):
    """Everything random in an epoch follows from seed, fold and epoch: resuming needs no more."""
    return (run.seed * 1009 + run.fold) * 100_003 + epoch


def recipe_of(args):
    """The arguments that change the result, as plain values; a resumed run must agree on them."""
    kept = ("task", "plane", "intensity", "augment", "epochs", "lr", "weight_decay", "lr_scheduler")
    kept += ("patience", "dropout", "class_weights", "pretrained", "seed", "protocol", "folds")
    kept += ("repeat", *LATER)
    return {name: getattr(args, name) for name in kept}


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


def restore_state(args, run, training, path):
    """Put `training` where an interrupted run left it; False where there is none.

    Raises:
        InputError: the state is damaged, of other arguments or of other exams.
    """
    if not path.is_file():
        return False
    state = read_checkpoint(path, wanted=STATE_FORMAT)
    try:
        # More epochs than were asked for at first are welcome; the finished ones stay as they are.
        check_same(args, run, path, state["recipe"], state["data"], but=["epochs"])
        training.restore(state["training"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        raise InputError(f"{path}: lacks parts of a training; delete it and train again") from None
    return True


def data_of(run):
    """The exams that a run trains, chooses and reports on."""
    return {"train": run.train_set, "choose": run.choose_set, "valid": run.valid_set}


def fingerprints(run):
    return {name: exams.fingerprint() for name, exams in data_of(run).items()}


def is_finished(args, run, path):
    """Whether this very training ran to its end before.

    Raises:
        InputError: another training did, whose model must not be overwritten by resuming.
    """
    if not path.is_file():
        return False
    _, about = load_model(path)
    recipe = about.get("arguments")
    if isinstance(recipe, dict) and "precision" in about:
        recipe = {"precision": about["precision"]} | recipe
    check_same(args, run, path, recipe, about["data"])
    return True


def check_same(args, run, path, recipe, data, but=()):
    """Refuse to go on from `path` if it was made with other arguments or from other exams."""
    mine = recipe_of(args)
    recipe = recipe if isinstance(recipe, dict) else {}
    recipe = {name: mine[name] for name in LATER} | recipe
    other = [name for name in mine if name not in but and mine[name] != recipe.get(name)]
    if other:
        said = ", ".join(f"--{name.replace('_', '-')} {recipe.get(name)}" for name in other)
        raise InputError(
            f"{path}: was trained with {said}; resume with the same arguments, give another "
            "--models-dir, or leave out --resume to train it again"
        )
    mine = data_of(run)
    if data.keys() != mine.keys() or not all(
        exams.has_fingerprint(data[name]) for name, exams in mine.items()
    ):
        raise InputError(
            f"{path}: was trained on other exams; give another --models-dir, or leave out --resume "
            "to train it again"
        )


def log_epoch(writers, training, args, run, order, logits, losses, train, chosen, speed):
    """Curves within the epoch (running means, from the steps' own logits) and of the epoch."""
    writer, within = writers
    epoch, n, labels = training.epoch, len(order), run.train_set.labels[order]
    for end in [*range(args.log_every, n, args.log_every), n]:
        step = (epoch - 1) * n + end
        within.add_scalar("within-epoch/train-loss", losses[:end].mean(), step)
        if len(set(labels[:end])) == 2:
            within.add_scalar("within-epoch/train-auc", roc_auc(labels[:end], logits[:end]), step)
    for metric in ("loss", "auc"):
        writer.add_scalar(f"{metric}/train", train[metric], epoch)
        writer.add_scalar(f"{metric}/{run.chosen_on}", chosen[metric], epoch)
    writer.add_scalar("learning-rate", float(training.optimizer.param_groups[0]["lr"]), epoch)
    writer.add_scalar("exams-per-second", speed, epoch)
    for one in writers:
        one.flush()


def measure(exams, logits):
    """Mean weighted loss and AUC of predictions for some exams."""
    losses = engine.losses_of(exams.labels, exams.weights, logits)
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        raise engine.RunError(
            f"the network's answer to {exams.paths[bad[0]]} is {logits[bad[0]]}: it diverged; "
            "lower --lr. The models of earlier epochs are kept"
        )
    return {"loss": float(losses.mean()), "auc": roc_auc(exams.labels, logits)}


def one_epoch(training, args, run, device, precision, writers):
    """Train, evaluate, step the schedule, print one line, keep the best model.

    Where a signal asks to stop within the training, only `training.part` is set.
    """
    began = time.perf_counter()
    epoch, done = training.epoch + 1, training.part
    torch.manual_seed(random_state(run, epoch))
    what = f"epoch {epoch}/{args.epochs}"
    lr = float(training.optimizer.param_groups[0]["lr"])
    if args.cuda_graphs and training.graphs is None:
        training.graphs = engine.GraphedSteps(training.model, training.optimizer, precision)
    order, logits, losses = engine.train_epoch(
        training.model,
        run.train_set,
        training.optimizer,
        device,
        precision,
        what,
        training.graphs,
        done,
    )
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        raise engine.RunError(
            f"the loss became {losses[bad[0]]} in epoch {epoch} at "
            f"{run.train_set.paths[order[bad[0]]]}; look at that exam, or lower --lr. "
            "The models of earlier epochs are kept"
        )
    if len(losses) < len(order):
        parts = {"logits": torch.from_numpy(logits), "losses": torch.from_numpy(losses)}
        training.part = parts | engine.random_states(device)
        return
    training.epoch, training.part = epoch, None
    speed = (len(order) - (len(done["logits"]) if done else 0)) / (time.perf_counter() - began)
    train = {"loss": float(losses.mean()), "auc": roc_auc(run.train_set.labels[order], logits)}
    chosen = measure(
        run.choose_set, engine.predict(training.model, run.choose_set, device, precision, what)
    )
    if args.lr_scheduler == "plateau":
        training.scheduler.step(chosen["loss"])
    else:
        training.scheduler.step()

    if chosen["loss"] < training.best_loss:
        training.best_loss, training.bad_epochs = chosen["loss"], 0
    else:
        training.bad_epochs += 1
    better = chosen["auc"] > training.best_auc
    if better:
        training.best_auc, training.best_epoch = chosen["auc"], training.epoch
        path = model_path(args.models_dir, args.task, args.plane, run.suffix)
        save_model(path, training.model, describe(args, run, training, precision, train, chosen))
    print(
        f"{training.epoch:5d}  {train['loss']:10.4f}  {train['auc']:9.4f}  {chosen['loss']:10.4f}  "
        f"{chosen['auc']:9.4f}  {lr:7.1e}  {time.perf_counter() - began:7.1f}  "
        f"{speed:7.1f}{'  best' if better else ''}",
        flush=True,
    )
    log_epoch(writers, training, args, run, order, logits, losses, train, chosen, speed)


def describe(args, run, training, precision, train, chosen):
    """What a saved model says of itself: plain values only."""
    return {
        "task": args.task,
        "plane": args.plane,
        "intensity": args.intensity,
        "pretrained": args.pretrained,
        "precision": precision,
        "epoch": training.epoch,
        "seed": run.seed,
        "fold": run.fold,
        "held_out": run.held_out,
        "tuning": run.tuning,
        "protocol": args.protocol,
        "metrics": {"train": train, run.chosen_on: chosen},
        "arguments": recipe_of(args),
        "data_dir": str(args.data_dir),
        "class_weights": list(run.train_set.class_weights),
        "data": fingerprints(run),
    } | run.origin


def finish(args, run, training, writer, device, precision):
    """Evaluate the best model on the validation exams, log its curves, say where things are."""
    # With matplotlib, 25 MB that nothing needs while the memory is full.
    from figures import overlay, roc_figure

    path = model_path(args.models_dir, args.task, args.plane, run.suffix)
    model, about = load_model(path)
    logits = engine.predict(model.to(device), run.valid_set, device, precision)
    valid = about["metrics"]["valid"] = measure(run.valid_set, logits)
    about["arguments"] = recipe_of(args)  # epochs may have been added since that epoch
    save_model(path, model, about)
    probabilities = engine.sigmoid(logits)
    writer.add_pr_curve("precision-recall", run.valid_set.labels, probabilities, about["epoch"])
    title = f"{args.task}, {args.plane}, epoch {about['epoch']}"
    figure = roc_figure(run.valid_set.labels, {title: probabilities})
    writer.add_figure("roc", figure, about["epoch"])
    for label, name in ((1, "positive"), (0, "negative")):
        i = int(np.flatnonzero(run.valid_set.labels == label)[0])
        maps, _ = engine.class_activation_maps(model, run.valid_set.exam(i, None, device))
        slices = overlay(run.valid_set.volume(i).cpu().numpy(), maps)
        what = f"heat map of a {name} validation exam"
        writer.add_images(what, slices, about["epoch"], dataformats="NHWC")
    results = {"best/valid-auc": valid["auc"], "best/valid-loss": valid["loss"]}
    writer.add_hparams(recipe_of(args), results | {"best/epoch": about["epoch"]}, run_name=".")
    low, high = auc_interval(run.valid_set.labels, logits)[1:]
    honest = "optimistic: these exams chose the epoch"
    if run.chosen_on == "tune":
        honest = "the epoch was chosen on other exams"
    print(
        f"\nvalidation AUC {valid['auc']:.4f} [{low:.3f}, {high:.3f}], epoch {about['epoch']} "
        f"({honest})\nmodel  {path}\nlogs   {training.log_dir}"
    )


def fit(args, run, device, precision):
    """Train one network to its end, or to where a signal leaves it to be resumed."""
    path = model_path(args.models_dir, args.task, args.plane, run.suffix)
    state_path = path.with_suffix(".state")
    if args.resume and not state_path.is_file() and is_finished(args, run, path):
        print(f"\nfinished before: {path}")
        return
    training = Training(args, run, device)
    resumed = args.resume and restore_state(args, run, training, state_path)
    if resumed:
        steps = f" and {len(training.part['logits'])} steps" if training.part else ""
        print(f"\nresumed {state_path} after epoch {training.epoch}{steps}")
    training.log_dir = training.log_dir or str(
        args.logs_dir / args.task / f"{args.plane}{run.suffix}" / f"{datetime.now():%Y%m%d-%H%M%S}"
    )

    def keep_state():
        content = {"recipe": recipe_of(args), "data": fingerprints(run)}
        content |= {"format": STATE_FORMAT, "training": training.state()}
        write_checkpoint(state_path, content)

    keep_state()  # before the first model: a model without a state beside it is a finished one
    # A killed run may have logged an epoch that it did not keep; TensorBoard forgets all from a
    # step on. Epochs and exams count steps differently, so each has its own writer.
    first = (training.epoch + 1, training.epoch * len(run.train_set) + 1)
    epochs_from, exams_from = first if resumed else (None, None)
    with (
        engine.open_writer(training.log_dir, epochs_from) as writer,
        engine.open_writer(f"{training.log_dir}/within-epoch", exams_from) as within,
        engine.stop_after_step() as asked,
    ):
        if training.epoch == 0:
            torch.manual_seed(random_state(run))
            slices = grey_levels(run.train_set[0][0], args.intensity) / 255
            writer.add_images("an augmented training exam", slices.clamp(0, 1), 1)
        print(
            f"\n{'epoch':>5}  {'train loss':>10}  {'train auc':>9}  {run.chosen_on + ' loss':>10}  "
            f"{run.chosen_on + ' auc':>9}  {'lr':>7}  {'seconds':>7}  {'exams/s':>7}",
            flush=True,
        )
        try:
            while training.epoch < args.epochs and training.bad_epochs < args.patience:
                one_epoch(training, args, run, device, precision, (writer, within))
                keep_state()
                if asked:
                    break
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"Go on with: {engine.command_to_resume()}") from None
        if asked:
            raise engine.Interrupted(asked[0], f"Go on with: {engine.command_to_resume()}")
        if training.bad_epochs >= args.patience:
            print(f"stopped: {run.chosen_on} loss has not improved for {args.patience} epochs")
        finish(args, run, training, writer, device, precision)
        state_path.unlink(missing_ok=True)
        if asked:  # another network may be next
            raise engine.Interrupted(asked[0], f"Go on with: {engine.command_to_resume()}")


def main():
    args = parse_arguments()
    device = engine.pick_device(args.device)
    precision = engine.pick_precision(args.precision, device)
    check_writable(args.models_dir)
    args.device, args.precision = device.type, precision  # what "auto" became
    commit = engine.start_up(args, device, precision)
    train_set, valid_set = (
        MRDataset(
            args.data_dir,
            args.task,
            args.plane,
            train=train,
            transform=Augmentation() if train and args.augment else None,
            weights=None if args.class_weights else (1.0, 1.0),
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
    for what, ones, others in (
        ("ids", train_set.ids, valid_set.ids),
        ("groups", train_set.groups, valid_set.groups),
    ):
        if both := set(ones) & set(others):
            print(
                f"WARNING    {len(both)} {what} are in both splits; if they are the same exams or "
                "patients, no validation figure means anything: "
                f"python check.py {args.data_dir} tells more"
            )
    print(f"data set   {engine.name_dataset(train_set.dataset)}")
    print("class weights  negative {:g}, positive {:.3f}".format(*train_set.class_weights))
    if not args.pretrained:
        print("weights    RANDOM (--no-pretrained): no ImageNet features")
    kept = engine.keep_volumes((train_set, valid_set), args.cache, device)
    if args.cuda_graphs and (device.type != "cuda" or kept != "device"):
        raise InputError("--cuda-graphs: needs --device cuda and room for --cache device")
    for exams in (train_set, valid_set):
        exams.fingerprint()  # once, before its parts are cut
    origin = {"git": commit, "versions": engine.versions(), "dataset": train_set.dataset}
    runs = plan_runs(args, train_set, valid_set, origin)
    write_folds(args, runs)
    for number, run in enumerate(runs, start=1):
        if len(runs) > 1:
            print(f"\n-- network {number} of {len(runs)}: seed {run.seed}, fold {run.fold}")
        with claimed(model_path(args.models_dir, args.task, args.plane, run.suffix)):
            fit(args, run, device, precision)


if __name__ == "__main__":
    engine.run(main)
