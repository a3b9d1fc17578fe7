"""What a folder of scans has lost or mixed is said, and never answered about without a word."""

import errno
import os
import shutil
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.fileset import FileSet
from pydicom.sequence import Sequence
from pydicom.uid import MediaStorageDirectoryStorage, MRImageStorage, SecondaryCaptureImageStorage
from test_dicom import (
    PLANES,
    SLICES,
    THICK,
    edit,
    header,
    nifti,
    no_fsync,  # noqa: F401
    write,
    write_exam,
    write_series,
    zipped,
)

from mrnet.errors import InputError
from mrnet.inference.exams import FROM_DICOM, UNKNOWN_CONTRAST, open_exams, refuse_unfit
from mrnet.inference.task_models import Network, TaskModels
from mrnet.runtime.cli import status_of
from mrnet.scans import serve
from mrnet.scans.command import Report
from mrnet.scans.series import Frame, Patient
from mrnet.scans.studies import Choice, Study, exams_mixed, find_exams, slices_lost, volumes_of


def read(folder, **choice):
    """The only exam under a folder: its volumes, {plane: why it cannot be used}, all messages."""
    report = Report(collect=True)
    (exam,) = find_exams(folder, report)
    volumes, unusable, _ = volumes_of(exam, Choice([], "pad")._replace(**choice), report, "exam")
    return volumes, unusable, "\n".join(text for _, text in report.take())


def sagittal(folder, number, description, **more):
    return write_series(folder / str(number), "sagittal", series=f"1.2.3.4.{number}", number=number,
                        description=description, **more)  # fmt: skip


# --- another series in the place of one with a fault ----------------------------------------------


def test_a_t1_never_takes_the_place_of_a_fluid_sensitive_series(tmp_path):
    sagittal(tmp_path, 3, "PD FS sag", keep=[0, 1, 2, 3, 6, 7, 8])
    sagittal(tmp_path, 4, "T1 sag")
    volumes, unusable, said = read(tmp_path)
    assert not volumes and "about 2 missing" in unusable["sagittal"]
    assert "series 4 'T1 sag' is no fluid-sensitive series" in said
    volumes, unusable, _ = read(tmp_path, series=["T1"])
    assert volumes["sagittal"].shape[0] == SLICES and not unusable


@pytest.mark.parametrize(
    "descriptions, t1_planes, taken",
    [
        (["T1 sag"], (), None),  # a plane that was scanned, in another contrast
        (["T1 sag"], ("sagittal",), "T1 sag"),
        (["T1 sag", "PD FS sag"], (), "PD FS sag"),
        (["T1 sag", "PD FS sag"], ("sagittal",), "T1 sag"),
        (["T1 sag", "PD FS sag"], ("coronal",), "PD FS sag"),
        (["PD FS sag"], ("sagittal",), None),
        (["sag DESS", "T1 sag"], (), "sag DESS"),  # nothing tells, so it may be
        (["sag DESS", "PD sag"], ("sagittal",), None),
    ],
)
def test_a_plane_is_of_one_contrast(tmp_path, descriptions, t1_planes, taken):
    """MRNet's coronal networks learnt from T1 series, others from fluid-sensitive ones."""
    for number, description in enumerate(descriptions):
        sagittal(tmp_path, number, description)
    volumes, unusable, said = read(tmp_path, t1_planes=t1_planes)
    if taken:
        assert not unusable and f"'{taken}', {SLICES} slices" in said
    else:
        kind = "T1" if t1_planes else "fluid-sensitive"
        assert not volumes and f"is no {kind} series and not taken" in unusable["sagittal"]
    assert read(tmp_path, t1_planes=t1_planes, series=["sag"])[0].keys() == {"sagittal"}


@pytest.mark.parametrize("description, contrast", [
    # As Philips (a letter for the plane), Siemens, GE and their users call series.
    ("cT1W_TSE", 0), ("sT1W TSE SENSE", 0), ("SagT1", 0), ("3DT1", 0), ("t1_tse_fs_sag", 0),
    ("PD left1", 1), ("cor T2 SET1", 1), ("sag PD PT1", 1), ("sag DP", 1), ("sag FSPD", 2),
    ("Ax PD F/S", 2), ("t2_de3d_we_sag", 2), ("Sag PD F/S IDEAL", 2), ("Ax T2 Flex (F/S)", 2),
    ("Knee Flex 8ch PD F/S cor", 2), ("PD FS flex with op", 2), ("PD DIXON NO FAT SAT", 1),
    ("SAG PD w/o FS", 1), ("SAG PD NFS", 1), ("sag PD w/out fat sat", 1),
    ("PD non fat sat", 1), ("sag pdfs", 2), ("T2_SPAIR_sag", 2), ("PDW_SPAIR_COR", 2),
    ("t2_tse_dixon_sag_W", 2), ("t2_tse_dixon_sag_in", 1), ("WATER: Sag T2 FLEX", 2),
    ("InPhase: Sag T2 FLEX", 1),
])  # fmt: skip
def test_the_contrast_that_a_description_tells(tmp_path, description, contrast):
    sagittal(tmp_path, 1, description)
    (exam,) = find_exams(tmp_path, Report(collect=True))
    (series,) = exam.series
    assert series.contrast == contrast and series.is_t1 == (contrast == 0)


