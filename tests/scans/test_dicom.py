"""data/dicom/prepare.py on real scanner files and on series cut from one known patient."""

import csv
import errno
import gzip
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.data import DATA_ROOT
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    BasicTextSRStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MRImageStorage,
    RLELossless,
)

from data.dicom import prepare
from dataloader import MRDataset
from mrnet.inference.exams import open_exams
from mrnet.scans import files

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "data/dicom/prepare.py"
PYDICOM_FILES = Path(DATA_ROOT) / "test_files"
NIBABEL_FILES = Path(nibabel.__file__).parent


PLANES = ("axial", "coronal", "sagittal")
NAME, PATIENT_ID, BIRTH = "SECRETNAME^JANE", "SECRETID-4711", "19610203"
SIDE, STEP = 256, 0.6  # pixels and mm in the plane
SLICES, THICK = 9, 4.0  # slices and mm across

# --- one known patient ----------------------------------------------------------------------------


def tissue(x, y, z):
    """Signal at LPS coordinates in mm (arrays that broadcast): no symmetry in any direction."""
    value = 900 + 2.0 * x + 1.3 * y - 0.7 * z  # a different slope along each axis
    for cx, cy, cz, radius, signal in (
        (10, 22, 31, 18, 900),  # one ball in the left posterior superior corner ...
        (-12, 40, -20, 12, -500),
        (4, -45, 10, 25, 450),
    ):
        value = value + signal * ((x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2 < radius**2)
    return np.rint(value).astype(np.int32)


FINE = (np.arange(SIDE) - (SIDE - 1) / 2) * STEP  # mm, in the plane
COARSE = (np.arange(SLICES) - (SLICES - 1) / 2) * THICK  # mm, across
GRID = {  # ascending x, y, z of a scan in each plane
    "sagittal": (COARSE, FINE, FINE),
    "coronal": (FINE, COARSE, FINE),
    "axial": (FINE, FINE, COARSE),
}
LPS = {
    plane: tissue(x[:, None, None], y[None, :, None], z[None, None, :])
    for plane, (x, y, z) in GRID.items()
}  # (x, y, z), growing to the left, posterior, superior


def expected(plane):
    """What MRNet's layout should hold, by plain flips of the known array."""
    lps = LPS[plane]
    volume = {
        "sagittal": lps.transpose(0, 2, 1)[:, ::-1, :],  # slices R>L, rows S>I, columns A>P
        "coronal": lps.transpose(1, 2, 0)[:, ::-1, :],  # slices A>P, rows S>I, columns R>L
        "axial": lps.transpose(2, 1, 0)[::-1, :, :],  # slices S>I, rows A>P, columns R>L
    }[plane]
    return windowed(volume)


def windowed(volume):
    low, high = np.percentile(volume, (0.5, 99.5))
    return np.rint(np.clip((volume - low) / (high - low) * 255, 0, 255)).astype(np.uint8)


AXES = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0), "S": (0, 0, 1),
        "I": (0, 0, -1)}  # fmt: skip
USUAL = {"sagittal": "PI", "coronal": "LI", "axial": "LP"}  # along a row, down a column


def frames(plane, orientation=None):
    """The scan of a plane as a scanner may store it: list of (pixels, position), ascending.

    `orientation` is two letters: where columns grow to, where rows grow to.
    """
    across, down = (np.array(AXES[a]) for a in (orientation or USUAL[plane]))
    normal = {"sagittal": 0, "coronal": 1, "axial": 2}[plane]
    result = []
    for k in range(SLICES):
        image = np.take(LPS[plane], k, axis=normal)  # the two other axes, ascending
        rest = [a for a in range(3) if a != normal]
        if np.flatnonzero(down)[0] != rest[0]:
            image = image.T
        image = image[:: down.sum(), :: across.sum()]
        position = -FINE[-1] * across - FINE[-1] * down
        position[normal] = COARSE[k]
        result.append((image, position))
    return result


def header(study="1.2.3.4", series="1.2.3.4.1", number=1, description="PD TSE FS", **more):
    ds = Dataset()
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = NAME, PATIENT_ID, BIRTH
    ds.StudyDate, ds.AccessionNumber = "20200102", "SECRETACC"
    ds.SOPClassUID, ds.SOPInstanceUID = MRImageStorage, pydicom.uid.generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID = study, series
    ds.SeriesNumber, ds.SeriesDescription, ds.Modality = number, description, "MR"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "M"]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
    for name, value in more.items():
        setattr(ds, name, value)
    return ds


def write(path, ds, syntax=ExplicitVRLittleEndian):
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    if syntax != ExplicitVRLittleEndian:
        ds.compress(syntax)
    ds.save_as(path, enforce_file_format=True)
    return path


def set_pixels(ds, image):
    ds.Rows, ds.Columns = image.shape[-2:]
    ds.PixelData = np.ascontiguousarray(image).astype("<u2").tobytes()


def write_series(folder, plane, orientation=None, keep=None, syntax=ExplicitVRLittleEndian, **more):
    """One file a slice, in an order that says nothing, as a 2-D series. Returns the paths."""
    across, down = (AXES[a] for a in (orientation or USUAL[plane]))
    slices = list(enumerate(frames(plane, orientation)))
    if keep is not None:
        slices = [slices[k] for k in keep]
    paths = []
    for shuffled, i in enumerate(np.random.default_rng(1).permutation(len(slices))):
        k, (image, position) = slices[i]
        ds = header(**more)
        ds.ImageOrientationPatient = [*across, *down]
        ds.ImagePositionPatient = [f"{v:.6g}" for v in position]
        ds.PixelSpacing = [STEP, STEP]
        set_pixels(ds, image)
        paths.append((k, write(folder / f"IM{shuffled:04d}", ds, syntax)))
    return [path for _, path in sorted(paths)]


def write_exam(folder, study="1.2.3.4"):
    for number, plane in enumerate(PLANES, start=1):
        write_series(folder / plane, plane, study=study, series=f"{study}.{number}", number=number)
    return folder


