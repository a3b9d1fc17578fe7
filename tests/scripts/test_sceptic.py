"""What a sceptic would try: networks and exams that change places after the training."""

import json
import random

import numpy as np
import pytest
from conftest import assert_one_line_error, run_process, run_script, write_exams


@pytest.fixture
def folds(tmp_path):
    """The axial plane in two folds."""
    data, models = write_exams(tmp_path / "data", train=24), tmp_path / "models"
    files = ("--data-dir", data, "--models-dir", models, "--logs-dir", tmp_path / "logs")
    done = run_script("train.py", "--task", "acl", "--plane", "axial", *files, "--folds", "2",
                      "--epochs", "1", "--no-pretrained")  # fmt: skip
    assert done.returncode == 0, done.stderr
    stack = ("train_logistic_regression.py", "--planes", "axial", *files, "--folds", "2")
    assert run_script(*stack).returncode == 0
    return data, models, stack


def test_networks_that_change_places_are_refused(folds):
    """Each would be asked about the exams that it was trained on."""
    _, models, stack = folds
    one, two = (models / f"acl-axial-fold{k}of2.pt" for k in (1, 2))
    one.rename(models / "kept.pt")
    two.rename(one)
    (models / "kept.pt").rename(two)
    assert_one_line_error(run_script(*stack), "fold1of2.pt", "fold 2")


@pytest.mark.parametrize("what", ["volumes", "labels"])
def test_exams_that_change_places_are_refused(folds, what):
    """Two training exams swap their volumes, or their labels, after the training."""
    data, _, stack = folds
    if what == "volumes":
        a, b = (data / "train" / "axial" / f"000{k}.npy" for k in (3, 4))
        first, second = np.load(a), np.load(b)
        np.save(a, second)
        np.save(b, first)
    else:
        path = data / "train-acl.csv"
        path.write_text(path.read_text().replace("3,1\n", "3,0\n", 1).replace("4,0\n", "4,1\n", 1))
    assert_one_line_error(run_script(*stack), "training exams differ", "--data-dir")


def shuffle_labels(rng, root, split, tasks):
    """Let the exams of a split change places, with all their labels."""
    files = [root / f"{split}-{task}.csv" for task in tasks]
    tables = [[line.split(",") for line in path.read_text().split()] for path in files]
    order = rng.sample(range(len(tables[0])), len(tables[0]))
    for path, rows in zip(files, tables, strict=True):
        lines = [f"{rows[i][0]},{rows[order[i]][1]}\n" for i in range(len(rows))]
        path.write_text("".join(lines))


@pytest.mark.slow
def test_shuffled_labels_teach_nothing(tmp_path):
    """The whole pipeline on labels that changed places: 15 networks learn the exams that they see,
    and neither they nor the stacks know others. Half an hour on one core."""
    data, models, tasks = tmp_path / "data", tmp_path / "models", ("abnormal", "acl", "meniscus")
    made = run_process("data/phantom/prepare.py", "--size", 64, "--out", data, timeout=1200)
    assert made.returncode == 0, made.stderr
    rng = random.Random(1)
    for split in ("train", "valid"):
        shuffle_labels(rng, data, split, tasks)
    folders = ("--data-dir", data, "--models-dir", models, "--logs-dir", tmp_path / "logs")
    recipe, protocol = ("--recipe", "best", "--average-weights", 0.99), ("--protocol", "held-out")
    done = run_process("reproduce.py", *folders, "--together", "--", *recipe, *protocol, "--folds",
                       5, timeout=3600)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for task in tasks:
        rows = json.loads((models / f"{task}-best-results.json").read_text())["valid"]
        labels = [line[-1] for line in (data / f"train-{task}.csv").read_text().split()]
        n, positive = len(labels), labels.count("1")
        error = np.sqrt((n + 1) / (12 * positive * (n - positive)))  # of 0.5: Mann-Whitney
        rows = {name: row for name, row in rows.items() if "against" not in name}
        assert len(rows) == 4
        for name, row in rows.items():
            print(f"{task} {name}: {row['train_auc']:.3f} out of fold, {row['auc']:.3f}")
            assert abs(row["train_auc"] - 0.5) < 3 * error, (task, name)
            assert row["auc_low"] < 0.5 < row["auc_high"], (task, name)
