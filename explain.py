"""Show the class activation maps of an exam: a page for the browser, a sheet, an animation.

    python explain.py data/phantom --exam 207 --task acl --out report
    python explain.py ~/scans/knee7.zip --task acl --out report         # DICOM

Writes OUT/<exam>-<task>.html (one file, opens without a server or a network), .png (the slices that
count most) and .gif (all slices). The maps are exact: summed over all slices, plus the bias, they
are the logit (MRNet.heat_maps). Research use only, not a medical device.
"""

import base64
import html
import io
import json
import math
import time
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from common import cli
from common.devices import pick_device, pick_precision
from common.engine import sigmoid
from common.errors import InputError, RunError
from common.exams import open_exams, read_planes, refuse_unfit
from common.figures import OPACITY, heat_colours, overlay
from common.files import write_text
from common.stacking import decide, load_task
from dataloader import PLANES
from model import BACKBONES, regrid

NOTICE = "Research use only, not a medical device."
SYNTHETIC_ONLY = "SYNTHETIC TRAINING ONLY."  # begins each headline of such networks
JPEG_QUALITY, LARGEST_SIDE = 92, 512  # of the slices in the page, px
SHEET_SLICES = 5  # of each plane in the contact sheet
FRAME_SIDE, FRAME_SECONDS = 256, 0.25  # of the animation


class PlaneMaps(NamedTuple):
    """Where some networks' answer for one plane of one exam comes from.

    The networks' mean logit is the sum of `maps`, `others` and `bias`.
    """

    volume: np.ndarray  # uint8 (s, H, W)
    maps: np.ndarray  # float32 (s, h, w), mean over the networks, in units of the logit
    backbone: str  # whose cells they have
    logit: float  # mean over the networks
    others: float  # what other planes add to it, in networks that join several
    bias: float  # mean over the networks
    probability: float  # mean over the networks
    networks: list  # of each "alexnet, maximum over slices"
    is_joint: bool  # the networks join several planes

    @property
    def slice_sums(self):
        """What each slice adds to the logit: float64 (s,)."""
        return self.maps.sum(axis=(1, 2), dtype=np.float64)


def parse_arguments():
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "exams",
        nargs="+",
        type=Path,
        metavar="EXAM",
        help="one exam's .npy files, a folder or zip of DICOM or NIfTI, or a data folder",
    )
    parser.add_argument(
        "--exam", help="which one, where EXAM holds several: 207, valid/0207, a DICOM exam's folder"
    )
    parser.add_argument("--task", required=True, help="the finding to explain")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder to write to")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files of the same name in --out"
    )
    cli.add_exam_arguments(parser)
    machine = parser.add_argument_group("machine")
    cli.add_machine_arguments(machine)
    return parser.parse_args()


# --- maps -----------------------------------------------------------------------------------------


def explain_networks(networks, volumes, device, precision):
    """Probability and maps of networks that take the same planes.

    Args:
        networks: list of stacking.Network.
        volumes: {plane: uint8 array (s, H, W)}.

    Returns:
        {plane: PlaneMaps}, and the logits, [float, one for each network].
    """
    found = [network.heat_maps(volumes, device, precision) for network in networks]
    logits = [logit for _, logit in found]
    backbones = [network.model.backbone for network in networks]
    finest = min(backbones, key=lambda name: BACKBONES[name].cell_step)
    bias = float(np.mean([network.bias for network in networks]))
    explained = {}
    for plane in found[0][0]:
        shape = max((maps[plane].shape for maps, _ in found), key=math.prod)
        pairs = zip(found, backbones, strict=True)
        maps = [regrid(maps[plane], name, finest, shape) for (maps, _), name in pairs]
        mean = np.mean(maps, axis=0)
        explained[plane] = PlaneMaps(
            volume=volumes[plane],
            maps=mean,
            backbone=finest,
            logit=float(np.mean(logits)),
            others=float(np.mean(logits)) - bias - float(mean.sum(dtype=np.float64)),
            bias=bias,
            probability=float(sigmoid(logits).mean()),
            networks=[describe_network(network) for network in networks],
            is_joint=len(networks[0].planes) > 1,
        )
    return explained, logits


