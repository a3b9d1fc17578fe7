"""What the exams of a data folder are: dataset.json, or what is known of MRNet, which has none;
and which labels are the set's own: own-labels.csv."""

import csv
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

from mrnet.documents import check, parse_json
from mrnet.errors import InputError, one_line
from mrnet.files import open_regular, read_text
from mrnet.layout.labels import OWN_LABELS, exam_number
from mrnet.layout.planes import ORIENTATION

MRNET = {
    "name": "MRNet",
    "version": "1.0",
    "synthetic": False,
    "source": "https://stanfordmlgroup.github.io/competitions/mrnet",
    "licence": "Stanford's research use agreement: not to be passed on",
    "orientation": ORIENTATION,
    # Its networks were of "sagittal T2, coronal T1, and axial PD" series (Bien et al. 2018).
    "t1_planes": ["coronal"],
}
MRNET_IDS = {"train": range(1130), "valid": range(1130, 1250)}


def is_mrnet(root):
    """Whether a folder holds MRNet as Stanford publishes it, by the exams that its labels name."""
    for split, ids in MRNET_IDS.items():
        for task in ("abnormal", "acl", "meniscus"):
            try:
                with open_regular(
                    root / f"{split}-{task}.csv", "r", newline="", encoding="utf-8-sig"
                ) as file:
                    found = [exam_number(row[0]) for row in csv.reader(file)]
            except (OSError, ValueError, LookupError, csv.Error):
                return False
            if found != list(ids):
                return False
    return True


class Dataset(TypedDict):
    """What a dataset.json says, perhaps among more; a model that learned from it repeats it."""

    name: str
    version: str
    synthetic: bool
    orientation: dict[str, str] | None  # {plane: where slices, rows and columns grow to}
    t1_planes: NotRequired[list[Literal[tuple(ORIENTATION)]] | None]  # the others: fluid-sensitive
    mirrored: NotRequired[bool | None]  # right knees are
    field_of_view: NotRequired[float | None]  # in mm
    square: NotRequired[Literal["pad", "crop"] | None]


def read_dataset(root_dir):
    """What the exams of a data folder are: its dataset.json as a dict; where there is none MRNET if
    they are MRNet's, else None.

    Returns:
        Dataset

    Raises:
        InputError: the file is damaged or lacks a key of Dataset.
    """
    path = Path(root_dir) / "dataset.json"
    try:
        check(Dataset, content := parse_json(read_text(path)), is_open=True)
    except FileNotFoundError:
        return dict(MRNET) if is_mrnet(path.parent) else None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: not a description of a data set ({one_line(error)}); create it again, see "
            "data/README.md, or move it away"
        ) from None
    return content


def contrast(dataset, plane):
    """Of which series a plane of MRNet's is: "T1" or "fluid-sensitive"; `dataset` as read."""
    return "T1" if plane in (dataset.get("t1_planes") or ()) else "fluid-sensitive"


def read_own_labels(data_dir):
    """{task: ids of the exams whose label is the set's own}, or None where all labels are alike.

    Raises:
        InputError: damaged.
    """
    path, own = Path(data_dir) / OWN_LABELS, {}
    try:
        with open_regular(path, "r", newline="", encoding="utf-8") as file:
            for exam_id, task in csv.reader(file):
                own.setdefault(task, set()).add(str(exam_number(exam_id)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, csv.Error):
        raise InputError(f"{path}: not a CSV of id,task; run data/rsna/prepare.py again") from None
    return own


def describe_dataset(dataset):
    """A data set in a few words; `dataset` as `description.read_dataset` returns it, or None."""
    if dataset is None:
        return "unknown (no dataset.json)"
    words = one_line(f"{dataset['name']}, version {dataset['version']}")
    return words + (", SYNTHETIC exams" if dataset["synthetic"] else "")


def describe_datasets(datasets):
    """Each in a few words, [str]; networks without any have one that is unknown."""
    return [describe_dataset(dataset) for dataset in datasets or [None]]
