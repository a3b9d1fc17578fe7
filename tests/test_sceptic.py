"""What a sceptic would try: networks and exams that change places after the training."""

import numpy as np
import pytest
from conftest import assert_one_line_error, run_script, write_exams


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
