"""Pictures that training and stacking share; they return figures or arrays, write nothing.

A root file of its own: train.py and train_logistic_regression.py draw the same ROC curves.
"""

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve
from torchvision.utils import make_grid

from dataloader import MEAN, STD
from metrics import auc_interval, brier, calibration_curve, expected_calibration_error, roc_band

matplotlib.use("Agg")


def exam_picture(volume, intensity, columns=6):
    """All slices of one exam as the network is fed it, as one grey picture.

    Args:
        volume: float32 (s, 1, H, W), standardised or raw.

    Returns:
        float32 (3, rows, columns), 0 to 1, for TensorBoard.
    """
    grey = volume if intensity == "raw" else volume * STD + MEAN
    return make_grid((grey / 255).clamp(0, 1), nrow=columns, padding=2, pad_value=0.5)


def roc_figure(labels, scores, band=None):
    """ROC curves of several models on the same exams.

    Args:
        labels: (n,) 0 or 1.
        scores: {name: (n,) scores}.
        band: name of the model whose pointwise 95 % band is drawn.
    """
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, values in scores.items():
        auc, low, high = auc_interval(labels, values)
        false_positive, true_positive, _ = roc_curve(labels, values)
        said = f"{name}: AUC {auc:.3f} [{low:.3f}, {high:.3f}]"
        (line,) = axes.plot(false_positive, true_positive, label=said)
        if name == band:
            area = roc_band(labels, values)
            axes.fill_between(area.fpr, area.low, area.high, color=line.get_color(), alpha=0.15)
    axes.plot([0, 1], [0, 1], color="0.7", linestyle=":", label="chance")
    axes.set(
        xlabel="1 - specificity",
        ylabel="sensitivity",
        aspect="equal",
        title=f"{len(labels)} exams, {int(np.sum(labels))} positive",
    )
    axes.legend(loc="lower right", fontsize="small")
    return figure


def reliability_figure(labels, probabilities, task):
    """Reliability diagram: predicted probability against the share of positives, and the counts.

    Args:
        labels: (n,) 0 or 1.
        probabilities: (n,) 0 to 1.
    """
    bins = calibration_curve(labels, probabilities)
    figure = Figure(figsize=(5, 5.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    upper.plot([0, 1], [0, 1], color="0.7", linestyle=":")
    spread = np.abs([bins.observed - bins.low, bins.high - bins.observed])
    upper.errorbar(bins.predicted, bins.observed, spread, fmt="o-", capsize=3)
    said = f"ECE {expected_calibration_error(labels, probabilities):.3f}"
    said += f", Brier {brier(labels, probabilities):.3f}"
    upper.set(ylabel="share of positives", ylim=(-0.03, 1.03), title=f"{task}: {said}")
    lower.bar(bins.predicted, bins.count, width=0.04)
    lower.set(xlabel="predicted probability", ylabel="exams", xlim=(-0.03, 1.03))
    return figure
