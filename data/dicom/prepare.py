"""DICOM exams and NIfTI volumes to MRNet's layout.

    pip install -r requirements-dicom.txt
    python data/dicom/prepare.py ~/scans data/mine               # folders or zips of DICOM or NIfTI
    python data/dicom/prepare.py exam.zip data/mine --overwrite --series "T2 TSE" --series 7
    python data/dicom/prepare.py ~/scans data/mine --split train --labels labels.csv

Writes OUT/<split>/<plane>/0000.npy, uint8 (s, 256, 256). One exam is one DICOM study, or one folder
of NIfTI files. Exams are numbered in the order of their paths. The output holds pixels and this
running number: no name, date or UID leaves the DICOM, and nothing read is ever executed.

Patient coordinates are DICOM's, in mm: x grows to the patient's left, y to posterior, z to superior
(LPS; PS3.3 C.7.6.2.1.1). NIfTI's affine counts x to the right and y to anterior and is turned.
"""

import argparse
import csv
import functools
import gzip
import io
import itertools
import logging
import os
import re
import stat
import statistics
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from tqdm import tqdm

CONVENTION = """\
orientation of what is written (the patient's right and left):
  sagittal  rows superior to inferior, columns anterior to posterior, slices right to left
  coronal   rows superior to inferior, columns right to left, slices anterior to posterior
  axial     rows anterior to posterior, columns right to left, slices superior to inferior
"""
# Per plane (patient axis x, y or z; sign) along which slices, rows and columns grow: CONVENTION.
TARGET = {
    "axial": ((2, -1), (1, 1), (0, 1)),
    "coronal": ((1, 1), (2, -1), (0, 1)),
    "sagittal": ((0, 1), (2, -1), (1, 1)),
}
PLANE_OF_AXIS = {target[0][0]: plane for plane, target in TARGET.items()}

SIDE = 256  # px; MRNet's slices
WINDOW = (0.5, 99.5)  # percentiles of a volume that become 0 and 255
MIN_SLICES = 5  # fewer are a localiser; MRNet's shortest exam has 17
OBLIQUE = 30.0  # degrees from the nearest plane, above which the user is warned
SAME_PLACE = 0.01  # mm; closer slices are one place scanned or copied twice
GAP = 1.5  # steps between neighbours, above which a slice is missing
ISOTROPIC = 2.0  # voxel sides up to this ratio: a 3-D scan that can be cut in each plane
SLAB = 3.0  # mm; a 3-D scan is averaged to about MRNet's slice thickness
MAX_BYTES = 2**29  # of one file once unpacked: zip and gzip bombs
MAX_VOXELS = 2**27  # of one volume, 512 MiB as float32
MAX_MEMBERS = 200_000  # of one zip file
DEFLATED = b"1.2.840.10008.1.2.1.99"  # the transfer syntax that is zlib as a whole
ZLIB_BEST = 1032  # zlib's highest compression ratio

MAX_OBLONG = 20  # ratio of a slice's sides, as a damaged PixelSpacing gives
MR_IMAGES = ("1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1")  # SOP classes
NO_IMAGE = "no image"  # reports, presentation states, DICOMDIR ...
COPY_AGAIN = "truncated or damaged; copy or export it again"

# What a series' description says of its contrast, lower case, words set apart by single spaces.
FAT_SUPPRESSED = re.compile(r"fs\b|fat ?sat|fat ?sup|spair|\bspir\b|stir|tirm|water")
NOT_SUPPRESSED = re.compile(r"\b(no|non|without|wo) ?(fs|fat)")
FLUID = re.compile(r"pd|t2|proton|stir|tirm|spair|\bspir\b|fs\b|fat ?sat|water")
T1 = re.compile(r"\bt1")