def edit(path, **values):
    ds = pydicom.dcmread(path)
    for name, value in values.items():
        setattr(ds, name, value)
    ds.save_as(path)


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Waiting for the disk takes longer than all the rest."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def convert(tmp_path, capsys):
    """Run the script -> status, stdout, stderr; checks what holds for every run."""

    def run(source, *options, out=tmp_path / "out"):
        status = prepare.main([str(source), str(out), *map(str, options)])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        known = ("error: ", "warning: ", "interrupted")
        assert all(line.startswith(known) for line in said.err.splitlines())
        for path in out.rglob("*") if out.exists() else ():
            assert not path.name.endswith(".tmp")
            if path.suffix == ".npy":
                volume = np.load(path, allow_pickle=False)
                assert volume.dtype == np.uint8 and volume.shape[1:] == (256, 256)
        return status, said.out, said.err

    return run


def volume(tmp_path, plane, number=0, split="valid"):
    return np.load(tmp_path / "out" / split / plane / f"{number:04d}.npy", allow_pickle=False)


def assert_same(got, want, tolerance=0):
    assert got.shape == want.shape
    assert np.abs(got.astype(int) - want.astype(int)).max() <= tolerance


# --- geometry -------------------------------------------------------------------------------------


def test_the_patient_has_no_symmetry():
    """Otherwise a flip would pass unseen."""
    for plane in PLANES:
        want = expected(plane).astype(int)
        for axis in range(3):
            assert np.abs(np.flip(want, axis) - want).max() > 100
        assert np.abs(want.transpose(0, 2, 1) - want).max() > 100


def test_three_planes_come_back_exactly(convert, tmp_path):
    status, out, err = convert(write_exam(tmp_path / "scan"))
    assert (status, err) == (0, "")
    for plane in PLANES:
        assert_same(volume(tmp_path, plane), expected(plane))
        assert f"{plane}: series" in out


@pytest.mark.parametrize("plane", PLANES)
def test_every_way_to_store_a_plane_gives_the_same(convert, tmp_path, plane):
    """Each of the eight row and column directions; four of them reverse the slices' normal."""
    letters = {"sagittal": "APIS", "coronal": "LRIS", "axial": "LRAP"}[plane]
    pairs = [a + b for a in letters for b in letters if {a, b} not in ({"A", "P"}, {"L", "R"},
             {"I", "S"}) and a != b]  # fmt: skip
    assert len(pairs) == 8
    for i, pair in enumerate(pairs):
        write_series(tmp_path / "scan" / str(i), plane, pair, study=f"1.2.{i + 1}")
    assert convert(tmp_path / "scan")[0] == 0
    for i in range(len(pairs)):
        assert_same(volume(tmp_path, plane, i), expected(plane))


def test_monochrome1_slope_and_intercept(convert, tmp_path):
    a = write_series(tmp_path / "scan/a", "coronal", study="1.1")
    b = write_series(tmp_path / "scan/b", "coronal", study="1.2")
    for k, path in enumerate(a):  # another slope for each slice, as Philips writes
        image = frames("coronal")[k][0]
        ds = pydicom.dcmread(path)
        ds.RescaleSlope, ds.RescaleIntercept = 0.5 * (k + 1), -3 * k
        stored = np.rint((image + 3 * k) / (0.5 * (k + 1)))
        ds.PixelData = stored.astype("<u2").tobytes()
        ds.save_as(path)
    for k, path in enumerate(b):
        ds = pydicom.dcmread(path)
        ds.PhotometricInterpretation = "MONOCHROME1"
        ds.PixelData = (4095 - frames("coronal")[k][0]).astype("<u2").tobytes()
        ds.save_as(path)
    assert convert(tmp_path / "scan")[0] == 0
    assert_same(volume(tmp_path, "coronal", 0), expected("coronal"), tolerance=1)
    assert_same(volume(tmp_path, "coronal", 1), expected("coronal"))


@pytest.mark.parametrize("inverted, vr, value, limit", [
    (False, "SS", -32768, None), (True, "SS", -32768, None), (False, "US", 32768, None),
    (False, "SS", -32768, ""), (False, "SS", -32767, -32768),
])  # fmt: skip
def test_padding_is_no_signal(convert, tmp_path, inverted, vr, value, limit):
    """Far below the signal, as GE writes it: the window would be of padding alone."""
    for k, path in enumerate(write_series(tmp_path / "scan", "coronal")):
        ds = pydicom.dcmread(path)
        image = frames("coronal")[k][0].astype(np.int16)
        image = 4095 - image if inverted else image
        image[:, :2] = -32768
        ds.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
        ds.PixelRepresentation = 1
        ds.add_new("PixelPaddingValue", vr, value)
        if limit is not None:
            ds.add_new("PixelPaddingRangeLimit", vr, limit)
        ds.PixelData = image.astype("<i2").tobytes()
        ds.save_as(path)
    assert convert(tmp_path / "scan")[0] == 0
    padded = LPS["coronal"].astype(float)  # rows of the picture are from right to left
    padded[:2] = padded[2:].min()
    want = windowed(padded.transpose(1, 2, 0)[:, ::-1, :])
    assert_same(volume(tmp_path, "coronal"), want)


def test_anisotropic_pixels_become_square(convert, tmp_path):
    """Every second row left out: the field of view, and so the picture, stays."""
    for path in write_series(tmp_path / "scan", "sagittal"):
        ds = pydicom.dcmread(path)
        set_pixels(ds, ds.pixel_array[::2])
        ds.PixelSpacing = [2 * STEP, STEP]
        ds.save_as(path)
    assert convert(tmp_path / "scan")[0] == 0
    difference = volume(tmp_path, "sagittal").astype(int) - expected("sagittal")
    assert np.abs(difference).mean() < 4


