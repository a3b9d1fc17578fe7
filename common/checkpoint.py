"""Saved models: plain dicts of tensors, numbers and strings.

    from common.checkpoint import load_model, save_model
    model, metadata = load_model("models/acl-sagittal.pt")

They load with `weights_only=True`, so nothing in them can run, and are written atomically.
"""

import hashlib
import io
import os
import pickle
import pickletools
import re
import zipfile
from contextlib import contextmanager
from dataclasses import asdict
from typing import Literal, NotRequired, TypedDict

import numpy as np
import torch

from common.config import Config
from common.description import Dataset
from common.documents import Probability, check
from common.errors import InputError, is_out_of_memory, one_line
from common.files import (
    MAX_BYTES,
    held,
    open_regular,
    open_zip,
    read_bytes,
    remove_leftovers,
    write_bytes,
)
from common.names import column_name, state_path
from common.planes import ALL_PLANES
from common.splits import fingerprints_of
from dataloader import CHANNELS, INTENSITIES
from model import POOLINGS, MRNet, MultiPlaneMRNet

FORMAT = "mrnet-model-4"
STATE_FORMAT = "mrnet-training-4"
MAX_STATE = 2**32  # bytes of a training's state, which holds the weights several times
# What torch.save writes into a file of tensors and plain values.
BUILDS_TENSORS = re.compile(
    r"torch \w+Storage|torch\._utils _rebuild_(tensor_v2|parameter)|collections OrderedDict"
)
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


def read_checkpoint(path, expected=FORMAT):
    """A dict of tensors, numbers and strings that `write_checkpoint` wrote.

    Args:
        expected: its format.

    Raises:
        InputError: missing, damaged, or of another format.
    """
    return read_with_digest(path, expected)[0]


def read_with_digest(path, expected):
    """`read_checkpoint`, and the `digest_of` the very file that was read: another may lie there a
    moment later."""
    try:
        data = read_bytes(path, MAX_STATE if expected == STATE_FORMAT else MAX_BYTES)
        check_archive(data)
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such saved model") from None
    except PermissionError:
        raise InputError(f"{path}: no permission to read it; change its permissions") from None
    except Exception as error:  # torch raises many kinds for a damaged archive
        if is_out_of_memory(error):
            raise
        why = one_line(error)
        if isinstance(error, pickle.UnpicklingError):  # whose text advises to run what is in it
            why = "it holds more than tensors and plain values"
        raise InputError(
            f"{path}: damaged, or not a saved model ({why}); delete it and train again"
        ) from None
    if not isinstance(content, dict) or content.get("format") != expected:
        raise InputError(
            f"{path}: not a {expected} file; it was made by another program or version, delete it "
            "and train again"
        )
    return content, hashlib.sha256(data).hexdigest()


def check_archive(data):
    """Raise ValueError where a saved file takes more memory than its bytes: torch.save compresses
    nothing, and names no function but those that build tensors.

    Args:
        data: bytes of the file.
    """
    with open_zip(io.BytesIO(data)) as archive:
        members = archive.infolist()
        size = sum(info.file_size for info in members)
        if size > len(data) or any(info.compress_type != zipfile.ZIP_STORED for info in members):
            raise ValueError(f"it unpacks to {size >> 20} MiB")
        for name in (name for name in archive.namelist() if name.endswith("/data.pkl")):
            for code, value, _ in pickletools.genops(archive.read(name)):
                if code.name.endswith("GLOBAL") and not BUILDS_TENSORS.fullmatch(value or ""):
                    raise pickle.UnpicklingError


def write_checkpoint(path, content):
    """Write a dict of tensors, numbers and strings atomically."""
    # Serialised in memory first: on a full disk torch.save fails with a RuntimeError of its own.
    serialised = io.BytesIO()
    torch.save(content, serialised)
    write_bytes(path, serialised.getvalue())


@contextmanager
def lock(path):
    """Hold the lock of a saved model and of its state, so that no two runs write them; what a
    killed run left is removed.

    Raises:
        InputError: another run holds it.
    """
    busy = f"{path}: another run is training it; wait for that one, or give another --models-dir"
    with held(path.with_name(f".{path.stem}.lock"), busy):
        for name in (path, state_path(path)):
            remove_leftovers(name)
        yield


def digest_of(path):
    """SHA-256 of a file, hexadecimal: a stack identifies by it the networks it was fitted on."""
    with open_regular(path, most=None) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(folder, option="--models-dir"):
    """Raise InputError before the first epoch if nothing can be written to `folder`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"{folder}: cannot write there ({error.strerror}); give another {option}"
        ) from None


# --- models ---------------------------------------------------------------------------------------


def body_digest(model):
    """SHA-256 of all that an exam's features come from, hexadecimal: of all but the classifiers.

    The findings of one training that chose the same epoch have it in common.

    Args:
        model: MRNet or MultiPlaneMRNet.
    """
    found = hashlib.sha256(f"{type(model).__name__} {model.backbone} {model.pooling}".encode())
    for name, tensor in model.state_dict().items():
        if "classifier" not in name.split("."):
            found.update(name.encode())
            found.update(tensor.cpu().numpy().tobytes())
    return found.hexdigest()


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
