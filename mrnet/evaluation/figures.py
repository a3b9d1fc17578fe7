"""Arrays in, figures out: ROC curves, reliability diagrams, heat maps. Nothing is written here."""

import io
import re

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from mrnet.evaluation.metrics import (
    answered,
    auc_interval,
    brier,
    calibration_curve,
    expected_calibration_error,
    roc_band,
)
from mrnet.networks.receptive_fields import upsample_maps

matplotlib.use("Agg")

OPACITY = 0.75  # of the strongest heat
TIMES = (0.1, 0.25, 0.5, 1, 2, 4)  # ticks


def roc_figure(labels, scores, band=None):
    """ROC curves of several models on the same exams.

    Args:
        labels: (n,) 0 or 1.
        scores: {name: (n,) scores}, NaN for exams that a model has no answer for.
        band: name of the model whose pointwise 95 % band is drawn.
    """
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, values in scores.items():
        known, values = answered(labels, values)
        auc, low, high = auc_interval(known, values)
        false_positive, true_positive, _ = roc_curve(known, values)
        text = f"{name}: AUC {auc:.3f} [{low:.3f}, {high:.3f}]"
        (line,) = axes.plot(false_positive, true_positive, label=text)
        if name == band:
            area = roc_band(known, values)
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
    errors = f"ECE {expected_calibration_error(labels, probabilities):.3f}"
    errors += f", Brier {brier(labels, probabilities):.3f}"
    upper.set(ylabel="share of positives", ylim=(-0.03, 1.03), title=f"{task}: {errors}")
    lower.bar(bins.predicted, bins.count, width=0.04)
    lower.set(xlabel="predicted probability", ylabel="exams", xlim=(-0.03, 1.03))
    return figure


def learning_figure(column, networks):
    """Loss and AUC of each epoch: training exams dashed, exams that select the epoch solid.

    Args:
        column: title.
        networks: of each network its history, a list of {"epoch", "train", and "valid" or "tune":
            {"loss", "auc"}}.
    """
    titles = {"train": "training", "tune": "tuning", "valid": "valid"}
    figure = Figure(figsize=(5, 2.6), layout="constrained")
    figure.suptitle(column, fontsize="medium")
    for axes, metric in zip(figure.subplots(1, 2), ("loss", "auc"), strict=True):
        for number, history in enumerate(networks):
            epochs = [one["epoch"] for one in history]
            for split, title in titles.items():
                if split in history[0]:
                    values = [one[split][metric] for one in history]
                    axes.plot(epochs, values, "--" if split == "train" else "-", marker=".",
                              color=f"C{number % 10}", label=None if number else title)  # fmt: skip
        axes.set(xlabel="epoch", ylabel=metric.upper() if metric == "auc" else metric)
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize="small")
    return figure


def as_svg(draw, name):
    """A figure as an SVG element for an HTML page, in the colours of its text; same bytes each
    time.

    Args:
        draw: function without arguments that makes the matplotlib Figure.
        name: unlike that of the page's other figures; keeps their inner references apart.
    """
    settings = {"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False}
    content = io.StringIO()
    with matplotlib.rc_context(settings):
        figure = draw()
        figure.patch.set_alpha(0)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
            if axes.get_legend():
                axes.get_legend().get_frame().set_alpha(0)
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    text = content.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r' id="[A-Za-z]+\d*_\d+"', "", text)  # groups; what is referred to has a hash
    return text.replace("#000000", "currentColor")


def cost_figure(points, against):
    """AUC of recipes against their training time, a panel for each column.

    Args:
        points: {(recipe, column): (time, relative; AUC; low and high end of its bar, or None)}.
        against: the recipe whose time is 1.
    """
    columns = list(dict.fromkeys(column for _, column in points))
    figure = Figure(figsize=(3.1 * len(columns), 3.6), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        found = {recipe: at for (recipe, one), at in points.items() if one == column}
        for recipe, (time, auc, ends) in found.items():
            if ends:
                axes.plot([time, time], ends, color="0.7", linewidth=1)
            axes.plot(time, auc, "o", color="C0" if ends else "C1")
            axes.annotate(
                recipe, (time, auc), xytext=(5, 4), textcoords="offset points", fontsize="x-small"
            )
        ticks = [tick for tick in TIMES if min(t for t, *_ in found.values()) / 1.3 < tick]
        axes.set(xscale="log", title=column, xlabel=f"training time, {against}: 1")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.margins(x=0.25)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("out-of-fold AUC")
    return figure


def heat_colours():
    """Colours of -1 to 1 in 256 steps, uint8 (256, 3): cyan against, black at 0, yellow for.

    Crameri's managua, turned round: perceptually uniform from the middle to either end, and told
    apart with any common colour vision deficiency (Crameri et al., Nature Communications 2020).
    """
    return (matplotlib.colormaps["managua_r"](np.linspace(0, 1, 256))[:, :3] * 255).astype(np.uint8)


def overlay(volume, maps, backbone, scale=None):
    """Slices with their heat maps on top, as strong as OPACITY where the map is strongest.

    Args:
        volume: uint8 array (s, H, W).
        maps: float32 array (s, h, w), as `MRNet.heat_maps` returns them.
        backbone: whose maps they are.
        scale: the map's value that gets the end of the colour scale; by default its largest.

    Returns:
        uint8 array (s, H, W, 3).
    """
    scale = scale or float(np.abs(maps).max()) or 1.0
    heat = np.clip(upsample_maps(maps, *volume.shape[1:], backbone) / scale, -1, 1)  # (s, H, W)
    colour = heat_colours()[np.rint((heat + 1) * 127.5).astype(np.uint8)]  # (s, H, W, 3)
    cover = (OPACITY * np.abs(heat))[..., None]
    grey = np.asarray(volume, np.float32)[..., None]
    return np.rint(grey + cover * (colour - grey)).astype(np.uint8)