def test_oblong_slices_are_padded_or_cropped(convert, tmp_path):
    for path in write_series(tmp_path / "scan", "axial"):
        ds = pydicom.dcmread(path)
        set_pixels(ds, ds.pixel_array[64:192])  # 128 rows of 256 columns
        ds.save_as(path)
    assert convert(tmp_path / "scan")[0] == 0
    padded = volume(tmp_path, "axial")
    inside = windowed(LPS["axial"].transpose(2, 1, 0)[::-1, 64:192])
    assert not padded[:, :64].any() and not padded[:, 192:].any()
    assert_same(padded[:, 64:192], inside)
    status, _, err = convert(tmp_path / "scan", "--square", "crop", "--overwrite")
    assert status == 2 and "square None, these have crop" in err  # never both in one folder
    assert convert(tmp_path / "scan", "--square", "crop", out=tmp_path / "a" / "out")[0] == 0
    cropped = volume(tmp_path / "a", "axial").astype(int)
    enlarged = np.repeat(np.repeat(inside[:, :, 64:192], 2, axis=1), 2, axis=2)
    assert np.abs(cropped - enlarged).mean() < 4
    # Networks that were trained on these are shown a scan likewise.
    about = json.loads((tmp_path / "a" / "out" / "dataset.json").read_text())
    networks = [SimpleNamespace(datasets=[about], planes=["axial"])]
    with open_exams([tmp_path / "scan"], networks=networks) as exams:
        for exam in exams.each():
            np.testing.assert_array_equal(np.load(exam.paths["axial"]), cropped)
    assert exams.datasets[0]["square"] == "crop"


def test_obliques_go_to_the_nearest_plane_with_a_warning(convert, tmp_path):
    for degrees, study in ((20, "1.1"), (40, "1.2")):
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        for k, path in enumerate(write_series(tmp_path / study, "coronal", study=study)):
            edit(path, ImageOrientationPatient=[f"{v:.6f}" for v in (c, s, 0, 0, 0, -1)],
                 ImagePositionPatient=[f"{v:.6f}" for v in (-s * k * 4, c * k * 4, 0)])  # fmt: skip
    status, _, err = convert(tmp_path / "1.1")
    assert (status, err) == (0, "")
    status, _, err = convert(tmp_path / "1.2", "--overwrite")
    assert status == 0 and "40 degrees from coronal" in err
    assert volume(tmp_path, "coronal").shape[0] == SLICES


# --- kinds of files -------------------------------------------------------------------------------


def enhanced(plane="sagittal", **more):
    """All slices in one Enhanced MR file, in a shuffled order, geometry per frame and shared."""
    ds = header(**more)
    ds.SOPClassUID, ds.NumberOfFrames = EnhancedMRImageStorage, SLICES
    across, down = (AXES[a] for a in USUAL[plane])
    shared, measures, orientation = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [STEP, STEP], 3
    orientation.ImageOrientationPatient = [*across, *down]
    shared.PixelMeasuresSequence = Sequence([measures])
    shared.PlaneOrientationSequence = Sequence([orientation])
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    slices = frames(plane)
    groups, images = [], []
    for k in np.random.default_rng(2).permutation(SLICES):
        image, place = slices[k]
        group, position, rescale = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [f"{v:.6g}" for v in place]
        rescale.RescaleSlope, rescale.RescaleIntercept = 2, int(-k)
        group.PlanePositionSequence = Sequence([position])
        group.PixelValueTransformationSequence = Sequence([rescale])
        groups.append(group)
        images.append((image + k) / 2)
    ds.PerFrameFunctionalGroupsSequence = Sequence(groups)
    set_pixels(ds, np.rint(np.stack(images)))
    return ds


def test_enhanced_multi_frame(convert, tmp_path):
    write(tmp_path / "scan/one.dcm", enhanced())
    assert convert(tmp_path / "scan")[0] == 0
    assert_same(volume(tmp_path, "sagittal"), expected("sagittal"), tolerance=1)


def test_enhanced_file_of_a_philips_scanner(convert, tmp_path):
    """nibabel's: real geometry, 1 mm isotropic, pixels blanked; filled here with each frame's
    number, so that the order along the patient's axes shows."""
    packed = NIBABEL_FILES / "nicom/tests/data/philips_mprage.dcm.gz"
    ds = pydicom.dcmread(io.BytesIO(gzip.decompress(packed.read_bytes())))
    first, last = (
        ds.PerFrameFunctionalGroupsSequence[i].PlanePositionSequence[0].ImagePositionPatient[0]
        for i in (0, -1)
    )
    assert first > 90 and last < -80  # from the patient's left to the right
    number = np.arange(176, dtype="<u2")[:, None, None]
    row = np.arange(256, dtype="<u2")[None, :, None]
    ds.PixelData = (number * 20 + row + np.zeros((1, 1, 256), "<u2")).tobytes()
    (tmp_path / "scan").mkdir()
    ds.save_as(tmp_path / "scan/a.dcm")
    assert "ORBIT by its header" in convert(tmp_path / "scan")[2]
    ds.SeriesDescription = "MPRAGE knee"
    ds.save_as(tmp_path / "scan/a.dcm")
    status, out, _ = convert(tmp_path / "scan")
    assert status == 0
    sagittal = volume(tmp_path, "sagittal").astype(int)
    coronal, axial = volume(tmp_path, "coronal").astype(int), volume(tmp_path, "axial").astype(int)
    assert len(sagittal) == 176 // 3  # 3 mm slabs
    assert (np.diff(sagittal[:, 128, 128]) < 0).all()  # right to left: the scanner's order reversed
    assert (np.diff(sagittal[20, :, 128][::16]) > 0).all()  # rows go down, as stored
    assert coronal[40, 128, 60] > coronal[40, 128, 200]  # columns right to left
    assert axial[10, 128, 128] < axial[-10, 128, 128]  # slices superior to inferior
    assert f"{176 // 3} slices" in out


def real_slices(folder, *names):
    """A series made of pydicom's MR_small in several encodings: real pixels, new positions."""
    folder.mkdir()
    for k, name in enumerate(names):
        ds = pydicom.dcmread(PYDICOM_FILES / name)
        ds.ImagePositionPatient = [-10, -10, 3.0 * k]
        ds.PixelSpacing = [1.5, 1.5]  # 64 px as wide as a knee
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        ds.save_as(folder / f"{k}.dcm")
    return folder


