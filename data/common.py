"""What the importers (data/<source>/prepare.py) share.

The table of plane orientations, grey levels and sizes, dataset.json, and the register that gives
each exam its number and each patient a group.
"""

import argparse
import csv
import hashlib
import hmac
import io
import json
import math
import os
import secrets
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from common.errors import InputError
from common.files import open_regular, read_bytes, read_text, write_bytes, write_csv, write_text
from common.labels import exam_number, is_exam_number

# Per plane (patient axis 0 x, 1 y, 2 z; sign) along which slices, rows and columns grow, as in
# MRNet. x grows to the patient's left, y to posterior, z to superior (LPS; PS3.3 C.7.6.2.1.1).
TARGET = {
    "axial": ((2, -1), (1, 1), (0, 1)),
    "coronal": ((1, 1), (2, -1), (0, 1)),
    "sagittal": ((0, 1), (2, -1), (1, 1)),
}
LETTERS = {(0, 1): "L", (0, -1): "R", (1, 1): "P", (1, -1): "A", (2, 1): "S", (2, -1): "I"}
# The same as letters, where slices, rows and columns grow to: {"axial": "IPL", ...}.
ORIENTATION = {
    plane: "".join(LETTERS[direction] for direction in target) for plane, target in TARGET.items()
}
T1_PLANES = ("coronal-t1", "sagittal-t1")  # of series that are not fluid-sensitive
DATASET, EXAMS = "dataset.json", "exams.csv"
OWN_LABELS = "own-labels.csv"  # rows of id, task: labels of the set itself, beside derived ones
SPLITS = ("train", "valid", "test")
UNFINISHED = ".unfinished"  # folder of a file for each exam that is being written
KEY_BYTES = 32
SIDE = 256  # px; MRNet's slices
FIELDS_OF_VIEW = (20.0, 500.0)  # mm
NEAREST = 2**15
LEVELS = 2**17  # whole numbers up to this range are counted
WINDOW = (0.5, 99.5)  # percentiles of a volume that become 0 and 255


# --- files ----------------------------------------------------------------------------------------


def write_volume(path, volume):
    """Array -> .npy file, without pickle."""
    data = io.BytesIO()  # written directly to a file, NumPy hides why a write failed
    np.save(data, volume, allow_pickle=False)
    write_bytes(path, data.getvalue())


@contextmanager
def whole_exam(out, number, paths):
    """Within it the volumes of an exam are written: all of them stay, or none.

    An exam without some of its planes must not look like a whole one. What is left of a process
    that was killed here goes with `Register.clear`.

    Args:
        out: data folder.
        paths: of all volumes that the exam may have.
    """
    mark = out / UNFINISHED / f"{number:04d}"
    write_bytes(mark, b"")
    try:
        yield
    except BaseException:
        for path in paths:
            path.unlink(missing_ok=True)
        mark.unlink()
        raise
    mark.unlink()


def write_planes(folder, number, planes, volumes):
    """Write OUT/SPLIT/<plane>/<number>.npy, all of them or none (`whole_exam`).

    Args:
        folder: OUT/SPLIT.
        planes: that the exam may have; one without a volume loses what an earlier run left.
        volumes: {plane: uint8 (s, H, W)}.
    """
    paths = {plane: folder / plane / f"{number:04d}.npy" for plane in planes}
    with whole_exam(folder.parent, number, paths.values()):
        for plane, path in paths.items():
            if plane in volumes:
                write_volume(path, volumes[plane])
            else:
                path.unlink(missing_ok=True)


# --- pixels ---------------------------------------------------------------------------------------


