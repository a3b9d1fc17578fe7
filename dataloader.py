"""Knee MRI exams in MRNet's layout, their labels, class weights and augmentation.

    from dataloader import Augmentation, MRDataset
    exams = MRDataset("data", "acl", "sagittal", train=True, transform=Augmentation())
    volume, label, weight = exams[0]  # float32 (s, 1, 256, 256), (1,), (1,)

Layout: data/README.md. Sources: the article's `dataloader.py` (classes, labels, weights,
augmentation); Stanford's released loader (intensities), Bien et al., PLOS Medicine 2018.
"""

import copy
import csv
import errno
import hashlib
import itertools
import math
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from common.description import read_dataset
from common.errors import InputError, one_line
from model import SMALLEST_SIDE

PLANES = ("axial", "coronal", "sagittal")  # MRNet's; of which contrast, tells dataset.json
SEQUENCES = ("t1", "t2", "pd", "stir", "gre", "dess")  # of further series, as in "sagittal-t1"
# Every name of a plane's folder, in the order in which planes are joined and printed.
ALL_PLANES = (*PLANES, *(f"{plane}-{name}" for plane in PLANES for name in SEQUENCES))
SPLITS = ("train", "valid")
MEAN, STD = 58.09, 49.73  # grey levels of MRNet's volumes; Stanford's released loader
CHANNELS = ("grey", "neighbours")  # of the network's input
UNKNOWN = float("nan")  # label of an exam that nobody has read for this finding
MOST_WEIGHT = 1000.0  # of one label
PER_LABEL = ("labels", "label_weights", "targets", "weights")  # arrays (n, tasks) of MRDataset
MAX_ROTATION = 25.0  # degrees; the article
MAX_SHIFT = 25 / 256  # of the side: the article's 25 px of 256, and as much at other sizes
FLIP = 0.5  # probability; the article
INTENSITIES = ("standardized", "raw")
GROUPS = "groups"  # <split>-groups.csv holds no labels


class OneClassOnly(InputError):
    """A task whose exams are all positive, or all negative, or none."""


HOW_TO_GET_DATA = (
    "MRNet: register at https://stanfordmlgroup.github.io/competitions/mrnet and unzip it into "
    "data/; or make synthetic knees with `python data/phantom/prepare.py` and give "
    "data/phantom as the data folder"
)


def in_order(planes):
    """Names of planes in the order of ALL_PLANES, each once: list; others are left out."""
    return [plane for plane in ALL_PLANES if plane in planes]


def planes_of(root_dir):
    """MRNet's planes, and every further one that has a folder in a split of `root_dir`: list."""
    root = Path(root_dir)
    return [p for p in ALL_PLANES if p in PLANES or any((root / s / p).is_dir() for s in SPLITS)]


def view_of(plane):
    """The plane of PLANES that a plane's slices lie in: "sagittal" for "sagittal-t1"."""
    return plane.partition("-")[0]


def tasks(root_dir):
    """Names with both train-<task>.csv and valid-<task>.csv in `root_dir`, sorted.

    Raises:
        InputError: no such folder, or no task in it, with how to get data.
    """
    root = Path(root_dir)
    if not root.is_dir():
        raise InputError(f"{root}: no such data folder. {HOW_TO_GET_DATA}")
    names = {p.name[len("train-") : -len(".csv")] for p in root.glob("train-*.csv")} - {GROUPS}
    names = sorted(name for name in names if (root / f"valid-{name}.csv").is_file())
    if not names:
        raise InputError(f"{root}: no train-<task>.csv with a valid-<task>.csv. {HOW_TO_GET_DATA}")
    return names


def trainable(root_dir):
    """The tasks that have labels of both classes in both splits, and why the others have not.

    Returns:
        list of names, sorted, and {name: one line}.

    Raises:
        InputError: as `tasks`, a CSV is faulty, or no task can be trained.
    """
    found, why = [], {}
    for task in tasks(root_dir):
        try:
            for split in SPLITS:
                read_labels(root_dir, task, split)
            found.append(task)
        except OneClassOnly as error:  # any other fault is one of the files
            why[task] = str(error)
    if not found:
        raise InputError(next(iter(why.values())))
    return found, why


class Listed(NamedTuple):
    """The exams that the CSVs list."""

    ids: list
    labels: np.ndarray  # float32 (n, tasks)
    groups: list


class LabelRow(NamedTuple):
    """A row of a CSV of labels, `id,label` or `id,label,weight`; a faulty one has a fault only."""

    exam_id: str | None = None  # without leading zeros
    label: float | None = None  # 0 to 1, or UNKNOWN where it is empty
    weight: float = 1.0  # of its loss: how far the label is trusted
    fault: str | None = None  # what is wrong and how to fix it, one line


