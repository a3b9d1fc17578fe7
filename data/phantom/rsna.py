"""Phantom knees in the form of RSNA's knee set of 2026, with the traps of the real one.

    OUT/train.csv, train_series.csv, train_series/<study>/<series>/<file>.dcm
    OUT/test.csv, test_series.csv, test_series/..., sample_submission.csv
    OUT/soft.csv     labels from 0 to 1, as a language model would take them from the reports
    OUT/dataset.json says that they are synthetic: data/rsna/prepare.py hands it on
    OUT/truth.csv    what the phantom knows of every study, the test's too: not part of such a set

Each scanner has habits of its own: size and field of view of its pictures, transfer syntax, order
of the slices, tilt, tags that it leaves out, whether the knee lies in its middle. A study has
fluid-sensitive series with and without fat suppression, a T1 series, some localisers and second
choices; some patients have both knees, and some rows of the CSV are silent or wrong. Five of the
twelve findings are the phantom's own; the others have no labels.
"""

import io
from typing import NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation

from data.phantom.exam import draw_exam
from data.phantom.scanner import Cut, scan
from mrnet.files import write_csv
from mrnet.layout.planes import TARGET
from mrnet.scans.rsna_tables import FAT, FINDINGS, FLUID, PLANE, REPORT, SERIES, STUDY

TRUTH = "truth.csv"
NEEDS = ("pydicom", "openjpeg", "imagecodecs")  # modules
ROOT_UID = "1.2.826.0.1.3680043.10.1445"  # the phantom's own
STUDIES_OF_A_SCANNER = 16
LABELLED = 0.10  # share of the training studies with labels of their own
BOTH_KNEES = 0.05  # share of the studies that are the other knee of the patient before
SILENT, WRONG = 0.03, 0.02  # share of the series whose row says nothing, or another plane
UNSAID, SOFT = 0.10, 0.12  # share of soft labels that are 0.5; spread of the others
EFFUSION, CONTUSION = 0.30, 0.36  # size and signal of lesions.py from which on it is a finding
LOCALISERS = 0.30  # share of the studies
KNEE = (60.0, 95.0)  # mm from the scanner's middle, of knees that lie off it
# Signal of fat-suppressed proton density (data/phantom/anatomy.py) -> of other sequences. The rows:
# air, cortex, marrow, fat, muscle, cartilage, vessels, fluid.
SIGNAL = (0.0, 0.05, 0.18, 0.20, 0.38, 0.58, 0.75, 0.95)
CONTRASTS = {
    "PD FS": None,
    "PD": (0.0, 0.06, 0.68, 0.78, 0.36, 0.55, 0.72, 0.95),
    "T1": (0.0, 0.06, 0.66, 0.85, 0.40, 0.45, 0.30, 0.22),
}
ECHO = {"PD FS": 36, "PD": 32, "T1": 11}  # ms
OPTIONAL = frozenset({"PatientID", "EchoTime", "SeriesDescription", "Laterality", "InstanceNumber"})
SYNTAXES = ("explicit", "implicit", "jpeg lossless", "jpeg 2000")


class Scanner(NamedTuple):
    """One scanner's habits."""

    name: tuple  # manufacturer, model, software, field strength in tesla
    size: int  # px, a slice's side
    field_of_view: float  # mm
    syntax: str  # one of SYNTAXES
    tilt: float  # degrees, SD of the planes' turn
    from_the_end: bool  # slices are stored from the other end
    centred: bool  # knees lie in the middle: their place does not tell the side
    tags: frozenset  # those of OPTIONAL that it writes
    offset: tuple  # rescale slope and intercept
    spacing: dict | None = None  # as Cut has it


class SeriesPlan(NamedTuple):
    """One series of a study."""

    plane: str
    contrast: str  # one of CONTRASTS
    share: float = 1.0  # of the slices; a second choice has fewer


