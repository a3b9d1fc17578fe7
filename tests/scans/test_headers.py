"""Headers that lie about pixels and places, and files made to hang or to fill the memory."""

import io
import itertools
import os
import struct
import time
import zipfile
import zlib

import numpy as np
import pydicom
import pytest
import torch
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, RLELossless
from test_dicom import PYDICOM_FILES, SLICES, edit, enhanced, nifti, set_pixels, write
from test_scans import coronal, no_fsync, read, sagittal  # noqa: F401

from mrnet.errors import InputError
from mrnet.files import open_regular
from mrnet.layout.volumes import read_volume
from mrnet.networks.saved import FORMAT, read_checkpoint
from mrnet.scans import files, series
from mrnet.scans.command import Report
from mrnet.scans.register import UNFINISHED, Register


def raw_edit(path, name, text):
    """Write a text where pydicom refuses to write such a number."""
    ds = pydicom.dcmread(path)
    ds[name] = pydicom.DataElement(name, "LO", text)
    ds.save_as(path)
    tag = ds[name].tag
    tag = tag.group.to_bytes(2, "little") + tag.element.to_bytes(2, "little")
    path.write_bytes(path.read_bytes().replace(tag + b"LO", tag + b"DS"))


def scale(name, value):
    return lambda path: raw_edit(path, name, value)


def header(**values):
    return lambda path: edit(path, **values)


ONE_SLICE = {  # of a series whose others agree; words of the reason
    "slope NaN": (scale("RescaleSlope", "NaN"), "RescaleSlope nan"),
    "slope inf": (scale("RescaleSlope", "inf"), "RescaleSlope inf"),
    "slope 0": (scale("RescaleSlope", "0"), "RescaleSlope 0"),
    "slope -1": (scale("RescaleSlope", "-1"), "RescaleSlope -1"),
    "slope 1000": (scale("RescaleSlope", "1000"), "RescaleSlope 1000"),
    "slope 0.001": (scale("RescaleSlope", "0.001"), "RescaleSlope 0.001"),
    "intercept NaN": (scale("RescaleIntercept", "NaN"), "RescaleIntercept nan"),
    "intercept -1e38": (scale("RescaleIntercept", "-1e38"), "RescaleIntercept -1e+38"),
    "intercept 1000": (scale("RescaleIntercept", "1000"), "RescaleIntercept 1000"),
    "bits": (header(BitsAllocated=8, BitsStored=8, HighBit=7), "another than"),
    "high bit": (header(HighBit=11), "HighBit 11"),
    "sign": (header(PixelRepresentation=1), "another than"),
    "no sign": (header(PixelRepresentation=2), "PixelRepresentation 2"),
    "inverted": (header(PhotometricInterpretation="MONOCHROME1"), "another than"),
    "one UID": (header(SOPInstanceUID="1.2.3"), "under one SOPInstanceUID"),
}
ALL_SLICES = {
    "bits": (header(BitsAllocated=8, BitsStored=8, HighBit=7), "its header says 65536"),
    "rows": (header(Rows=128), "its header says 65536"),
    "wide": (header(PixelSpacing=[60, 60]), "mm wide; correct the pixel spacing"),
    "narrow": (header(PixelSpacing=[1e-9, 1e-9]), "mm wide; correct the pixel spacing"),
    "oblong": (header(PixelSpacing=[0.6, 0.1]), "mm wide; correct the pixel spacing"),
    "intercept 1e9": (scale("RescaleIntercept", "1e9"), "same value"),
}


KINDS = [(kind, 2 if kind == "one UID" else 1) for kind in ONE_SLICE]
KINDS += [(kind, SLICES) for kind in ALL_SLICES]