ENCODINGS = ("MR_small.dcm", "MR_small_RLE.dcm", "MR_small_implicit.dcm",
             "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm",
             "MR_small_bigendian.dcm", "MR_small_expb.dcm")  # fmt: skip


def test_real_slices_in_all_transfer_syntaxes(convert, tmp_path):
    """Seven encodings of one real slice give one picture; axial, so rows are not turned."""
    status, _, err = convert(real_slices(tmp_path / "scan", *ENCODINGS))
    assert (status, err) == (0, "")
    slices = volume(tmp_path, "axial")
    assert len(slices) == 7
    assert all(np.array_equal(image, slices[0]) for image in slices)
    stored = pydicom.dcmread(PYDICOM_FILES / "MR_small.dcm").pixel_array  # 64 x 64
    small = slices[0].reshape(64, 4, 64, 4).mean(axis=(1, 3))
    assert np.corrcoef(small.ravel(), windowed(stored).ravel())[0, 1] > 0.98


def test_compressed_series(convert, tmp_path):
    write_series(tmp_path / "scan", "axial", syntax=RLELossless)
    assert convert(tmp_path / "scan")[0] == 0
    assert_same(volume(tmp_path, "axial"), expected("axial"))


@pytest.mark.parametrize("has_meta", [True, False])
@pytest.mark.parametrize("is_implicit", [True, False])
def test_dicom_without_preamble(convert, tmp_path, has_meta, is_implicit):
    """As some scanners' disks and old archives have it: data set alone, or with its meta group."""
    for path in write_series(tmp_path / "scan", "coronal"):
        ds = pydicom.dcmread(path)
        meta = ds.file_meta
        meta.TransferSyntaxUID = ImplicitVRLittleEndian if is_implicit else ExplicitVRLittleEndian
        if not has_meta:
            ds.file_meta = FileMetaDataset()
        ds.save_as(path, implicit_vr=is_implicit, little_endian=True)
        ds.preamble = None
        ds.save_as(path, implicit_vr=is_implicit, little_endian=True)
        assert path.read_bytes()[:2] == (b"\2\0" if has_meta else b"\10\0")
    (tmp_path / "scan" / "no.dat").write_bytes(b"\10\0\1\2\3\4\5\6" * 99)
    status, out, err = convert(tmp_path / "scan")
    assert (status, err) == (0, "") and "neither DICOM nor NIfTI: 1" in out
    assert_same(volume(tmp_path, "coronal"), expected("coronal"))


def test_pydicoms_and_nibabels_own_files(convert, tmp_path):
    """Everything that the two packages ship: CT, SR, colour, mosaics, localisers, MIPs, broken
    files. None is a knee exam; each is skipped or reported."""
    for name, source in (("pydicom", PYDICOM_FILES), ("nicom", NIBABEL_FILES / "nicom/tests/data")):
        status, out, err = convert(source, out=tmp_path / name)
        assert status == 2
        for words in {
            "pydicom": ("modality CT, not MR", "BRAIN by its header", "without an image",
                        "projection", "localiser", "colour"),
            "nicom": ("mosaic of slices", "map of a quantity", "projection"),
        }[name]:  # fmt: skip
            assert words in out + err, words
        assert "Lestrade" not in out + err and "CompressedSamples" not in out + err


def test_truncated_file_of_a_scanner(convert, tmp_path):
    names = ["MR_small.dcm"] * 5 + ["MR_truncated.dcm"]
    status, _, err = convert(real_slices(tmp_path / "scan", *names))
    assert status == 2 and "5.dcm" in err and "of 8192 bytes" in err


def nifti(path, plane, codes=None, data=None):
    """The known patient as NIfTI, stored along `codes` such as "LPS" (where i, j, k grow to)."""
    x, y, z = GRID[plane]
    spacing = [float(axis[1] - axis[0]) for axis in (x, y, z)]
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])  # LPS array, RAS affine
    affine[:3, 3] = -x[0], -y[0], z[0]
    image = nibabel.Nifti1Image((LPS[plane] if data is None else data).astype(np.int16), affine)
    if codes:
        turn = nibabel.orientations.ornt_transform(
            nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(codes)
        )
        image = image.as_reoriented(turn)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return path


def test_nifti_in_every_storage_order(convert, tmp_path):
    for i, codes in enumerate(("RAS", "LPS", "PIR", "SAL", "ILA")):
        for plane in PLANES:
            nifti(tmp_path / f"scan/{i}/{plane}.nii.gz", plane, codes)
    status, out, err = convert(tmp_path / "scan")
    assert (status, err) == (0, "") and "5 of 5 exams" in out
    for i in range(5):
        for plane in PLANES:
            assert_same(volume(tmp_path, plane, i), expected(plane))


def test_nifti_of_nibabel(convert, tmp_path):
    """Real brains: an isotropic one is cut in three planes, 4-D and short ones are skipped."""
    names = ("anatomical.nii", "example4d.nii.gz", "functional.nii", "resampled_anat_moved.nii",
             "row_major.dconn.nii")  # fmt: skip
    for name in names:
        (tmp_path / "scan" / name).mkdir(parents=True)
        shutil.copy(NIBABEL_FILES / "tests/data" / name, tmp_path / "scan" / name / name)
    status, out, err = convert(tmp_path / "scan")
    assert status == 1
    assert "several volumes in one file (2)" in err and "(20)" in err and "fewer than 5" in err
    data = nibabel.load(NIBABEL_FILES / "tests/data/anatomical.nii").get_fdata()  # axes L, A, S
    want = windowed(data)
    for plane, lay in (
        ("axial", want.transpose(2, 1, 0)[::-1, ::-1]),
        ("coronal", want.transpose(1, 2, 0)[::-1, ::-1]),
        ("sagittal", want.transpose(0, 2, 1)[:, ::-1, ::-1]),
    ):
        got = volume(tmp_path, plane)
        s, h, w = lay.shape
        assert len(got) == s
        scale = 256 / max(h, w)
        rows = ((np.arange(h) - h / 2 + 0.5) * scale + 128).astype(int)
        columns = ((np.arange(w) - w / 2 + 0.5) * scale + 128).astype(int)
        picked = got[:, rows][:, :, columns]
        assert np.corrcoef(picked.ravel(), lay.ravel())[0, 1] > 0.97