def draw_scanner(number, seed):
    """The habits of scanner `number`."""
    rng = np.random.default_rng([seed, 16, number])
    makers = ("SIEMENS", "GE MEDICAL SYSTEMS", "Philips Medical Systems", "TOSHIBA")
    name = (
        makers[number % 4],
        f"Model {number % 7}",
        f"V{number}.{number % 3}",
        (1.5, 3.0)[number % 2],
    )
    centred = bool(rng.random() < 0.2)
    tags = set(OPTIONAL)
    for tag, share in (("EchoTime", 0.1), ("SeriesDescription", 0.4), ("PatientID", 0.3)):
        if rng.random() < share:
            tags.remove(tag)
    if not centred and rng.random() < 0.5:
        tags.remove("Laterality")
    return Scanner(
        name,
        int(rng.choice([192, 224, 256, 320])),
        float(rng.uniform(145, 185)),
        SYNTAXES[number % 4],
        float(rng.uniform(0, 6)),
        bool(rng.random() < 0.5),
        centred,
        frozenset(tags),
        (1.0, 0.0) if number % 3 else (2.5, -40.0),
    )


def plan_series(rng):
    """The series of one study, about 5.5: list of SeriesPlan."""
    plans = [SeriesPlan(plane, "PD FS") for plane in TARGET if rng.random() < 0.97]
    plans.append(SeriesPlan("sagittal", "PD"))
    plans.append(SeriesPlan(str(rng.choice(["sagittal", "coronal"])), "T1"))
    if rng.random() < 0.5:
        plans.append(SeriesPlan(str(rng.choice(list(TARGET))), "PD FS", 0.6))
    return [plans[k] for k in rng.permutation(len(plans))]


def findings_of(lesions, labels):
    """{column of FINDINGS: 0 or 1} of what the phantom knows."""
    tear = lesions["meniscus"]
    marrow = max((signal for *_, signal in lesions["oedema"]), default=0)
    return {
        "ACL": int(lesions["acl"] is not None),
        "Medial Meniscus": int(tear is not None and tear["side"] < 0),
        "Lateral Meniscus": int(tear is not None and tear["side"] > 0),
        "Effusion": int(labels["abnormal"] and lesions["effusion"] >= EFFUSION),
        "Contusion": int(labels["abnormal"] and marrow >= CONTUSION),
    }