@pytest.mark.parametrize("kind, count", KINDS)
def test_a_series_whose_header_changes_its_pixels_gives_way_to_the_next(tmp_path, kind, count):
    change, words = (ALL_SLICES if count == SLICES else ONE_SLICE)[kind]
    for path in sagittal(tmp_path, 3, "PD FS sag")[:count]:
        change(path)
    volumes, unusable, said = read(tmp_path, field_of_view=140.0)
    assert not volumes and words in unusable["sagittal"]
    sagittal(tmp_path, 4, "PD sag")
    volumes, unusable, said = read(tmp_path)
    assert list(volumes) == ["sagittal"] and not unusable
    assert "series 3 'PD FS sag'" in said and words in said


def test_an_odd_localiser_costs_no_plane(tmp_path):
    sagittal(tmp_path, 4, "PD sag")
    for path in coronal(tmp_path, 3, "localizer"):
        raw_edit(path, "RescaleSlope", "NaN")
        edit(path, PixelSpacing=[60, 60], Rows=128)
    volumes, unusable, said = read(tmp_path)
    assert list(volumes) == ["sagittal"] and not unusable and "error" not in said


def test_padding_of_a_real_file_is_longer_than_a_byte(tmp_path):
    for k in range(5):
        ds = pydicom.dcmread(PYDICOM_FILES / "MR_small_padded.dcm")
        ds.ImagePositionPatient, ds.PixelSpacing = [-10, -10, 3.0 * k], [1.5, 1.5]
        ds.SOPInstanceUID = f"1.2.{k + 1}"
        (tmp_path / "scan").mkdir(exist_ok=True)
        ds.save_as(tmp_path / "scan" / f"{k}.dcm")
    assert "8320 bytes of pixel data, its header says 8192" in read(tmp_path / "scan")[1]["axial"]


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, RLELossless])
def test_a_compressed_frame_has_the_size_of_its_header(tmp_path, syntax):
    """A codestream of 256 x 256 px is never decoded where the header says 512 x 128."""
    for path in sagittal(tmp_path, 3, "PD FS sag"):
        ds = pydicom.dcmread(path)
        ds.compress(syntax)
        ds.Rows, ds.Columns, ds.PixelSpacing = 512, 128, [0.3, 1.2]
        ds.save_as(path)
    volumes, unusable, _ = read(tmp_path)
    if syntax == JPEG2000Lossless:
        assert not volumes and "256 x 256 px of 16 bits" in unusable["sagittal"]


def test_the_size_of_real_codestreams():
    """As pydicom's own files have it: JPEG, JPEG-LS and JPEG 2000."""
    names = ("JPEG-lossy.dcm", "JPEG2000.dcm", "MR_small_jpeg_ls_lossless.dcm", "JPGExtended.dcm")
    for name in names:
        ds = pydicom.dcmread(PYDICOM_FILES / name)
        frame = next(pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=1))
        rows, columns, components, bits = series.codestream_size(frame)
        assert (rows, columns, components) == (ds.Rows, ds.Columns, ds.SamplesPerPixel), name
        assert bits <= ds.BitsAllocated
    assert series.codestream_size(b"\xff\xd8" + b"\xff\xe0\0\2" * 9) == (0, 0, 0, 0)


# --- localisers and time --------------------------------------------------------------------------


def test_a_full_series_called_loc_is_none(tmp_path):
    sagittal(tmp_path, 3, "t2_tse ext loc ref")
    volumes, unusable, _ = read(tmp_path)
    assert list(volumes) == ["sagittal"] and not unusable


def test_a_series_called_loc_with_far_slices_is_one(tmp_path):
    sagittal(tmp_path, 3, "t2 loc", keep=[0, 2, 4, 6, 8])
    volumes, _, said = read(tmp_path)
    assert not volumes and "skipped: series 3 't2 loc', localiser (files: 5)" in said


def test_several_time_points_are_told_before_a_localiser(tmp_path):
    for time_point in range(3):
        sagittal(tmp_path / str(time_point), 3, "dyn ext loc ref", InstanceNumber=time_point + 1)
    volumes, unusable, _ = read(tmp_path)
    assert not volumes
    assert "several time points at one place (3 pictures of each)" in unusable["sagittal"]


