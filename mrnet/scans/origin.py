"""Where a converted exam comes from: the place of its pixels in the patient, its DICOM sources.

What explain.py --dicom needs to write results back beside the exam, as plain values.
"""

import math

import numpy as np

from mrnet.errors import InputError
from mrnet.scans.files import read_dicom, reading
from mrnet.scans.pixels import square_grid
from mrnet.scans.slices import orient

# Of patient and study: what a new series of the same study repeats (PS3.3 C.7.1.1, C.7.2.1).
STUDY = [
    "SpecificCharacterSet", "StudyInstanceUID", "StudyDate", "StudyTime", "StudyID",
    "StudyDescription", "AccessionNumber", "ReferringPhysicianName", "PatientName", "PatientID",
    "IssuerOfPatientID", "PatientBirthDate", "PatientSex",
]  # fmt: skip
SOURCE = ["SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID"]
# What was lost before us stays lost (PS3.3 C.7.6.1.1.5).
LOSSY = ["LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"]


def describe(taken, choice, side):
    """Where an exam's volumes come from.

    Args:
        taken: {plane: (Series, axis that became the slices)}.
        choice: studies.Choice that they were cut by.
        side: of the knee: L, R or "".

    Returns:
        {"side", "study": DICOM JSON of STUDY, "planes": {plane: as `place` returns it, and
        "frame": UID of the frame of reference, "mirrored", "sources": of each file the SOP class,
        SOP instance and series UID and the number of frames, "used": for each slice the [source,
        frame from 1] it shows, "thickness" of a slice in mm or None, "lossy": as `lossy_of`}}

    Raises:
        InputError: NIfTI, or a file without UIDs.
    """
    headers, planes = {}, {}
    for plane, (series, axis) in taken.items():
        if not series.frames:
            raise InputError(f"{series.file}: NIfTI belongs to no DICOM study; leave out --dicom")
        files = list(dict.fromkeys(frame.file for frame in series.frames))
        for file in files:
            if file not in headers:
                headers[file] = read_tags(
                    file, [*STUDY, *SOURCE, *LOSSY, "NumberOfFrames", "SliceThickness"]
                )
        ours = {file: headers[file] for file in files}
        number = {file: i for i, file in enumerate(files)}
        frames = [[number[frame.file], frame.index + 1] for frame in series.frames]
        planes[plane] = place(series, axis, choice.square, choice.field_of_view) | {
            "frame": series.frame,
            "mirrored": choice.mirrors(side),
            "sources": [source_of(file, header) for file, header in ours.items()],
            "used": frames_of(series, axis, frames),
            "thickness": thickness(series, axis, ours[files[0]]),
            "lossy": lossy_of(ours.values()),
        }
    return {"side": side, "study": study_of(headers), "planes": planes}


def place(series, axis, square, field_of_view):
    """Where the pixels lie that `slices.cut` makes with the same arguments.

    Returns:
        "positions": of each slice the centre of its first pixel (x, y, z); "orientation": unit
        vectors along which columns grow, then rows, 6 numbers; "spacing": between rows, between
        columns; "step" between slices. mm, LPS.
    """
    order, flips = orient(series, axis)
    steps = [series.directions[a] * series.spacing[a] for a in order]
    origin = np.array(series.origin, float)
    for i in flips:
        origin += steps[i] * (series.shape[order[i]] - 1)
        steps[i] = -steps[i]
    slab, (h, w) = series.slab(axis), (series.shape[a] for a in order[1:])
    extent = [n * series.spacing[a] for n, a in zip((h, w), order[1:], strict=True)]
    height, width, top, left = square_grid(*extent, square, field_of_view)
    # The resampled rows share out the slice: row j's middle is at (j + 1/2) of `height` parts.
    down, right = steps[1] * h / height, steps[2] * w / width
    origin += (top + 0.5) * down - steps[1] / 2 + (left + 0.5) * right - steps[2] / 2
    middles = np.arange(series.slices(axis)) * slab + (slab - 1) / 2
    spacing = [float(np.linalg.norm(step)) for step in (down, right)]
    return {
        "positions": (origin + middles[:, None] * steps[0]).tolist(),
        "orientation": [*(right / spacing[1]).tolist(), *(down / spacing[0]).tolist()],
        "spacing": spacing,
        "step": float(slab * series.spacing[axis]),
    }


def thickness(series, axis, header):
    """How thick the slices are that `slices.cut` makes, in mm; None where the source does not say.

    Args:
        header: of the series' first file.
    """
    of_source, slab = numbers_in(header, "SliceThickness")[:1], series.slab(axis)
    if axis != 0:  # cut across the source's slices, each as thick as its voxels
        return float(slab * series.spacing[axis])
    return float((slab - 1) * series.spacing[axis] + of_source[0]) if of_source else None


def lossy_of(headers):
    """{attribute of LOSSY: value, or list of those of each step}, of the first of some headers that
    tells of a compression with loss; {} where none does."""
    for header in headers:
        if header.get("LossyImageCompression") == "01":
            ratios = [float(f"{ratio:.6g}") for ratio in numbers_in(header, LOSSY[1])]
            methods = [str(method) for method in values_in(header, LOSSY[2])]
            found = zip(LOSSY, ("01", ratios, methods), strict=True)
            return {name: value for name, value in found if value}
    return {}


def values_in(header, name):
    """An attribute's values, however many: list."""
    if name not in header or header[name].VM == 0:
        return []
    return [header[name].value] if header[name].VM == 1 else list(header[name].value)


def numbers_in(header, name):
    """An attribute's values above 0, list of float; empty where any is no such number."""
    try:
        found = [float(value) for value in values_in(header, name)]
    except (TypeError, ValueError):
        return []
    return found if all(0 < value < math.inf for value in found) else []


def frames_of(series, axis, frames):
    """For each slice that `slices.cut` makes, those of `frames` that it shows."""
    if axis != 0:
        return [frames] * series.slices(axis)
    _, flips = orient(series, axis)
    ordered, slab = (frames[::-1] if 0 in flips else frames), series.slab(axis)
    return [ordered[k * slab : (k + 1) * slab] for k in range(series.slices(axis))]


def source_of(file, header):
    """[SOP class UID, SOP instance UID, series UID, number of frames] of a DICOM file."""
    found = [str(header.get(name) or "") for name in SOURCE]
    if not all(found):
        raise InputError(f"{file}: has no SOP class, SOP instance or series UID to refer to")
    return [*found, int(header.get("NumberOfFrames") or 1)]


def study_of(headers):
    """Patient and study as DICOM JSON: as the file says that says most, and where that is silent,
    as the others say. It identifies: never print it.

    Args:
        headers: {File: pydicom data set}, of one study and one patient.
    """
    told, study = [json_of(file, header, STUDY) for file, header in headers.items()], {}
    for one in sorted(told, key=len, reverse=True):
        study = one | study
    return study


def json_of(file, header, names):
    """DICOM JSON of some attributes of a file, those that are not empty."""
    import pydicom

    with reading(file):
        part = pydicom.Dataset({header[n].tag: header[n] for n in names if n in header})
        return {tag: one for tag, one in part.to_json_dict().items() if one.get("Value")}


def read_tags(file, names):
    """Some attributes of a DICOM file, as a pydicom data set."""
    with reading(file):
        return read_dicom(file, names)
