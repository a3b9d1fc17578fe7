"""data/kneemri/prepare.py on files in KneeMRI's format, made here; the set itself is not needed."""

import csv
import importlib.util
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "data/kneemri/prepare.py"
spec = importlib.util.spec_from_file_location("kneemri_prepare", SCRIPT)
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)

COLUMNS = ["examId", "seriesNo", "aclDiagnosis", "kneeLR", "roiX", "roiY", "roiZ", "roiHeight",
           "roiWidth", "roiDepth", "volumeFilename"]  # fmt: skip


def knee(seed=0, shape=(7, 64, 64), dtype="<i2"):
    """A 12-bit volume (s, H, W) without symmetry."""
    z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
    volume = 100 * z + 20 * y + 7 * x + 900 * ((y - 20) ** 2 + (x - 40) ** 2 < 100 + 9 * seed)
    return volume.astype(dtype)


def write_set(folder, exams=40, columns=COLUMNS, shape=(5, 32, 32)):
    """metadata.csv and vol01 .. vol10; every fourth exam has two series. Diagnoses 0, 1, 2."""
    rows = []
    for exam in range(exams):
        for series in range(1, 3 if exam % 4 == 0 else 2):
            name, vol = f"{320000 + exam}-{series}.pck", f"vol{exam % 10 + 1:02d}"
            (folder / vol).mkdir(parents=True, exist_ok=True)
            (folder / vol / name).write_bytes(pickle.dumps(knee(exam, shape), protocol=2))
            diagnosis = 2 if exam % 10 == 9 else 1 if exam % 5 == 0 else 0
            rows.append([320000 + exam, series, diagnosis, exam % 2, 9, 9, 2, 9, 9, 2, name])
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([row[COLUMNS.index(c)] for c in columns] for row in rows)
    return rows


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Waiting for the disk takes longer than all the rest."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def convert(tmp_path, capsys):
    """Run the script on tmp_path/set -> status, stdout, stderr."""

    def run(*options):
        status = prepare.main([str(tmp_path / "set"), str(tmp_path / "out"), *map(str, options)])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        assert all(line.startswith("error: ") for line in said.err.splitlines())
        assert not list(tmp_path.rglob("*.tmp"))
        return status, said.out, said.err

    return run


def labels(tmp_path, split, task):
    with open(tmp_path / "out" / f"{split}-{task}.csv", newline="") as file:
        return {int(number): int(label) for number, label in csv.reader(file)}


def test_volumes_and_labels(convert, tmp_path):
    rows = write_set(tmp_path / "set", columns=COLUMNS[::-1])  # found by name
    status, out, err = convert("--id-map", tmp_path / "ids.csv")
    assert (status, err) == (0, "")
    seen = set()
    for split in ("train", "valid", "test"):
        acl, complete = labels(tmp_path, split, "acl"), labels(tmp_path, split, "acl-complete")
        files = {int(p.stem) for p in (tmp_path / "out" / split / "sagittal").iterdir()}
        assert acl.keys() == complete.keys() == files
        for number in files:
            diagnosis = rows[number][2]
            assert (acl[number], complete[number]) == (int(diagnosis > 0), int(diagnosis > 1))
        assert not seen & files
        seen |= files
    assert seen == set(range(len(rows)))
    with open(tmp_path / "ids.csv", newline="") as file:
        assert list(csv.reader(file))[1:] == [[str(i), row[-1]] for i, row in enumerate(rows)]
    status, _, err = convert()
    assert status == 2 and "--overwrite" in err


def test_exams_are_split_within_each_diagnosis_and_kept_whole(convert, tmp_path):
    rows = write_set(tmp_path / "set", exams=100)
    assert convert()[0] == 0
    sides, counts = defaultdict(set), defaultdict(int)
    for split in ("train", "valid", "test"):
        for number in labels(tmp_path, split, "acl"):
            sides[rows[number][0]].add(split)
    assert all(len(side) == 1 for side in sides.values())
    diagnosis = {row[0]: row[2] for row in rows}
    for exam, side in sides.items():
        counts[diagnosis[exam], *side] += 1
    assert dict(counts) == {
        (0, "train"): 42, (0, "valid"): 14, (0, "test"): 14,
        (1, "train"): 12, (1, "valid"): 4, (1, "test"): 4,
        (2, "train"): 6, (2, "valid"): 2, (2, "test"): 2,
    }  # fmt: skip
    first = labels(tmp_path, "valid", "acl")
    assert convert("--overwrite")[0] == 0
    assert labels(tmp_path, "valid", "acl") == first
    exams = [str(row[0]) for row in rows]
    table = [{"examId": e, "aclDiagnosis": 0} for e in exams]
    assert prepare.split_by_exam(table, 0.2, 0.2, 0) != prepare.split_by_exam(table, 0.2, 0.2, 1)


