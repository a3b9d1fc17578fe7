"""DICOM and NIfTI files read into series: each a volume that may be taken, described by its header.

Patient coordinates are DICOM's, in mm: x grows to the patient's left, y to posterior, z to superior
(LPS; PS3.3 C.7.6.2.1.1). NIfTI's affine counts x to the right and y to anterior and is turned.
"""

import functools
import io
import itertools
import math
import re
import statistics
import struct
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mrnet.errors import InputError
from mrnet.scans.files import COPY_AGAIN, File, read_dicom, reading
from mrnet.scans.slices import plane_of
from mrnet.scans.words import (
    DIXON,
    DIXON_WATER,
    FAT_SUPPRESSED,
    FLUID,
    GRADIENT_ECHO,
    NO_PICTURES,
    NOT_SUPPRESSED,
    NOT_T1,
    WATER_KINDS,
    other_part,
    other_picture,
    says_agent,
    says_loc,
    says_t1,
    sides_in,
    words_of,
)

MIN_SLICES = 5  # fewer are a localiser; MRNet's shortest exam has 17
SAME_PLACE = 0.01  # mm; closer slices are one place scanned or copied twice
GAP = 1.5  # steps between neighbours, above which a slice is missing
ISOTROPIC = 2.0  # voxel sides up to this ratio: a 3-D scan that can be cut in each plane
SLAB = 3.0  # mm; a 3-D scan is averaged to about MRNet's slice thickness
MAX_VOXELS = 2**27  # of one volume, 512 MiB as float32
MAX_FRAMES = 4096  # of one file
WIDTHS = 50.0, 500.0  # mm; of a slice's sides. No other number of a header is so often wrong
LOCALISER_STEP = 6.0  # mm between slices, above which a series that is called "loc" is one
# Philips scales each slice on its own: of slopes, and of the slices' greatest values, a series'
# median times this is the most.
UNLIKE = 100.0
SHIFT = 0.1  # of their range of grey levels: the most that one slice is shifted against the others
TEXT = 1000  # characters of a header's text that are looked at
MR_IMAGES = ("1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1")  # SOP classes
SCREEN_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # how the SOP classes of secondary captures begin
NO_IMAGE = "no image"  # reports, presentation states, DICOMDIR ...
# Why a series of images cannot be placed or taken as one volume: it may be any plane.
NO_GEOMETRY = "no ImagePositionPatient, ImageOrientationPatient or PixelSpacing"
NO_ROTATION = "ImageOrientationPatient is no rotation, or PixelSpacing is not positive"
NO_FRAMES = "NumberOfFrames is not positive"
TOO_LARGE = "too large"
FOREIGN = "slices of another orientation among them"
SEVERAL_VOLUMES = "several volumes in one file"
NOT_CODED = "sform_code and qform_code are 0, left and right unknown"
NO_AFFINE = "no geometry in its affine"
SHEARED = "its affine is sheared"
UNPLACED = (NO_GEOMETRY, NO_ROTATION, NO_FRAMES, TOO_LARGE, FOREIGN, SEVERAL_VOLUMES, NOT_CODED,
            NO_AFFINE, SHEARED)  # fmt: skip
MOSTLY = 0.8  # of a series' slices in one orientation: not a localiser in several
TILT = 15.0  # degrees; a step in the choice between slices more or less oblique
JUMP = 10.0  # mm within the slices' plane from one slice to the next: another place
# ms, of spin echoes whose words name no contrast: T1 is scanned with short echo and repetition
# times (10 to 30 and 300 to 700 ms; Westbrook and Talbot, MRI in Practice), proton density with a
# long repetition time (2000 and more), T2 with both long.
FLUID_ECHO = 25.0  # from here on fluid-sensitive
LONG_REPETITION = 1000.0  # from here on no T1
# What is written as ContrastBolusAgent where none was given.
NO_AGENTS = {"", "-", "0", "n/a", "na", "nil", "no", "no contrast", "none", "without"}
OTHER_PART = "by its header, not a knee (if it is one: dcmodify -i 0018,0015=KNEE)"