def percentiles(grey, wanted):
    """`np.percentile`, its very numbers; of whole numbers, as nearly all scans are, by counting
    them: 3.6 times as fast.

    Args:
        grey: float32, finite.
        wanted: percentages.
    """
    low, high = float(grey.min()), float(grey.max())
    if not (low.is_integer() and high - low < LEVELS):
        return np.percentile(grey, wanted)
    counts = np.zeros(int(high - low) + 1, np.int64)
    for image in grey.reshape(len(grey), -1):  # a slice stays in the processor's cache
        levels = (image - np.float32(low)).astype(np.intp)
        if not np.array_equal(levels + low, image):
            return np.percentile(grey, wanted)
        counts += np.bincount(levels, minlength=len(counts))
    below = counts.cumsum()
    places = np.asarray(wanted) / 100 * (grey.size - 1)
    found = []
    for place in places:
        pair = np.searchsorted(below, [np.floor(place), np.ceil(place)], side="right")
        pair = (pair + low).astype(np.float32)
        found.append(np.quantile(pair, place - np.floor(place)))
    return np.array(found)


def window(grey, file):
    """Any float32 array -> 0..255 between the WINDOW percentiles, in place.

    Raises:
        InputError: every pixel has the same value.
    """
    finite = np.isfinite(grey)
    if not finite.all():
        grey[~finite] = grey[finite].min() if finite.any() else 0
    low, high = percentiles(grey, WINDOW)
    if not high > low:
        low, high = float(grey.min()), float(grey.max())
    # float32 has no grey levels between numbers that are so near to each other
    if not max(abs(low), abs(high)) / NEAREST < high - low < math.inf:
        raise InputError(f"{file}: every pixel has the same value; export or unpack it again")
    np.subtract(grey, low, out=grey)
    np.multiply(grey, 255 / (high - low), out=grey)
    return np.clip(grey, 0, 255, out=grey)


def square_grid(height, width, square="pad", field_of_view=None):
    """How `to_square` lays a slice on its square; arguments as there.

    Returns:
        Rows and columns that the whole slice is resampled to, and which of them are the square's
        first row and column: below 0 where the slice is smaller and gets a margin.
    """
    pixel = (field_of_view or (max if square == "pad" else min)(height, width)) / SIDE
    height, width = max(1, round(height / pixel)), max(1, round(width / pixel))
    return height, width, (height - SIDE) // 2, (width - SIDE) // 2


def to_square(grey, height, width, square="pad", field_of_view=None):
    """Slices with square pixels on a square: float32 (s, H, W) 0..255 -> uint8 (s, SIDE, SIDE).

    Args:
        height, width: of a slice, in mm or any other unit.
        square: "pad" keeps all of the slices' longer side, "crop" all of the shorter.
        field_of_view: side of what is kept, in the unit of `height`, instead: a pixel is then the
            same size in every exam.
    """
    height, width, top, left = square_grid(height, width, square, field_of_view)
    inside = (slice(max(0, top), top + SIDE), slice(max(0, left), left + SIDE))
    out = np.zeros((len(grey), SIDE, SIDE), np.uint8)
    for image, to in zip(grey, out, strict=True):
        image = Image.fromarray(np.ascontiguousarray(image))
        image = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))[inside]
        y, x = max(0, -top), max(0, -left)
        to[y : y + image.shape[0], x : x + image.shape[1]] = np.rint(image)
    return out


# --- dataset.json ---------------------------------------------------------------------------------


def write_dataset(out, written=None, report=None, **content):
    """Write OUT/dataset.json: what the exams are, which a model that learns from them repeats.

    Args:
        written: numbers of the exams that this run converts, None for all. Where others stay, the
            version is theirs and this one, "2, 3", and `report` warns.
        content: name, version, synthetic (bool), source, licence, and orientation: ORIENTATION, or
            None where it is not known. The name and the licence that the file has already stay:
            its owner may have written better ones.

    Raises:
        InputError: the folder holds exams of another kind, which must not be mixed with these.
    """
    path = out / DATASET
    there = {}
    if path.exists():
        try:
            there = dict(json.loads(read_text(path)))
        except (OSError, ValueError, TypeError):
            raise InputError(
                f"{path}: cannot be read as JSON; correct it or move it away"
            ) from None
    for name in ("synthetic", "orientation", "patient_key", "mirrored", "field_of_view", "square",
                 "t1", "t1_planes"):  # fmt: skip
        if there and (there.get(name) or None) != (content.get(name) or None):
            raise InputError(
                f"{path}: the folder holds exams with {name} {there.get(name)}, these have "
                f"{content.get(name)}; give a folder of its own to them"
            )
    content |= {name: there[name] for name in ("name", "licence") if there.get(name)}
    if there and written is not None and set(numbers_in(out)) - set(written):
        versions = str(there.get("version") or "?").split(", ")
        versions += [content["version"]] if written else []
        content["version"] = ", ".join(dict.fromkeys(versions))
        if len(set(versions)) > 1:
            report.warn(
                f"{out}: holds exams of several versions of the importer now "
                f"({content['version']}), whose pixels may differ; --overwrite converts all again"
            )
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_text(path, text)