HEADER = [  # all that is read of a file before its pixels
    "StudyInstanceUID", "SeriesInstanceUID", "Modality", "ImageType", "SeriesNumber",
    "SeriesDescription", "ProtocolName", "EchoTime", "NumberOfFrames", "SamplesPerPixel",
    "PhotometricInterpretation", "Rows", "Columns", "ImagePositionPatient",
    "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]  # fmt: skip


class InputError(Exception):
    """Something that the user gave is wrong. The message is one line: what, where, the mend."""


class Report:
    """Says things without breaking the progress bar, and counts failures."""

    failures = 0

    def say(self, text, stream=None):
        stream = stream or sys.stdout
        # descriptions and file names may hold control characters and any script
        text = "".join(c if c.isprintable() else "?" for c in text)
        encoding = getattr(stream, "encoding", None) or "utf-8"
        tqdm.write(text.encode(encoding, "replace").decode(encoding), file=stream)

    def warn(self, text):
        self.say(f"warning: {text}", sys.stderr)

    def fault(self, text):
        self.failures += 1
        self.say(f"error: {text}", sys.stderr)


# --- files, zipped or not -------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def archive(path):
    """A zip file, kept open: an exam's members are read one by one."""
    return zipfile.ZipFile(path)


@dataclass(frozen=True, order=True)
class File:
    """A file on disk, or the member of a zip file."""

    path: Path
    member: str = ""

    def __str__(self):
        return f"{self.path}:{self.member}" if self.member else str(self.path)

    @property
    def name(self):
        return PurePosixPath(self.member).name if self.member else self.path.name

    @property
    def folder(self):
        return self.path / PurePosixPath(self.member).parent if self.member else self.path.parent

    def open(self):
        return archive(self.path).open(self.member) if self.member else open(self.path, "rb")

    def head(self, size):
        with self.open() as stream:
            return stream.read(size)

    def read(self):
        """All bytes, unpacked if the name ends in .gz."""
        with self.open() as packed:
            stream = gzip.GzipFile(fileobj=packed) if self.name.lower().endswith(".gz") else packed
            data = stream.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise InputError(f"{self}: over {MAX_BYTES >> 20} MiB; split it into single series")
        return data


@contextmanager
def reading(file):
    """Turn whatever a reader raises into one InputError, without its text: it may quote patients.

    MemoryError too: a damaged header can ask for any size.
    """
    try:
        yield
    except (InputError, ImportError):
        raise
    except Exception as error:
        if getattr(error, "strerror", None):
            raise InputError(f"{file}: {error.strerror}; make it readable") from None
        raise InputError(f"{file}: {type(error).__name__}, {COPY_AGAIN}") from None


def zip_members(path):
    """The members of a zip file. Of a hostile or damaged one nothing is used: InputError."""
    with reading(path):
        members = archive(path).infolist()
    if len(members) > MAX_MEMBERS:
        raise InputError(f"{path}: {len(members)} members; split it into one zip an exam")
    for info in members:
        parts = re.split(r"[/\\]", info.filename)
        absolute = parts[0] == "" or ":" in parts[0]
        if absolute or ".." in parts or stat.S_ISLNK(info.external_attr >> 16):
            raise InputError(
                f"{path}: member '{info.filename}' leads out of the folder; "
                "nothing of this zip is used, ask its sender for a clean one"
            )
        if info.flag_bits & 1:
            raise InputError(f"{path}: encrypted; unpack it first and give the folder")
        if info.file_size > MAX_BYTES:
            raise InputError(
                f"{path}: member '{info.filename}' unpacks to {info.file_size >> 20} MiB, "
                f"more than {MAX_BYTES >> 20}; unpack it first and give the folder"
            )
    return [File(path, info.filename) for info in members if not info.is_dir()]


def find_files(source, report):
    """Every file under `source` (a folder, zip or single file), zip members included, sorted."""
    paths = [source]
    if source.is_dir():
        walk = os.walk(source, onerror=lambda e: report.fault(f"{e.filename}: {e.strerror}"))
        paths = sorted(Path(folder, name) for folder, _, names in walk for name in names)
    files = []
    for path in paths:
        if path.suffix.lower() != ".zip":
            files += [File(path)] if path.is_file() else []  # no pipes, sockets or dead links
            continue
        try:
            files += sorted(zip_members(path))
        except InputError as error:
            report.fault(str(error))
    return files


def write_whole(path, data):
    """Bytes -> file `path`, which appears only once it is whole and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(handle)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_volume(path, volume):
    data = io.BytesIO()  # straight into the file, NumPy hides why a write failed
    np.save(data, volume, allow_pickle=False)
    write_whole(path, data.getbuffer())


# --- series ---------------------------------------------------------------------------------------


@dataclass
class Series:
    """One volume that may be taken, known by its header alone.

    Array axis a (of `shape`) runs along the unit vector directions[a] (LPS) in steps of spacing[a]
    mm. `through` lists the axes along which it may be cut to slices. `load` reads the pixels:
    float32 of `shape`. `fault` says why it cannot be used if it is chosen.
    """

    file: File
    name: str
    number: int | None
    description: str
    shape: tuple
    directions: np.ndarray  # (3, 3)
    spacing: np.ndarray  # (3,)
    through: tuple
    load: Callable
    fault: str = ""

    def slab(self, axis):
        """How many voxels along `axis` make one slice."""
        return max(1, int(SLAB / self.spacing[axis] + 0.05)) if len(self.through) > 1 else 1

    def slices(self, axis):
        return self.shape[axis] // self.slab(axis)

    def rank(self, axis, wanted):
        """Sort key, the highest is taken: asked for, contrast, natively in this plane, slices."""
        words = " ".join(re.findall("[a-z0-9]+", self.description.lower()))
        contrast = 0
        if FLUID.search(words) and not T1.search(words):
            fat_suppressed = FAT_SUPPRESSED.search(words) and not NOT_SUPPRESSED.search(words)
            contrast = 2 if fat_suppressed else 1
        asked = any(self.matches(pattern) for pattern in wanted)
        return asked, contrast, len(self.through) == 1, self.slices(axis)

    def matches(self, pattern):
        if pattern.isdecimal():
            return str(self.number) == pattern
        return pattern.lower() in self.description.lower()


@dataclass
class Exam:
    """One study, or one folder of NIfTI files."""

    study: str = ""
    folder: str = ""  # relative to SOURCE
    files: list = field(default_factory=list)
    series: list = field(default_factory=list)
    skipped: Counter = field(default_factory=Counter)  # (series, why) -> files

    def add(self, found, name, count=1):
        """A Series, or the reason why `count` files of the series `name` are none."""
        if isinstance(found, Series):
            self.series.append(found)
        else:
            self.skipped[name, found] += count


def plane_of(direction):
    """Unit vector across the slices -> name of the nearest plane, degrees from it."""
    axis = int(np.argmax(np.abs(direction)))
    return PLANE_OF_AXIS[axis], float(np.degrees(np.arccos(min(1.0, abs(direction[axis])))))


def ways_to_cut(spacing, thickest):
    """Array axes that may become slices: each of a near-isotropic 3-D scan, else the thickest."""
    return (0, 1, 2) if max(spacing) < ISOTROPIC * min(spacing) else (thickest,)


# --- DICOM ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Frame:
    """What one DICOM frame says of itself; None where it says nothing usable."""

    file: File
    index: int
    size: tuple  # rows, columns
    position: tuple | None  # of the first pixel's centre, mm
    orientation: tuple | None  # direction along which columns grow, then along which rows grow
    spacing: tuple | None  # mm between rows, between columns
    echo: float
    slope: float
    intercept: float
    inverted: bool


def numbers(value, count):
    """`count` finite floats, or None."""
    try:
        values = tuple(float(v) for v in value)
    except (TypeError, ValueError):
        return None
    return values if len(values) == count and np.isfinite(values).all() else None


def lookup(header, index, sequence, name):
    """An attribute of one frame: its own functional group, else the shared one, else the file's."""
    for groups, i in (
        (header.get("PerFrameFunctionalGroupsSequence"), index),
        (header.get("SharedFunctionalGroupsSequence"), 0),
    ):
        if groups and i < len(groups) and groups[i].get(sequence):
            value = groups[i].get(sequence)[0].get(name)
            if value is not None:
                return value
    return header.get(name)


def why_not(file, header, count):
    """Why a file holds no slice of a knee volume, or ''."""
    rows, columns, samples = (header.get(k) for k in ("Rows", "Columns", "SamplesPerPixel"))
    modality = str(header.get("Modality") or "")
    kind = {str(v).upper() for v in header.get("ImageType") or ()}
    colours = str(header.get("PhotometricInterpretation") or "")
    if not rows or not columns:
        if header.file_meta.get("MediaStorageSOPClassUID") in MR_IMAGES:
            raise InputError(f"{file}: an MR image without size, {COPY_AGAIN}")
        return NO_IMAGE
    if modality not in ("", "MR"):
        return f"modality {modality}, not MR"
    if samples != 1 or not colours.startswith("MONOCHROME"):
        return f"colour or unknown pixels ({colours or 'no PhotometricInterpretation'}, {samples})"
    if rows < 2 or columns < 2:
        return f"one-dimensional ({rows} x {columns} px)"
    if "LOCALIZER" in kind:
        return "localiser"
    if "PROJECTION IMAGE" in kind:
        return "projection"
    if "MOSAIC" in kind:
        return "mosaic of slices"
    if rows * columns * count > MAX_VOXELS:
        return f"too large ({count} x {rows} x {columns})"
    return ""


def read_frames(file):
    """Header of one DICOM file -> study and series UID, (number, description), frames, why none."""
    import pydicom

    if DEFLATED in file.head(1024) and len(file.read()) > MAX_BYTES // ZLIB_BEST:
        raise InputError(f"{file}: a large deflated file; inflate it with dcmconv first")
    with reading(file), file.open() as stream:
        header = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=HEADER)
        count = int(header.get("NumberOfFrames") or 1)
        number = header.get("SeriesNumber")
        description = str(header.get("SeriesDescription") or header.get("ProtocolName") or "")[:60]
        title = None if number is None else int(number), description
        key = (
            str(header.get("StudyInstanceUID") or f"folder {file.folder}"),
            str(header.get("SeriesInstanceUID") or title),
        )
        reason = why_not(file, header, count)
        frames = [] if reason else [read_frame(header, file, i) for i in range(count)]
    return key, title, frames, reason


