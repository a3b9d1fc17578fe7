"""Pictures that training and stacking share; they return figures or arrays, write nothing.

A root file of its own: train.py and train_logistic_regression.py draw the same ROC curves.
"""

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve
from torchvision.utils import make_grid

from dataloader import MEAN, STD
from metrics import roc_auc

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


def roc_figure(labels, scores):
    """ROC curves of several models on the same exams.

    Args:
        labels: (n,) 0 or 1.
        scores: {name: (n,) scores}.
    """
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, values in scores.items():
        false_positive, true_positive, _ = roc_curve(labels, values)
        axes.plot(false_positive, true_positive, label=f"{name}: AUC {roc_auc(labels, values):.3f}")
    axes.plot([0, 1], [0, 1], color="0.7", linestyle=":", label="chance")
    axes.set(
        xlabel="1 - specificity",
        ylabel="sensitivity",
        aspect="equal",
        title=f"{len(labels)} exams, {int(np.sum(labels))} positive",
    )
    axes.legend(loc="lower right", fontsize="small")
    return figure
