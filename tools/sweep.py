"""Train many recipes on the same folds and see which is better: out of fold, with intervals.

    python -m tools.sweep sweeps/search.toml --data-dir data/adrenal64 --jobs 2
    python -m tools.sweep_table benchmarks/search                       # the table once more

A sweep is a TOML file: `task`, `planes`, `folds`, `seeds`, `protocol`, and for each recipe a table
[recipes.NAME] with what differs from the article's, or from one above it (`like = "NAME"`), and
perhaps `planes` of its own ("axial+sagittal" is one network). A task "a+b" has one network for both
findings. sweeps/ has examples.

Each network is one run of train.py, as a job of its own; every training exam is then predicted by
the network that was not trained on it and whose epoch other exams selected. Start it again after an
interruption: nothing finished is repeated.

Writes benchmarks/SWEEP/NAME.json for each recipe, with the whole configuration and for each network
its out-of-fold logits, time (null where its training was interrupted), memory, epoch, commit and
versions; the networks themselves are deleted. Then it prints tools/sweep_table.py's table.
"""

import itertools
import sys
import tomllib
from collections import Counter
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it finds its own folder only

from mrnet.documents import as_json
from mrnet.errors import InputError, RunError, one_line
from mrnet.files import ROOT, check_writable, file_lock, read_text, remove_leftovers, write_text
from mrnet.layout.labels import is_positive
from mrnet.layout.names import ARTICLE, Run, column_name, list_runs, model_path, state_path
from mrnet.runtime import cli
from mrnet.runtime.cluster import Machines
from mrnet.runtime.devices import pick_device, pick_precision
from mrnet.runtime.jobs import Job, failures
from mrnet.stacking.predictions import Predictor
from mrnet.stacking.stacking import is_combination_name
from mrnet.training.checkpoint import load_model
from mrnet.training.config import THE_ARTICLES
from mrnet.training.datasets import labelled_sets
from mrnet.training.memory import bytes_of_a_job
from tools.sweep_table import FORMAT, RecipeResults, SweepExams, print_table, read_result

SETTINGS = {"task": str, "planes": list, "folds": int, "seeds": int, "protocol": str}


def parse_arguments():
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("sweep", type=Path, help="TOML file: which recipes, planes, folds and seeds")
    add("--data-dir", type=Path, default=Path("data"), help="folder in MRNet's layout")
    out = "folder of the results; default benchmarks/ and the sweep's name"
    add("--out", type=Path, help=out)
    add("--models-dir", type=Path, help="default models/ and the sweep's name")
    cli.add_jobs_arguments(parser)
    cli.add_machine_arguments(parser)
    return parser.parse_args()


# --- what a sweep's file asks for -----------------------------------------------------------------


class Network(NamedTuple):
    """One network of a sweep."""

    recipe: str
    planes: str  # joined by + where it takes several
    number: int  # train.py's, folds within seeds, from 1
    run: Run  # its seed, from 0, and fold, from 1


class Sweep(NamedTuple):
    """What a sweep's file asks for."""

    task: str  # several findings in one network: joined by +
    folds: int
    seeds: int
    protocol: str
    recipes: dict  # {name: {option: value} of all that differs from the article's}
    planes: dict  # {name: [planes of a network, ...]}

    def networks(self):
        """Every Network: a fold of each recipe, then the next fold."""
        for number, run in enumerate(list_runs(self.folds, range(self.seeds)), start=1):
            for name in self.recipes:
                for planes in self.planes[name]:
                    yield Network(name, planes, number, run)

    def bytes_of(self, recipe):
        """Memory that training the largest network of a recipe takes."""
        backbone = self.recipes[recipe].get("backbone", THE_ARTICLES["backbone"])
        planes = max(len(each.split("+")) for each in self.planes[recipe])
        return bytes_of_a_job(backbone, planes)


def read_sweep(path):
    """A Sweep from its TOML file.

    Raises:
        InputError: no such file, not TOML, an unknown key, a recipe that is not there.
    """
    try:
        content = tomllib.loads(read_text(path))
        settings = {name: content.pop(name) for name in SETTINGS}
        tables = content.pop("recipes")
    except FileNotFoundError:
        raise InputError(f"{path}: no such sweep; give the path of a TOML file") from None
    except KeyError as error:
        raise InputError(f"{path}: lacks {error.args[0]}; sweeps/ has examples") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a sweep ({one_line(error)}); correct it") from None
    wrong = [name for name, kind in SETTINGS.items() if not isinstance(settings[name], kind)]
    if content or wrong:
        raise InputError(f"{path}: unknown or wrong: {', '.join([*content, *wrong])}")
    if settings["folds"] < 2 or settings["seeds"] < 1:
        raise InputError(f"{path}: needs at least 2 folds and 1 seed")
    of_all, recipes, planes = settings.pop("planes"), {}, {}
    for name, table in tables.items():
        values = {key.replace("_", "-"): value for key, value in table.items()}
        if len(values) < len(table):
            raise InputError(f"{path}: recipe {name}: an option twice, with - and with _; keep one")
        like, of_this = values.pop("like", None), values.pop("planes", of_all)
        if like and like not in recipes:
            raise InputError(f'{path}: like = "{like}": no recipe above {name} is called so')
        if unknown := values.keys() - {option.replace("_", "-") for option in THE_ARTICLES}:
            raise InputError(f"{path}: recipe {name}: unknown {', '.join(sorted(unknown))}")
        is_list = isinstance(of_this, list) and len(of_this) > 0
        if not is_list or not all(is_combination_name(str(one)) for one in of_this):
            raise InputError(
                f"{path}: recipe {name}: planes = {of_this}: takes a list of planes such as axial, "
                "or of several joined as in axial+coronal+sagittal"
            )
        recipes[name], planes[name] = recipes.get(like, {}) | values, of_this
    if ARTICLE not in recipes:
        raise InputError(f"{path}: lacks [recipes.{ARTICLE}], which the others are compared with")
    return Sweep(**settings, recipes=recipes, planes=planes)


