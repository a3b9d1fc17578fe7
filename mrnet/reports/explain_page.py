"""One explained exam: a page for the browser, a sheet of slices, an animation."""

import base64
import html
import io
import os
import re
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from PIL import Image, ImageDraw

from mrnet.documents import as_json
from mrnet.errors import printable
from mrnet.evaluation.figures import OPACITY, heat_colours, overlay
from mrnet.inference.explanation import list_warnings
from mrnet.layout.description import describe_datasets
from mrnet.layout.planes import PLANES, in_order
from mrnet.networks.backbones import BACKBONES
from mrnet.runtime.provenance import made
from mrnet.stacking.stacking import DIGITS

NOTICE = "Research use only, not a medical device."
SYNTHETIC_ONLY = "SYNTHETIC TRAINING ONLY."  # begins each headline of such networks
JPEG_QUALITY, LARGEST_SIDE = 92, 512  # of the slices in the page, px
SHEET_SLICES = 5  # of each plane in the contact sheet
SHEET_WIDTH, SHEET_DPI = 12, 100  # inches
FRAME_SIDE, FRAME_SECONDS = 256, 0.25  # of the animation
# How a knee of each side is shown where networks see right knees as left ones; "" is not known.
MIRRORED = {
    "R": "This right knee is shown mirrored, as a left one: so the networks see it.",
    "L": "This left knee is shown as it is; right ones are mirrored for the networks.",
    "": "Right knees that are known as such are shown mirrored, as left ones: so the networks see "
    "them.",
}


# --- page -----------------------------------------------------------------------------------------


