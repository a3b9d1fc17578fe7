"""What importers write beside the volumes: dataset.json, and exams.csv, the register that gives
each exam its number and each patient a group."""

import csv
import hashlib
import hmac
import json
import os
import secrets
from contextlib import contextmanager
from pathlib import Path

from mrnet.errors import InputError
from mrnet.files import open_regular, read_bytes, read_text, write_bytes, write_csv, write_text
from mrnet.layout.labels import exam_number, is_exam_number
from mrnet.layout.planes import ALL_SPLITS
from mrnet.layout.volumes import write_volume

DATASET, EXAMS = "dataset.json", "exams.csv"
UNFINISHED = ".unfinished"  # folder of a file for each exam that is being written
KEY_BYTES = 32


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
        found = (split for split in ALL_SPLITS if any(self.out.glob(f"{split}/*/{number:04d}.npy")))
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
    for split in ALL_SPLITS:
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
