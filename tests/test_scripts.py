"""The scripts as a user runs them, on a tiny phantom and on damaged folders."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import assert_one_line_error, run_process, run_script, write_exams
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PLANES = ("axial", "coronal", "sagittal")
QUICK = ("--no-pretrained", "--epochs", "2", "--lr", "1e-4", "--log-every", "5")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny phantom, three trained planes and their stack: folder and each command's output."""
    work = tmp_path_factory.mktemp("trained")
    said = {
        "phantom": run_process(
            "data/phantom/prepare.py",
            "--exams",
            20,
            "--valid",
            10,
            "--size",
            64,
            "--out",
            work / "data",
        )
    }
    files = (
        "--data-dir",
        work / "data",
        "--models-dir",
        work / "models",
        "--logs-dir",
        work / "logs",
    )
    for plane in PLANES:
        said[plane] = run_script("train.py", "--task", "acl", "--plane", plane, *files, *QUICK)
    said["stack"] = run_script("train_logistic_regression.py", *files)
    return work, said


def test_every_script_ends_well(trained):
    _, said = trained
    for done in said.values():
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr == ""


def test_training_says_what_ran(trained):
    _, said = trained
    text = said["axial"].stdout
    for words in (
        "device",
        "versions",
        "commit",
        "seed=0",
        "20 exams",
        "RANDOM",
        "valid auc",
        "best",
    ):
        assert words in text
    epochs = [line for line in text.splitlines() if line.startswith(("    1  ", "    2  "))]
    assert len(epochs) == 2


def test_saved_model_says_what_it_is(trained):
    work, _ = trained
    content = torch.load(work / "models" / "acl-axial.pt", weights_only=True)
    about = content["about"]
    assert (about["task"], about["plane"], about["intensity"]) == ("acl", "axial", "standardized")
    assert about["pretrained"] is False and about["epoch"] in (1, 2)
    assert about["arguments"]["lr"] == 1e-4 and about["versions"]["torch"] == torch.__version__
    assert not list((work / "models").glob("*.state"))


def test_tensorboard_holds_the_curves(trained):
    work, _ = trained
    (run,) = (work / "logs" / "acl" / "axial").iterdir()
    events = EventAccumulator(str(run)).Reload()
    tags = events.Tags()
    assert {"within-epoch/train-loss", "learning-rate", "exams-per-second"} <= set(tags["scalars"])
    assert [point.step for point in events.Scalars("learning-rate")] == [1, 2]
    assert {"an augmented training exam", "roc"} <= set(tags["images"])
    assert "precision-recall" in tags["tensors"]


def test_stack_is_scikit_learns_on_the_written_predictions(trained):
    work, said = trained
    with open(work / "models" / "acl-predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30
    by_split = {}
    for split in ("train", "valid"):
        part = [row for row in rows if row["split"] == split]
        x = np.array([[float(row[plane]) for plane in PLANES] for row in part])
        y = np.array([int(row["label"]) for row in part])
        by_split[split] = x, y, np.array([float(row["stack"]) for row in part])
    reference = LogisticRegression().fit(*by_split["train"][:2])
    stack = json.loads((work / "models" / "acl-stack.json").read_text())
    np.testing.assert_allclose(stack["coefficients"], reference.coef_[0], atol=1e-4)
    x, y, p = by_split["valid"]
    np.testing.assert_allclose(p, reference.predict_proba(x)[:, 1], atol=1e-5)
    assert f"{roc_auc_score(y, p):.4f}" in said["stack"].stdout


def test_same_seed_same_numbers_to_the_last_digit(trained):
    work, said = trained
    files = (
        "--data-dir",
        work / "data",
        "--models-dir",
        work / "again",
        "--logs-dir",
        work / "again",
    )
    done = run_script("train.py", "--task", "acl", "--plane", "axial", *files, *QUICK)
    assert done.returncode == 0, done.stderr
    one, two = (
        torch.load(work / f / "acl-axial.pt", weights_only=True) for f in ("models", "again")
    )
    assert one["about"]["metrics"] == two["about"]["metrics"]
    assert all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"])


def test_missing_plane_is_named_with_its_command(trained, tmp_path):
    work, _ = trained
    shutil.copytree(work / "models", tmp_path / "models")
    (tmp_path / "models" / "acl-coronal.pt").unlink()
    done = run_script(
        "train_logistic_regression.py",
        "--data-dir",
        work / "data",
        "--models-dir",
        tmp_path / "models",
    )
    assert_one_line_error(done, "coronal", "python train.py --task acl --plane coronal")


def train(exams, *more):
    return run_script(
        "train.py",
        "--task",
        "acl",
        "--plane",
        "axial",
        "--data-dir",
        exams,
        "--models-dir",
        exams.parent / "models",
        "--logs-dir",
        exams.parent / "logs",
        *QUICK,
        *more,
    )


def test_unknown_task_in_one_line(exams):
    assert_one_line_error(train(exams, "--task", "cyst"), "cyst", "acl")


def test_missing_volume_in_one_line_and_nothing_written(exams):
    (exams / "valid" / "axial" / "0013.npy").unlink()
    assert_one_line_error(train(exams), "0013.npy")
    assert not list((exams.parent / "models").glob("*.pt"))


def test_missing_data_in_one_line(tmp_path):
    assert_one_line_error(train(tmp_path / "none"), "none", "phantom")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_one(exams):
    assert_one_line_error(train(exams, "--device", "cuda"), "--device cpu")


def test_models_folder_that_cannot_be_written(exams):
    (exams.parent / "models").write_text("a file where the folder should be")
    assert_one_line_error(train(exams), "models", "--models-dir")


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--lr", "-1"),
        ("--epochs", "0"),
        ("--plane", "oblique"),
        ("--lr", "nan"),
        ("--dropout", "1"),
    ],
)
def test_bad_arguments(exams, flag, value):
    done = train(exams, flag, value)
    assert done.returncode == 2 and flag in done.stderr and "Traceback" not in done.stderr


def test_diverging_run_says_where(tmp_path):
    done = train(write_exams(tmp_path / "data"), "--lr", "1e30")
    assert_one_line_error(done, "epoch", ".npy", "--lr", status=1)


def test_resume_without_a_state(exams):
    assert_one_line_error(train(exams, "--resume"), "nothing to resume")