def jpeg(pixels, side=LARGEST_SIDE, quality=JPEG_QUALITY):
    """A slice uint8 (H, W) or (H, W, 3) as a data URI, at most `side` px."""
    image, data = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((side, side))
    image.save(data, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def slice_picture(one, at):
    """Slice `at` of a PlaneMaps with its map, on the plane's own scale: uint8 (H, W, 3)."""
    cut = slice(at, at + 1)
    (picture,) = overlay(one.volume[cut], one.maps[cut], one.backbone, scale=one.scale)
    return picture


def make_page(exam, findings):
    """The HTML page as text. Everything that varies is JSON, and is put in as text by the page.

    Args:
        exam: exams.Exam.
        findings: list of explanation.Finding, each with planes; one tab each.
    """
    images = {}
    for finding in findings:
        for one in finding.planes.values():
            images.setdefault(one.plane, one.volume)
    content = {
        "exam": as_text(exam.name),
        "input": exam.input,
        "warnings": list_warnings(exam, findings),
        "images": {
            plane: {
                "height": volume.shape[1],
                "width": volume.shape[2],
                "slices": [jpeg(image) for image in volume],
            }
            for plane, volume in images.items()
        },
        "findings": [describe_finding(exam, finding) for finding in findings],
        "opacity": OPACITY,
        "colours": heat_colours().ravel().tolist(),
        "made": made(),
    }
    title = f"{', '.join(finding.task for finding in findings)}, exam {exam.name}"
    return fill(PAGE, title, content)


def mirroring(exam, models):
    """How the side of an exam's knee is shown: a sentence, "" where no knee is mirrored."""
    return MIRRORED[exam.side] if models.is_mirrored else ""


def describe_finding(exam, finding):
    """A Finding as the page has it: plain values, the maps in base64."""
    models, decision = finding.models, finding.decision
    if decision:
        digits = decimals(decision.probability, decision.threshold, 3)
        decision = decision._asdict() | {"digits": digits}
    return {
        "task": finding.task,
        "decision": decision,
        "decided_from": finding.decided_from,
        "stacked": models.stack is not None,
        "unusable": finding.unusable,
        "synthetic": models.is_synthetic,
        "mirrored": mirroring(exam, models),
        "trained_on": describe_datasets(models.datasets),
        "thresholds": (models.stack or {}).get("thresholds", ""),
        "missing": [
            plane
            for plane in in_order({*PLANES, *models.planes})
            if all(one.plane != plane for one in finding.planes.values())
        ],
        "planes": [
            {
                "plane": one.title,
                "image": one.plane,
                "column": one.column,
                "probability": one.probability,
                "logit": one.logit,
                "others": one.others if one.is_joint else None,
                "bias": one.bias,
                "of": "; ".join(dict.fromkeys(one.networks)),
                "networks": len(one.networks),
                "neighbours": one.neighbours,
                "cell": BACKBONES[one.backbone][2:4],
                "cells": one.maps.shape[1:],
                "scale": one.scale,
                "maps": base64.b64encode(one.maps.astype("<f4").tobytes()).decode(),
                "sums": one.slice_sums.tolist(),
            }
            for one in finding.planes.values()
        ],
    }


def as_text(name):
    """A file's name, whatever bytes it is made of, as text that can be shown."""
    return os.fsencode(name).decode("utf-8", "replace")


def fill(page, title, content):
    """A page with {{title}}, {{notice}} and {{data}}, which becomes `content` as JSON."""
    # "<" would let a name end the script element that the JSON stands in.
    data = as_json(content).replace("<", "\\u003c")
    values = {"title": html.escape(title), "notice": NOTICE, "data": data}
    # In one pass: an exam may be called {{data}}.
    return re.sub(r"\{\{(title|notice|data)\}\}", lambda match: values[match[1]], page)


PAGE = Path(__file__).with_name("templates").joinpath("explain.html").read_text(encoding="utf-8")


# --- sheet and animation --------------------------------------------------------------------------


def headline(exam, finding):
    """One line with the probabilities."""
    warning = f"{SYNTHETIC_ONLY} " if finding.models.is_synthetic else ""
    results = ", ".join(f"{name} {value:.2f}" for name, value in finding.probabilities.items())
    if finding.decision:
        probability, threshold, label = finding.decision[:3]
        digits = decimals(probability, threshold)
        results += f", stack {probability:.{digits}f}, threshold {threshold:.{digits}f}: {label}"
        results += f", decided from {finding.decided_from}" if finding.decided_from else ""
    return f"{warning}{finding.task}, exam {printable(exam.name)}: {results}"


def decimals(a, b, least=2):
    """How many decimals tell two probabilities apart, so that what is shown does not contradict the
    decision; `least` where none do."""
    told = (n for n in range(least, DIGITS + 1) if f"{a:.{n}f}" != f"{b:.{n}f}")
    return next(told, least)


def wrap(text, width, measure):
    """Text in lines that fit: list of str. A word that is too wide for a line is cut.

    Args:
        measure: width of a str, in the unit of `width`.
    """
    lines, line = [], ""
    for word in text.split():
        while measure(f"{line} {word}".strip()) > width:
            if line:
                lines.append(line)
                line = ""
            else:
                fits = next((n for n in range(len(word), 1, -1) if measure(word[:n]) <= width), 1)
                lines.append(word[:fits])
                word = word[fits:]
        line = f"{line} {word}".strip()
    return [*lines, line]


def contact_sheet(explained, title, remark=""):
    """The slices that add most to the logit, a row for each plane: matplotlib Figure.

    Args:
        remark: said at the foot, such as `mirroring`.
    """
    renderer = RendererAgg(1, 1, SHEET_DPI)

    def fit(text, size):
        def measure(line):
            return renderer.get_text_width_height_descent(line, FontProperties(size=size), False)[0]

        return wrap(text, (SHEET_WIDTH - 0.4) * SHEET_DPI, measure)

    head = fit(title, 11)
    foot = fit(f"{NOTICE} Numbers: what the slice adds to the logit. {remark}", 9)
    height = 0.9 + 2.55 * len(explained) + 0.2 * (len(head) + len(foot) - 2)
    figure = Figure(
        figsize=(SHEET_WIDTH, height), dpi=SHEET_DPI, layout="constrained", facecolor="#111417"
    )
    figure.suptitle("\n".join(head), color="w", fontsize=11, parse_math=False)
    figure.supxlabel("\n".join(foot), color="w", fontsize=9)
    rows = figure.subplots(len(explained), SHEET_SLICES, squeeze=False)
    colours = ListedColormap(heat_colours() / 255)
    for row, one in zip(rows, explained.values(), strict=True):
        best = np.argsort(-one.slice_sums, kind="stable")[:SHEET_SLICES]
        pictures = overlay(one.volume[best], one.maps[best], one.backbone, scale=one.scale)
        for axes in row:
            axes.set_axis_off()
        for axes, s, picture in zip(row, best, pictures, strict=False):
            axes.imshow(picture)
            text = f"{one.plane} {s + 1} of {len(one.volume)}: {one.slice_sums[s]:+.2f}"
            axes.set_title(text, color="w", fontsize=9)
        shown = one.slice_sums[best].sum()
        others = one.slice_sums.sum() - shown
        text = (
            f"{one.title}: logit {one.logit:+.2f} = these {shown:+.2f}, other slices {others:+.2f}"
        )
        text += f", other planes {one.others:+.2f}" if one.is_joint else ""
        text += f", bias {one.bias:+.2f}"
        row[0].text(0, -0.07, text, color="w", fontsize=8, transform=row[0].transAxes,
                    in_layout=False)  # fmt: skip
        colour = ScalarMappable(Normalize(-one.scale, one.scale), colours)
        bar = figure.colorbar(colour, ax=row, pad=0.01)
        bar.set_label("logit per cell", color="w", fontsize=8)
        bar.ax.tick_params(colors="w", labelsize=7)
    return figure


def animation(explained, title, remark=""):
    """All planes side by side, from the first slice to the last: list of PIL images.

    Args:
        remark: said at the foot, such as `mirroring`.
    """
    pictures = [overlay(one.volume, one.maps, one.backbone) for one in explained.values()]
    count = max(map(len, pictures))
    width = FRAME_SIDE * len(explained)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength
    words = [*wrap(title, width - 12, measure), *wrap(f"{NOTICE} {remark}", width - 12, measure)]
    head, foot = 18, 24 + 12 * len(words)
    size = (width, head + FRAME_SIDE + foot)
    frames = []
    for i in range(count):
        frame = Image.new("RGB", size, "#111417")
        draw = ImageDraw.Draw(frame)
        for column, (one, slices) in enumerate(zip(explained.values(), pictures, strict=True)):
            # Shorter planes run slower, so that all end together.
            s = round(i * (len(slices) - 1) / max(count - 1, 1))
            image = Image.fromarray(slices[s])
            image.thumbnail((FRAME_SIDE, FRAME_SIDE))
            frame.paste(image, (FRAME_SIDE * column, head))
            joint = ", joint" if one.is_joint else ""
            text = f"{one.plane} {s + 1} of {len(slices)}{joint}: {one.slice_sums[s]:+.2f}"
            draw.text((FRAME_SIDE * column + 6, 3), text, "white")
        bar = Image.fromarray(heat_colours()[None]).resize((160, 8))  # (1, 256, 3)
        frame.paste(bar, (60, head + FRAME_SIDE + 8))
        draw.text((6, head + FRAME_SIDE + 5), "against", "white")
        draw.text((226, head + FRAME_SIDE + 5), "for", "white")
        for k, line in enumerate(words):
            draw.text((6, head + FRAME_SIDE + 18 + 12 * k), line, "white")
        frames.append(frame)
    return frames
