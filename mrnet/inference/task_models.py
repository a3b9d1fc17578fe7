"""The trained networks of a finding and their stack, loaded to answer about exams.

from mrnet.inference.task_models import load_task
models = load_task("models", "acl", ["article"])
logits = models.logits({"sagittal": volume}, torch.device("cpu"), "fp32", {})
"""

import glob
import hashlib
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch

from dataloader import preprocess
from mrnet.errors import InputError, counted
from mrnet.layout.names import ARTICLE, column_name, model_path, stack_name, stack_path
from mrnet.layout.planes import ALL_PLANES, in_order
from mrnet.layout.volumes import check_side
from mrnet.networks.backbones import BACKBONES
from mrnet.networks.saved import BackboneKey, body_digest, digest_of
from mrnet.runtime.devices import autocast
from mrnet.stacking.stacking import is_combination_name, load_stack, order_of
from mrnet.training.checkpoint import load_with_digest

WHOLE_SERIES = 5  # slices; networks that saw no shorter exam refuse a single slice
ANY_PLANE = "|".join(sorted(ALL_PLANES, key=len, reverse=True))  # as a regular expression


class Network(NamedTuple):
    """A saved network, ready to answer."""

    model: torch.nn.Module  # MRNet or MultiPlaneMRNet in evaluation mode, of one finding
    planes: tuple  # that it takes
    intensity: str
    channels: str
    may_lack: bool  # it was trained with plane dropout, so a plane may be missing
    body_digest: str  # of the model
    slices: dict  # {plane: [fewest, most slices of a training exam]}

    @property
    def bias(self):
        return self.model.classifier.bias.item()

    def takes(self, planes):
        """Whether it can answer about an exam with these planes."""
        there = sum(plane in planes for plane in self.planes)
        return there == len(self.planes) or (self.may_lack and there > 0)

    def prepare(self, volumes, device):
        """{plane: uint8 array (s, H, W)} -> input of the network on `device`."""
        exam = {
            plane: preprocess(
                torch.from_numpy(volumes[plane]).to(device), self.intensity, self.channels
            )
            for plane in self.planes
            if plane in volumes
        }
        return exam if len(self.planes) > 1 else exam[self.planes[0]]

    @torch.inference_mode()
    def logit(self, volumes, device, precision, known):
        """The logit of one exam, float.

        Args:
            volumes: as `prepare` takes them.
            known: {BackboneKey: features} of this exam on this device in this precision, brought up
                to date: networks that differ in their classifiers alone share the rest.
        """
        body = self.body(volumes)
        with autocast(device, precision):
            if body not in known:
                known[body] = self.model.exam_features(self.prepare(volumes, device))
            return self.model.classify(known[body]).item()

    def body(self, planes):
        """The BackboneKey of an exam with these planes, container."""
        ours = tuple(plane for plane in self.planes if plane in planes)
        return BackboneKey(self.body_digest, ours, self.intensity, self.channels)

    def heat_maps(self, volumes, device, precision, known):
        """{plane: float32 array (s, h, w)}, as `MRNet.heat_maps`, and the logit.

        Args:
            known: as `logit` takes it, with `MRNet.exam_maps` in the place of features.
        """
        body = self.body(volumes)
        with autocast(device, precision):
            if body not in known:
                known[body] = self.model.exam_maps(self.prepare(volumes, device))
            maps, logit = self.model.heat_maps_of(known[body])
        return (maps if len(self.planes) > 1 else {self.planes[0]: maps}), logit


class TaskModels(NamedTuple):
    """Everything saved for one task."""

    task: str
    networks: dict  # column -> [Network, ...]; several with folds
    stack: dict | None  # as `load_stack` returns it
    digest: str  # of the files of all networks and the stack, 12 hex digits
    datasets: list  # that the networks were trained on: dataset.json's content, None if unknown
    prevalence: float  # mean label of the exams that the networks were trained on

    @property
    def is_synthetic(self):
        """Whether any of the networks was trained on synthetic exams."""
        return any(dataset is not None and dataset["synthetic"] for dataset in self.datasets)

    @property
    def is_mirrored(self):
        """Whether any of the networks sees right knees as left ones."""
        return any(dataset is not None and dataset.get("mirrored") for dataset in self.datasets)

    @property
    def planes(self):
        """The planes that any network takes, in the order of ALL_PLANES."""
        return in_order({p for networks in self.networks.values() for p in networks[0].planes})

    @property
    def by_planes(self):
        """{(planes that they take): {column: [Network, ...]}}, single planes first."""
        found = {}
        for column, networks in self.networks.items():
            found.setdefault(networks[0].planes, {})[column] = networks
        order = sorted(found, key=lambda planes: (len(planes), ALL_PLANES.index(planes[0])))
        return {planes: found[planes] for planes in order}

    def check_volume(self, path, volume, plane):
        """Raise InputError where a plane's slices are smaller than one of its networks needs, or
        where a single slice is given to networks of whole series."""
        for networks in self.networks.values():
            backbone = networks[0].model.backbone
            if plane in networks[0].planes:
                check_side(path, volume.shape, BACKBONES[backbone].smallest_side, backbone)
        fewest, most = self.slice_range(plane)
        if len(volume) == 1 and fewest >= WHOLE_SERIES:
            raise InputError(
                f"{path}: a single slice, and the {self.task} networks were trained on exams of "
                f"{fewest} to {most}; give the whole series"
            )

    def slice_range(self, plane):
        """The fewest and the most slices of a training exam in this plane."""
        found = [
            network.slices[plane]
            for networks in self.networks.values()
            for network in networks
            if plane in network.planes
        ]
        return min(fewest for fewest, _ in found), max(most for _, most in found)

    def slice_warnings(self, volumes):
        """A line for each plane with less than half of the fewest or more than twice the most
        slices of the training exams; volumes as `logits` takes them."""
        warnings = []
        for plane, volume in volumes.items():
            fewest, most = self.slice_range(plane)
            if not fewest / 2 <= len(volume) <= 2 * most:
                slices = counted(len(volume), "slice")
                warnings.append(f"{plane} has {slices}, the training exams have {fewest} to {most}")
        return warnings

    def logits(self, volumes, device, precision, known):
        """{column: [float, one for each network]} of the columns that can do with the planes.

        Args:
            volumes: {plane: uint8 array (s, H, W)}.
            known: as `Network.logit` takes it.
        """
        return {
            column: [network.logit(volumes, device, precision, known) for network in networks]
            for column, networks in self.networks.items()
            if networks[0].takes(volumes)
        }

    def leave_out_diverged(self, volumes, unusable, logits):
        """What is left of an exam without the networks whose logit is not finite.

        Args:
            volumes, unusable: as `exams.read_planes` returns them.
            logits: as `logits` returns them.

        Returns:
            the three of them: each plane that such a network takes is unusable.
        """
        bad = {c: v for c, values in logits.items() for v in values if not math.isfinite(v)}
        why = {
            plane: f"the logit of a network of {column} is {value}; train it again"
            for column, value in bad.items()
            for plane in self.networks[column][0].planes
            if plane in volumes
        }
        return (
            {plane: volume for plane, volume in volumes.items() if plane not in why},
            unusable | why,
            {column: values for column, values in logits.items() if column not in bad},
        )


