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

run -> train_network (one network) -> train_epochs (its epochs) -> train_model (one pass over the
training exams, training_step for each) and evaluate_model (one over those that select the epoch).
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

from dataloader import CHANNELS, INTENSITIES, grey_levels
from model import POOLINGS
from mrnet.errors import Interrupted, RunError, counted
from mrnet.evaluation.metrics import BELOW_CHANCE, auc_interval, metrics_of, sigmoid
from mrnet.files import check_writable
from mrnet.layout.arguments import plane_name
from mrnet.layout.labels import is_positive
from mrnet.layout.names import ARTICLE, column_name, folds_path, model_path, state_path
from mrnet.layout.planes import PLANES, in_order
from mrnet.networks.backbones import BACKBONES
from mrnet.networks.weights import imagenet_features
from mrnet.runtime import cli
from mrnet.runtime.devices import autocast, pick_device, pick_precision
from mrnet.stacking.predictions import Predictor
from mrnet.training.augmentation import AUGMENTATIONS, SLICES_OF_STRONG
from mrnet.training.checkpoint import (
    ARCHITECTURE,
    build_model,
    load_model,
    lock,
    metadata_of,
    save_model,
)
from mrnet.training.config import (
    THE_ARTICLES,
    Config,
    parse_with_recipe,
    print_recipe,
    read_recipe,
    selection_note,
)
from mrnet.training.datasets import CACHES, all_tasks, cache_volumes, load_exams
from mrnet.training.graphs import as_graphs, use_graphs
from mrnet.training.logs import Epoch, TrainingLog, heads_of_epochs, history_of, new_log_dir
from mrnet.training.optimization import (
    OPTIMIZERS,
    SCHEDULERS,
    average_advice,
    make_average,
    make_optimizer,
    make_scheduler,
    steps_with_optimizer,
)
from mrnet.training.splits import PROTOCOLS, fingerprints_of, numbered, plan_splits, write_folds
from mrnet.training.train_state import SELECTIONS, TrainState, is_finished, restore_state


