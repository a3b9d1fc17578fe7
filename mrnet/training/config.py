"""The arguments of train.py that change its result, and recipes: files that hold some of them.

    from mrnet.training.config import Config, read_recipe
    config = Config("acl", "sagittal", lr=1e-4)  # the rest as in recipes/article.toml

The fields of Config are the options of train.py, said once; recipes/article.toml states the same
defaults for its reader.
"""

import argparse
import re
import sys
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path

from dataloader import CHANNELS, INTENSITIES
from model import POOLINGS
from mrnet.errors import InputError, one_line
from mrnet.files import ROOT, read_text
from mrnet.layout.names import ARTICLE
from mrnet.layout.planes import SEQUENCES
from mrnet.networks.backbones import BACKBONES
from mrnet.runtime import cli
from mrnet.training.augmentation import AUGMENTATIONS, SLICES_OF_STRONG
from mrnet.training.optimization import OPTIMIZERS, SCHEDULERS
from mrnet.training.splits import PROTOCOLS

RECIPES = ROOT / "recipes"
PLANNED = ("cosine", "one-cycle")  # schedules that are planned for a number of epochs
SELECTIONS = ("auc", "last")  # which epoch's network is saved
GROUPS = ("data", "network", "recipe", "protocol")  # of the options, in `--help`


def option(group, default, help, is_recipes=True, **argument):
    """A field of Config that is an option of train.py.

    Args:
        group: of `--help`.
        default: the article's value.
        is_recipes: whether a recipe may hold it.
        argument: more of argparse's add_argument, such as type and choices.
    """
    about = {"group": group, "is_recipes": is_recipes, "help": help, **argument}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Config:
    """One training's arguments; a resumed training must agree on them (`train_state.check_same`).

    A field that is an `option` is one of train.py's, with its type, choices and help.
    """

    task: str  # "acl", or several joined: "abnormal+acl+meniscus"
    plane: str  # "sagittal", or several joined
    recipe: str = option(
        "recipe",
        ARTICLE,
        "preset of options: article, best, fast, fastest, phantom, rsna, or the path of a .toml "
        "file; options on the command line override it",
        is_recipes=False,
        metavar="NAME|FILE",
    )
    intensity: str = option(
        "data",
        "standardized",
        "raw gives the network grey levels 0 to 255, as the article did; it learns worse",
        choices=INTENSITIES,
    )
    channels: str = option(
        "data",
        "grey",
        "neighbours gives each slice with the slices before and after it as the three colour "
        "channels (2.5D)",
        choices=CHANNELS,
    )
    augment: str = option(
        "data",
        "article",
        "article flips columns in every plane, anatomical flips left and right only; strong adds "
        "gamma, contrast, blur, noise and cut-outs, and trains on a random part of the slices, "
        f"{SLICES_OF_STRONG:.0%}% or more",
        choices=AUGMENTATIONS,
    )
    slices: float = option(
        "data",
        1.0,
        "train on this part of an exam's slices in each step, evenly spaced; 0.5 takes half the "
        "time",
        type=cli.part,
    )
    backbone: str = option(
        "network",
        "alexnet",
        "convolutional network, with ImageNet weights; all but alexnet and vgg16 download them "
        "from torchvision's host",
        choices=BACKBONES,
    )
    pretrained: bool = option(
        "network", True, "start from ImageNet weights; random weights learn far slower"
    )
    freeze: int = option(
        "network",
        0,
        "freeze the first N convolutions; 2 of AlexNet's 5 cut the training time by a third",
        type=cli.count,
        metavar="N",
    )
    pooling: str = option(
        "network",
        "max",
        "how an exam's slices are combined; attention learns a weight for each (Ilse et al. 2018)",
        choices=POOLINGS,
    )
    dropout: float = option(
        "network",
        0.0,
        "dropout before the classifier; the article's text mentions it, its code has none",
        type=cli.probability,
    )
    share_backbone: bool = option(
        "network", False, "with several planes: one backbone for all of them"
    )
    plane_weight: float = option(
        "network",
        0.5,
        "with several planes: weight of the auxiliary loss on each plane's own logit",
        type=cli.nonnegative_float,
    )
    plane_dropout: float = option(
        "network",
        0.0,
        "with several planes: leave each out with this probability, so that the network can do "
        "without one",
        type=cli.probability,
    )
    class_weights: bool = option(
        "recipe",
        True,
        "weight positives in the loss by negatives/positives, as the article's text asks",
    )
    accumulate: int = option(
        "recipe",
        1,
        "number of exams whose gradients are added up for one step of the optimizer",
        type=cli.positive_int,
    )
    optimizer: str = option(
        "recipe", "adam", "adamw decouples the weight decay from the gradient", choices=OPTIMIZERS
    )
    lr: float = option(
        "recipe",
        1e-5,
        "learning rate: 1e-5 suits MRNet's 1,130 exams, 3e-5 to 1e-4 suits 200; higher values are "
        "unstable",
        type=cli.positive_float,
    )
    head_lr: float = option(
        "recipe",
        0.0,
        "learning rate of the classifier, commonly ten times --lr; 0 for the same",
        type=cli.nonnegative_float,
    )
    weight_decay: float = option(
        "recipe",
        0.1,
        "L2 penalty in adam, as in the article; 0.01 is common with adamw",
        type=cli.nonnegative_float,
    )
    clip: float = option(
        "recipe",
        0.0,
        "clip the norm of the gradient to this value; 0 for no clipping",
        type=cli.nonnegative_float,
    )
    average_weights: float = option(
        "recipe",
        0.0,
        "save an exponential moving average of the weights with this decay, such as 0.999 (0.99 "
        "for less than 5,000 steps); 0 for none",
        type=cli.probability,
    )
    lr_scheduler: str = option(
        "recipe",
        "plateau",
        "plateau and step are the article's and change the rate after epochs; cosine and "
        "one-cycle change it after every step, down to 0",
        choices=SCHEDULERS,
    )
    warmup: float = option(
        "recipe",
        0.0,
        "part of all steps in which the learning rate rises, for cosine, one-cycle (0 means 0.3) "
        "and none",
        type=cli.probability,
    )
    epochs: int = option(
        "recipe",
        50,
        "maximum number of epochs, and the length of cosine and one-cycle schedules",
        type=cli.positive_int,
    )
    patience: int = option(
        "recipe",
        5,
        "stop after this many epochs without a better validation loss",
        type=cli.positive_int,
    )
    select: str = option(
        "recipe",
        "auc",
        "which epoch's network is saved: the one with the best AUC on the exams used for model "
        "selection, or the last",
        choices=SELECTIONS,
    )
    seed: int = option(
        "protocol",
        0,
        "fixes the order of exams, the augmentation and the initial classifier",
        is_recipes=False,
        type=cli.count,
    )
    protocol: str = option(
        "protocol",
        "article",
        "exams used for model selection: the validation exams themselves (article: optimistic), "
        "or a part of the training exams (held-out)",
        is_recipes=False,
        choices=PROTOCOLS,
    )
    folds: int = option(
        "protocol",
        1,
        "number of networks, each trained without its fold of the training exams; 3 to 5 for "
        "out-of-fold stacking, 1 as in the article",
        is_recipes=False,
        type=cli.positive_int,
    )
    repeat: int = option(
        "protocol",
        1,
        "number of seeds, counted from --seed; differences smaller than theirs are noise",
        is_recipes=False,
        type=cli.positive_int,
    )
    precision: str = "fp32"  # or "bf16"
    device: str = "cpu"  # or "cuda", "mps"
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


