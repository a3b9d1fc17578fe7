"""A generated hospital's folder of DICOM studies, whose pixels tell which study, knee and series
they are: 4 x 4 blocks of bright and dark, read back from what a network is shown."""

import hashlib
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)
from test_dicom import AXES, USUAL, header, write

PLANES = ("axial", "coronal", "sagittal")
NORMAL = {"sagittal": 0, "coronal": 1, "axial": 2}
SIDE, PIXEL, STEP, SLICES = 40, 4.0, 9.0, 6  # px, mm, mm, slices: 160 mm wide, 54 mm deep
KNEE = 85.0  # mm from the patient's middle
BITS = 14  # of a code; one block is always bright, one always dark


# --- codes ----------------------------------------------------------------------------------------


def code_of(study, side, plane, decoy=0):
    """Which pixels these are: study below 64, side "L" or "R", plane, and 1 to 3 for a series that
    must not be taken."""
    return ((study * 2 + (side == "L")) * 3 + PLANES.index(plane)) * 4 + decoy


def picture(code):
    """uint16 (40, 40)."""
    bits = [1, *((code >> k) & 1 for k in range(BITS)), 0]
    blocks = np.array(bits, np.uint16).reshape(4, 4) * 800 + 100
    return blocks.repeat(SIDE // 4, axis=0).repeat(SIDE // 4, axis=1)


def read_code(volume):
    """uint8 (s, 256, 256) -> code. Every slice must tell the same."""
    blocks = volume.reshape(len(volume), 4, 64, 4, 64)[:, :, 16:48, :, 16:48].mean(axis=(2, 4))
    bits = (blocks > 127).reshape(len(volume), 16)
    assert (bits == bits[0]).all() and bits[0, 0] and not bits[0, -1], "not one series"
    return sum(int(bit) << k for k, bit in enumerate(bits[0, 1:-1]))


def predict_code(network, volumes, device, precision, known):
    """Stands in for task_models.Network.logit: the code as a logit of two decimals."""
    return read_code(volumes[network.planes[0]]) / 1000 - 1


def code_said(cell):
    """Probability in a row -> code, None for an empty cell."""
    return None if cell == "" else round((np.log(float(cell) / (1 - float(cell))) + 1) * 1000)


# --- series ---------------------------------------------------------------------------------------


def positions(plane, x, slices=SLICES):
    """First pixels' centres of a series around a knee at `x` mm to the patient's left."""
    across, down = (np.array(AXES[a], float) for a in USUAL[plane])
    normal = np.zeros(3)
    normal[NORMAL[plane]] = STEP
    first = np.array([x, 0.0, 0.0]) - (across + down) * PIXEL * (SIDE - 1) / 2
    return [first + (k - (slices - 1) / 2) * normal for k in range(slices)]


def write_series(folder, code, plane, x, series, syntax=ExplicitVRLittleEndian, times=1, **more):
    """One file a slice; `times` time points of each. Returns the paths."""
    paths = []
    for k, position in enumerate(positions(plane, x)):
        for t in range(times):
            ds = header(series=series, **more)
            ds.SOPInstanceUID = f"{series}.{k}.{t}"  # the same bytes whenever it is made
            ds.ImageOrientationPatient = [v for a in USUAL[plane] for v in AXES[a]]
            ds.ImagePositionPatient = [f"{v:.6g}" for v in position]
            ds.PixelSpacing = [PIXEL, PIXEL]
            ds.Rows = ds.Columns = SIDE
            ds.PixelData = picture(code).tobytes()
            path = folder / f"{series.replace('.', '')}-{7 * k % SLICES}-{t}.dcm"
            paths.append(write(path, ds, syntax))
    return paths


def write_enhanced(folder, code, plane, x, series, side, **more):
    """All slices of a series in one Enhanced MR file, laterality in the frames."""
    ds = header(series=series, **more)
    ds.SOPInstanceUID = f"{series}.1"
    ds.SOPClassUID, ds.NumberOfFrames = EnhancedMRImageStorage, SLICES
    measures, orientation, anatomy, shared = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = [PIXEL, PIXEL]
    orientation.ImageOrientationPatient = [v for a in USUAL[plane] for v in AXES[a]]
    anatomy.FrameLaterality = side
    shared.PixelMeasuresSequence = Sequence([measures])
    shared.PlaneOrientationSequence = Sequence([orientation])
    shared.FrameAnatomySequence = Sequence([anatomy])
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    groups = []
    for place in positions(plane, x):
        group, position = Dataset(), Dataset()
        position.ImagePositionPatient = [f"{v:.6g}" for v in place]
        group.PlanePositionSequence = Sequence([position])
        groups.append(group)
    ds.PerFrameFunctionalGroupsSequence = Sequence(groups)
    ds.Rows = ds.Columns = SIDE
    ds.PixelData = np.stack([picture(code)] * SLICES).tobytes()
    return [write(folder / f"{series.replace('.', '')}.dcm", ds)]


# --- studies --------------------------------------------------------------------------------------

KINDS = ("both", "both untold", "one", "one untold", "time series", "echoes", "enhanced",
         "compressed", "damaged", "same patient")  # fmt: skip


class Expected(NamedTuple):
    """What a row must tell of one knee."""

    source: str
    codes: dict  # plane -> code, None where there is no answer
    has_error: bool


def name_of(uid, side):
    """An exam's name, as SECURITY.md describes it."""
    return hashlib.sha256(uid.encode()).hexdigest()[:16] + f"-{side}"


def write_study(root, number, kind):
    """A folder of one study. -> {exam's name: Expected}."""
    uid, folder = f"1.2.826.0.1.{1000 + number}", root / f"study{number:02d}"
    patient = f"P{number - number % 2 if kind == 'same patient' else number}"
    both = kind in ("both", "both untold")
    sides = ("L", "R") if both else ("LR"[number % 2],)
    told = {} if kind.endswith("untold") else None
    expected = {}
    for side in sides:
        x, codes = KNEE if side == "L" else -KNEE, {}
        for k, plane in enumerate(PLANES):
            series = f"{uid}.{'LR'.index(side) + 1}{k}"
            more = {"study": uid, "number": 10 * "LR".index(side) + k, "PatientID": patient}
            more |= {"FrameOfReferenceUID": f"{uid}.9", "description": f"PD FS {plane}"}
            laterality = {"Laterality": side} if told is None else told
            code = codes[plane] = code_of(number, side, plane)
            if kind == "enhanced":
                write_enhanced(folder, code, plane, x, series, side, **more)
                continue
            syntax = {"compressed": (RLELossless, JPEG2000Lossless)[k % 2]}
            syntax = syntax.get(kind, ExplicitVRLittleEndian)
            if kind == "echoes":  # the first echo is not the one to take
                first = code_of(number, side, plane, 2)
                early = {"EchoTime": 10, "description": f"PD FS {plane}"}
                write_series(folder / "e1", first, plane, x, series, **more | laterality | early)
                more |= {"EchoTime": 80}
            paths = write_series(folder, code, plane, x, series, syntax, **more | laterality)
            # a second choice: healthy, without fat suppression
            twin = more | laterality | {"description": f"T1 {plane}", "number": more["number"] + 50}
            if kind in ("one", "both"):
                decoy = code_of(number, side, plane, 1)
                write_series(folder / "t1", decoy, plane, x, series + "7", **twin)
            if kind == "time series" and plane == "sagittal":
                twin |= {"description": "PD FS dynamic"}
                decoy = code_of(number, side, plane, 3)
                write_series(folder / "dyn", decoy, plane, x, series + "8", times=5, **twin)
            if kind == "damaged" and plane == "coronal":
                damage_pixels(paths[2])
                codes[plane] = None
        expected[name_of(uid, side)] = Expected(folder.name, codes, kind == "damaged")
    return expected


def damage_pixels(path):
    ds = pydicom.dcmread(path)
    ds.PixelData = ds.PixelData[:100]
    ds.save_as(path)


def damage(path, rng):
    """Do to a file what disks, exports and people do."""
    kind = int(rng.integers(0, 5))
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.write_bytes(path.read_bytes()[: int(rng.integers(0, 2000))])
    elif kind == 2:
        data = bytearray(path.read_bytes())
        for place in rng.integers(0, len(data), 20):
            data[place] = int(rng.integers(0, 256))
        path.write_bytes(bytes(data))
    elif kind == 3:
        shutil.copy(path, path.with_name(f"copy of {path.name}"))
    else:
        path.write_bytes(bytes(path.stat().st_size))


def write_hospital(root, studies=60):
    """A folder of studies of all KINDS in turn. -> {exam's name: Expected}."""
    expected = {}
    for number in range(studies):
        expected |= write_study(Path(root), number, KINDS[number % len(KINDS)])
    return expected