def read_frame(header, file, i):
    rescale = "PixelValueTransformationSequence"
    echo = lookup(header, i, "MREchoSequence", "EffectiveEchoTime") or header.get("EchoTime")
    slope = lookup(header, i, rescale, "RescaleSlope")
    return Frame(
        file,
        i,
        (int(header.Rows), int(header.Columns)),
        numbers(lookup(header, i, "PlanePositionSequence", "ImagePositionPatient"), 3),
        numbers(lookup(header, i, "PlaneOrientationSequence", "ImageOrientationPatient"), 6),
        numbers(lookup(header, i, "PixelMeasuresSequence", "PixelSpacing"), 2),
        float(echo or 0),
        float(1 if slope is None else slope),
        float(lookup(header, i, rescale, "RescaleIntercept") or 0),
        str(header.PhotometricInterpretation).strip() == "MONOCHROME1",
    )


def series_name(title):
    number, description = title
    return f"series {'?' if number is None else number} '{description}'"


def assemble(title, frames):
    """The frames of one DICOM series -> Series, slices ordered along their normal; or why not."""
    placed = [f for f in frames if f.position and f.orientation and f.spacing]
    if not placed:
        return "no ImagePositionPatient, ImageOrientationPatient or PixelSpacing"
    axes = np.array([f.orientation for f in placed]).reshape(-1, 2, 3)
    if np.abs(axes - axes[0]).max() > 0.02:  # about 1 degree
        return "several orientations"
    across, down = axes[0]
    if np.abs(axes[0] @ axes[0].T - np.eye(2)).max() > 0.02 or min(placed[0].spacing) <= 0:
        return "ImageOrientationPatient is no rotation, or PixelSpacing is not positive"
    normal = np.cross(across, down)
    depth = {id(f): float(normal @ f.position) for f in placed}  # mm
    if len({round(d, 2) for d in depth.values()}) < len(placed):
        # several echoes of one place: the last is the most fluid-sensitive
        last = max(f.echo for f in placed)
        frames, placed = ([f for f in some if f.echo == last] for some in (frames, placed))
    if len(placed) < MIN_SLICES:
        return f"fewer than {MIN_SLICES} slices"
    placed.sort(key=lambda f: depth[id(f)])
    depths = [depth[id(f)] for f in placed]
    step = statistics.median(b - a for a, b in itertools.pairwise(depths))
    spacing = np.array([max(step, SAME_PLACE), *placed[0].spacing])
    return Series(
        file=placed[0].file,
        name=series_name(title),
        number=title[0],
        description=title[1],
        shape=(len(placed), *placed[0].size),
        directions=np.array([normal, down, across]),
        spacing=spacing,
        through=ways_to_cut(spacing, 0),
        load=functools.partial(read_pixels, placed),
        fault=geometry_fault(frames, placed, depths, step),
    )


