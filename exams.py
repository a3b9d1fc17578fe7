"""The exams that a user names on the command line: a data folder, an exam's files, or DICOM.

    from exams import open_exams
    with open_exams([Path("scans")]) as (exams, failed):
        for exam in exams:
            print(exam.name, exam.paths)  # {"axial": Path, ...}, the planes that are there

A root file of its own: predict.py and explain.py take exams without labels, which dataloader.py's
data sets do not have.
"""

import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from dataloader import PLANES, InputError


class Exam(NamedTuple):
    """One exam's volumes on disk."""

    name: str  # file name without .npy
    split: str  # the folder of its plane folders, below what the user named: "valid", or ""
    paths: dict  # plane -> Path, of the planes that are there


class Exams:
    """The exams under `root` in MRNet's layout: <root>/<any folders>/<plane>/<exam>.npy.

    Keeps their names only: 100,000 exams take some 10 MB.
    """

    def __init__(self, root):
        self.root = Path(root)
        self.names = {folder: exam_names(folder) for folder in plane_folders(root)}

    def __len__(self):
        return sum(len(names) for names in self.names.values())

    def __iter__(self):
        for folder, names in self.names.items():
            split = folder.relative_to(self.root).as_posix()
            for name in names:
                paths = {plane: folder / plane / f"{name}.npy" for plane in PLANES}
                paths = {plane: path for plane, path in paths.items() if os.path.lexists(path)}
                yield Exam(name, "" if split == "." else split, paths)


def plane_folders(root):
    """Folders at or below `root` with a folder axial, coronal or sagittal, links followed once."""
    seen = set()
    for folder, below, _ in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        below[:] = sorted(name for name in below if real not in seen and not name.startswith("."))
        seen.add(real)
        if not set(PLANES).isdisjoint(below):
            yield Path(folder)
            below[:] = [name for name in below if name not in PLANES]


def exam_names(folder):
    """Names of the exams that have a volume of at least one plane, sorted."""
    names = set()
    for plane in PLANES:
        if (folder / plane).is_dir():
            files = (file.name for file in os.scandir(folder / plane))
            # Names that start with a dot are half-written files, or macOS's resource forks.
            names |= {f[: -len(".npy")] for f in files if f.endswith(".npy") and f[0] != "."}
    return sorted(names)


@contextmanager
def open_exams(sources, plane=None, say=print):
    """The exams that a user names on the command line.

    Args:
        sources: list of one Path, a folder in MRNet's layout, or a folder or zip of DICOM or NIfTI;
            or of one to three, the .npy files of one exam.
        plane: of a single .npy file, where its path does not tell.
        say: prints what the DICOM importer says of its choice of series.

    Yields:
        an iterable of Exam with a length, and how many volumes could not be converted. What was
        converted lies in a temporary folder, gone when the context ends.

    Raises:
        InputError: nothing there, or nothing that can be used.
    """
    for source in sources:
        if not source.exists():
            raise InputError(f"{source}: no such file or folder; give an exam or a data folder")
    if all(source.suffix == ".npy" for source in sources):
        yield [exam_of_files(sources, plane)], 0
        return
    source = sources[0]
    if len(sources) > 1:
        raise InputError(f"{source}: give one folder or zip, or the .npy files of one exam")
    if plane:
        raise InputError(f"{source}: --plane is for a single .npy file; leave it out")
    exams = Exams(source)
    if len(exams):
        yield exams, 0
        return
    if source.is_dir() and any(source.glob("*.npy")):
        raise InputError(
            f"{source}: its .npy files lie in no folder axial, coronal or sagittal; give the "
            "folder above these, or the files of one exam"
        )
    with tempfile.TemporaryDirectory(prefix="mrnet-") as folder:
        failures = convert_dicom(source, folder, say)
        yield Exams(Path(folder) / "valid"), failures


def exam_of_files(paths, plane=None):
    """The Exam that one to three .npy files make.

    A file's plane is `plane`, or its folder's name, or stands in its own name; the exam's name is
    the rest of it ("knee7-axial.npy" is knee7), or the folder's where nothing is left.
    """
    if plane and len(paths) > 1:
        raise InputError(f"{paths[0]}: --plane is for a single .npy file; leave it out")
    found, names = {}, {}
    for path in paths:
        folder = path.absolute().parent.name
        named = [p for p in PLANES if p in path.stem.lower()]
        if plane or folder in PLANES:
            where, name = plane or folder, path.stem
        elif len(named) == 1:
            where = named[0]
            name = re.sub(f"[ ._-]*{where}", "", path.stem, flags=re.I).strip(" ._-") or folder
        else:
            raise InputError(
                f"{path}: which plane is it? Name it axial.npy, coronal.npy or sagittal.npy, put "
                "it into such a folder, or give --plane"
            )
        if where in found:
            raise InputError(f"{path}: a second {where} volume; give one file a plane")
        found[where], names[name] = path, path
    if len(names) > 1:
        raise InputError(
            f"{paths[-1]}: not of the same exam as the others ({', '.join(names)}); give the files "
            "of one exam, named alike"
        )
    return Exam(*names, "", {p: found[p] for p in PLANES if p in found})


def convert_dicom(source, folder, say):
    """Run data/dicom/prepare.py on `source`, into `folder`; how many volumes failed.

    A process of its own: the reader of foreign files shares no memory with the models.
    """
    importer = Path(__file__).parent / "data" / "dicom" / "prepare.py"
    command = [sys.executable, str(importer), "--", str(source), str(folder)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    for line in done.stdout.splitlines():
        say(line)
    lines = done.stderr.splitlines()
    last = lines.pop() if done.returncode not in (0, 1) and lines else ""
    for line in lines:
        print(line, file=sys.stderr)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode not in (0, 1):
        last = last.removeprefix("error: ") or f"{source}: {importer} ended with {done.returncode}"
        raise InputError(last)
    return sum(line.startswith("error: ") for line in lines)
