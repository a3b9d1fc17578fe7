"""Show where in an exam the networks saw a finding: a page for the browser, a picture, a film.

    python explain.py data/phantom --exam 207 --task acl --out report
    python explain.py ~/scans/knee7.zip --task acl --out report         # DICOM
    python explain.py --pointing-game data/phantom                   # does it point at the lesion?

Writes OUT/<exam>-<task>.html (one file, opens without a server or a network), .png (the slices that
count most) and .gif (all slices). The maps are exact: summed over all slices, plus the bias, they
are the logit (engine.class_activation_maps). Research use only, not a medical device.

The pointing game (Zhang et al., IJCV 2018) counts how often the strongest point of the heat map, of
all slices of the exam, lies in a lesion, or within 15 mm of its extent in 3-D. It needs to know
where the lesions are, so it is for the phantom.
"""

import argparse
import base64
import html
import io
import json
import time
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

import engine
from checkpoint import load_task, saved_tasks, write_text
from common.errors import InputError, RunError
from common.exams import open_exams, refuse_unfit
from dataloader import PLANES, feed, read_labels, read_volume, volume_path
from figures import CELL_FIRST, CELL_STEP, OPACITY, heat_colours, overlay
from metrics import wilson_interval

NOTICE = "Research use only, not a medical device."
SYNTHETIC_ONLY = "SYNTHETIC TRAINING ONLY."  # begins each headline of such networks
JPEG_QUALITY, LARGEST_SIDE = 92, 512  # of the slices in the page, px
SHEET_SLICES = 5  # of each plane in the contact sheet
FRAME_SIDE, FRAME_SECONDS = 256, 0.25  # of the film
TOLERANCE = 15.0  # mm from the lesion's extent: less than half a cell of the map (19 mm) more
LIMB_SIGNAL = 0.1  # of the brightest tissue; the phantom's fat has 0.2, its air 0.05


class Seen(NamedTuple):
    """What the networks made of one plane of one exam."""

    volume: np.ndarray  # uint8 (s, H, W)
    maps: np.ndarray  # float32 (s, h, w), mean over the plane's networks, in units of the logit
    logit: float  # mean over the networks
    bias: float  # mean over the networks
    logits: list  # of each network
    probability: float  # mean over the networks

    @property
    def parts(self):
        """What each slice adds to the logit: float64 (s,)."""
        return self.maps.sum(axis=(1, 2), dtype=np.float64)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "exams",
        nargs="*",
        type=Path,
        metavar="EXAM",
        help="one exam's .npy files, a folder or zip of DICOM or NIfTI, or a data folder",
    )
    parser.add_argument(
        "--exam", help="which one, where EXAM holds several: 207, valid/0207, a DICOM exam's folder"
    )
    parser.add_argument("--task", help="the finding to explain; all tasks in the pointing game")
    parser.add_argument(
        "--plane", choices=PLANES, help="of a single .npy file whose path does not tell it"
    )
    parser.add_argument(
        "--models-dir", type=Path, default=Path("models"), help="where train.py wrote"
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="folder to write to")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files of the same name in --out"
    )
    parser.add_argument(
        "--partial",
        action="store_true",
        help="a verdict of the other planes, too, where a plane was scanned and cannot be used",
    )
    parser.add_argument(
        "--allow-synthetic",
        action="store_true",
        help="let networks that have seen synthetic exams only look at others, under a banner",
    )
    parser.add_argument(
        "--pointing-game",
        type=Path,
        metavar="DATA",
        help="print how often the maps point at the lesion in the validation exams of DATA, a "
        "phantom with its lesions.json",
    )
    machine = parser.add_argument_group("machine")
    engine.add_machine_arguments(machine)
    args = parser.parse_args()
    if args.pointing_game is None and not (args.exams and args.task):
        parser.error("give EXAM and --task, or --pointing-game DATA")
    if args.pointing_game is not None and args.exams:
        parser.error("give EXAM or --pointing-game, not both")
    return args


# --- look -----------------------------------------------------------------------------------------


def see(networks, volume, device, precision):
    """Probability and maps of one plane: Seen.

    Args:
        networks: list of (MRNet, intensity).
        volume: uint8 array (s, H, W).
    """
    maps, logits = [], []
    stored = torch.from_numpy(volume).to(device)
    for model, intensity in networks:
        with engine.autocast(device, precision):
            found = engine.class_activation_maps(model, feed(stored, intensity))
        maps.append(found[0])
        logits.append(found[1])
    return Seen(
        volume=volume,
        maps=np.mean(maps, axis=0),
        logit=float(np.mean(logits)),
        logits=logits,
        bias=float(np.mean([model.classifier.bias.item() for model, _ in networks])),
        probability=float(engine.sigmoid(logits).mean()),
    )