BITS = "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"
PATIENT = "PatientID", "IssuerOfPatientID", "PatientName", "PatientBirthDate"
HEADER = [  # all that is read of a file before its pixels
    "StudyInstanceUID", "SeriesInstanceUID", "Modality", "ImageType", "SeriesNumber",
    "SeriesDescription", "ProtocolName", "EchoTime", "NumberOfFrames", "SamplesPerPixel",
    "PhotometricInterpretation", "Rows", "Columns", "ImagePositionPatient",
    "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "Laterality",
    "ImageLaterality", "BodyPartExamined", "AnatomicRegionSequence", "StudyDescription",
    "FrameOfReferenceUID", *PATIENT, "RepetitionTime", "ScanningSequence", "EchoPulseSequence",
    "ContrastBolusAgent", "ContrastBolusAgentSequence", "SOPClassUID", "SOPInstanceUID",
    "InstanceNumber", *BITS,
]  # fmt: skip


@dataclass
class Series:
    """One volume that may be taken, described by its header alone.

    Array axis a (of `shape`) runs along the unit vector directions[a] (LPS) in steps of spacing[a]
    mm; voxel (0, 0, 0) lies at `origin`. `through` lists the axes along which it may be cut to
    slices. `load` reads the pixels: float32 of `shape`. `side` is its laterality: L,
    R, B (both) or ""; `said` the side that its titles name: L, R or "". `frame` is its frame of
    reference, "" if missing: coordinates of two frames cannot be compared. `fault` says why it
    cannot be used, `doubt` what to warn of where it is; `is_apart` that it is left out, as of
    another place than its knee's other series. `frames` are the DICOM frames along axis 0, of
    NIfTI none.
    """

    file: File
    name: str
    number: int | None
    description: str
    shape: tuple
    directions: np.ndarray  # (3, 3)
    spacing: np.ndarray  # (3,)
    origin: np.ndarray  # (3,)
    through: tuple
    load: Callable
    side: str = ""
    said: str = ""
    frame: str = ""
    fault: str = ""
    doubt: str = ""
    is_apart: bool = False
    frames: tuple = ()

    def slab(self, axis):
        """How many voxels along `axis` make one slice."""
        return max(1, int(SLAB / self.spacing[axis] + 0.05)) if len(self.through) > 1 else 1

    def slices(self, axis):
        return self.shape[axis] // self.slab(axis)

    @property
    def words(self):
        """Of the description, as `words_of` returns them."""
        return words_of(self.description)

    @property
    def is_t1(self):
        """Whether it is T1-weighted: by its description; by its times (`weighting`) where this
        names no contrast, of which fat suppression is none; where they do not tell, by contrast
        agent, after which T1 is scanned. A gradient echo is one only where its description names
        the agent: DESS and the like are scanned in an arthrogram, too."""
        if says_t1(self.words) or NOT_T1.search(self.words):
            return says_t1(self.words)
        is_gradient = GRADIENT_ECHO.search(self.words) or any(f.is_gradient for f in self.frames)
        has_agent = says_agent(self.description) or (
            not is_gradient and any(frame.has_agent for frame in self.frames)
        )
        return self.weighting == "T1" or (not self.weighting and has_agent)

    @property
    def weighting(self):
        """By echo and repetition time: "T1", "fluid" or "" if not known. Those of gradient echoes
        such as DESS are all short and do not tell."""
        echo = max((frame.echo for frame in self.frames), default=0)
        repetition = max((frame.repetition for frame in self.frames), default=0)
        if GRADIENT_ECHO.search(self.words) or not echo:
            return ""
        if echo >= FLUID_ECHO:
            return "fluid"
        if not repetition or any(frame.is_gradient for frame in self.frames):
            return ""
        return "T1" if repetition < LONG_REPETITION else "fluid"

    @property
    def contrast(self):
        """2 for fluid-sensitive and fat-suppressed, 1 for fluid-sensitive, else 0: by the
        description, where it does not tell by echo and repetition time."""
        words = self.words
        if self.is_t1:
            return 0
        if not FLUID.search(words):
            return int(self.weighting == "fluid")
        is_water = DIXON.search(words) and DIXON_WATER.search(words)
        is_water = is_water or (self.frames and all(frame.is_water for frame in self.frames))
        is_suppressed = is_water or FAT_SUPPRESSED.search(words)
        return 2 if is_suppressed and not NOT_SUPPRESSED.search(words) else 1

    def suits(self, t1):
        """2 for a series of the wanted contrast, 0 for one of the other, 1 where nothing tells; as
        a T1, only where there is no description either.

        Args:
            t1: whether T1 is wanted, not fluid-sensitive.
        """
        if t1:
            return 2 if self.is_t1 else int(not self.words and not self.contrast)
        return 0 if self.is_t1 else 2 if self.contrast else 1

    def rank(self, axis, wanted, t1):
        """Sort key, the highest is taken: named by the user, of the wanted contrast, usable,
        fat-suppressed, native, straight, slices, original; `t1` as `suits` takes it."""
        kind = self.is_wanted(wanted), self.suits(t1), not self.fault, self.contrast
        slices = len(self.through) == 1, -self.tilt(axis), self.slices(axis)
        return *kind, *slices, self.is_original

    @property
    def is_close(self):
        """Whether its slices are as close to each other as no localiser's."""
        return max(self.spacing) <= LOCALISER_STEP

    def tilt(self, axis):
        """How far slices across `axis` are from the nearest plane, in steps of TILT: a little is
        usual, as along a ligament; much is another picture."""
        return int(plane_of(self.directions[axis])[1] / TILT)

    @property
    def is_original(self):
        """Whether ImageType says that it is computed from no other images."""
        return all(frame.is_original for frame in self.frames)

    def is_wanted(self, patterns):
        """Whether the user named it, by number or part of the description."""
        return any(self.matches(pattern) for pattern in patterns)

    def matches(self, pattern):
        if pattern.isdecimal():
            return str(self.number) == pattern
        return pattern.lower() in self.description.lower()