@pytest.mark.parametrize("description, kind", [
    ("t2_tse_dixon_sag_F", "M"), ("t2_tse_dixon_sag_opp", "M"), ("FAT: Sag T2 FLEX", "M"),
    ("OutPhase: Sag T2 IDEAL", "M"), ("sag mDIXON", "F"), ("sag mDIXON", "OP"),
    ("SAG T2 MAP", "M"), ("sag cartilage", "T2 MAP"), ("sag PD", "P"),
])  # fmt: skip
def test_fat_opposed_phases_and_maps_are_no_pictures(tmp_path, description, kind):
    """The file order must not decide: here the others come first."""
    sagittal(tmp_path, 1, description, ImageType=["DERIVED", "PRIMARY", kind])
    sagittal(tmp_path, 2, "t2_tse_dixon_sag_W", ImageType=["DERIVED", "PRIMARY", "M"])
    volumes, unusable, said = read(tmp_path)
    assert "sagittal: series 2 't2_tse_dixon_sag_W'" in said and not unusable
    assert f"skipped: series 1 '{description}', " in said and "picture" in said


def test_a_dixon_scan_in_one_series_is_its_water(tmp_path):
    """Philips' way: four pictures of each place, told apart by ImageType alone."""
    for number, kind in enumerate(("IP", "W", "OP", "F")):
        for path in write_series(tmp_path / kind, "sagittal", description="PD sag mDIXON",
                                 ImageType=["DERIVED", "PRIMARY", kind, kind]):  # fmt: skip
            edit(path, RescaleSlope=1, RescaleIntercept=1000 * number)
    (exam,) = find_exams(tmp_path, Report(collect=True))
    (series,) = exam.series
    assert {frame.file.folder.name for frame in series.frames} == {"W"}
    assert not series.fault and series.contrast == 2 and series.shape[0] == SLICES


def test_the_water_of_a_dixon_scan_goes_before_its_in_phase_picture(tmp_path):
    for number, kind in ((1, "IP"), (2, "W"), (3, "IN_PHASE")):
        sagittal(tmp_path, number, "PD sag mDIXON", ImageType=["DERIVED", "PRIMARY", kind])
    _, unusable, said = read(tmp_path)
    assert "sagittal: series 2 " in said and not unusable


@pytest.mark.parametrize("part, series, study, is_knee", [
    ("KNEE", "PD FS sag", "", True), ("", "PD FS sag", "", True), ("LEG", "PD FS sag", "", True),
    ("LOWER EXTREMITY", "PD FS sag", "", True), ("ANKLE", "PD FS sag", "", False),
    ("LSPINE", "T2 sag", "", False), ("HEAD", "T2 sag", "", False),
    ("HEAD", "PD FS knee sag", "", True),  # the tag is a leftover of the scan before
    ("HIP", "PD FS sag", "MRI KNEE LEFT", True),
    ("HEAD", "PD FS sag hand coil", "MR KNEE", True), ("HEAD", "PD FS sag", "膝関節MRI", True),
    ("FOOT", "PD FS sag", "knä höger", True), ("SPINE", "PD FS sag", "MR kolano L", True),
    ("ANKLE", "PD FS sag ankle", "MRI knee and ankle", False),
    ("THIGH", "PD FS sag", "", False), ("LOWERLEG", "PD FS sag", "", False),
    ("TIBIA", "PD FS sag", "", False), ("FEMUR", "PD FS sag", "MR KNEE", True),
])  # fmt: skip
def test_another_part_of_the_body_is_not_answered_as_a_knee(tmp_path, part, series, study, is_knee):
    more = {name: value for name, value in
            (("BodyPartExamined", part), ("StudyDescription", study)) if value}  # fmt: skip
    sagittal(tmp_path, 1, series, SpecificCharacterSet="ISO_IR 192", **more)
    volumes, unusable, said = read(tmp_path)
    assert bool(volumes) == is_knee
    if not is_knee:
        assert f"{part} by its header, not a knee" in unusable["sagittal"]
        write_series(tmp_path / "2", "coronal", series="1.2.3.4.2", number=2, description="PD FS")
        unusable = read(tmp_path)[1]  # it may be that plane, of a knee with a wrong header
        assert f"it may be series 1 '{series}': {part}" in unusable["sagittal"]