def describe_network(network):
    """What a map comes from, in a few words."""
    pooling = {"max": "maximum", "mean": "mean", "attention": "attention"}[network.model.pooling]
    return f"{network.model.backbone}, {pooling} over slices"


def explain_planes(models, volumes, device, precision):
    """What each group of a task's networks that take the same planes says.

    Args:
        models: stacking.TaskModels.
        volumes: {plane: uint8 array (s, H, W)}.

    Returns:
        {title: PlaneMaps}, such as "axial", or "axial of axial+sagittal" for networks that join
        planes; and {column: [float, one for each network]}.
    """
    explained, logits = {}, {}
    for planes, columns in models.by_planes.items():
        columns = {name: ones for name, ones in columns.items() if ones[0].takes(volumes)}
        if not columns:
            continue
        networks = [network for ones in columns.values() for network in ones]
        found, values = explain_networks(networks, volumes, device, precision)
        for column, ones in columns.items():
            logits[column], values = values[: len(ones)], values[len(ones) :]
        of = "" if len(planes) == 1 else f" of {'+'.join(planes)}"
        explained |= {f"{plane}{of}": one for plane, one in found.items()}
    return explained, logits


def pick_exam(exams, wanted, source):
    """The (source, name) of the exam `wanted`, which may lack leading zeros.

    Raises:
        InputError: none, or several.
    """
    if wanted is None and len(exams) == 1:
        return next(iter(exams))
    found = [key for key in exams if wanted is not None and is_called(key, wanted)]
    if len(found) == 1:
        return found[0]
    names = ["/".join(key).lstrip("/") for key in islice(found or exams, 5)]
    raise InputError(
        f"{source}: {len(found) or len(exams)} exams{f' called {wanted}' if found else ''}; give "
        f"--exam with one of {', '.join(names)} ..."
    )


def is_called(key, wanted):
    source, name = key
    if wanted in (source, "/".join(key)):  # for DICOM, the folder is enough
        return True
    folder, _, wanted = wanted.rpartition("/")
    return folder in ("", source) and (wanted.lstrip("0") or "0") == (name.lstrip("0") or "0")


# --- page -----------------------------------------------------------------------------------------


