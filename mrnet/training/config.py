"""The arguments of train.py that change its result, and recipes: files that hold some of them.

    from mrnet.training.config import Config, read_recipe
    config = Config("acl", "sagittal", lr=1e-4)  # the rest as in recipes/article.toml

recipes/article.toml holds the article's values, which are the defaults.
"""

import argparse
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from mrnet.errors import InputError, one_line
from mrnet.files import ROOT, read_text
from mrnet.layout.names import ARTICLE
from mrnet.layout.planes import SEQUENCES

RECIPES = ROOT / "recipes"
PLANNED = ("cosine", "one-cycle")  # schedules that are planned for a number of epochs


def read_recipe(source):
    """A recipe file's values.

    Args:
        source: name of a file in recipes/, or path of another.

    Returns:
        its name, and {argument of train.py: value} of what it says, as Config names them.

    Raises:
        InputError: no such file, not TOML, an unknown key, or a name that files cannot have.
    """
    path = RECIPES / f"{source}.toml"
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", source) or source.endswith(".toml"):
        path = Path(source).expanduser()
    try:
        content = tomllib.loads(read_text(path))
    except FileNotFoundError:
        names = ", ".join(sorted(file.stem for file in RECIPES.glob("*.toml")))
        raise InputError(
            f"{path}: no such recipe; give the path of a .toml file, or one of {names}"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a recipe ({one_line(error)}); correct it") from None
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", path.stem):
        raise InputError(
            f"{path}: a recipe's name becomes part of file names; use letters, digits, . _ and -"
        )
    if path.stem.partition("-")[0] in SEQUENCES:
        raise InputError(
            f"{path}: a network of it would be named like one of plane sagittal-{path.stem}; "
            "rename the recipe"
        )
    values = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name in values:
            raise InputError(f"{path}: {name.replace('_', '-')} twice, with - and with _; keep one")
        values[name] = value
    if path != RECIPES / f"{ARTICLE}.toml" and (unknown := values.keys() - THE_ARTICLES.keys()):
        names = ", ".join(sorted(name.replace("_", "-") for name in unknown))
        known = ", ".join(name.replace("_", "-") for name in THE_ARTICLES)
        raise InputError(f"{path}: unknown {names}; a recipe may have {known}")
    return path.stem, values


THE_ARTICLES = read_recipe(ARTICLE)[1]


def beyond_article(arguments):
    """{argument: value} of what differs from the article's recipe, where all of its are given."""
    return {
        name: arguments[name] for name, value in THE_ARTICLES.items() if arguments[name] != value
    }


SELECTED = "selected the epochs"


def selection_of(trainings):
    """What the exams that a training evaluates after each epoch decided in some trainings, in
    words: SELECTED, or less than that; "" where the last epoch is saved whatever they say.

    Args:
        trainings: {argument: value} of each, as Config names them.
    """
    if any(one["select"] == "auc" for one in trainings):
        return SELECTED
    decided = []
    if any(one["patience"] < one["epochs"] for one in trainings):
        decided.append("stopped the training")
    if any(one["lr_scheduler"] == "plateau" for one in trainings):
        decided.append("set the learning rates")
    return " and ".join(decided)


def selection_note(arguments, is_on_others):
    """What selected the epoch of a network whose validation AUC is printed beside this note.

    Args:
        arguments: of its training, as Config names them.
        is_on_others: whether the selection exams are others than those of that AUC.
    """
    decided = selection_of([arguments])
    if not decided:
        return "the last epoch, no exams selected it"
    if decided == SELECTED and is_on_others:
        return "the epoch was selected on other exams"
    if decided == SELECTED:
        return "optimistic: these exams selected the epoch"
    return f"{'other' if is_on_others else 'optimistic: these'} exams {decided}"


@dataclass(frozen=True)
class Config:
    """One training's arguments; a resumed training must agree on them (`train_state.check_same`).

    What they mean: recipes/article.toml, `train.py --help`.
    """

    task: str  # "acl", or several joined: "abnormal+acl+meniscus"
    plane: str  # "sagittal", or several joined
    recipe: str = ARTICLE  # its name
    intensity: str = THE_ARTICLES["intensity"]
    channels: str = THE_ARTICLES["channels"]
    augment: str = THE_ARTICLES["augment"]
    slices: float = THE_ARTICLES["slices"]
    backbone: str = THE_ARTICLES["backbone"]
    pretrained: bool = THE_ARTICLES["pretrained"]
    freeze: int = THE_ARTICLES["freeze"]
    pooling: str = THE_ARTICLES["pooling"]
    dropout: float = THE_ARTICLES["dropout"]
    share_backbone: bool = THE_ARTICLES["share_backbone"]
    plane_weight: float = THE_ARTICLES["plane_weight"]
    plane_dropout: float = THE_ARTICLES["plane_dropout"]
    class_weights: bool = THE_ARTICLES["class_weights"]
    accumulate: int = THE_ARTICLES["accumulate"]
    optimizer: str = THE_ARTICLES["optimizer"]
    lr: float = THE_ARTICLES["lr"]
    head_lr: float = THE_ARTICLES["head_lr"]
    weight_decay: float = THE_ARTICLES["weight_decay"]
    clip: float = THE_ARTICLES["clip"]
    average_weights: float = THE_ARTICLES["average_weights"]
    lr_scheduler: str = THE_ARTICLES["lr_scheduler"]
    warmup: float = THE_ARTICLES["warmup"]
    epochs: int = THE_ARTICLES["epochs"]
    patience: int = THE_ARTICLES["patience"]
    select: str = THE_ARTICLES["select"]
    seed: int = 0
    protocol: str = "article"
    folds: int = 1
    repeat: int = 1  # seeds
    precision: str = "fp32"  # or "bf16"
    device: str = "cpu"  # or "cuda"
    cuda_graphs: bool = False

    @property
    def tasks(self):
        return tuple(self.task.split("+"))

    @property
    def planes(self):
        return tuple(self.plane.split("+"))

    @property
    def differences(self):
        """{argument: value} of what differs from the article's recipe."""
        return beyond_article(vars(self))

    def check(self):
        """Refuse combinations that make no sense.

        Raises:
            InputError: with the options to change.
        """
        for is_wrong, reason in (
            (len(self.planes) == 1 and self.share_backbone,
             "--share-backbone: needs several planes, such as --plane axial coronal"),
            (len(self.planes) == 1 and self.plane_dropout > 0,
             "--plane-dropout: needs several planes, such as --plane axial coronal"),
            (self.freeze > 0 and not self.pretrained,
             "--freeze: not with --no-pretrained, whose weights are random"),
            (self.warmup > 0 and self.lr_scheduler in ("plateau", "step"),
             f"--warmup: not with --lr-scheduler {self.lr_scheduler}, which counts epochs; use "
             "cosine, one-cycle or none"),
        ):  # fmt: skip
            if is_wrong:
                raise InputError(reason)


def parse_with_recipe(parser, read_recipe, required):
    """Parse the command line with the values of its --recipe as defaults.

    A recipe's values go through the parser as options before the user's own, so that they are
    checked as these are and the user's win.

    Args:
        read_recipe: as `config.read_recipe`.
        required: words of a command line that the parser takes.

    Returns:
        argparse's Namespace; its `recipe` is the recipe's name.

    Raises:
        InputError: the recipe holds a value that the option does not take.
    """
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--recipe", default=parser.get_default("recipe"))
    name, values = read_recipe(first.parse_known_args()[0].recipe)
    words = []
    for key, value in values.items():
        option = key.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{option}"] if isinstance(value, bool) else [
            f"--{option}={value}"
        ]  # fmt: skip
    if not {"-h", "--help"} & set(sys.argv[1:]):
        parser.source = name
        parser.parse_args([*required, *words])
        parser.source = None
    args = parser.parse_args([*words, *sys.argv[1:]])
    args.recipe = name
    return args


def print_recipe(config):
    """Print what a Config has that the article's recipe has not."""
    found = " ".join(f"{name}={value}" for name, value in config.differences.items())
    print(f"recipe     {config.recipe}" + (f"; beyond the article: {found}" if found else ""))