@pytest.mark.parametrize("series, study, part", [
    # As hospitals call them, where BodyPartExamined is missing.
    ("SAG T2", "MRI LUMBAR SPINE WO CONTRAST", "LUMBAR SPINE"),
    ("AX PD FS SHOULDER", "", "SHOULDER"), ("T2 sag", "MR HEAD", "HEAD"),
    ("AX STIR CALF", "MRI LOWER EXTREMITY", "CALF"),
    ("PD FS sag ankle", "MR knee + ankle", "ANKLE"),
    ("COR PD FS", "MRI LOWER EXTREMITY JOINT LEFT", ""), ("PD FS sag foot first", "", ""),
    ("PD FS sag shoulder coil", "", ""), ("sag PD femur", "MRI KNEE LEFT", ""),
    ("sag PD patella - tibia", "", ""), ("PD FS sag ankle", "MR knee", ""),
])  # fmt: skip
def test_titles_tell_the_part_where_the_body_part_is_missing(tmp_path, series, study, part):
    sagittal(tmp_path, 1, series, **{"StudyDescription": study} if study else {})
    volumes, unusable, _ = read(tmp_path)
    assert bool(volumes) == (not part)
    assert not part or f"{part} by its header, not a knee" in unusable["sagittal"]


def test_an_anatomic_region_tells_the_part_too(tmp_path):
    region, anatomy, shared = Dataset(), Dataset(), Dataset()
    region.CodeMeaning = "Lumbar spine"
    anatomy.AnatomicRegionSequence = Sequence([region])
    shared.FrameAnatomySequence = Sequence([anatomy])
    sagittal(tmp_path, 1, "T2 sag", SharedFunctionalGroupsSequence=Sequence([shared]))
    assert "SPINE by its header" in read(tmp_path)[1]["sagittal"]


def test_t1_planes_of_their_own(tmp_path):
    """For networks that take them beside the fluid-sensitive planes."""
    sagittal(tmp_path, 1, "PD FS sag")
    assert read(tmp_path, t1=True)[0].keys() == {"sagittal"}  # none was scanned
    sagittal(tmp_path, 2, "T1 sag", keep=range(SLICES - 1))
    volumes, unusable, said = read(tmp_path, t1=True)
    assert {p: len(v) for p, v in volumes.items()} == {"sagittal": SLICES,
                                                       "sagittal-t1": SLICES - 1}  # fmt: skip
    assert "sagittal-t1: series 2 'T1 sag'" in said and not unusable
    assert read(tmp_path)[0].keys() == {"sagittal"}
    shutil.rmtree(tmp_path / "2")
    sagittal(tmp_path, 2, "T1 sag", keep=[0, 1, 2, 3, 6, 7, 8])
    volumes, unusable, _ = read(tmp_path, t1=True)
    assert volumes.keys() == {"sagittal"} and "missing" in unusable["sagittal-t1"]


def test_networks_of_t1_planes_get_them_from_scans(tmp_path):
    for number, description in enumerate(("T1 sag", "PD FS sag")):
        sagittal(tmp_path / "scan", number, description)
    models = networks([], ("sagittal", "sagittal-t1"))
    with open_exams([tmp_path / "scan"], log=print, networks=[models]) as exams:
        (exam,) = exams.each()
        assert exam.paths.keys() == {"sagittal", "sagittal-t1"}


def networks(t1_planes, planes=("coronal", "sagittal")):
    about = FROM_DICOM | {"name": "theirs", "t1_planes": t1_planes}
    columns = {p: [Network(None, (p,), "raw", "grey", False, "", {})] for p in planes}
    return TaskModels("acl", columns, None, "", [about], 0.5)


def test_scans_are_read_in_the_contrast_that_the_networks_know(tmp_path):
    for number, description in enumerate(("T1 sag", "PD FS sag")):
        sagittal(tmp_path / "scan", number, description)
    for ours, taken in (([], "PD FS sag"), (["sagittal"], "T1 sag")):
        lines = []
        with open_exams([tmp_path / "scan"], log=lines.append, networks=[networks(ours)]) as exams:
            assert len(list(exams.each())) == 1
            refuse_unfit(networks(ours), exams.datasets, False, PLANES)
        assert any(f"sagittal: series {ours != ['sagittal']:d} '{taken}'" in line for line in lines)
        assert UNKNOWN_CONTRAST not in lines
    lines, unknown = [], networks([])._replace(datasets=[None])
    with open_exams([tmp_path / "scan"], log=lines.append, networks=[unknown]) as exams:
        refuse_unfit(unknown, exams.datasets, False, PLANES)
    assert UNKNOWN_CONTRAST in lines


def test_exams_of_another_contrast_are_refused(tmp_path):
    given = [FROM_DICOM | {"t1_planes": ["coronal"]}]
    refuse_unfit(networks(["coronal"]), given, False, PLANES)
    refuse_unfit(networks([], ["sagittal"]), given, False, PLANES)  # they take no coronal plane
    refuse_unfit(networks([]), given, False, {"sagittal"})  # there is none
    for theirs, mine in (([], given[0]), (["coronal"], FROM_DICOM)):
        with pytest.raises(InputError, match="coronal series are .*--t1-plane coronal"):
            refuse_unfit(networks(theirs), [mine], False, PLANES)


