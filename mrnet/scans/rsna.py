"""Studies of RSNA's knee set: which series shows which plane of which knee, and its volume.

    <root>/train_series/<StudyInstanceUID>/<SeriesInstanceUID>/<SOPInstanceUID>.dcm

What the CSV says of a series is taken where it says something, and the geometry decides where it is
silent or says another plane; both are counted. Only fluid-sensitive series are taken for a plane: a
T1 series in the place of one would be another picture under the same name. Where they are asked
for, those are planes of their own, "sagittal-t1" and "coronal-t1".
"""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from mrnet.errors import InputError, counted
from mrnet.files import open_regular
from mrnet.layout.names import exam_name
from mrnet.layout.planes import TARGET
from mrnet.scans.files import File, read_dicom, reading
from mrnet.scans.knees import split_knees
from mrnet.scans.series import UNPLACED, Series, read_header
from mrnet.scans.slices import plane_of
from mrnet.scans.studies import series_of, slices_lost

SCANNER = ["Manufacturer", "ManufacturerModelName", "SoftwareVersions", "MagneticFieldStrength"]
NOT_USED, NO_FILE = "series not used: ", "no file that can be read"
NO_SERIES = "no fluid-sensitive series of this plane"
NO_T1 = "no series of this plane that is not fluid-sensitive"


class StudyFolder(NamedTuple):
    """One study on disk."""

    uid: str
    series: dict  # {series UID: folder}
    rows: dict  # {series UID: tables.SeriesRow}

    @property
    def name(self):
        """The same in every run, without the UID."""
        return exam_name(self.uid)

    @property
    def source(self):
        """Its folder, relative to the series'."""
        return self.uid


@dataclass
class Converted:
    """What became of one study."""

    volumes: dict = field(default_factory=dict)  # {plane: uint8 (s, 256, 256)}
    missing: dict = field(default_factory=dict)  # {plane: why}
    not_scanned: set = field(default_factory=set)  # the missing planes that no series shows
    side: str = ""  # L, R or "" if unknown
    mirrored: bool = False
    padded: int = 0  # planes that are smaller than the field of view
    notes: Counter = field(default_factory=Counter)  # what CSV and geometry disagree on
    faults: list = field(default_factory=list)  # one line each
    doubts: list = field(default_factory=list)  # of what is used all the same, one line each


def find_studies(root, listed, report):
    """The studies under `root`, each with its series: list of StudyFolder, in order of UID.

    Args:
        root: train_series or test_series.
        listed: {study UID: {series UID: SeriesRow}}.
        report: Report; counts what only the CSV or only the disk has.

    Raises:
        InputError: no such folder, or nothing in it.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the one that holds it")
    folders = {}
    for path in sorted(root.iterdir()):
        if path.is_dir():
            folders.setdefault(path.name.strip(), path)
    if not folders:
        raise InputError(f"{root}: no studies in it; unpack the set there")
    lost = [uid for uid in listed if uid not in folders]
    if lost:
        count = counted(len(lost), "study")
        report.fault(f"{root}: in the CSV and not there: {count}, the first {lost[0]}")
    unlisted = [uid for uid in folders if uid not in listed]
    if unlisted:
        report.warn(
            f"{root}: not in the series CSV: {counted(len(unlisted), 'study')}; their geometry and "
            f"headers tell the planes. The first: {unlisted[0]}"
        )
    studies = []
    for uid, path in folders.items():
        series = {p.name.strip(): p for p in sorted(path.iterdir()) if p.is_dir()}
        studies.append(StudyFolder(uid, series, listed.get(uid, {})))
    return studies


def digest_of(study):
    """Hash of all that a study's volumes depend on: its files and its rows, 16 hex digits."""
    total = hashlib.blake2b(repr(sorted(study.rows.items())).encode(), digest_size=8)
    for uid, folder in study.series.items():
        try:
            paths = files_in(folder)
        except InputError:  # reading the volume names it, as what follows
            paths = [folder]
        for path in paths:
            try:
                with open_regular(path) as file:
                    content = hashlib.file_digest(file, "blake2b").digest()
            except OSError as error:
                content = str(error.errno).encode()
            total.update(f"{uid}/{path.name}".encode() + b"\0" + content)
    return total.hexdigest()


def files_in(folder):
    """Paths of the files of a series' folder, in order.

    Raises:
        InputError: the folder cannot be read.
    """
    with reading(folder):
        return [path for path in sorted(folder.iterdir()) if not path.is_dir()]


def identity_of(study):
    """The scanner's fingerprint and the patient's number, each from the first header that has it;
    "" for what is not known. Both identify: never print them."""
    scanner = patient = ""
    tags = [*SCANNER, "PatientID"]
    for folder in study.series.values():
        try:
            paths = files_in(folder)[:2]
        except InputError:
            continue
        for path in paths:
            try:
                with reading(File(path)):
                    header = read_dicom(File(path), tags)
                    *words, number = [str(header.get(name) or "").strip(" \0") for name in tags]
            except InputError:
                continue
            scanner = scanner or ("|".join(words).casefold() if any(words) else "")
            patient = patient or number
            if scanner and patient:
                return scanner, patient
    return scanner, patient


