"""Train one task on one plane, as the article does, and save the best model.

    python train.py --task acl --plane sagittal                            # MRNet under data/
    python train.py --task acl --plane axial --data-dir data/phantom --lr 1e-4 --epochs 10
    python train.py --task acl --plane sagittal --resume                   # after an interruption
    python train.py --task acl --plane sagittal --protocol held-out --folds 5 --repeat 3
    python train.py --task all --plane sagittal --backbone vgg16           # every finding in one
    python train.py --task acl --plane axial coronal sagittal              # three planes in one

Writes models/<task>-<plane>.pt (the epoch with the best AUC on the validation exams, or with
`--protocol held-out` on the tuning exams; with `--select last`, as in most recipes, the last;
about 10 MB) and logs/<task>/<plane>/<time>/ for `tensorboard --logdir logs`. With a recipe other
than the article's its name follows the plane's.

The default recipe is the article's ("How to train an MRI classifier with PyTorch"): Adam, lr 1e-5,
weight decay 0.1, one exam per step, class-weighted binary cross-entropy, rotation, shift and flip,
learning rate times 0.3 after the fourth epoch without a better validation loss, stop after 5.
docs/differences.md lists where the article's code differs and why, docs/improvements.md what its
list of improvements became; mrnet/training/splits.py describes protocols and folds.

run -> train_network (one network) -> start_state (network, optimizer, schedule), train_epochs (its
epochs) -> train_model (one pass over the training exams, training_step for each), evaluate_model
(one over the exams that select the epoch).
"""

import argparse
import time
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from dataloader import grey_levels
from mrnet.errors import Interrupted, RunError, counted
from mrnet.evaluation.metrics import BELOW_CHANCE, auc_interval, metrics_of, sigmoid
from mrnet.files import check_writable
from mrnet.layout.arguments import plane_name
from mrnet.layout.labels import is_positive
from mrnet.layout.names import column_name, folds_path, model_path, state_path
from mrnet.layout.planes import PLANES, in_order
from mrnet.networks.weights import imagenet_features
from mrnet.runtime import cli
from mrnet.runtime.devices import autocast, pick_device, pick_precision
from mrnet.stacking.predictions import Predictor
from mrnet.training.checkpoint import (
    ARCHITECTURE,
    build_model,
    load_model,
    lock,
    metadata_of,
    save_model,
)
from mrnet.training.config import (
    GROUPS,
    Config,
    add_options,
    parse_with_recipe,
    print_recipe,
    read_recipe,
    selection_note,
)
from mrnet.training.datasets import CACHES, all_tasks, cache_volumes, load_exams
from mrnet.training.graphs import as_graphs, use_graphs
from mrnet.training.logs import Epoch, TrainingLog, heads_of_epochs, history_of, new_log_dir
from mrnet.training.optimization import (
    average_advice,
    make_average,
    make_optimizer,
    make_scheduler,
    steps_with_optimizer,
)
from mrnet.training.splits import fingerprints_of, numbered, plan_splits, write_folds
from mrnet.training.train_state import TrainState, is_finished, restore_state


