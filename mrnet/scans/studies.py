"""Studies found under a folder, each knee of them an exam, and the volumes taken from it.

An exam's name is a hash of its study's UID with the knee's side, so the same study has the same
name in every run, whatever lies beside it, and it holds no identifier. NIfTI files have no UID:
there the hash is of the folder's path.
"""

import hashlib
import itertools
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from mrnet.errors import InputError
from mrnet.files import MAX_BYTES
from mrnet.layout.names import exam_name
from mrnet.layout.planes import ORIENTATION, T1_PLANES, TARGET
from mrnet.scans.files import find_files, is_dicom, read_dicom, reading
from mrnet.scans.knees import split_knees
from mrnet.scans.pixels import window
from mrnet.scans.series import (
    MIN_SLICES,
    NO_IMAGE,
    OTHER_PART,
    UNPLACED,
    Patient,
    Series,
    assemble,
    read_header,
    read_nifti,
    series_name,
)
from mrnet.scans.slices import cut, mirrored, plane_of
from mrnet.scans.words import says_loc, words_of

OBLIQUE = 30.0  # degrees from the nearest plane, above which the user is warned
LOST = 0.1  # of a series' files: as many unreadable ones beside them may have been its slices
# Words in a NIfTI file's name that tell the plane or the contrast, not whose it is.
PLANE_WORDS = {"axial": "ax axial tra transverse", "coronal": "co cor coronal",
               "sagittal": "sa sag sagittal"}  # fmt: skip
PLANE_OF_WORD = {word: plane for plane, words in PLANE_WORDS.items() for word in words.split()}
CONTRAST_WORD = re.compile(
    "pdw?|t[12]w?|proton|density|fs|fat|sat|fatsat|fatsup|spair|spir|stir|tirm|water|dixon|dess|gre|"
    "[tf]?se|3d|post|pre|iso|wo|non|no"
)
NO_SIDE = "left or right knee is not recorded, and right ones have to be mirrored; "
LATERALITY = "write Laterality into its files (dcmodify -i 0020,0060=L)"
NO_LATERALITY = (
    "call it left_knee_sag.nii.gz, say, or give its DICOM; or take networks of unmirrored knees"
)


@dataclass
class Study:
    """One DICOM study, or one folder of NIfTI files. `uid` and `patients` identify: never print."""

    uid: str = ""
    is_dicom: bool = True
    files: list = field(default_factory=list)
    series: list = field(default_factory=list)
    skipped: Counter = field(default_factory=Counter)  # (series, why) -> files
    patients: set = field(default_factory=set)  # series.Patient of the files with images
    unread: list = field(default_factory=list)  # files beside it that cannot be read

    def add(self, found, name, count=1):
        """A Series, or the reason why `count` files of the series `name` are none."""
        if isinstance(found, Series):
            self.series.append(found)
        else:
            self.skipped[name, found] += count

    @property
    def patient(self):
        """Text that identifies the patient, "" if unknown: the number, else name and birth date.

        Not the number's issuer, which some studies leave out: a patient would become two, whose
        exams splits may part. Equal numbers of two hospitals are one patient instead.
        """
        one = self.identity
        if one.number:
            return f"{one.number}|"
        return f"{one.name}|{one.birth}" if one.name else ""

    @property
    def identity(self):
        """The Patient of the file that tells most."""

        def told(one):
            return bool(one.number), bool(one.name), one.issuer if one.number else one.birth

        return max(self.patients, key=told, default=Patient())

    @property
    def mixed(self):
        """Why its files are not all of one patient or exam, or ''."""
        for a, b in itertools.combinations(self.patients, 2):
            if a.contradicts(b):
                return "files of two patients under one study UID; export both again"
        return "" if self.is_dicom else exams_mixed(self.series)

    @property
    def folder(self):
        """The folder that all its files lie in."""
        return Path(os.path.commonpath([file.folder for file in self.files]))

    def has_folder_of(self, series):
        """Whether a series lies in folders of its own, so that what is unreadable there is its."""
        ours = {frame.file.folder for frame in series.frames}
        others = (f.file.folder for one in self.series if one is not series for f in one.frames)
        return ours.isdisjoint(others)

    @property
    def has_images(self):
        return bool(self.series) or any(reason != NO_IMAGE for _, reason in self.skipped)


