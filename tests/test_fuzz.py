"""Every reader of foreign files on damaged and hostile ones: one line, no traceback, no code run.

python -m pytest tests/test_fuzz.py                        # half a minute, the same each time
FUZZ_INPUTS=20000 python -m pytest tests/test_fuzz.py      # longer, other inputs each time
"""

import importlib.util
import io
import json
import os
import pickle
import resource
import sys
import time
import zipfile
from collections import Counter

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from conftest import ROOT, metadata_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file

from model import MRNet
from mrnet.errors import InputError
from mrnet.files import csv_line
from mrnet.layout.description import read_dataset
from mrnet.layout.labels import read_groups, read_labels
from mrnet.layout.volumes import read_volume
from mrnet.networks.saved import FORMAT, STATE_FORMAT, read_checkpoint
from mrnet.scans.register import Register
from mrnet.stacking import stacking
from mrnet.stacking.stacking import combinations_of, load_stack
from mrnet.training.checkpoint import load_model
from tools import pointing_game


def script(path, name):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


predict = script("predict.py", "predict")
dicom = script("data/dicom/prepare.py", "dicom_prepare")
kneemri = script("data/kneemri/prepare.py", "kneemri_prepare")

BY_HAND = "FUZZ_INPUTS" in os.environ
INPUTS = int(os.environ.get("FUZZ_INPUTS", 6000))  # of all readers together
LONGEST, MOST = 5.0, 1e9  # seconds for one input, bytes that all of them may take
PROOF = ROOT / "tests" / ".a-file-ran-code"


class Evil:
    """Leaves PROOF when it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {PROOF}",)


# --- whole files to start from, sound and hostile -------------------------------------------------


def saved(content):
    data = io.BytesIO()
    torch.save(content, data)
    return data.getvalue()


def npy(array, **more):
    data = io.BytesIO()
    np.save(data, array, **more)
    return data.getvalue()


def headed(shape, descr="|u1"):
    """A .npy of a few bytes whose header claims `shape`."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + b"\x00" * 99


