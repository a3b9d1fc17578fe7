"""Knee MRI exams in MRNet's layout, their labels, class weights and augmentation.

    from dataloader import Augmentation, MRDataset
    exams = MRDataset("data", "acl", "sagittal", train=True, transform=Augmentation())
    volume, label, weight = exams[0]  # float32 (s, 1, 256, 256), (1,), (1,)

Layout: data/README.md. Sources: the article's `dataloader.py` (classes, labels, weights,
augmentation); Stanford's released loader (intensities), Bien et al., PLOS Medicine 2018.
"""

import copy
import hashlib
import itertools
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from mrnet.layout.description import read_dataset
from mrnet.layout.labels import (
    UNKNOWN,
    OneClassOnly,
    compare_groups,
    is_positive,
    known_labels,
    read_groups,
    read_rows,
)
from mrnet.layout.volumes import check_side, open_volume, read_volume, volume_path

MEAN, STD = 58.09, 49.73  # grey levels of MRNet's volumes; Stanford's released loader
CHANNELS = ("grey", "neighbours")  # of the network's input
PER_LABEL = ("labels", "label_weights", "targets", "weights")  # arrays (n, tasks) of MRDataset
MAX_ROTATION = 25.0  # degrees; the article
MAX_SHIFT = 25 / 256  # of the side: the article's 25 px of 256, and as much at other sizes
FLIP = 0.5  # probability; the article
INTENSITIES = ("standardized", "raw")


class LabelledExams(NamedTuple):
    """The exams that the CSVs list."""

    ids: list
    labels: np.ndarray  # float32 (n, tasks)
    groups: list


def rescale(volume, intensity):
    """uint8 (s, H, W) -> float32 grey levels: stretched to 0..255 when they will be standardised.

    No host synchronisation: the extremes stay on the volume's device.
    """
    grey = volume.float()
    if intensity == "raw":
        return grey
    # ONNX has no extremes without `dim`; with it they take 100 times as long on a CPU.
    exporting = torch.compiler.is_exporting()
    low, high = torch.aminmax(volume.flatten(), dim=0) if exporting else torch.aminmax(volume)
    low, high = low.float(), high.float()
    return grey.sub_(low).mul_(255.0 / (high - low).clamp(min=1.0))


def preprocess(volume, intensity, channels="grey", transform=None, rows=None):
    """Input of the network: uint8 (s, H, W) -> float32 (s, 1 or 3, H, W), same device.

    Args:
        intensity: "standardized" or "raw", as in MRDataset.
        channels: "grey", each slice alone, or "neighbours", between the slice before and the slice
            after it; the first and the last repeat themselves.
        transform: moves grey levels 0..255 before they are standardised, so that black stays black.
        rows: int64 tensor, the slices to take; by default all.
    """
    grey = rescale(volume, intensity)
    if rows is not None and channels == "grey":
        grey = grey[rows]
    if transform is not None:
        grey = transform(grey)
    if intensity == "standardized":
        grey = torch.sub(grey, MEAN).div_(STD)
    if channels == "grey":
        return grey[:, None]  # (s, H, W) -> (s, 1, H, W)
    # Neighbours in the exam, not among the slices that were taken.
    middle = torch.arange(len(grey), device=grey.device) if rows is None else rows
    around = torch.stack([middle - 1, middle, middle + 1], dim=1).clamp(0, len(grey) - 1)
    return grey[around]  # (s, H, W) -> (s, 3, H, W)


def grey_levels(x, intensity):
    """The inverse of `preprocess`: float32 of any shape -> grey levels 0 to 255, up to rounding."""
    return x if intensity == "raw" else x * STD + MEAN