def convert(study, reader):
    """The volumes of one study: Converted. Damaged files are its faults, never raised.

    Args:
        reader: mrnet.scans.studies.Volumes; the `series` of its choice is not used.
    """
    done = Converted()
    takes_t1 = reader.choice.t1 or reader.choice.t1_planes
    uids = [uid for uid in study.series if takes_t1 or is_wanted(study.rows.get(uid))]
    series = [one for uid in uids if (one := read_series(study, uid, done))]
    series = [one for one in series if one.fluid or takes_t1]
    for uid in study.rows.keys() - study.series.keys():
        done.faults.append(f"study {study.uid}: series {uid} of the CSV is not there")
    knees = split_knees([one.series for one in series], absolute=True) if series else {}
    if len(knees) != 1:
        why = f"no {'' if takes_t1 else 'fluid-sensitive '}series that can be used"
        if knees:
            why = "it shows both knees, and its labels do not say which they are of"
        return refuse(done, study, reader.choice, why)
    ((done.side, (members, refused)),) = knees.items()
    if refused:
        return refuse(done, study, reader.choice, refused)
    if apart := sum(member.is_apart for member in members):
        done.notes["left out: series that lie apart from the others of their knee"] += apart
    ours = {id(member) for member in members}
    ranked = sorted((one for one in series if id(one.series) in ours), key=rank, reverse=True)
    shown = shown_planes(study, series, done)
    for plane in reader.choice.planes:
        of_plane = [one for one in ranked if one.name(reader.choice) == plane]
        take_plane(plane, of_plane, study, reader, done)
    done.not_scanned = done.missing.keys() - shown
    done.mirrored = reader.choice.mirrors(done.side)
    if reader.choice.mirror and not done.side and done.volumes:
        done.doubts.append(
            f"study {study.uid}: left or right knee not known, so it is not mirrored: what is "
            "said of medial and lateral may be exchanged"
        )
    return done


def is_wanted(row):
    """Whether a series can be fluid-sensitive, by its row of the CSV or None."""
    return row is None or row.fluid is not False


def refuse(done, study, choice, why):
    done.missing = dict.fromkeys(choice.planes, why)
    done.faults.append(f"study {study.uid}: {why}")
    return done


class Candidate(NamedTuple):
    """A series that may be taken."""

    series: Series
    plane: str  # one of TARGET
    fluid: bool  # fluid-sensitive
    fat: bool  # fat-suppressed

    def name(self, choice):
        """The plane that it can be the volume of, "" for none."""
        if self.fluid != choice.wants_t1(self.plane):
            return self.plane
        return "" if self.fluid else f"{self.plane}-t1"


def rank(candidate):
    """Sort key, the highest is taken: usable, fat-suppressed, straight, most slices, original."""
    series = candidate.series
    slices = -series.tilt(0), series.shape[0], series.is_original
    return not series.fault, candidate.fat, *slices


def read_series(study, uid, done):
    """A series folder's headers -> Candidate; None, with a note or a fault, if it is none."""
    row = study.rows.get(uid)
    headers, unread, folder = [], [], study.series[uid]
    try:
        paths = files_in(folder)
    except InputError as error:
        done.faults.append(f"study {study.uid}: {error}")
        return None
    for path in paths:
        try:
            headers.append(read_header(File(path), only_knees=False))  # the set has no others
        except InputError as error:
            done.faults.append(f"study {study.uid}: {error}")
            unread.append(File(path))
    frames = [frame for header in headers for frame in header.frames]
    if not frames:
        reasons = sorted({header.reason for header in headers}) or [NO_FILE]
        done.notes[f"{NOT_USED}{', '.join(reasons)}"] += 1
        return None
    found = series_of(headers)
    if not isinstance(found, Series):
        done.notes[f"{NOT_USED}{found}"] += 1
        return None
    found.fault = found.fault or slices_lost(found, unread)
    fluid, fat = found.contrast > 0, found.contrast == 2
    if row is None or row.fluid is None:
        done.notes["fluid-sensitive or not: by the header, the CSV is silent"] += 1
    else:
        fluid = row.fluid
    if row is not None and row.fat is not None:
        fat = row.fat
    plane = plane_of(found.directions[0])[0]
    if row is None or row.plane is None:
        done.notes["plane by the geometry, the CSV is silent"] += 1
    elif row.plane != plane:
        done.notes[f"plane by the geometry: {plane}, the CSV says {row.plane}"] += 1
    return Candidate(found, plane, fluid, fat)


def take_plane(plane, ranked, study, reader, done):
    """Cut one plane from the best series that can be read."""
    passed = []
    for candidate in ranked:
        series = candidate.series
        try:
            sequence = plane.removeprefix(candidate.plane)
            done.volumes[plane] = reader.cut(series, 0, done.side, sequence)
        except InputError as error:
            passed.append(f"study {study.uid}: {plane}: passed over {error}")
            continue
        sides = [series.shape[axis] * series.spacing[axis] for axis in (1, 2)]  # mm
        if series.doubt:
            done.notes["used, but slices may be missing at one end, by the files' numbers"] += 1
        done.padded += min(sides) < (reader.choice.field_of_view or 0)
        break
    done.faults += passed
    if plane not in done.volumes:
        t1 = reader.choice.wants_t1(plane)
        done.missing[plane] = passed[0] if passed else NO_T1 if t1 else NO_SERIES


def shown_planes(study, series, done):
    """The planes that were scanned, in whatever contrast, or may have been: where files could not
    be read or a series not be placed, all of TARGET.

    Args:
        series: list of Candidate.
    """
    planes = {one.plane for one in series} | {row.plane for row in study.rows.values()}
    lost = [note for note in done.notes if note.startswith(NOT_USED)]
    if done.faults or any(reason in note for note in lost for reason in (*UNPLACED, NO_FILE)):
        planes |= TARGET.keys()
    return planes | {f"{one.plane}-t1" for one in series if not one.fluid}