def ways_to_cut(spacing, thickest):
    """Array axes that may become slices: each of a near-isotropic 3-D scan, else the thickest."""
    return (0, 1, 2) if max(spacing) < ISOTROPIC * min(spacing) else (thickest,)


# --- DICOM ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Frame:
    """Attributes of one DICOM frame; None where missing or unusable."""

    file: File
    index: int
    size: tuple  # rows, columns
    position: tuple | None  # of the first pixel's centre, mm
    orientation: tuple | None  # direction along which columns grow, then along which rows grow
    spacing: tuple | None  # mm between rows, between columns
    echo: float  # ms, 0 if unknown
    slope: float
    intercept: float
    inverted: bool
    is_water: bool  # the water picture of a Dixon scan, by ImageType
    side: str  # L, R, B or ""
    repetition: float = 0.0  # ms, 0 if unknown
    is_gradient: bool = False  # a gradient echo
    has_agent: bool = False  # contrast agent was given
    is_original: bool = True  # not derived from other images, by ImageType
    number: float | None = None  # that the scanner gave the image
    bits: tuple = (16, 16, 15, 0)  # values of BITS, None where missing


class Patient(NamedTuple):
    """Whose a file is, "" where it does not say. It identifies: never print it."""

    number: str = ""
    issuer: str = ""  # of the number
    name: str = ""
    birth: str = ""

    def contradicts(self, other):
        """Whether two files cannot be of one patient: by number and its issuer; where one of them
        has no number by name and birth date. What a file leaves out contradicts nothing."""
        has_numbers = self.number and other.number
        pairs = zip(self, other, strict=True)
        told = itertools.islice(pairs, 2) if has_numbers else itertools.islice(pairs, 2, 4)
        return any(a and b and a != b for a, b in told)


class Header(NamedTuple):
    """What is used of the header of one DICOM file."""

    study: str  # UID
    series: str  # UID
    title: tuple  # series number or None, description
    instance: str  # UID of the image, or ""
    patient: Patient
    said: str  # the side that its titles name: L, R or ""
    frame: str  # UID of the frame of reference, or ""
    frames: list  # of Frame
    reason: str  # why there are none, or ""


def numbers(value, count):
    """`count` finite floats, or None."""
    try:
        values = tuple(float(v) for v in value)
    except (TypeError, ValueError):
        return None
    return values if len(values) == count and np.isfinite(values).all() else None


def optional(header, index, sequence, name):
    """A number that an image can do without, looked up as by `lookup`: float, of several values the
    first; None if there is none, or no number."""
    try:
        value = float(np.ravel(lookup(header, index, sequence, name))[0])
    except (TypeError, ValueError, IndexError, OverflowError):
        return None
    return value if np.isfinite(value) else None


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


def part_of(header):
    """The part of the body, "ANKLE", that a header names where it is no knee, or ''."""
    regions = lookup(header, 0, "FrameAnatomySequence", "AnatomicRegionSequence") or ()
    named = [text_of(header, "BodyPartExamined"), *(text_of(r, "CodeMeaning") for r in regions)]
    titles = " ".join(titles_of(header))
    return other_part(" ".join(named), titles, text_of(header, "StudyDescription"))