def label_rows(root_dir, task, split):
    """Read the CSV of one split row by row: yields a LabelRow for each."""
    path = Path(root_dir) / f"{split}-{task}.csv"
    seen = set()
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.reader(file), start=1):
                if not row:
                    continue
                where = f"{path}, line {number}"
                fault, weight = None, 1.0
                if len(row) not in (2, 3) or not re.fullmatch(
                    r"\s*[0-9]{1,12}\s*", row[0], re.ASCII
                ):
                    yield LabelRow(fault=f"{where}: expected `id,label` with a whole-number id")
                    continue
                exam_id, label = row[0].strip().lstrip("0") or "0", parse_label(row[1])
                if len(row) == 3:
                    weight = parse_weight(row[2])
                if label is None:
                    fault = f"label {row[1]!r:.40} is not from 0 to 1, or empty"
                elif weight is None:
                    fault = f"weight {row[2]!r:.40} is not a number above 0, at most {MOST_WEIGHT}"
                elif exam_id in seen:
                    fault = f"id {exam_id} is listed twice; keep one row"
                yield (
                    LabelRow(fault=f"{where}: {fault}")
                    if fault
                    else LabelRow(exam_id, label, weight)
                )
                seen.add(exam_id)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = one_line(error)
        yield LabelRow(
            fault=f"{path}: cannot be read as a CSV of `id,label` ({reason}); create it again"
        )


def parse_label(text):
    """A label's text as float: 0 (negative) to 1 (positive), UNKNOWN if empty, None if neither."""
    text = text.strip()
    if not text:
        return UNKNOWN
    if not re.fullmatch(r"[01]|[01]?\.[0-9]+", text, re.ASCII) or float(text) > 1:
        return None
    return float(text)


def parse_weight(text):
    """A label's weight as float, above 0 and at most MOST_WEIGHT; None if it is neither."""
    try:
        weight = float(text)
    except ValueError:
        return None
    return weight if 0 < weight <= MOST_WEIGHT else None


def read_rows(root_dir, task, split):
    """The CSV of one split: list of LabelRow, none with a fault.

    Raises:
        InputError: as `read_labels`.
    """
    root, known = Path(root_dir), tasks(root_dir)
    if task not in known:
        names = [f"{half}-{task}.csv" for half in SPLITS]
        missing = " and ".join(name for name in names if not (root / name).is_file())
        raise InputError(
            f"{root}: no task '{task}' without {missing}; tasks here: {', '.join(known)}"
        )
    rows = []
    for row in label_rows(root, task, split):
        if row.fault:
            raise InputError(row.fault)
        rows.append(row)
    labels = known_labels(rows).values()
    if len({is_positive(label) for label in labels}) < 2:
        raise OneClassOnly(
            f"{root}/{split}-{task}.csv: {len(labels)} exams of one class only; training and AUC "
            "need both 0 and 1"
        )
    return rows


def known_labels(rows):
    """{id: label} of LabelRows, without those that are unknown."""
    return {row.exam_id: row.label for row in rows if not math.isnan(row.label)}


def read_labels(root_dir, task, split):
    """Ids and labels of one split; exams whose label is unknown (empty) are left out.

    Returns:
        ids: list of str without leading zeros, in the order of the file.
        labels: float32 (n,), 0 to 1.

    Raises:
        InputError: folder, task or file missing, a row that is not `id,label`, a label below 0 or
            above 1, an id twice, or one class only (from 0.5 on is positive).
    """
    labels = known_labels(read_rows(root_dir, task, split))
    return list(labels), np.fromiter(labels.values(), np.float32, len(labels))


def is_positive(labels):
    """Whether labels 0 to 1 count as positive where there are two classes only: from 0.5 on."""
    return labels >= 0.5


def read_groups(root_dir, split):
    """{id without leading zeros: group} of <split>-groups.csv, rows of id, group; {} without it.

    Exams of one group (a patient, a scanner) are never split between training and testing.

    Raises:
        InputError: a row that is not `id,group`, or an id twice.
    """
    path, groups = Path(root_dir) / f"{split}-{GROUPS}.csv", {}
    if not path.exists():
        return groups
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.reader(file), start=1):
                if row and (len(row) != 2 or not row[0].strip().isdecimal() or not row[1].strip()):
                    raise InputError(f"{path}, line {number}: expected `id,group`")
                exam_id = row[0].strip().lstrip("0") or "0" if row else None
                if exam_id in groups:
                    raise InputError(f"{path}, line {number}: id {exam_id} is listed twice")
                if row:
                    groups[exam_id] = row[1].strip()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)}); create it again") from None
    return groups


def volume_path(root_dir, split, plane, exam_id):
    """Where an exam's volume lies: ids have no leading zeros in the CSV, files have four digits."""
    return Path(root_dir) / split / plane / f"{int(exam_id):04d}.npy"