def parse_arguments():
    """The options of mrnet/training/config.py, and those that change no result."""
    parser = cli.make_parser(__doc__)
    data = parser.add_argument_group("data")
    task = "any NAME with train-NAME.csv in the data folder; MRNet's: abnormal, acl, meniscus. "
    task += "Several, or all: one network for all of them, in the time of one"
    data.add_argument("--task", required=True, nargs="+", help=task)
    plane = "axial, coronal, sagittal or a further series' folder such as sagittal-t1; for ACL the "
    plane += "article found sagittal best. Several: one network that joins their features"
    data.add_argument(
        "--plane", required=True, nargs="+", type=plane_name, metavar="PLANE", help=plane
    )
    folder = "folder in MRNet's layout"
    data.add_argument("--data-dir", type=Path, default=Path("data"), help=folder)
    groups = {name: parser.add_argument_group(name) for name in GROUPS[1:]}
    for name, group in ({"data": data} | groups).items():
        add_options(group, name)
    only = "train only these of the networks of --folds and --repeat, by number from 1"
    groups["protocol"].add_argument(
        "--networks", type=cli.positive_int, nargs="+", metavar="N", help=only
    )
    machine = parser.add_argument_group("machine")
    cli.add_machine_arguments(machine)
    cache = "where volumes are kept between epochs; auto: on a GPU that has room for them"
    machine.add_argument("--cache", choices=CACHES, default="auto", help=cache)
    graphs = "run training steps as CUDA graphs; default where volumes are on a GPU (not with "
    graphs += "several planes, --augment strong or --lr-scheduler one-cycle)"
    machine.add_argument("--cuda-graphs", action=argparse.BooleanOptionalAction, help=graphs)
    add = parser.add_argument_group("files").add_argument
    add("--models-dir", type=Path, default=Path("models"), help="for models and training states")
    add("--logs-dir", type=Path, default=Path("logs"), help="for TensorBoard")
    every = "number of exams between two points of a curve in TensorBoard"
    add("--log-every", type=cli.positive_int, default=100, help=every)
    resume = "skip trainings that are finished, continue one that was interrupted"
    add("--resume", action="store_true", help=resume)
    return parse_with_recipe(parser, read_recipe, ["--task", "acl", "--plane", PLANES[0]])


class Files(NamedTuple):
    """Where a training writes."""

    models_dir: Path
    logs_dir: Path
    log_every: int  # exams
    resume: bool


def run(args):
    """Train every network that the arguments ask for: one, or one for each fold and seed."""
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    check_writable(args.models_dir)
    args.device, args.precision = device.type, precision  # what "auto" became
    args.task = "+".join(all_tasks(args.data_dir) if args.task == ["all"] else args.task)
    args.plane = "+".join(in_order(args.plane))
    provenance = cli.print_start_up(vars(args), device, precision)
    config = Config(**{field.name: getattr(args, field.name) for field in fields(Config)})
    config.check()
    print_recipe(config)
    files = Files(args.models_dir, args.logs_dir, args.log_every, args.resume)
    train_set, valid_set = load_exams(config, args.data_dir)
    cached = cache_volumes(
        (train_set, valid_set), args.cache, device, partial(cli.progress, what="reading")
    )
    config = replace(config, cuda_graphs=use_graphs(args.cuda_graphs, config, device, cached))
    print(f"steps      {'CUDA graphs' if config.cuda_graphs else 'eager'}")
    for exams in (train_set, valid_set):
        exams.fingerprint()  # hashes the voxels once, before subsets are taken
    provenance |= {"dataset": train_set.description, "data_dir": str(args.data_dir)}
    seeds = range(config.seed, config.seed + config.repeat)
    how = config.protocol, config.folds, seeds, config.select
    splits = plan_splits(train_set, valid_set, *how)
    if advice := average_advice(config, min(len(split.train_set) for split in splits)):
        print(advice)
    column = column_name(config.plane, config.recipe)
    of_folds = args.models_dir, config.task, column, config.folds
    write_folds(partial(folds_path, *of_folds), splits)
    for number, split in numbered(splits, args.networks):
        if len(splits) > 1:
            of = f"{number} of {len(splits)}"
            print(f"\n-- network {of}: seed {split.seed}, fold {split.fold}")
        with ExitStack() as locks:
            for task in dict.fromkeys((*config.tasks, config.task)):  # the last for the state
                locks.enter_context(lock(path_of(config, split, files, task)))
            train_network(config, split, files, provenance)


def path_of(config, split, files, task):
    """Path of the model of one finding."""
    column = column_name(config.plane, config.recipe)
    return model_path(files.models_dir, task, column, split.suffix)