def geometry_fault(frames, placed, depths, step):
    """What is wrong with the slices' places or sizes: one line with file and mend, or ''."""
    for frame in frames:
        if not (frame.position and frame.orientation and frame.spacing):
            return f"{frame.file}: frame {frame.index} has no position or orientation; export again"
    first = placed[0]
    for frame in placed:
        if frame.size != first.size or not np.allclose(frame.spacing, first.spacing, rtol=0.01):
            sizes = " and ".join(
                f"{f.size[0]} x {f.size[1]} px of {f.spacing[0]:.3g} x {f.spacing[1]:.3g} mm"
                for f in (first, frame)
            )
            return f"{frame.file}: mixed sizes, {sizes}; give one series without the other"
    for a, b, start, end in zip(placed, placed[1:], depths, depths[1:], strict=False):
        if end - start < SAME_PLACE:
            return (
                f"{b.file}: duplicated position, as {a.file} at {start:.1f} mm; remove one of them "
                "or choose another series with --series"
            )
        if end - start > GAP * step:
            return (
                f"{a.file}: gap after it from {start:.1f} to {end:.1f} mm along the slices' normal "
                f"(step {step:.1f} mm), about {round((end - start) / step) - 1} missing; "
                "copy or export the series again"
            )
    return ""


def decode(file, size):
    """The pixels of one DICOM file, as stored: (frames, rows, columns) with `size` of a frame."""
    import pydicom
    from pydicom.pixels import get_decoder

    with reading(file):
        data = pydicom.dcmread(io.BytesIO(file.read()))
        syntax = data.file_meta.TransferSyntaxUID
        try:
            has_decoder = get_decoder(syntax).is_available
        except NotImplementedError:
            raise InputError(
                f"{file}: no decoder for transfer syntax {syntax.name}; decompress it with gdcmconv"
            ) from None
        if not has_decoder:
            plugin = "openjpeg" if syntax.name.startswith(("JPEG 2000", "High-")) else "libjpeg"
            raise InputError(
                f"{file}: no decoder for {syntax.name}; pip install pylibjpeg pylibjpeg-{plugin}"
            )
        frames = int(data.get("NumberOfFrames") or 1)
        needed = frames * data.Rows * data.Columns * data.BitsAllocated // 8
        there = len(data.get("PixelData") or b"")
        if not syntax.is_encapsulated and there < needed:
            raise InputError(
                f"{file}: pixel data ends after {there} of {needed} bytes, {COPY_AGAIN}"
            )
        return data.pixel_array.reshape(-1, *size)


