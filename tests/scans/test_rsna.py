"""data/rsna/prepare.py on small trees in the published format of RSNA's knee set of 2026."""

import csv
import json
import os
import random
import re
import shutil
import time
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from conftest import PLANES, assert_one_line_error, run_script
from hospital import PIXEL, SIDE, code_of, damage, read_code, write_series
from pydicom.uid import ImplicitVRLittleEndian, JPEG2000Lossless
from test_dicom import SLICES
from test_scans import coronal, turn

from data.rsna import prepare as rsna
from data.rsna.prepare import (
    count_elsewhere,
    group_studies,
    number_studies,
    split_groups,
    write_problems,
)
from dataloader import MRDataset
from mrnet.errors import InputError
from mrnet.inference import submission
from mrnet.inference.answering import Options
from mrnet.inference.exams import Exam, open_exams, warnings_in
from mrnet.inference.submission import Sample, read_sample, task_of
from mrnet.inference.task_models import TaskModels
from mrnet.layout.description import read_own_labels
from mrnet.layout.names import exam_name
from mrnet.layout.volumes import write_volume
from mrnet.scans.command import Report
from mrnet.scans.importer import Importer
from mrnet.scans.rsna import Candidate, Converted, StudyFolder, identity_of, rank
from mrnet.scans.rsna_tables import (
    FINDINGS,
    combine_labels,
    parse_label,
    read_labels,
    read_series,
    read_table,
)
from mrnet.scans.studies import find_exams
from mrnet.stacking.results import FORMAT, GAIN, Arguments, Gain, Row
from predict import Answer, make_row

KNEE = 85.0  # mm from the patient's middle
HEAD = ["StudyInstanceUID", "PatientSex", "Report", *FINDINGS]
SERIES_HEAD = ["StudyInstanceUID", "SeriesInstanceUID", "Fluid_Sensitive", "Fat_Suppression",
               "Anatomical_Plane"]  # fmt: skip


def uid_of(study):
    return f"1.2.826.{study}"


def write_rows(path, head, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([head, *rows])


def write_study(root, study, side="L", planes=PLANES, scanner="A", laterality=True, **more):
    """A study: for each plane a fat-suppressed series, one without (decoy 1) and a T1 (decoy 2).

    Returns its rows of train_series.csv.
    """
    rows = []
    x = more.pop("x", KNEE if side == "L" else -KNEE)
    about = {"study": uid_of(study), "Manufacturer": scanner, "FrameOfReferenceUID": f"9.{study}"}
    about |= {"Laterality": side} if laterality else {}
    about = about | {"PatientID": f"P{study}"} | more
    for p, plane in enumerate(PLANES):
        for decoy, (fluid, fat) in enumerate(((1, 1), (1, 0), (0, 0))):
            series = f"{uid_of(study)}.{p}.{decoy}"
            rows.append([uid_of(study), series, fluid, fat, plane.capitalize()])
            if plane in planes:
                folder = root / "train_series" / uid_of(study) / series
                write_series(folder, code_of(study, side, plane, decoy), plane, x, series,
                             description="", **about)  # fmt: skip
            else:
                rows.pop()
    return rows


def write_set(root, studies=6, **special):
    """A set: every third study has an ACL tear; each study has a scanner of its own."""
    series, rows = [], []
    for study in range(studies):
        series += write_study(root, study, "LR"[study % 2], scanner=f"scanner {study}",
                              **special.get(f"study{study}", {}))  # fmt: skip
        labels = [int(study % 3 == 0), *[""] * 11]
        rows.append([uid_of(study), "F", f"Report of study {study}.", *labels])
    write_rows(root / "train.csv", HEAD, rows)
    write_rows(root / "train_series.csv", SERIES_HEAD, series)
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("rsna"))