def train_network(config, split, files, provenance):
    """Train one network to its end, or to where a signal leaves it to be resumed.

    Args:
        config: Config.
        split: splits.Split, the exams of this network.
        files: Files.
        provenance: dict of plain values for its metadata: commit at the start, machine, data set.
    """
    paths = {task: path_of(config, split, files, task) for task in config.tasks}
    state_file = state_path(path_of(config, split, files, config.task))
    about, own = asdict(config), [(path, split.finding(task)) for task, path in paths.items()]
    if files.resume and not state_file.is_file():
        done = [is_finished(path, about, exams) for path, exams in own]
        if all(done):
            print(f"\nfinished before: {', '.join(map(str, paths.values()))}")
            return
    state, done = start_state(config, split), None
    if files.resume and restore_state(state_file, state, about, split.data_sets, own):
        done = state.epoch, state.epoch * len(split.train_set)
        print(f"\nresumed {state_file} after epoch {state.epoch}")
    column = column_name(config.plane, config.recipe) + split.suffix
    state.log_dir = state.log_dir or new_log_dir(files.logs_dir / config.task / column)
    fingerprints = fingerprints_of(split.data_sets)
    save_state = partial(state.save, state_file, asdict(config), fingerprints)
    save_state()  # before the first model: a model without a state beside it is a finished one
    with (
        TrainingLog(state.log_dir, files.log_every, done) as log,
        cli.stop_after_step() as stop_requested,
    ):
        if state.epoch == 0:
            log.add_images("an augmented training exam", augmented_exam(config, split), 1)
        try:
            for epoch in train_epochs(config, split, state, stop_requested):
                for task in epoch.saved:
                    metadata = metadata_of(config, split, epoch, task) | provenance
                    finding = config.tasks.index(task)
                    save_model(paths[task], state.evaluated, metadata, finding)
                state.history.append(epoch.record)
                with cli.output_may_end():
                    print(epoch, flush=True)
                log.add_epoch(epoch)
                save_state()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(cli.resume_with()) from None
        if not stop_requested:
            if state.bad_epochs >= config.patience:
                metric = f"{split.selected_on} loss"
                print(f"stopped: {metric} has not improved for {counted(config.patience, 'epoch')}")
            report_best_models(config, split, paths, state.history, log)
            print(f"logs   {state.log_dir}")
            state_file.unlink(missing_ok=True)
        if stop_requested:  # perhaps while reporting: another network may be next
            raise Interrupted(stop_requested[0], cli.resume_with())


def train_epochs(config, split, state, stop_requested):
    """The loop over epochs: train, evaluate, step the schedule.

    Yields:
        an Epoch after each; it ends within one if a stop was requested.
    """
    step = partial(training_step, state.model, state.optimizer, config)
    if config.cuda_graphs:
        step = as_graphs(step, state.model, config)
    print(heads_of_epochs(split.selected_on, config.tasks), flush=True)
    while state.epoch < config.epochs and state.bad_epochs < config.patience:
        began, lr = time.perf_counter(), state.lr
        what = f"epoch {state.epoch + 1}/{config.epochs}"
        torch.manual_seed(split.random_seed(state.epoch + 1))
        steps, train = train_model(state, step, split.train_set, config, what, stop_requested)
        if train is None:
            return
        speed = len(split.train_set) / (time.perf_counter() - began)
        selected, _ = evaluate_model(state.evaluated, split.selection_set, config, what)
        best = state.update(selected)  # steps the schedule, counts for early stopping
        metrics = {"train": train, split.selected_on: selected}
        yield Epoch(state.epoch, lr, steps, metrics, speed, time.perf_counter() - began, best)
        if stop_requested:
            return