def jpeg(grey):
    """A slice uint8 (H, W) as a data URI, at most LARGEST_SIDE px."""
    image, data = Image.fromarray(grey), io.BytesIO()
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    image.save(data, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def make_page(exam, models, explained, decision, unusable):
    """The HTML page as text. Everything that varies is JSON, and is put in as text by the page."""
    planes = [
        {
            "plane": title,
            "probability": one.probability,
            "logit": one.logit,
            "others": one.others if one.is_joint else None,
            "bias": one.bias,
            "of": "; ".join(dict.fromkeys(one.networks)),
            "networks": len(one.networks),
            "cell": BACKBONES[one.backbone][2:4],
            "height": one.volume.shape[1],
            "width": one.volume.shape[2],
            "cells": one.maps.shape[1:],
            "scale": float(np.abs(one.maps).max()) or 1.0,
            "maps": base64.b64encode(one.maps.astype("<f4").tobytes()).decode(),
            "sums": one.slice_sums.tolist(),
            "slices": [jpeg(image) for image in one.volume],
        }
        for title, one in explained.items()
    ]
    content = {
        "exam": exam.name,
        "task": models.task,
        "input": exam.input,
        "source": exam.source,
        "decision": decision._asdict() if decision else None,
        "unusable": unusable,
        "synthetic": models.is_synthetic,
        "trained_on": [cli.describe_dataset(dataset) for dataset in models.datasets or [None]],
        "thresholds": (models.stack or {}).get("thresholds", ""),
        "missing": [p for p in PLANES if all(t.split()[0] != p for t in explained)],
        "planes": planes,
        "opacity": OPACITY,
        "colours": heat_colours().ravel().tolist(),
        "made": f"{datetime.now():%Y-%m-%d %H:%M}, commit {cli.git_sha()}",
    }
    # "<" would let a name end the script element that the JSON stands in.
    data = json.dumps(content).replace("<", "\\u003c")
    title = html.escape(f"{models.task}, exam {exam.name}")
    return PAGE.replace("{{title}}", title).replace("{{notice}}", NOTICE).replace("{{data}}", data)


PAGE = (Path(__file__).parent / "common" / "explain.html").read_text(encoding="utf-8")


# --- sheet and animation --------------------------------------------------------------------------


def headline(exam, models, explained, decision):
    """One line with the probabilities."""
    warning = f"{SYNTHETIC_ONLY} " if models.is_synthetic else ""
    probabilities = {title.split(" of ")[-1]: one.probability for title, one in explained.items()}
    results = ", ".join(f"{name} {value:.2f}" for name, value in probabilities.items())
    if decision:
        results += ", stack {:.2f}, threshold {:.2f}: {}".format(*decision)
    return f"{warning}{models.task}, exam {exam.name}: {results}"


def contact_sheet(explained, title):
    """The slices that add most to the logit, a row for each plane: matplotlib Figure."""
    figure = Figure(
        figsize=(12, 0.9 + 2.55 * len(explained)), layout="constrained", facecolor="#111417"
    )
    figure.suptitle(title, color="w", fontsize=11, parse_math=False)
    figure.supxlabel(f"{NOTICE} Numbers: what the slice adds to the logit.", color="w", fontsize=9)
    rows = figure.subplots(len(explained), SHEET_SLICES, squeeze=False)
    colours = ListedColormap(heat_colours() / 255)
    for row, (plane, one) in zip(rows, explained.items(), strict=True):
        pictures = overlay(one.volume, one.maps, one.backbone)
        best = np.argsort(-one.slice_sums, kind="stable")[:SHEET_SLICES]
        for axes in row:
            axes.set_axis_off()
        for axes, s in zip(row, best, strict=False):
            axes.imshow(pictures[s])
            text = f"{plane.split()[0]} {s + 1} of {len(pictures)}: {one.slice_sums[s]:+.2f}"
            axes.set_title(text, color="w", fontsize=9)
        shown = one.slice_sums[best].sum()
        others = one.slice_sums.sum() - shown
        text = f"{plane}: logit {one.logit:+.2f} = these {shown:+.2f}, other slices {others:+.2f}"
        text += f", other planes {one.others:+.2f}" if one.is_joint else ""
        text += f", bias {one.bias:+.2f}"
        row[0].text(0, -0.07, text, color="w", fontsize=8, transform=row[0].transAxes,
                    in_layout=False)  # fmt: skip
        scale = float(np.abs(one.maps).max()) or 1.0
        bar = figure.colorbar(ScalarMappable(Normalize(-scale, scale), colours), ax=row, pad=0.01)
        bar.set_label("logit per cell", color="w", fontsize=8)
        bar.ax.tick_params(colors="w", labelsize=7)
    return figure


def animation(explained, title):
    """All planes side by side, from the first slice to the last: list of PIL images."""
    pictures = {
        title: overlay(one.volume, one.maps, one.backbone) for title, one in explained.items()
    }
    count = max(len(frames) for frames in pictures.values())
    head, foot = 18, 46
    frames = []
    for i in range(count):
        size = (FRAME_SIDE * len(explained), head + FRAME_SIDE + foot)
        frame = Image.new("RGB", size, "#111417")
        draw = ImageDraw.Draw(frame)
        for column, (plane, slices) in enumerate(pictures.items()):
            # Shorter planes run slower, so that all end together.
            s = round(i * (len(slices) - 1) / max(count - 1, 1))
            image = Image.fromarray(slices[s])
            image.thumbnail((FRAME_SIDE, FRAME_SIDE))
            frame.paste(image, (FRAME_SIDE * column, head))
            joint = ", joint" if explained[plane].is_joint else ""
            text = f"{plane.split()[0]} {s + 1} of {len(slices)}{joint}: "
            text += f"{explained[plane].slice_sums[s]:+.2f}"
            draw.text((FRAME_SIDE * column + 6, 3), text, "white")
        bar = Image.fromarray(heat_colours()[None]).resize((160, 8))  # (1, 256, 3)
        frame.paste(bar, (60, head + FRAME_SIDE + 8))
        draw.text((6, head + FRAME_SIDE + 5), "against", "white")
        draw.text((226, head + FRAME_SIDE + 5), "for", "white")
        draw.text((6, head + FRAME_SIDE + 18), f"{title}\n{NOTICE}", "white", spacing=2)
        frames.append(frame)
    return frames


def check_overwrite(paths, exam, overwrite):
    """Refuse to replace the files of another exam.

    Raises:
        InputError: a file of this name is there and is not known to be of this very exam.
    """
    page = paths[0]
    try:
        own = f'"input": "{exam.input}"' in page.read_text(encoding="utf-8", errors="replace")
    except OSError:
        own = False
    for path in paths:
        if path.exists() and not own and not overwrite:
            raise InputError(
                f"{path}: exists and may be of another exam; give another folder as --out, or "
                "--overwrite"
            )


def run(args):
    """Explain one exam and write the three files."""
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    models = load_task(args.models_dir, args.task, device, args.recipes)
    with open_exams(args.exams, args.plane, datasets=models.datasets) as exams:
        refuse_unfit(models, exams.datasets, args.allow_synthetic)
        exam = exams.load(pick_exam(exams, args.exam, args.exams[0]))
        began = time.perf_counter()
        volumes, unusable = read_planes(exam, models)
        explained, logits = explain_planes(models, volumes, device, precision)
    if not explained:
        have = ", ".join(models.networks) or "no plane"
        why = next(iter(unusable.values()), f"no volume of a plane with a {models.task} model")
        raise InputError(f"exam {exam.name}: {why} (models: {have})")
    path = args.out / f"{exam.name}-{models.task}"
    page, sheet, gif = (path.with_name(path.name + end) for end in (".html", ".png", ".gif"))
    check_overwrite((page, sheet, gif), exam, args.overwrite)
    decision = None
    if models.stack and (args.partial or not unusable):
        decision = decide(models.stack, volumes, logits)
    title = headline(exam, models, explained, decision)
    print(title)
    for dataset in models.datasets or [None]:
        print(f"trained on {cli.describe_dataset(dataset)}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{args.out}: {error.strerror}; give another folder as --out") from None
    write_text(page, make_page(exam, models, explained, decision, unusable))
    slices = sum(len(one.volume) for one in explained.values())
    seconds = time.perf_counter() - began
    size = page.stat().st_size / 1e6
    print(f"page       {page}  {size:.2f} MB, {slices} slices, {seconds:.1f} s")
    contact_sheet(explained, title).savefig(sheet, dpi=100)
    print(f"sheet      {sheet}")
    first, *others = animation(explained, title)
    first.save(gif, save_all=True, append_images=others, duration=1000 * FRAME_SECONDS, loop=0)
    print(f"animation  {gif}\n{NOTICE}")
    if unusable:
        reasons = "; ".join(f"{plane}: {why}" for plane, why in unusable.items())
        done = "left out of the decision" if decision else "so there is no decision (--partial)"
        raise RunError(f"exam {exam.name}: {reasons}; {done}")


if __name__ == "__main__":
    cli.exit_with_status(lambda: run(parse_arguments()))