def test_three_dimensional_series_serves_all_planes(convert, tmp_path):
    """0.9 mm isotropic: slabs of three voxels."""
    axis = (np.arange(60) - 29.5) * 0.9
    lps = tissue(axis[:, None, None], axis[None, :, None], axis[None, None, :])
    affine = np.diag([-0.9, -0.9, 0.9, 1.0])
    (tmp_path / "scan").mkdir()
    nibabel.save(nibabel.Nifti1Image(lps.astype(np.int16), affine), tmp_path / "scan/a.nii")
    assert convert(tmp_path / "scan")[0] == 0
    for plane, lay in (
        ("axial", lps.transpose(2, 1, 0)[::-1]),
        ("coronal", lps.transpose(1, 2, 0)[:, ::-1]),
        ("sagittal", lps.transpose(0, 2, 1)[:, ::-1]),
    ):
        slabs = windowed(lay).reshape(20, 3, 60, 60).mean(axis=1)
        positions = ((np.arange(60) + 0.5) * 256 / 60).astype(int)  # 256 px of 60
        got = volume(tmp_path, plane)[:, positions][:, :, positions]
        assert got.shape == slabs.shape
        assert np.corrcoef(got.ravel(), slabs.ravel())[0, 1] > 0.98


# --- several series, exams and options ------------------------------------------------------------


def test_fat_suppressed_fluid_series_is_preferred_and_series_overrides(convert, tmp_path):
    for number, description in enumerate(
        ("t1_tse_fs_sag", "pd_tse_sag", "pd_tse_fs_sag", "PD non fat sat", "T2 STIR short"), start=1
    ):
        keep = range(SLICES - 2) if "short" in description else None
        write_series(tmp_path / "scan", "sagittal", keep=keep, series=f"1.2.3.{number}",
                     number=number, description=description)  # fmt: skip
        for path in (tmp_path / "scan").glob("IM*"):
            path.rename(path.parent / f"{number}-{path.name}")
    status, out, err = convert(tmp_path / "scan")
    assert (status, err) == (0, "")
    assert "sagittal: series 3 'pd_tse_fs_sag', 9 slices" in out and "series 1" in out
    status, out, _ = convert(tmp_path / "scan", "--series", "stir", "--overwrite")
    assert status == 0 and "sagittal: series 5 'T2 STIR short', 7 slices" in out
    assert len(volume(tmp_path, "sagittal")) == 7
    status, out, _ = convert(tmp_path / "scan", "--series", "2", "--overwrite")
    assert status == 0 and "sagittal: series 2 " in out
    status, out, err = convert(tmp_path / "scan", "--series", "nothing", "--overwrite")
    assert status == 0 and "no series matches" in err and "sagittal: series 3 " in out


def test_localisers_and_reports_are_skipped_and_listed(convert, tmp_path):
    write_series(tmp_path / "scan/a", "sagittal")
    for i, plane in enumerate(PLANES):
        write_series(tmp_path / f"scan/loc{i}", plane, keep=[4], series="1.2.9", number=9,
                     description="three planes")  # fmt: skip
    write_series(tmp_path / "scan/b", "coronal", series="1.2.8", number=8, description="loc",
                 ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])  # fmt: skip
    report = header(series="1.2.7", number=7, description="report", Modality="SR")
    report.SOPClassUID = BasicTextSRStorage
    write(tmp_path / "scan/sr", report)
    (tmp_path / "scan/readme.txt").write_text("not DICOM")
    status, out, err = convert(tmp_path / "scan")
    assert (status, err) == (0, "")
    assert "series 9 'three planes', several orientations (files: 3)" in out
    assert "series 8 'loc', localiser (files: 9)" in out
    assert "series 7 'report', no image (files: 1)" in out
    assert "planes missing: axial, coronal" in out


def test_two_echoes_of_one_place(convert, tmp_path):
    first = write_series(tmp_path / "scan/a", "sagittal", EchoTime=15)
    write_series(tmp_path / "scan/b", "sagittal", EchoTime=80)
    for path in first:
        ds = pydicom.dcmread(path)
        ds.PixelData = np.zeros((SIDE, SIDE), "<u2").tobytes()
        ds.save_as(path)
    assert convert(tmp_path / "scan")[0] == 0
    assert_same(volume(tmp_path, "sagittal"), expected("sagittal"))


def test_labels_ids_and_id_map(convert, tmp_path):
    for i in range(3):
        write_series(tmp_path / f"scan/knee{i}", "axial", study=f"1.2.{i + 1}")
    (tmp_path / "l.csv").write_text("exam,task,label\nknee0,acl,1\nknee2,acl,0\n1,meniscus,1\n")
    source, out = tmp_path / "scan", tmp_path / "out"
    options = ("--split", "train", "--labels", tmp_path / "l.csv", "--id-map", tmp_path / "ids.csv")
    assert convert(source, *options)[0] == 0
    assert (out / "train-acl.csv").read_text() == "0,1\n2,0\n"
    assert (out / "train-meniscus.csv").read_text() == "1,1\n"
    names = sorted(path.name for path in (out / "train/axial").iterdir())
    assert names == ["0000.npy", "0001.npy", "0002.npy"]
    with open(tmp_path / "ids.csv", newline="") as file:
        assert [row[:3] for row in csv.reader(file)] == [["id", "study", "folder"]] + [
            [str(i), f"1.2.{i + 1}", f"knee{i}"] for i in range(3)
        ]
    status, _, err = convert(source, *options)
    assert status == 2 and "exists" in err and "--overwrite" in err
    (tmp_path / "l.csv").write_text("exam,task,label\nknee1,acl,1\n")
    status, said, _ = convert(source, *options[:4])
    assert status == 0 and "exams that were there: 3" in said
    assert (out / "train-acl.csv").read_text() == "0,1\n1,1\n2,0\n"