def train_model(state, step, exams, config, what="train", stop_requested=()):
    """One epoch of training (the article's `train_model`): one exam after another, in random order.

    Random numbers come from torch's default generator: seed it before each epoch, and the epoch is
    the same wherever the training was resumed.

    Args:
        state: TrainState; its `epoch` is updated.
        step: `training_step` without its first three arguments.
        exams: MRDataset.
        what: title of the progress bar.
        stop_requested: list that is filled from outside to stop after the current step.

    Returns:
        labels, logits, weighted losses of the exams in their order, float32 (n, tasks) each, and
        {finding: {"loss", "auc"}}; None for the latter if a stop was requested before the end.

    Raises:
        RunError: the loss is infinite or not a number.
    """
    state.model.train()
    device = torch.device(config.device)
    order = torch.randperm(len(exams)).tolist()
    views = exams.draw(order, device)  # a random rotation, shift and flip for each exam
    targets = torch.from_numpy(exams.targets[order]).to(device)
    weights = torch.from_numpy(exams.weights[order]).to(device)
    logits, losses = torch.empty_like(targets), torch.empty_like(targets)
    for k, i in enumerate(cli.progress(order, what)):
        row = slice(k, k + 1)
        # The article's optimizer steps after each exam; with --accumulate after several.
        first = k - k % config.accumulate
        exams_in_step = min(config.accumulate, len(order) - first)
        is_last = k + 1 == first + exams_in_step
        volume = exams.volume(i)  # uint8 (s, H, W)
        # Forward, class-weighted loss, backward, and after the last exam the optimizer's step.
        logits[row], losses[row] = step(
            exams, volume, views[k], targets[row], weights[row], exams_in_step, is_last
        )
        if is_last:
            if steps_with_optimizer(state.scheduler):
                state.scheduler.step()
            if state.average:
                state.average.update_parameters(state.model)
            if stop_requested:
                break
    done, order = k + 1, np.array(order)
    labels, logits, losses = exams.labels[order[:done]], logits[:done].cpu(), losses[:done].cpu()
    logits, losses = logits.numpy(), losses.numpy()
    bad = np.flatnonzero(~np.isfinite(losses).all(axis=1))
    if len(bad):
        raise RunError(
            f"the loss became {losses[bad[0]].sum()} in epoch {state.epoch + 1} at "
            f"{exams.paths[order[bad[0]]]}; look at that exam, or lower --lr. "
            "The models of earlier epochs are kept"
        )
    if done < len(order):
        return (labels, logits, losses), None
    state.epoch += 1
    return (labels, logits, losses), metrics_of(exams.tasks, labels, logits, losses)


def training_step(
    model, optimizer, config, exams, volume, view, target, weight, exams_in_step=1, is_last=True
):
    """One exam: augmentation, forward, class-weighted loss, backward; after the last exam of a step
    the optimizer's. A GPU replays it as a graph (`as_graphs`).

    With one exam a step it is the article's. The losses of several are summed and divided by their
    number, not by their weights: as one batch under torch's mean reduction.

    Args:
        model: MRNet, or MultiPlaneMRNet.
        exams: MRDataset.
        volume: as `exams.volume` returns it, uint8 (s, H, W).
        view: View, of `exams.draw`.
        target, weight: float32 (1, tasks), on the device.

    Returns:
        logits and weighted losses, float32 (1, tasks) on the device: nothing here waits for it.
    """
    exam = exams.prepare(volume, target.device, view)  # float32 (s, 1, H, W), augmented
    has_auxiliary = len(config.planes) > 1 and config.plane_weight > 0
    with autocast(target.device, config.precision):
        # With several planes each has a logit of its own beside the joint one: (1 + planes, tasks).
        logits = model.all_logits(exam) if has_auxiliary else model(exam)
    del exam  # backward, where memory peaks, does not need it
    losses = F.binary_cross_entropy_with_logits(
        logits, target.expand_as(logits), weight.expand_as(logits), reduction="none"
    )
    loss = losses[:1].mean()
    if has_auxiliary:
        loss = loss + config.plane_weight * losses[1:].mean()
    (loss / exams_in_step).backward()  # gradients add up until the optimizer's step
    if is_last:
        if config.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        # A graph adds to gradients that stay where they are.
        optimizer.zero_grad(set_to_none=not config.cuda_graphs)
    return logits[:1].detach(), losses[:1].detach()


