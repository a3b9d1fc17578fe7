"""The data sets that a training's configuration asks for."""

import shlex
from pathlib import Path

from common.augmentation import SLICES_OF_STRONG, make_augmentation
from common.description import describe_dataset
from common.errors import InputError, counted
from common.labels import is_positive, trainable
from common.planes import SPLITS, describe_missing, in_order, planes_of, view_of
from dataloader import MRDataset, MultiPlaneDataset
from model import BACKBONES


def all_tasks(data_dir):
    """Every task of a data folder that can be trained; prints why the others cannot."""
    names, why = trainable(data_dir)
    for line in why.values():
        print(f"left out   {line}")
    return names


def trainable_planes(data_dir):
    """Every plane with a folder in both splits, and the others that are MRNet's or have one: lists.

    Raises:
        InputError: no plane has both.
    """
    there, left = [], []
    for plane in planes_of(data_dir):
        is_whole = all((Path(data_dir) / split / plane).is_dir() for split in SPLITS)
        (there if is_whole else left).append(plane)
    if not there:
        raise InputError(
            f"{data_dir}: no plane has a folder in train and in valid; add its volumes"
        )
    return there, left


def load_exams(config, data_dir):
    """The training and the validation exams, two MRDatasets; prints what they are."""
    sets = [make_exams(config, data_dir, train) for train in (True, False)]
    least, most = (SLICES_OF_STRONG if config.augment == "strong" else 1.0), config.slices
    for exams in sets:
        exams.channels, exams.slices = config.channels, (least * most, most)
        exams.plane_dropout = config.plane_dropout
        if not config.class_weights:
            exams.set_class_weights(1.0)
        smallest = BACKBONES[config.backbone].smallest_side
        exams.check_sides(smallest, config.backbone)
        if len(config.planes) > 1 and config.plane_dropout == 0:
            refuse_missing(exams)
    print_exams(*sets)
    if not config.pretrained:
        print("weights    RANDOM (--no-pretrained): no ImageNet features")
    return sets


def refuse_missing(exams):
    """Raise InputError where an exam of a MultiPlaneDataset lacks a plane."""
    rows = [row for row, there in enumerate(exams.paths) if len(there) < len(exams.plane)]
    if rows:
        there = exams.paths[rows[0]].keys()
        raise InputError(
            f"{exams.root}/{exams.split}, "
            f"{describe_missing(exams.ids[rows[0]], set(exams.plane) - there, there)}; "
            f"{counted(len(rows), 'exam')} like that: add the volumes, or allow missing planes "
            "with --plane-dropout 0.2"
        )


def make_exams(config, data_dir, train):
    """The exams of one split as the configuration asks for."""
    kind, planes = MRDataset, config.planes[0]
    if len(config.planes) > 1:
        kind, planes = MultiPlaneDataset, list(config.planes)
    exams = kind(data_dir, config.tasks, planes, train, None, config.intensity)
    if train:
        orientation = (exams.description or {}).get("orientation") or {}
        transforms = {
            plane: make_augmentation(config.augment, plane, orientation.get(view_of(plane)))
            for plane in config.planes
        }
        exams.transform = transforms if len(config.planes) > 1 else transforms[config.plane]
    return exams


def print_exams(train_set, valid_set):
    """Print what two MRDatasets hold, and a warning if they share exams or patients."""
    for exams in (train_set, valid_set):
        slices = exams.slice_counts
        counts = [int(is_positive(column).sum()) for column in exams.labels.T]
        positive = f"{counts[0]} positive"
        if len(counts) > 1:
            named = zip(exams.tasks, counts, strict=True)
            positive = ", ".join(f"{count} positive of {task}" for task, count in named)
        print(
            f"{exams.split:<10} {counted(len(exams), 'exam')}, {positive}, "
            f"{min(slices)} to {max(slices)} slices"
        )
        if exams.absent:
            skipped = counted(exams.absent, "exam")
            print(f"{exams.split:<10} {skipped} without a volume of this plane, skipped")
        for task, count in exams.unknown.items():
            if count:
                print(f"{exams.split:<10} {counted(count, 'exam')} without a label of {task}")
        if exams.without_group:
            print(f"{exams.split:<10} {exams.without_group}")
    for what in ("ids", "groups"):
        if both := set(getattr(train_set, what)) & set(getattr(valid_set, what)):
            print(
                f"WARNING    {len(both)} {what} are in both splits; if they are the same exams or "
                "patients, no validation figure means anything: "
                f"python -m tools.check {shlex.quote(str(train_set.root))} lists them"
            )
    print(f"data set   {describe_dataset(train_set.description)}")
    for task, pair in train_set.class_weights.items():
        of = f" of {task}" if len(train_set.tasks) > 1 else ""
        print("class weights  negative {:g}, positive {:.3f}".format(*pair) + of)


def exams_of_any(sets, data_dir, task):
    """{split: MRDataset} of the exams that have any of the planes; `sets` as `labelled_sets`."""
    if len(sets) == 1 or not any(one.absent for found in sets.values() for one in found.values()):
        return next(iter(sets.values()))  # ids and labels are the same in all of them
    planes = in_order({plane for key in sets for plane in key.split("+")})
    return {s: MultiPlaneDataset(data_dir, task, planes, train=s == "train") for s in SPLITS}


def labelled_sets(data_dir, task, wanted):
    """{planes: {split: MRDataset}} of a task; `wanted` are single planes, or joined by +."""
    sets = {}
    for planes in dict.fromkeys(wanted):
        kind, plane = (MultiPlaneDataset, planes.split("+")) if "+" in planes else (
            MRDataset, planes)  # fmt: skip
        sets[planes] = {s: kind(data_dir, task, plane, train=s == "train") for s in SPLITS}
    return sets