def test_a_folder_called_as_a_number_is_that_folder(convert, tmp_path):
    for name in ("1", "2", "11"):  # exams 0, 2 and 1, in the order of their paths
        write_series(tmp_path / "scan" / name, "axial", study=f"1.2.{name}")
    (tmp_path / "l.csv").write_text("exam,task,label\n1,acl,1\n2,acl,0\n0,bone,1\n")
    options = "--split", "train", "--labels", tmp_path / "l.csv"
    assert convert(tmp_path / "scan", *options)[0] == 0
    assert (tmp_path / "out" / "train-acl.csv").read_text() == "0,1\n2,0\n"
    assert (tmp_path / "out" / "train-bone.csv").read_text() == "0,1\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("exam,task,label\n.,acl,1\n.,acl,0\n", "has another label of acl above"),
        ("exam,task,label\nother,acl,1\n", "names 0 exams"),
        ("exam,task,label\n.,acl,2\n", "label 0 or 1"),
        ("exam,task,label\n.,../acl,1\n", "the task of letters"),
        ("a,b\n1,2\n", "columns exam,task,label"),
    ],
)
def test_wrong_labels(convert, tmp_path, text, words):
    write_series(tmp_path / "scan", "axial")
    (tmp_path / "l.csv").write_text(text)
    status, _, err = convert(tmp_path / "scan", "--labels", tmp_path / "l.csv")
    assert status == 2 and words in err and len(err.splitlines()) == 1


def test_no_identifier_leaves(convert, tmp_path):
    """Names, ids, UIDs and dates stand in no output file and no printed line, also of bad files."""
    write_exam(tmp_path / "scan/a", "1.2.840.77")
    bad = write_series(tmp_path / "scan/b", "axial", study="1.2.840.78")
    bad[3].write_bytes(bad[3].read_bytes()[:-1000])
    sound = bad[1].read_bytes()
    bad[1].write_bytes(sound.replace(b"0.6\\0.6 ", b"SECRET^J"))  # its pixel spacing
    assert bad[1].read_bytes() != sound
    write(tmp_path / "scan/c.dcm", enhanced(study="1.2.840.79"))
    (tmp_path / "l.csv").write_text("exam,task,label\na,acl,1\n")
    status, out, err = convert(tmp_path / "scan", "--labels", tmp_path / "l.csv")
    assert status == 1
    printed = (out + err).encode()
    for secret in (b"SECRET", b"JANE", b"4711", b"19610203", b"20200102", b"1.2.840.7", b"1.2.3.4"):
        assert secret not in printed
        for path in (tmp_path / "out").rglob("*"):
            assert path.is_dir() or secret not in path.read_bytes()


# --- zip files ------------------------------------------------------------------------------------


def zipped(path, folder):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder.parent))
    return path


def test_labels_without_rows_are_refused(tmp_path, convert):
    write_exam(tmp_path / "scan")
    (tmp_path / "l.csv").write_text("exam,task,label\n")
    status, _, err = convert(tmp_path / "scan", "--labels", tmp_path / "l.csv")
    assert status == 2 and "l.csv: no labels in it" in err


def test_a_folder_of_two_versions_says_so(tmp_path, convert, monkeypatch):
    out = tmp_path / "out"

    def version():
        return json.loads((out / "dataset.json").read_text())["version"]

    write_exam(tmp_path / "scan" / "a", "1.2.3.4")
    monkeypatch.setattr(prepare, "VERSION", "old")
    assert not convert(tmp_path / "scan")[2] and version() == "old"
    monkeypatch.setattr(prepare, "VERSION", "new")
    assert not convert(tmp_path / "scan")[2] and version() == "old"  # nothing was converted
    write_exam(tmp_path / "scan" / "b", "1.2.3.5")
    _, _, err = convert(tmp_path / "scan")
    assert "several versions of the importer now (old, new)" in err and version() == "old, new"
    assert "(old, new)" in convert(tmp_path / "scan")[2] and version() == "old, new"
    assert not convert(tmp_path / "scan", "--overwrite")[2] and version() == "new"


def test_zip_as_source_and_in_a_folder(convert, tmp_path):
    write_exam(tmp_path / "exam")
    (tmp_path / "scan").mkdir()
    path = zipped(tmp_path / "scan/one.zip", tmp_path / "exam")
    for source in (path, tmp_path / "scan"):
        assert convert(source, "--overwrite")[0] == 0
        for plane in PLANES:
            assert_same(volume(tmp_path, plane), expected(plane))


def test_a_zip_beside_its_folder_is_one_exam(convert, tmp_path):
    write_exam(tmp_path / "scan" / "knee7")
    zipped(tmp_path / "scan" / "knee7.zip", tmp_path / "scan" / "knee7")
    status, out, err = convert(tmp_path / "scan")
    assert (status, err) == (0, "")
    assert out.count(f"copies of its files: {SLICES}") == 3 == out.count("copies of")
    for plane in PLANES:
        assert_same(volume(tmp_path, plane), expected(plane))


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.TAR", "a.rar", "a.7z", "IM1.dcm.gz"])
def test_an_archive_that_is_not_opened_may_hold_a_plane(convert, tmp_path, name):
    write_series(tmp_path / "scan" / "axial", "axial")
    (tmp_path / "scan" / name).write_bytes(b"packed")
    status, _, err = convert(tmp_path / "scan")
    assert status == 1 and err.startswith("error: ") and len(err.splitlines()) == 1
    assert f"{name}: an archive that is not opened; unpack it first" in err


def test_a_zip_within_a_zip_may_hold_a_plane(convert, tmp_path):
    write_series(tmp_path / "exam" / "axial", "axial")
    zipped(tmp_path / "exam" / "inner.zip", write_exam(tmp_path / "other"))
    (tmp_path / "scan").mkdir()
    zipped(tmp_path / "scan" / "outer.zip", tmp_path / "exam")
    status, _, err = convert(tmp_path / "scan")
    assert status == 1 and "outer.zip:exam/inner.zip: an archive" in err