# --- results --------------------------------------------------------------------------------------


class Results:
    """What one recipe's networks have predicted: OUT/NAME.json, kept up to date.

    Args:
        out: folder.
        sweep: Sweep.
        name: of the recipe.

    Raises:
        InputError: the file is of another recipe or sweep.
    """

    def __init__(self, out, sweep, name):
        self.path = out / f"{name}.json"
        # Not the number of seeds: more may be added later, each has folds of its own.
        head = {"format": FORMAT, "task": sweep.task, "folds": sweep.folds,
                "protocol": sweep.protocol, "recipe": sweep.recipes[name]}  # fmt: skip
        self.content = head | {"networks": []}
        if self.path.is_file():
            self.content = read_result(self.path, RecipeResults)
        self.networks = self.content["networks"]
        if other := [key for key, value in head.items() if self.content[key] != value]:
            raise InputError(
                f"{self.path}: was made with another {', '.join(other)}; give the recipe another "
                "name, or another --out"
            )

    def has(self, network):
        """Whether a Network has predicted."""
        place = network.planes, network.run.seed, network.run.fold
        return any((one["planes"], one["seed"], one["fold"]) == place for one in self.networks)

    def add(self, network, found):
        """Record what a Network has predicted, a dict of plain values."""
        place = {"planes": network.planes, "seed": network.run.seed, "fold": network.run.fold}
        self.networks.append(place | found)
        write_text(self.path, as_json(self.content) + "\n")


@cache
def training_exams(data_dir, task, planes):
    """MRDataset, once for all networks: its voxels are hashed to compare them."""
    return labelled_sets(data_dir, task, [planes])[planes]["train"]


def record_exams(path, sweep, data_dir, has_networks):
    """Write sweep.json, so that the table needs neither the data nor the sweep's file: "labels",
    {finding: {id: 0 or 1}} of the training exams; "grouped", {finding: number of them that share a
    group}; "exams", {finding and planes: hash of ids, labels and voxels}.

    Args:
        has_networks: whether there are predictions of an earlier run.

    Raises:
        InputError: a volume is damaged, or they are of other exams or labels, so that recipes would
            be compared on two sets.
    """
    columns = sorted({planes for each in sweep.planes.values() for planes in each})
    content = {"format": FORMAT, "labels": {}, "grouped": {}, "exams": {}}
    for task, planes in itertools.product(sweep.task.split("+"), columns):
        exams = training_exams(data_dir, task, planes)
        ids, labels, groups = exams.listed  # those without a volume of this plane, too
        content["labels"][task] = dict(zip(ids, map(int, is_positive(labels[:, 0])), strict=True))
        content["grouped"][task] = sum(n for n in Counter(groups).values() if n > 1)
        content["exams"][f"{task} {planes}"] = exams.fingerprint()
    if has_networks and path.is_file():
        before = read_result(path, SweepExams)
        content["exams"] = before["exams"] | content["exams"]
        same = before["exams"].items() <= content["exams"].items()
        if not same or content["labels"] != before["labels"]:
            raise InputError(
                f"{path}: networks there were trained on other exams or labels than {data_dir} "
                "has; give another --out, or the data as before"
            )
    write_text(path, as_json(content) + "\n")


# --- training -------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """Where and on what a sweep runs."""

    data_dir: Path
    models_dir: Path
    device: str
    precision: str

    def model_path(self, task, network):
        """Where train.py saves a Network's model of one finding."""
        column = column_name(network.planes, network.recipe)
        return model_path(self.models_dir, task, column, network.run.suffix)