# Of each option that a recipe may hold, the article's value; recipes/article.toml states the same.
THE_ARTICLES = {one.name: one.default for one in fields(Config) if one.metadata.get("is_recipes")}


def options_of(group):
    """The fields of Config that are options of one of GROUPS."""
    return [one for one in fields(Config) if one.metadata.get("group") == group]


def add_options(group, name):
    """Add the options of one of GROUPS, `name`, to an argument group of argparse's."""
    for one in options_of(name):
        about = {k: v for k, v in one.metadata.items() if k not in ("group", "is_recipes")}
        if one.type is bool:
            about["action"] = argparse.BooleanOptionalAction
        group.add_argument(option_name(one.name), default=one.default, **about)


def option_name(name):
    """ "--head-lr" for the field head_lr."""
    return f"--{name.replace('_', '-')}"


def list_options():
    """docs/options.md: every option of Config with its default and its help, as Markdown."""
    lines = ["# The options of train.py", "",
             "Those that change its result. Made from `mrnet/training/config.py`; a recipe",
             "(`recipes/*.toml`) may hold what is below data, network and recipe.", ""]  # fmt: skip
    for group in GROUPS:
        lines += [f"## {group.capitalize()}", "", "| option | default | |", "|---|---|---|"]
        for one in options_of(group):
            words = one.metadata["help"].replace("%%", "%")
            if choices := one.metadata.get("choices"):
                words += f" ({', '.join(choices)})"
            default = str(one.default).lower() if one.type is bool else one.default
            lines.append(f"| `{option_name(one.name)}` | `{default}` | {words} |")
        lines.append("")
    return "\n".join(lines)


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
    if unknown := values.keys() - THE_ARTICLES.keys():
        names = ", ".join(sorted(name.replace("_", "-") for name in unknown))
        known = ", ".join(name.replace("_", "-") for name in THE_ARTICLES)
        raise InputError(f"{path}: unknown {names}; a recipe may have {known}")
    return path.stem, values


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