def read_pixels(frames):
    """Frames in order -> float32 (s, rows, columns), rescaled, bright where the signal is high."""
    grey = np.empty((len(frames), *frames[0].size), np.float32)
    by_file = defaultdict(list)
    for k, frame in enumerate(frames):
        by_file[frame.file].append((k, frame))
    for file, members in by_file.items():
        pixels = decode(file, frames[0].size)
        with reading(file):
            for k, frame in members:
                grey[k] = pixels[frame.index] * np.float32(frame.slope)
                grey[k] += np.float32(frame.intercept)
                if frame.inverted:
                    grey[k] *= -1  # the window makes it positive again
    return grey


# --- NIfTI ----------------------------------------------------------------------------------------


def open_nifti(file):
    """A NIfTI-1 or NIfTI-2 image in memory."""
    import nibabel

    data = file.read()
    sizes = int.from_bytes(data[:4], "little"), int.from_bytes(data[:4], "big")  # sizeof_hdr
    if 348 in sizes:
        return nibabel.Nifti1Image.from_bytes(data)
    if 540 in sizes:
        return nibabel.Nifti2Image.from_bytes(data)
    raise InputError(f"{file}: no NIfTI header, {COPY_AGAIN}")


def read_nifti(file):
    """Header of one NIfTI file -> Series, or why it is none. Raises InputError."""
    with reading(file):
        image = open_nifti(file)
        shape, affine, kind = image.shape, image.affine, image.get_data_dtype().kind
        coded = int(image.header["sform_code"]) or int(image.header["qform_code"])
    volumes = np.prod(shape[3:], dtype=float)
    if kind not in "iuf":
        return "colour or complex voxels"
    if len(shape) < 3 or min(shape[:3]) < 2:
        return f"no volume, shape {shape}"
    if volumes != 1:
        return f"{volumes:.0f} volumes in one file; split off the one to use"
    if np.prod(shape, dtype=float) > MAX_VOXELS:
        return f"too large, shape {shape}"
    if not coded:
        return "sform_code and qform_code are 0, left and right unknown"
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not (np.isfinite(affine).all() and (spacing > 0).all()):
        return "no geometry in its affine"
    directions = (affine[:3, :3] / spacing).T * (-1, -1, 1)  # RAS -> LPS
    if abs(np.linalg.det(directions)) < 0.9:
        return "its affine is sheared"
    through = ways_to_cut(spacing, int(np.argmax(spacing)))
    if max(shape[axis] for axis in through) < MIN_SLICES:
        return f"fewer than {MIN_SLICES} slices"
    stem = re.sub(r"\.nii(\.gz)?$", "", file.name, flags=re.IGNORECASE)
    load = functools.partial(read_voxels, file)
    return Series(
        file, f"file '{file.name}'", None, stem, shape[:3], directions, spacing, through, load
    )


def read_voxels(file):
    """float32 (i, j, k), scaled by scl_slope and scl_inter."""
    with reading(file):
        grey = open_nifti(file).get_fdata(dtype=np.float32)
        return grey.reshape(grey.shape[:3])