def make_study(number, split, labels, seed, out, total):
    """Draw, scan and write one study.

    Args:
        number: of the study, below `total`.
        labels: as draw_labels gives them.

    Returns:
        {"uid", "split", "series": rows of train_series.csv, "truth": findings_of, "side"}.
    """
    rng = np.random.default_rng([seed, 15, number])
    scanner = draw_scanner(int(rng.integers(max(6, total // STUDIES_OF_A_SCANNER))), seed)
    other_knee = number > 0 and rng.random() < BOTH_KNEES
    drawn = draw_exam(number, labels, seed)
    uid = f"{ROOT_UID}.{seed}.{number}"
    about = {
        "StudyInstanceUID": uid,
        "FrameOfReferenceUID": f"{uid}.0",
        "PatientID": f"P{number - other_knee}",
        "Laterality": "L" if drawn.side > 0 else "R",
    }
    x = 0.0 if scanner.centred else drawn.side * rng.uniform(*KNEE)
    turn = Rotation.from_euler("xyz", rng.normal(0, scanner.tilt, 3), degrees=True).as_matrix()
    rows = []
    for k, plan in enumerate(plan_series(rng)):
        series = f"{uid}.{k + 1}"
        folder = out / ("train_series" if split == "train" else "test_series") / uid / series
        about |= {"SeriesInstanceUID": series, "SeriesNumber": k + 1}
        volume, places, steps = scan_series(drawn, plan, scanner)
        geometry = places @ turn.T + (x, 0, 0), turn, steps
        write_series(folder, volume, geometry, plan, scanner, about)
        rows.append([uid, series, *row_of(plan, rng)])
    if rng.random() < LOCALISERS:
        about |= {"SeriesInstanceUID": f"{uid}.99", "SeriesNumber": 99}
        about["ImageType"] = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        write_series(folder.with_name(f"{uid}.99"), volume[:3], geometry, plan, scanner, about)
    truth = findings_of(drawn.lesions, labels)
    side = about["Laterality"]
    return {"uid": uid, "split": split, "series": rows, "truth": truth, "side": side}


def row_of(plan, rng):
    """What the CSV says of a series: fluid-sensitive, fat-suppressed, plane."""
    plane, chance = plan.plane, rng.random()
    if chance < SILENT:
        return ["", "", ""]
    if chance < SILENT + WRONG:
        plane = next(other for other in TARGET if other != plane)
    return [int(plan.contrast != "T1"), int(plan.contrast == "PD FS"), plane.capitalize()]


def scan_series(drawn, plan, scanner):
    """One series' pictures, and where they lie before the scanner turns and moves them.

    Returns:
        uint8 (s, size, size); first pixels' centres, float (s, 3), mm (LPS); and mm between slices
        and between pixels.
    """
    knee, signal = drawn.knee, drawn.knee.signal
    if CONTRASTS[plan.contrast]:
        knee.signal = np.interp(signal, SIGNAL, CONTRASTS[plan.contrast]).astype(np.float32)
    cut = Cut(scanner.size, scanner.field_of_view, scanner.spacing)
    volume, geometry = scan(knee, drawn.pose, plan.plane, cut, drawn.rng)
    knee.signal = signal
    kept = round(len(volume) * plan.share)
    first = (len(volume) - kept) // 2
    places = np.empty((len(volume), 3))
    for array_axis, (axis, way) in enumerate(TARGET[plan.plane]):
        start, step = geometry["start_mm"][array_axis], geometry["step_mm"][array_axis]
        places[:, axis] = way * (start + step * np.arange(len(volume)) * (array_axis == 0))
    return (
        volume[first : first + kept],
        places[first : first + kept],
        (geometry["step_mm"][0], geometry["step_mm"][1]),
    )


def write_series(folder, volume, geometry, plan, scanner, about):
    """Write one series, a file a slice, names in no order.

    Args:
        volume: uint8 (s, size, size), oriented as TARGET.
        geometry: first pixels' centres (s, 3) in mm; rotation (3, 3) of the planes; mm between
            slices and between pixels.
        about: {attribute: value} of the study and the series.
    """
    places, turn, (step, pixel) = geometry
    folder.mkdir(parents=True, exist_ok=True)
    (_, (down, d), (across, a)) = TARGET[plan.plane]
    orientation = [*(turn[:, across] * a), *(turn[:, down] * d)]
    order = np.arange(len(volume))[:: -1 if scanner.from_the_end else 1]
    slope, intercept = scanner.offset
    names = np.random.default_rng(len(volume)).permutation(len(volume)) + 1
    for instance, s in enumerate(order, start=1):
        uid = f"{about['SeriesInstanceUID']}.{names[s]}"
        header = {
            "SOPInstanceUID": uid,
            "InstanceNumber": instance,
            "ImageOrientationPatient": [round(float(v), 6) for v in orientation],
            "ImagePositionPatient": [round(float(v), 3) for v in places[s]],
            "PixelSpacing": [round(pixel, 5)] * 2,
            "SpacingBetweenSlices": round(step, 4),
            "SliceThickness": round(step * 0.85, 4),
            "SeriesDescription": f"{plan.plane[:3]} {plan.contrast}",
            "EchoTime": ECHO[plan.contrast],
            "RescaleSlope": slope,
            "RescaleIntercept": intercept,
            "ImageType": ["ORIGINAL", "PRIMARY", "M"],
        }
        stored = volume[s].astype(np.uint16) * np.uint16(7)
        (folder / f"{uid}.dcm").write_bytes(as_dicom(stored, header | about, scanner))


def as_dicom(pixels, header, scanner):
    """One slice as a DICOM file's bytes.

    Args:
        pixels: uint16 (h, w), 12 bits.
        header: {attribute: value}; of the optional ones the scanner's `tags` are written.
    """
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import (
        ExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
        JPEG2000Lossless,
        JPEGLosslessSV1,
        MRImageStorage,
    )

    ds, ds.file_meta = Dataset(), FileMetaDataset()
    for name, value in header.items():
        if name not in OPTIONAL or name in scanner.tags:
            setattr(ds, name, value)
    ds.Manufacturer, ds.ManufacturerModelName, ds.SoftwareVersions = scanner.name[:3]
    ds.MagneticFieldStrength = scanner.name[3]
    ds.SOPClassUID, ds.Modality, ds.PatientName = MRImageStorage, "MR", "Phantom"
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.file_meta.MediaStorageSOPClassUID = MRImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.PixelData = pixels.astype("<u2").tobytes()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    if scanner.syntax == "implicit":
        ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    elif scanner.syntax == "jpeg 2000":
        ds.compress(JPEG2000Lossless, generate_instance_uid=False)
    elif scanner.syntax == "jpeg lossless":
        ds.PixelData = encapsulate([ljpeg(pixels)])
        ds["PixelData"].VR = "OB"
        ds.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    stream = io.BytesIO()
    ds.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def ljpeg(pixels):
    """Lossless JPEG (ITU-T T.81, process 14, first-order prediction): bytes."""
    from imagecodecs import ljpeg_encode

    return ljpeg_encode(pixels)


# --- tables ---------------------------------------------------------------------------------------


def write_tables(out, studies, seed):
    """Write the CSVs; they come last, so that a set without them is not complete.

    Args:
        studies: iterable of what make_study returns.
    """
    rng = np.random.default_rng([seed, 17])
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / TRUTH, [])  # this folder is the phantom's
    studies = list(studies)
    train = [study for study in studies if study["split"] == "train"]
    test = [study for study in studies if study["split"] != "train"]
    own = set(rng.permutation(len(train))[: max(1, round(LABELLED * len(train)))])
    head = [STUDY, "PatientSex", REPORT, *FINDINGS]
    rows, soft = [], []
    for k, study in enumerate(train):
        labels = [study["truth"].get(name, "") if k in own else "" for name in FINDINGS]
        rows.append([study["uid"], "FM"[k % 2], report_of(k, study), *labels])
        soft.append([study["uid"], *soft_labels(study["truth"], rng)])
    write_csv(out / "train.csv", [head, *rows])
    write_csv(out / "soft.csv", [[STUDY, *FINDINGS], *soft])
    write_csv(out / "test.csv", [[STUDY, "PatientSex"], *([s["uid"], "F"] for s in test)])
    sample = [[study["uid"], *[0.5] * len(FINDINGS)] for study in test]
    write_csv(out / "sample_submission.csv", [[STUDY, *FINDINGS], *sample])
    head = [STUDY, SERIES, FLUID, FAT, PLANE]
    for name, members in (("train", train), ("test", test)):
        rows = [row for study in members for row in study["series"]]
        write_csv(out / f"{name}_series.csv", [head, *rows])
    truth = [[s["uid"], *(s["truth"].get(name, "") for name in FINDINGS)] for s in studies]
    write_csv(out / TRUTH, [[STUDY, *FINDINGS], *truth])
    files = sum(1 for _ in out.glob("*_series/*/*/*.dcm"))
    print(f"{len(train)} studies to train on, {len(own)} of them labelled, {len(test)} to test, "
          f"{files} DICOM files -> {out}")  # fmt: skip


def soft_labels(truth, rng):
    """Labels from 0 to 1 in the order of FINDINGS, "" for what the phantom does not have."""
    for name in FINDINGS:
        if name not in truth:
            yield ""
        elif rng.random() < UNSAID:
            yield 0.5
        else:
            value = abs(truth[name] - abs(rng.normal(0, SOFT)))
            yield f"{min(value, 1):.2f}"


def report_of(number, study):
    """A report of one line; the number keeps normal knees' reports from being the same."""
    found = [name.lower() for name, value in study["truth"].items() if value]
    side = {"L": "Left", "R": "Right"}[study["side"]]
    return f"No. {number}. {side} knee: {', '.join(found) or 'normal'}."