def titles_of(header):
    """What a series is called: description and protocol."""
    return text_of(header, "SeriesDescription"), text_of(header, "ProtocolName")


def side_said(header):
    """The side that a series' titles name, else its study's: L, R, or '' for none or both."""
    of_series = set().union(*map(sides_in, titles_of(header)))
    return only_side(of_series or sides_in(text_of(header, "StudyDescription")))


def only_side(sides):
    """The one of a set, '' of none or both."""
    return "".join(sides) if len(sides) == 1 else ""


def why_not(file, header, count):
    """Why a file holds no slice of a knee volume, or ''."""
    rows, columns, samples = (header.get(k) for k in ("Rows", "Columns", "SamplesPerPixel"))
    modality = str(header.get("Modality") or "")
    kinds = [str(v).upper() for v in header.get("ImageType") or ()]
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
    if count < 1:
        return NO_FRAMES
    for kind in kinds:
        if word := NO_PICTURES.get(kind.replace("_", " ")):
            return word
    if text_of(header, "SOPClassUID").startswith(SCREEN_CAPTURE) and not lookup(
        header, 0, "PlanePositionSequence", "ImagePositionPatient"
    ):
        return "screen capture"
    if other := other_picture(words_of(description_of(header)), kinds_of(header)):
        return other
    if count > MAX_FRAMES or rows * columns * count > MAX_VOXELS:
        return f"{TOO_LARGE} ({count} x {rows} x {columns})"
    return ""


def read_header(file, only_knees=True):
    """One DICOM file, all but its pixels -> Header.

    Args:
        only_knees: leave out what its header calls another part of the body.
    """
    header = read_dicom(file, HEADER)
    with reading(file):
        count = int(header.get("NumberOfFrames") or 1)
        number = optional(header, 0, "", "SeriesNumber")
        title = None if number is None else int(number), description_of(header)
        reason = why_not(file, header, count)
        if not reason and only_knees and (part := part_of(header)):
            reason = f"{part} {OTHER_PART}"
        return Header(
            # the path's folder is no UID: it holds a slash
            study=text_of(header, "StudyInstanceUID") or f"folder {file.folder.resolve()}",
            series=text_of(header, "SeriesInstanceUID") or str(title),
            title=title,
            instance=text_of(header, "SOPInstanceUID"),
            patient=Patient(*(text_of(header, name) for name in PATIENT)),
            said=side_said(header),
            frame=text_of(header, "FrameOfReferenceUID"),
            frames=[] if reason else read_frames(header, file, count),
            reason=reason,
        )


def kinds_of(header):
    """What kind of picture ImageType says it is, set of upper-case words: its values from the third
    on (PS3.3 C.8.3.1.1.1)."""
    values = itertools.islice(header.get("ImageType") or (), 2, TEXT)
    return {str(value).upper() for value in values}


def description_of(header):
    return str(header.get("SeriesDescription") or header.get("ProtocolName") or "")[:60]


def text_of(header, name):
    """An attribute as text without the padding, "" if it is not there."""
    return str(header.get(name) or "")[:TEXT].strip(" \0")


def read_frames(header, file, count):
    """The frames of one file: list of Frame."""
    pulses = {str(v) for v in np.ravel(header.get("ScanningSequence") or "")}
    agent = text_of(header, "ContrastBolusAgent").lower() not in NO_AGENTS
    of_file = {
        "bits": tuple(header.get(name) for name in BITS),
        "inverted": str(header.PhotometricInterpretation).strip() == "MONOCHROME1",
        "is_water": bool(WATER_KINDS & kinds_of(header)),
        "is_gradient": "GR" in pulses or text_of(header, "EchoPulseSequence") == "GRADIENT",
        "has_agent": agent or bool(header.get("ContrastBolusAgentSequence")),
        "is_original": str(np.ravel(header.get("ImageType") or "")[0]).upper() != "DERIVED",
        "number": optional(header, 0, "", "InstanceNumber"),
    }
    return [read_frame(header, file, i, of_file) for i in range(count)]


