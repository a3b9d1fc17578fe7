"""What the pictures show: points, curves and colours against scikit-learn, SciPy and by hand."""

import numpy as np
import pytest
from conftest import PLANES
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve
from sklearn.metrics import auc, brier_score_loss, roc_auc_score, roc_curve

from mrnet.evaluation.figures import (
    heat_colours,
    learning_figure,
    overlay,
    reliability_figure,
    roc_figure,
)
from mrnet.inference.explanation import PlaneMaps
from mrnet.reports.explain_page import contact_sheet

LABELS = np.arange(30) % 3 == 0
SCORES = np.random.default_rng(0).uniform(0.01, 0.6, 30) + 0.35 * LABELS


def test_a_roc_curve_is_scikit_learns_of_the_exams_that_have_a_score():
    some = np.where(np.arange(30) < 20, 1 - SCORES**2, np.nan)
    figure = roc_figure(LABELS.astype(int), {"axial": SCORES, "stack": some}, band="stack")
    (axes,) = figure.axes
    exams = {"axial": slice(None), "stack": slice(20)}
    for line, (name, values) in zip(axes.lines, (("axial", SCORES), ("stack", some)), strict=False):
        labels, known = LABELS[exams[name]], values[exams[name]]
        points = line.get_xydata()
        np.testing.assert_allclose(points, np.transpose(roc_curve(labels, known)[:2]))
        area = roc_auc_score(labels, known)
        assert auc(*points.T) == pytest.approx(area)
        assert line.get_label().startswith(f"{name}: AUC {area:.3f} [")
    assert axes.lines[2].get_xydata().tolist() == [[0, 0], [1, 1]]
    (band,) = axes.collections
    assert band.get_facecolor()[0, :3] == pytest.approx([1.0, 0x7F / 255, 0x0E / 255])  # C1
    assert axes.get_title() == "30 exams, 10 positive"


def test_a_reliability_diagram_is_scikit_learns_with_wilsons_intervals():
    figure = reliability_figure(LABELS, SCORES, "acl")
    upper, lower = figure.axes
    observed, predicted = calibration_curve(LABELS, SCORES, n_bins=10)
    ((points, _, (bars,)),) = upper.containers
    np.testing.assert_allclose(points.get_xydata(), np.transpose([predicted, observed]))
    edges = np.linspace(0, 1, 11)
    count = np.histogram(SCORES, edges)[0]
    count = count[count > 0]
    assert len(count) == len(observed) > 4
    for bar, x, share, n in zip(bars.get_segments(), predicted, observed, count, strict=True):
        interval = binomtest(round(share * n), int(n)).proportion_ci(method="wilson")
        np.testing.assert_allclose(bar, [[x, interval.low], [x, interval.high]], atol=1e-9)
    assert [patch.get_height() for patch in lower.patches] == count.tolist()
    centres = [patch.get_x() + patch.get_width() / 2 for patch in lower.patches]
    np.testing.assert_allclose(centres, predicted)
    error = np.average(np.abs(predicted - observed), weights=count)
    brier = brier_score_loss(LABELS, SCORES)
    assert upper.get_title() == f"acl: ECE {error:.3f}, Brier {brier:.3f}"


def test_learning_curves_are_the_histories():
    def history(first):
        return [
            {"epoch": e, "train": {"loss": first / e, "auc": 0.5 + e / 10},
             "valid": {"loss": first + e, "auc": 0.9 - e / 10}}
            for e in (1, 2, 3)
        ]  # fmt: skip

    figure = learning_figure("axial", [history(0.6), history(0.3)])
    assert figure.get_suptitle() == "axial"
    wanted = {
        "loss": [[0.6, 0.3, 0.2], [1.6, 2.6, 3.6], [0.3, 0.15, 0.1], [1.3, 2.3, 3.3]],
        "AUC": [[0.6, 0.7, 0.8], [0.8, 0.7, 0.6]] * 2,
    }
    assert [axes.get_ylabel() for axes in figure.axes] == list(wanted)
    for axes, curves in zip(figure.axes, wanted.values(), strict=True):
        for line, curve in zip(axes.lines, curves, strict=True):
            np.testing.assert_allclose(line.get_xydata(), np.transpose([[1, 2, 3], curve]))
        assert [line.get_linestyle() for line in axes.lines] == ["--", "-"] * 2
        assert [line.get_color() for line in axes.lines] == ["C0", "C0", "C1", "C1"]
    named = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert named == ["training", "valid"]


def test_an_overlay_is_warm_for_and_cold_against_at_their_cells():
    volume = np.full((2, 256, 256), 90, np.uint8)
    maps = np.zeros((2, 7, 7), np.float32)
    maps[1, 1, 2], maps[1, 5, 3] = 1, -1
    picture = overlay(volume, maps, "alexnet")
    assert (picture[0] == 90).all()
    # AlexNet's cell i lies at 31 + 32 i px; at its middle a quarter of the grey is left.
    cold, warm = heat_colours()[[0, -1]].astype(float)
    for (row, column), colour in (((63, 95), warm), ((191, 127), cold)):
        np.testing.assert_allclose(picture[1, row, column], 0.25 * 90 + 0.75 * colour, atol=1)
    far = np.ones((256, 256), bool)
    far[31:96, 63:128] = far[159:224, 95:160] = False  # up to the neighbours' middles
    assert (picture[1][far] == 90).all()
    half = overlay(volume, maps, "alexnet", scale=2.0)
    assert np.abs(half[1].astype(int) - 90).max() < np.abs(picture[1].astype(int) - 90).max()


def test_a_contact_sheet_shows_the_slices_that_add_most():
    sums = [0.5, -9.0, 3.0, 1.0, -0.25, 4.0, 2.0]
    maps = np.zeros((7, 7, 7), np.float32)
    maps[:, 3, 3] = sums
    volume = np.arange(7, dtype=np.uint8)[:, None, None].repeat(64, 1).repeat(64, 2) * 10
    one = PlaneMaps(plane=PLANES[0], joined=(PLANES[0],), volume=volume, maps=maps,
                    backbone="alexnet", logit=1.5, others=0.0, bias=0.25, probability=0.8,
                    networks=["one"])  # fmt: skip
    figure = contact_sheet({PLANES[0]: one}, "title")
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in shown] == [
        "axial 6 of 7: +4.00", "axial 3 of 7: +3.00", "axial 7 of 7: +2.00",
        "axial 4 of 7: +1.00", "axial 1 of 7: +0.50",
    ]  # fmt: skip
    for axes, s in zip(shown, (5, 2, 6, 3, 0), strict=True):  # far from the cell, grey as it was
        assert axes.images[0].get_array()[0, 0].tolist() == [10 * s] * 3
    (words,) = shown[0].texts
    assert words.get_text() == ("axial: logit +1.50 = these +10.50, other slices -9.25, bias +0.25")
