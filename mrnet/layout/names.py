"""Names of the files that trainings and stacks write. Without torch.

acl-sagittal.pt, acl-sagittal-best-fold2of5-seed1.pt    models: task, column, Run.suffix
abnormal+acl-sagittal.state                             the state of a training of two findings
acl-sagittal-folds5-seed0.csv                           which of 5 networks did not see which exam
acl-stack.json, acl-stack-article+best.json             stacks: task, recipes
acl-results.json, acl-best-predictions.csv              what they are worth
"""

import glob
import hashlib
from pathlib import Path
from typing import NamedTuple

from mrnet.errors import InputError

MOST_NETWORKS = 1000  # of a task and plane
ARTICLE = "article"  # the recipe that names leave out
RESULTS, PREDICTIONS = "-results.json", "-predictions.csv"  # ends of the names of a stack's tables


class Run(NamedTuple):
    """One of the networks that train.py makes with --folds and --repeat."""

    seed: int
    fold: int  # from 1; 0 where a seed has one network
    suffix: str  # of its files: "", "-fold2of5", "-seed1" or "-fold2of5-seed1"


def list_runs(folds, seeds):
    """Every Run in train.py's order, folds within seeds. The seed is in a name only where there are
    several.

    Args:
        folds: int; 1 for one network a seed.
        seeds: sequence of int.

    Raises:
        InputError: more than MOST_NETWORKS.
    """
    if folds * len(seeds) > MOST_NETWORKS:
        raise InputError(
            f"--folds {folds} and --repeat {len(seeds)}: {folds * len(seeds)} networks of each "
            f"task and plane; at most {MOST_NETWORKS}"
        )
    return [
        Run(
            seed,
            fold,
            (f"-fold{fold}of{folds}" if fold else "") + (f"-seed{seed}" if len(seeds) > 1 else ""),
        )
        for seed in seeds
        for fold in (range(1, folds + 1) if folds > 1 else [0])
    ]


# --- networks -------------------------------------------------------------------------------------


def column_name(plane, recipe):
    """What a network of one plane, or of several joined by "+", is to a stack: "sagittal", or
    "sagittal-vgg16" for a recipe other than the article's."""
    return plane if recipe == ARTICLE else f"{plane}-{recipe}"


def model_path(models_dir, task, column, suffix=""):
    """Path of the best model of a task.

    Args:
        column: as `column_name`.
        suffix: of a Run.
    """
    return Path(models_dir) / f"{task}-{column}{suffix}.pt"


def state_path(path):
    """Path of the state of the training that writes the model at `path`; of a training of several
    findings the model's task is all of them, joined by "+"."""
    return path.with_suffix(".state")


def unfinished_states(path, task):
    """The training states that a model at `path` may yet be overwritten from: its own training's,
    or that of a network of several findings ("abnormal+acl-sagittal.state").

    Args:
        task: of the model.
    """
    end = path.stem.removeprefix(task)
    return [
        state
        for state in path.parent.glob(f"*{glob.escape(end)}.state")
        if task in state.stem.removesuffix(end).split("+")
    ]


def folds_path(models_dir, task, column, folds, seed):
    """Path of the CSV of seed,id,fold of a training with folds: named by all that they depend on,
    so that no other training replaces it.

    Args:
        task: joined by + for several.
        column: as `column_name`.
    """
    return Path(models_dir) / f"{task}-{column}-folds{folds}-seed{seed}.csv"


# --- stacks ---------------------------------------------------------------------------------------


def stack_name(recipes):
    """What a stack of the networks of some recipes is called in file names: "stack" for the
    article's, else "stack-article+vgg16"."""
    return "stack" if tuple(recipes) == (ARTICLE,) else f"stack-{'+'.join(recipes)}"


def stack_path(models_dir, task, recipes):
    """Path of a task's stack."""
    return Path(models_dir) / f"{task}-{stack_name(recipes)}.json"


def start_of_results(models_dir, task, recipes):
    """Start of the paths of a stack's tables and figures: "acl" or "acl-article+vgg16"."""
    return str(Path(models_dir) / f"{task}{stack_name(recipes).removeprefix('stack')}")


def results_path(models_dir, task, recipes):
    """Path of the figures of a task's stack."""
    return Path(start_of_results(models_dir, task, recipes) + RESULTS)


def predictions_path(models_dir, task, recipes):
    """Path of the probabilities of a task's stack and of its columns."""
    return Path(start_of_results(models_dir, task, recipes) + PREDICTIONS)


def exam_name(uid, side=""):
    """16 hex digits of the study UID's SHA-256, and the knee's side."""
    return hashlib.sha256(uid.encode()).hexdigest()[:16] + (f"-{side}" if side else "")
