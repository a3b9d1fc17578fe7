"""The data sets that a training's configuration asks for."""

from pathlib import Path

from common.augmentation import SLICES_OF_STRONG, make_augmentation
from common.cli import print_exams
from common.errors import InputError
from dataloader import SPLITS, MRDataset, MultiPlaneDataset, planes_of, trainable, view_of
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
        if len(config.planes) > 1 and config.plane_dropout == 0 and exams.lacking:
            raise InputError(
                f"{exams.lacking[0]}: no such volume ({len(exams.lacking)} of the {exams.split} "
                "exams lack one); add it, or allow missing planes with --plane-dropout 0.2"
            )
    print_exams(*sets)
    if not config.pretrained:
        print("weights    RANDOM (--no-pretrained): no ImageNet features")
    return sets


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