# --- exams ----------------------------------------------------------------------------------------


def find_exams(source, report):
    """Read every header under `source` -> list of Exam, in the order of their paths."""
    exams, frames_of, titles = defaultdict(Exam), defaultdict(list), {}
    others = 0
    files = find_files(source, report)
    for file in tqdm(files, desc="headers", unit="file", disable=None, leave=False):
        try:
            with reading(file):
                is_dicom = file.head(132)[128:] == b"DICM"
            if is_dicom:
                key, title, frames, reason = read_frames(file)
                exam = exams["dicom", key[0]]
                exam.study = key[0]
                frames_of[key] += frames
                titles.setdefault(key, title)
                if reason:
                    exam.add(reason, series_name(title))
            elif file.name.lower().endswith((".nii", ".nii.gz")):
                found = read_nifti(file)
                exam = exams["nifti", file.folder]
                exam.add(found, f"file '{file.name}'")
            else:
                others += 1
                continue
            exam.files.append(file)
        except InputError as error:
            report.fault(str(error))
    for key, frames in frames_of.items():
        if frames:
            found = assemble(titles[key], frames)
            count = len({frame.file for frame in frames})
            exams["dicom", key[0]].add(found, series_name(titles[key]), count)
    if others:
        report.say(f"skipped: files that are neither DICOM nor NIfTI: {others}")
    return with_images(source, exams.values(), report)


def with_images(source, exams, report):
    """Name each exam by its folder, and leave out those of reports, DICOMDIR and the like."""
    base = source if source.is_dir() else source.parent
    kept = []
    for exam in sorted(exams, key=lambda exam: min(exam.files)):
        folder = os.path.commonpath([file.folder for file in exam.files])
        exam.folder = Path(os.path.relpath(folder, base)).as_posix()
        if exam.series or any(reason != NO_IMAGE for _, reason in exam.skipped):
            kept.append(exam)
        else:
            report.say(f"skipped: files without an image in {exam.folder}: {len(exam.files)}")
    return kept


def window(grey, file):
    """Any float32 array -> 0..255 between the WINDOW percentiles, in place."""
    finite = np.isfinite(grey)
    if not finite.all():
        grey[~finite] = grey[finite].min() if finite.any() else 0
    low, high = np.percentile(grey, WINDOW)
    if not high > low:
        low, high = float(grey.min()), float(grey.max())
    if not high > low:
        raise InputError(f"{file}: every pixel has the same value; export the series again")
    np.subtract(grey, low, out=grey)
    np.multiply(grey, 255 / (high - low), out=grey)
    return np.clip(grey, 0, 255, out=grey)


def cut(grey, series, axis, square):
    """Cut a volume along one of its axes into slices as CONVENTION has them.

    Args:
        grey: float32 0..255 of series.shape.
        axis: the array axis that becomes the slices.
        square: "pad" keeps all of the slices' longer side, "crop" all of the shorter.

    Returns:
        uint8 (s, 256, 256), square pixels.
    """
    plane, _ = plane_of(series.directions[axis])
    target = TARGET[plane]
    rows, columns = (a for a in range(3) if a != axis)
    along = np.abs(series.directions)
    down, right = target[1][0], target[2][0]
    if along[rows, down] + along[columns, right] < along[columns, down] + along[rows, right]:
        rows, columns = columns, rows
    order = (axis, rows, columns)
    grey = grey.transpose(order)
    flips = [
        i
        for i, (a, (patient, sign)) in enumerate(zip(order, target, strict=True))
        if series.directions[a][patient] * sign < 0
    ]
    grey = np.flip(grey, flips)
    slab, s = series.slab(axis), series.slices(axis)
    if slab > 1:
        # (s * slab, H, W) -> (s, H, W)
        grey = grey[: s * slab].reshape(s, slab, *grey.shape[1:]).mean(axis=1)
    height, width = grey.shape[1] * series.spacing[rows], grey.shape[2] * series.spacing[columns]
    if max(height, width) > MAX_OBLONG * min(height, width):
        raise InputError(
            f"{series.file}: slices of {height:.3g} x {width:.3g} mm; correct the pixel spacing"
        )
    return to_square(grey, height, width, square)