def read_frame(header, file, i, of_file):
    """Frame i; `of_file` is what all frames of its file have in common."""
    rescale = "PixelValueTransformationSequence"
    echo = optional(header, i, "MREchoSequence", "EffectiveEchoTime")
    echo = echo or optional(header, i, "MREchoSequence", "EchoTime")
    timing = "MRTimingAndRelatedParametersSequence"
    # A wrong slope would change the pixels: no number here is a fault.
    slope = lookup(header, i, rescale, "RescaleSlope")
    side = lookup(header, i, "FrameAnatomySequence", "FrameLaterality")
    side = str(side or header.get("ImageLaterality") or header.get("Laterality") or "")
    side = side.strip().upper()[:1]
    return Frame(
        file,
        i,
        (int(header.Rows), int(header.Columns)),
        numbers(lookup(header, i, "PlanePositionSequence", "ImagePositionPatient"), 3),
        numbers(lookup(header, i, "PlaneOrientationSequence", "ImageOrientationPatient"), 6),
        numbers(lookup(header, i, "PixelMeasuresSequence", "PixelSpacing"), 2),
        echo=max(echo or 0.0, 0.0),
        slope=float(1 if slope is None else slope),
        intercept=float(lookup(header, i, rescale, "RescaleIntercept") or 0),
        side=side if side in ("L", "R", "B") else "",
        repetition=max(optional(header, i, timing, "RepetitionTime") or 0.0, 0.0),
        **of_file,
    )


def series_name(title):
    number, description = title
    return f"series {'?' if number is None else number} '{description}'"


def assemble(title, frames, frame_of_reference):
    """The frames of one DICOM series -> Series, slices ordered along their normal; or why not."""
    placed = [f for f in frames if f.position and f.orientation and f.spacing]
    if not placed and len(frames) >= MIN_SLICES:
        return NO_GEOMETRY
    if not placed:  # too few for a plane: a screen capture that does not call itself one
        return f"fewer than {MIN_SLICES} slices, without geometry"
    axes = np.array([f.orientation for f in placed]).reshape(-1, 2, 3)
    if np.abs(axes - axes[0]).max() > 0.02:  # about 1 degree
        middle = np.median(axes, axis=0)
        most = (np.abs(axes - middle) <= 0.02).all(axis=(1, 2)).sum()
        is_volume = most >= MIN_SLICES and most >= MOSTLY * len(placed)
        return FOREIGN if is_volume else "several orientations"
    across, down = axes[0]
    if np.abs(axes[0] @ axes[0].T - np.eye(2)).max() > 0.02 or min(placed[0].spacing) <= 0:
        return NO_ROTATION
    normal = np.cross(across, down)
    depth = {id(f): float(normal @ f.position) for f in placed}  # mm
    is_part = len({round(d, 2) for d in depth.values()}) < len(placed)
    if is_part:
        # several pictures of one place: a Dixon scan's water, and of echoes the last, which is the
        # most fluid-sensitive
        best = max((f.is_water, f.echo) for f in placed)
        frames, placed = (
            [f for f in some if (f.is_water, f.echo) == best] for some in (frames, placed)
        )
    if len(placed) < MIN_SLICES:
        return f"fewer than {MIN_SLICES} slices"
    placed.sort(key=lambda f: depth[id(f)])
    frames, placed, several = without_repeats(frames, placed, depth)
    depths = [depth[id(f)] for f in placed]
    step = statistics.median(b - a for a, b in itertools.pairwise(depths))
    spacing = np.array([max(step, SAME_PLACE), *placed[0].spacing])
    shape, through = (len(placed), *placed[0].size), ways_to_cut(spacing, 0)
    fault = several or geometry_fault(frames, placed, depths, step) or place_fault(placed, normal)
    fault = fault or width_fault(placed[0].file, shape, spacing, through) or bits_fault(placed)
    sides = {f.side for f in placed} - {""}
    return Series(
        file=placed[0].file,
        name=series_name(title),
        number=title[0],
        description=title[1],
        shape=shape,
        directions=np.array([normal, down, across]),
        spacing=spacing,
        origin=np.array(placed[0].position),
        through=through,
        load=functools.partial(read_pixels, placed),
        side=sides.pop() if len(sides) == 1 else "B" if sides else "",
        frame=frame_of_reference,
        fault=fault or scale_fault(placed),
        doubt="" if is_part else end_doubt(placed),
        frames=tuple(placed),
    )


