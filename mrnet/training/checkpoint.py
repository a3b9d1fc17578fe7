"""Saved models: plain dicts of tensors, numbers and strings.

    from mrnet.training.checkpoint import load_model, save_model
    model, metadata = load_model("models/acl-sagittal.pt")

They load with `weights_only=True`, so nothing in them can run, and are written atomically.
"""

from contextlib import contextmanager
from dataclasses import asdict
from typing import Literal, NotRequired, TypedDict

import numpy as np
import torch

from dataloader import CHANNELS, INTENSITIES
from model import POOLINGS, MRNet, MultiPlaneMRNet
from mrnet.documents import Probability, check
from mrnet.errors import InputError, is_out_of_memory, one_line
from mrnet.files import file_lock, remove_leftovers
from mrnet.layout.description import Dataset
from mrnet.layout.names import column_name, state_path
from mrnet.layout.planes import ALL_PLANES
from mrnet.networks.saved import FORMAT, read_with_digest, write_checkpoint
from mrnet.training.config import Config
from mrnet.training.splits import fingerprints_of

# What a network is built from, and must be saved with its weights.
ARCHITECTURE = ("backbone", "pooling", "dropout", "share_backbone")


class Architecture(TypedDict):
    """As `build_model` takes it."""

    backbone: str
    pooling: str
    dropout: float
    share_backbone: bool


class Metadata(TypedDict):
    """What the metadata of every saved model has at least."""

    task: str
    plane: str
    recipe: str
    architecture: Architecture
    intensity: Literal[tuple(INTENSITIES)]
    channels: Literal[tuple(CHANNELS)]
    plane_dropout: float
    protocol: str
    seed: int
    fold: int
    epoch: int
    out_of_fold: list[str]  # ids of training exams that it was not trained on
    tuning: list[str]  # ids of training exams that were kept to select the epoch
    arguments: Config  # as a dict
    prevalence: Probability  # mean label of the training exams
    data: dict[str, str]  # fingerprints of the exams
    slices: dict[str, list[int]]  # {plane: [fewest, most slices of a training exam]}
    dataset: dict | None  # content of dataset.json
    metrics: dict
    history: NotRequired[list[dict]]  # of each epoch
    git: NotRequired[str]
    machine: NotRequired[str]
    precision: NotRequired[str]
    pretrained: NotRequired[bool]


def metadata_of(config, split, epoch, task):
    """Metadata of the saved model of one finding: plain values only.

    Args:
        config: Config.
        split: splits.Split.
        epoch: logs.Epoch, the saved one.
    """
    return {
        "task": task,
        "plane": config.plane,
        "recipe": config.recipe,
        "architecture": {name: getattr(config, name) for name in ARCHITECTURE},
        "intensity": config.intensity,
        "channels": config.channels,
        "plane_dropout": config.plane_dropout,
        "pretrained": config.pretrained,
        "precision": config.precision,
        "epoch": epoch.number,
        "seed": split.seed,
        "fold": split.fold,
        "out_of_fold": split.out_of_fold,
        "tuning": split.tuning,
        "protocol": config.protocol,
        "metrics": {which: metrics[task] for which, metrics in epoch.metrics.items()},
        "arguments": asdict(config),
        "class_weights": list(split.train_set.class_weights[task]),
        "prevalence": float(np.nanmean(split.train_set.finding(task).labels)),
        "data": fingerprints_of(split.finding(task)),
        "slices": split.train_set.slice_ranges,
    }


@contextmanager
def lock(path):
    """Hold the lock of a saved model and of its state, so that no two runs write them; what a
    killed run left is removed.

    Raises:
        InputError: another run holds it.
    """
    busy = f"{path}: another run is training it; wait for that one, or give another --models-dir"
    with file_lock(path.with_name(f".{path.stem}.lock"), busy):
        for name in (path, state_path(path)):
            remove_leftovers(name)
        yield


def save_model(path, model, metadata, finding=0):
    """Write a model of one finding (AlexNet: about 10 MB) with its description.

    Args:
        model: MRNet or MultiPlaneMRNet.
        metadata: dict of plain values, at least Metadata.
        finding: which of the network's findings; the classifiers of the others are left out.
    """
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    for name in state:
        if name.split(".")[-2:-1] == ["classifier"]:
            state[name] = state[name][finding : finding + 1].clone()
    write_checkpoint(path, {"format": FORMAT, "model": state, "metadata": metadata})


def load_model(path, task=None, column=None):
    """A saved model, ready to evaluate, and its description.

    Args:
        task, column: what it must be a model of, if given (`names.column_name`).

    Returns:
        MRNet or MultiPlaneMRNet in evaluation mode on the CPU, and its metadata, a dict with at
        least Metadata.

    Raises:
        InputError: missing, damaged, of another version, or of another task or plane.
    """
    model, metadata, _ = load_with_digest(path, task, column)
    return model, metadata


def load_with_digest(path, task=None, column=None):
    """`load_model`, and the digest of the file that it read, as `read_with_digest`."""
    content, digest = read_with_digest(path, FORMAT)
    try:
        metadata = content["metadata"]
        check_metadata(metadata)
        model = build_model(metadata["architecture"], metadata["plane"].split("+"))
        model.load_state_dict(content["model"])
        for name, value in model.state_dict().items():  # buffers too, such as a running variance
            if not torch.isfinite(value).all():
                raise ValueError(f"{name} holds values that are not finite")
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"{path}: incomplete, or of an earlier version ({one_line(error)}); delete it and "
            "train again"
        ) from None
    found = column_name(metadata["plane"], metadata["recipe"])
    if (task or metadata["task"], column or found) != (metadata["task"], found):
        raise InputError(
            f"{path}: a model of {one_line(metadata['task'])}, {one_line(found)}, not "
            f"of {task}, {column}; put the right file there, or train again"
        )
    return model.eval(), metadata, digest


def build_model(architecture, planes, features=None, tasks=1):
    """A network with random weights, or ImageNet's in its backbones.

    Args:
        architecture: dict with `backbone`, `pooling`, `dropout`, `share_backbone`, as in Config.
        planes: list; a MultiPlaneMRNet for several.
        features: state dict of the backbone, or None.
        tasks: number of findings.

    Raises:
        KeyError, ValueError: no such backbone or pooling.
    """
    backbone, pooling = architecture["backbone"], architecture["pooling"]
    if pooling not in POOLINGS:
        raise ValueError(f"no such pooling: {pooling}")
    networks = {
        plane: MRNet(features, architecture["dropout"], backbone, pooling, tasks)
        for plane in planes
    }
    if len(planes) == 1:
        return networks[planes[0]]
    if architecture["share_backbone"]:
        first = networks[planes[0]].pretrained_model
        for network in networks.values():
            network.pretrained_model = first
    return MultiPlaneMRNet(networks, architecture["dropout"])


def check_metadata(content):
    """Refuse a model's description that is incomplete or has values of a wrong type. Raises
    ValueError, KeyError or TypeError."""
    check(Metadata, content, "metadata", is_open=True)
    planes = content["plane"].split("+")
    if not set(planes) <= set(ALL_PLANES):
        raise ValueError(f"metadata.plane: no such plane as {content['plane']!r:.40}")
    if "valid" not in content["data"]:
        raise ValueError("metadata.data.valid is missing")
    ranges = content["slices"]
    if ranges.keys() != set(planes) or not all(
        len(one) == 2 and 0 < one[0] <= one[1] for one in ranges.values()
    ):
        raise ValueError("metadata.slices: not a range of each plane")
    if content["dataset"] is not None:
        check(Dataset, content["dataset"], "metadata.dataset", is_open=True)