@pytest.fixture
def own(tree, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(tree, tmp_path / "rsna")


def prepare(root, out, *more):
    return run_script("data/rsna/prepare.py", root, out, "--workers", "1", "--valid", "0.34", *more)


def volumes(out):
    """{(study, side, plane): uint8 array} by what the pixels say."""
    found = {}
    for path in out.glob("*/*/*.npy"):
        volume = np.load(path)
        view, _, sequence = path.parent.name.partition("-")
        flipped = volume if view == "sagittal" else volume[:, :, ::-1]
        for way in (volume, flipped):
            try:
                code = read_code(way)
                break
            except AssertionError:
                continue
        rest, decoy = divmod(code, 4)
        rest, plane = divmod(rest, 3)
        study, left = divmod(rest, 2)
        assert (decoy, PLANES[plane]) == (2 if sequence == "t1" else 0, view)
        found[study, "RL"[left], path.parent.name] = path
    return found


def labels_of(out, task):
    found = {}
    for split in ("train", "valid"):
        with open(out / f"{split}-{task}.csv", newline="") as file:
            found |= dict(csv.reader(file))
    return found


def numbers_of(out):
    """{study: number}, from what the sagittal pixels say."""
    return {study: str(int(path.stem)) for (study, _, plane), path in volumes(out).items()
            if plane == "sagittal"}  # fmt: skip


def test_a_set_becomes_exams(tree, tmp_path):
    done = prepare(tree, tmp_path / "out", "--no-mirror")
    assert done.returncode == 0, done.stderr
    found = volumes(tmp_path / "out")
    assert set(found) == {(s, "LR"[s % 2], plane) for s in range(6) for plane in PLANES}
    assert "6 studies converted" in done.stdout and "6 of 6 studies have a plane" in done.stdout
    numbers = numbers_of(tmp_path / "out")
    assert {s: labels_of(tmp_path / "out", "acl")[n] for s, n in numbers.items()} == {
        s: str(int(s % 3 == 0)) for s in range(6)
    }
    assert set(labels_of(tmp_path / "out", "bakers").values()) == {""}
    splits = Counter(path.parts[-3] for (_, _, plane), path in found.items() if plane == "axial")
    assert splits == {"train": 4, "valid": 2}
    assert (tmp_path / "out" / "problems.txt").read_text() == ""
    content = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert content["mirrored"] is False and content["synthetic"] is False
    text = "".join(p.read_text() for p in (tmp_path / "out").glob("*.csv"))
    assert "1.2.826" not in text and "Report" not in text


def test_right_knees_are_mirrored(tree, tmp_path):
    assert prepare(tree, tmp_path / "mirrored").returncode == 0
    assert prepare(tree, tmp_path / "plain", "--no-mirror").returncode == 0
    for path in (tmp_path / "plain").glob("*/*/*.npy"):
        plain = np.load(path)
        other = np.load(tmp_path / "mirrored" / path.relative_to(tmp_path / "plain"))
        is_right = int(path.stem) % 2 == 1  # numbers follow the UIDs here
        axis = 0 if path.parent.name == "sagittal" else 2
        np.testing.assert_array_equal(other, np.flip(plain, axis) if is_right else plain)


def test_it_goes_on_where_it_was(tree, tmp_path):
    out = tmp_path / "out"
    assert prepare(tree, out).returncode == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for path in out.glob("*/*/0002.npy"):
        path.unlink()
    done = prepare(tree, out)
    assert done.returncode == 0 and "1 study converted" in done.stdout
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_field_of_view_is_the_same_size_everywhere(own, tmp_path):
    """The picture is 160 mm wide: of 80 mm the middle half is kept, of 320 mm it fills half."""
    assert prepare(own, tmp_path / "half", "--field-of-view", "80").returncode == 0
    done = prepare(own, tmp_path / "double", "--field-of-view", "320")
    assert "planes smaller than the field of view: 18" in done.stdout
    half = np.load(tmp_path / "half" / "train" / "axial" / "0000.npy")
    double = np.load(tmp_path / "double" / "train" / "axial" / "0000.npy")
    assert half.shape[1:] == double.shape[1:] == (256, 256)
    assert SIDE * PIXEL == 160
    edge = double.copy()
    edge[:, 64:192, 64:192] = 0
    assert not edge.any() and double[:, 64:192, 64:192].any()
    # 4 x 4 blocks of 40 mm: the middle 80 mm hold two by two of them
    blocks = half.reshape(len(half), 2, 128, 2, 128)[:, :, 40:88, :, 40:88]
    assert (blocks.max(axis=(2, 4)) - blocks.min(axis=(2, 4)) < 30).all()


# --- the traps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["train.csv", "train_series.csv"])
def test_a_renamed_or_missing_column_is_refused(own, tmp_path, file):
    text = (own / file).read_text()
    name = "ACL" if file == "train.csv" else "Anatomical_Plane"
    (own / file).write_text(text.replace(name, "Something", 1))
    assert_one_line_error(prepare(own, tmp_path / "out"), file, name)


def test_columns_in_another_order_and_case_are_found_by_name(own, tmp_path):
    with open(own / "train.csv", newline="") as file:
        rows = list(csv.reader(file))
    order = [7, 0, 3, 2, *(k for k in range(len(HEAD)) if k not in (7, 0, 3, 2))]
    rows = [[row[k] for k in order] for row in rows]
    rows[0] = [f" {name.lower()} ".replace("'", "\u2019") for name in rows[0]]
    write_rows(own / "train.csv", rows[0], [[f" {cell} " for cell in row] for row in rows[1:]])
    assert prepare(own, tmp_path / "out", "--no-mirror").returncode == 0
    numbers = numbers_of(tmp_path / "out")
    assert {s: labels_of(tmp_path / "out", "acl")[n] for s, n in numbers.items()} == {
        s: str(int(s % 3 == 0)) for s in range(6)
    }


def test_a_tree_without_dicom(own, tmp_path):
    shutil.rmtree(own / "train_series")
    assert_one_line_error(prepare(own, tmp_path / "out"), "train_series", "no such folder")
    (own / "train_series").mkdir()
    assert_one_line_error(prepare(own, tmp_path / "out"), "train_series", "no studies")


def test_wrong_plane_words_are_found_by_the_geometry(own, tmp_path):
    text = (own / "train_series.csv").read_text()
    text = text.replace("Sagittal", "Oblique").replace("Coronal", "Axial")
    (own / "train_series.csv").write_text(text)
    done = prepare(own, tmp_path / "out", "--no-mirror")
    assert len(volumes(tmp_path / "out")) == 18
    assert "plane by the geometry: coronal, the CSV says axial: 12 series" in done.stdout
    assert "plane by the geometry, the CSV is silent: 12 series" in done.stdout
    problems = (tmp_path / "out" / "problems.txt").read_text()
    assert problems.count("unknown Anatomical_Plane 'Oblique'") == 18 and done.returncode == 1


def test_a_silent_csv_leaves_it_to_the_header(own, tmp_path):
    with open(own / "train_series.csv", newline="") as file:
        head, *rows = csv.reader(file)
    write_rows(own / "train_series.csv", head, [[*row[:2], "", "", ""] for row in rows])
    for path in (own / "train_series" / uid_of(2)).rglob("*.dcm"):
        header = pydicom.dcmread(path)
        header.EchoTime = 12 if path.parent.name.endswith(".2") else 40  # ms; the T1, the others
        header.save_as(path)
    done = prepare(own, tmp_path / "out", "--no-mirror")
    assert {study for study, _, _ in volumes(tmp_path / "out")} == {2}
    # no description, no echo time: nothing says that any other series is fluid-sensitive
    assert_problem(done, tmp_path, f"study {uid_of(1)}: no fluid-sensitive series")


def assert_problem(done, tmp_path, *words):
    problems = (tmp_path / "out" / "problems.txt").read_text()
    assert done.returncode == 1 and "problems.txt" in done.stderr, done.stderr
    for word in words:
        assert word in problems


def test_a_straight_series_goes_before_an_oblique_one(tmp_path):
    """Though this has more slices."""
    found = {}
    for name, degrees, keep in (("oblique", 35, None), ("straight", 0, range(SLICES - 2))):
        turn(coronal(tmp_path / name, 1, keep=keep), degrees)
        (exam,) = find_exams(tmp_path / name, Report(collect=True))
        found[name] = Candidate(exam.series[0], "coronal", fluid=True, fat=True)
    assert max(found, key=lambda name: rank(found[name])) == "straight"


def test_a_damaged_file_takes_the_next_series_and_is_named(own, tmp_path):
    folder = own / "train_series" / uid_of(0) / f"{uid_of(0)}.2.0"  # sagittal, fat-suppressed
    path = sorted(folder.iterdir())[2]
    path.write_bytes(path.read_bytes()[:-500])
    done = prepare(own, tmp_path / "out", "--no-mirror")
    assert_problem(done, tmp_path, "sagittal", path.name)
    number = [p for p in (tmp_path / "out").glob("*/sagittal/*.npy")
              if read_code(np.load(p)) // 4 == code_of(0, "L", "sagittal") // 4]  # fmt: skip
    assert [read_code(np.load(p)) % 4 for p in number] == [1]  # not fat-suppressed, never the T1


def test_a_volume_of_zeros_is_a_missing_plane(own, tmp_path):
    for series in ("0", "1"):
        for path in (own / "train_series" / uid_of(0) / f"{uid_of(0)}.2.{series}").iterdir():
            header = pydicom.dcmread(path)
            header.PixelData = bytes(len(header.PixelData))
            header.save_as(path)
    done = prepare(own, tmp_path / "out", "--no-mirror")
    assert_problem(done, tmp_path, "sagittal missing", "every pixel has the same value")
    assert len(volumes(tmp_path / "out")) == 17  # the study keeps its other planes


def test_both_knees_in_one_study_are_refused(own, tmp_path):
    rows = write_study(own, 0, "R", planes=("coronal",), scanner="scanner 0", EchoTime=40)
    for row in rows:  # beside the left knee's series
        old = own / "train_series" / row[0] / row[1]
        old.rename(old.with_name(f"{row[1]}.9"))
    write_study(own, 0, "L", scanner="scanner 0")
    done = prepare(own, tmp_path / "out", "--no-mirror")
    assert_problem(done, tmp_path, f"study {uid_of(0)}: it shows both knees")
    assert len(volumes(tmp_path / "out")) == 15


def test_a_missing_laterality_is_derived_from_the_place(tmp_path):
    write_set(tmp_path / "rsna", 3, study1={"laterality": False})
    done = prepare(tmp_path / "rsna", tmp_path / "out")
    assert done.returncode == 0 and "side R: 1" in done.stdout and "mirrored: 1" in done.stdout


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, JPEG2000Lossless])
def test_other_transfer_syntaxes(tmp_path, syntax):
    if syntax == JPEG2000Lossless:
        write_set(tmp_path / "rsna", 3, study1={"syntax": syntax})
        assert prepare(tmp_path / "rsna", tmp_path / "out", "--no-mirror").returncode == 0
        assert len(volumes(tmp_path / "out")) == 9
        return
    write_set(tmp_path / "rsna", 3)
    for path in (tmp_path / "rsna" / "train_series" / uid_of(1)).rglob("*.dcm"):
        header = pydicom.dcmread(path)
        header.file_meta.TransferSyntaxUID = syntax
        header.save_as(path, implicit_vr=True, little_endian=True)
    assert prepare(tmp_path / "rsna", tmp_path / "out", "--no-mirror").returncode == 0
    assert len(volumes(tmp_path / "out")) == 9


