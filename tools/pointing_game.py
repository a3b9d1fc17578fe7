"""How often a heat map points at the lesion: the pointing game (Zhang et al., IJCV 2018).

    python -m tools.pointing_game data/phantom
    python -m tools.pointing_game data/phantom --models-dir models/reproduce --recipes phantom

Counts for how many exams the strongest voxel of the heat map, of all slices, lies in a lesion or
within 15 mm of its extent in 3-D. It needs the places of the lesions, so it is for the phantom.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it finds its own folder only

from mrnet.documents import parse_json
from mrnet.errors import InputError, one_line
from mrnet.evaluation.metrics import wilson_interval
from mrnet.files import read_text
from mrnet.inference.explanation import explain_planes
from mrnet.inference.task_models import load_task, saved_tasks
from mrnet.layout.arguments import add_recipes_argument
from mrnet.layout.labels import is_positive, read_labels
from mrnet.layout.volumes import read_volume, volume_path
from mrnet.networks.backbones import BACKBONES
from mrnet.runtime import cli
from mrnet.runtime.devices import pick_device, pick_precision
from mrnet.stacking.stacking import decide

TOLERANCE = 15.0  # mm from the lesion's extent: less than half a cell of the map (19 mm) more
LIMB_SIGNAL = 0.1  # of the brightest tissue; the phantom's fat has 0.2, its air 0.05


def parse_arguments():
    parser = cli.make_parser(__doc__)
    parser.add_argument("data", type=Path, help="a phantom's folder, with its lesions.json")
    parser.add_argument("--task", help="by default all tasks with saved models")
    parser.add_argument(
        "--models-dir", type=Path, default=Path("models"), help="where train.py wrote"
    )
    add_recipes_argument(parser)
    cli.add_machine_arguments(parser)
    return parser.parse_args()


def read_lesions(data_dir):
    """lesions.json as data/phantom/prepare.py writes it: {exam id: entry}."""
    path = data_dir / "lesions.json"
    try:
        return parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read ({one_line(error)}); give a phantom's folder, such as "
            "data/phantom, which `python data/phantom/prepare.py` makes"
        ) from None


def boxes_of(lesions, exam_id, task, plane):
    """Extents of an exam's lesions that make it positive, in mm.

    Returns:
        mm per slice, row and column (3,), and [(low (3,), high (3,)), ...], empty where
        lesions.json does not describe them.
    """
    try:
        step = np.array(lesions[exam_id]["planes"][plane]["step_mm"])
        return step, [
            (lesion["planes"][plane]["low"] * step, lesion["planes"][plane]["high"] * step)
            for lesion in lesions[exam_id]["lesions"]
            if task in (lesion["task"], "abnormal")
        ]
    except (KeyError, TypeError):
        return None, []


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


def strongest_voxel(maps, backbone):
    """Where the heat map is strongest: slice, row and column in voxels, float (3,)."""
    s, i, j = np.unravel_index(np.argmax(maps), maps.shape)
    step, first = BACKBONES[backbone].cell_step, BACKBONES[backbone].cell_first
    return np.array([s, step * i + first, step * j + first], float)


def chance_of(volume, step, boxes):
    """Share of the limb's voxels (each fourth row and column) that would count as a hit."""
    every = 4
    grey = torch.from_numpy(volume[:, None].astype(np.float32))
    grey = F.avg_pool2d(grey, 2 * every, every)[:, 0].numpy()  # (s, 1, H, W) -> (s, h, w)
    inside = np.argwhere(grey > LIMB_SIGNAL * np.quantile(volume, 0.995))  # (n, 3)
    voxels = inside * (1, every, every) + (0, every - 0.5, every - 0.5)
    return float(near(voxels * step, boxes).mean())


def play(models, plane, data_dir, lesions, device, precision):
    """Play the game for one task and plane.

    Returns:
        number of positive validation exams, and for each true positive (hit, hit of the volume's
        centre, chance).
    """
    ids, labels = read_labels(data_dir, models.task, "valid")
    positives = [exam_id for exam_id, label in zip(ids, labels, strict=True) if is_positive(label)]
    found = []
    for exam_id in cli.progress(positives, f"{models.task}, {plane}"):
        path = volume_path(data_dir, "valid", plane, exam_id)
        explained, logits = explain_planes(models, {plane: read_volume(path)}, device, precision)
        one = explained[plane]
        decision = decide(models.stack, [plane], logits) if models.stack else None
        if decision.label == "negative" if decision else one.probability < 0.5:
            continue
        step, boxes = boxes_of(lesions, exam_id, models.task, plane)
        if not boxes:
            raise InputError(
                f"{data_dir}/lesions.json: no {models.task} lesion of exam {exam_id}; make the "
                "phantom again"
            )
        centre = (np.array(one.volume.shape) - 1) / 2
        voxels = (strongest_voxel(one.maps, one.backbone), centre)
        hits = (bool(near(voxel * step, boxes)) for voxel in voxels)
        found.append((*hits, chance_of(one.volume, step, boxes)))
    return len(positives), found


def run(args):
    """Print the table: per task and plane, how often the map points at a lesion."""
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    lesions = read_lesions(args.data)
    recipes = args.recipes
    names = [args.task] if args.task else saved_tasks(args.models_dir, recipes)
    head = ("positive", "found", "hits", "pointing [95 %]", "chance", "centre")
    print(f"{'task':<10}{'plane':<10}{{:>9}}{{:>7}}{{:>6}}{{:>21}}{{:>8}}{{:>8}}".format(*head))
    for name in names:
        models = load_task(args.models_dir, name, recipes, device)
        for (plane,) in (planes for planes in models.by_planes if len(planes) == 1):
            count, found = play(models, plane, args.data, lesions, device, precision)
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


if __name__ == "__main__":
    cli.exit_with_status(lambda: run(parse_arguments()))