# --- exams, their numbers and groups --------------------------------------------------------------


def patient_key():
    """This user's secret for hashing patient numbers, made when first needed.

    Patient numbers are short: without a secret anybody could try them all against their hashes.

    Raises:
        InputError: it can be neither read nor made.
    """
    path = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "mrnet" / "key"
    try:
        if not path.exists():
            write_bytes(path, secrets.token_bytes(KEY_BYTES), mode=0o600)
        key = read_bytes(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; patient numbers are hashed with it") from None
    if len(key) != KEY_BYTES:
        raise InputError(f"{path}: not a key of {KEY_BYTES} bytes; delete it to have a new one")
    return key


def exam_name(uid, side=""):
    """16 hex digits of the study UID's SHA-256, and the knee's side."""
    return hashlib.sha256(uid.encode()).hexdigest()[:16] + (f"-{side}" if side else "")


def keyed_hash(key, text):
    """HMAC-SHA-256, 16 hex digits: without the key nobody can test a guess; "" for ""."""
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()[:16] if text else ""


class Register:
    """OUT/exams.csv, rows of id, exam, patient_hash: an exam keeps its number in every later run.

    `exam` is the exam's stable name; the hash is keyed, and empty where the patient is not known.

    Raises:
        InputError: the file is damaged, or of an earlier version.
    """

    HEAD = ["id", "exam", "patient_hash"]

    def __init__(self, out):
        self.out, self.path = out, out / EXAMS
        self.rows = {}  # exam -> (number, patient)
        if self.path.exists():
            try:
                with open_regular(self.path, "r", newline="", encoding="utf-8") as file:
                    head, *rows = csv.reader(file)
                    if head != self.HEAD:
                        raise ValueError
                    self.rows = {
                        exam: (exam_number(number), patient) for number, exam, patient in rows
                    }
            except (OSError, ValueError, csv.Error):
                raise InputError(
                    f"{self.path}: not a CSV of {','.join(self.HEAD)}, or of an earlier version; "
                    "restore it, or import all exams into a new folder"
                ) from None
        taken = [number for number, _ in self.rows.values()]
        self.next = 1 + max([-1, *taken, *numbers_in(out)])

    def number(self, exam, patient=""):
        """The exam's number: the one it has, else the next after the folder's highest. A patient
        that is known now takes the place of what an earlier run knew."""
        number, before = self.rows.get(exam, (self.next, ""))
        self.rows[exam] = number, patient or before
        self.next = max(self.next, number + 1)
        return number

    def clear(self, report):
        """Delete the volumes of the exams that a killed process left unfinished, say so, and
        delete what told which they are."""
        folder = self.out / UNFINISHED
        marks = sorted(folder.iterdir()) if folder.is_dir() else []
        for mark in marks:
            if not is_exam_number(mark.name):
                raise InputError(
                    f"{mark}: not the number of an exam; nothing is deleted, remove it"
                )
        for mark in marks:
            for path in self.out.glob(f"*/*/{mark.name}.npy"):
                path.unlink()
            mark.unlink()
            report.log(f"exam {mark.name} was left unfinished and is deleted; import it again")
        if folder.is_dir():
            folder.rmdir()

    def split_of(self, number):
        """The split that has a volume under this number, or None."""
        found = (split for split in SPLITS if any(self.out.glob(f"{split}/*/{number:04d}.npy")))
        return next(found, None)

    def save(self):
        rows = sorted((number, exam, patient) for exam, (number, patient) in self.rows.items())
        write_csv(self.path, [self.HEAD, *rows])

    def groups(self):
        """{exam's number: running number of its patient}; an unknown patient is its study's."""
        running, groups = {}, {}
        for number, exam, patient in sorted((n, exam, p) for exam, (n, p) in self.rows.items()):
            study = exam.partition("-")[0]  # of both knees (`exam_name`)
            groups[number] = running.setdefault(patient or ("study", study), len(running))
        return groups


def numbers_in(out):
    """Numbers of all exams that a data folder has volumes or labels of, in any split."""
    for split in SPLITS:
        for path in out.glob(f"{split}/*/*.npy"):
            if is_exam_number(path.stem):
                yield int(path.stem)
        for path in out.glob(f"{split}-*.csv"):
            for line in read_text(path, errors="replace").splitlines():
                number = line.partition(",")[0].strip()
                if is_exam_number(number):
                    yield int(number)


def merge_csv(path, values):
    """Merge {exam's number: value} into a CSV of `id,value`.

    Raises:
        InputError: `path` exists and is no such CSV.
    """
    rows = {}
    if path.exists():
        try:
            with open_regular(path, "r", newline="", encoding="utf-8") as file:
                rows = {
                    exam_number(number): value for number, value in filter(None, csv.reader(file))
                }
        except (OSError, ValueError, csv.Error):
            raise InputError(f"{path}: not a CSV of two columns with ids; move it away") from None
    write_csv(path, sorted((rows | values).items()))


# --- arguments ------------------------------------------------------------------------------------


def add_preparation(group, mirror=False):
    """--field-of-view, --t1-plane, --t1 and --mirror, the same for every importer of DICOM."""
    group.add_argument(
        "--field-of-view",
        type=millimetres,
        metavar="MM",
        help="keep a centred square of this side, so that a pixel has the same size in every "
        "scanner, such as 140; smaller pictures get a black margin. Default: the whole picture",
    )
    group.add_argument(
        "--t1-plane",
        action="append",
        default=[],
        choices=list(TARGET),
        metavar="PLANE",
        help="take T1 series for this plane, not fluid-sensitive ones, for networks that learnt "
        "from such: MRNet's coronal series are T1 (Bien et al. 2018); may be repeated",
    )
    t1 = "also the best series that are not fluid-sensitive, as planes coronal-t1 and sagittal-t1"
    group.add_argument("--t1", action="store_true", help=t1)
    group.add_argument(
        "--mirror",
        action=argparse.BooleanOptionalAction,
        default=mirror,
        help="mirror right knees to left ones",
    )


def millimetres(text):
    """A field of view's side as argparse takes it."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not FIELDS_OF_VIEW[0] <= value <= FIELDS_OF_VIEW[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of mm from 20 to 500")
    return value


# --- messages ------------------------------------------------------------------------------------


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults shown, the epilog's lines kept."""


def make_parser(docstring, more="", kind=argparse.ArgumentParser):
    """An importer's parser: its help begins with the docstring's first line and ends with the rest.

    Args:
        more: text after that.
        kind: class of the parser.
    """
    description, _, epilog = docstring.partition("\n\n")
    return kind(description=description, epilog=epilog + more, formatter_class=Formatter)


class Report:
    """Prints messages without breaking the progress bar, and counts failures.

    Args:
        collect: keep the lines for `take` instead of printing them.
    """

    def __init__(self, collect=False):
        self.failures, self.lines = 0, [] if collect else None

    def log(self, text, stream=None):
        # descriptions and file names may hold control characters and any script
        text = "".join(c if c.isprintable() else "?" for c in text)
        if self.lines is not None:
            self.lines.append(["stderr" if stream is sys.stderr else "stdout", text])
            return
        stream = stream or sys.stdout
        encoding = getattr(stream, "encoding", None) or "utf-8"
        tqdm.write(text.encode(encoding, "replace").decode(encoding), file=stream)

    def warn(self, text):
        self.log(f"warning: {text}", sys.stderr)

    def fault(self, text):
        self.failures += 1
        self.log(f"error: {text}", sys.stderr)

    def take(self):
        """The lines collected since the last call: [["stdout" or "stderr", text], ...]."""
        lines, self.lines = self.lines, []
        return lines