class Augmentation:
    """The article's augmentation: rotation, shift and flip, drawn once for all slices of an exam.

    Rotation U(-25, 25) degrees, shift U(-25, 25) px of 256 in both directions, horizontal flip
    with probability 0.5, composed into one bilinear resampling; what comes from outside is black.

    What a data set needs of a transform: `draw(n)` gives the random numbers for n exams, `apply`
    moves one exam by its row of them, which is on the exam's device if `on_device` is True.

    Args:
        mirror: axis that the flip turns round: "columns" as in the article, "rows" or "slices".
    """

    on_device = True

    def __init__(self, mirror="columns"):
        self.mirror = mirror

    def draw(self, n):
        """Random poses for n exams: float32 (n, 4), angle in radians, shift in sides, +1 or -1."""
        u = torch.rand(n, 4)
        angle = (2 * u[:, 0] - 1) * math.radians(MAX_ROTATION)
        shift = (2 * u[:, 1:3] - 1) * MAX_SHIFT
        flip = 1 - 2 * (u[:, 3] < FLIP).float()
        return torch.stack((angle, shift[:, 0], shift[:, 1], flip), dim=1)

    def apply(self, grey, drawn):
        """Grey levels float32 (s, H, W) moved by one row of `draw` (4,)."""
        pose = drawn.to(grey.device, non_blocking=True)
        if self.mirror == "columns":
            return resample(grey, pose)
        axis = ("slices", "rows").index(self.mirror)
        grey = torch.where(pose[3] < 0, grey.flip(axis), grey)  # waits for no device
        return resample(grey, torch.cat([pose[:3], torch.ones_like(pose[3:])]))


def resample(grey, pose):
    """Rotate, shift and flip all slices at once.

    The slices are the channels of one `grid_sample`, so the sampling grid is computed once.

    Args:
        grey: float32 (s, H, W).
        pose: float32 (4,) on the same device: angle (radians, counter-clockwise as displayed),
            shift to the right and down in parts of W and of H, and -1 for a flip, else +1.

    Returns:
        float32 (s, H, W): the exam flipped, then rotated, then shifted; zero outside.
    """
    height, width = grey.shape[-2:]
    angle, right, down, flip = pose.unbind()
    cos, sin = torch.cos(angle), torch.sin(angle)
    # affine_grid maps output to input in coordinates of -1..1 per axis, hence the aspect ratios
    # and shifts of two (the span from -1 to 1) a side.
    x, y = -2 * right, -2 * down
    row_x = torch.stack(
        (flip * cos, -flip * sin * (height / width), flip * (cos * x - sin * y * (height / width)))
    )
    row_y = torch.stack((sin * (width / height), cos, sin * x * (width / height) + cos * y))
    theta = torch.stack((row_x, row_y))[None]  # (1, 2, 3)
    grid = F.affine_grid(theta, (1, 1, height, width), align_corners=False)  # (1, H, W, 2)
    return F.grid_sample(grey[None], grid, align_corners=False)[0]  # (1, s, H, W) -> (s, H, W)


class View(NamedTuple):
    """What a training step sees of an exam: the random numbers of one epoch."""

    drawn: torch.Tensor | None  # the transform's; None leaves the exam as it is
    rows: torch.Tensor | None  # int64 (k,), the slices; None is all of them


def views_on(device, transform, drawn, slices):
    """Views of n exams on a device, in two copies: one for each step would wait for a GPU.

    Args:
        transform: whose `draw` gave `drawn`, or None.
        drawn: n tensors or None.
        slices: n tensors or None, as MRDataset.draw_slices returns them.
    """

    def moved(tensors):
        if device is None or device.type == "cpu" or not tensors or tensors[0] is None:
            return tensors
        return torch.cat(tensors).to(device).split([len(one) for one in tensors])

    if getattr(transform, "on_device", False):
        drawn = moved(list(drawn))
    return [View(*pair) for pair in zip(drawn, moved(slices), strict=True)]