# --- NIfTI ---------------------------------------------------------------------------------------

NIFTI = {  # offset, format and value in the header of NIfTI-1
    "slope NaN": (112, "<f", np.nan, "scl_slope"), "slope inf": (112, "<f", np.inf, "scl_slope"),
    "slope -1": (112, "<f", -1.0, "scl_slope"), "inter inf": (116, "<f", np.inf, "damaged"),
    "pixdim NaN": (80, "<f", np.nan, "pixdim"), "pixdim -1": (84, "<f", -1.0, "pixdim"),
    "pixdim 0": (88, "<f", 0.0, "pixdim"), "rows": (44, "<h", 128, "its header says"),
    "offset": (108, "<f", 400.0, "its header says"), "bits": (70, "<hh", (2, 8), "its header says"),
    "srow": (280, "<f", 1e-9, ""), "srow 60": (280, "<f", 60.0, "correct the pixel spacing"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NIFTI)
def test_nifti_headers_that_lie(tmp_path, kind):
    at, form, value, words = NIFTI[kind]
    path = nifti(tmp_path / "scan" / "sag.nii", "sagittal")
    data = bytearray(path.read_bytes())
    value = value if isinstance(value, tuple) else (value,)
    data[at : at + struct.calcsize(form)] = struct.pack(form, *value)
    path.write_bytes(data)
    nifti(tmp_path / "scan" / "cor.nii", "coronal")
    volumes, unusable, said = read(tmp_path / "scan")
    assert list(volumes) == ["coronal"] and words in said


# --- limits before the work -----------------------------------------------------------------------


def test_frames_that_are_not_there(tmp_path):
    ds = enhanced()
    set_pixels(ds, np.zeros((SLICES, 8, 8)))
    for count, words in ((2_000_000, "too large"), (4096, "pixel data ends"), (-3, "not positive")):
        ds.NumberOfFrames = count
        path = write(tmp_path / str(count) / "a.dcm", ds)
        began = time.process_time()
        said = read(path.parent)[2]
        assert words in said or "several" in said or "position" in said, said
        assert time.process_time() - began < 5


def preamble(body):
    return bytes(128) + b"DICM" + body


META = b"\2\0\0\0UL\4\0\0\0\0\0"
HEADERS = {
    "zeros": preamble(bytes(2**22)),
    "meta": preamble(META * 2**18),
    "sequences": preamble(
        b"\x08\0\x40\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\0\xe0\0\0\0\0" * 2**20
    ),
    "long": preamble(b"\x00\x52\x30\x92SQ\0\0\0\0\x80\0" + bytes(2**23)),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_without_an_end(tmp_path, kind):
    (tmp_path / "a.dcm").write_bytes(HEADERS[kind])
    began = time.process_time()
    with pytest.raises(InputError, match="without an end|damaged"):
        series.read_header(files.File(tmp_path / "a.dcm"))
    assert time.process_time() - began < 5


def test_deflated_files(tmp_path, monkeypatch):
    """A healthy one is read; one that inflates to far more than its size is not."""
    for path in sagittal(tmp_path, 3, "PD FS sag"):
        ds = pydicom.dcmread(path)
        ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        ds.save_as(path)
    assert list(read(tmp_path)[0]) == ["sagittal"]
    whole = path.read_bytes()
    size = 144 + int.from_bytes(whole[140:144], "little")
    monkeypatch.setattr(files, "ANY_BYTES", 2**20)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = packer.compress(bytes(2**21)) + packer.flush()
    path.write_bytes(whole[:size] + bomb)
    with pytest.raises(InputError, match="large deflated file"):
        series.read_header(files.File(path))


def test_a_zip_that_unpacks_to_far_more_than_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ANY_BYTES", 2**20)
    monkeypatch.setattr(files, "MAX_BYTES", 2**22)
    for count, size in ((1, 2**21), (9, 2**20)):
        path = tmp_path / f"{count}.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for k in range(count):
                archive.writestr(f"{k}.dcm", bytes(size))
        with pytest.raises(InputError, match="unpacks to"):
            files.zip_members(path)


def test_a_zip_with_millions_of_members(tmp_path, monkeypatch):
    monkeypatch.setattr("mrnet.files.MAX_DIRECTORY", 1000)
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for k in range(50):
            archive.writestr(f"{k}", b"")
    with pytest.raises(InputError, match="BadZipFile"):
        files.zip_members(path)


class Zeros:
    """Asks for 1 TB when it is unpickled, as a call that weights_only admits."""

    def __reduce__(self):
        return bytearray, (2**40,)


def deflated(path):
    """A saved file whose members are compressed: of zeros, a thousandth of what they unpack to."""
    content = io.BytesIO()
    torch.save({"format": FORMAT, "x": torch.zeros(2**20)}, content)
    with (
        zipfile.ZipFile(content) as stored,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for name in stored.namelist():
            out.writestr(name, stored.read(name))


@pytest.mark.parametrize(
    "kind, words", [("deflated", "unpacks to 4 MiB"), ("call", "more than tensors")]
)
def test_a_saved_model_takes_no_more_than_its_bytes(tmp_path, kind, words):
    path = tmp_path / "a.pt"
    if kind == "deflated":
        deflated(path)
    else:
        torch.save({"format": FORMAT, "x": Zeros()}, path)
    with pytest.raises(InputError, match=words):
        read_checkpoint(path)


def test_a_volume_of_more_voxels_than_an_exam_has(tmp_path):
    """Sparse, so that it takes no room on the disk; its values are never read."""
    with open(tmp_path / "a.npy", "wb") as file:
        shape = {"descr": "|u1", "fortran_order": False, "shape": (1025, 256, 256)}
        np.lib.format.write_array_header_1_0(file, shape)
        file.truncate(file.tell() + 1025 * 256 * 256)
    with pytest.raises(InputError, match="more voxels than an exam has"):
        read_volume(tmp_path / "a.npy")


# --- what is no regular file ----------------------------------------------------------------------


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [pipe, device])
@pytest.mark.parametrize("name", ["x.zip", "x.dcm", "x.nii", "x.nii.gz", "DICOMDIR", "x"])
def test_only_regular_files_are_opened(tmp_path, make, name):
    sagittal(tmp_path, 3, "PD FS sag")
    make(tmp_path / name)
    (tmp_path / "folder.dcm").mkdir()
    volumes, unusable, said = read(tmp_path)
    assert list(volumes) == ["sagittal"] and not unusable
    assert f"{name}, not a regular file" in said


def test_a_link_to_a_regular_file_is_opened(tmp_path):
    (tmp_path / "a").write_text("text")
    (tmp_path / "b").symlink_to("a")
    with open_regular(tmp_path / "b", "r", encoding="utf-8") as file:
        assert file.read() == "text"
    with pytest.raises(OSError, match="Larger than 0 MiB"):
        open_regular(tmp_path / "b", most=3)
    for make, name in itertools.product((pipe, device, os.mkdir), "c"):
        make(tmp_path / f"{make.__name__}{name}")
        with pytest.raises(OSError, match="regular file|directory"):
            open_regular(tmp_path / f"{make.__name__}{name}")


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["*", "[0-9]*", "000?", "..", "x", "١"])
def test_names_of_unfinished_exams_are_numbers(tmp_path, name):
    for number in (0, 1):
        path = tmp_path / "train" / "axial" / f"{number:04d}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"volume")
    (tmp_path / UNFINISHED).mkdir()
    if name != "..":
        (tmp_path / UNFINISHED / name).write_bytes(b"")
        (tmp_path / UNFINISHED / "0000").write_bytes(b"")
        with pytest.raises(InputError, match="not the number of an exam"):
            Register(tmp_path).clear(Report(collect=True))
    assert len(list((tmp_path / "train" / "axial").iterdir())) == 2