@pytest.mark.parametrize(
    "name", ["../evil.dcm", "/tmp/evil.dcm", "a\\..\\..\\evil", "C:/evil", "ln"]
)
def test_zip_member_that_leads_out_is_refused(convert, tmp_path, name):
    write_series(tmp_path / "scan/good", "axial")
    inside = (tmp_path / "scan/good/IM0000").read_bytes()
    with zipfile.ZipFile(tmp_path / "scan/bad.zip", "w") as archive:
        info = zipfile.ZipInfo(name)
        if name == "ln":
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, inside)
    before = set(tmp_path.rglob("*"))
    status, _, err = convert(tmp_path / "scan")
    assert status == 1 and "bad.zip" in err and "leads out of the folder" in err
    new = {path for path in set(tmp_path.rglob("*")) - before if path.is_file()}
    assert {path.suffix for path in new} == {".npy", ".csv", ".json"}
    assert_same(volume(tmp_path, "axial"), expected("axial"))


def test_zip_bombs_and_broken_zips(convert, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_BYTES", 10_000_000)
    write_series(tmp_path / "scan/good", "axial")
    with zipfile.ZipFile(tmp_path / "scan/bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.dcm", bytes(20_000_000))
    (tmp_path / "scan/broken.zip").write_bytes(b"PK\3\4 and then nothing")
    (tmp_path / "scan/bomb.nii.gz").write_bytes(gzip.compress(bytes(20_000_000)))
    status, _, err = convert(tmp_path / "scan")
    assert status == 1 and len(err.splitlines()) == 3
    assert "bomb.zip: member 'a.dcm' unpacks to 19 MiB" in err
    assert "broken.zip: BadZipFile" in err
    assert "bomb.nii.gz: over 9 MiB" in err


# --- bad input ------------------------------------------------------------------------------------


def damage(paths, kind):
    """Damage one file of a series -> words that the message must have."""
    path = paths[4]
    if kind == "gap":
        path.unlink()
        # slices 3 and 5 lie at -4 and 4 mm; about one is missing
        return paths[3], "gap after it from -4.0 to 4.0 mm", "(step 4.0 mm), about 1 missing"
    if kind == "duplicate":
        edit(path, ImagePositionPatient=pydicom.dcmread(paths[3]).ImagePositionPatient)
        return "IM", "duplicated position", "at -4.0 mm", "remove one"
    if kind == "copied":  # and changed: which of the two is right?
        shutil.copy(path, path.parent / "copy")
        edit(path.parent / "copy", RescaleSlope=2)
        return "copy", "duplicated position"
    if kind == "no position":
        ds = pydicom.dcmread(path)
        del ds.ImagePositionPatient
        ds.save_as(path)
        return path, "no position"
    if kind == "mixed sizes":
        ds = pydicom.dcmread(path)
        set_pixels(ds, ds.pixel_array[:128, :128])
        ds.save_as(path)
        return path, "mixed sizes", "128 x 128 px"
    if kind == "truncated":
        ds = pydicom.dcmread(path)
        ds.PixelData = ds.PixelData[:5000]
        ds.save_as(path)
        return path, "pixel data ends after 5000 of 131072 bytes"
    if kind == "cut off":
        path.write_bytes(path.read_bytes()[:600])
        return path, "truncated or damaged"
    if kind == "no pixels":
        ds = pydicom.dcmread(path)
        del ds.PixelData
        ds.save_as(path)
        return path, "truncated or damaged"
    ds = pydicom.dcmread(path)
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.102"  # MPEG-4
    ds.PixelData = pydicom.encaps.encapsulate([b"\0\0"])
    ds["PixelData"].VR = "OB"
    ds.save_as(path)
    return path, "no decoder for transfer syntax MPEG-4"


@pytest.mark.parametrize(
    "kind",
    ["gap", "duplicate", "copied", "no position", "mixed sizes", "truncated", "cut off",
     "no pixels", "video"],
)  # fmt: skip
def test_one_bad_series_is_named_and_other_exams_go_on(convert, tmp_path, kind):
    write_series(tmp_path / "scan/a", "axial", study="1.1")
    words = damage(write_series(tmp_path / "scan/b", "axial", study="1.2"), kind)
    write_series(tmp_path / "scan/c", "axial", study="1.3")
    status, out, err = convert(tmp_path / "scan")
    lost = 2 if kind == "cut off" else 1  # the file, and then the gap that it leaves
    assert status == 1 and f"failures: {lost}" in out and "2 of 3 exams" in out
    assert len(err.splitlines()) == lost
    for word in words:
        assert str(word) in err
    assert_same(volume(tmp_path, "axial", 0), expected("axial"))
    assert_same(volume(tmp_path, "axial", 2), expected("axial"))
    assert not (tmp_path / "out/valid/axial/0001.npy").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "colour"),
        ({"SamplesPerPixel": 2}, "colour or unknown pixels (MONOCHROME2, 2)"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "colour"),
        ({"Rows": 1}, "one-dimensional"),
        ({"Rows": 60000, "Columns": 60000}, "too large"),
        ({"Modality": "CT"}, "modality CT"),
        ({"PixelSpacing": None}, "no ImagePositionPatient"),
        ({"PixelSpacing": [0, 0]}, "PixelSpacing is not positive"),
        ({"PixelSpacing": [1e-5, 0.9]}, "correct the pixel spacing"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "is no rotation"),
        ({"PixelData": bytes(SIDE * SIDE * 2)}, "every pixel has the same value"),
    ],
)
def test_series_that_is_no_volume(convert, tmp_path, change, words):
    for path in write_series(tmp_path / "scan", "axial"):
        edit(path, **change)
    status, _, err = convert(tmp_path / "scan")
    assert status == 2 and words in err


def test_nothing_to_read(convert, tmp_path):
    assert convert(tmp_path / "no such")[0] == 2
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("no scan")
    os.mkfifo(tmp_path / "empty/pipe")
    status, _, err = convert(tmp_path / "empty")
    assert status == 2 and "no readable DICOM or NIfTI" in err and len(err.splitlines()) == 1