class MRDataset(Dataset):
    """The exams of one plane and split, with their labels of one finding or several.

    Args:
        root_dir: data folder in MRNet's layout.
        task: any name with train-<task>.csv and valid-<task>.csv in the folder, or a list of them:
            then the exams that have a label of any.
        plane: one of ALL_PLANES.
        train: the training split, else the validation split.
        transform: moves float32 (s, H, W) grey levels 0..255, as `Augmentation()` does, whose
            `draw` and `apply` it must have; None to evaluate.
        intensity: "standardized" (each volume stretched to 0..255, then MRNet's mean and SD) or
            "raw" (0..255, as in the article).
        channels: in CHANNELS, of the network's input.
        slices: (least, most) part of the slices in a training step, drawn anew for each.
        is_weighted: positives weigh negatives/positives in the loss, else as much as negatives.

    Attributes:
        labels: float32 (n, tasks), 0 to 1 or UNKNOWN.
        label_weights: float32 (n, tasks), those of the CSV, else 1.
        targets, weights: float32 (n, tasks), what the loss takes: labels and class weights; weight
            and target 0 where the label is unknown.
        known: {task: ids of the exams whose label is not empty, in the order of its CSV}.
        unknown: {task: number of exams whose label is empty}.
        without_group: one line on exams without a group where others have one, or "".
        listed: LabelledExams, with the exams that have no volume of this plane. Folds are cut on
            these, so that they are the same in every plane.
        absent: number of exams without a volume of this plane. Only where dataset.json says
            "may_lack_planes": true, as importers write it, are such left out; else they are faults.

    Every volume's header is checked here, so that a fault shows before training and not in it.

    Raises:
        InputError: for anything wrong in the folder, one line with the file and how to fix it.
    """

    SETTINGS = ("transform", "intensity", "channels", "slices", "taken")

    def __init__(self, root_dir, task, plane, train=True, transform=None, intensity="standardized",
                 channels="grey", slices=(1.0, 1.0), is_weighted=True):  # fmt: skip
        self.root, self.split = Path(root_dir), "train" if train else "valid"
        self.tasks, self.plane = (task,) if isinstance(task, str) else tuple(task), plane
        self.transform, self.intensity = transform, intensity
        self.channels, self.slices = channels, slices
        self.taken = [plane] if isinstance(plane, str) else list(plane)
        tables = [read_rows(root_dir, task, self.split) for task in self.tasks]
        known = [known_labels(table) for table in tables]
        self.known = dict(zip(self.tasks, map(list, known), strict=True))
        self.ids = list(dict.fromkeys(itertools.chain(*known)))
        rows = [[labels.get(exam_id, UNKNOWN) for labels in known] for exam_id in self.ids]
        pairs = zip(self.tasks, tables, strict=True)
        self.unknown = {task: len(table) - len(self.known[task]) for task, table in pairs}
        self.labels = np.array(rows, np.float32)
        self.description = read_dataset(root_dir)
        groups = read_groups(root_dir, self.split)
        self.without_group = compare_groups(root_dir, self.split, groups, self.ids)
        self.groups = [groups.get(exam_id, f"exam {exam_id}") for exam_id in self.ids]
        self.listed = LabelledExams(self.ids, self.labels, self.groups)
        self.absent = 0
        if (self.description or {}).get("may_lack_planes"):
            self.leave_out_absent()
        trust = [{row.exam_id: row.weight for row in table} for table in tables]
        rows = [[weights.get(exam_id, 1.0) for weights in trust] for exam_id in self.ids]
        self.label_weights = np.array(rows, np.float32)
        if not train:
            known = [known_labels(read_rows(root_dir, task, "train")) for task in self.tasks]
        ratios = [class_ratio([*labels.values()]) for labels in known]
        self.set_class_weights(ratios if is_weighted else 1.0)
        self.paths = [self.find(exam_id) for exam_id in self.ids]
        self.shapes = [self.read_shape(path) for path in self.paths]
        self.cached = [None] * len(self.paths)
        self.digests = [None] * len(self.paths)  # of the voxels, once they have been read

    def leave_out_absent(self):
        """Leave out the exams that have no volume of this plane, unless nobody has one."""
        there = [row for row, exam_id in enumerate(self.ids) if self.has_volume(exam_id)]
        if there:
            self.absent = len(self.ids) - len(there)
            self.ids, self.groups = ([of[row] for row in there] for of in (self.ids, self.groups))
            self.labels = self.labels[there]
        for task, column in zip(self.tasks, self.labels.T, strict=True):
            if len({bool(is_positive(label)) for label in column[~np.isnan(column)]}) < 2:
                raise OneClassOnly(
                    f"{self.root}/{self.split}-{task}.csv: one class only among the {len(there)} "
                    f"exams that have a volume of {self.plane}; leave the finding out (--task), or "
                    "put more exams into this split"
                )

    def set_class_weights(self, positive):
        """Weight of the loss of positives, for each finding or one for all, that of negatives being
        1: negatives/positives, counted on the training labels for both splits, or 1.

        A label between 0 and 1 is that part of a positive and the rest of a negative exam.
        """
        positive = np.broadcast_to(np.float64(positive), len(self.tasks))
        pairs = zip(self.tasks, positive.tolist(), strict=True)
        self.class_weights = {task: (1.0, weight) for task, weight in pairs}
        labels = self.labels.astype(np.float64)
        weights = labels * positive + (1 - labels)
        self.targets = np.nan_to_num(labels * positive / weights).astype(np.float32)
        self.weights = np.nan_to_num(weights * self.label_weights).astype(np.float32)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        """-> volume float32 (s, 1 or 3, H, W), target float32 (tasks,), weight float32 (tasks,)."""
        i = range(len(self))[i]  # -1 is the last exam; beyond the ends IndexError
        target, weight = torch.from_numpy(self.targets[i]), torch.from_numpy(self.weights[i])
        return self.exam(i, view=self.draw([i])[0]), target, weight

    def draw(self, rows, device=None):
        """Random views of some exams: list of View, on `device`."""
        drawn = [None] * len(rows) if self.transform is None else self.transform.draw(len(rows))
        slices = [self.draw_slices(self.shapes[i][0]) for i in rows]
        return views_on(device, self.transform, drawn, slices)

    def draw_slices(self, count):
        """A part of `count` slices, int64 (k,), evenly spaced from a random first; None for all.

        Systematic sampling (Cochran, "Sampling techniques", 1977, chapter 8): each slice is as
        likely as any other, and a third of them, each between its neighbours, shows them all.
        """
        least, most = self.slices
        if least == 1:
            return None
        part = least if least == most else least + torch.rand(()).item() * (most - least)
        taken = max(1, round(part * count))
        positions = torch.arange(taken, dtype=torch.float64) + torch.rand(())
        return (positions * (count / taken)).long()

    def exam(self, i, device=None, view=None):
        """Exam i as input of the network, on `device`: float32 (s, 1 or 3, H, W).

        Args:
            view: View for a training step; None for the whole exam as it is.
        """
        return self.prepare(self.volume(i), device, view)

    def prepare(self, volume, device=None, view=None):
        """The same of a volume uint8 (s, H, W) that is at hand."""
        return self.prepare_plane(volume.to(device, non_blocking=True), self.transform, view)

    def prepare_plane(self, volume, transform, view):
        """uint8 (s, H, W) -> float32 (s, 1 or 3, H, W), with a plane's own transform and View."""
        drawn, rows = view or (None, None)
        transform = None if drawn is None else partial(transform.apply, drawn=drawn)
        rows = None if rows is None else rows.to(volume.device, non_blocking=True)
        return preprocess(volume, self.intensity, self.channels, transform, rows)

    def volume(self, i):
        """Exam i as stored: uint8 tensor (s, H, W), from memory if `cache` was called."""
        return self.read(self.paths[i]) if self.cached[i] is None else self.cached[i]

    # What follows is of one plane; MultiPlaneDataset has it of several.

    def find(self, exam_id):
        return volume_path(self.root, self.split, self.plane, exam_id)

    def has_volume(self, exam_id):
        return self.find(exam_id).exists()

    def read_shape(self, path):
        return open_volume(path).shape

    def read(self, path):
        return torch.from_numpy(read_volume(path))

    def digest(self, volume):
        return hashlib.sha256(volume.cpu().numpy()).hexdigest()[:32]

    def check_sides(self, smallest, backbone):
        """Raise InputError for the first exam with slices smaller than a backbone needs, px."""
        for path, shape in zip(self.paths, self.shapes, strict=True):
            check_side(path, shape, smallest, backbone)

    @property
    def slice_counts(self):
        """Slices of each exam: list of int."""
        return [shape[0] for shape in self.shapes]

    @property
    def slice_ranges(self):
        """{plane: [fewest, most slices of an exam]}."""
        return {self.plane: [min(self.slice_counts), max(self.slice_counts)]}

    @property
    def nbytes(self):
        """Bytes that all volumes take as uint8."""
        return sum(math.prod(shape) for shape in self.shapes)

    def cache(self, device, progress=iter):
        """Read all volumes once and keep them as uint8 on `device` ("cpu" is the RAM)."""
        for i, _ in enumerate(progress(self.paths)):
            self.cached[i] = self.volume(i).to(device)

    def prepared(self, **settings):
        """The same exams, of the same memory, with other SETTINGS."""
        other = copy.copy(self)
        for name, value in settings.items():
            if name not in self.SETTINGS:
                raise TypeError(f"no setting {name}")
            setattr(other, name, value)
        return other

    def rows_of(self, ids):
        """Rows of exams by id; ids that are not here are left out."""
        row = {exam_id: i for i, exam_id in enumerate(self.ids)}
        return [row[exam_id] for exam_id in ids if exam_id in row]

    def subset(self, rows, transform=None):
        """The exams at `rows` only, with another transform; class weights unchanged."""
        subset = copy.copy(self)
        subset.transform = transform
        for name in PER_LABEL:
            setattr(subset, name, getattr(self, name)[rows])
        for name in ("ids", "groups", "paths", "shapes", "cached", "digests"):
            setattr(subset, name, [getattr(self, name)[row] for row in rows])
        return subset

    def finding(self, task):
        """The exams whose label of one finding is known, with this label only, as a data set of
        `task` alone has them."""
        if self.tasks == (task,):
            return self
        column = self.tasks.index(task)
        subset = self.subset(self.rows_of(self.known[task]))
        subset.tasks, subset.transform = (task,), self.transform
        subset.class_weights = {task: self.class_weights[task]}
        for name in PER_LABEL:
            setattr(subset, name, getattr(subset, name)[:, column : column + 1])
        return subset

    def fingerprint(self):
        """Hash of ids, labels and voxels, 32 hex digits: the same for two runs on the same data."""
        for i, digest in enumerate(self.digests):
            if digest is None:  # 1.4 GB/s: 2 s for MRNet
                self.digests[i] = self.digest(self.volume(i))
        rows = zip(self.ids, self.labels, self.shapes, self.digests, strict=True)
        text = "".join(f"{i},{label_text(label)},{shape},{d}\n" for i, label, shape, d in rows)
        if (self.label_weights != 1).any():
            text += "".join(f"{label_text(weights)}\n" for weights in self.label_weights)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def class_ratio(labels):
    """Negatives by positives, the class weight of positives; labels (n,), 0 to 1."""
    positive = float(np.asarray(labels, np.float32).sum(dtype=np.float64))
    return (len(labels) - positive) / positive


def label_text(labels):
    """The labels of one exam (tasks,) for a fingerprint: "1", "0.7", "0;nan;1"."""
    return ";".join(f"{label:g}" for label in labels)