def open_volume(path):
    """Memory-map one volume and check its header. Never unpickles.

    Returns:
        read-only array (s, H, W), usually uint8.

    Raises:
        InputError: missing, truncated, pickled or not a .npy, not three-dimensional, empty, or
            smaller than 63 px.
    """
    try:
        volume = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise InputError(f"{path}: no such volume; add it, or remove its id from the CSV") from None
    except Exception as error:  # numpy's header parser raises many kinds
        if getattr(error, "errno", None) == errno.ENOMEM:
            raise MemoryError(str(path)) from None  # the file is not to blame
        empty = Path(path).is_file() and Path(path).stat().st_size == 0
        reason = "it is empty" if empty else one_line(error)
        raise InputError(
            f"{path}: not a whole, plain .npy array ({reason}); copy or convert it again"
        ) from None
    if volume.ndim != 3:
        raise InputError(f"{path}: {volume.ndim} dimensions {volume.shape}; expected (s, H, W)")
    if volume.shape[0] == 0:
        raise InputError(f"{path}: no slices; convert the exam again or leave it out of the CSV")
    if min(volume.shape[1:]) < SMALLEST_SIDE:
        raise InputError(
            f"{path}: slices of {volume.shape[1]} x {volume.shape[2]} px; "
            f"AlexNet needs at least {SMALLEST_SIDE} px, resize them"
        )
    if volume.dtype.kind not in "uif":
        raise InputError(f"{path}: holds {volume.dtype}, expected uint8 grey levels 0 to 255")
    return volume