def test_uids_with_spaces_and_studies_that_are_lost_are_said(own, tmp_path):
    with open(own / "train_series.csv", newline="") as file:
        head, *rows = csv.reader(file)
    rows = [[f" {row[0]}  ", f"{row[1]} ", *row[2:]] for row in rows]
    write_rows(own / "train_series.csv", head, rows)
    shutil.rmtree(own / "train_series" / uid_of(5))
    done = prepare(own, tmp_path / "out", "--no-mirror")
    assert f"in the CSV and not there: 1 study, the first {uid_of(5)}" in done.stderr
    assert_problem(done, tmp_path, f"study {uid_of(5)}: in the CSVs, but not in train_series")
    assert len(volumes(tmp_path / "out")) == 15
    write_problems(tmp_path / "out" / "problems.txt", ["study 3: damaged"], afresh=False)
    kept = (tmp_path / "out" / "problems.txt").read_text()
    assert kept == "study 3: damaged\n"  # what is found in every run is no news of an earlier one


def test_an_odd_folder_among_the_slices_stops_nothing(own, tmp_path):
    """Such as the @eaDir of a network storage."""
    (own / "train_series" / uid_of(0) / f"{uid_of(0)}.2.0" / "@eaDir").mkdir()
    assert prepare(own, tmp_path / "out", "--no-mirror").returncode == 0
    assert len(volumes(tmp_path / "out")) == 18


