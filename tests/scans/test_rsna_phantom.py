"""Phantom knees in the form of RSNA's knee set of 2026, from their DICOM to a submission."""

import csv
import json
from collections import Counter

import numpy as np
import pydicom
import pytest
from conftest import PLANES, assert_one_line_error, run_script
from filelock import FileLock
from sklearn.metrics import roc_auc_score

from data.phantom import knee, prepare, scanner
from data.phantom.exam import draw_exam
from data.phantom.lesions import draw_labels
from data.phantom.rsna import FINDINGS, draw_scanner, findings_of, make_study, report_of
from mrnet.layout.names import exam_name
from mrnet.scans.rsna_tables import read_labels, read_series
from mrnet.training.datasets import all_tasks

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def made(tmp_path_factory, worker_id):
    """A set and the exams made of it, which all of pytest's processes share."""
    base = tmp_path_factory.getbasetemp()
    work = (base if worker_id == "master" else base.parent) / "rsna-phantom"
    with FileLock(f"{work}.lock"):
        if not (work / "data").exists():
            draw(work / "tree")
            done = run_script("data/rsna/prepare.py", work / "tree", work / "data", "--labels",
                              work / "tree" / "soft.csv", "--unsaid", "0.5", "--field-of-view",
                              "140", "--valid", "0.4")  # fmt: skip
            assert "12 of 12 studies have a plane" in done.stdout, done.stderr
    return work


@pytest.fixture
def tree(made):
    return made / "tree"


@pytest.fixture
def data(made):
    return made / "data"