def saved_tasks(models_dir, recipes):
    """Names of the tasks that have a stack or a model of some recipes, sorted.

    Raises:
        InputError: there is none.
    """
    folder, end = Path(models_dir), f"-{stack_name(recipes)}.json"
    names = {path.name.removesuffix(end) for path in folder.glob(f"*{glob.escape(end)}")}
    names |= saved_columns(folder, recipes).keys()
    if not names:
        of = f" of recipe {' or '.join(recipes)}" if tuple(recipes) != (ARTICLE,) else ""
        raise InputError(
            f"{folder}: no saved models{of}; run `make demo`, or train.py and "
            "train_logistic_regression.py, or give another --models-dir or --recipes"
        )
    return sorted(names)


def saved_columns(models_dir, recipes):
    """The networks of some recipes in a folder, but those of folds and seeds: {task: [column]}."""
    found = {}
    for recipe in recipes:
        planes = rf"((?:{ANY_PLANE})(?:\+(?:{ANY_PLANE}))*)"
        pattern = re.compile(rf"(.+)-{planes}{re.escape(column_name('', recipe))}\.pt")
        parts = [pattern.fullmatch(path.name) for path in Path(models_dir).glob("*.pt")]
        parts = [match.groups() for match in parts if match and is_combination_name(match[2])]
        for task, planes in sorted(parts, key=lambda part: order_of(part[1])):
            found.setdefault(task, []).append(column_name(planes, recipe))
    return found


def as_network(model, metadata, device):
    """A loaded model and its metadata as a Network on `device`."""
    digest = body_digest(model)
    return Network(
        model.to(device),
        tuple(metadata["plane"].split("+")),
        metadata["intensity"],
        metadata["channels"],
        metadata["plane_dropout"] > 0,
        digest,
        metadata["slices"],
    )


def load_task(models_dir, task, recipes, device="cpu"):
    """The networks of a task, on `device`, and its stack if there is one: TaskModels.

    Args:
        recipes: of the networks.

    Raises:
        InputError: no such task, or a saved model that is damaged or of another task or plane.
    """
    folder = Path(models_dir)
    if task not in saved_tasks(folder, recipes):
        raise InputError(
            f"{folder}: no models of task '{task}'; tasks here: "
            f"{', '.join(saved_tasks(folder, recipes))}"
        )
    stack = None
    if stack_path(folder, task, recipes).is_file():
        stack = load_stack(folder, task, recipes)
    if stack:
        paths = {
            column: [folder / name for name in names]
            for column, names in stack["base_models"].items()
        }
    else:
        columns = saved_columns(folder, recipes)[task]
        paths = {column: [model_path(folder, task, column)] for column in columns}
    networks, digests, datasets, prevalences = {}, [], [], []
    for column in paths:
        loaded = [load_with_digest(path, task, column) for path in paths[column]]
        for path, (*_, digest) in zip(paths[column], loaded, strict=True):
            digests.append(digest)
            if stack and stack["digests"].get(path.name) != digests[-1]:
                raise InputError(
                    f"{path}: trained again after the stack was fitted; run python "
                    f"train_logistic_regression.py --task {task} with the same arguments"
                )
        networks[column] = [as_network(model, metadata, device) for model, metadata, _ in loaded]
        for _, metadata, _ in loaded:
            prevalences.append(metadata["prevalence"])
            if metadata["dataset"] not in datasets:
                datasets.append(metadata["dataset"])
    if stack:
        digests.append(digest_of(stack_path(folder, task, recipes)))
    digest = hashlib.sha256(" ".join(digests).encode()).hexdigest()[:12]
    prevalence = sum(prevalences) / len(prevalences)
    return TaskModels(task, networks, stack, digest, datasets, prevalence)
