"""What a sceptic would try on the whole pipeline: labels that mean nothing, models and exams that
change places."""

import csv
import random

import numpy as np
import pytest
from conftest import assert_one_line_error, run_script, write_exams

from common.metrics import auc_interval
from tools.sweep_table import all_rows, read_results

SWEEP = """
task = "acl"
planes = ["axial", "coronal", "sagittal"]
folds = 3
seeds = 1
protocol = "article"
views = 1
[recipes.article]
epochs = 5
lr = 3e-4
patience = 5
pretrained = false
augment = "none"
select = "last"
"""


def shuffle(path, seed=1):
    """Give the labels of a CSV to other exams."""
    with open(path, newline="") as file:
        ids, labels = zip(*csv.reader(file), strict=True)
    labels = random.Random(seed).sample(labels, len(labels))
    path.write_text("".join(f"{i},{label}\n" for i, label in zip(ids, labels, strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize("shuffled", [False, True])
def test_labels_that_mean_nothing_give_no_auc_out_of_fold(tmp_path, shuffled):
    """Training, tuning, out-of-fold prediction and the stack of 9 networks: with shuffled labels
    0.5 lies in the stack's interval, with the true ones the same networks find the squares."""
    data = write_exams(tmp_path / "data", train=60, valid=16)
    if shuffled:
        shuffle(data / "train-acl.csv")
    (tmp_path / "sceptic.toml").write_text(SWEEP)
    done = run_script("tools/sweep.py", tmp_path / "sceptic.toml", "--data-dir", data, "--out",
                      tmp_path / "out", "--models-dir", tmp_path / "models", "--jobs", "1",
                      "--device", "cpu", "--precision", "fp32")  # fmt: skip
    assert done.returncode == 0, done.stderr
    truth, rows = all_rows(*read_results(tmp_path / "out"), "acl")
    (stack,) = (row for row in rows if (row.recipe, row.column) == ("article", "stack"))
    value, low, high = auc_interval(truth, stack.scores[0])
    assert low < 0.5 < high if shuffled else low > 0.7, (value, low, high)


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