def without_repeats(frames, placed, depth):
    """Of frames that show each place equally often, as a scan repeated over time does, one a place.

    Args:
        frames: all of a series.
        placed: those of them with a place, in order of their depth.
        depth: {id of a frame: mm}.

    Returns:
        frames, placed, and why they cannot be used, or ''.
    """
    near = [[placed[0]]]
    for before, frame in itertools.pairwise(placed):
        if depth[id(frame)] - depth[id(before)] < SAME_PLACE:
            near[-1].append(frame)
        else:
            near.append([frame])
    counts = {len(of_place) for of_place in near}
    if len(near) < MIN_SLICES or len(counts) > 1 or counts == {1}:
        return frames, placed, ""
    first = [of_place[0] for of_place in near]
    several = f"several time points at one place ({counts.pop()} pictures of each)"
    return first, first, f"{placed[0].file}: {several}; export one of them as a series"


def width_fault(file, shape, spacing, through):
    """Why a volume has no knee's size, or ''.

    Args:
        shape, spacing, through: as Series has them.
    """
    widths = np.array(shape) * spacing  # mm
    in_plane = [axis for axis in range(3) if through != (axis,)]
    # A scan of equal voxels may be thin along one of the axes that it is cut across.
    smallest = sorted(widths[in_plane])[-2]
    if WIDTHS[0] <= smallest and widths.max() <= WIDTHS[1]:
        return ""
    sides = " x ".join(f"{width:.3g}" for width in widths[in_plane])
    return (
        f"{file}: {sides} mm, slices of a knee are {WIDTHS[0]:.0f} to {WIDTHS[1]:.0f} mm wide; "
        "correct the pixel spacing"
    )


def bits_fault(placed):
    """Why the headers of a series do not say how its pixels are stored, or ''."""
    for frame in placed:
        values = dict(zip(BITS, frame.bits, strict=True))
        allocated, stored, high, signed = frame.bits
        if stored is None or high is None:  # some leave out what the others tell
            stored, high = stored or allocated, (stored or allocated or 0) - 1
        try:
            is_sound = allocated in (8, 16, 32, 64) and 1 <= stored <= allocated
            is_sound = is_sound and high == stored - 1 and signed in (0, 1)
        except TypeError:
            is_sound = False
        if not is_sound:
            said = ", ".join(f"{name} {value}" for name, value in values.items())
            return f"{frame.file}: {said:.200}: no such pixels; export it again"
        first = placed[0]
        ours, theirs = ((f.bits[0], f.bits[3], f.inverted) for f in (frame, first))
        if ours != theirs:
            return (
                f"{frame.file}: BitsAllocated, PixelRepresentation or PhotometricInterpretation "
                f"is another than in {first.file}; export the series again"
            )
    return ""


def scale_fault(placed):
    """Why the slopes and intercepts of a series cannot all be right, or ''."""
    usual = statistics.median(frame.slope for frame in placed if frame.slope > 0) or 1.0
    for frame in placed:
        is_sound = math.isfinite(frame.intercept) and frame.slope > 0
        if not (is_sound and usual / UNLIKE <= frame.slope <= usual * UNLIKE):
            return (
                f"{frame.file}: RescaleSlope {frame.slope:g} and RescaleIntercept "
                f"{frame.intercept:g} beside slopes of about {usual:g}; export it again"
            )
    return ""


def geometry_fault(frames, placed, depths, step):
    """What is wrong with the slices' places or sizes: one line with file and fix, or ''."""
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


def place_fault(placed, normal):
    """Why the slices, in order, are not of one stack, or ''."""
    for a, b in itertools.pairwise(placed):
        moved = np.subtract(b.position, a.position)
        moved = float(np.linalg.norm(moved - (moved @ normal) * normal))
        if moved > JUMP:
            return (
                f"{b.file}: {moved:.0f} mm beside {a.file}, so it is of another place, perhaps of "
                "the other knee; give one knee's files on their own"
            )
    return ""


def end_doubt(placed):
    """That slices, in order, may lack some at one end, where no gap shows it, or ''. No fault: some
    scanners count on from the series before."""
    counted = [frame.number or 0 for frame in placed]
    steps = {b - a for a, b in itertools.pairwise(counted)}
    first, last = min(counted), max(counted)
    if first <= 1 or steps not in ({1}, {-1}):
        return ""
    return f"slices may be missing at one end: its files are numbered {first:.0f} to {last:.0f}"