def parse_arguments():
    parser = cli.make_parser(__doc__)  # the recipe's defaults are in recipes/article.toml
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("data").add_argument
    task = "any NAME with train-NAME.csv in the data folder; MRNet's: abnormal, acl, meniscus. "
    task += "Several, or all: one network for all of them, in the time of one"
    add("--task", required=True, nargs="+", help=task)
    plane = "axial, coronal, sagittal or a further series' folder such as sagittal-t1; for ACL the "
    plane += "article found sagittal best. Several: one network that joins their features"
    add("--plane", required=True, nargs="+", type=plane_name, metavar="PLANE", help=plane)
    add("--data-dir", type=Path, default=Path("data"), help="folder in MRNet's layout")
    raw = "raw gives the network 0-255 as the article did; it learns worse"
    add("--intensity", choices=INTENSITIES, help=raw)
    channels = "neighbours: each slice between the slices beside it, as the three colours (2.5D)"
    add("--channels", choices=CHANNELS, help=channels)
    augment = "article flips columns in every plane, anatomical left and right only; strong adds "
    augment += f"gamma, contrast, blur, noise, cut-outs, {SLICES_OF_STRONG:.0%}% or more of slices"
    add("--augment", choices=AUGMENTATIONS, help=augment)
    slices = "train each step on a part of the slices, evenly spaced: 0.5 takes half the time"
    add("--slices", type=cli.part, help=slices)

    add = parser.add_argument_group("network").add_argument
    backbone = "others than alexnet and vgg16 need torchvision's host once for their weights"
    add("--backbone", choices=BACKBONES, help=backbone)
    imagenet = "start from ImageNet; --no-pretrained starts from random weights, learns far slower"
    add("--pretrained", action=switch, help=imagenet)
    freeze = "keep so many of its first convolutions as they are: 2 of AlexNet's 5, 2/3 of the time"
    add("--freeze", type=cli.count, metavar="N", help=freeze)
    pooling = "over slices; attention learns which count (Ilse et al. 2018)"
    add("--pooling", choices=POOLINGS, help=pooling)
    dropout = "before the classifier; the article's text has it, its code does not"
    add("--dropout", type=cli.probability, help=dropout)
    share = "with several planes: one backbone for all of them"
    add("--share-backbone", action=switch, help=share)
    auxiliary = "with several planes: weight of the loss of each plane's own logit"
    add("--plane-weight", type=cli.nonnegative_float, help=auxiliary)
    drop = "with several planes: leave each out with this probability, so that one may be missing"
    add("--plane-dropout", type=cli.probability, help=drop)

    add = parser.add_argument_group("recipe").add_argument
    recipe = "article: as published; best: better; fast, fastest: sooner; phantom, rsna; or a file"
    add("--recipe", default=ARTICLE, metavar="NAME|FILE", help=recipe)
    most = "at most; early stopping ends most runs sooner. cosine and one-cycle plan for them"
    add("--epochs", type=cli.positive_int, help=most)
    lr = "1e-5 suits MRNet's 1,130 exams; with 200, 3e-5 to 1e-4; higher values are unstable"
    add("--lr", type=cli.positive_float, help=lr)
    head = "the classifier's own learning rate, ten times --lr is common; 0: --lr"
    add("--head-lr", type=cli.nonnegative_float, help=head)
    add("--optimizer", choices=OPTIMIZERS, help="adamw: weight decay apart from the gradient")
    l2 = "L2 inside Adam, as in the article; with adamw 0.01 is common"
    add("--weight-decay", type=cli.nonnegative_float, help=l2)
    schedule = "plateau and step: the article's, by epochs; cosine, one-cycle: by steps, to 0"
    add("--lr-scheduler", choices=SCHEDULERS, help=schedule)
    warmup = "part of all steps in which the rate rises, with cosine, one-cycle (0: 0.3) or none"
    add("--warmup", type=cli.probability, help=warmup)
    patience = "stop after this many epochs without a better loss"
    add("--patience", type=cli.positive_int, help=patience)
    select = "epoch whose network is saved: best AUC on the exams that select it, or the last"
    add("--select", choices=SELECTIONS, help=select)
    weights = "weight positives by negatives/positives, as the article's text asks"
    add("--class-weights", action=switch, help=weights)
    accumulate = "exams in one step of the optimizer"
    add("--accumulate", type=cli.positive_int, help=accumulate)
    average = "decay of the weights' moving average, which is saved: 0.999; 0.99 below 5,000 steps"
    add("--average-weights", type=cli.probability, help=average)
    clip = "largest norm of the gradient, such as 1; 0: any"
    add("--clip", type=cli.nonnegative_float, help=clip)
    add("--seed", type=cli.count, help="fixes order, augmentation and initial classifier")

    add = parser.add_argument_group("protocol").add_argument
    protocol = "what selects the epoch and stops the training: the validation exams themselves "
    protocol += "(optimistic) or a held-out part of the training exams"
    add("--protocol", choices=PROTOCOLS, help=protocol)
    folds = "number of networks, each trained without its fold of the training exams; 3 to 5 for "
    folds += "honest stacking, 1 is the article's"
    add("--folds", type=cli.positive_int, help=folds)
    seeds = "number of seeds, from --seed on; differences below their spread are noise"
    add("--repeat", type=cli.positive_int, help=seeds)
    only = "train only these of the networks of --folds and --repeat, by number from 1"
    add("--networks", type=cli.positive_int, nargs="+", metavar="N", help=only)

    machine = parser.add_argument_group("machine")
    cli.add_machine_arguments(machine)
    cache = "where volumes lie between epochs; auto: on a GPU with room; disk is as fast on a CPU"
    machine.add_argument("--cache", choices=CACHES, default="auto", help=cache)
    graphs = "steps as CUDA graphs; default where volumes are on a GPU (not with several planes, "
    graphs += "--augment strong, --lr-scheduler one-cycle)"
    machine.add_argument("--cuda-graphs", action=switch, help=graphs)

    add = parser.add_argument_group("files").add_argument
    add("--models-dir", type=Path, default=Path("models"), help="for models and training states")
    add("--logs-dir", type=Path, default=Path("logs"), help="for TensorBoard")
    add("--log-every", type=cli.positive_int, default=100, help="exams between points of a curve")
    resume = "skip trainings that are finished, continue one that was interrupted"
    add("--resume", action="store_true", help=resume)
    parser.set_defaults(**{f.name: f.default for f in fields(Config) if f.name in THE_ARTICLES})
    parser.set_defaults(seed=0, protocol="article", folds=1, repeat=1)
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
        first = k - k % config.accumulate  # of the exams of this step of the optimizer
        exams_in_step = min(config.accumulate, len(order) - first)
        is_last = k + 1 == first + exams_in_step
        volume = exams.volume(i)  # uint8 (s, H, W)
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
    the update. A GPU replays it as a graph (`as_graphs`).

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
    (loss / exams_in_step).backward()
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