def read_volume(path):
    """One volume from disk: uint8 array (s, H, W).

    Raises:
        InputError: as `open_volume`, or values that are not whole numbers from 0 to 255.
    """
    try:
        volume = np.array(open_volume(path), order="C")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if volume.dtype != np.uint8:
        grey = np.nan_to_num(volume, nan=-1.0, posinf=-1.0, neginf=-1.0)
        if not ((grey >= 0) & (grey <= 255) & (grey == np.round(grey))).all():
            raise InputError(
                f"{path}: {volume.dtype} values from {volume.min()} to {volume.max()}; "
                "rescale them to whole grey levels 0 to 255 (uint8)"
            )
        volume = volume.astype(np.uint8)
    return volume


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
    """The inverse of `preprocess`: float32 (s, 1, H, W) -> grey levels 0 to 255, up to rounding."""
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

    Attributes:
        labels: float32 (n, tasks), 0 to 1 or UNKNOWN.
        label_weights: float32 (n, tasks), those of the CSV, else 1.
        targets, weights: float32 (n, tasks), what the loss takes: labels and class weights; weight
            and target 0 where the label is unknown.
        channels: in CHANNELS, of the network's input.
        slices: (least, most) part of the slices in a training step, drawn anew for each.
        known: {task: ids of the exams whose label is not empty, in the order of its CSV}.
        unknown: {task: number of exams whose label is empty}.
        listed: Listed, with the exams that have no volume of this plane. Folds are cut on these, so
            that they are the same in every plane.
        absent: number of exams without a volume of this plane. Only where dataset.json says
            "may_lack_planes": true, as importers write it, are such left out; else they are faults.

    Every volume's header is checked here, so that a fault shows before training and not in it.

    Raises:
        InputError: for anything wrong in the folder, one line with the file and how to fix it.
    """

    channels, slices = "grey", (1.0, 1.0)

    def __init__(self, root_dir, task, plane, train=True, transform=None, intensity="standardized"):
        self.root, self.split = Path(root_dir), "train" if train else "valid"
        self.tasks, self.plane = (task,) if isinstance(task, str) else tuple(task), plane
        self.transform, self.intensity = transform, intensity
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
        self.groups = [groups.get(exam_id, f"exam {exam_id}") for exam_id in self.ids]
        self.listed = Listed(self.ids, self.labels, self.groups)
        self.absent = 0
        if (self.description or {}).get("may_lack_planes"):
            self.leave_out_absent()
        trust = [{row.exam_id: row.weight for row in table} for table in tables]
        rows = [[weights.get(exam_id, 1.0) for weights in trust] for exam_id in self.ids]
        self.label_weights = np.array(rows, np.float32)
        if not train:
            known = [known_labels(read_rows(root_dir, task, "train")) for task in self.tasks]
        self.set_class_weights([class_ratio([*labels.values()]) for labels in known])
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
        1; at first negatives/positives, counted on the training labels for both splits.

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
        """A random part of `count` slices in their order, int64 (k,); None for all."""
        least, most = self.slices
        if least == 1:
            return None
        part = least if least == most else least + torch.rand(()).item() * (most - least)
        return torch.randperm(count)[: max(1, round(part * count))].sort().values

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
    def nbytes(self):
        """Bytes that all volumes take as uint8."""
        return sum(math.prod(shape) for shape in self.shapes)

    def cache(self, device, progress=iter):
        """Read all volumes once and keep them as uint8 on `device` ("cpu" is the RAM)."""
        for i, _ in enumerate(progress(self.paths)):
            self.cached[i] = self.volume(i).to(device)

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


def check_side(path, shape, smallest, backbone):
    """Raise InputError where a volume's slices are smaller than a backbone needs.

    Args:
        shape: (s, H, W) of the volume at `path`.
        smallest: px.
    """
    if min(shape[1:]) < smallest:
        raise InputError(
            f"{path}: slices of {shape[1]} x {shape[2]} px; {backbone} needs at least {smallest} "
            "px, resize them or take another --backbone"
        )


def class_ratio(labels):
    """Negatives by positives, the class weight of positives; labels (n,), 0 to 1."""
    positive = float(np.asarray(labels, np.float32).sum(dtype=np.float64))
    return (len(labels) - positive) / positive


def label_text(labels):
    """The labels of one exam (tasks,) for a fingerprint: "1", "0.7", "0;nan;1"."""
    return ";".join(f"{label:g}" for label in labels)


class MultiPlaneDataset(MRDataset):
    """The exams of several planes together: everything by plane, {plane: ...}, where MRDataset has
    it of one.

    Args:
        plane: list of planes; an exam may lack some of them (`lacking`).
        transform: {plane: transform}, or None.

    Attributes:
        plane_dropout: probability of leaving a plane out of a training step; one always stays.
        taken: the planes that are evaluated; None for all of `plane`.
    """

    plane_dropout, taken = 0.0, None

    def find(self, exam_id):
        paths = {p: volume_path(self.root, self.split, p, exam_id) for p in self.plane}
        there = {plane: path for plane, path in paths.items() if path.exists()}
        return there or paths  # of which the first is then named as missing

    def has_volume(self, exam_id):
        return any(path.exists() for path in self.find(exam_id).values())

    def read_shape(self, path):
        return {plane: open_volume(one).shape for plane, one in path.items()}

    def read(self, path):
        return {plane: torch.from_numpy(read_volume(one)) for plane, one in path.items()}

    def digest(self, volume):
        return "+".join(super(MultiPlaneDataset, self).digest(one) for one in volume.values())

    @property
    def lacking(self):
        """Paths of the volumes that exams lack."""
        return [
            volume_path(self.root, self.split, plane, exam_id)
            for exam_id, paths in zip(self.ids, self.paths, strict=True)
            for plane in self.plane
            if plane not in paths
        ]

    def check_sides(self, smallest, backbone):
        for paths, shapes in zip(self.paths, self.shapes, strict=True):
            for plane, path in paths.items():
                check_side(path, shapes[plane], smallest, backbone)

    @property
    def slice_counts(self):
        return [sum(shape[0] for shape in shapes.values()) for shapes in self.shapes]

    @property
    def nbytes(self):
        return sum(math.prod(shape) for shapes in self.shapes for shape in shapes.values())

    def cache(self, device, progress=iter):
        for i, _ in enumerate(progress(self.paths)):
            self.cached[i] = {p: volume.to(device) for p, volume in self.volume(i).items()}

    def draw(self, rows, device=None):
        """Random views of some exams, each plane with its own: list of {plane: View}."""
        drawn = {
            plane: transform.draw(len(rows))
            for plane, transform in (self.transform or {}).items()
            if transform is not None
        }
        slices = [
            {p: self.draw_slices(self.shapes[i][p][0]) for p in self.draw_planes([*self.shapes[i]])}
            for i in rows
        ]
        views = [{} for _ in rows]
        for plane in self.plane:
            here = [k for k in range(len(rows)) if plane in slices[k]]
            transform = (self.transform or {}).get(plane)
            own = [drawn[plane][k] if plane in drawn else None for k in here]
            moved = views_on(device, transform, own, [slices[k][plane] for k in here])
            for k, view in zip(here, moved, strict=True):
                views[k][plane] = view
        return views

    def draw_planes(self, planes):
        """The planes of an exam less those that plane dropout takes; one stays."""
        if self.plane_dropout == 0:
            return planes
        u = torch.rand(len(planes))
        kept = [p for p, one in zip(planes, u.tolist(), strict=True) if one >= self.plane_dropout]
        return kept or [planes[int(u.argmax())]]

    def prepare(self, volume, device=None, view=None):
        """{plane: float32 (s, 1 or 3, H, W)}; planes that `view` leaves out are left out."""
        if view is None:
            view = dict.fromkeys(p for p in volume if p in (self.taken or self.plane))
        return {
            plane: self.prepare_plane(
                volume[plane].to(device, non_blocking=True),
                (self.transform or {}).get(plane),
                view[plane],
            )
            for plane in view
        }