def test_stanfords_split_by_folder(convert, tmp_path):
    rows = write_set(tmp_path / "set")
    assert convert("--split", "folder")[0] == 0
    want = {"train": {3, 4, 6, 7, 8, 9}, "valid": {5, 10}, "test": {1, 2}}
    for split, volumes in want.items():
        numbers = labels(tmp_path, split, "acl")
        assert {(rows[n][0] - 320000) % 10 + 1 for n in numbers} == volumes
    (tmp_path / "set/vol07").rename(tmp_path / "set/other")
    status, out, err = convert("--split", "folder", "--overwrite")
    assert status == 1 and "not in a folder vol01 .. vol10" in err and "failures: 6" in out


def test_pixels(tmp_path):
    """Order and direction stay as stored; percentile window; resized, then padded to square."""
    volume = knee(shape=(4, 256, 200))
    low, high = np.percentile(volume, (0.5, 99.5))
    want = np.rint(np.clip((volume - low) / (high - low) * 255, 0, 255)).astype(np.uint8)
    got = prepare.to_uint8(volume, "file")
    assert got.dtype == np.uint8 and got.shape == (4, 256, 256)
    assert not got[:, :, :28].any() and not got[:, :, 228:].any()
    assert np.abs(got[:, :, 28:228].astype(int) - want).max() <= 1
    small = prepare.to_uint8(knee(shape=(4, 64, 64)), "file")
    assert np.corrcoef(small[:, 2::4, 2::4].ravel(), knee(shape=(4, 64, 64)).ravel())[0, 1] > 0.99


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<u2", "u1", "<i4", "<i8"])
def test_arrays_of_every_pickle_protocol(tmp_path, protocol, dtype):
    volume = knee(dtype="<i8", shape=(3, 5, 4)) % 200
    path = tmp_path / "a.pck"
    for array in (volume.astype(dtype), np.asfortranarray(volume.astype(dtype))):
        data = pickle.dumps(array, protocol=protocol)
        for module in (b"numpy.core.", b"numpy._core."):  # NumPy 1 and 2
            path.write_bytes(data.replace(b"numpy._core.", module) if protocol < 4 else data)
            assert np.array_equal(prepare.read_pck(path), array)


def test_array_of_python_2(tmp_path):
    """As Python 2 writes it: byte strings without _codecs, NumPy 1's module names."""
    volume = knee(shape=(3, 5, 4))
    data = volume.tobytes()
    state = b"(K\x01(K\x03K\x05K\x04tcnumpy\ndtype\nU\x02i2K\x00K\x01\x87R(K\x03U\x01<NNNJ"
    state += struct.pack("<i", -1) + b"J" + struct.pack("<i", -1) + b"K\x00tb\x89T"
    pickled = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        + state + struct.pack("<i", len(data)) + data + b"tb."
    )  # fmt: skip
    assert np.array_equal(pickle.loads(pickled, encoding="latin1"), volume)  # a sound test file
    (tmp_path / "a.pck").write_bytes(pickled)
    assert np.array_equal(prepare.read_pck(tmp_path / "a.pck"), volume)