def test_copies_count_once_and_what_is_no_slice_is_none(tmp_path):
    path = sagittal(tmp_path, 3, "PD FS sag")[0]
    shutil.copy(path, tmp_path / "copy")
    shutil.copy(path, tmp_path / "localiser")
    edit(tmp_path / "localiser", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    volumes, unusable, said = read(tmp_path)
    assert len(volumes["sagittal"]) == SLICES and not unusable
    assert "skipped: series 3 'PD FS sag', copies of its files: 1" in said
    assert "localiser (files: 1)" in said


def test_another_fluid_sensitive_series_does_and_says_so(tmp_path):
    damaged = sagittal(tmp_path, 3, "PD FS sag")
    damaged[0].write_bytes(damaged[0].read_bytes()[:-9000])
    sagittal(tmp_path, 4, "PD sag")
    volumes, unusable, said = read(tmp_path)
    assert list(volumes) == ["sagittal"] and not unusable and "passed over" in said


def test_without_a_description_the_echo_time_tells(tmp_path):
    sagittal(tmp_path, 3, "", EchoTime=10.0)
    sagittal(tmp_path, 4, "", EchoTime=40.0, keep=range(SLICES - 2))
    volumes, _, said = read(tmp_path)
    assert len(volumes["sagittal"]) == SLICES - 2 and "sagittal: series 4 ''" in said


@pytest.mark.parametrize("description, times, contrast", [
    # Echo and repetition time in ms, as knees are scanned.
    ("SAG", (12, 550), "T1"), ("SAG", (12, 3000), 1), ("SAG", (80, 3500), 1), ("", (12, 550), "T1"),
    ("SAG FS", (12, 550), "T1"), ("SAG FS", (35, 3000), 2), ("SAG FAT SAT", (12, 2500), 2),
    ("SAG FS", (), 2), ("SAG", (), 0), ("PD SAG", (12, 900), 1), ("SAG STIR", (15, 900), 2),
    ("SAG DESS", (5, 16), 0), ("sag gre", (9, 600), 0), ("SAG FS post Gd", (), "T1"),
    ("SAG FS +C", (), "T1"), ("SAG VIBE FS POST", (2, 5), "T1"), ("SAG FS POST", (60, 3500), 2),
    ("SAG PD FS POST", (), 2), ("SAG FS w/o contrast", (), 2), ("SAG FS post-op", (), 2),
])  # fmt: skip
def test_times_and_contrast_agent_tell_a_t1(tmp_path, description, times, contrast):
    """Where the description names no contrast; fat suppression alone is none."""
    more = dict(zip(("EchoTime", "RepetitionTime"), times, strict=False))
    sagittal(tmp_path, 1, description, **more)
    (exam,) = find_exams(tmp_path, Report(collect=True))
    (series,) = exam.series
    assert series.is_t1 == (contrast == "T1") and series.contrast == (contrast != "T1" and contrast)
    assert bool(read(tmp_path)[0]) == (contrast != "T1")


def test_the_header_tells_contrast_agent_and_gradient_echoes(tmp_path):
    sagittal(tmp_path / "a", 1, "SAG FS", ContrastBolusAgent="Gadovist")
    assert "is no fluid-sensitive series" in read(tmp_path / "a")[1]["sagittal"]
    sagittal(tmp_path / "none", 1, "SAG FS", ContrastBolusAgent="NONE")
    assert list(read(tmp_path / "none")[0]) == ["sagittal"]
    for name, more in (("SAG 3D DESS", {}), ("SAG 3D", {"ScanningSequence": "GR"})):
        sagittal(tmp_path / name, 1, name, ContrastBolusAgent="Gadovist", **more)
        assert list(read(tmp_path / name)[0]) == ["sagittal"]
    sagittal(tmp_path / "b", 1, "SAG 3D", EchoTime=5, RepetitionTime=16, ScanningSequence="GR")
    assert list(read(tmp_path / "b")[0]) == ["sagittal"]  # nothing tells


@pytest.mark.parametrize("name, value, is_used", [
    ("EchoTime", ["15", "80"], True), ("EchoTime", "short", True), ("RepetitionTime", "x", True),
    ("SeriesNumber", ["3", "4"], True), ("RescaleSlope", "one", False),
    ("RescaleSlope", ["1", "2"], False), ("RescaleIntercept", "none", False),
])  # fmt: skip
def test_an_odd_number_is_a_fault_only_where_pixels_depend_on_it(tmp_path, name, value, is_used):
    """Written as text: pydicom itself refuses to write such numbers."""
    for path in sagittal(tmp_path, 3, "PD FS sag"):
        ds = pydicom.dcmread(path)
        ds[name] = pydicom.DataElement(name, "LO", value)
        ds.save_as(path)
        raw = path.read_bytes()
        tag = ds[name].tag
        tag = tag.group.to_bytes(2, "little") + tag.element.to_bytes(2, "little")
        vr = b"IS" if name == "SeriesNumber" else b"DS"
        assert raw.count(tag + b"LO") == 1
        path.write_bytes(raw.replace(tag + b"LO", tag + vr))
    report = Report(collect=True)
    if is_used:
        assert len(read(tmp_path)[0]["sagittal"]) == SLICES
    else:
        assert not find_exams(tmp_path, report) and report.failures == SLICES


# --- which series ---------------------------------------------------------------------------------


def turn(paths, degrees):
    """Turn a coronal series about the patient's long axis."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    for path in paths:
        x, y, z = pydicom.dcmread(path).ImagePositionPatient
        place = c * x - s * y, s * x + c * y, z
        edit(path, ImageOrientationPatient=[f"{v:.6f}" for v in (c, s, 0, 0, 0, -1)],
             ImagePositionPatient=[f"{v:.6f}" for v in place])  # fmt: skip


def coronal(folder, number, description="PD FS", **more):
    return write_series(folder / str(number), "coronal", series=f"1.2.3.4.{number}", number=number,
                        description=description, **more)  # fmt: skip


@pytest.mark.parametrize("degrees, taken", [(35, 2), (10, 1)])
def test_a_straight_series_goes_before_an_oblique_one(tmp_path, degrees, taken):
    """Though this has more slices: of up to 15 degrees, which are usual, they decide."""
    turn(coronal(tmp_path, 1), degrees)
    coronal(tmp_path, 2, keep=range(SLICES - 2))
    _, unusable, said = read(tmp_path)
    assert f"coronal: series {taken} " in said and not unusable


def test_an_original_series_goes_before_its_copy(tmp_path):
    coronal(tmp_path, 1, ImageType=["DERIVED", "SECONDARY", "MPR"])
    coronal(tmp_path, 2)
    assert "coronal: series 2 'PD FS', 9 slices; not taken: series 1 " in read(tmp_path)[2]


@pytest.mark.parametrize("description, kind, why", [
    ("PD FS sag", "MIP", "projection"), ("PD FS sag", "MAX_IP", "projection"),
    ("PD FS sag", "SUBTRACTION", "subtraction"), ("PD FS sag", "SUB", "subtraction"),
    ("PD FS sag", "SCREEN SAVE", "screen capture"), ("PD FS sag", "MPR", ""),
    ("Survey_SHC", "M", "localiser"), ("3-pl Loc", "M", "localiser"),
    ("3Plane Loc", "M", "localiser"),
    ("AAHScout", "M", "localiser"), ("FAST LOCALIZER", "M", "localiser"), ("sag block", "M", ""),
])  # fmt: skip
def test_what_is_no_picture_of_a_plane_is_skipped(tmp_path, description, kind, why):
    sagittal(tmp_path, 1, description, ImageType=["DERIVED", "SECONDARY", kind])
    volumes, _, said = read(tmp_path)
    assert bool(volumes) == (not why)
    assert not why or f"skipped: series 1 '{description}', {why} (files: 9)" in said


@pytest.mark.parametrize("count, sop_class, blocks", [
    (SLICES, MRImageStorage, True), (2, MRImageStorage, False),
    (SLICES, SecondaryCaptureImageStorage, False),
])  # fmt: skip
def test_a_screen_capture_is_no_lost_plane(tmp_path, count, sop_class, blocks):
    sagittal(tmp_path, 1, "PD FS sag")
    for path in coronal(tmp_path, 2, keep=range(count), SOPClassUID=sop_class):
        ds = pydicom.dcmread(path)
        del ds.ImagePositionPatient
        ds.save_as(path)
    volumes, unusable, said = read(tmp_path)
    assert list(volumes) == ["sagittal"] and bool(unusable) == blocks
    assert "skipped: series 2 'PD FS', " in said


# --- knees ----------------------------------------------------------------------------------------


def test_two_knees_in_turns_are_not_one_volume(tmp_path):
    """Stacks 160 mm apart whose slices lie between each other: depths alone look like one."""
    paths = write_series(tmp_path / "a", "axial")
    others = write_series(tmp_path / "b", "axial")
    for path in others:
        x, y, z = pydicom.dcmread(path).ImagePositionPatient
        edit(path, ImagePositionPatient=[x + 160, y, z + THICK / 2])
    assert len(paths) == len(others) == SLICES
    volumes, unusable, _ = read(tmp_path)
    assert not volumes and "160 mm beside" in unusable["axial"]
    assert "other knee" in unusable["axial"]


@pytest.mark.parametrize("kind", ["dicom", "nifti"])
def test_a_knee_of_unknown_side_is_not_shown_to_networks_of_left_knees(tmp_path, kind):
    if kind == "dicom":
        sagittal(tmp_path, 3, "PD FS sag")
    else:
        nifti(tmp_path / "sag.nii", "sagittal")
    assert list(read(tmp_path)[0]) == ["sagittal"]
    volumes, unusable, said = read(tmp_path, mirror=True)
    assert not volumes and "left or right knee is not recorded" in unusable["sagittal"]
    assert ("Laterality" if kind == "dicom" else "give its DICOM") in said


def test_a_nifti_file_may_tell_the_side(tmp_path):
    """Its coordinates do not: 0 is the scanner's middle in some files alone."""
    nifti(tmp_path / "sag.nii", "sagittal").rename(tmp_path / "knee_right_sag.nii")
    (exam,) = find_exams(tmp_path, Report(collect=True))
    assert exam.side == "R" and "sagittal" in read(tmp_path, mirror=True)[0]


def test_a_known_left_knee_is(tmp_path):
    sagittal(tmp_path, 3, "PD FS sag", Laterality="L")
    volumes, unusable, _ = read(tmp_path, mirror=True)
    assert list(volumes) == ["sagittal"] and not unusable


# --- files that vanish before they are counted ----------------------------------------------------


def zips(folder):
    """An exam as one zip file a plane."""
    write_exam(folder / "files")
    (folder / "zips").mkdir()
    for plane in PLANES:
        zipped(folder / "zips" / f"{plane}.zip", folder / "files" / plane)
    return folder / "zips"


def test_a_damaged_zip_is_a_plane_that_may_be_lost(tmp_path):
    folder = zips(tmp_path)
    path = folder / "coronal.zip"
    path.write_bytes(path.read_bytes()[:3000])
    volumes, unusable, said = read(folder)
    assert sorted(volumes) == ["axial", "sagittal"]
    assert "cannot be read: 1" in unusable["coronal"] and "coronal.zip" in said


def test_links_to_folders_are_followed_once_and_dead_ones_are_said(tmp_path):
    write_exam(tmp_path / "store")
    scan = tmp_path / "scan"
    scan.mkdir()
    for plane in PLANES:
        (scan / plane).symlink_to(tmp_path / "store" / plane)
    (scan / "axial" / "again").symlink_to(scan)  # a circle
    volumes, unusable, _ = read(scan)
    assert sorted(volumes) == sorted(PLANES) and not unusable
    (scan / "coronal").unlink()
    (scan / "coronal").symlink_to(tmp_path / "not fetched")
    volumes, unusable, said = read(scan)
    assert sorted(volumes) == ["axial", "sagittal"] and "cannot be read" in unusable["coronal"]
    assert "leads nowhere" in said


def test_a_link_beside_its_folder_does_not_take_its_name(tmp_path):
    write_exam(tmp_path / "scans" / "zz")
    (tmp_path / "scans" / "latest").symlink_to("zz")
    (exam,) = find_exams(tmp_path / "scans", Report(collect=True))
    assert exam.source == "zz"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read all folders")
def test_a_folder_without_permission_is_said(tmp_path):
    write_exam(tmp_path)
    (tmp_path / "coronal").chmod(0)
    volumes, unusable, _ = read(tmp_path)
    (tmp_path / "coronal").chmod(0o700)
    assert "cannot be read" in unusable["coronal"]


def test_a_series_whose_end_cannot_be_read_is_not_whole(tmp_path):
    """No gap shows it: what is left lies side by side."""
    for path in sagittal(tmp_path, 3, "PD FS sag")[:3]:
        path.write_bytes(path.read_bytes()[:400])
    volumes, unusable, _ = read(tmp_path)
    assert not volumes and "3 files beside its 6 slices cannot be read" in unusable["sagittal"]


def test_one_odd_file_beside_many_slices_does_not_matter(tmp_path):
    rest = *[None] * 4, 0.0, 1.0, 0.0, False, False, ""
    frames = [Frame(file, 0, *rest) for file in files(tmp_path / "a", 20)]
    for unread, lost in ((files(tmp_path / "a", 2), False), (files(tmp_path / "a", 3), True),
                         (files(tmp_path / "b", 9), False)):  # fmt: skip
        assert bool(slices_lost(SimpleNamespace(frames=frames), unread)) == lost
    enhanced = SimpleNamespace(frames=[frames[0]] * 20)  # one file holds the whole series
    assert not slices_lost(enhanced, files(tmp_path / "a", 9))


def test_unreadable_files_of_a_flat_folder_are_no_series_own(tmp_path):
    """They may be of any of its series, or of none: two series are there as before."""
    for number, plane in enumerate(PLANES[:2]):
        for path in write_series(tmp_path / plane, plane, series=f"1.2.3.{number}", number=number):
            path.rename(tmp_path / f"{plane}-{path.name}")
    for k in range(4):
        lost = tmp_path / f"lost{k}"
        lost.write_bytes(next(tmp_path.glob("axial-*")).read_bytes()[:400])
    volumes, unusable, _ = read(tmp_path)
    assert sorted(volumes) == sorted(PLANES[:2])
    assert list(unusable) == [PLANES[2]] and "cannot be read: 4" in unusable[PLANES[2]]


def files(folder, count):
    from mrnet.scans.files import File

    return [File(folder / f"{k}.dcm") for k in range(count)]


@pytest.mark.parametrize("numbers, is_doubted", [
    (range(9, 18), True), (range(17, 8, -1), True), (range(1, 10), False), (range(9, 0, -1), False),
    (range(0, 9), False), (range(10, 28, 2), False), ((3, 4, 5, 6, 7, 8, 9, 11, 10), False),
    ([""] * 9, False), ([7] * 9, False),
])  # fmt: skip
def test_a_series_may_lack_slices_at_one_end(tmp_path, numbers, is_doubted):
    """Where its numbers begin later; no fault, for some scanners count on."""
    for path, number in zip(sagittal(tmp_path, 3, "PD FS sag"), numbers, strict=True):
        edit(path, InstanceNumber=number)
    volumes, unusable, said = read(tmp_path)
    assert list(volumes) == ["sagittal"] and not unusable
    words = "series 3 'PD FS sag': slices may be missing at one end: its files are numbered 9 to 17"
    assert (words in said) == is_doubted == ("warning" in said)


def test_the_second_echo_of_a_series_lacks_nothing(tmp_path):
    """Its numbers begin where those of the first end."""
    for folder, echo, first in (("a", 15, 1), ("b", 80, SLICES + 1)):
        for number, path in enumerate(write_series(tmp_path / folder, "sagittal"), start=first):
            edit(path, EchoTime=echo, InstanceNumber=number)
    assert "warning" not in read(tmp_path)[2]


@pytest.mark.parametrize("lost, is_told", [(0, False), (2, True), (SLICES, False)])
def test_a_dicomdir_tells_what_is_missing(tmp_path, lost, is_told):
    """Also at an end, where no gap shows it. A series that is not there at all is not asked for."""
    disc = FileSet()
    for paths in (sagittal(tmp_path / "scan", 3, "PD FS sag"), coronal(tmp_path / "scan", 4)):
        for number, path in enumerate(paths, start=1):
            edit(path, InstanceNumber=number, StudyTime="120000", StudyID="1")
            disc.add(path)
    disc.write(tmp_path / "disc")
    instances = [pydicom.dcmread(path).SOPInstanceUID for path in paths[SLICES - lost :]]
    for instance in disc:
        if instance.SOPInstanceUID in instances:
            Path(instance.path).unlink()
    volumes, unusable, said = read(tmp_path / "disc")
    assert ("DICOMDIR: lists 9 images of it, 2 of them are not there" in said) == is_told
    assert list(unusable) == ["coronal"] * is_told
    assert volumes.keys() - {"coronal"} == {"sagittal"}


def test_a_damaged_dicomdir_stops_nothing(tmp_path):
    sagittal(tmp_path, 3, "PD FS sag")
    ds = header(SOPClassUID=MediaStorageDirectoryStorage)
    write(tmp_path / "DICOMDIR", ds)
    volumes, unusable, said = read(tmp_path)
    assert list(volumes) == ["sagittal"] and not unusable
    assert "DICOMDIR: AttributeError, truncated or damaged" in said and "not known" in said


# --- series that cannot be placed -----------------------------------------------------------------


def test_a_foreign_slice_in_a_series_may_hide_a_plane(tmp_path):
    write_series(tmp_path / "a", "sagittal")
    write_series(tmp_path / "c", "coronal", series="1.2.3.4.2", number=2)
    write_series(tmp_path / "d", "axial", series="1.2.3.4.2", number=2, keep=[4])
    volumes, unusable, _ = read(tmp_path)
    assert list(volumes) == ["sagittal"]
    assert "another orientation among them" in unusable["coronal"]


@pytest.mark.parametrize("kind", ["not coded", "two volumes"])
def test_nifti_that_cannot_be_placed_may_hide_a_plane(tmp_path, kind):
    import nibabel

    nifti(tmp_path / "ax.nii", "axial")
    image = nibabel.load(nifti(tmp_path / "sag.nii", "sagittal"))
    data, affine = np.array(image.dataobj), image.affine
    if kind == "two volumes":
        nibabel.save(nibabel.Nifti1Image(np.stack([data, data], -1), affine), tmp_path / "sag.nii")
    else:
        bare = nibabel.Nifti1Image(data, affine)
        bare.set_sform(affine, code=0)
        bare.set_qform(affine, code=0)
        nibabel.save(bare, tmp_path / "sag.nii")
    volumes, unusable, _ = read(tmp_path)
    assert list(volumes) == ["axial"] and "it may be file 'sag.nii'" in unusable["sagittal"]


# --- whose files they are -------------------------------------------------------------------------


def test_nifti_files_of_two_exams_in_one_folder(tmp_path):
    for who in ("p1", "p2"):
        for plane, word in zip(PLANES, ("ax", "co", "sa"), strict=True):
            nifti(tmp_path / f"{who}_{word}.nii", plane)
    volumes, unusable, _ = read(tmp_path)
    assert not volumes and set(unusable) == set(PLANES)
    assert "of two (p1 and p2)" in unusable["axial"]


@pytest.mark.parametrize(
    "names, are_two",
    [
        ("knee1_sag knee2_sag knee1_ax knee2_ax", True),
        ("p1_pd_sag p1_pd_cor p2_pd_cor p2_t1_sag", True),
        ("sag_proton_density_fs cor_proton_density_fs sag_t1 cor_t1", False),
        ("sag_pd_dixon_water cor_pd_dixon_water sag_t1 cor_t1 ax_dess", False),
        ("sag_pd_fs cor_pd_fs sag_t1_post cor_t1_post", False),
        ("3_sag_pd 4_cor_pd 5_ax_pd 6_sag_pd", False),  # numbers of series
        ("case01 case02", False),  # names that say nothing
    ],
)
def test_names_of_nifti_files(names, are_two):
    series = [SimpleNamespace(description=name) for name in names.split()]
    assert bool(exams_mixed(series)) == are_two


@pytest.mark.parametrize(
    "names",
    [
        ("knee_pd_fs_ax", "knee_pd_fs_cor", "knee_pd_fs_sag", "knee_t1_cor", "knee_t1_sag"),
        ("pd_tra_3", "pd_cor_4", "pd_sag_5", "t1_cor_6", "t1_sag_7"),  # each series' number
    ],
)
def test_nifti_files_of_one_exam_in_one_folder(tmp_path, names):
    planes = ("axial", "coronal", "sagittal", "coronal", "sagittal")
    for name, plane in zip(names, planes, strict=True):
        nifti(tmp_path / f"{name}.nii", plane)
    volumes, unusable, _ = read(tmp_path)
    assert sorted(volumes) == sorted(PLANES) and not unusable


def study(*patients):
    return Study(patients=set(patients))


def test_who_the_patient_is():
    """An issuer that one of the files leaves out is no second patient."""
    one, same = Patient("p1", "H"), Patient("p1", "")
    assert not study(one, same).mixed and study(one, same).patient == study(same).patient == "p1|"
    assert study(one, Patient("p1", "K")).mixed
    assert study(one, Patient("p2", "H")).mixed
    assert not study().mixed and study().patient == ""


def test_a_series_without_the_patients_number_is_compared_by_name():
    """What a series leaves out contradicts nothing."""
    one, named = Patient("p1", "H", "P", "19610203"), Patient("", "", "P", "19610203")
    assert not study(one, named).mixed and study(one, named).patient == "p1|"
    assert not study(Patient("p1"), named).mixed and study(named).patient == "P|19610203"
    assert not study(one, Patient(name="P")).mixed and not study(one, Patient()).mixed
    assert study(named, Patient(name="P")).patient == "P|19610203"
    assert not study(one, Patient("p1", "H", "married", "19610203")).mixed
    for other in (Patient(name="Q"), Patient(name="P", birth="19610204"), Patient("p2", name="P")):
        assert study(one, other).mixed
    assert study(named, Patient(name="Q")).mixed


def test_a_series_without_the_patients_number_is_of_the_exam(tmp_path):
    sagittal(tmp_path, 3, "PD FS sag")
    coronal(tmp_path, 4, PatientID="")
    assert sorted(read(tmp_path)[0]) == ["coronal", "sagittal"]
    axial = write_series(tmp_path / "5", "axial", number=5, PatientID="", PatientName="OTHER")
    assert len(axial) == SLICES and "two patients" in read(tmp_path)[1]["axial"]


def test_a_report_of_another_department_is_no_second_patient(tmp_path):
    sagittal(tmp_path, 3, "PD FS sag", IssuerOfPatientID="H")
    report = header(series="1.2.7", number=7, Modality="SR", PatientID="other")
    write(tmp_path / "sr", report)
    assert list(read(tmp_path)[0]) == ["sagittal"]


# --- the machine ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, words",
    [(MemoryError(), "not enough memory"), (PermissionError(13, "denied"), "denied")],
)
def test_what_the_machine_cannot_do_is_of_one_exam_alone(error, words):
    def convert(_exam):
        raise error

    volumes, unusable, describe = serve.attempt(convert, "exam")
    assert volumes == {} and describe() is None and set(unusable) == set(PLANES)
    assert all(words in why for why in unusable.values())


def test_a_worker_that_was_ended_is_one_line(tmp_path, capsys):
    def work():
        raise BrokenProcessPool

    assert serve.run_importer(work, tmp_path, Report(), "studies") == 1
    said = capsys.readouterr().err
    assert "fewer --workers" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("number", [errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG])
def test_a_path_that_cannot_be_written_is_one_line(number):
    assert status_of(OSError(number, os.strerror(number), "out"))[0] == 1