def to_square(grey, height, width, square):
    """float32 (s, H, W) 0..255, slices of height x width mm -> uint8 (s, 256, 256)."""
    pixel = (max if square == "pad" else min)(height, width) / SIDE
    height, width = max(1, round(height / pixel)), max(1, round(width / pixel))
    top, left = (height - SIDE) // 2, (width - SIDE) // 2
    inside = (slice(max(0, top), top + SIDE), slice(max(0, left), left + SIDE))
    out = np.zeros((len(grey), SIDE, SIDE), np.uint8)
    for image, to in zip(grey, out, strict=True):
        image = Image.fromarray(np.ascontiguousarray(image))
        image = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))[inside]
        y, x = max(0, -top), max(0, -left)
        to[y : y + image.shape[0], x : x + image.shape[1]] = np.rint(image)
    return out


def choose(exam, wanted, say):
    """Per plane the best series: dict plane -> (series, axis). Says what was and was not taken."""
    candidates = defaultdict(list)
    for series in exam.series:
        for axis in series.through:
            if series.slices(axis) >= MIN_SLICES:
                candidates[plane_of(series.directions[axis])[0]].append((series, axis))
    chosen = {}
    for plane, found in sorted(candidates.items()):
        found.sort(key=lambda pair: pair[0].rank(pair[1], wanted), reverse=True)  # stable
        chosen[plane] = found[0]
        (series, axis), others = found[0], [series.name for series, _ in found[1:]]
        say(
            f"{plane}: {series.name}, {series.slices(axis)} slices"
            + (f"; not taken: {', '.join(others)}" if others else "")
        )
    for (name, reason), count in sorted(exam.skipped.items()):
        say(f"skipped: {name}, {reason} (files: {count})")
    return chosen


def convert(exam, number, args, report):
    """Write the planes of one exam -> how many slices. Each plane that fails is counted."""
    name = f"exam {number:04d} ({exam.folder})"
    chosen = choose(exam, args.series, lambda text: report.say(f"{name}  {text}"))
    if args.series and not any(s.matches(p) for s in exam.series for p in args.series):
        report.warn(f"{name}: no series matches --series")
    if not chosen:
        why = "; ".join(f"{series}, {reason}" for series, reason in sorted(exam.skipped))
        report.fault(f"{name}: no usable series: {why}")
    cuts = defaultdict(list)  # a 3-D scan is read once for all its planes
    for plane, (series, axis) in chosen.items():
        cuts[series.file].append((plane, series, axis))
    written = {}
    for group in cuts.values():
        series = group[0][1]
        try:
            if series.fault:
                raise InputError(f"{series.name}, {series.fault}")
            grey = window(series.load(), series.file)
            for plane, _, axis in group:
                angle = plane_of(series.directions[axis])[1]
                if angle > OBLIQUE:
                    report.warn(f"{name}: {series.name} is {angle:.0f} degrees from {plane}")
                volume = cut(grey, series, axis, args.square)
                write_volume(args.out / args.split / plane / f"{number:04d}.npy", volume)
                written[plane] = len(volume)
        except InputError as error:
            report.fault(f"{name}: {error}")
    missing = sorted(TARGET.keys() - written.keys())
    for plane in missing:  # what an earlier run left, with --overwrite
        (args.out / args.split / plane / f"{number:04d}.npy").unlink(missing_ok=True)
    if written and missing:
        report.say(f"{name}  planes missing: {', '.join(missing)}")
    return sum(written.values())


# --- labels, id map, command line -----------------------------------------------------------------


def read_labels(path, numbered):
    """`exam,task,label` -> dict task -> dict exam's number -> label. Raises InputError."""
    folders = defaultdict(list)
    for number, exam in numbered.items():
        folders[exam.folder].append(number)
        for name in (str(number), f"{number:04d}"):
            folders.setdefault(name, [number])
    labels = defaultdict(dict)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a CSV ({error})") from None
    for line, row in enumerate(rows, start=2):
        exam, task, label = (str(row.get(k) or "").strip() for k in ("exam", "task", "label"))
        if not re.fullmatch("[A-Za-z0-9_-]{1,40}", task) or label not in ("0", "1"):
            raise InputError(
                f"{path}, line {line}: expected the columns exam,task,label, the task of letters, "
                "digits, - or _, the label 0 or 1"
            )
        found = folders.get(exam.rstrip("/") or ".", [])
        if len(found) != 1:
            known = ", ".join(sorted(folders)[:6])
            raise InputError(
                f"{path}, line {line}: '{exam}' names {len(found)} exams; give the folder of one, "
                f"or its number: {known} ..."
            )
        labels[task][found[0]] = int(label)
    return labels