def see_exam(models, exam, device, precision):
    """Each plane that has both a volume and a model, and what cannot be used.

    Returns:
        {plane: Seen}, {plane: why not}.
    """
    seen, unusable = {}, {p: why for p, why in exam.unusable.items() if p in models.networks}
    for plane in models.networks:
        if plane in exam.paths:
            try:
                volume = read_volume(exam.paths[plane])
            except InputError as error:
                unusable[plane] = str(error)
                continue
            seen[plane] = see(models.networks[plane], volume, device, precision)
    if not seen:
        have = ", ".join(models.networks) or "no plane"
        why = next(iter(unusable.values()), f"no volume of a plane with a {models.task} model")
        raise InputError(f"exam {exam.name}: {why} (models: {have})")
    return {plane: seen[plane] for plane in PLANES if plane in seen}, unusable


def verdict(models, seen):
    """Stacked probability, threshold and verdict, or None without a stack."""
    if models.stack is None:
        return None
    said = engine.verdict(models.stack, {plane: one.logits for plane, one in seen.items()})
    return dict(zip(("probability", "threshold", "verdict"), said, strict=True))


def pick_exam(exams, wanted, source):
    """The (source, name) that the user asks for, without leading zeros if he likes."""
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
    if wanted in (source, "/".join(key)):  # of DICOM, the folder alone tells it
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


def page_of(exam, models, seen, judged, unusable):
    """The HTML page as text. Everything that varies is JSON, and is put in as text by the page."""
    planes = [
        {
            "plane": plane,
            "probability": one.probability,
            "logit": one.logit,
            "bias": one.bias,
            "networks": len(models.networks[plane]),
            "height": one.volume.shape[1],
            "width": one.volume.shape[2],
            "cells": one.maps.shape[1:],
            "scale": float(np.abs(one.maps).max()) or 1.0,
            "maps": base64.b64encode(one.maps.astype("<f4").tobytes()).decode(),
            "parts": one.parts.tolist(),
            "slices": [jpeg(image) for image in one.volume],
        }
        for plane, one in seen.items()
    ]
    content = {
        "exam": exam.name,
        "task": models.task,
        "input": exam.input,
        "source": exam.source,
        "judged": judged,
        "unusable": unusable,
        "synthetic": models.is_synthetic,
        "learnt_from": [engine.name_dataset(dataset) for dataset in models.datasets or [None]],
        "thresholds": (models.stack or {}).get("thresholds", ""),
        "missing": [plane for plane in PLANES if plane not in seen],
        "planes": planes,
        "cell": [CELL_STEP, CELL_FIRST],
        "opacity": OPACITY,
        "colours": heat_colours().ravel().tolist(),
        "made": f"{datetime.now():%Y-%m-%d %H:%M}, commit {engine.git_sha()}",
    }
    # "<" would let a name end the script element that the JSON stands in.
    data = json.dumps(content).replace("<", "\\u003c")
    title = html.escape(f"{models.task}, exam {exam.name}")
    return PAGE.replace("{{title}}", title).replace("{{notice}}", NOTICE).replace("{{data}}", data)


PAGE = (Path(__file__).parent / "explain.html").read_text(encoding="utf-8")


# --- picture and film -----------------------------------------------------------------------------


def headline(exam, models, seen, judged):
    """One line with the probabilities."""
    warning = f"{SYNTHETIC_ONLY} " if models.is_synthetic else ""
    said = ", ".join(f"{plane} {one.probability:.2f}" for plane, one in seen.items())
    if judged:
        said += ", stack {probability:.2f}, threshold {threshold:.2f}: {verdict}".format(**judged)
    return f"{warning}{models.task}, exam {exam.name}: {said}"


