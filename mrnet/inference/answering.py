"""How a user's exams are answered: by which networks, and what a stored answer depends on."""

import hashlib
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from mrnet.inference.exams import open_exams, refuse_unfit
from mrnet.inference.task_models import load_task, saved_tasks
from mrnet.layout.arguments import add_recipes_argument, plane_name
from mrnet.runtime.devices import pick_device


class Options(NamedTuple):
    """How exams are answered, beside the models."""

    device: torch.device
    precision: str  # "fp32" or "bf16"
    partial: bool  # also decide where a plane cannot be used


def load_tasks(models_dir, names, device, recipes):
    """TaskModels of the tasks `names`, sorted; of every task with a saved model where it is empty.

    Raises:
        InputError: as `task_models.load_task`.
    """
    names = sorted(set(names)) if names else saved_tasks(models_dir, recipes)
    return [load_task(models_dir, name, recipes, device) for name in names]


@cache
def load_once(models_dir, names, recipes, device):
    """`load_tasks`, and the same list at every later call in this process.

    Args:
        names, recipes: tuples.
        device: as `pick_device` takes it.
    """
    return load_tasks(models_dir, names, pick_device(device), recipes)


@contextmanager
def open_fit_exams(sources, plane, tasks, allow_synthetic, log=print, workers=1):
    """`exams.open_exams`, of exams that all tasks' networks have an answer for.

    Args:
        tasks: list of TaskModels.
        workers: as open_exams takes it.

    Raises:
        InputError: nothing there, or `exams.refuse_unfit` refuses them.
    """
    with open_exams(sources, plane, log, tasks, workers) as exams:
        for models in tasks:
            refuse_unfit(models, exams.datasets, allow_synthetic, exams.shown)
        yield exams


def model_of(tasks, options):
    """Hash of all that an answer depends on but the exam: networks, stacks, options, hardware."""
    words = [options.precision, options.device.type, str(options.partial)]
    text = " ".join([*(models.digest for models in tasks), *words])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def add_exam_arguments(parser):
    """--plane, --models-dir, --recipes, --partial, --allow-synthetic: for scripts that answer about
    exams."""
    parser.add_argument(
        "--plane",
        type=plane_name,
        metavar="PLANE",
        help="of a single .npy file whose path does not contain it",
    )
    parser.add_argument(
        "--models-dir", type=Path, default=Path("models"), help="where train.py wrote"
    )
    add_recipes_argument(parser)
    parser.add_argument(
        "--partial",
        action="store_true",
        help="also decide from the other planes where a plane was scanned and cannot be used",
    )
    parser.add_argument(
        "--allow-synthetic",
        action="store_true",
        help="let networks that were trained on synthetic exams only answer about others; to try "
        "the commands",
    )
