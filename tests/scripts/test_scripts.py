"""The scripts as a user runs them, on a tiny phantom and on damaged folders."""

import csv
import json
import runpy
import shutil

import numpy as np
import pytest
import torch
from conftest import (
    PLANES,
    QUICK,
    ROOT,
    assert_one_line_error,
    assert_same_training,
    let_planes_lack,
    run_script,
    write_exams,
)
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dataloader import MRDataset
from mrnet.stacking.results import read_predictions, read_results
from mrnet.stacking.stacking import load_stack
from mrnet.training.checkpoint import load_model
from train import evaluate_model

COMMANDS = [
    path.relative_to(ROOT)
    for pattern in ("*.py", "tools/*.py", "data/*/*.py")
    for path in sorted(ROOT.glob(pattern))
    if "__main__" in path.read_text()
]


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_every_command_has_help(command, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [str(command), "--help"])
    with pytest.raises(SystemExit) as end:
        if command.parts[0] == "tools":
            runpy.run_module(".".join(command.with_suffix("").parts), run_name="__main__")
        else:
            runpy.run_path(str(ROOT / command), run_name="__main__")
    assert end.value.code in (0, None)
    said = capsys.readouterr().out
    assert said.startswith("usage:") and len(said) > 300


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
        "saved",
    ):
        assert words in text
    epochs = [line for line in text.splitlines() if line.startswith(("    1  ", "    2  "))]
    assert len(epochs) == 2


def test_saved_model_says_what_it_is(trained):
    work, _ = trained
    content = torch.load(work / "models" / "acl-axial.pt", weights_only=True)
    metadata = content["metadata"]
    assert (metadata["task"], metadata["plane"], metadata["intensity"]) == (
        "acl",
        "axial",
        "standardized",
    )
    assert metadata["pretrained"] is False and metadata["epoch"] in (1, 2)
    assert (
        metadata["arguments"]["lr"] == 1e-4 and metadata["versions"]["torch"] == torch.__version__
    )
    assert not list((work / "models").glob("*.state"))
    history = metadata["history"]  # all epochs, those that were not saved as well
    assert [one["epoch"] for one in history] == [1, 2]
    best = history[metadata["epoch"] - 1]
    assert best["valid"] == metadata["metrics"]["valid"]
    assert best["train"] == metadata["metrics"]["train"] and best["seconds"] > 0
    assert metadata["machine"]


