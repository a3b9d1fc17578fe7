"""Check a whole data set before training on it: every fault at once, each with how to fix it.

    python -m tools.check data                     # about 10 s for MRNet, from memory
    python -m tools.check data/mine --workers 8

Reads every label and every volume of a folder in MRNet's layout, in parallel, and prints all that
is wrong: volumes missing, truncated, pickled, of a wrong type or shape, without contrast; labels
that are not from 0 to 1, ids twice, in both splits or not in every plane; a patient in both splits
(<split>-groups.csv); the same volume under two ids, which leaks training exams into
validation. Then the class counts. Exit status 0, or 2 with faults.
"""

import hashlib
import math
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it finds its own folder only

from mrnet.errors import InputError, counted
from mrnet.layout.description import read_dataset
from mrnet.layout.labels import GROUPS, compare_groups, is_positive, label_rows, read_groups, tasks
from mrnet.layout.planes import ALL_PLANES, PLANES, SPLITS, describe_missing, in_order
from mrnet.layout.volumes import read_volume, volume_path
from mrnet.runtime import cli
from mrnet.runtime.machine import usable_cores


class Volume(NamedTuple):
    """Result of reading one volume; `fault` is one line or None."""

    split: str
    plane: str
    exam_id: str
    path: Path
    fault: str | None = None
    shape: tuple = ()
    digest: bytes = b""


def parse_arguments():
    parser = cli.make_parser(__doc__)
    parser.add_argument("data", type=Path, help="data folder in MRNet's layout")
    parser.add_argument(
        "--workers",
        type=cli.process_count,
        default=usable_cores(),
        help="volumes read at a time; more help where the disk is far away",
    )
    return parser.parse_args()


def check_labels(root):
    """Read all CSVs.

    Returns:
        {task: {split: {id: label}}}, and faults as lines of text.
    """
    labels, faults = {}, []
    for split, other in (SPLITS, SPLITS[::-1]):
        for path in sorted(set(root.glob(f"{split}-*.csv")) - {root / f"{split}-{GROUPS}.csv"}):
            pair = root / f"{other}-{path.name.removeprefix(f'{split}-')}"
            if not pair.is_file():
                faults.append(f"{path}: there is no {pair.name}; a task needs both")
    for task in tasks(root):
        labels[task], one_class = {}, []
        for split in SPLITS:
            found = {}
            for row in label_rows(root, task, split):
                if row.fault:
                    faults.append(row.fault)
                else:
                    found[row.exam_id] = row.label
            labels[task][split] = found
            known = [label for label in found.values() if not math.isnan(label)]
            if len({is_positive(label) for label in known}) < 2:
                one_class.append(
                    f"{root}/{split}-{task}.csv: {counted(len(known), 'exam')} of one class only; "
                    "training and AUC need both 0 and 1"
                )
        if any(not math.isnan(x) for split in SPLITS for x in labels[task][split].values()):
            faults += one_class  # else nobody has read the exams for it, and all labels are empty
        both = sorted(labels[task]["train"].keys() & labels[task]["valid"].keys(), key=int)
        if both:
            faults.append(
                f"{root}/valid-{task}.csv: {counted(len(both), 'id')} also in train-{task}.csv "
                f"({shorten(both)}); the splits must not share exams"
            )
    for split in SPLITS:
        listed = {task: set(labels[task][split]) for task in labels}
        everywhere = set.union(*listed.values())
        for task, ids in listed.items():
            if ids != everywhere:
                lacking = sorted(everywhere - ids, key=int)
                faults.append(
                    f"{root}/{split}-{task}.csv: lacks {counted(len(lacking), 'id')} that other "
                    f"tasks have ({shorten(lacking)}); add their labels"
                )
    return labels, faults


def check_groups(root, labels):
    """The groups of exams.

    Returns:
        faults: a damaged file, one that names none of the exams, or a patient (or scanner) in both
        splits; and notes, of exams without a group.
    """
    faults, notes, found = [], [], {split: set() for split in SPLITS}
    for split in SPLITS:
        ids = sorted(set().union(*(splits[split] for splits in labels.values())), key=int)
        try:
            groups = read_groups(root, split)
            found[split] = set(groups.values())
            notes.append(compare_groups(root, split, groups, ids))
        except InputError as error:
            faults.append(str(error))
    if both := sorted(found["train"] & found["valid"]):
        are = "group is" if len(both) == 1 else "groups are"
        faults.append(
            f"{root}/valid-{GROUPS}.csv: {len(both)} {are} in both splits ({shorten(both)}); "
            "LEAKS training exams into validation, give all exams of a group to one split"
        )
    return faults, [note for note in notes if note]


def check_volume(place):
    """Read one volume whole: Volume."""
    split, plane, exam_id, path = place
    try:
        volume = read_volume(path)
    except InputError as error:
        return Volume(*place, fault=str(error))
    if volume.min() == volume.max():
        fault = f"{path}: every voxel is {volume.min()}; export the exam again or leave it out"
        return Volume(*place, fault=fault)
    return Volume(*place, shape=volume.shape, digest=hashlib.blake2b(volume).digest())