def draw(out):
    """12 studies to train on and 5 to test, of few and thick slices of a coarsely drawn knee."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knee, "GRID", 1.6)
        patch.setattr(scanner, "SPACING", dict.fromkeys(PLANES, (11.0, 13.0)))
        argv = ["prepare.py", "--as", "rsna", "--exams", "12", "--valid", "5", "--out", str(out)]
        patch.setattr("sys.argv", argv)
        prepare.main()


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def headers(tree):
    for path in sorted(tree.glob("*_series/*/*/*.dcm")):
        yield path, pydicom.dcmread(path, stop_before_pixels=True)


def test_the_tree_has_the_sets_form_and_its_traps(tree):
    studies = {path.name for path in tree.glob("train_series/*")}
    train = read_labels(tree / "train.csv")
    assert set(train.values) == studies and len(studies) == 12 and not train.faults
    assert len(set(train.reports.values())) == 12
    labelled = [v for v in train.values.values() if not np.isnan(v["ACL"])]
    assert len(labelled) == 1  # a tenth
    for labels in labelled:
        known = {name for name, value in labels.items() if not np.isnan(value)}
        assert known == {"ACL", "Medial Meniscus", "Lateral Meniscus", "Effusion", "Contusion"}
    soft, truth = read_labels(tree / "soft.csv"), read_labels(tree / "truth.csv")
    pairs = [
        (truth.values[uid][name], value)
        for uid, labels in soft.values.items()
        for name, value in labels.items()
        if not np.isnan(value) and value != 0.5
    ]
    assert len(pairs) > 45 and roc_auc_score(*zip(*pairs, strict=True)) > 0.95
    listed, faults = read_series(tree / "train_series.csv")
    assert not faults and set(listed) == studies
    rows = [row for series in listed.values() for row in series.values()]
    assert 4.5 <= len(rows) / 12 <= 6.5 and any(row.plane is None for row in rows)
    syntaxes, sides, uids = Counter(), Counter(), Counter()
    for path, header in headers(tree):
        assert path.parent.name == header.SeriesInstanceUID
        assert path.parents[1].name == header.StudyInstanceUID
        syntaxes[header.file_meta.TransferSyntaxUID] += 1
        sides[header.get("Laterality")] += 1
        uids[header.SOPInstanceUID] += 1
    assert len(syntaxes) == 4 and set(sides) == {"L", "R", None}
    assert max(uids.values()) == 1
    sample = read_rows(tree / "sample_submission.csv")
    assert sample[0] == ["StudyInstanceUID", *FINDINGS] and len(sample) == 6


def test_the_same_seed_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(knee, "GRID", 1.6)
    monkeypatch.setattr(scanner, "SPACING", dict.fromkeys(PLANES, (11.0, 13.0)))
    (labels,) = draw_labels(np.random.default_rng(0), 1)
    made = [make_study(3, "train", labels, 5, tmp_path / name, 20) for name in "ab"]
    assert made[0] == made[1]
    files = [p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.dcm")]
    assert files
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()


def test_a_study_is_the_knee_that_mrnets_layout_has(data, monkeypatch):
    """Through the DICOM, whatever the scanner's habits: the pictures lie as the phantom's own, a
    right knee's mirrored."""
    monkeypatch.setattr(knee, "GRID", 1.6)
    monkeypatch.setattr(scanner, "SPACING", dict.fromkeys(PLANES, (20.0, 20.0)))
    with open(data / "exams.csv", newline="") as file:
        numbers = {row["exam"]: int(row["id"]) for row in csv.DictReader(file)}
    rng, checked = np.random.default_rng(0), Counter()
    for number, labels in enumerate(draw_labels(rng, 12)[:6]):
        drawn = draw_exam(number, labels, 0)
        uid = f"1.2.826.0.1.3680043.10.1445.0.{number}"
        for plane in PLANES:
            for path in data.glob(f"*/{plane}/{numbers[exam_name(uid)]:04d}.npy"):
                volume = np.load(path)
                own, _ = scanner.scan(drawn.knee, drawn.pose, plane, scanner.Cut(64, 140.0), rng)
                if drawn.side < 0:
                    own = np.flip(own, 0 if plane == "sagittal" else 2)
                middle, own = volume[len(volume) // 2, ::4, ::4], own[len(own) // 2]
                ways = [own, own[::-1], own[:, ::-1], own[::-1, ::-1]]
                alike = [np.corrcoef(middle.ravel(), way.ravel())[0, 1] for way in ways]
                assert alike[0] == max(alike) and alike[0] > 0.6, (number, plane, alike)
                checked[drawn.side] += 1
    assert checked.total() >= 12 and min(checked.values()) >= 3


def test_findings_are_those_of_the_lesions():
    lesions = {"acl": None, "meniscus": {"side": -1}, "effusion": 0.5, "oedema": []}
    found = findings_of(lesions, {"abnormal": 1})
    assert found == {"ACL": 0, "Medial Meniscus": 1, "Lateral Meniscus": 0, "Effusion": 1,
                     "Contusion": 0}  # fmt: skip
    harmless = lesions | {"meniscus": None, "effusion": 0.3, "oedema": [((0, 0, 0), 5.0, 0.4)]}
    assert not any(findings_of(harmless, {"abnormal": 0}).values())
    study = {"truth": found, "side": "R"}
    assert report_of(3, study) == "No. 3. Right knee: medial meniscus, effusion."


def test_scanners_differ():
    scanners = [draw_scanner(k, 0) for k in range(40)]
    assert len({one.name for one in scanners}) == 40 and len({one.size for one in scanners}) == 4
    assert {one.centred for one in scanners} == {True, False}
    for tag in ("EchoTime", "SeriesDescription", "PatientID", "Laterality"):
        assert {tag in one.tags for one in scanners} == {True, False}


def test_from_dicom_to_a_submission_by_the_documented_commands(tree, data, tmp_path):
    """docs/rsna.md with the smallest training; findings without labels are named, and get 0.5."""
    models = tmp_path / "models"
    content = json.loads((data / "dataset.json").read_text())
    assert content["mirrored"] and content["may_lack_planes"]
    assert content["synthetic"] and content["name"] == "phantom" and content["licence"] == "MIT"
    done = run_script("reproduce.py", "--data-dir", data, "--models-dir", models, "--logs-dir",
                      tmp_path / "logs", "--together", "--tasks", "effusion", "contusion", "--",
                      "--epochs", "1", "--no-pretrained", "--slices", "0.1", "--backbone",
                      "squeezenet1_1", "--precision", "fp32")  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((models / "results.json").read_text())
    assert list(results) == ["effusion", "contusion"]
    sample = tree / "sample_submission.csv"
    rows = read_rows(sample)
    done = run_script("predict.py", tree / "test_series", "--models-dir", models)
    assert_one_line_error(done, "--allow-synthetic")
    done = run_script("predict.py", tree / "test_series", "--submission", sample, "--models-dir",
                      models, "--allow-synthetic", "--precision", "fp32", "--out",
                      tmp_path / "mine.csv")  # fmt: skip
    assert done.returncode == 1 and "10 of 12 findings have no models" in done.stderr
    assert "error: bakers: no models, 0.5 for every study instead" in done.stderr
    assert "no answer" not in done.stderr
    head, *found = read_rows(tmp_path / "mine.csv")
    assert head == rows[0] and len(head) == 13
    assert [row[0] for row in found] == [row[0] for row in rows[1:]] and len(found) == 5
    trained = [head.index(name) for name in ("Contusion", "Effusion")]
    assert len({row[k] for row in found for k in trained}) == 10
    others = {row[k] for row in found for k in range(1, 13) if k not in trained}
    assert others == {"0.500000"}


def test_all_tasks_are_those_that_can_be_trained(data, capsys):
    names = all_tasks(data)
    said = capsys.readouterr().out
    assert "effusion" in names and "bakers" not in names
    assert "train-bakers.csv: 0 exams of one class only" in said
    assert len(names) + said.count("left out") == 12


@pytest.mark.parametrize("missing", [None, "imagecodecs"])
def test_what_it_needs_is_said_before_it_draws(tmp_path, monkeypatch, capsys, missing):
    def find(name):
        return None if name == missing else object()

    monkeypatch.setattr(prepare.importlib.util, "find_spec", find)
    argv = ["prepare.py", "--as", "rsna", *(["--out", str(tmp_path / "out")] if missing else [])]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as end:
        prepare.main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert ("pip install" if missing else "give --out") in said and not (tmp_path / "out").exists()