@dataclass
class Exam:
    """One knee of a study."""

    name: str
    source: str  # its study's folder, relative to what the user named
    study: Study
    side: str  # L, R or "" if unknown
    series: list
    refused: str  # why none of it may be used, or ""

    @property
    def title(self):
        return f"{self.name} ({self.source})"


def find_exams(source, report):
    """Read every header under `source` -> list of Exam, in the order of their paths."""
    base = source if source.is_dir() else source.parent
    exams = []
    for study in find_studies(source, report):
        folder = Path(os.path.relpath(study.folder, base)).as_posix()
        if not study.has_images:
            report.log(f"skipped: files without an image in {folder}: {len(study.files)}")
            continue
        mixed = study.mixed
        for side, (series, torn) in sorted(split_knees(study.series, study.is_dicom).items()):
            name = exam_name(study.uid, side)
            exams.append(Exam(name, folder, study, side, series, mixed or torn))
    names = Counter(exam.name for exam in exams)
    for name, count in names.items():
        if count > 1:
            raise InputError(f"{source}: {count} studies would be called {name}; give one of them")
    return exams


def find_studies(source, report):
    """Every Study under `source`, in the order of their first files."""
    studies, headers, directories, others = {}, defaultdict(list), [], 0
    files, unread = find_files(source, report)
    for file in tqdm(files, desc="headers", unit="file", disable=None, leave=False):
        try:
            with reading(file):
                head = file.head(132)
            if is_dicom(head):
                header = read_header(file)
                key = header.study
                study = studies.setdefault(key, Study(header.study))
                if any(header.patient) and header.reason != NO_IMAGE:
                    study.patients.add(header.patient)
                headers[key, header.series].append(header)
                if header.reason:
                    study.add(header.reason, series_name(header.title))
            elif file.name.lower().endswith((".nii", ".nii.gz")):
                found = read_nifti(file)
                key = f"folder {file.folder.resolve()}"
                study = studies.setdefault(("nifti", key), Study(key, is_dicom=False))
                study.add(found, f"file '{file.name}'")
            else:
                others += 1
                continue
            study.files.append(file)
            if file.name.upper() == "DICOMDIR":
                directories.append(file)
        except InputError as error:
            report.fault(str(error))
            unread.append(file)
    absent = images_absent(directories, headers.values(), report)
    for (key, uid), members in headers.items():
        add_series(studies[key], without_copies(members, report), absent.get(uid, ""))
    if others:
        report.log(f"skipped: files that are neither DICOM nor NIfTI: {others}")
    found = sorted(studies.values(), key=lambda study: min(study.files))
    for file in unread:
        for study in studies_beside(file, found):
            study.unread.append(file)
    for study in filter(lambda study: study.unread, found):
        for series in study.series:
            if study.has_folder_of(series):
                series.fault = series.fault or slices_lost(series, study.unread)
    return found


def images_absent(directories, series, report):
    """{series UID: why it is not whole}, of series that are there in part, by DICOMDIR files.

    Args:
        directories: list of File.
        series: lists of the headers of each series' files.
    """
    there, absent = {header.instance for headers in series for header in headers}, {}
    for file in directories:
        try:
            listed = images_listed(file)
        except InputError as error:
            report.warn(f"{error}; whether files are missing is not known")
            continue
        for uid, images in listed.items():
            if missing := len(images - there):
                absent[uid] = f"{file}: lists {len(images)} images of it, {missing} of them are " \
                              "not there or cannot be read; copy the whole disc again"  # fmt: skip
    return absent


def images_listed(directory):
    """What a DICOMDIR file lists (PS3.3 F.5): {series UID: set of its images' UIDs}."""
    listed = {}
    with reading(directory):
        data = read_dicom(directory, ["DirectoryRecordSequence"])
        records = {record.seq_item_tell: record for record in data.DirectoryRecordSequence}
        for series in list(records.values()):
            if series.DirectoryRecordType != "SERIES":
                continue
            images = listed.setdefault(str(series.SeriesInstanceUID), set())
            place = series.OffsetOfReferencedLowerLevelDirectoryEntity
            while image := records.pop(place, None):  # pop: damaged offsets may form a circle
                if image.DirectoryRecordType == "IMAGE":
                    images.add(str(image.ReferencedSOPInstanceUIDInFile))
                place = image.OffsetOfTheNextDirectoryRecord
    return listed