def test_nifti_that_cannot_be_used(convert, tmp_path):
    (tmp_path / "scan/a").mkdir(parents=True)
    unplaced = nibabel.Nifti1Image(LPS["axial"].astype(np.int16), None)  # codes 0
    nibabel.save(unplaced, tmp_path / "scan/a/a.nii")
    whole = nifti(tmp_path / "scan/b/b.nii.gz", "axial").read_bytes()
    (tmp_path / "scan/b/b.nii.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "scan/c").mkdir()
    (tmp_path / "scan/c/c.nii").write_bytes(b"not NIfTI")
    colour = np.zeros((9, 9, 9), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    (tmp_path / "scan/d").mkdir()
    nibabel.save(nibabel.Nifti1Image(colour, np.eye(4)), tmp_path / "scan/d/d.nii")
    nifti(tmp_path / "scan/e/e.nii", "axial", data=LPS["axial"][..., None])
    status, _, err = convert(tmp_path / "scan")
    assert status == 1
    for word in ("left and right unknown", "b.nii.gz: EOFError", "c.nii: no NIfTI", "colour"):
        assert word in err
    assert len(err.splitlines()) == 4
    assert len(list((tmp_path / "out/valid/axial").iterdir())) == 1  # 4-D with one volume


def test_a_study_without_a_plane_is_left_out_of_this_planes_networks(convert, tmp_path):
    for k in range(3):
        write_exam(tmp_path / f"scans/{k}", study=f"1.2.3.{k}")
    shutil.rmtree(tmp_path / "scans/2/coronal")
    status, _, err = convert(tmp_path / "scans", "--split", "train")
    assert status == 0, err
    for split in ("train", "valid"):
        (tmp_path / f"out/{split}-acl.csv").write_text("0,1\n1,0\n2,0\n")
    for plane, absent in (("axial", 0), ("coronal", 1)):
        exams = MRDataset(tmp_path / "out", "acl", plane)
        assert exams.absent == absent and len(exams) == 3 - absent


def run_without(tmp_path, missing, source):
    """The script in a process in which some packages do not import."""
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    for name in missing:
        (fakes / f"{name}.py").write_text(f"raise ImportError('no {name}', name='{name}')")
    return subprocess.run(
        [sys.executable, SCRIPT, source, tmp_path / "out"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(fakes), *sys.path[1:]])},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("package", ["pydicom", "nibabel"])
def test_missing_package_is_named(tmp_path, package):
    if package == "pydicom":
        write_series(tmp_path / "scan", "axial")
    else:
        nifti(tmp_path / "scan/a.nii", "axial")
    done = run_without(tmp_path, [package], tmp_path / "scan")
    assert done.returncode == 2
    assert done.stderr == f"error: {package} is missing; pip install -r requirements-dicom.txt\n"


def test_missing_decoder_is_named(tmp_path):
    names = ["MR_small.dcm"] * 5 + ["MR_small_jpeg_ls_lossless.dcm"]
    real_slices(tmp_path / "scan", *names)
    done = run_without(tmp_path, ["pylibjpeg", "gdcm", "jpeg_ls"], tmp_path / "scan")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "5.dcm: no decoder for JPEG-LS Lossless" in done.stderr
    assert "pip install pylibjpeg pylibjpeg-libjpeg" in done.stderr


def test_folder_that_cannot_be_written_and_interruption(convert, tmp_path, monkeypatch):
    write_series(tmp_path / "scan", "axial")
    (tmp_path / "file").write_text("")
    status, _, err = convert(tmp_path / "scan", out=tmp_path / "file/out")
    assert status == 1 and "Not a directory" in err

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def interrupted(*_):
        raise KeyboardInterrupt

    for fault, expected_status in ((full, 1), (interrupted, 130)):
        monkeypatch.setattr(os, "fsync", fault)
        status = prepare.main([str(tmp_path / "scan"), str(tmp_path / "out")])
        assert status == expected_status
        assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    monkeypatch.undo()  # fsync is real again
    assert convert(tmp_path / "scan")[0] == 0


def test_wrong_arguments(tmp_path):
    for options in (("--split", "test"), ("--square", "stretch")):
        with pytest.raises(SystemExit) as end:
            prepare.main([str(tmp_path), str(tmp_path / "out"), *options])
        assert end.value.code == 2


# --- fuzzing --------------------------------------------------------------------------------------


def mutated(data, rng, header_size):
    """Some bytes of the header changed, cut out, doubled, or the end cut off."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        place = int(rng.integers(0, min(header_size, len(data))))
        kind = rng.integers(0, 5)
        if kind < 3:
            data[place] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.integers(0, 256)]))
        elif kind == 3:
            del data[place : place + int(rng.integers(1, 9))]
        else:
            data[place:place] = data[place : place + int(rng.integers(1, 9))]
    if rng.random() < 0.1:
        del data[int(rng.integers(0, len(data))) :]
    return bytes(data)


@pytest.mark.parametrize("kind", ["dcm", "enhanced", "nii"])
def test_mutated_files_give_no_traceback(convert, tmp_path, kind):
    """300 seeded mutants of each: one line or a volume, never an exception or a long wait."""
    rng = np.random.default_rng(3)
    source = tmp_path / "scan"
    if kind == "dcm":
        real_slices(source, *["MR_small.dcm"] * 4, "MR_small_RLE.dcm")
        target, header_size = source / "4.dcm", 2000
    elif kind == "enhanced":
        ds = enhanced()
        set_pixels(ds, np.arange(SLICES * 16).reshape(SLICES, 4, 4))
        shared = ds.SharedFunctionalGroupsSequence[0]
        shared.PixelMeasuresSequence[0].PixelSpacing = [16, 16]
        target, header_size = write(source / "a.dcm", ds), 5000
    else:
        data = np.arange(90 * 90 * 6).reshape(90, 90, 6) % 999
        target, header_size = nifti(source / "a.nii", "axial", data=data), 352
    whole, statuses = target.read_bytes(), set()
    start = time.monotonic()
    for _ in range(300):
        target.write_bytes(mutated(whole, rng, header_size))
        began = time.monotonic()
        status, _, err = convert(source, "--overwrite")
        assert time.monotonic() - began < 5
        assert status == 0 or err
        statuses.add(status)
    assert statuses >= {0, 2}, "the mutants test nothing"
    assert time.monotonic() - start < 60