def test_a_series_whose_end_cannot_be_read_gives_way(own, tmp_path):
    folder = own / "train_series" / uid_of(0) / f"{uid_of(0)}.2.0"
    for path in sorted(folder.iterdir())[-1:]:
        path.write_bytes(path.read_bytes()[:400])
    done = prepare(own, tmp_path / "out", "--no-mirror")
    assert_problem(done, tmp_path, path.name)
    taken = [p for p in (tmp_path / "out").glob("*/sagittal/*.npy")
             if read_code(np.load(p)) // 4 == code_of(0, "L", "sagittal") // 4]  # fmt: skip
    assert [read_code(np.load(p)) % 4 for p in taken] == [1]  # whole, though not fat-suppressed


def test_a_knee_of_unknown_side_is_said(tmp_path):
    write_set(tmp_path / "rsna", 3, study1={"laterality": False, "x": 0.0})
    done = prepare(tmp_path / "rsna", tmp_path / "out")
    assert done.returncode == 0 and "side unknown: 1" in done.stdout
    (line,) = (tmp_path / "out" / "problems.txt").read_text().splitlines()
    assert line.startswith(f"study {uid_of(1)}: left or right knee not known, so it is not mirr")


def test_other_studies_do_not_take_the_place_of_earlier_ones(tmp_path):
    """Their labels would be lost without a word, and groups of both be numbered from 0."""
    first, other = ([StudyFolder(uid, {}, {}) for uid in uids] for uids in ("ab", "c"))
    for overwrite in (False, True):
        out = tmp_path / str(overwrite)
        register, numbers, _ = number_studies(first, {"a"}, out, overwrite, Report())
        register.save()
        number_studies(other, set(), out, overwrite, Report())  # nothing is written yet
        write_volume(out / "train/axial" / f"{numbers['b']:04d}.npy", np.zeros(1))
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        with pytest.raises(InputError, match="exam 0001 of train .* all studies .* another OUT"):
            number_studies(other, set(), out, overwrite, Report())
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
        number_studies([*first, *other], {"a"}, out, overwrite, Report())


@pytest.mark.parametrize("ends", ["error", "killed"])
def test_a_study_that_was_half_written_is_written_again(tree, tmp_path, monkeypatch, ends):
    """A full disk at its second plane, or the end of the process there."""
    from data.rsna import prepare as importer
    from mrnet.scans import register

    out = tmp_path / "out"
    assert prepare(tree, out).returncode == 0
    whole = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (number,) = {p.stem for p in sorted(out.glob("train/*/*.npy"))[:1]}
    for path in out.glob(f"*/*/{number}.npy"):
        path.unlink()
    path = out / "train" / "axial" / f"{number}.npy"
    with (
        nullcontext() if ends == "killed" else pytest.raises(OSError),
        register.whole_exam(out, int(number), [path]),
    ):
        write_volume(path, np.zeros((5, 256, 256), np.uint8))
        if ends == "error":
            raise OSError(28, "No space left on device")
    if ends == "killed":  # nothing took the mark away
        register.write_bytes(out / register.UNFINISHED / number, b"")
    assert path.exists() == (ends == "killed") and importer.Register(out).rows
    done = prepare(tree, out)
    assert done.returncode == 0 and "1 study converted" in done.stdout
    assert (f"exam {number} was left unfinished" in done.stdout) == (ends == "killed")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == whole


def test_two_importers_do_not_write_to_one_folder(tree, tmp_path):
    from mrnet.scans.serve import alone_in

    with alone_in(tmp_path / "out"):
        done = prepare(tree, tmp_path / "out")
        assert_one_line_error(done, "out: another import is writing to it")
        assert not (tmp_path / "out").exists()
    assert prepare(tree, tmp_path / "out").returncode == 0


def test_networks_of_mirrored_or_cropped_knees_refuse_others():
    from mrnet.inference.exams import FROM_DICOM, refuse_unfit

    about = FROM_DICOM | {"name": "rsna", "mirrored": True, "field_of_view": 140.0}

    def ask(trained_on, given):
        models = SimpleNamespace(task="acl", is_synthetic=False, datasets=[trained_on], planes=[])
        refuse_unfit(models, [given], False, PLANES)

    ask(about, about)
    ask(about, None)  # not known
    ask(FROM_DICOM, FROM_DICOM | {"mirrored": False, "field_of_view": None})
    with pytest.raises(InputError, match="DICOM has mirrored None, the acl networks .* True"):
        ask(about, FROM_DICOM)
    with pytest.raises(InputError, match="field_of_view 130.0, .* 140.0"):
        ask(about, about | {"field_of_view": 130.0})
    with pytest.raises(InputError, match="rsna has mirrored True"):
        ask(FROM_DICOM, about)


def test_one_folder_holds_exams_of_one_kind(tree, tmp_path):
    assert prepare(tree, tmp_path / "out").returncode == 0
    done = prepare(tree, tmp_path / "out", "--field-of-view", "140", "--overwrite")
    assert_one_line_error(done, "dataset.json", "field_of_view")


@pytest.mark.whole
def test_t1_series_are_planes_of_their_own(own, tmp_path):
    """Of the right study and plane; read from DICOM where a network takes them."""
    out = tmp_path / "out"
    assert prepare(own, out, "--no-mirror").returncode == 0 and len(volumes(out)) == 18
    done = prepare(own, out, "--no-mirror", "--t1")
    assert_one_line_error(done, "dataset.json", "t1 False, these have True")
    shutil.rmtree(own / "train_series" / "1.2.826.2" / "1.2.826.2.1.2")  # a coronal one
    out = tmp_path / "t1"
    done = prepare(own, out, "--no-mirror", "--t1")
    assert done.returncode == 1 and "without coronal-t1: 1" in done.stdout, done.stderr
    problems = (out / "problems.txt").read_text()
    assert "study 1.2.826.2: coronal-t1 missing: no series of this plane" in problems
    names = (*PLANES, "coronal-t1", "sagittal-t1")
    wanted = {(s, "LR"[s % 2], plane) for s in range(6) for plane in names}
    wanted.remove((2, "L", "coronal-t1"))
    written = volumes(out)
    assert set(written) == wanted
    about = json.loads((out / "dataset.json").read_text())
    for planes in (names, PLANES):
        networks = [SimpleNamespace(datasets=[about], planes=planes)]
        with open_exams([own / "train_series"], networks=networks, log=str) as exams:
            for study, exam in enumerate(exams.each()):
                paths = {p: path for (s, _, p), path in written.items() if s == study}
                assert set(exam.paths) == set(paths) & set(planes) and exam.unusable == {}
                for plane, path in exam.paths.items():
                    np.testing.assert_array_equal(np.load(path), np.load(paths[plane]))


# --- predicting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_scans_are_prepared_as_the_training_exams_were(tree, tmp_path, workers):
    """Studies from DICOM, as predict.py reads them, are those that prepare.py writes, whatever the
    number of processes that read them; no more of them lie on the disk than is needed."""
    assert prepare(tree, tmp_path / "out", "--field-of-view", "140").returncode == 0
    about = json.loads((tmp_path / "out" / "dataset.json").read_text())
    written = {}
    for path in (tmp_path / "out").glob("*/*/*.npy"):
        written[int(path.stem), path.parent.name] = np.load(path)
    with open(tmp_path / "out" / "exams.csv", newline="") as file:
        numbers = {row["exam"]: int(row["id"]) for row in csv.DictReader(file)}
    networks = [SimpleNamespace(datasets=[None, about], planes=[*PLANES])]
    with open_exams([tree / "train_series"], networks=networks, workers=workers) as exams:
        assert exams.datasets[0]["mirrored"] is True and len(exams) == 6
        names = [key[1] for key in exams]
        for exam in exams.each():
            assert exam.name == names.pop(0)
            assert len(list(exams.folder.iterdir())) <= workers + 1
            for plane, path in exam.paths.items():
                volume = written.pop((numbers[exam.name], plane))
                np.testing.assert_array_equal(np.load(path), volume)
            exams.remove(exam)
    assert not written


def test_a_plane_that_nobody_scanned_is_missing_and_not_unusable(own):
    """Decided from the other planes; one that was scanned otherwise, or is damaged, prevents it."""
    rows = (own / "train_series.csv").read_text().splitlines(keepends=True)
    studies = own / "train_series"
    for study, series in ((0, "012"), (1, "01"), (2, "")):  # axial ones that are removed
        for decoy in series:
            uid = f"{uid_of(study)}.0.{decoy}"
            shutil.rmtree(studies / uid_of(study) / uid)
            rows = [row for row in rows if f",{uid}," not in row]
    (own / "train_series.csv").write_text("".join(rows))
    for decoy in "01":
        for path in (studies / uid_of(2) / f"{uid_of(2)}.0.{decoy}").iterdir():
            path.write_bytes(path.read_bytes()[:-200])
    with open_exams([studies], log=str) as exams:
        found = [exam.unusable for exam in exams.each()]
    assert found[0] == {} == found[3] and list(found[1]) == list(found[2]) == ["axial"]
    assert "no fluid-sensitive series of this plane" in found[1]["axial"]


def test_a_plane_may_be_of_t1_series(tree):
    networks = [SimpleNamespace(datasets=[{"t1_planes": ["coronal"]}], planes=[*PLANES])]
    with open_exams([tree / "train_series"], networks=networks, log=str) as exams:
        assert exams.datasets[0]["t1_planes"] == ["coronal"]
        for study, exam in enumerate(exams.each()):
            assert exam.paths.keys() == set(PLANES) and exam.unusable == {}
            for plane, path in exam.paths.items():
                decoy = 2 if plane == "coronal" else 0
                side = "LR"[study % 2]
                assert read_code(np.load(path)) == code_of(study, side, plane, decoy)


def test_an_importer_that_is_killed_costs_one_study(tree):
    found = {}
    with open_exams([tree / "train_series"], log=lambda line: None, workers=2) as exams:
        exams.importers[1].process.kill()
        exams.importers[1].process.wait()
        for exam in exams.each():
            found[exams.place[exam.key]] = bool(exam.paths), exam.unusable
        assert exams.fault is None
    assert [place for place in range(6) if not found[place][0]] == [1]
    assert "the importer ended with status -9" in found[1][1]["axial"]


SERVER = """
import json, os, signal, sys
print(json.dumps({"exams": [[name, ""] for name in "abcdefg"], "lines": []}), flush=True)
for line in sys.stdin:
    name = json.loads(line)["exam"]
    if name in {bad!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    print(json.dumps({"exam": name, "lines": []}), flush=True)
"""


@pytest.mark.parametrize("bad, answered", [
    ("b", "acdefg"), ("adg", "bcef"), ("bcef", "adg"),  # never three in a row
    ("bcd", "a"),
])  # fmt: skip
def test_an_importer_that_crashes_is_started_again(tmp_path, bad, answered):
    """And not for ever; what was asked for is answered in order."""
    script = tmp_path / "prepare.py"
    script.write_text(SERVER.replace("{bad!r}", repr(bad)))
    importer, found = Importer(script, "scans", tmp_path, []), {}
    importer.read_listing()
    importer.request("a", None, False)
    for name, later in zip("abcdefg", "bcdefg-", strict=True):
        if later != "-":
            importer.request(later, None, False)
        found[name] = importer.answer()
        assert found[name].get("exam", name) == name
        assert "exam" in found[name] or found[name].get("crash") or importer.fault
    importer.close()
    assert "".join(name for name, reply in found.items() if "exam" in reply) == answered
    for name in bad[:2]:
        assert "ended with status -9 while it converted this exam" in found[name]["crash"]


def test_an_exam_says_which_series_was_passed_over(own):
    """Its row repeats it in `note`, without the study that the row names already."""
    series = own / "train_series" / uid_of(0) / f"{uid_of(0)}.0.0"
    for path in series.iterdir():
        path.write_bytes(path.read_bytes()[:-200])
    with open_exams([own / "train_series"], log=str) as exams:
        first, *others = list(exams.each())
    assert any(text.startswith("axial: passed over") for text in first.warnings)
    assert not any(text.startswith(("warning", "study")) for text in first.warnings)
    assert not any(one.warnings for one in others)


def test_a_doubt_about_the_side_is_warned_of_before_all_else(tmp_path, monkeypatch):
    """Rows have room for a few warnings only."""
    done = Converted(faults=["one", "two", "three", "four"], doubts=["not mirrored"])
    monkeypatch.setattr(rsna, "read_series", lambda *_: ({}, []))
    monkeypatch.setattr(rsna, "find_studies", lambda *_: [])
    monkeypatch.setattr(rsna, "convert", lambda *_: done)
    monkeypatch.setattr(rsna, "serve", lambda studies, digest, convert, *_: convert(None))
    report = Report(collect=True)
    rsna.serve_studies(tmp_path, tmp_path, None, report)
    assert warnings_in(report.take(), "", "")[0] == "not mirrored"


def test_a_row_has_the_importers_warnings():
    source = "Knie (links): 7"
    lines = [["stderr", f"warning: 7f3a ({source}): series 3 'cor' is 44 degrees from coronal"],
             ["stdout", f"{source}  coronal: series 3"],
             ["stderr", "warning: study 1.2.3: left or right knee not known"],
             *[["stderr", f"warning: {k} {'x' * 500}"] for k in range(5)]]  # fmt: skip
    found = warnings_in(lines, source, "7f3a")
    assert found[0] == "series 3 'cor' is 44 degrees from coronal"
    assert warnings_in(lines, "1.2.3", "7f3a")[1] == "left or right knee not known"
    assert len(found) == 4 and found[-1] == "4 more warnings" and max(map(len, found)) < 250
    exam = Exam("7", source, {}, {}, "hash", warnings=found[:1])
    models = TaskModels("acl", {}, None, "", [None], 0.5)
    row = make_row(exam, models, Answer([], {}, {}), Options(None, "fp32", False))
    assert row["note"].endswith("; series 3 'cor' is 44 degrees from coronal")


def test_a_csv_beside_a_folder_is_of_series_only_if_it_says_so(tree, tmp_path):
    from mrnet.inference.exams import is_rsna

    (tmp_path / "knee7").mkdir()
    assert is_rsna(tree / "train_series") and not is_rsna(tmp_path / "knee7")
    (tmp_path / "knee7.csv").write_text("exam,source,task\n")  # as README's predict.py writes it
    assert not is_rsna(tmp_path / "knee7")
    (tmp_path / "knee7.csv").write_text("\ufeffStudyInstanceUID,SeriesInstanceUID\n")
    assert is_rsna(tmp_path / "knee7") and not is_rsna(tmp_path / "knee7.csv")


def test_the_dicom_importer_mirrors_and_cuts_likewise(tree, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for out, options in ((whole, ()), (cut, ("--mirror", "--field-of-view", "80"))):
        for study in (0, 1):  # a left knee, a right one
            folder = tree / "train_series" / uid_of(study)
            done = run_script("data/dicom/prepare.py", folder, out, *options)
            assert done.returncode == 0, done.stderr
    for path in whole.glob("*/*/*.npy"):
        small = np.load(cut / path.relative_to(whole))
        axis = 1 if path.parent.name == "sagittal" else 2  # of one slice after another
        wanted = np.load(path)[:, 64:192, 64:192].repeat(2, axis=1).repeat(2, axis=2)
        if int(path.stem) == 1:
            wanted = np.flip(wanted, 0 if axis == 1 else 2)
        assert np.abs(small.astype(int) - wanted)[:, 20:108, 20:108].max() <= 6
    done = run_script("data/dicom/prepare.py", tree / "train_series" / uid_of(2), cut)
    assert_one_line_error(done, "dataset.json", "mirrored")


@pytest.mark.whole
def test_a_submission_has_every_study_of_the_sample_in_its_order(tree, tmp_path):
    out, models = tmp_path / "out", tmp_path / "models"
    assert prepare(tree, out, "--field-of-view", "140").returncode == 0
    for split in ("train", "valid"):
        for task in ("acl", "effusion"):
            numbers = sorted(int(p.stem) for p in (out / split / "sagittal").iterdir())
            rows = "".join(f"{n},{k % 2}\n" for k, n in enumerate(numbers))
            (out / f"{split}-{task}.csv").write_text(rows)
    done = run_script("train.py", "--task", "acl", "effusion", "--plane", "sagittal", "--data-dir",
                      out, "--models-dir", models, "--logs-dir", tmp_path / "logs",
                      "--no-pretrained", "--epochs", "1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    test = shutil.copytree(tree / "train_series", tmp_path / "test_series")
    shutil.copy(tree / "train_series.csv", tmp_path / "test_series.csv")
    for path in (test / uid_of(4)).rglob("*.dcm"):
        path.write_bytes(b"damaged")
    studies = [uid_of(s) for s in (3, 0, 9, 4, 1)]  # of 9 there is nothing
    write_rows(tmp_path / "sample.csv", ["StudyInstanceUID", "Effusion", "ACL"],
               [[uid, 0.5, 0.5] for uid in studies])  # fmt: skip
    command = ("predict.py", test, "--models-dir", models, "--submission", tmp_path / "sample.csv",
               "--out", tmp_path / "mine.csv")  # fmt: skip
    done = run_script(*command)
    last = done.stderr.splitlines()[-1]  # all that went wrong, not what was found last
    assert done.returncode == 1 and "2 of 5 studies have no answer" in last
    assert "could not be used" in last
    for study in (9, 4):
        assert f"study {uid_of(study)}: no answer" in done.stderr
    with open(tmp_path / "mine.csv", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["StudyInstanceUID", "Effusion", "ACL"] and [r[0] for r in rows] == studies
    with open(tmp_path / "mine-rows.csv", newline="") as file:
        answers = {(r["exam"], r["task"]): r["sagittal"] for r in csv.DictReader(file)}
    for uid, effusion, acl in rows:
        if uid in (uid_of(9), uid_of(4)):
            assert effusion == acl == "0.500000"  # of two and two training exams
        else:
            name = exam_name(uid)
            assert float(effusion) == pytest.approx(float(answers[name, "effusion"]), abs=1e-6)
            assert float(acl) == pytest.approx(float(answers[name, "acl"]), abs=1e-6)
            assert effusion != acl
    whole = (tmp_path / "mine.csv").read_bytes()
    assert run_script(*command, "--resume", "--jobs", 2).returncode == 1
    assert (tmp_path / "mine.csv").read_bytes() == whole
    again = run_script(*command)
    assert_one_line_error(again, "mine.csv: exists; give another --out, --resume or --overwrite")
    for out, words in ((tmp_path, "a folder"), (tmp_path / "sample.csv", "the sample itself")):
        done = run_script(*command[:-1], out, "--overwrite")
        assert_one_line_error(done, f"{out}: {words}")
    typo = [*command[:-3], tmp_path / "typo.csv", *command[-2:], "--resume"]
    assert_one_line_error(run_script(*typo), "typo.csv")
    write_rows(tmp_path / "sample.csv", ["StudyInstanceUID", "PF OA"], [[studies[0], 0.5]])
    assert_one_line_error(run_script(*command, "--overwrite"), "no models of task 'pf-oa'")


def row_text(exam, probability):
    return f"{exam},acl,0.9,,{probability}\n"


def test_a_submission_is_there_at_any_time(tmp_path, monkeypatch):
    """The prevalence at first, then what is answered; whole rows of this run only."""
    monkeypatch.setattr(submission, "REFRESH", 0.02)
    sample = Sample(["StudyInstanceUID", "ACL"], ["1.1", "1.2", "1.3"])
    rows, out = tmp_path / "mine-rows.csv", tmp_path / "mine.csv"
    head, tasks = "exam,task,axial,joint,stack\n", [TaskModels("acl", {}, None, "", [], 0.25)]
    rows.write_text(head + row_text(exam_name("1.3"), 0.875))  # of an earlier run
    os.utime(rows, (1, 1))

    def column():
        return [line.split(",")[1] for line in out.read_text().splitlines()[1:]]

    def wait_for(wanted):
        end = time.monotonic() + 20
        while column() != wanted and time.monotonic() < end:
            time.sleep(0.01)
        assert column() == wanted

    with submission.refreshed(out, sample, rows, tasks, False):
        time.sleep(0.1)
        assert column() == ["0.250000"] * 3
        half = row_text(exam_name("1.1"), 0.75)[:-2]
        rows.write_text(head + row_text(exam_name("1.2"), 0.5) + half)
        wait_for(["0.250000", "0.500000", "0.250000"])
        with open(rows, "a") as file:
            file.write("5\n")
        wait_for(["0.750000", "0.500000", "0.250000"])
        rows.write_bytes(b"\xff")
    assert column() == ["0.750000", "0.500000", "0.250000"]


def test_no_submission_is_left_where_the_exams_are_refused(tmp_path):
    sample, tasks = Sample(["id", "ACL"], ["1"]), [TaskModels("acl", {}, None, "", [], 0.25)]
    new, old = tmp_path / "new.csv", tmp_path / "old.csv"
    old.write_text("precious")
    for path in (new, old):
        with (pytest.raises(InputError),
              submission.refreshed(path, sample, tmp_path / "rows.csv", tasks, False)):  # fmt: skip
            raise InputError("not these")
    assert not new.exists() and old.read_text() == "precious"


def test_a_test_set_may_tell_less_of_its_series(own, capsys):
    """Headers and geometry decide; where there is no list at all, it says who reads."""
    path = own / "train_series.csv"
    rows = [line.split(",")[:2] for line in path.read_text().splitlines()]
    write_rows(path, rows[0], rows[1:])
    for file in (own / "train_series" / uid_of(2)).rglob("*.dcm"):
        header = pydicom.dcmread(file)
        header.EchoTime = 12 if file.parent.name.endswith(".2") else 40  # ms; the T1, the others
        header.save_as(file)
    with open_exams([own / "train_series"], log=str) as exams:
        planes = {exams.place[exam.key]: exam.paths.keys() for exam in exams.each()}
    assert len(planes) == 6 and planes[2] == set(PLANES)
    said = capsys.readouterr().err
    for name in ("Fluid_Sensitive", "Fat_Suppression", "Anatomical_Plane"):
        assert f"warning: {path}: lacks the column {name}" in said
    path.unlink()
    with open_exams([own / "train_series"], log=str) as exams:
        assert len(exams) == 6
    assert "train_series.csv: no list of series" in capsys.readouterr().err


@pytest.mark.parametrize("column, task", FINDINGS.items())
def test_columns_and_tasks(column, task):
    assert task_of(column) == task == task_of(f" {column.upper()} ".replace("'", "\u2019"))


def test_a_bad_sample_is_refused(tmp_path):
    path = tmp_path / "sample.csv"
    for text in ("", "StudyInstanceUID\n1.2\n", "StudyInstanceUID,ACL\n1.2,0\n1.2,0\n", "a,b\n"):
        path.write_text(text)
        with pytest.raises(InputError, match="sample.csv"):
            read_sample(path)


# --- labels ---------------------------------------------------------------------------------------


def test_the_sets_own_labels_win_over_the_mean_of_others():
    nan = float("nan")
    blank = dict.fromkeys(FINDINGS, nan)
    gold = {"a": blank | {"ACL": 1.0}, "b": blank}
    one = {"a": blank | {"ACL": 0.2, "MCL": 0.4}, "b": blank | {"MCL": 0.5}}
    two = {"a": blank | {"MCL": 0.8}, "c": blank | {"Fracture": 1.0}}
    labels, own = combine_labels(gold, [one, two])
    assert labels["a"]["ACL"] == 1.0 and own["a"]["ACL"] and not own["a"]["MCL"]
    assert labels["a"]["MCL"] == pytest.approx(0.6) and labels["b"]["MCL"] == 0.5
    assert labels["c"]["Fracture"] == 1.0 and np.isnan(labels["b"]["ACL"])


@pytest.mark.parametrize(
    "text, label",
    [("0", 0), ("1", 1), ("1.0", 1), ("0.25", 0.25), (".5", 0.5), ("1e-3", 1e-3), ("1.2", None),
     ("-0.1", None), ("yes", None), ("nan", None), ("inf", None), ("0.5", 0.5)],
)  # fmt: skip
def test_labels_are_numbers_from_0_to_1(text, label):
    assert parse_label(text) == label


def test_what_a_report_does_not_say_is_unknown():
    assert np.isnan(parse_label("")) and np.isnan(parse_label("0.5", unsaid=0.5))
    assert parse_label("0.5", unsaid=0.3) == 0.5


def test_soft_labels_reach_the_csv(own, tmp_path):
    rows = [[uid_of(s), *["0.5"] * 11, f"0.{s + 1}"] for s in range(6)]
    write_rows(own / "teacher.csv", ["StudyInstanceUID", *FINDINGS], rows)
    done = prepare(own, tmp_path / "out", "--no-mirror", "--labels", own / "teacher.csv",
                   "--unsaid", "0.5")  # fmt: skip
    assert done.returncode == 0, done.stderr
    numbers, found = numbers_of(tmp_path / "out"), labels_of(tmp_path / "out", "fracture")
    assert {s: found[n] for s, n in numbers.items()} == {
        s: "" if s == 4 else f"0.{s + 1}" for s in range(6)
    }
    assert set(labels_of(tmp_path / "out", "mcl").values()) == {""}
    assert read_own_labels(tmp_path / "out") == {"acl": set(numbers.values())}
    acl = labels_of(tmp_path / "out", "acl")
    assert {s: acl[n] for s, n in numbers.items()} == {s: str(int(s % 3 == 0)) for s in range(6)}


def test_the_sets_own_labels_may_weigh_more(own, tmp_path):
    rows = [[uid_of(s), *["0.25"] * 12] for s in range(6)]
    write_rows(own / "teacher.csv", ["StudyInstanceUID", *FINDINGS], rows)
    done = prepare(own, tmp_path / "out", "--labels", own / "teacher.csv", "--gold-weight", "5")
    assert done.returncode == 0, done.stderr
    exams = MRDataset(tmp_path / "out", ["acl"], "axial")
    assert set(exams.label_weights[:, 0]) == {5.0}
    text = (tmp_path / "out" / "train-mcl.csv").read_text()
    assert set(text.split()) == {f"{number},0.25" for number in exams.ids}


def write_results(models, task, folds):
    """A <task>-results.json of a stack, whose figures are all 0."""
    valid = {"stack": dict.fromkeys(Row.__annotations__, 0)}
    valid[GAIN] = dict.fromkeys(Gain.__annotations__, 0) | {"plane": "axial"}
    arguments = dict.fromkeys(Arguments.__annotations__) | {"data_dir": "data"}
    content = dict.fromkeys(("git", "machine", "protocol", "thresholds"), "") | {
        "format": FORMAT, "task": task, "recipes": ["article"], "valid": valid, "caveats": [],
        "other_thresholds": {}, "folds": folds, "versions": {}, "arguments": arguments,
        "data": {}, "digests": {}, "predictions": "0" * 64,
    }  # fmt: skip
    (models / f"{task}-results.json").write_text(json.dumps(content))


def test_pseudo_labels_are_out_of_fold_and_know_their_studies(own, tmp_path):
    out, models = tmp_path / "out", tmp_path / "models"
    assert prepare(own, out).returncode == 0
    models.mkdir()
    with open(out / "exams.csv", newline="") as file:
        numbers = {row["exam"]: row["id"] for row in csv.DictReader(file)}
    lines = ["split,id,label,axial,stack"]
    for study in range(5):  # of the last there is no prediction
        lines.append(f"train,{numbers[exam_name(uid_of(study))]},0,0.9,0.{study + 1}")
    lines.append(f"train,{numbers[exam_name(uid_of(5))]},0,0.9,")  # other folds lack its planes
    lines.append(f"valid,{numbers[exam_name(uid_of(5))]},0,0.9,0.99")
    (models / "acl-predictions.csv").write_text("\n".join(lines))
    write_results(models, "acl", folds=5)
    command = ("tools/pseudo_labels.py", own / "train.csv", "--data-dir", out, "--models-dir",
               models, "--out", tmp_path / "teacher.csv")  # fmt: skip
    done = run_script(*command)
    assert done.returncode == 0 and "6 studies, 5 of them with a label" in done.stdout
    labels = read_labels(tmp_path / "teacher.csv")
    assert not labels.faults
    found = {uid: one["ACL"] for uid, one in labels.values.items()}
    assert [found[uid_of(s)] for s in range(5)] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert np.isnan(found[uid_of(5)]) and np.isnan(labels.values[uid_of(0)]["MCL"])
    # Of predict.py: an answer for those without a label, nothing else.
    known = [numbers[exam_name(uid_of(s))] for s in range(6)]
    lines = ["source,exam,task,stack", f"train,{known[1]},acl,0.77", f"train,{known[5]},acl,0.78",
             f"train,{known[2]},mcl,0.79", f"valid,{known[3]},mcl,0.81",
             f"train,{known[4]},mcl,"]  # fmt: skip
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    done = run_script(*command, "--rows", tmp_path / "rows.csv")
    assert done.returncode == 0, done.stderr
    assert "ACL               5 exams out of fold, 0 without a label" in done.stdout
    assert "MCL               0 exams out of fold, 1 without a label" in done.stdout
    labels = read_labels(tmp_path / "teacher.csv").values
    assert [labels[uid_of(s)]["ACL"] for s in range(5)] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert np.isnan(labels[uid_of(5)]["ACL"])  # a network of another fold saw its label
    mcl = [labels[uid_of(s)]["MCL"] for s in range(6)]
    assert mcl[2] == 0.79 and np.isnan(np.delete(mcl, 2)).all()
    done = run_script(*command, "--rows", own / "train.csv")
    assert_one_line_error(done, "train.csv: not a CSV of predict.py")
    # Without stacks predict.py's answers are of networks that may have seen the labels.
    other = tmp_path / "other"
    done = run_script(*command, "--rows", tmp_path / "rows.csv", "--models-dir", other)
    assert_one_line_error(done, other, "no stack of any finding")
    other.mkdir()
    shutil.copy(models / "acl-predictions.csv", other / "mcl-predictions.csv")
    write_results(other, "mcl", folds=5)
    done = run_script(*command, "--rows", tmp_path / "rows.csv", "--models-dir", other)
    assert done.returncode == 0 and "ACL               no stack" in done.stdout, done.stderr
    labels = read_labels(tmp_path / "teacher.csv").values
    assert np.isnan([one["ACL"] for one in labels.values()]).all()
    write_results(models, "acl", folds=1)
    assert_one_line_error(run_script(*command), "without folds", "--folds 5")
    (models / "acl-results.json").write_text('{"folds": "5"}')
    assert_one_line_error(run_script(*command), "acl-results.json: damaged", "format is missing")


ALPHABET = b"01.,;\"'\n\r \0x-eE"


def mutate_rows(text, rng):
    """A CSV file with one or two bytes of every row changed, put in or taken out."""
    head, *rows = text.splitlines(keepends=True)
    mutated = []
    for row in map(bytearray, rows):
        for _ in range(rng.randint(1, 2)):
            place = rng.randrange(len(row))
            if rng.random() < 0.6:
                row[place] = rng.choice(ALPHABET)
            elif rng.random() < 0.5:
                row.insert(place, rng.choice(ALPHABET))
            elif len(row) > 1:
                del row[place]
        mutated.append(bytes(row))
    return head + b"".join(mutated)


def test_ten_thousand_mutated_rows_are_counted_and_raise_nothing_else(tmp_path):
    """Every row of the file is used or named, whatever it holds; in files of 100 rows."""
    rng, number, refused, counted = random.Random(0), 0, 0, 0
    rows = [[uid_of(s), "F", f"Report, of {s}.", s % 2, 0.25, *[""] * 10] for s in range(100)]
    write_rows(tmp_path / "train.csv", HEAD, rows)
    rows = [[uid_of(s // 4), f"{uid_of(s // 4)}.{s}", 1, s % 2, "Axial"] for s in range(100)]
    write_rows(tmp_path / "train_series.csv", SERIES_HEAD, rows)
    wholes = {path: path.read_bytes() for path in tmp_path.iterdir()}
    while counted < 10_000:
        path = list(wholes)[number % 2]
        number += 1
        path.write_bytes(mutate_rows(wholes[path], rng))
        try:
            if path.name == "train.csv":
                labels = read_labels(path)
                count, lost = read_table(path, HEAD).count, len(labels.faults)
                kept = len(labels.values)
            else:
                studies, faults = read_series(path)
                count, kept = read_table(path, SERIES_HEAD).count, sum(map(len, studies.values()))
                words = (" columns, the head has ", "a row without ", " is listed twice")
                lost = sum(any(word in fault for word in words) for fault in faults)
        except InputError as error:  # the file as a whole cannot be read
            assert path.name in str(error) and "\n" not in str(error)
            refused += 1
            continue
        assert kept + lost == count
        counted += count
    assert refused < 20


@pytest.mark.parametrize("studies", [4, pytest.param(150, marks=pytest.mark.slow)])
def test_damaged_files_lose_nothing_in_silence(tmp_path, studies):
    """A quarter of the files damaged (150 studies: 2,000 of 8,100): every plane of every study is
    there, of this study and plane and never of the T1 series, or it is named."""
    root, out = write_set(tmp_path / "rsna", studies), tmp_path / "out"
    rng, damaged = np.random.default_rng(0), 0
    for path in sorted((root / "train_series").rglob("*.dcm")):
        if rng.random() < 0.27:
            damage(path, rng)
            damaged += 1
    assert damaged >= 13 * studies
    done = prepare(root, out, "--no-mirror")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert f"{studies} studies converted" in done.stdout
    with open(out / "exams.csv", newline="") as file:
        numbers = {row["exam"]: int(row["id"]) for row in csv.DictReader(file)}
    problems, there = (out / "problems.txt").read_text(), Counter()
    for study in range(studies):
        number = numbers[exam_name(uid_of(study))]
        for plane in PLANES:
            found = list(out.glob(f"*/{plane}/{number:04d}.npy"))
            there[plane] += len(found)
            if not found:
                assert f"study {uid_of(study)}: {plane} missing: " in problems
            for path in found:
                blocks = np.load(path).reshape(-1, 4, 64, 4, 64)[:, :, 16:48, :, 16:48]
                bits = np.median(blocks, axis=(0, 2, 4)).ravel() > 127
                code = sum(int(bit) << k for k, bit in enumerate(bits[1:-1]))
                wanted = [code_of(study, "LR"[study % 2], plane, decoy) for decoy in (0, 1)]
                assert code in wanted, (study, plane)
    said = re.search(rf"([0-9]+) of {studies} studies have a plane", done.stdout)
    with_plane = {int(path.stem) for path in out.glob("*/*/*.npy")}
    assert int(said[1]) == len(with_plane) and (studies < 50 or there.total() > 100)


# --- groups ---------------------------------------------------------------------------------------


def test_studies_that_share_a_scanner_or_a_report_are_one_group():
    scanners = {"a": "x", "b": "x", "c": "y", "d": "", "e": ""}
    reports = {"a": "same", "c": "same", "d": "", "e": "alone"}
    groups = group_studies("abcde", scanners, reports)
    assert groups["a"] == groups["b"] == groups["c"]
    assert len({groups["a"], groups["d"], groups["e"]}) == 3


@pytest.mark.whole
def test_both_knees_of_a_patient_are_one_group(tmp_path):
    """Studies 0 and 1 are one patient's; a number that all others share names nobody."""
    series, rows = [], []
    for study in range(30):
        patient = "one" if study < 2 else "ANONYMOUS"
        series += write_study(tmp_path / "rsna", study, "LR"[study % 2], planes=("axial",),
                              scanner=f"scanner {study}", PatientID=patient)  # fmt: skip
        rows.append([uid_of(study), "F", f"Report {study}", study % 2, *[""] * 11])
    write_rows(tmp_path / "rsna" / "train.csv", HEAD, rows)
    write_rows(tmp_path / "rsna" / "train_series.csv", SERIES_HEAD, series)
    done = prepare(tmp_path / "rsna", tmp_path / "out", "--no-mirror")
    assert "studies share, not used: 28" in done.stdout and "groups by" in done.stdout
    groups = {}
    for split in ("train", "valid"):
        with open(tmp_path / "out" / f"{split}-groups.csv", newline="") as file:
            groups |= dict(csv.reader(file))
    number = {s: str(int(p.stem)) for (s, _, _), p in volumes(tmp_path / "out").items()}
    assert groups[number[0]] == groups[number[1]] and len(set(groups.values())) == 29
    text = "".join(p.read_text() for p in (tmp_path / "out").glob("*.*"))
    assert "ANONYMOUS" not in text and "one" not in text.split()


def test_patients_who_went_to_two_scanners_do_not_join_all_scanners():
    uids = [f"{scanner}.{k}" for scanner in "abcd" for k in range(10)]
    scanners = {uid: uid[0] for uid in uids}
    patients = {"a.0": "p", "b.0": "p", "b.1": "q", "c.0": "q", "c.1": "r", "d.0": "r", "d.1": "r"}
    groups = group_studies(uids, scanners, patients)
    for number in "pqr":
        assert len({groups[uid] for uid, patient in patients.items() if patient == number}) == 1
    assert len(set(groups.values())) == 4 and groups["a.1"] == groups["a.2"] != groups["b.2"]
    assert groups["c.1"] == groups["d.0"] == groups["d.9"]  # two of three studies
    assert count_elsewhere(groups, scanners) == 3


def test_scanner_and_patient_are_taken_from_the_first_headers_that_have_them(tmp_path):
    write_study(tmp_path, 0, scanner="Maker")
    folders = sorted((tmp_path / "train_series" / uid_of(0)).iterdir())
    for place, folder in enumerate(folders):
        for path in folder.iterdir():
            header = pydicom.dcmread(path)
            del header["Manufacturer" if place == 0 else "PatientID"]
            header.save_as(path)
    study = StudyFolder(uid_of(0), {folder.name: folder for folder in folders}, {})
    assert identity_of(study) == ("maker|||", "P0")


def test_a_split_takes_whole_groups():
    groups = {str(i): i // 7 for i in range(200)}
    valid = split_groups(groups, 0.1)
    assert abs(len(valid) - 20) <= 4
    assert not {groups[uid] for uid in valid} & {groups[uid] for uid in groups.keys() - valid}
    with pytest.raises(InputError, match="the largest of 5"):
        split_groups(dict.fromkeys("abcde", 0), 0.1)


def test_shared_scanners_do_not_cross_the_splits(tmp_path):
    series, rows = [], []
    for study in range(8):
        series += write_study(tmp_path / "rsna", study, scanner=f"scanner {study // 2}")
        rows.append([uid_of(study), "F", f"Report {study}", study % 2, *[""] * 11])
    write_rows(tmp_path / "rsna" / "train.csv", HEAD, rows)
    write_rows(tmp_path / "rsna" / "train_series.csv", SERIES_HEAD, series)
    assert prepare(tmp_path / "rsna", tmp_path / "out").returncode == 0
    split_of = {}
    for (study, _, plane), path in volumes(tmp_path / "out").items():
        split_of[study, plane] = path.parts[-3]
    for study in range(0, 8, 2):
        assert split_of[study, "axial"] == split_of[study + 1, "axial"]
    groups = {}
    for split in ("train", "valid"):
        with open(tmp_path / "out" / f"{split}-groups.csv", newline="") as file:
            groups |= dict(csv.reader(file))
    assert len(groups) == 8 and len(set(groups.values())) == 4