def decode(file, size):
    """The pixels of one DICOM file, as stored: (frames, rows, columns) with `size` of a frame; NaN
    where its scanner had nothing to show (padding)."""
    from pydicom.pixels import get_decoder
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    with reading(file):
        data = read_dicom(file, stop_before_pixels=False)
        if "TransferSyntaxUID" not in data.file_meta:  # without preamble
            is_implicit, _ = data.original_encoding
            data.file_meta.TransferSyntaxUID = (
                ImplicitVRLittleEndian if is_implicit else ExplicitVRLittleEndian
            )
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
        check_length(file, data, syntax.is_encapsulated)
        if syntax.is_encapsulated:
            check_codestreams(file, data, has_size="RLE" not in syntax.name)
        pixels = data.pixel_array.reshape(-1, *size)
        padding, limit = data.get("PixelPaddingValue"), data.get("PixelPaddingRangeLimit")
        if not is_pixel_value(padding, data.BitsAllocated):  # none, or a wrong header
            return pixels
        limit = limit if is_pixel_value(limit, data.BitsAllocated) else padding
        ends = np.array([padding, limit]).astype(pixels.dtype)  # 63536 is written for -2000
        is_signal = (pixels < ends.min()) | (pixels > ends.max())
        return np.where(is_signal, pixels, np.float32(np.nan))


def is_pixel_value(value, bits):
    """Whether a header's value is a whole number of so many bits, with or without a sign."""
    return isinstance(value, int) and -(2 ** (bits - 1)) <= value < 2**bits