def test_tensorboard_holds_the_curves(trained):
    work, _ = trained
    (run,) = (work / "logs" / "acl" / "axial").iterdir()
    events = EventAccumulator(str(run)).Reload()
    tags = events.Tags()
    assert {"auc/valid", "learning-rate", "exams-per-second"} <= set(tags["scalars"])
    within = EventAccumulator(str(run / "within-epoch")).Reload()
    assert [p.step for p in within.Scalars("within-epoch/train-loss")][-1] == 40
    assert [point.step for point in events.Scalars("learning-rate")] == [1, 2]
    logged = {tag.split("/")[0]: tag for tag in tags["images"]}
    heat = {f"heat map of a {name} validation exam" for name in ("positive", "negative")}
    assert heat | {"roc"} <= set(logged)
    augmented = events.Images(logged["an augmented training exam"])
    assert [event.step for event in augmented] == [1]
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
    stack = load_stack(work / "models", "acl", ["article"])
    combination = stack["combinations"]["axial+coronal+sagittal"]
    np.testing.assert_allclose(combination["coefficients"], reference.coef_[0], atol=1e-4)
    x, y, p = by_split["valid"]
    np.testing.assert_allclose(p, reference.predict_proba(x)[:, 1], atol=1e-5)
    assert f"{roc_auc_score(y, p):.4f}" in said["stack"].stdout
    results = json.loads((work / "models" / "acl-results.json").read_text())
    assert results["valid"]["stack"]["auc"] == pytest.approx(roc_auc_score(y, p), abs=1e-6)
    assert stack["base_models"]["axial"] == ["acl-axial.pt"]
    for name in ("roc", "reliability"):
        assert (work / "models" / f"acl-{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.whole
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
    done = run_script(
        "train.py", "--task", "acl", "--plane", "axial", *files, *QUICK, "--precision", "fp32"
    )
    assert done.returncode == 0, done.stderr
    one, two = (
        torch.load(work / f / "acl-axial.pt", weights_only=True) for f in ("models", "again")
    )
    assert one["metadata"]["metrics"] == two["metadata"]["metrics"]
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


def test_ids_in_both_splits_are_warned_of(exams):
    assert "WARNING" not in train(exams, "--epochs", "1").stdout
    rows = (exams / "valid-acl.csv").read_text()
    (exams / "valid-acl.csv").write_text(rows + "3,1\n")
    for plane in PLANES:
        source = exams / "train" / plane / "0003.npy"
        shutil.copy(source, exams / "valid" / plane / "0003.npy")
    done = train(exams, "--epochs", "1")
    assert done.returncode == 0 and "1 ids are in both splits" in done.stdout


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


def test_diverging_run_says_where(tmp_path):
    done = train(write_exams(tmp_path / "data"), "--lr", "1e30")
    assert_one_line_error(done, "epoch", ".npy", "--lr", status=1)


def saved(exams, suffix="", models="models"):
    path = exams.parent / models / f"acl-axial{suffix}.pt"
    return torch.load(path, weights_only=True)


def test_resumed_is_uninterrupted_to_the_last_digit(exams, monkeypatch):
    elsewhere = ("--models-dir", exams.parent / "whole", "--epochs", "4")
    assert train(exams, *elsewhere).returncode == 0
    calls, real = [], evaluate_model

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:  # while the third epoch is evaluated
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr("train.evaluate_model", interrupted)
    stopped = train(exams, "--epochs", "4")
    assert stopped.returncode == 130 and "--resume" in stopped.stderr
    done = train(exams, "--epochs", "4", "--resume")
    assert done.returncode == 0 and "after epoch 2" in done.stdout
    assert_same_training(saved(exams), saved(exams, models="whole"))


def test_resume_starts_where_there_is_nothing_and_repeats_nothing(exams):
    assert train(exams, "--resume").returncode == 0
    before = (exams.parent / "models" / "acl-axial.pt").read_bytes()
    done = train(exams, "--resume")
    assert "finished before" in done.stdout and "epoch  " not in done.stdout
    assert (exams.parent / "models" / "acl-axial.pt").read_bytes() == before
    # Resuming never trains over a model of other arguments; not resuming does.
    done = train(exams, "--resume", "--seed", "1")
    assert_one_line_error(done, "acl-axial.pt", "--seed 0", "--models-dir")
    assert (exams.parent / "models" / "acl-axial.pt").read_bytes() == before
    assert train(exams, "--seed", "1").returncode == 0
    assert (exams.parent / "models" / "acl-axial.pt").read_bytes() != before


def test_an_unfinished_plane_is_not_stacked(trained, tmp_path):
    shutil.copytree(trained[0] / "models", tmp_path / "models")
    (tmp_path / "models" / "acl-coronal.state").write_bytes(b"")
    places = ("--data-dir", trained[0] / "data", "--models-dir", tmp_path / "models")
    done = run_script("train_logistic_regression.py", *places)
    assert_one_line_error(done, "acl-coronal.pt", "to its end", "--resume")


def test_resume_refuses_other_arguments(exams, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("train.evaluate_model", interrupted)
    assert train(exams).returncode == 130
    assert_one_line_error(train(exams, "--resume", "--lr", "1e-5"), "--lr 0.0001")


@pytest.mark.whole
def test_held_out_protocol_keeps_the_validation_exams_for_the_end(tmp_path):
    exams = write_exams(tmp_path / "data", train=36)
    done = train(exams, "--protocol", "held-out")
    assert done.returncode == 0, done.stderr
    metadata = saved(exams)["metadata"]
    assert set(metadata["metrics"]) == {"train", "tune", "valid"}
    assert "selected on other exams" in done.stdout and "tune auc" in done.stdout
    fingerprints = set(metadata["data"].values())
    assert len(fingerprints) == 3
    # Other validation labels change nothing that training does.
    flipped = [line.split(",") for line in (exams / "valid-acl.csv").read_text().split()]
    rows = "".join(f"{i},{1 - int(label)}\n" for i, label in flipped)
    (exams / "valid-acl.csv").write_text(rows)
    train(exams, "--protocol", "held-out", "--models-dir", exams.parent / "flipped")
    two = saved(exams, models="flipped")
    assert two["metadata"]["metrics"]["tune"] == metadata["metrics"]["tune"]
    assert all(torch.equal(two["model"][k], v) for k, v in saved(exams)["model"].items())


def test_a_last_epoch_is_not_said_to_be_selected(exams):
    last = ("--select", "last", "--patience", "2", "--lr-scheduler", "none")
    stack = ("train_logistic_regression.py", "--planes", "axial", "--data-dir", exams,
             "--models-dir", exams.parent / "models", "--logs-dir", exams.parent)  # fmt: skip
    done = train(exams, *last)
    assert "epoch 2 (the last epoch, no exams selected it)" in done.stdout, done.stderr
    (exams / "valid-groups.csv").write_text("13,Anna\n15,Anna\n16,Berta\n")
    done = run_script(*stack)
    assert done.returncode == 0 and "protocol article" in done.stdout, done.stderr
    assert "\n2 of the 8 validation exams share a group (a patient, a scanner)" in done.stdout
    assert "OPTIMISTIC" not in done.stdout and "selected" not in done.stdout


@pytest.mark.whole
def test_folds_and_seeds_stack_out_of_fold(exams):
    more = ("--folds", "2", "--repeat", "2")
    files = ("--data-dir", exams, "--models-dir", exams.parent / "models", "--logs-dir",
             exams.parent / "logs")  # fmt: skip
    for plane in PLANES:
        done = train(exams, "--plane", plane, *more)
        assert done.returncode == 0, done.stderr
    ids = {}
    for plane in PLANES:
        for seed in (0, 1):
            parts = []
            for fold in (1, 2):
                path = exams.parent / "models" / f"acl-{plane}-fold{fold}of2-seed{seed}.pt"
                parts.append(torch.load(path, weights_only=True)["metadata"]["out_of_fold"])
            assert sorted(parts[0] + parts[1], key=int) == [str(i) for i in range(12)]
            ids.setdefault(seed, parts)
            assert ids[seed] == parts  # the same in the three planes
    assert ids[0] != ids[1]
    paths = sorted((exams.parent / "models").glob("acl-*-folds2-seed[01].csv"))
    assert [len(path.read_text().splitlines()) for path in paths] == [1 + 12] * 6
    done = run_script("train_logistic_regression.py", *files, *more, "--sensitivity", "0.5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "out-of-fold AUC" in done.stdout and "2 seeds: mean" in done.stdout
    stack = load_stack(exams.parent / "models", "acl", ["article"])
    assert len(stack["base_models"]["axial"]) == 4
    # The written training prediction of an exam is that of the networks that did not see it.
    valid = MRDataset(exams, "acl", "axial")
    row = valid.rows_of(["5"])[0]
    expected = []
    for seed in (0, 1):
        fold = 1 if "5" in ids[seed][0] else 2
        model, _ = load_model(exams.parent / "models" / f"acl-axial-fold{fold}of2-seed{seed}.pt")
        with torch.inference_mode():
            expected.append(model(valid[row][0][None]).sigmoid().item())
    with open(exams.parent / "models" / "acl-predictions.csv", newline="") as file:
        rows = {(r["split"], r["id"]): r for r in csv.DictReader(file)}
    assert float(rows["train", "5"]["axial"]) == pytest.approx(np.mean(expected), abs=2e-3)
    # The stack's: a regression on the exams of the other fold (of the first seed).
    train_rows = [row for row in rows.values() if row["split"] == "train"]
    x = np.array([[float(row[plane]) for plane in PLANES] for row in train_rows])
    y = np.array([int(row["label"]) for row in train_rows])
    # Half of the 4 positives reach each threshold, midway below the second highest of theirs.
    for planes, one in stack["combinations"].items():
        columns = [PLANES.index(plane) for plane in planes.split("+")]
        p = LogisticRegression().fit(x[:, columns], y).predict_proba(x[:, columns])[:, 1]
        second = sorted(p[y == 1])[-2]
        assert one["threshold"] == pytest.approx((second + p[p < second].max()) / 2, abs=1e-5)
    cut = PredefinedSplit([int(row["id"] in ids[0][1]) for row in train_rows])
    given = LogisticRegression(), x, y
    wanted = cross_val_predict(*given, cv=cut, method="predict_proba")[:, 1]
    assert [float(row["stack"]) for row in train_rows] == pytest.approx(wanted, abs=1e-5)
    results = json.loads((exams.parent / "models" / "acl-results.json").read_text())
    found = results["valid"]["stack"]["train_auc"]
    assert found == pytest.approx(roc_auc_score(y, wanted)) and f" {found:.4f} " in done.stdout


def test_more_folds_than_the_rarer_class_has_exams(exams):
    assert_one_line_error(train(exams, "--folds", "5"), "5 folds", "at most 4")


def test_compare_two_runs(trained, tmp_path):
    first = trained[0] / "models" / "acl-predictions.csv"
    rows = list(csv.DictReader(first.read_text().splitlines()))
    for row in rows:  # a perfect axial plane; the others as they were
        row["axial"] = row["label"]
    second = tmp_path / "p.csv"
    with open(second, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    done = run_script("tools/compare.py", first, second)
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines()[2:]}
    valid = [row for row in rows if row["split"] == "valid"]
    labels = [int(row["label"]) for row in valid]
    stack = roc_auc_score(labels, [float(row["stack"]) for row in valid])
    assert f"{stack:.4f}" in lines["stack"] and "+0.0000" in lines["stack"]
    assert "1.0000" in lines["axial"]
    second.write_text("split,id\nvalid,1\n")
    assert_one_line_error(run_script("tools/compare.py", first, second), "p.csv", "predictions")


@pytest.mark.whole
def test_exams_that_lack_a_plane_go_through_every_script(exams):
    """Training, the stack, the checks and a comparison, with planes missing in both splits."""
    for place in ("train/axial/0003", "train/coronal/0005", "valid/sagittal/0013"):
        (exams / f"{place}.npy").unlink()
    assert_one_line_error(train(exams), "0003.npy", "no such volume")
    let_planes_lack(exams)
    for plane in ("axial", "coronal", "sagittal"):
        done = train(exams, "--plane", plane, "--folds", "2")
        assert done.returncode == 0, done.stderr
        lacks = "train" if plane != "sagittal" else "valid"
        assert f"{lacks:<10} 1 exam without a volume of this plane, skipped" in done.stdout
    models = exams.parent / "models"
    done = run_script("train_logistic_regression.py", "--data-dir", exams, "--models-dir", models,
                      "--folds", "2", "--logs-dir", exams.parent / "logs")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 of 8 validation exams lack a plane" in done.stdout
    ids, _, scores = read_predictions(models / "acl-predictions.csv")
    assert np.isnan(scores["sagittal"][ids.index("13")])
    assert np.isfinite(scores["stack"]).all() and np.isnan(scores["sagittal"]).sum() == 1
    results = read_results(models / "acl-results.json")
    combinations = load_stack(models, "acl", ["article"])["combinations"]
    for row, exam_id in enumerate(ids):  # decided as predict.py does
        planes = "axial+coronal" if exam_id == "13" else "axial+coronal+sagittal"
        threshold = combinations[planes]["threshold"]
        assert results.called[row] == (scores["stack"][row] >= threshold)
    stack = results.rows["stack"]
    assert stack["tp"] + stack["fp"] == results.called.sum()
    path = models / "acl-predictions.csv"
    done = run_script("tools/compare.py", path, path)
    assert done.returncode == 0 and "+0.0000" in done.stdout
    assert run_script("tools/report.py", models / "acl-results.json").returncode == 0
    done = run_script("tools/check.py", exams)
    assert "no faults" in done.stdout, done.stdout
    for plane in ("axial", "coronal", "sagittal"):
        (exams / "valid" / plane / "0012.npy").unlink()
    done = run_script("tools/check.py", exams)
    assert done.returncode == 2 and "1 fault," in done.stderr and "0012.npy" in done.stdout