def slices_lost(series, unread):
    """Why a DICOM series may lack slices at one end, where no gap shows it, or ''.

    Args:
        unread: files of its study that cannot be read.
    """
    files = {frame.file for frame in series.frames}
    folders = {file.folder for file in files}
    lost = [file for file in unread if file.folder in folders]
    if len(files) < MIN_SLICES or len(lost) <= LOST * len(files):  # enhanced: all in one file
        return ""
    return f"{lost[0]}: {len(lost)} files beside its {len(files)} slices cannot be read"


def exams_mixed(series):
    """Why NIfTI volumes of one folder are of several exams, or ''.

    Their names without the words that tell plane and contrast are two, and both have the same
    plane in the same contrast. Names that do not tell the plane say nothing.
    """
    shown = defaultdict(set)
    for one in series:
        words = re.findall("[a-z0-9]+", one.description.lower())
        planes = {PLANE_OF_WORD[word] for word in words if word in PLANE_OF_WORD}
        contrast = frozenset(word for word in words if CONTRAST_WORD.fullmatch(word))
        names = tuple(w for w in words if w not in PLANE_OF_WORD and w not in contrast)
        if len(planes) == 1:
            shown[names].add((*planes, contrast))
    # A series' own number differs from file to file: it is no exam's name.
    several = {names: what for names, what in shown.items() if len(what) > 1}
    for a, b in itertools.combinations(several, 2):
        if several[a] & several[b]:
            names = " and ".join("-".join(words) or "no name" for words in (a, b))
            return f"a folder is an exam, and this one's files are of two ({names}); part them"
    return ""


def add_series(study, headers, fault):
    """Assemble the headers of one series' files, which have a fault or ''."""
    frames = [frame for header in headers for frame in header.frames]
    if frames:
        found = series_of(headers)
        if isinstance(found, Series):
            found.fault = found.fault or fault
        study.add(found, series_name(headers[0].title), len({frame.file for frame in frames}))


def without_copies(headers, report):
    """The headers of one series' files without those of files that are there twice, as a zip is
    beside its folder. Two images of one UID that differ stay, as a fault of the series."""
    count = Counter(header.instance for header in headers if header.frames)
    kept, known = [], set()
    for header in headers:
        if header.frames and header.instance and count[header.instance] > 1:
            content = header.instance, content_of(header.frames[0].file)
            if content in known:
                continue
            known.add(content)
        kept.append(header)
    if len(kept) < len(headers):
        copies = len(headers) - len(kept)
        report.log(f"skipped: {series_name(headers[0].title)}, copies of its files: {copies}")
    return kept


def series_of(headers):
    """The headers of one series' files, with a frame at least -> Series, or why it is none."""
    frames = [frame for header in headers for frame in header.frames]
    places = {header.frame for header in headers}
    found = assemble(headers[0].title, frames, places.pop() if len(places) == 1 else "")
    is_series = isinstance(found, Series)
    if says_loc(words_of(headers[0].title[1])) and not (is_series and found.is_close):
        return "localiser"
    if is_series:
        found.said = headers[0].said
        found.fault = found.fault or twins_fault(headers, found)
    return found


def twins_fault(headers, series):
    """Why two files that a Series takes its slices from cannot both be right, or ''."""
    known, taken = {}, {frame.file for frame in series.frames}
    for header in headers:
        if header.instance and header.frames and header.frames[0].file in taken:
            file = header.frames[0].file
            if (twin := known.setdefault(header.instance, file)) is not file:
                return f"{file}: another image than {twin} under one SOPInstanceUID; export again"
    return ""