def check_length(file, data, is_packed):
    """Raise InputError where a file's pixel data are not as long as its header says: of compressed
    ones where they are far longer, which no compression is."""
    frames, there = int(data.get("NumberOfFrames") or 1), len(data.get("PixelData") or b"")
    needed = -(-frames * data.Rows * data.Columns * data.BitsAllocated // 8)
    if there < needed and not is_packed:
        raise InputError(f"{file}: pixel data ends after {there} of {needed} bytes, {COPY_AGAIN}")
    if there > (2 * needed + 2**16 if is_packed else needed + needed % 2):
        raise InputError(
            f"{file}: {there} bytes of pixel data, its header says {needed} "
            f"({data.Rows} x {data.Columns} px of {data.BitsAllocated} bits); export it again"
        )


def check_codestreams(file, data, has_size):
    """Raise InputError where a compressed frame is of another size than its header says.

    Args:
        has_size: whether each frame tells its size, as all but RLE do.
    """
    from pydicom.encaps import generate_frames

    wanted = data.Rows, data.Columns, 1
    count = int(data.get("NumberOfFrames") or 1)
    for frame in generate_frames(data.PixelData, number_of_frames=count) if has_size else ():
        *size, bits = codestream_size(frame)
        if tuple(size) != wanted or bits > data.BitsAllocated:
            raise InputError(
                f"{file}: a frame of {size[0]} x {size[1]} px of {bits} bits where its header says "
                f"{data.Rows} x {data.Columns} of {data.BitsAllocated}; export it again"
            )


def codestream_size(data):
    """Rows, columns, components and bits of a JPEG, JPEG-LS or JPEG 2000 image, by its own header
    (ISO 10918-1 B.2.2, ISO 14495-1 C.2.2, ISO 15444-1 A.5.1); zeros where it has none."""
    if data[:4] == b"\xff\x4f\xff\x51":
        right, bottom, left, top = struct.unpack(">4I", data[8:24])
        components, bits = struct.unpack(">HB", data[40:43])
        return bottom - top, right - left, components, (bits & 127) + 1
    at = 2
    while data[:2] == b"\xff\xd8" and at + 10 <= len(data):
        marker, size = struct.unpack(">xBH", data[at : at + 4])
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            bits, rows, columns, components = struct.unpack(">BHHB", data[at + 4 : at + 10])
            return rows, columns, components, bits
        at += 2 + size
    return 0, 0, 0, 0


def read_pixels(frames):
    """Frames in order -> float32 (s, rows, columns), rescaled, bright where the signal is high.

    Raises:
        InputError: a file is damaged, or not of this series by its grey levels.
    """
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
    check_levels(frames, grey)
    return grey


def check_levels(frames, grey):
    """Raise InputError where a slice's grey levels, float32 (s, H, W), are far from the others'."""
    low = np.array([np.fmin.reduce(image, axis=None) for image in grey], float)
    high = np.array([np.fmax.reduce(image, axis=None) for image in grey], float)
    seen = ~np.isnan(low)  # all of a slice may be padding
    if not seen.any():
        return
    greatest, span = np.maximum(abs(low), abs(high)), np.median((high - low)[seen])
    slopes, intercepts = np.array([(f.slope, f.intercept) for f in frames]).T
    # Slices of other slopes may have one offset before them.
    shift = abs(intercepts - slopes * np.median(intercepts / slopes))
    most = UNLIKE * np.median(greatest[seen])
    is_odd = seen & ~((greatest <= most) & (shift <= SHIFT * span))
    if is_odd.any():
        k = int(np.argmax(is_odd))
        raise InputError(
            f"{frames[k].file}: grey levels up to {greatest[k]:.3g} by RescaleSlope "
            f"{frames[k].slope:g} and RescaleIntercept {frames[k].intercept:g}, far from the other "
            "slices'; export it again"
        )


# --- NIfTI ----------------------------------------------------------------------------------------


def open_nifti(file):
    """A NIfTI-1 or NIfTI-2 image in memory, and its header as the file has it."""
    import nibabel

    data = file.read()
    sizes = int.from_bytes(data[:4], "little"), int.from_bytes(data[:4], "big")  # sizeof_hdr
    if 348 in sizes:
        kind = nibabel.Nifti1Image
    elif 540 in sizes:
        kind = nibabel.Nifti2Image
    else:
        raise InputError(f"{file}: no NIfTI header, {COPY_AGAIN}")
    header = kind.header_class.from_fileobj(io.BytesIO(data), check=False)
    there = len(data) - int(header["vox_offset"])
    needed = np.prod(header.get_data_shape(), dtype=float) * header["bitpix"] / 8
    if there != needed:
        raise InputError(
            f"{file}: {there} bytes of voxels, its header says {needed:.0f}; {COPY_AGAIN}"
        )
    return kind.from_bytes(data), header


def nifti_fault(file, header):
    """Why a NIfTI header cannot be right, or ''. A slope of 0 is none."""
    for name, values in (
        ("pixdim", header["pixdim"][1:4]),
        ("scl_slope", header["scl_slope"] or 1),
    ):
        if not (np.isfinite(values) & (values > 0)).all():
            return f"{file}: {name} {values} is not above 0; correct it"
    if not np.isfinite(header["scl_inter"]):
        return f"{file}: scl_inter {header['scl_inter']} is no number; correct it"
    return ""


def read_nifti(file):
    """Header of one NIfTI file -> Series, or why it is none. Raises InputError."""
    with reading(file):
        image, header = open_nifti(file)
        shape, affine, kind = image.shape, image.affine, image.get_data_dtype().kind
        coded = int(header["sform_code"]) or int(header["qform_code"])
        fault = nifti_fault(file, header)
    volumes = np.prod(shape[3:], dtype=float)
    if kind not in "iuf":
        return "colour or complex voxels"
    if len(shape) < 3 or min(shape[:3]) < 2:
        return f"no volume, shape {shape}"
    if volumes != 1:
        return f"{SEVERAL_VOLUMES} ({volumes:.0f}); split off the one to use"
    if np.prod(shape, dtype=float) > MAX_VOXELS:
        return f"{TOO_LARGE}, shape {shape}"
    if not coded:
        return NOT_CODED
    description = re.sub(r"\.nii(\.gz)?$", "", file.name, flags=re.IGNORECASE)
    if other := other_picture(words_of(description)):
        return other
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not (np.isfinite(affine).all() and (spacing > 0).all()):
        return NO_AFFINE
    directions = (affine[:3, :3] / spacing).T * (-1, -1, 1)  # RAS -> LPS
    if abs(np.linalg.det(directions)) < 0.9:
        return SHEARED
    through = ways_to_cut(spacing, int(np.argmax(spacing)))
    if max(shape[axis] for axis in through) < MIN_SLICES:
        return f"fewer than {MIN_SLICES} slices"
    found = Series(
        file=file,
        name=f"file '{file.name}'",
        number=None,
        description=description,
        shape=shape[:3],
        directions=directions,
        spacing=spacing,
        origin=affine[:3, 3] * (-1, -1, 1),
        through=through,
        load=functools.partial(read_voxels, file),
        said=only_side(sides_in(description)),
        fault=fault or width_fault(file, shape[:3], spacing, through),
    )
    return "localiser" if says_loc(found.words) and not found.is_close else found


def read_voxels(file):
    """float32 (i, j, k), scaled by scl_slope and scl_inter."""
    with reading(file):
        grey = open_nifti(file)[0].get_fdata(dtype=np.float32)
        return grey.reshape(grey.shape[:3])