@torch.inference_mode()
def evaluate_model(model, exams, config, what="evaluate"):
    """Predict some exams without augmentation (the article's `evaluate_model`).

    Args:
        model: MRNet or MultiPlaneMRNet.
        exams: MRDataset.
        config: Config.
        what: title of the progress bar.

    Returns:
        {finding: {"loss": mean weighted loss, "auc"}}, and logits float32 (n, tasks).

    Raises:
        RunError: a prediction is infinite or not a number.
    """
    model.eval()
    device = torch.device(config.device)
    logits = torch.zeros(exams.labels.shape, device=device)
    for i in cli.progress(range(len(exams)), what):
        with autocast(device, config.precision):
            logits[i] = model(exams.exam(i, device))[0]
    return measure(exams, logits.cpu()), logits.cpu().numpy()


def measure(exams, logits):
    """{finding: {"loss", "auc"}} of predictions, a tensor float32 (n, tasks).

    Raises:
        RunError: one is infinite or not a number.
    """
    targets, weights = torch.from_numpy(exams.targets), torch.from_numpy(exams.weights)
    losses = F.binary_cross_entropy_with_logits(logits, targets, weights, reduction="none").numpy()
    bad = np.flatnonzero(~np.isfinite(losses).all(axis=1))
    if len(bad):
        raise RunError(
            f"the logit of {exams.paths[bad[0]]} is {logits[bad[0]].sum()}: the network diverged; "
            "lower --lr. The models of earlier epochs are kept"
        )
    return metrics_of(exams.tasks, exams.labels, logits.numpy(), losses)


def start_state(config, split):
    """TrainState before the first epoch: the network, the optimizer and the schedule."""
    features = imagenet_features(config.backbone) if config.pretrained else None
    torch.manual_seed(split.random_seed())
    architecture = {name: getattr(config, name) for name in ARCHITECTURE}
    model = build_model(architecture, config.planes, features, len(config.tasks))
    model = model.to(torch.device(config.device))
    optimizer = make_optimizer(model, config)
    steps = -(-len(split.train_set) // config.accumulate)
    scheduler = make_scheduler(config, optimizer, steps)
    average = make_average(model, config.average_weights)
    return TrainState(model, optimizer, scheduler, config.tasks, average, config.select)


def augmented_exam(config, split):
    """The first training exam as the network gets it, as grey levels: float32 0..1 (s, c, H, W)."""
    torch.manual_seed(split.random_seed())
    exam = split.train_set[0][0]
    exam = next(iter(exam.values())) if isinstance(exam, dict) else exam
    return (grey_levels(exam, config.intensity) / 255).clamp(0, 1)


def report_best_models(config, split, paths, history, log):
    """Evaluate each finding's best model on the validation exams, log its curves, print its path.

    Args:
        paths: {finding: path of its model}.
        history: list of Epoch.record.
        log: TrainingLog.
    """
    device = torch.device(config.device)
    predict = Predictor(device, config.precision)
    for task, path in paths.items():
        model, metadata = load_model(path)
        model.to(device)
        exams = split.valid_set.finding(task)
        logits = predict(model, exams, "evaluate").astype(np.float32)
        metadata["metrics"]["valid"] = valid = measure(exams, torch.from_numpy(logits))[task]
        # Epochs may have been added since that epoch.
        metadata |= {"arguments": asdict(config), "history": history_of(task, history)}
        save_model(path, model, metadata)
        labels, epoch = is_positive(exams.labels[:, 0]).astype(np.float32), metadata["epoch"]
        title = f"{task}, {config.plane}, epoch {epoch}"
        log.add_result(title, labels, sigmoid(logits[:, 0]), metadata, asdict(config))
        log.add_heat_maps(model, exams, epoch, device)
        low, high = auc_interval(labels, logits[:, 0])[1:]
        note = selection_note(asdict(config), split.selected_on == "tune")
        print(
            f"\n{f'{task}, ' if len(paths) > 1 else ''}validation AUC {valid['auc']:.4f} "
            f"[{low:.3f}, {high:.3f}], epoch {epoch} ({note})\nmodel  {path}"
        )
        if high < 0.5:
            print(f"WARNING    {BELOW_CHANCE}")


if __name__ == "__main__":
    cli.exit_with_status(lambda: run(parse_arguments()))