def contact_sheet(seen, title):
    """The slices that add most to the logit, a row for each plane: matplotlib Figure."""
    figure = Figure(figsize=(12, 0.9 + 2.55 * len(seen)), layout="constrained", facecolor="#111417")
    figure.suptitle(title, color="w", fontsize=11, parse_math=False)
    figure.supxlabel(f"{NOTICE} Numbers: what the slice adds to the logit.", color="w", fontsize=9)
    rows = figure.subplots(len(seen), SHEET_SLICES, squeeze=False)
    colours = ListedColormap(heat_colours() / 255)
    for row, (plane, one) in zip(rows, seen.items(), strict=True):
        pictures = overlay(one.volume, one.maps)
        best = np.argsort(-one.parts, kind="stable")[:SHEET_SLICES]
        for axes in row:
            axes.set_axis_off()
        for axes, s in zip(row, best, strict=False):
            axes.imshow(pictures[s])
            text = f"{plane} {s + 1} of {len(pictures)}: {one.parts[s]:+.2f}"
            axes.set_title(text, color="w", fontsize=9)
        scale = float(np.abs(one.maps).max()) or 1.0
        bar = figure.colorbar(ScalarMappable(Normalize(-scale, scale), colours), ax=row, pad=0.01)
        bar.set_label("logit per cell", color="w", fontsize=8)
        bar.ax.tick_params(colors="w", labelsize=7)
    return figure


def film(seen, title):
    """All planes side by side, from the first slice to the last: list of PIL images."""
    pictures = {plane: overlay(one.volume, one.maps) for plane, one in seen.items()}
    count = max(len(frames) for frames in pictures.values())
    head, foot = 18, 46
    frames = []
    for i in range(count):
        size = (FRAME_SIDE * len(seen), head + FRAME_SIDE + foot)
        frame = Image.new("RGB", size, "#111417")
        draw = ImageDraw.Draw(frame)
        for column, (plane, slices) in enumerate(pictures.items()):
            # Shorter planes run slower, so that all end together.
            s = round(i * (len(slices) - 1) / max(count - 1, 1))
            image = Image.fromarray(slices[s])
            image.thumbnail((FRAME_SIDE, FRAME_SIDE))
            frame.paste(image, (FRAME_SIDE * column, head))
            text = f"{plane} {s + 1} of {len(slices)}: {seen[plane].parts[s]:+.2f}"
            draw.text((FRAME_SIDE * column + 6, 3), text, "white")
        bar = Image.fromarray(heat_colours()[None]).resize((160, 8))  # (1, 256, 3)
        frame.paste(bar, (60, head + FRAME_SIDE + 8))
        draw.text((6, head + FRAME_SIDE + 5), "against", "white")
        draw.text((226, head + FRAME_SIDE + 5), "for", "white")
        draw.text((6, head + FRAME_SIDE + 18), f"{title}\n{NOTICE}", "white", spacing=2)
        frames.append(frame)
    return frames


def check_place(paths, exam, overwrite):
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


def explain(args, device, precision):
    """Write the three files for one exam."""
    models = load_task(args.models_dir, args.task, device)
    with open_exams(args.exams, args.plane) as exams:
        refuse_unfit(models, exams.datasets, args.allow_synthetic)
        exam = exams.load(pick_exam(exams, args.exam, args.exams[0]))
        began = time.perf_counter()
        seen, unusable = see_exam(models, exam, device, precision)
    path = args.out / f"{exam.name}-{models.task}"
    page, sheet, gif = (path.with_name(path.name + end) for end in (".html", ".png", ".gif"))
    check_place((page, sheet, gif), exam, args.overwrite)
    judged = verdict(models, seen) if args.partial or not unusable else None
    title = headline(exam, models, seen, judged)
    print(title)
    for dataset in models.datasets or [None]:
        print(f"learnt from {engine.name_dataset(dataset)}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{args.out}: {error.strerror}; give another folder as --out") from None
    write_text(page, page_of(exam, models, seen, judged, unusable))
    slices = sum(len(one.volume) for one in seen.values())
    seconds = time.perf_counter() - began
    print(f"page   {page}  {page.stat().st_size / 1e6:.2f} MB, {slices} slices, {seconds:.1f} s")
    contact_sheet(seen, title).savefig(sheet, dpi=100)
    print(f"sheet  {sheet}")
    first, *others = film(seen, title)
    first.save(gif, save_all=True, append_images=others, duration=1000 * FRAME_SECONDS, loop=0)
    print(f"film   {gif}\n{NOTICE}")
    if unusable:
        said = "; ".join(f"{plane}: {why}" for plane, why in unusable.items())
        done = "left out of the verdict" if judged else "so there is no verdict (--partial)"
        raise RunError(f"exam {exam.name}: {said}; {done}")


# --- pointing game --------------------------------------------------------------------------------


def read_lesions(data_dir):
    """lesions.json as data/phantom/prepare.py writes it: {exam id: entry}."""
    path = data_dir / "lesions.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: lesions are not known there ({type(error).__name__}); the pointing game is "
            f"for a phantom: python data/phantom/prepare.py --out {data_dir}"
        ) from None