def hostile_archive():
    """A saved model whose pickle calls os.system."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil(), protocol=2))
        archive.writestr("archive/version", "3\n")
    return data.getvalue()


OF_MODEL = metadata_of()
VOLUME = np.arange(2 * 64 * 64, dtype=np.uint8).reshape(2, 64, 64)
STACK = {
    "format": stacking.FORMAT,
    "task": "acl",
    "features": "logit",
    "base_models": {plane: [f"acl-{plane}.pt"] for plane in ("axial", "coronal", "sagittal")},
    "digests": {f"acl-{plane}.pt": "0f" * 32 for plane in ("axial", "coronal", "sagittal")},
    "thresholds": "chosen on 20 exams",
    "combinations": {
        planes: {
            "columns": planes.split("+"),
            "coefficients": [1.5] * len(planes.split("+")),
            "intercept": 0.2,
            "threshold": 0.5,
        }
        for planes in combinations_of(("axial", "coronal", "sagittal"))
    },
}
METADATA = (
    "examId,seriesNo,aclDiagnosis,kneeLR,roiX,roiY,roiZ,roiHeight,roiWidth,roiDepth,volumeFilename\n"
    "1,2,0,1,3,4,5,6,7,8,1-2.pck\n2,2,2,0,3,4,5,6,7,8,2-2.pck\n"
)
# Of one exam; the columns are all there and in their order, whatever they are.
ROW = {"exam": "7", "source": "valid", "task": "acl", "axial": 0.25, "stack": 0.5}
ROW = (
    dict.fromkeys(predict.columns_for([])) | ROW | {"planes": ["axial"], "model": "m", "input": "i"}
)


def nifti():
    voxels = np.arange(6 * 8 * 8, dtype=np.int16).reshape(6, 8, 8)
    return nibabel.Nifti1Image(voxels, np.diag([10.0, 8.0, 8.0, 1.0])).to_bytes()


def mr_slice(k, name="MR_small.dcm"):
    """Slice k of a series made of one real slice, as a DICOM file."""
    ds = pydicom.dcmread(get_testdata_file(name))
    ds.ImagePositionPatient = [-10, -10, 3.0 * k]
    ds.PixelSpacing = [1.5, 1.5]  # 64 px as wide as a knee
    ds.SOPInstanceUID = pydicom.uid.generate_uid()
    data = io.BytesIO()
    ds.save_as(data)
    return data.getvalue()


# --- readers: what they start from, and how a file of bytes is read -------------------------------


def read_csv_of_labels(path):
    path.replace(path.parent / "train-x.csv")
    (path.parent / "valid-x.csv").write_text("1,0\n2,1\n")
    read_labels(path.parent, "x", "train")


DATASET = {"name": "x", "version": "1", "synthetic": False, "orientation": {"axial": "IPL"}}


def named(name, read, *more):
    """A reader of a folder, for a file that must have a certain name in it."""

    def read_folder(path):
        path.replace(path.parent / name)
        read(path.parent, *more)

    return read_folder


def read_stack(path):
    path.replace(path.parent / "acl-stack.json")
    stack = load_stack(path.parent, "acl", ["article"])
    for planes in stack["combinations"]:
        columns = dict.fromkeys(stack["base_models"], np.array([[0.3, 2.0]]))
        stacking.combine(stack, planes.split("+"), columns)


def read_lesions(path):
    path.replace(path.parent / "lesions.json")
    pointing_game.read_lesions(path.parent)


def read_scan(path):
    """A file among those of an exam; data/dicom/prepare.py returns a status and prints lines."""
    scan = path.parent / "scan"
    if not scan.exists():
        scan.mkdir()
        for k in range(5 if path.suffix == ".dcm" else 0):
            (scan / f"{k}.dcm").write_bytes(mr_slice(k))
    path.replace(scan / path.name)
    if dicom.main([str(scan), str(path.parent / "out"), "--overwrite"]) == 2:
        raise InputError("refused")


READERS = {  # what it is: sound files, hostile ones, how it is read
    "volume": (
        [npy(VOLUME), npy(VOLUME.astype(float))],
        [npy(np.array([Evil()], object), allow_pickle=True),
         headed("(99999, 99999, 99999)"), headed("(1, 64, 64)", "|O"), pickle.dumps(Evil())],
        read_volume,
    ),
    "labels": (
        [b"0,1\n1,0\n0002,1\n", "\ufeff1,0\r\n2,1\r\n".encode()], [], read_csv_of_labels,
    ),
    "model": (
        [saved({"format": FORMAT, "model": MRNet().state_dict(), "metadata": OF_MODEL})],
        [saved({"format": FORMAT, "model": {}, "metadata": OF_MODEL}), hostile_archive(),
         saved(Evil())],
        load_model,
    ),
    "state": (
        [saved({"format": STATE_FORMAT, "training": {"model": torch.zeros(3)}})],
        [hostile_archive()],
        lambda path: read_checkpoint(path, STATE_FORMAT),
    ),
    "stack": ([json.dumps(STACK).encode()], [], read_stack),
    "lesions": ([b'{"7": {"planes": {}, "lesions": []}}'], [], read_lesions),
    "predictions": (
        [(csv_line(ROW) + predict.as_text(ROW, jsonl=False) * 3).encode()],
        [],
        lambda path: predict.saved_exams(path, predict.columns_for([]), {"acl": "m"}, False),
    ),
    "json predictions": (
        [predict.as_text(ROW, jsonl=True).encode() * 3],
        [],
        lambda path: predict.saved_exams(path, predict.columns_for([]), {"acl": "m"}, True),
    ),
    "data set": ([json.dumps(DATASET).encode()], [], named("dataset.json", read_dataset)),
    "groups": ([b"0,1\n1,0\n0002,1\n"], [], named("train-groups.csv", read_groups, "train")),
    "register": ([b"id,exam,patient_hash\n0,abc,\n1,def-L,77\n"], [], named("exams.csv", Register)),
    "pck": (
        [pickle.dumps(VOLUME.astype(np.int16), protocol=p) for p in (0, 2, 4, 5)],
        [pickle.dumps(Evil(), protocol=p) for p in (0, 4)],
        kneemri.read_pck,
    ),
    "metadata": ([METADATA.encode()], [], kneemri.read_metadata),
    "dicom": (
        [mr_slice(5, name) for name in ("MR_small.dcm", "MR_small_RLE.dcm",
         "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm")],
        [],
        read_scan,
    ),
    "nifti": ([nifti()], [], read_scan),
}  # fmt: skip
SUFFIX = {"dicom": ".dcm", "nifti": ".nii", "volume": ".npy"}
REFUSALS = (InputError, kneemri.InputError)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize(
    "kind", sorted(READERS.keys() - {"dicom"})
)  # one of many: tests/scans/test_headers.py
def test_only_regular_files_are_read(tmp_path, kind, make):
    """A pipe without a writer would be waited for; a device has no end."""
    path = tmp_path / f"file{SUFFIX.get(kind, '')}"
    make(path)
    with pytest.raises((*REFUSALS, OSError)) as refused:
        READERS[kind][2](path)
    assert "\n" not in str(refused.value)


PUT = (b"\x00", b"\xff" * 8, b"9" * 30, b"\n", b'"', b"{", b"nan", b"-1")
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "cut", "double", "put", "end"]),
        st.integers(0, 3000),  # bytes from the start, or from the end
        st.booleans(),
        st.integers(1, 12),  # bytes concerned
        st.one_of(st.sampled_from(PUT), st.binary(min_size=1, max_size=12)),
    ),
    max_size=6,
)


def mutate(whole, edits):
    """A file with bytes near either end changed, cut out, doubled or put in."""
    data = bytearray(whole)
    for kind, place, from_end, some, new in edits:
        place = len(data) - place if from_end else place
        place = min(max(place, 0), len(data))
        if kind == "set":
            data[place : place + len(new)] = new
        elif kind == "cut":
            del data[place : place + some]
        elif kind == "double":
            data[place:place] = data[place : place + some] * (500 if some > 8 else 1)
        elif kind == "put":
            data[place:place] = new
        else:
            del data[place:]
    return bytes(data)


@pytest.mark.parametrize("name", READERS)
def test_damaged_and_hostile_files(name, tmp_path, monkeypatch, capsys):
    sound, hostile, read = READERS[name]
    wholes = sound + hostile
    path = tmp_path / f"fuzzed{SUFFIX.get(name, '')}"
    monkeypatch.setattr(os, "fsync", lambda _: None)  # waiting for the disk takes longest
    for whole in sound:
        path.write_bytes(whole)
        found = read(path)
        assert found is None or len(found), "nothing was found in it"
    for whole in hostile:
        path.write_bytes(whole)
        with pytest.raises(REFUSALS):
            read(path)
    outcomes, before = Counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @settings(
        max_examples=-(-INPUTS // len(READERS)),
        deadline=None,
        database=None,
        derandomize=not BY_HAND,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, len(wholes)), EDITS, st.binary(max_size=300))
    def one(which, edits, anything):
        path.write_bytes(mutate(wholes[which], edits) if which < len(wholes) else anything)
        began = time.monotonic()
        try:
            read(path)
            outcomes["read"] += 1
        except REFUSALS as error:
            assert len(str(error).splitlines()) == 1 and str(error).isprintable(), repr(str(error))
            outcomes["refused"] += 1
        assert time.monotonic() - began < LONGEST

    one()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    capsys.readouterr()
    print(f"{name}: {sum(outcomes.values())} inputs, {dict(outcomes)}, {used / 1e6:.0f} MB more")
    assert outcomes["refused"] and outcomes["read"], "the mutants test nothing"
    assert used < MOST
    assert not PROOF.exists(), "a file ran code"