def run(args):
    """Train what is missing, predict out of fold, print the table."""
    sweep, name = read_sweep(args.sweep), args.sweep.stem
    out = args.out or Path("benchmarks") / name
    models_dir = args.models_dir or Path("models") / name
    if args.cluster and "auto" in (args.device, args.precision):
        raise InputError("--cluster: machines may differ; give --device and --precision")
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    about = cli.print_start_up(vars(args), device, precision)
    with ExitStack() as locks:
        for folder, option in {out: "--out", models_dir: "--models-dir"}.items():
            check_writable(folder, option)
            busy = f"{folder}: another sweep writes there; wait for it, or give another {option}"
            locks.enter_context(file_lock(folder / ".sweep.lock", busy))
        for stem in ("sweep", *sweep.recipes):
            remove_leftovers(out / f"{stem}.json")
        for recipe, values in sweep.recipes.items():
            lines = [f"{key} = {as_json(value)}\n" for key, value in values.items()]
            write_text(models_dir / "recipes" / f"{recipe}.toml", "".join(lines))
        results = {recipe: Results(out, sweep, recipe) for recipe in sweep.recipes}
        has_networks = any(one.networks for one in results.values())
        record_exams(out / "sweep.json", sweep, args.data_dir, has_networks)
        most = max(map(sweep.bytes_of, sweep.recipes))
        runner = Machines.of(vars(args)).pick(device.type, len(list(sweep.networks())), most)
        torch.set_num_threads(1)  # the jobs have the cores; waiting threads would slow them tenfold
        provenance = {"commit": about["git"], "versions": about["versions"],
                      "precision": precision, "machine": about["machine"],
                      "threads": runner.threads}  # fmt: skip
        setting = Setting(args.data_dir, models_dir, device.type, precision)
        train_networks(sweep, setting, runner, results, provenance)
    print_table(out)


def train_networks(sweep, setting, runner, results, provenance):
    """Train the networks that have not predicted yet, and record what they predict.

    Args:
        runner: Jobs.
        results: {recipe: Results}.
        provenance: dict, recorded with each.

    Raises:
        RunError: some failed; the others were trained all the same.
    """
    tasks, jobs, begun, failed = sweep.task.split("+"), {}, set(), []
    for network in sweep.networks():
        models = [setting.model_path(task, network) for task in tasks]
        state = state_path(setting.model_path(sweep.task, network))
        if results[network.recipe].has(network):
            delete(models)  # a sweep was killed before it could
            continue
        jobs[make_job(sweep, setting, network)] = network, models
        if any(path.is_file() for path in (*models, state)):
            begun.add(network)  # nobody knows for how long it was trained
    for done in runner.run(jobs):
        network, models = jobs[done.job]
        if done.status:
            failed += [] if runner.stopped_by else [done.job]
            continue
        is_whole = network not in begun
        has_time = is_whole and done.cpu_seconds is not None
        time = {"seconds": round(done.seconds, 1) if is_whole else None,
                "cpu_seconds": round(done.cpu_seconds, 1) if has_time else None,
                "peak_memory": done.peak_memory}  # fmt: skip
        found = predict_out_of_fold(tasks, network, setting)
        results[network.recipe].add(network, found | time | provenance)
        delete(models)
    if failed:
        raise RunError(failures(failed, jobs))


def delete(paths):
    for path in paths:
        path.unlink(missing_ok=True)


def make_job(sweep, setting, network):
    """The run of train.py that makes one network."""
    recipe, planes, number, run = network
    folder = setting.models_dir
    arguments = (ROOT / "train.py", "--task", *sweep.task.split("+"), "--plane", *planes.split("+"),
                 "--data-dir", setting.data_dir, "--recipe",
                 folder / "recipes" / f"{recipe}.toml", "--protocol", sweep.protocol,
                 "--folds", sweep.folds, "--repeat", sweep.seeds, "--networks", number,
                 "--device", setting.device, "--precision", setting.precision,
                 "--models-dir", folder, "--logs-dir", folder / "logs", "--resume")  # fmt: skip
    title = f"{recipe}, {planes}, seed {run.seed}, fold {run.fold}"
    log = folder / "output" / f"{recipe}-{planes}-{number}.txt"
    return Job(title, tuple(map(str, arguments)), log)


def predict_out_of_fold(tasks, network, setting):
    """The exams that a network was not trained on, as it sees them: {"logits": {finding: {id:
    float}} of those with a label, "epochs": {finding: int}}."""
    found = {"logits": {}, "epochs": {}}
    device = torch.device(setting.device)
    for task in tasks:
        path = setting.model_path(task, network)
        model, metadata = load_model(path, task, column_name(network.planes, network.recipe))
        exams = training_exams(setting.data_dir, task, network.planes)
        exams = exams.subset(exams.rows_of(metadata["out_of_fold"]))
        exams = exams.prepared(intensity=metadata["intensity"], channels=metadata["channels"])
        logits = Predictor(device, setting.precision)(model.to(device), exams, path.stem)
        rounded = [round(logit, 4) for logit in logits[:, 0].tolist()]
        found["logits"][task] = dict(zip(exams.ids, rounded, strict=True))
        found["epochs"][task] = metadata["epoch"]
    return found


if __name__ == "__main__":
    cli.exit_with_status(lambda: run(parse_arguments()))