class Hostile:
    """Pickles to a call of os.system."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def hostile_files(marker):
    """Pickles that run code where they are read freely, by several ways."""
    array = pickle.dumps(knee(shape=(2, 3, 3)), protocol=2)
    call = b"cposix\nsystem\n(X" + struct.pack("<i", len(f"touch {marker}"))
    call += f"touch {marker}".encode() + b"tR"
    expression = f"open({str(marker)!r}, 'w').close()".encode()
    return {
        "plain": pickle.dumps(Hostile(marker)),
        "in a list": pickle.dumps([knee(shape=(2, 3, 3)), Hostile(marker)]),
        "object array": pickle.dumps(np.array([Hostile(marker)], object)),
        "before the array": b"\x80\x02" + call + b"0" + array[2:],
        "eval": b"cbuiltins\neval\n(X" + struct.pack("<i", len(expression)) + expression + b"tR.",
        "numpy": b"cnumpy.testing\nrunstring\n(V" + expression + b"\n}tR.",
        "codec": b"c_codecs\nencode\n(Vaaa\nVrot13\ntR.",
        "attribute": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
    }  # fmt: skip


HARMLESS = {"codec", "attribute"}  # they name what no array needs


@pytest.mark.parametrize("way", hostile_files("x"))
def test_hostile_pickle_is_refused_and_has_not_run(convert, tmp_path, way):
    marker = tmp_path / "it-ran"
    write_set(tmp_path / "set", exams=12)
    path = tmp_path / "set/vol03/320002-1.pck"
    path.write_bytes(hostile_files(marker)[way])
    status, out, err = convert()
    assert status == 1 and "failures: 1" in out and len(err.splitlines()) == 1
    assert str(path) in err and "refused, UnpicklingError" in err
    assert not marker.exists()
    assert len(list((tmp_path / "out").rglob("*.npy"))) == 14


@pytest.mark.parametrize("way", sorted(set(hostile_files("x")) - HARMLESS))
def test_the_hostile_file_would_run(tmp_path, way):
    """The test above tests something: read freely, the file does run."""
    (tmp_path / "a.pck").write_bytes(hostile_files(tmp_path / "it-ran")[way])
    code = f"import pickle; pickle.load(open({str(tmp_path / 'a.pck')!r}, 'rb'))"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "it-ran").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pickle.dumps(knee().astype(float)), "not whole numbers"),
        (pickle.dumps(knee()[0]), "expected (s, H, W)"),
        (pickle.dumps([1, 2]), "it holds no array"),
        (pickle.dumps(knee())[:-500], "refused"),
        (b"", "refused"),
        (b"PK\3\4", "refused"),
        (pickle.dumps(np.zeros((3, 9, 9), "<i2")), "every pixel has the same value"),
        (b"\x80\x02r\xff\xff\xff\x7fN.", "refused"),  # a memo of 2**31 places
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"a.", "refused"),  # bytes of 1 TiB
        (b"\x80\x05\x96" + struct.pack("<Q", 2**34) + b"a.", "refused"),  # a bytearray of 16 GiB
        (b"\x80\x02" + b"(" * 100_000 + b".", "refused"),
    ],
)
def test_pck_that_is_no_volume(convert, tmp_path, content, words):
    write_set(tmp_path / "set", exams=12)
    path = tmp_path / "set/vol02/320001-1.pck"
    path.write_bytes(content)
    status, out, err = convert()
    assert status == 1 and "failures: 1" in out
    assert str(path) in err and words in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("aclDiagnosis", "diagnosis"), "line 2: no aclDiagnosis"),
        (("320000-1.pck", "../320000-1.pck"), "is a path"),
        (("320000-1.pck", "/etc/passwd"), "is a path"),
        (("320000-1.pck", "320001-1.pck"), "is listed twice"),
        (("320001,1,0", "320001,1,7"), "aclDiagnosis '7' is not 0, 1 or 2"),
        (("320001,1,0", ",1,0"), "line 4: no examId"),
    ],
)
def test_wrong_metadata(convert, tmp_path, change, words):
    write_set(tmp_path / "set", exams=12)
    path = tmp_path / "set/metadata.csv"
    path.write_text(path.read_text().replace(*change))
    status, _, err = convert()
    assert status == 2 and words in err and len(err.splitlines()) == 1


def test_missing_files(convert, tmp_path):
    assert convert()[0] == 2  # no folder
    (tmp_path / "set").mkdir()
    status, _, err = convert()
    assert status == 2 and "metadata.csv" in err
    write_set(tmp_path / "set", exams=12)
    (tmp_path / "set/vol02/320001-1.pck").unlink()
    status, out, err = convert()
    assert status == 1 and "no 320001-1.pck" in err and "failures: 1" in out
    for path in (tmp_path / "set").rglob("*.pck"):
        path.unlink()
    status, _, err = convert("--overwrite")
    assert status == 2 and "no volume could be used" in err


def test_wrong_arguments(tmp_path):
    for options in (("--valid", "0"), ("--valid", "0.6", "--test", "0.4"), ("--seed", "-1")):
        with pytest.raises(SystemExit) as end:
            prepare.main([str(tmp_path), str(tmp_path / "out"), *options])
        assert end.value.code == 2


def test_mutated_pickles_give_no_traceback(tmp_path):
    """2,000 seeded mutants: InputError or an array, in a bounded time; nothing else escapes."""
    rng, path = np.random.default_rng(4), tmp_path / "a.pck"
    names = [op.code.encode("latin1") for op in pickletools.opcodes]
    wholes = [pickle.dumps(knee(shape=(2, 4, 4)), protocol=p) for p in range(6)]
    outcomes = defaultdict(int)
    for i in range(2000):
        data = bytearray(wholes[i % len(wholes)])
        for _ in range(rng.integers(1, 6)):
            place = int(rng.integers(0, len(data)))
            if rng.random() < 0.5:
                data[place : place + 1] = names[rng.integers(len(names))]
            else:
                data[place] = rng.integers(256)
        path.write_bytes(data)
        began = time.monotonic()
        try:
            outcomes["array"] += prepare.read_pck(path).ndim == 3
        except prepare.InputError:
            outcomes["refused"] += 1
        assert time.monotonic() - began < 5
    assert outcomes["array"] > 50 and outcomes["refused"] > 500