def write_labels(args, labels, written):
    """Merge the labels of the written exams into OUT/<split>-<task>.csv."""
    for task, by_exam in labels.items():
        path = args.out / f"{args.split}-{task}.csv"
        rows = {}
        if path.exists():
            try:
                with open(path, newline="", encoding="utf-8") as file:
                    rows = {int(number): label for number, label in filter(None, csv.reader(file))}
            except (ValueError, csv.Error):
                raise InputError(f"{path}: not a CSV of `id,label`; move it away") from None
        rows.update({n: label for n, label in by_exam.items() if n in written})
        write_csv(path, sorted(rows.items()))


def write_csv(path, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_whole(path, text.getvalue().encode("utf-8", "surrogateescape"))


def parse(argv):
    parser = argparse.ArgumentParser(
        description="DICOM exams and NIfTI volumes to MRNet's layout. Research use only.",
        epilog=CONVENTION,
        formatter_class=Formatter,
    )
    parser.add_argument("source", type=Path, help="folder, zip file, or one .dcm or .nii file")
    parser.add_argument("out", type=Path, help="data folder to write to")
    group = parser.add_argument_group("choice of series")
    group.add_argument(
        "--series",
        action="append",
        default=[],
        metavar="TEXT",
        help="part of a series' description, or its number; may be repeated. Without it, "
        "fluid-sensitive fat-suppressed series are preferred, then those with more slices",
    )
    group.add_argument(
        "--square",
        choices=("pad", "crop"),
        default="pad",
        help="oblong slices: pad keeps all of them; crop suits long coronal or sagittal fields "
        "of view, whose joint would become small",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--split",
        choices=("train", "valid"),
        default="valid",
        help="valid suits exams that are only predicted",
    )
    group.add_argument(
        "--labels",
        type=Path,
        metavar="CSV",
        help="columns exam,task,label; exam is a folder below SOURCE or a running number. "
        "Makes OUT/<split>-<task>.csv",
    )
    group.add_argument("--first-id", type=int, default=0, help="number of the first exam")
    group.add_argument(
        "--overwrite",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="replace exams that OUT has under the same numbers",
    )
    group.add_argument(
        "--id-map",
        type=Path,
        metavar="CSV",
        help="also write id, study UID and folder. It identifies patients: keep it out of OUT",
    )
    args = parser.parse_args(argv)
    if args.first_id < 0:
        parser.error(f"--first-id {args.first_id}: numbers start at 0")
    return args


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults shown, the epilog's lines kept."""


def prepare(args, report):
    """Convert everything -> exit status."""
    start = time.perf_counter()
    if not args.source.exists():
        raise InputError(f"{args.source}: no such file or folder")
    numbered = dict(enumerate(find_exams(args.source, report), args.first_id))
    if not numbered:
        raise InputError(f"{args.source}: no readable DICOM or NIfTI in it; give the exams' folder")
    labels = read_labels(args.labels, numbered) if args.labels else {}
    if not args.overwrite:
        old = [args.out / args.split / p / f"{n:04d}.npy" for n in numbered for p in TARGET]
        for path in filter(Path.exists, [*old, *filter(None, [args.id_map])]):
            raise InputError(f"{path}: exists; use another folder, --first-id N or --overwrite")
    slices = {}
    for number, exam in tqdm(numbered.items(), desc="exams", unit="exam", disable=None):
        slices[number] = convert(exam, number, args, report)
    written = {number for number, count in slices.items() if count}
    write_labels(args, labels, written)
    if args.id_map:
        rows = [(n, numbered[n].study, numbered[n].folder) for n in sorted(written)]
        write_csv(args.id_map, [("id", "study", "folder"), *rows])
    report.say(
        f"{len(written)} of {len(numbered)} exams, {sum(slices.values())} slices in "
        f"{time.perf_counter() - start:.1f} s -> {args.out / args.split}; "
        f"failures: {report.failures}"
    )
    if not written:
        raise InputError(f"{args.source}: no exam could be used, {report.failures} failures")
    return 1 if report.failures else 0


def main(argv=None):
    args, report = parse(argv), Report()
    for name in ("pydicom", "nibabel.global"):  # what they log and warn of quotes the header
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return prepare(args, report)
    except InputError as error:
        report.fault(str(error))
        return 2
    except ImportError as error:
        report.fault(f"{error.name} is missing; pip install -r requirements-dicom.txt")
        return 2
    except OSError as error:
        report.fault(f"{error.filename or args.out}: {error.strerror}; written exams are whole")
        return 1
    except KeyboardInterrupt:
        report.say("interrupted; finished exams are whole, --overwrite starts again", sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
