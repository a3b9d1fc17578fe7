"""A hospital's folder: every row names the right study and side, and a resumed file is a fresh one.

The long versions run with `pytest -m slow tests/test_hospital.py`.
"""

import shutil

import numpy as np
import pytest
from conftest import PLANES, rows_of, run_script
from hospital import KINDS, code_said, damage, predict_code, write_hospital, write_study

from mrnet.inference.task_models import Network


@pytest.fixture
def predict(trained, monkeypatch):
    """predict.py with networks that read the code in the pixels."""
    monkeypatch.setattr(Network, "logit", predict_code)
    models = ("--models-dir", trained[0] / "models", "--precision", "fp32", "--allow-synthetic")
    return lambda *args: run_script("predict.py", *models, *args)


@pytest.mark.parametrize("studies", [10, pytest.param(60, marks=pytest.mark.slow)])
def test_every_row_names_the_right_study_and_side(predict, tmp_path, studies):
    expected = write_hospital(tmp_path / "scans", studies)
    done = predict(tmp_path / "scans", "--out", tmp_path / "x.csv")
    assert done.returncode == 1, done.stderr  # some studies are damaged
    rows = rows_of(tmp_path / "x.csv")
    assert len(rows) == len(expected) and {row["exam"] for row in rows} == expected.keys()
    for row in rows:
        wanted = expected[row["exam"]]
        assert row["source"] == wanted.source
        assert {plane: code_said(row[plane]) for plane in PLANES} == wanted.codes
        assert bool(row["error"]) == wanted.has_error == (row["decision"] == "")


def change(scans, pool, rng):
    """Add, remove or damage one study, by chance."""
    there = sorted(path for path in scans.iterdir() if any(path.rglob("*.dcm")))
    kind = rng.choice(["add", "remove", "damage", "damage"])
    if kind == "add" or len(there) < 3:
        study = rng.choice(sorted(pool.iterdir()))
        shutil.rmtree(scans / study.name, ignore_errors=True)
        shutil.copytree(study, scans / study.name)
    elif kind == "remove":
        shutil.rmtree(rng.choice(there))
    else:
        files = sorted(rng.choice(there).rglob("*.dcm"))
        damage(files[int(rng.integers(len(files)))], rng)


@pytest.mark.parametrize(
    ("studies", "rounds", "changes"),
    [(10, 3, 6), pytest.param(60, 100, 10, marks=pytest.mark.slow)],
)
@pytest.mark.whole
def test_a_resumed_file_is_a_fresh_one(predict, tmp_path, studies, rounds, changes):
    rng = np.random.default_rng(0)
    pool, scans = tmp_path / "pool", tmp_path / "scans"
    write_hospital(pool, studies)
    for study in sorted(pool.iterdir())[::2]:
        shutil.copytree(study, scans / study.name)
    out, fresh, kept = tmp_path / "out.csv", tmp_path / "fresh.csv", 0
    assert predict(scans, "--out", out).returncode in (0, 1)
    for number in range(rounds):
        for _ in range(changes):
            change(scans, pool, rng)
        if number % 3 == 1:  # as a kill in the middle of a row leaves it
            out.write_bytes(out.read_bytes()[: int(rng.integers(0, out.stat().st_size))])
        resumed = predict(scans, "--out", out, "--resume")
        done = predict(scans, "--out", fresh, "--overwrite")
        assert done.returncode in (0, 1), done.stderr
        assert resumed.returncode == done.returncode
        assert out.read_bytes() == fresh.read_bytes(), f"round {number}"
        assert len(rows_of(out)) == len({(row["source"], row["exam"]) for row in rows_of(out)})
        kept += " were there" in resumed.stdout
    assert kept, "nothing was resumed"


def test_the_hospital_has_every_kind(tmp_path):
    """Otherwise the tests above test less than they say."""
    sizes = {len(write_study(tmp_path, n, kind)) for n, kind in enumerate(KINDS)}
    assert sizes == {1, 2}
