"""explain.py --dicom: heat maps and probabilities that lie in the patient where the scan does."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from conftest import PLANES, assert_one_line_error, run_script
from hospital import SLICES, STEP, write_series, write_study
from PIL import Image, ImageDraw
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation
from test_dicom import BIRTH, NAME, PATIENT_ID
from test_explain import maps_of, write_dicom

from mrnet.inference.answering import Options
from mrnet.inference.exams import Exam
from mrnet.inference.explanation import Finding
from mrnet.inference.task_models import TaskModels
from mrnet.layout.planes import ALL_PLANES, TARGET
from mrnet.reports.explain_index import describe as describe_finding
from mrnet.reports.explain_page import headline
from mrnet.runtime import provenance
from mrnet.scans.command import Report
from mrnet.scans.origin import describe, frames_of, lossy_of, place, thickness
from mrnet.scans.rsna_tables import FINDINGS
from mrnet.scans.series import Series, ways_to_cut
from mrnet.scans.slices import cut, plane_of
from mrnet.scans.studies import Choice, find_exams, volumes_of
from mrnet.stacking.stacking import Decision

needs = "pip install -r requirements-dicom-results.txt"
sr = pytest.importorskip("highdicom.sr", reason=needs)
from mrnet.reports import dicom_results  # noqa: E402

# --- where pixels lie, in closed form -------------------------------------------------------------


def random_series(rng):
    """A scan near a patient plane or 3-D, its axes in any order and direction."""
    axes = np.eye(3)[rng.permutation(3)] * rng.choice([-1, 1], (3, 1))
    directions = Rotation.from_rotvec(rng.uniform(-0.2, 0.2, 3)).apply(axes)
    is_fine = rng.random() < 0.4
    thick = 1.0 if is_fine else 4.0
    spacing = np.array([thick, rng.uniform(0.8, 1.0), 0.9])
    shape = (40, 60, 70) if is_fine else (9, int(rng.integers(40, 90)), int(rng.integers(40, 90)))
    return Series(None, "", None, "", shape, directions, spacing, rng.uniform(-50, 50, 3),
                  ways_to_cut(spacing, 0), None)  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_pixels_lie_where_they_are_said_to(seed):
    """Resampling keeps a linear function of the position, so each pixel tells its own place."""
    rng = np.random.default_rng(seed)
    series = random_series(rng)
    axis = int(rng.choice(series.through))
    square, view = rng.choice(["pad", "crop"]), rng.choice([None, 45.0, 120.0])
    index = np.stack(np.meshgrid(*map(np.arange, series.shape), indexing="ij"), axis=-1)
    steps = series.directions * series.spacing[:, None]
    points = series.origin + index @ steps  # mm
    weights = rng.normal(size=3)
    low, high = (points @ weights).min(), (points @ weights).max()
    grey = (255 * (points @ weights - low) / (high - low)).astype(np.float32)
    volume = cut(grey, series, axis, square, view)

    found = place(series, axis, square, view)
    right, down = np.split(np.array(found["orientation"]), 2)
    rows, columns = np.indices(volume.shape[1:])
    at = (np.array(found["positions"])[:, None, None]
          + columns[..., None] * right * found["spacing"][1]
          + rows[..., None] * down * found["spacing"][0])  # fmt: skip
    expected = 255 * (at @ weights - low) / (high - low)
    inside = (at - series.origin) @ series.directions.T / series.spacing
    rim = 2 * series.slab(axis)
    kept = ((inside > rim) & (inside < np.array(series.shape) - 1 - rim)).all(axis=-1)
    assert kept.sum() > 1000
    assert np.abs(volume - expected)[kept].max() < 1  # rounded to whole grey levels
    # And the convention holds: slices, rows and columns grow as MRNet's.
    target = TARGET[plane_of(series.directions[axis])[0]]
    across = found["positions"][-1] - np.array(found["positions"][0])
    for direction, (patient, sign) in zip((across, down, right), target, strict=True):
        assert direction[patient] * sign > 0


def test_slices_name_the_frames_that_they_show():
    series = Series(None, "", None, "", (12, 20, 20), np.eye(3)[[2, 1, 0]], np.ones(3),
                    np.zeros(3), (0, 1, 2), None)  # fmt: skip
    assert series.slab(0) == 3
    frames = list(range(12))  # upwards, and MRNet's axial slices grow downwards
    assert frames_of(series, 0, frames) == [[11, 10, 9], [8, 7, 6], [5, 4, 3], [2, 1, 0]]
    assert frames_of(series, 1, frames) == [frames] * 6
    # Three of 1.2 mm, 1 mm apart, are 3.2 mm thick; those across them three voxels.
    assert thickness(series, 0, header_of("SliceThickness", "1.2")) == pytest.approx(3.2)
    assert thickness(series, 1, pydicom.Dataset()) == 3
    for odd in ("thick", ["3", "x"], "", "0", "nan"):
        assert thickness(series, 0, header_of("SliceThickness", odd)) is None
    assert thickness(series, 0, pydicom.Dataset()) is None


def header_of(name, value):
    """A header with a value that its kind may not allow, as pydicom reads it from some files."""
    header = pydicom.Dataset()
    header.add_new(pydicom.datadict.tag_for_keyword(name), "LO", value)
    return header


def test_an_odd_ratio_of_compression_does_not_lose_that_there_was_one():
    header = header_of("LossyImageCompressionRatio", "8:1")
    assert lossy_of([header]) == {}
    header.LossyImageCompression = "01"
    assert lossy_of([pydicom.Dataset(), header]) == {"LossyImageCompression": "01"}


def described(folder, mirror=False):
    """What the importer says of where an exam of DICOM comes from."""
    report = Report(collect=True)
    (exam,) = find_exams(folder, report)
    choice = Choice([], "crop", mirror=mirror)
    _, unusable, taken = volumes_of(exam, choice, report, "exam")
    assert not unusable
    return describe(taken, choice, exam.side)


def test_the_patient_is_known_whichever_series_comes_first(tmp_path):
    """The first two series lack name and number, the first the date, too."""
    silent = {"PatientName": "", "PatientID": "", "PatientBirthDate": ""}
    for plane, more in (("axial", silent | {"StudyDate": ""}), ("coronal", silent),
                        ("sagittal", {"StudyDate": "", "AccessionNumber": ""})):  # fmt: skip
        number = PLANES.index(plane)
        write_series(tmp_path, number, plane, 85.0, f"1.2.9.{number}", Laterality="L",
                     StudyInstanceUID="1.2.9", **more)  # fmt: skip
    study = pydicom.Dataset.from_json(described(tmp_path)["study"])
    assert (study.PatientName, study.PatientID) == (NAME, PATIENT_ID)
    assert (study.PatientBirthDate, study.StudyDate) == (BIRTH, "20200102")
    assert study.AccessionNumber == "SECRETACC" and study.StudyInstanceUID == "1.2.9"


def test_what_was_lost_stays_lost_and_slices_are_as_thick_as_they_were(tmp_path):
    lossy = {"LossyImageCompression": "01", "LossyImageCompressionRatio": [8, 2],
             "LossyImageCompressionMethod": ["ISO_10918_1", "ISO_15444_1"]}  # fmt: skip
    known = {"axial": lossy | {"SliceThickness": 3.5}, "coronal": {"LossyImageCompression": "00"}}
    for number, plane in enumerate(PLANES):
        write_series(tmp_path, number, plane, 85.0, f"1.2.9.{number}", Laterality="L",
                     StudyInstanceUID="1.2.9", **known.get(plane, {}))  # fmt: skip
    made = described(tmp_path)
    exam = Exam("abc", "", {}, {}, "hash", origin=made)
    origin = dicom_results.read_origin(exam)
    grey = np.zeros((256, 256, 3), np.uint8)
    images = {plane: dicom_results.secondary_capture(grey, maps_of(plane=plane), "acl", origin, 1)
              for plane in PLANES}  # fmt: skip
    for name, value in lossy.items():
        assert images["axial"][name].value == value
    assert images["axial"].SliceThickness == 3.5
    for plane in ("coronal", "sagittal"):
        assert images[plane].LossyImageCompression == "00"
        assert "LossyImageCompressionRatio" not in images[plane]
        assert images[plane].SliceThickness is None  # not known: not the distance
    assert {float(image.SpacingBetweenSlices) for image in images.values()} == {STEP}


# --- the files ------------------------------------------------------------------------------------


def explain(scan, models, out, *more):
    return run_script("explain.py", scan, "--task", "acl", "--models-dir", models, "--precision",
                      "fp32", "--allow-synthetic", "--out", out / "report", "--dicom",
                      out / "dicom", *more)  # fmt: skip


@pytest.fixture(scope="module")
def scan(trained, tmp_path_factory):
    """A phantom knee as DICOM."""
    return write_dicom(trained[0] / "data", 20, tmp_path_factory.mktemp("scan") / "knee7")


@pytest.fixture(scope="module")
def results(trained, scan, tmp_path_factory):
    """What explain.py writes of it: folder of DICOM, what was said."""
    out = tmp_path_factory.mktemp("results")
    done = explain(scan, trained[0] / "models", out)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (out / "dicom").iterdir()
    return folder, done.stdout


def heat_maps(folder, plane):
    return [pydicom.dcmread(path) for path in sorted((folder / f"acl-{plane}").iterdir())]


def sources(scan):
    found = map(pydicom.dcmread, sorted(scan.iterdir()))
    return {str(one.SOPInstanceUID): one for one in found}


@pytest.mark.whole
def test_heat_maps_belong_to_the_study(scan, results):
    folder, said = results
    theirs = sources(scan)
    for plane in PLANES:
        images = heat_maps(folder, plane)
        assert len({image.SeriesInstanceUID for image in images}) == 1
        for image in images:
            (source,) = image.SourceImageSequence
            source = theirs[source.ReferencedSOPInstanceUID]
            assert plane in source.SeriesDescription
            for name in ("StudyInstanceUID", "PatientName", "PatientID"):
                assert image[name].value == source[name].value
            assert image.SeriesInstanceUID != source.SeriesInstanceUID
            across, down = np.array(image.ImageOrientationPatient, float).reshape(2, 3)
            gap = np.subtract(image.ImagePositionPatient, source.ImagePositionPatient)
            assert abs(np.cross(across, down) @ gap) < 1e-3  # mm, from the source's own plane
            assert image.ImageType[:2] == ["DERIVED", "SECONDARY"]
            assert image.BurnedInAnnotation == "YES" and image.PhotometricInterpretation == "RGB"
    assert "DOE" not in said and "4711" not in said


def shown_by(theirs, image):
    """Grey levels of the scan where each pixel of an image lies, by the header alone: (H, W)."""
    series = theirs[image.SourceImageSequence[0].ReferencedSOPInstanceUID].SeriesInstanceUID
    stack = [one for one in theirs.values() if one.SeriesInstanceUID == series]
    across, down = np.array(stack[0].ImageOrientationPatient, float).reshape(2, 3)
    normal = np.cross(across, down)
    stack.sort(key=lambda one: float(normal @ np.array(one.ImagePositionPatient, float)))
    volume = np.stack([one.pixel_array for one in stack]).astype(float)
    first = np.array(stack[0].ImagePositionPatient, float)
    step = float(normal @ (np.array(stack[1].ImagePositionPatient, float) - first))
    right, below = np.array(image.ImageOrientationPatient, float).reshape(2, 3)
    rows, columns = np.indices((image.Rows, image.Columns))
    spacing = np.array(image.PixelSpacing, float)
    at = np.array(image.ImagePositionPatient, float) + columns[..., None] * right * spacing[1]
    at = at + rows[..., None] * below * spacing[0] - first
    pixel = np.array(stack[0].PixelSpacing, float)
    places = [at @ normal / step, at @ down / pixel[0], at @ across / pixel[1]]
    return map_coordinates(volume, places, order=1)


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.whole
def test_each_pixel_shows_the_patients_own_place(trained, scan, tmp_path, mirror):
    """Also where the networks look at right knees as left ones."""
    models = tmp_path / "models"
    shutil.copytree(trained[0] / "models", models)
    for path in models.glob("*.pt"):
        saved = torch.load(path, weights_only=True)
        saved["metadata"]["dataset"]["mirrored"] = mirror
        torch.save(saved, path)
    for path in models.glob("*-stack.json"):
        path.unlink()  # it is of the networks as they were
    copy = tmp_path / "scan"
    shutil.copytree(scan, copy)
    for path in copy.iterdir():
        one = pydicom.dcmread(path)
        one.Laterality = "R"
        one.save_as(path)
    done = explain(copy, models, tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "dicom").iterdir()
    theirs = sources(copy)
    for plane in PLANES:
        images = heat_maps(folder, plane)
        assert {image.Laterality for image in images} == {"R"}
        grey = np.stack([image.pixel_array.min(axis=-1) for image in images])
        wanted = np.stack([shown_by(theirs, image) for image in images])

        def likeness(other):
            body = slice(60, 230)  # below and above the text
            return np.corrcoef(other[:, body].ravel(), wanted[:, body].ravel())[0, 1]  # noqa: B023

        assert likeness(grey) > 0.9, plane
        assert all(likeness(np.flip(grey, axis)) < 0.9 * likeness(grey) for axis in range(3))


def test_report_says_what_was_predicted(trained, scan, results):
    done = run_script("predict.py", scan, "--task", "acl", "--jsonl", "--precision", "fp32",
                      "--models-dir", trained[0] / "models", "--allow-synthetic")  # fmt: skip
    row = json.loads(done.stdout)
    report = sr.srread(results[0] / "report-acl.dcm")
    (group,) = report.content.get_image_measurement_groups()
    said = {one.name.meaning: one.value for one in group.get_measurements()}
    for plane in PLANES:
        assert said[f"Probability, {plane}"] == pytest.approx(row[plane], abs=1e-6)
    assert said["Probability"] == pytest.approx(row["stack"], abs=1e-6)
    assert said["Threshold Value"] == pytest.approx(row["threshold"], abs=1e-6)
    (decision,) = group.get_qualitative_evaluations()
    assert decision.value.value == row["decision"]
    assert "research use only" in group.tracking_identifier
    assert report.StudyInstanceUID == "1.2.3" and report.Modality == "SR"


def without_time(dataset, element):
    if element.VR in ("TM", "DA", "DT"):
        element.value = None


@pytest.mark.whole
def test_made_twice_the_same_but_for_the_time(trained, scan, results, tmp_path):
    assert explain(scan, trained[0] / "models", tmp_path).returncode == 0
    files = sorted(p.relative_to(results[0]) for p in results[0].rglob("*.dcm"))
    (again,) = (tmp_path / "dicom").iterdir()
    for file in files:
        one, other = (pydicom.dcmread(folder / file) for folder in (results[0], again))
        for dataset in (one, other):
            dataset.walk(without_time)
        assert one == other, file


def valid(path):
    """Errors that dciodvfy finds in a file."""
    done = subprocess.run(["dciodvfy", path], capture_output=True, text=True)
    return [line for line in done.stderr.splitlines() if line.startswith("Error")]


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="needs dicom3tools")
def test_files_are_valid(results, scan):
    files = list(results[0].rglob("*.dcm"))
    assert len(files) == 1 + len(list(scan.iterdir()))
    assert [fault for file in files for fault in valid(file)] == []


@pytest.mark.skipif(not shutil.which("dcmj2pnm"), reason="needs dcmtk")
def test_a_viewer_shows_them(results, tmp_path):
    file = results[0] / "acl-axial" / "0003.dcm"
    subprocess.run(["dcmj2pnm", "+on", file, tmp_path / "slice.png"], check=True)
    shown = np.asarray(Image.open(tmp_path / "slice.png"))
    assert (shown == pydicom.dcmread(file).pixel_array).all()


def test_a_study_without_most_of_its_header(trained, tmp_path):
    """What DICOM wants and the source lacks is empty; names may hold anything."""
    hostile = {"PatientName": "=HYPERLINK(1)^<b>", "PatientID": "", "Laterality": "L"}
    for number, plane in enumerate(PLANES):
        write_series(tmp_path / "scan", 900 + number, plane, 85.0, f"1.2.9.{number}",
                     StudyInstanceUID="1.2.9", **hostile)  # fmt: skip
    done = explain(tmp_path / "scan", trained[0] / "models", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "dicom").iterdir()
    for image in heat_maps(folder, "sagittal"):
        assert image.PatientName == hostile["PatientName"] and image.StudyID == ""
    if shutil.which("dciodvfy"):
        assert [fault for file in folder.rglob("*.dcm") for fault in valid(file)] == []


ODD = {"PatientSex": "f", "PatientBirthDate": "1970", "StudyTime": "12:00:00",
       "PatientName": "Smith", "StudyDescription": "Knie links", "IssuerOfPatientID": "WARD 3",
       "SpecificCharacterSet": ["", "ISO 2022 IR 87"]}  # fmt: skip


def test_headers_that_do_not_keep_to_dicom(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(pydicom.config.settings, "writing_validation_mode", pydicom.config.IGNORE)
    for number, plane in enumerate(PLANES):
        write_series(tmp_path / "scan", 900 + number, plane, 85.0, f"1.2.9.{number}",
                     StudyInstanceUID="1.2.9", **ODD)  # fmt: skip
    done = explain(tmp_path / "scan", trained[0] / "models", tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    (folder,) = (tmp_path / "dicom").iterdir()
    for file in folder.rglob("*.dcm"):
        one = pydicom.dcmread(file)
        for name in ("PatientName", "StudyDescription", "IssuerOfPatientID"):
            assert one[name].value == ODD[name]
        assert one.PatientSex == one.PatientBirthDate == one.StudyTime == ""


def test_two_knees_of_a_study_share_no_uid(trained, tmp_path):
    write_study(tmp_path, 4, "both")
    done = explain(next(tmp_path.glob("study*")), trained[0] / "models", tmp_path, "--all")
    assert done.returncode == 0, done.stderr
    uids, listed = [], []
    for folder in (tmp_path / "dicom").iterdir():
        files = [pydicom.dcmread(file) for file in folder.rglob("*.dcm")]
        # As a viewer lists them: number and description of each series.
        listed += {(one.SeriesNumber, one.SeriesDescription) for one in files}
        word = {"L": "left acl", "R": "right acl"}[folder.name[-1]]
        assert all(one.SeriesDescription.startswith(word) for one in files)
        names = ("SOPInstanceUID", "SeriesInstanceUID")
        uids.append({str(one[name].value) for one in files for name in names})
    left, right = uids
    assert left and right and left.isdisjoint(right)
    assert len(listed) == 8 and all(len(set(column)) == 8 for column in zip(*listed, strict=True))


def test_numbers_of_series_differ_whatever_run_writes_them():
    tasks = ["acl", "meniscus", "abnormal", *FINDINGS.values()]

    def numbers():
        for side in ("L", "R", ""):
            origin = dicom_results.Origin(None, {}, side, "key")
            for task in set(tasks):
                for number in (*range(12), dicom_results.REPORT_NUMBER):
                    yield origin.series_number(task, number)

    found = list(numbers())
    assert len(set(found)) == len(found) == 3 * 14 * 13 and found == list(numbers())
    assert min(found) > 9999 and max(found) < 2**31  # scanners' and DICOM's (PS3.5 6.2, IS)
    last = dicom_results.FIRST_SERIES + dicom_results.TASKS * dicom_results.OF_A_TASK
    assert last < 2**31
    of_planes = {dicom_results.place_of(maps_of(plane=plane)) for plane in ALL_PLANES}
    joint = dicom_results.place_of(maps_of(joined=("axial", "sagittal")))
    assert len(of_planes) == len(ALL_PLANES) and joint not in of_planes
    most = len(ALL_PLANES) + dicom_results.JOINT_PLACES
    assert joint < most <= dicom_results.REPORT_NUMBER < 400


def test_a_long_finding_does_not_push_out_what_its_report_is_for(monkeypatch):
    monkeypatch.setattr(dicom_results, "sr", MagicMock())
    monkeypatch.setattr(dicom_results, "of_study", lambda report, study: report)
    finding = Finding(TaskModels("f" * 80, {}, None, "d", [], 0.5), {}, None, {})
    dicom_results.make_report(finding, dicom_results.Origin(None, {}, "R", "key"))
    description = dicom_results.sr.EnhancedSR.call_args.kwargs["series_description"]
    assert len(description) == 64 and description.startswith("right fff")
    assert description.endswith("research use only")


@pytest.mark.whole
def test_all_exams_go_on_where_dicom_is_missing(trained, scan, tmp_path):
    """A run without --dicom first; and an exam that belongs to no study."""
    models, inbox = trained[0] / "models", tmp_path / "inbox"
    shutil.copytree(scan, inbox / "a")
    (inbox / "b").mkdir()
    voxels = np.random.default_rng(0).integers(0, 200, (64, 64, 12), dtype=np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([1.2, 1.2, 4, 1])), inbox / "b/a.nii.gz")
    args = ("explain.py", inbox, "--all", "--task", "acl", "--models-dir", models, "--precision",
            "fp32", "--allow-synthetic", "--out", tmp_path / "report")  # fmt: skip
    done = run_script(*args)
    assert done.returncode == 0 and "2 exams explained" in done.stdout
    done = run_script(*args, "--dicom", tmp_path / "dicom")
    assert done.returncode == 1 and "NIfTI belongs to no DICOM study" in done.stderr
    (folder,) = (tmp_path / "dicom").iterdir()
    assert (folder / "report-acl.dcm").is_file() and len(list(folder.iterdir())) == 4
    # What is of other networks is written again, and nothing of theirs stays.
    rows = tmp_path / "report" / "exams.jsonl"
    rows.write_text(rows.read_text().replace('"dicom": true', '"dicom": false'))
    shutil.copytree(folder / "acl-axial", folder / "acl-axial-of-axial+coronal")
    done = run_script(*args, "--dicom", tmp_path / "dicom")
    assert done.returncode == 1 and "2 exams explained" in done.stdout
    assert not (folder / "acl-axial-of-axial+coronal").exists()
    # The study has its results, the other is tried again.
    done = run_script(*args, "--dicom", tmp_path / "dicom")
    assert done.returncode == 1 and "1 exam explained, 1 were there" in done.stdout


FP32 = Options(torch.device("cpu"), "fp32", False)


def test_a_finding_has_its_uids_whatever_else_is_asked(tmp_path):
    """Its own networks, the precision and the code change them; other findings do not."""
    for number, plane in enumerate(PLANES):
        write_series(tmp_path / "scan", number, plane, 85.0, f"1.2.9.{number}", Laterality="L",
                     StudyInstanceUID="1.2.9")  # fmt: skip
    exam = Exam("abc", "", {}, {}, "hash", origin=described(tmp_path / "scan"))

    def uids(task, out, *findings, options=FP32):
        dicom_results.write_results(exam, findings, options, tmp_path / out)
        folder = tmp_path / out / "abc"
        paths = [folder / f"report-{task}.dcm", *(folder / f"{task}-axial").iterdir()]
        files = [pydicom.dcmread(path) for path in paths]
        assert {file.get("FrameOfReferenceUID") for file in files[1:]} == {frame}
        return {file.SOPInstanceUID for file in files} | {file.SeriesInstanceUID for file in files}

    frame = dicom_results.read_origin(exam).planes["axial"]["frame"]
    one = maps_of(SLICES)._replace(volume=np.zeros((SLICES, 256, 256), np.uint8))
    acl, cyst = (
        Finding(TaskModels(task, {}, None, digest, [None], 0.5), {"axial": one}, None, {})
        for task, digest in (("acl", "a"), ("cyst", "b"))
    )
    alone, together = uids("acl", "alone", acl), uids("acl", "both", acl, cyst)
    assert alone == together and len(alone) == 2 + 1 + SLICES
    other = acl._replace(models=acl.models._replace(digest="c"))
    assert alone.isdisjoint(uids("acl", "other", other))
    assert alone.isdisjoint(uids("acl", "bf16", acl, options=FP32._replace(precision="bf16")))
    assert alone.isdisjoint(uids("cyst", "both", acl, cyst))


@pytest.mark.parametrize("sha, is_known", [
    ("0123456789ab", True), ("0123456789ab+", False), ("unknown", False),
])  # fmt: skip
def test_code_that_git_does_not_know_has_a_version_of_its_own(tmp_path, monkeypatch, sha, is_known):
    monkeypatch.setattr(provenance, "git_sha", lambda: sha)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    (tmp_path / "mrnet").mkdir()
    versions = []
    for code in ("x = 1", "x = 2", "x = 1"):
        (tmp_path / "mrnet" / "figures.py").write_text(code)
        versions.append(provenance.code_version.__wrapped__())
    assert versions[0] == versions[2] and (versions[0] == versions[1]) == is_known
    assert all(version.startswith(sha) for version in versions)


@pytest.mark.parametrize("name, given, kept", [
    ("StudyDate", "00000000", ""), ("PatientBirthDate", "19700230", ""), ("StudyDate", "2020", ""),
    ("PatientBirthDate", "19700228", "19700228"), ("StudyTime", "246060", ""),
    ("StudyTime", "120000.5", "120000.5"), ("PatientSex", "f", ""), ("PatientSex", "F", "F"),
    ("ReferringPhysicianName", ["A^B", "C^D"], "A^B"), ("AccessionNumber", ["1", "2"], "1"),
])  # fmt: skip
def test_what_no_reader_takes_is_not_written_again(name, given, kept, monkeypatch):
    monkeypatch.setattr(pydicom.config.settings, "reading_validation_mode", pydicom.config.IGNORE)
    study = pydicom.Dataset()
    study.StudyInstanceUID = "1.2.9"
    setattr(study, name, given)
    planes = {
        "axial": {"frame": "1.2", "sources": [["1.2.840.10008.5.1.4.1.1.4", "1.3", "1.4", 1]]}
    }
    origin = {"study": study.to_json_dict(), "planes": planes, "side": "L"}
    found = dicom_results.read_origin(Exam("abc", "", {}, {}, "hash", origin=origin))
    assert found.study[name].value == kept
    finding = Finding(TaskModels("acl", {}, None, "d", [None], 0.5), {"axial": maps_of()}, None, {})
    assert dicom_results.make_report(finding, found)[name].value == kept


def test_results_go_where_nothing_is_said_any_more(tmp_path):
    folder = tmp_path / "abc"
    for name in ("acl-axial", "acl-sagittal", "acl-axial-of-axial+sagittal", "cyst-axial"):
        (folder / name).mkdir(parents=True)
        (folder / name / "0001.dcm").touch()
    for name in ("report-acl.dcm", "report-cyst.dcm"):
        (folder / name).touch()
    report, others = folder / "report-acl.dcm", ["cyst-axial", "report-cyst.dcm"]
    dicom_results.remove_others(folder, ["acl"], [folder / "acl-axial", report])
    assert {p.name for p in folder.iterdir()} == {"acl-axial", "report-acl.dcm", *others}
    finding = Finding(TaskModels("acl", {}, None, "d", [], 0.5), {}, None, {})
    exam = SimpleNamespace(name="abc")
    assert dicom_results.write_results(exam, [finding], "", tmp_path) == []
    assert sorted(p.name for p in folder.iterdir()) == others


def test_long_names_of_findings_have_codes_of_their_own():
    names = ["acl", "medial-cartilage-femur", "medial-cartilage-tibia"]
    codes = [dicom_results.short_code(name, "task-", name) for name in names]
    assert codes[0] == "acl" and len(set(codes)) == 3 and max(map(len, codes)) == 16


def test_probabilities_of_joined_planes_are_their_own():
    names = ["axial", "coronal", "axial+coronal", "axial+coronal+sagittal"]
    codes = [dicom_results.probability_code(name) for name in names]
    assert len(set(codes)) == 4 and max(map(len, codes)) <= 16
    planes = {
        name: maps_of(joined=tuple(name.split("+")))._replace(probability=k / 10)
        for k, name in enumerate(names)
    }
    finding = Finding(TaskModels("acl", {}, None, "d", [], 0.5), planes, None, {})
    origin = dicom_results.Origin(None, {}, "L", "key")
    (group,) = dicom_results.measured(finding, origin)
    said = [item for item in group.ContentSequence if item.ValueType == "NUM"]
    values = [float(item.MeasuredValueSequence[0].NumericValue) for item in said]
    assert values == pytest.approx([0, 0.1, 0.2, 0.3])
    assert [item.ConceptNameCodeSequence[0].CodeMeaning for item in said] == [
        f"Probability, {name}" for name in names
    ]


def test_a_decision_from_fewer_planes_than_are_shown_says_which():
    """Networks of three planes, a stack that knows two of them only."""
    planes = {plane: maps_of(plane=plane) for plane in PLANES}
    decision = Decision(0.6, 0.5, "positive", ["axial", "coronal"])
    finding = Finding(TaskModels("acl", {}, None, "d", [], 0.5), planes, decision, {})
    whole = finding._replace(decision=decision._replace(planes=[*PLANES]))
    exam = SimpleNamespace(name="7")
    for one, words in ((finding, "axial+coronal"), (whole, "")):
        assert one.decided_from == describe_finding(one)["decided_from"] == words
        assert headline(exam, one).endswith(f", decided from {words}" if words else ": positive")
        (group,) = dicom_results.measured(one, dicom_results.Origin(None, {}, "L", "key"))
        said = [item.TextValue for item in group.ContentSequence if item.ValueType == "TEXT"]
        assert ("Decided from axial+coronal alone" in said) == bool(words)
        assert not any("usable" in text for text in said)


def test_a_report_says_which_plane_could_not_be_used():
    """With --partial there is a decision all the same."""
    planes = {plane: maps_of(plane=plane) for plane in ("axial", "coronal")}
    decision = Decision(0.6, 0.5, "positive", ["axial", "coronal"])
    unusable = {"sagittal": "/home/smith/knee.dcm: gap after it"}
    finding = Finding(TaskModels("acl", {}, None, "d", [], 0.5), planes, decision, unusable)
    (group,) = dicom_results.measured(finding, dicom_results.Origin(None, {}, "L", "key"))
    said = [item.TextValue for item in group.ContentSequence if item.ValueType == "TEXT"]
    assert "Scanned, but not usable: sagittal" in said and "smith" not in str(group)


@pytest.mark.parametrize("warning, told", [
    ("left or right knee not known, so it is not mirrored: what is said of medial and lateral may "
     "be exchanged",) * 2,
    ("axial: passed over /home/jo smith/a.dcm: gap after it", "axial: passed over a series"),
    ("left out series 3 'PD', smith.dcm: apart", "left out a series"),
    ("series 4 'Ms O'smith left out' is 35 degrees from axial",
     "series 4 is 35 degrees from axial"),
    ("series 3 'T2/FS smith' is 40 degrees from axial", "series 3 is 40 degrees from axial"),
    ("series ? 'PD': slices may be missing at one end: its files are numbered 5 to 9",
     "series ?: slices may be missing at one end: its files are numbered 5 to 9"),
    ("C:\\smith\\a.dcm: odd", "a file cannot be used"), ("2 more warnings",) * 2,
])  # fmt: skip
def test_a_report_says_what_was_warned_of_without_paths(warning, told):
    models = TaskModels("acl", {}, None, "d", [], 0.5)
    origin = dicom_results.Origin(None, {}, "L", "key", (warning,))
    (group,) = dicom_results.measured(Finding(models, {}, None, {}), origin)
    said = [item.TextValue for item in group.ContentSequence if item.ValueType == "TEXT"]
    assert f"Warning: {told}" in said and "smith" not in str(group)


@pytest.mark.parametrize("count, frames, named", [
    (1, [1], None), (3, [1], 1), (3, [1, 2], [1, 2]), (3, [3], 3), (3, [1, 2, 3], None),
])  # fmt: skip
def test_some_frames_of_a_file_are_named(count, frames, named):
    image = pydicom.Dataset()
    source = ["1.2.840.10008.5.1.4.1.1.4.1", "1.2.3", "1.2", count]
    dicom_results.refer(image, [source], [[0, frame] for frame in frames])
    (item,) = image.SourceImageSequence
    assert item.get("ReferencedFrameNumber") == named


def test_a_heat_map_says_what_it_is(tmp_path, monkeypatch):
    """What its networks join, its colours, and the slices that they saw, within the picture."""
    for number, plane in enumerate(PLANES):
        write_series(tmp_path, number, plane, 85.0, f"1.2.9.{number}", Laterality="R",
                     StudyInstanceUID="1.2.9")  # fmt: skip
    exam = Exam("abc", "", {}, {}, "hash", origin=described(tmp_path))
    drawn, draw = [], ImageDraw.ImageDraw.text

    def keep(self, at, text, *more, **options):
        drawn.append((text, self.textbbox(at, text, font_size=options["font_size"])))
        draw(self, at, text, *more, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", keep)
    one = maps_of(SLICES, "axial", ("axial", "coronal", "sagittal", "sagittal-t1"))
    one = one._replace(volume=np.zeros((SLICES, 256, 256), np.uint8), maps=one.maps * 0 + 0.0049)
    counts = []
    for neighbours in (False, True):
        finding = Finding(TaskModels("acl", {}, None, "d", [None], 0.5), {}, None, {})
        images = dicom_results.heat_map_series(
            finding, one._replace(neighbours=neighbours), dicom_results.read_origin(exam)
        )
        counts.append([len(image.SourceImageSequence) for image in images])
        said = images[0].ImageComments
        assert "Yellow speaks for the finding, cyan against" in said and "+0.0049" in said
        assert ("neighbours" in said) == neighbours and "Research use only" in said
    assert counts == [[1] * SLICES, [2, *[3] * (SLICES - 2), 2]]
    text = " ".join(text for text, _ in drawn)
    assert "right acl 0.60, axial of axial+coronal+sagittal+sagittal-t1" in text
    assert all(box[2] <= 256 and box[3] <= 256 for _, box in drawn)


def test_an_earlier_longer_series_does_not_stay(tmp_path):
    for number in (1, 2, 3):
        (tmp_path / f"{number:04d}.dcm").write_bytes(b"old")
    (tmp_path / "notes.txt").write_text("mine")
    image = pydicom.Dataset()
    image.InstanceNumber, image.SOPClassUID, image.SOPInstanceUID = 1, "1.2", "1.3"
    image.file_meta = pydicom.dataset.FileMetaDataset()
    image.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    assert dicom_results.save_series([image], tmp_path) == (tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0001.dcm", "notes.txt"]


def test_what_has_no_study_in_one_line(trained, scan, tmp_path, monkeypatch):
    work = trained[0]
    done = explain(work / "data", work / "models", tmp_path, "--exam", "valid/20")
    assert_one_line_error(done, "belong to no DICOM study", "--dicom")
    (tmp_path / "scan").mkdir()
    voxels = np.random.default_rng(0).integers(0, 200, (64, 64, 12), dtype=np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([1.2, 1.2, 4, 1])), tmp_path / "scan/a.nii.gz")
    done = explain(tmp_path / "scan", work / "models", tmp_path)
    assert done.returncode == 2 and "NIfTI belongs to no DICOM study" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    monkeypatch.delitem(sys.modules, "mrnet.reports.dicom_results", raising=False)
    monkeypatch.delattr("mrnet.reports.dicom_results", raising=False)
    monkeypatch.setitem(sys.modules, "highdicom", None)
    done = explain(scan, work / "models", tmp_path / "missing")
    assert_one_line_error(done, "highdicom", "requirements-dicom-results.txt")
