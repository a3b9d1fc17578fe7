"""benchmark.py: its baseline computes what the article's library did, and its table adds up."""

import csv
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import assert_one_line_error, run_script
from scipy import ndimage

from tools import benchmark
from tools.article_loop import bilinear_by_hand


@pytest.mark.parametrize("degrees, down, right", [(0, 3.5, -2.25), (17, 0, 0), (-25, 4, 6)])
def test_baseline_resamples_as_scipy_does(degrees, down, right):
    volume = np.random.default_rng(0).random((3, 40, 52), np.float32)
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = np.array([[c, -s], [s, c]])
    matrix = torch.tensor(np.column_stack([turn, [down, right]]), dtype=torch.float32)
    ours = bilinear_by_hand(torch.from_numpy(volume), matrix).numpy()
    centre = (np.array(volume.shape[1:]) - 1) / 2
    offset = centre - turn @ centre + (down, right)
    theirs = [ndimage.affine_transform(v, turn, offset, order=1, mode="nearest") for v in volume]
    # Away from the borders, where the library's clamping leaves the last row and column out.
    rows, columns = np.mgrid[:40, :52]
    source = np.tensordot(turn, [rows, columns], 1) + offset[:, None, None]
    inside = ((source > 0) & (source < np.array([38, 50])[:, None, None])).all(axis=0)
    assert inside.mean() > 0.5
    np.testing.assert_allclose(ours[:, inside], np.array(theirs)[:, inside], atol=2e-5)


def test_13_the_floor_counts_what_is_done():
    """Multiply-adds at 256 x 256 by hand: (side, channels in, out, kernel) of each convolution, the
    first as 3 x 3 over 4 x 4 blocks of one grey channel."""
    layers = ((63, 16, 64, 3), (31, 64, 192, 5), (15, 192, 384, 3), (15, 384, 256, 3))
    layers += ((15, 256, 256, 3),)
    macs = [side**2 * fan_in * out * kernel**2 for side, fan_in, out, kernel in layers]
    slices, classifier = 10, 256
    training, evaluation = benchmark.flops_a_slice(torch.device("cpu"), slices)
    assert evaluation == pytest.approx(2 * (sum(macs) + classifier / slices), rel=1e-6)
    # Backward: gradients of weights and inputs, but the image needs none.
    backward = macs[0] + 2 * sum(macs[1:])
    assert training == pytest.approx(2 * (sum(macs) + backward), rel=3e-3)


def test_epochs_are_compared_round_by_round():
    """Medians of ratios within a round, not ratios of medians: a slow round slows both."""
    times = {
        benchmark.OURS: np.array([[1.0, 4.0, 2.0], [1.0, 4.0, 2.0]]),
        benchmark.ARTICLE: np.array([[3.0, 12.0, 4.0], [5.0, 20.0, 6.0]]),
    }
    ours, article = benchmark.epoch_table(times, (100, 10))
    assert (ours["train ms/slice"], ours["min"], ours["max"]) == (20, 10, 40)
    assert (ours["evaluate ms/slice"], ours["epoch s"]) == (200, 4)
    assert (ours["training by ours"], article["training by ours"]) == (1, 3)
    assert (ours["faster than article"], article["faster than article"]) == (4, 1)


@pytest.mark.whole
def test_table_of_all_variants(tmp_path):
    names = [benchmark.OURS, benchmark.ARTICLE]
    done = run_script("tools/benchmark.py", "--exams", 2, "--valid", 2, "--runs", 1, "--workers", 0,
                      "--out", tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("epoch-*.csv")
    with open(path, newline="") as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    ours, article = (rows[name] for name in names)
    assert "half of the slices" in rows
    assert all(float(row["train ms/slice"]) > 0 for row in rows.values())
    ratio = float(article["epoch s"]) / float(ours["epoch s"])
    assert float(ours["faster than article"]) == pytest.approx(ratio, rel=0.01)
    assert any(name.startswith("floor") for name in rows)


@pytest.mark.whole
def test_table_of_backbones(tmp_path):
    done = run_script("tools/benchmark.py", "--backbones", "squeezenet1_1", "--exams", 2, "--valid",
                      2, "--runs", 1, "--out", tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("backbones-*.csv")
    with open(path, newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["backbone"] == "squeezenet1_1" and 0 < float(row["GB at 30"]) < float(
        row["GB at 61"]
    )
    # torchvision's documentation: 1,235,496 with the classifier's 512 x 1000 + 1000.
    assert float(row["parameters, M"]) == pytest.approx(0.7225 + 0.0005, abs=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_device_that_is_not_there():
    assert_one_line_error(run_script("tools/benchmark.py", "--device", "cuda"), "--device cpu")


def test_a_number_of_rounds_that_is_none():
    done = run_script("tools/benchmark.py", "--runs", 0)
    assert done.returncode == 2 and "--runs: '0' is not a whole number of at least 1" in done.stderr


@pytest.mark.parametrize("words", [("--growth", "--backbones"), ("--data-dir", ".", "--growth")])
def test_two_measurements_at_once_are_a_usage_error(words):
    done = run_script("tools/benchmark.py", *words)
    assert done.returncode == 2 and "not allowed with argument" in done.stderr


def test_a_variant_that_is_not_there():
    done = run_script("tools/benchmark.py", "--only", "nonsense", "--exams", 2, "--valid", 2)
    assert_one_line_error(done, "--only nonsense", "ours")


def test_exams_of_ones_own(exams, tmp_path):
    for split in ("train", "valid"):
        for plane in ("axial", "coronal"):
            shutil.rmtree(exams / split / plane)
    done = run_script("tools/benchmark.py", "--data-dir", exams, "--exams", 3, "--valid", 100,
                      "--runs", 1, "--only", benchmark.OURS, "--out", tmp_path / "out")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "an epoch of sagittal: 3 exams" in done.stdout and "and 8 with" in done.stdout
    assert "floor" not in done.stdout  # which is of slices of 256 x 256