def find_volumes(root, labels, may_lack):
    """Every volume that lies in the folder or should: list of (split, plane, id, path), faults.

    Args:
        may_lack: whether an exam may lack planes, though not all.
    """
    places, faults = [], []
    # A set of one plane, as KneeMRI, is sound; a plane that some exams lack is not.
    present = [p for p in ALL_PLANES if any((root / split / p).is_dir() for split in SPLITS)]
    if not present:
        faults.append(f"{root}: no folder train/axial, train/coronal or train/sagittal")
    for split in SPLITS:
        listed = set().union(*(ids[split] for ids in labels.values()))
        planes_of = defaultdict(set)
        for plane in present:
            folder = root / split / plane
            if not folder.is_dir():
                faults.append(
                    f"{folder}: no such folder, {plane} exams lie in the other split only"
                )
                continue
            files = {path.stem: path for path in sorted(folder.glob("*.npy"))}
            expected = {volume_path(root, split, plane, i).stem: i for i in listed}
            for stem in sorted(files.keys() - expected.keys()):
                faults.append(
                    f"{files[stem]}: its id is in no {split} CSV; add its label, or move it away"
                )
            for stem, exam_id in sorted(expected.items()):
                if stem in files:
                    planes_of[exam_id].add(plane)
                    places.append((split, plane, exam_id, files[stem]))
        for exam_id in sorted(listed, key=int):
            lacking = [plane for plane in present if plane not in planes_of[exam_id]]
            if lacking and not (may_lack and planes_of[exam_id]):
                path = volume_path(root, split, lacking[0], exam_id)
                missing = describe_missing(exam_id, lacking, planes_of[exam_id])
                faults.append(
                    f"{missing}, no such volume: {path}; add it, or take its id out of the CSVs"
                )
    return places, faults


def check_copies(volumes):
    """Faults of volumes that are equal, voxel by voxel, under two ids."""
    same = defaultdict(list)
    for one in volumes:
        if one.digest:
            same[one.plane, one.shape, one.digest].append(one)
    faults = []
    for copies in same.values():
        if len(copies) > 1:
            first, *others = sorted(copies, key=lambda one: one.path)
            leak = len({one.split for one in copies}) > 1
            faults.append(
                f"{first.path}: the same voxels as {shorten([str(o.path) for o in others])}; "
                + ("LEAKS training exams into validation, " if leak else "")
                + "keep one of them"
            )
    return faults


def shorten(names):
    """The first three names, and how many more there are."""
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")


def check(root, workers):
    """Read everything.

    Returns:
        {task: {split: {id: label}}}, list of Volume, and faults and notes as lines of text.
    """
    labels, faults = check_labels(root)
    try:
        may_lack = bool((read_dataset(root) or {}).get("may_lack_planes"))
    except InputError as error:
        may_lack, faults = False, [*faults, str(error)]
    places, lacking = find_volumes(root, labels, may_lack)
    with ThreadPoolExecutor(workers) as pool:  # NumPy and hashlib work outside Python's lock
        read = pool.map(check_volume, places)
        volumes = list(cli.progress(read, "reading", total=len(places)))
    of_groups, notes = check_groups(root, labels)
    faults += [*of_groups, *lacking, *(one.fault for one in volumes if one.fault)]
    return labels, volumes, faults + check_copies(volumes), notes


def class_counts(labels):
    """Rows of a table, one for each task and split: exams with a known label, positives (from 0.5
    on), exams with an unknown label, exams with one between 0 and 1."""
    rows = []
    for task, splits in labels.items():
        for split, ids in splits.items():
            known = [label for label in ids.values() if not math.isnan(label)]
            positive = sum(map(is_positive, known))
            share = f"{100 * positive / max(len(known), 1):.0f} %"
            row = {"task": task, "split": split, "exams": len(known), "positive": positive}
            soft = sum(label not in (0, 1) for label in known)
            rows.append(row | {"share": share, "unknown": len(ids) - len(known), "soft": soft})
    return rows


def volume_counts(volumes):
    """Rows of a table: number, slices and sizes of the volumes of each plane and split."""
    rows = []
    for plane in in_order({*PLANES, *(volume.plane for volume in volumes)}):
        for split in SPLITS:
            shapes = [v.shape for v in volumes if (v.plane, v.split) == (plane, split) and v.shape]
            slices = [shape[0] for shape in shapes] or [0]
            sizes = Counter(f"{shape[1]}x{shape[2]}" for shape in shapes).most_common()
            names = [f"{size} ({n})" if len(sizes) > 1 else size for size, n in sizes]
            row = {"plane": plane, "split": split, "volumes": len(shapes)}
            row |= {"slices": f"{min(slices)} to {max(slices)}", "size": shorten(names)}
            rows.append(row)
    return rows


def run(args):
    """Print every fault, then the class counts and shapes."""
    labels, volumes, faults, notes = check(args.data, args.workers)
    print(*faults, *(f"note: {note}" for note in notes), sep="\n")
    print("\n" + tabulate(class_counts(labels), headers="keys"))
    print("\n" + tabulate(volume_counts(volumes), headers="keys"))
    if faults:
        raise InputError(f"{args.data}: {counted(len(faults), 'fault')}, printed above")
    print("\nno faults")


if __name__ == "__main__":
    cli.exit_with_status(lambda: run(parse_arguments()))
