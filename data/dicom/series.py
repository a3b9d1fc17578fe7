"""DICOM and NIfTI files read into series: each a volume that may be taken, described by its header.

Patient coordinates are DICOM's, in mm: x grows to the patient's left, y to posterior, z to superior
(LPS; PS3.3 C.7.6.2.1.1). NIfTI's affine counts x to the right and y to anterior and is turned.
"""

import functools
import io
import itertools
import re
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from common.errors import InputError
from data.dicom import files
from data.dicom.files import COPY_AGAIN, File, reading
from data.dicom.slices import plane_of
from data.dicom.words import (
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
# The first element of a DICOM file without preamble: of group 2 or 8, little endian, its value's
# type given or, if this is implicit, its length less than 256 bytes.
BARE = re.compile(rb"[\2\10]\0.\0([A-Z]{2}|.\0\0\0)", re.DOTALL)
DEFLATED = b"1.2.840.10008.1.2.1.99"  # the transfer syntax that is zlib as a whole
ZLIB_BEST = 1032  # zlib's highest compression ratio
MR_IMAGES = ("1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1")  # SOP classes
SCREEN_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # how the SOP classes of secondary captures begin
NO_IMAGE = "no image"  # reports, presentation states, DICOMDIR ...
# Why a series of images cannot be placed or taken as one volume: it may be any plane.
NO_GEOMETRY = "no ImagePositionPatient, ImageOrientationPatient or PixelSpacing"
NO_ROTATION = "ImageOrientationPatient is no rotation, or PixelSpacing is not positive"
TOO_LARGE = "too large"
FOREIGN = "slices of another orientation among them"
SEVERAL_VOLUMES = "several volumes in one file"
NOT_CODED = "sform_code and qform_code are 0, left and right unknown"
NO_AFFINE = "no geometry in its affine"
SHEARED = "its affine is sheared"
UNPLACED = (NO_GEOMETRY, NO_ROTATION, TOO_LARGE, FOREIGN, SEVERAL_VOLUMES, NOT_CODED, NO_AFFINE,
            SHEARED)  # fmt: skip
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
    "InstanceNumber",
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
    for kind in kinds:
        if word := NO_PICTURES.get(kind.replace("_", " ")):
            return word
    if text_of(header, "SOPClassUID").startswith(SCREEN_CAPTURE) and not lookup(
        header, 0, "PlanePositionSequence", "ImagePositionPatient"
    ):
        return "screen capture"
    if other := other_picture(words_of(description_of(header)), kinds_of(header)):
        return other
    if rows * columns * count > MAX_VOXELS:
        return f"{TOO_LARGE} ({count} x {rows} x {columns})"
    return ""


def is_dicom(head):
    """Whether a file's first 132 bytes or more are DICOM's, with or without preamble."""
    return head[128:132] == b"DICM" or bool(BARE.match(head))


def read_header(file, only_knees=True):
    """One DICOM file, all but its pixels -> Header.

    Args:
        only_knees: leave out what its header calls another part of the body.
    """
    import pydicom

    with reading(file), file.open() as stream:
        head = file.head(1024)
        if DEFLATED in head and len(file.read()) > files.MAX_BYTES // ZLIB_BEST:
            raise InputError(f"{file}: a large deflated file; inflate it with dcmconv first")
        header = pydicom.dcmread(
            stream, stop_before_pixels=True, specific_tags=HEADER, force=is_dicom(head)
        )
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
            frames=[] if reason else [read_frame(header, file, i) for i in range(count)],
            reason=reason,
        )


def kinds_of(header):
    """What kind of picture ImageType says it is, set of upper-case words: its values from the third
    on (PS3.3 C.8.3.1.1.1)."""
    return {str(value).upper() for value in list(header.get("ImageType") or ())[2:]}


def description_of(header):
    return str(header.get("SeriesDescription") or header.get("ProtocolName") or "")[:60]


def text_of(header, name):
    """An attribute as text without the padding, "" if it is not there."""
    return str(header.get(name) or "").strip(" \0")


def read_frame(header, file, i):
    rescale = "PixelValueTransformationSequence"
    echo = optional(header, i, "MREchoSequence", "EffectiveEchoTime")
    echo = echo or optional(header, i, "MREchoSequence", "EchoTime")
    timing = "MRTimingAndRelatedParametersSequence"
    pulses = {str(v) for v in np.ravel(header.get("ScanningSequence") or "")}
    agent = text_of(header, "ContrastBolusAgent").lower() not in NO_AGENTS
    agent = agent or bool(header.get("ContrastBolusAgentSequence"))
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
        echo or 0.0,
        float(1 if slope is None else slope),
        float(lookup(header, i, rescale, "RescaleIntercept") or 0),
        str(header.PhotometricInterpretation).strip() == "MONOCHROME1",
        bool(WATER_KINDS & kinds_of(header)),
        side if side in ("L", "R", "B") else "",
        repetition=optional(header, i, timing, "RepetitionTime") or 0.0,
        is_gradient="GR" in pulses or text_of(header, "EchoPulseSequence") == "GRADIENT",
        has_agent=agent,
        is_original=str(np.ravel(header.get("ImageType") or "")[0]).upper() != "DERIVED",
        number=optional(header, i, "", "InstanceNumber"),
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
    depths = [depth[id(f)] for f in placed]
    step = statistics.median(b - a for a, b in itertools.pairwise(depths))
    spacing = np.array([max(step, SAME_PLACE), *placed[0].spacing])
    sides = {f.side for f in placed} - {""}
    return Series(
        file=placed[0].file,
        name=series_name(title),
        number=title[0],
        description=title[1],
        shape=(len(placed), *placed[0].size),
        directions=np.array([normal, down, across]),
        spacing=spacing,
        origin=np.array(placed[0].position),
        through=ways_to_cut(spacing, 0),
        load=functools.partial(read_pixels, placed),
        side=sides.pop() if len(sides) == 1 else "B" if sides else "",
        frame=frame_of_reference,
        fault=geometry_fault(frames, placed, depths, step) or place_fault(placed, normal),
        doubt="" if is_part else end_doubt(placed),
        frames=tuple(placed),
    )


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
    import pydicom
    from pydicom.pixels import get_decoder
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    with reading(file):
        data = pydicom.dcmread(io.BytesIO(file.read()), force=True)  # its header was read
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
        frames = int(data.get("NumberOfFrames") or 1)
        needed = frames * data.Rows * data.Columns * data.BitsAllocated // 8
        there = len(data.get("PixelData") or b"")
        if not syntax.is_encapsulated and there < needed:
            raise InputError(
                f"{file}: pixel data ends after {there} of {needed} bytes, {COPY_AGAIN}"
            )
        pixels = data.pixel_array.reshape(-1, *size)
        padding, limit = data.get("PixelPaddingValue"), data.get("PixelPaddingRangeLimit")
        if not isinstance(padding, int):  # none, or a wrong header
            return pixels
        limit = limit if isinstance(limit, int) else padding
        ends = np.array([padding, limit]).astype(pixels.dtype)  # 63536 is written for -2000
        is_signal = (pixels < ends.min()) | (pixels > ends.max())
        return np.where(is_signal, pixels, np.float32(np.nan))


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
    return Series(
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
    )


def read_voxels(file):
    """float32 (i, j, k), scaled by scl_slope and scl_inter."""
    with reading(file):
        grey = open_nifti(file).get_fdata(dtype=np.float32)
        return grey.reshape(grey.shape[:3])