def boxes_of(entry, task, plane):
    """Extents of an exam's lesions that make it positive, in mm: [(low (3,), high (3,)), ...]."""
    step = np.array(entry["planes"][plane]["step_mm"])
    return [
        (lesion["planes"][plane]["low"] * step, lesion["planes"][plane]["high"] * step)
        for lesion in entry["lesions"]
        if task in (lesion["task"], "abnormal")
    ]


def near(points, boxes):
    """Whether points (..., 3) in mm lie within TOLERANCE of a box: bool (...)."""
    return np.any(
        [
            np.linalg.norm(np.maximum(0, np.maximum(low - points, points - high)), axis=-1)
            <= TOLERANCE
            for low, high in boxes
        ],
        axis=0,
    )


def strongest_voxel(maps):
    """Where the heat map is strongest: slice, row and column in voxels, float (3,)."""
    s, i, j = np.unravel_index(np.argmax(maps), maps.shape)
    return np.array([s, CELL_STEP * i + CELL_FIRST, CELL_STEP * j + CELL_FIRST], float)


def chance_of(volume, step, boxes, every=4):
    """Share of the limb's voxels (each `every`-th row and column) that would count as a hit."""
    grey = torch.from_numpy(volume[:, None].astype(np.float32))
    grey = F.avg_pool2d(grey, 2 * every, every)[:, 0].numpy()  # (s, 1, H, W) -> (s, h, w)
    inside = np.argwhere(grey > LIMB_SIGNAL * np.quantile(volume, 0.995))  # (n, 3)
    voxels = inside * (1, every, every) + (0, every - 0.5, every - 0.5)
    return float(near(voxels * step, boxes).mean())


def play(models, plane, data_dir, lesions, device, precision):
    """One row of the table: positives, and of each true positive (hit, chance, centre's hit)."""
    ids, labels = read_labels(data_dir, models.task, "valid")
    positives = [exam_id for exam_id, label in zip(ids, labels, strict=True) if label]
    found = []
    for exam_id in engine.progress(positives, f"{models.task}, {plane}"):
        path = volume_path(data_dir, "valid", plane, exam_id)
        one = see(models.networks[plane], read_volume(path), device, precision)
        judged = verdict(models, {plane: one})
        if (judged["verdict"] == "negative") if judged else one.probability < 0.5:
            continue
        try:
            step = np.array(lesions[exam_id]["planes"][plane]["step_mm"])
            boxes = boxes_of(lesions[exam_id], models.task, plane)
        except (KeyError, TypeError):
            boxes = []
        if not boxes:
            raise InputError(
                f"{data_dir}/lesions.json: no {models.task} lesion of exam {exam_id}; make the "
                "phantom again"
            )
        centre = (np.array(one.volume.shape) - 1) / 2
        hits = (bool(near(voxel * step, boxes)) for voxel in (strongest_voxel(one.maps), centre))
        found.append((*hits, chance_of(one.volume, step, boxes)))
    return len(positives), found


def pointing_game(args, device, precision):
    """Print the table: per task and plane, how often the map points at a lesion."""
    lesions = read_lesions(args.pointing_game)
    names = [args.task] if args.task else saved_tasks(args.models_dir)
    head = ("positive", "found", "hits", "pointing [95 %]", "chance", "centre")
    print(f"{'task':<10}{'plane':<10}{{:>9}}{{:>7}}{{:>6}}{{:>21}}{{:>8}}{{:>8}}".format(*head))
    for name in names:
        models = load_task(args.models_dir, name, device)
        for plane in models.networks:
            count, found = play(models, plane, args.pointing_game, lesions, device, precision)
            line = f"{name:<10}{plane:<10}{count:9d}{len(found):7d}"
            if found:
                hits, centre, chance = np.array(found, float).T
                rate = "{:.3f} [{:.2f}, {:.2f}]".format(*wilson_interval(hits.sum(), len(hits)))
                line += f"{int(hits.sum()):6d}{rate:>21}{chance.mean():8.3f}{centre.mean():8.3f}"
            print(line, flush=True)
    print(
        f"\nhit: the strongest voxel of the exam's map is within {TOLERANCE:g} mm of a lesion's "
        "extent, in 3-D; over the\nvalidation exams that the plane finds. chance: share of the "
        "limb's voxels that would hit. centre: hits of\nalways pointing at the middle of the volume"
    )


def main():
    args = parse_arguments()
    device = engine.pick_device(args.device)
    precision = engine.pick_precision(args.precision, device)
    if args.pointing_game is None:
        explain(args, device, precision)
    else:
        pointing_game(args, device, precision)


if __name__ == "__main__":
    engine.run(main)
