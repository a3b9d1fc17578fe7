"""The data sets that a training's configuration asks for."""

import math
import shlex
from pathlib import Path

import torch

from dataloader import MRDataset, views_on
from mrnet.errors import InputError, counted
from mrnet.layout.description import describe_dataset, read_dataset
from mrnet.layout.labels import is_positive, trainable
from mrnet.layout.planes import SPLITS, describe_missing, in_order, planes_of, view_of
from mrnet.layout.volumes import check_side, open_volume, read_volume, volume_path
from mrnet.networks.backbones import BACKBONES, GPU_SHARE, MOST_ACTIVATIONS
from mrnet.runtime.machine import available_memory
from mrnet.training.augmentation import SLICES_OF_STRONG, make_augmentation

CACHES = ("auto", "device", "disk")
DEVICE_ROOM = 2e9  # least bytes to leave free beside volumes: a training step on the largest exam


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
    for exams in sets:
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
    least, most = (SLICES_OF_STRONG if config.augment == "strong" else 1.0), config.slices
    settings = {"intensity": config.intensity, "channels": config.channels,
                "slices": (least * most, most), "is_weighted": config.class_weights}  # fmt: skip
    transforms = None
    if train:
        orientation = (read_dataset(data_dir) or {}).get("orientation") or {}
        transforms = {
            plane: make_augmentation(config.augment, plane, orientation.get(view_of(plane)))
            for plane in config.planes
        }
    if len(config.planes) > 1:
        settings |= {"transform": transforms, "plane_dropout": config.plane_dropout}
        return MultiPlaneDataset(data_dir, config.tasks, config.planes, train, **settings)
    settings["transform"] = transforms and transforms[config.plane]
    return MRDataset(data_dir, config.tasks, config.plane, train, **settings)


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


def cache_volumes(data_sets, where, device, progress=iter):
    """Keep the volumes of all data sets on a GPU that has room, and print whether they are there.

    Elsewhere each is read again in every epoch: from the page cache of the operating system, which
    all processes share, as fast as from memory of its own (docs/speed.md).

    Args:
        data_sets: list of MRDataset.
        where: "device", "disk", or "auto" for the first of these with room.
        progress: wraps the iteration over a data set's volumes.

    Returns:
        "device" or "disk".

    Raises:
        InputError: no room.
    """
    needed, room = sum(exams.nbytes for exams in data_sets), 0
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        room = free - max(DEVICE_ROOM, 1.5 * GPU_SHARE * total)
    elif device.type == "mps":  # the machine's own memory
        room = available_memory() - max(DEVICE_ROOM, 4 * MOST_ACTIVATIONS)
    if where == "auto" or device.type == "cpu":
        where = "device" if needed <= room else "disk"
    if where == "device":
        if needed > room:
            raise InputError(
                f"--cache device: {needed / 1e9:.1f} GB of volumes, room for "
                f"{max(room, 0) / 1e9:.1f} GB; use --cache disk (or auto)"
            )
        for exams in data_sets:
            exams.cache(device, progress)
    print(f"cache      {where} ({needed / 1e9:.2f} GB of volumes)")
    return where


class MultiPlaneDataset(MRDataset):
    """The exams of several planes together: everything by plane, {plane: ...}, where MRDataset has
    it of one.

    Args:
        plane: list of planes; an exam may lack some of them.
        transform: {plane: transform}, or None.

        plane_dropout: probability of leaving a plane out of a training step; one always stays.

    Attributes:
        taken: the planes that are evaluated, at first all of `plane`.
    """

    def __init__(self, root_dir, task, plane, train=True, *, plane_dropout=0.0, **settings):
        super().__init__(root_dir, task, list(plane), train, **settings)
        self.plane_dropout = plane_dropout

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

    def check_sides(self, smallest, backbone):
        for paths, shapes in zip(self.paths, self.shapes, strict=True):
            for plane, path in paths.items():
                check_side(path, shapes[plane], smallest, backbone)

    @property
    def slice_counts(self):
        return [sum(shape[0] for shape in shapes.values()) for shapes in self.shapes]

    @property
    def slice_ranges(self):
        counts = {p: [shapes[p][0] for shapes in self.shapes if p in shapes] for p in self.plane}
        return {plane: [min(found), max(found)] for plane, found in counts.items() if found}

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
            view = dict.fromkeys(p for p in volume if p in self.taken)
        return {
            plane: self.prepare_plane(
                volume[plane].to(device, non_blocking=True),
                (self.transform or {}).get(plane),
                view[plane],
            )
            for plane in view
        }