def studies_beside(file, studies):
    """The studies that an unreadable file may belong to: those with files in its folder, else the
    only one with files below the nearest folder above it."""
    near = [s for s in studies if any(other.folder == file.folder for other in s.files)]
    for folder in () if near else (file.folder, *file.folder.parents):
        near = [s for s in studies if s.folder.is_relative_to(folder)]
        if near:
            return near if len(near) == 1 else []
    return near


def digest_of(exam):
    """Hash of all that an exam's volumes depend on: its study's files, 16 hex digits."""
    total = hashlib.blake2b(digest_size=8)
    for file in sorted([*exam.study.files, *exam.study.unread]):
        name = os.path.relpath(file.folder / file.name, exam.study.folder)
        total.update(os.fsencode(name) + b"\0" + content_of(file))
    return total.hexdigest()


def content_of(file):
    """Hash of a file's bytes, or the kind of error that reading it raises."""
    try:
        with file.open(MAX_BYTES) as stream:
            return hashlib.file_digest(stream, "blake2b").digest()
    except Exception as error:  # a damaged zip member raises many kinds
        return type(error).__name__.encode()


# --- which series ---------------------------------------------------------------------------------

TO_TAKE_IT = "data/dicom/prepare.py --series does"


def candidates(exam, choice):
    """{plane: [(Series, axis), ...]}, the best first."""
    found = defaultdict(list)
    for series in exam.series:
        for axis in series.through:
            if series.slices(axis) >= MIN_SLICES:
                found[plane_of(series.directions[axis])[0]].append((series, axis))
    for plane in T1_PLANES if choice.t1 else ():
        of_view = found.get(plane.removesuffix("-t1"), ())
        if t1 := [(series, axis) for series, axis in of_view if series.is_t1]:
            found[plane] = t1
    for plane, ranked in found.items():
        order = choice.series, choice.wants_t1(plane)
        ranked.sort(key=lambda pair, order=order: pair[0].rank(pair[1], *order), reverse=True)
    return dict(sorted(found.items()))


class Choice(NamedTuple):
    """How series are chosen and what is made of them."""

    series: list  # parts of descriptions, or numbers, that the user named
    square: str  # "pad" or "crop"
    field_of_view: float | None = None  # mm; side of what is kept, None for all
    mirror: bool = False  # right knees to left
    t1: bool = False  # also the planes of T1_PLANES
    t1_planes: tuple = ()  # that are T1 where they are fluid-sensitive by default

    def wants_t1(self, plane):
        """Whether a plane's volume shall be a T1 and not fluid-sensitive."""
        return plane in self.t1_planes or plane in T1_PLANES

    @property
    def planes(self):
        """Those that are taken of each exam."""
        return (*TARGET, *T1_PLANES) if self.t1 else tuple(TARGET)

    @property
    def record(self):
        """What dataset.json says of volumes that are made so."""
        return {
            "orientation": ORIENTATION,
            "mirrored": self.mirror,
            "field_of_view": self.field_of_view,
            "t1": self.t1,
            "t1_planes": sorted(set(self.t1_planes)),
            "may_lack_planes": True,
        }

    def mirrors(self, side):
        """Whether a knee of this side, L, R or "", is mirrored."""
        return self.mirror and side == "R"


class Volumes:
    """Reads series; a 3-D scan is kept until all its planes are cut."""

    def __init__(self, choice):
        self.choice, self.kept = choice, {}
        self.taken = {}  # plane -> (Series, axis), of those that could be cut

    def cut(self, series, axis, side, sequence=""):
        """uint8 (s, 256, 256) of a knee of this side. Raises InputError.

        Args:
            sequence: "-t1" where the volume is of plane "sagittal-t1".
        """
        if series.fault:
            raise InputError(f"{series.name}, {series.fault}")
        if id(series) not in self.kept:
            try:
                self.kept = {id(series): window(series.load(), series.file)}
            except InputError as error:
                raise InputError(f"{series.name}, {error}") from None
        grey, choice = self.kept[id(series)], self.choice
        volume = cut(grey, series, axis, choice.square, choice.field_of_view)
        plane, _ = plane_of(series.directions[axis])
        self.taken[plane + sequence] = series, axis
        return mirrored(plane, volume) if choice.mirrors(side) else volume


