"""Where a task's networks saw what they say about an exam: exact maps, in units of the logit.

What explain.py shows, the report of a run and the pointing game count.
"""

from typing import NamedTuple

import numpy as np

from mrnet.evaluation.metrics import sigmoid
from mrnet.inference.exams import read_planes
from mrnet.inference.task_models import TaskModels
from mrnet.networks.backbones import BACKBONES
from mrnet.networks.receptive_fields import regrid
from mrnet.stacking.stacking import Decision, decide


class PlaneMaps(NamedTuple):
    """Where some networks' answer for one plane of one exam comes from.

    The networks' mean logit is the sum of `maps`, `others` and `bias`.
    """

    plane: str
    joined: tuple  # planes that the networks join, this one among them; no other in most
    volume: np.ndarray  # uint8 (s, H, W)
    maps: np.ndarray  # float32 (s, h, w), mean over the networks, in units of the logit
    backbone: str  # whose cells they have
    logit: float  # mean over the networks
    others: float  # what other planes add to it, in networks that join several
    bias: float  # mean over the networks
    probability: float  # mean over the networks
    networks: list  # of each "alexnet, maximum over slices"
    neighbours: bool = False  # of the networks some see a slice with those before and after it

    @property
    def is_joint(self):
        """Whether the networks join several planes."""
        return len(self.joined) > 1

    @property
    def column(self):
        """What the probability is of: "axial", or "axial+sagittal"."""
        return "+".join(self.joined)

    @property
    def title(self):
        """What a reader calls it: "axial", or "axial of axial+sagittal"."""
        return f"{self.plane} of {self.column}" if self.is_joint else self.plane

    @property
    def scale(self):
        """The largest value of the maps, by size; 1 where all are 0."""
        return float(np.abs(self.maps).max()) or 1.0

    @property
    def slice_sums(self):
        """What each slice adds to the logit: float64 (s,)."""
        return self.maps.sum(axis=(1, 2), dtype=np.float64)


def explain_networks(networks, volumes, device, precision, known):
    """Probability and maps of networks that take the same planes.

    Args:
        networks: list of task_models.Network.
        volumes: {plane: uint8 array (s, H, W)}.
        known: as `Network.heat_maps` takes it.

    Returns:
        {plane: PlaneMaps}, and the logits, [float, one for each network].
    """
    found = [network.heat_maps(volumes, device, precision, known) for network in networks]
    logits = [logit for _, logit in found]
    backbones = [network.model.backbone for network in networks]
    bias = float(np.mean([network.bias for network in networks]))
    explained = {}
    for plane in found[0][0]:
        pairs = [(name, maps[plane]) for name, (maps, _) in zip(backbones, found, strict=True)]
        finest, grid = min(pairs, key=fineness)
        mean = np.mean([regrid(maps, name, finest, grid.shape) for name, maps in pairs], axis=0)
        explained[plane] = PlaneMaps(
            plane=plane,
            joined=networks[0].planes,
            volume=volumes[plane],
            maps=mean,
            backbone=finest,
            logit=float(np.mean(logits)),
            others=float(np.mean(logits)) - bias - float(mean.sum(dtype=np.float64)),
            bias=bias,
            probability=float(sigmoid(logits).mean()),
            networks=[describe_network(network) for network in networks],
            neighbours=any(network.channels == "neighbours" for network in networks),
        )
    return explained, logits


def fineness(pair):
    """Sort key of (backbone, maps), the finest first: of cells equally far apart, as AlexNet's and
    ResNet's are, those that are more."""
    backbone, maps = pair
    return BACKBONES[backbone].cell_step, -maps.size


def describe_network(network):
    """What a map comes from, in a few words."""
    pooling = {"max": "maximum", "mean": "mean", "attention": "attention"}[network.model.pooling]
    neighbours = ", each slice with its neighbours" if network.channels == "neighbours" else ""
    return f"{network.model.backbone}, {pooling} over slices{neighbours}"


def explain_planes(models, volumes, device, precision, known=None):
    """What each group of a task's networks that take the same planes says.

    Args:
        models: task_models.TaskModels.
        volumes: {plane: uint8 array (s, H, W)}.
        known: as `Network.heat_maps` takes it; None for an exam that no other task asks about.

    Returns:
        {title: PlaneMaps}, those of one plane first; and {column: [float, one for each network]}.
    """
    explained, logits = {}, {}
    known = {} if known is None else known
    for columns in models.by_planes.values():
        columns = {name: ones for name, ones in columns.items() if ones[0].takes(volumes)}
        if not columns:
            continue
        networks = [network for ones in columns.values() for network in ones]
        found, values = explain_networks(networks, volumes, device, precision, known)
        for column, ones in columns.items():
            logits[column], values = values[: len(ones)], values[len(ones) :]
        explained |= {one.title: one for one in found.values()}
    return explained, logits


class Finding(NamedTuple):
    """What the networks of one task say about an exam, and where they saw it."""

    models: TaskModels
    planes: dict  # {title: PlaneMaps} of `explain_planes`; empty where there is no answer
    decision: Decision | None
    unusable: dict  # {plane: why not}, of planes that were there
    warnings: tuple = ()  # lines on what was used although it is unusual

    @property
    def task(self):
        return self.models.task

    @property
    def probabilities(self):
        """{plane or planes that a network joins: probability}."""
        return {one.column: one.probability for one in self.planes.values()}

    @property
    def decided_from(self):
        """Planes of a decision that leaves out some of those shown, "axial+coronal"; else ""."""
        shown = {one.plane for one in self.planes.values()}
        fewer = self.decision and set(self.decision.planes) != shown
        return "+".join(self.decision.planes) if fewer else ""


def unusable_of(findings):
    """What could not be used of an exam, for any of its Findings, in one line; "" for nothing."""
    reasons = {plane: why for finding in findings for plane, why in finding.unusable.items()}
    return "; ".join(f"{plane}: {why}" for plane, why in reasons.items())


def list_warnings(exam, findings):
    """What is to be known of an exam's answers, each once: list of lines."""
    return list(dict.fromkeys([*exam.warnings, *(w for f in findings for w in f.warnings)]))


def explain_exam(exam, tasks, device, precision, partial=False):
    """The Finding of each task.

    Args:
        exam: exams.Exam.
        tasks: list of task_models.TaskModels.
        partial: also decide where a plane cannot be used.
    """
    findings, read, known = [], {}, {}
    for models in tasks:
        volumes, unusable = read_planes(exam, models, read)
        explained, logits = explain_planes(models, volumes, device, precision, known)
        volumes, unusable, logits = models.leave_out_diverged(volumes, unusable, logits)
        explained = {t: one for t, one in explained.items() if not unusable.keys() & one.joined}
        decision = None
        if explained and models.stack and (partial or not unusable):
            decision = decide(models.stack, volumes, logits)
        warnings = tuple(models.slice_warnings(volumes))
        findings.append(Finding(models, explained, decision, unusable, warnings))
    return findings