def volumes_of(exam, choice, report, title):
    """The planes of an exam, and what was there and cannot be used.

    Args:
        choice: Choice.
        title: what the exam is called in messages.

    Returns:
        {plane: uint8 (s, 256, 256)}, {plane: why it cannot be used}, {plane: (Series, axis)} that
        the volumes were cut from.
    """
    wanted = choice.series
    if wanted and not any(series.is_wanted(wanted) for series in exam.series):
        report.warn(f"{title}: no series matches --series")
    for series in exam.series:
        if series.is_apart:
            report.warn(f"{title}: left out {series.name}, {series.fault}")
    volumes, unusable, reader = {}, {}, Volumes(choice)
    refused = exam.refused
    if choice.mirror and not exam.side and not refused:
        refused = NO_SIDE + (LATERALITY if exam.study.is_dicom else NO_LATERALITY)
    for plane, ranked in candidates(exam, choice).items():
        if refused:
            unusable[plane] = refused
            continue
        volume, why = take_plane(plane, ranked, exam.side, reader, report, title)
        if why:
            unusable[plane] = why
            report.fault(f"{title}: {why}")
        else:
            volumes[plane] = volume
    if refused:
        report.fault(f"{title}: {refused}")
    for (name, reason), count in sorted(exam.study.skipped.items()):
        report.log(f"{title}  skipped: {name}, {reason} (files: {count})")
    if not volumes and not unusable:
        why = "; ".join(f"{series}, {reason}" for series, reason in sorted(exam.study.skipped))
        unusable = dict.fromkeys(choice.planes, f"no usable series: {why}")
        report.fault(f"{title}: no usable series: {why}")
    for plane in sorted(set(choice.planes) - volumes.keys() - unusable.keys()):
        if reason := may_be_lost(exam):
            unusable[plane] = reason
    return volumes, unusable, reader.taken


def take_plane(plane, ranked, side, reader, report, title):
    """Cut a plane from the best of its series that can be used.

    Args:
        ranked: of `candidates`.

    Returns:
        its volume, or None, and why there is none, or "".
    """
    wanted, t1 = reader.choice.series, reader.choice.wants_t1(plane)
    kind = "T1" if t1 else "fluid-sensitive"
    passed, (first, _) = [], ranked[0]
    for series, axis in ranked:
        if not series.is_wanted(wanted):
            if passed and first.is_wanted(wanted):
                break  # never replace the named series by another
            if series.suits(t1) < (first.suits(t1) if passed else 1):
                passed.append(f"{series.name} is no {kind} series and not taken ({TO_TAKE_IT})")
                break
        try:
            volume = reader.cut(series, axis, side, "-t1" if plane in T1_PLANES else "")
        except InputError as error:
            passed.append(str(error))
            continue
        log_choice(plane, series, axis, ranked[len(passed) + 1 :], report, title)
        for reason in passed:
            report.warn(f"{title}: {plane}: passed over {reason}")
        return volume, ""
    for reason in passed[1:]:
        report.warn(f"{title}: {plane}: {reason}")
    return None, passed[0]


def log_choice(plane, series, axis, others, report, title):
    """Print which series a plane is taken from, and which not."""
    angle = plane_of(series.directions[axis])[1]
    if angle > OBLIQUE:
        report.warn(f"{title}: {series.name} is {angle:.0f} degrees from {plane}")
    if series.doubt:
        report.warn(f"{title}: {series.name}: {series.doubt}")
    whys = ((other.name, f" ({other.fault})" if other.fault else "") for other, _ in others)
    names = ", ".join(map("".join, whys))
    report.log(
        f"{title}  {plane}: {series.name}, {series.slices(axis)} slices"
        + (f"; not taken: {names}" if names else "")
    )


def may_be_lost(exam):
    """Why a plane that no series shows may have been scanned all the same, or ''."""
    for (name, reason), _ in sorted(exam.study.skipped.items()):
        if reason.startswith(UNPLACED) or reason.endswith(OTHER_PART):
            return f"it may be {name}: {reason}"
    if exam.study.unread:
        return f"files beside it cannot be read: {len(exam.study.unread)}"
    return ""
