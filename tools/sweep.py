"""Train many recipes on the same folds and see which is better: out of fold, with intervals.

    python -m tools.sweep sweeps/search.toml --data-dir data/adrenal64 --jobs 2
    python -m tools.sweep sweeps/search.toml --data-dir data/adrenal64 --drop       # cheaper
    python -m tools.sweep_table benchmarks/search                       # the table once more

A sweep is a TOML file: `task`, `planes`, `folds`, `seeds`, `protocol`, perhaps `views` (random
views of an exam that predictions are averaged over as well), and for each recipe a table
[recipes.NAME] with what differs from the article's, or from another of the file
(`like = "NAME"`), and perhaps `planes` of its own ("axial+sagittal" is one network). A task "a+b"
has one network for both findings. [stacks] names stacks of several recipes:
`NAME = { recipes = ["a", "b"], features = "logit", average_seeds = true }`. sweeps/ has examples.

Each network is one run of train.py, as a job of its own; every training exam is then predicted by
the network that was not trained on it and whose epoch other exams selected. Start it again after an
interruption: nothing finished is repeated.

Writes benchmarks/SWEEP/NAME.json for each recipe, with the whole configuration and for each
network its out-of-fold logits, time (null where the sweep was killed or its machine lost), memory,
epoch, commit and versions; networks are deleted when they have predicted (`--keep-models`). Then it
prints tools/sweep_table.py's table.
"""

import itertools
import json
import tomllib
from collections import Counter
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import cli, engine
from common.checkpoint import check_writable, load_model
from common.cluster import Machines
from common.config import THE_ARTICLES, Config
from common.datasets import labelled_sets, make_exams
from common.devices import pick_device, pick_precision
from common.errors import InputError, Interrupted, RunError, one_line
from common.files import held, read_text, remove_leftovers, write_text
from common.jobs import ROOT, Job, bytes_of_a_job, failures
from common.names import ARTICLE, column_name, list_runs, model_path, state_path
from common.planes import in_order
from common.predictions import check_network
from common.stacking import FEATURES
from tools.sweep_table import dropped_recipes, print_table

SETTINGS = {"task": str, "planes": list, "folds": int, "seeds": int, "protocol": str,
            "views": int}  # fmt: skip
OF_STACKS = ("recipes", "features", "average_seeds")  # keys of a stack's table
OF_RECIPES = ("like", "planes")  # keys of a recipe's table beside train.py's options


def parse_arguments():
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("sweep", type=Path, help="TOML file: which recipes, planes, folds and seeds")
    add("--data-dir", type=Path, default=Path("data"), help="folder in MRNet's layout")
    drop = "after each fold leave out the recipes whose AUC is below the best one's so far, p < "
    drop += "0.05 divided by the number of rivals, in every column; the article's stays. With one "
    drop += "seed a training that went wrong by chance counts, too"
    add("--drop", action="store_true", help=drop)
    out = "folder of the results; default benchmarks/ and the sweep's name"
    add("--out", type=Path, help=out)
    add("--models-dir", type=Path, help="default models/ and the sweep's name")
    add(
        "--keep-models",
        action="store_true",
        help="keep them, 10 MB each; without it all go, those of an earlier start too",
    )
    cli.add_jobs_arguments(parser)
    cli.add_machine_arguments(parser)
    return parser.parse_args()


class Network(NamedTuple):
    """One network of a sweep."""

    recipe: str
    planes: str  # joined by + where it takes several
    number: int  # train.py's, folds within seeds, from 1


class Sweep(NamedTuple):
    """What a sweep's file asks for."""

    task: str  # several findings in one network: joined by +
    folds: int
    seeds: int
    protocol: str
    views: int  # of each exam that predictions are averaged over as well; 0 for none
    recipes: dict  # {name: {option: value} of all that differs from the article's}
    planes: dict  # {name: [planes of a network, ...]}
    stacks: dict  # {name: {"recipes": [...], ...}, as sweep_table.stack_rows takes it}

    def networks(self):
        """Every Network, by rounds: a fold of each recipe, then the next fold."""
        for number in range(1, self.folds * self.seeds + 1):
            for name in self.recipes:
                for planes in self.planes[name]:
                    yield Network(name, planes, number)

    def bytes_of(self, recipe):
        """Memory that training the largest network of a recipe takes."""
        backbone = self.recipes[recipe].get("backbone", THE_ARTICLES["backbone"])
        planes = max(len(each.split("+")) for each in self.planes[recipe])
        return bytes_of_a_job(backbone, planes)

    def run_of(self, network):
        """A network's Run: seed from 0, fold from 1."""
        return list_runs(self.folds, range(self.seeds))[network.number - 1]

    def model_file(self, folder, task, network):
        """Where train.py saves a network's model of one finding."""
        column = column_name(network.planes, network.recipe)
        return model_path(folder, task, column, self.run_of(network).suffix)

    def files(self, folder, network):
        """Where train.py saves a network's models, one a finding, and its state."""
        models = [self.model_file(folder, task, network) for task in self.task.split("+")]
        return models, state_path(self.model_file(folder, self.task, network))


def read_sweep(path):
    """A Sweep from its TOML file.

    Raises:
        InputError: no such file, not TOML, an unknown key, a recipe that is not there.
    """
    try:
        content = tomllib.loads(read_text(path))
        content.setdefault("views", 0)
        settings = {name: content.pop(name) for name in SETTINGS}
        tables, stacks = content.pop("recipes"), content.pop("stacks", {})
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
    planes = settings.pop("planes")
    recipes = {name: resolve(path, tables, name) for name in tables}
    if ARTICLE not in recipes:
        raise InputError(f"{path}: lacks [recipes.{ARTICLE}], which the others are compared with")
    check_stacks(path, stacks, recipes)
    each = {name: columns_in(path, tables[name].get("planes", planes)) for name in tables}
    return Sweep(**settings, recipes=recipes, planes=each, stacks=stacks)


def columns_in(path, planes):
    """The value of a `planes`, the planes of a joint network in the order of its files' names.

    Raises:
        InputError: not a list of planes, or one twice.
    """
    given = [str(one).split("+") for one in planes] if isinstance(planes, list) else []
    columns = ["+".join(in_order(one)) for one in given]
    is_wrong = any(len(in_order(one)) < len(one) for one in given)  # unknown, or twice
    if is_wrong or not columns or len(set(columns)) < len(columns):
        raise InputError(
            f"{path}: planes = {planes}: takes a list of planes such as axial, or of several "
            "joined by +, each once"
        )
    return columns


def check_stacks(path, stacks, recipes):
    """Raise InputError where a table of [stacks] is not as sweep_table.all_rows takes it."""
    for name, table in stacks.items():
        is_known = isinstance(table, dict) and table.keys() <= set(OF_STACKS)
        members = table.get("recipes") if is_known else None
        if not isinstance(members, list) or not set(map(str, members)) <= recipes.keys():
            raise InputError(
                f"{path}: stack {name}: takes {', '.join(OF_STACKS)}; recipes is a list of names "
                "of [recipes]"
            )
        if table.get("features", FEATURES[0]) not in FEATURES:
            raise InputError(f"{path}: stack {name}: features is {' or '.join(FEATURES)}")


def resolve(path, tables, name, asked_by=()):
    """What a recipe changes of the article's, with all that it is `like`: {option: value}."""
    if name not in tables or name in asked_by:
        raise InputError(f'{path}: like = "{name}": no such recipe, or in a circle')
    table = {key.replace("_", "-"): value for key, value in tables[name].items()}
    known = {option.replace("_", "-") for option in THE_ARTICLES}
    if unknown := table.keys() - known - set(OF_RECIPES):
        raise InputError(f"{path}: recipe {name}: unknown {', '.join(sorted(unknown))}")
    base = {}
    if "like" in table:
        base = resolve(path, tables, table["like"], (*asked_by, name))
    return base | {key: value for key, value in table.items() if key not in OF_RECIPES}


class Setting(NamedTuple):
    """Where and on what a sweep runs."""

    data_dir: Path
    out: Path
    models_dir: Path
    keep_models: bool
    device: str
    precision: str


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
        head = {"task": sweep.task, "folds": sweep.folds, "seeds": sweep.seeds,
                "protocol": sweep.protocol, "views": sweep.views,
                "recipe": sweep.recipes[name]}  # fmt: skip
        self.content = head | {"networks": {}}
        if self.path.is_file():
            try:
                found = json.loads(read_text(self.path))
                found.setdefault("views", sweep.views)  # earlier versions did not record it
                other = [key for key, value in head.items() if found.get(key) != value]
                self.networks = found["networks"]
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                raise InputError(
                    f"{self.path}: damaged ({one_line(error)}); restore it, or move it away and "
                    "its networks are trained again"
                ) from None
            # More seeds may be added later: their folds are their own.
            if other and other != ["seeds"]:
                raise InputError(
                    f"{self.path}: was made with another {', '.join(other)}; give the recipe "
                    "another name, or another --out"
                )
            self.content = found | head
        self.networks = self.content["networks"]

    def get(self, network):
        """What a Network predicted, None if it has not yet."""
        return self.networks.get(f"{network.planes} {network.number}")

    def begin(self, network, has_files):
        """Mark a Network as one that is trained from now on. It is not known how long it was
        trained before if nothing is recorded of it, or if it is marked already: a sweep was killed.

        Args:
            has_files: whether an earlier training has left any; without them it begins anew.
        """
        key, unknown = f"{network.planes} {network.number}", {"seconds": None, "cpu_seconds": None}
        times = self.content.setdefault("times", {})
        running = self.content.setdefault("running", [])
        if has_files and (key in running or key not in times):
            times[key] = unknown
        if key not in running:
            running.append(key)

    def add_time(self, network, usage):
        """Record what a training of a Network has taken, beside its interrupted parts before: None
        where one of these is not known; and that it is not trained any more."""
        key, times = f"{network.planes} {network.number}", self.content.setdefault("times", {})
        before = times.get(key, dict.fromkeys(usage, 0))
        times[key] = {
            name: None if None in (value, before[name]) else round(value + before[name], 1)
            for name, value in usage.items()
        }
        self.content["running"] = [one for one in self.content.get("running", []) if one != key]
        self.write()

    def end(self):
        """Record that no Network is trained any more, those that waited for their turn included."""
        self.content["running"] = []
        self.write()

    def add(self, network, found):
        """Record what a Network predicted."""
        key = f"{network.planes} {network.number}"
        self.networks[key] = found | self.content["times"].pop(key)
        self.write()

    def write(self):
        """Write the file, a line for each network."""
        head = {key: value for key, value in self.content.items() if key != "running" or value}
        text = json.dumps(head | {"networks": {}}, indent=1)
        lines = [f'  "{k}": {json.dumps(one)}' for k, one in self.networks.items()]
        networks = '"networks": {\n' + ",\n".join(lines) + "\n }"
        write_text(self.path, text.replace('"networks": {}', networks) + "\n")


def run(args):
    """Train what is missing, predict out of fold, print the table."""
    sweep, name = read_sweep(args.sweep), args.sweep.stem
    device = pick_device(args.device)
    setting = Setting(
        args.data_dir,
        args.out or Path("benchmarks") / name,
        args.models_dir or Path("models") / name,
        args.keep_models,
        device.type,
        pick_precision(args.precision, device),
    )
    about = cli.print_start_up(vars(args), device, setting.precision)
    with ExitStack() as locks:
        for folder, option in {setting.out: "--out", setting.models_dir: "--models-dir"}.items():
            check_writable(folder, option)
            busy = f"{folder}: another sweep writes there; wait for it, or give another {option}"
            locks.enter_context(held(folder / ".sweep.lock", busy))
        for stem in ("sweep", *sweep.recipes):
            remove_leftovers(setting.out / f"{stem}.json")
        for recipe, values in sweep.recipes.items():
            lines = [f"{key} = {json.dumps(value)}\n" for key, value in values.items()]
            write_text(setting.models_dir / "recipes" / f"{recipe}.toml", "".join(lines))
        if args.cluster and "auto" in (args.device, args.precision):
            raise InputError("--cluster: machines may differ; give --device and --precision")
        networks, most = list(sweep.networks()), max(map(sweep.bytes_of, sweep.recipes))
        runner = Machines.of(vars(args)).pick(device.type, len(networks), most)
        run_rounds(sweep, setting, runner, args.drop, about)
    print_table(setting.out)


def run_rounds(sweep, setting, runner, drop, about):
    """Train all networks; with `drop` a fold of all recipes is awaited before the next.

    Args:
        runner: Jobs.
        about: as `cli.print_start_up` returns it.
    """
    results = {recipe: Results(setting.out, sweep, recipe) for recipe in sweep.recipes}
    write_about(sweep, setting, any(one.networks for one in results.values()))
    if not setting.keep_models:
        delete_predicted(sweep, setting.models_dir, results)
    dropped = dropped_recipes(setting.out) if drop else set()  # by an earlier run
    torch.set_num_threads(1)  # the jobs have the cores; waiting threads would slow them tenfold
    provenance = {
        "commit": about["git"],
        "versions": about["versions"],
        "precision": setting.precision,
        "machine": about["machine"],
        "threads": runner.threads,
    }
    todo = [n for n in sweep.networks() if results[n.recipe].get(n) is None]
    rounds = sorted({n.number for n in todo}) if drop else [None]
    for number in rounds:
        networks = [n for n in todo if number in (None, n.number) and n.recipe not in dropped]
        train_networks(sweep, networks, setting, runner, results, provenance)
        if drop:
            dropped = dropped_recipes(setting.out)
            print(f"dropped    {', '.join(sorted(dropped)) or 'none'}", flush=True)


def delete_predicted(sweep, models_dir, results):
    """Delete the models of networks that have predicted: a sweep was killed before it could."""
    for network in sweep.networks():
        if results[network.recipe].get(network) is not None:
            for path in sweep.files(models_dir, network)[0]:
                path.unlink(missing_ok=True)


def train_networks(sweep, networks, setting, runner, results, provenance):
    """Train some networks and record what they predict.

    Args:
        networks: list of Network.
        runner: Jobs.
        results: {recipe: Results}.
        provenance: dict, recorded with each.

    Raises:
        RunError: some failed; the others were trained all the same.
    """
    for network in networks:
        models, state = sweep.files(setting.models_dir, network)
        has_files = any(path.is_file() for path in (*models, state))
        results[network.recipe].begin(network, has_files)
    ours = [results[recipe] for recipe in {network.recipe for network in networks}]
    for result in ours:
        result.write()
    waiting, failed = {make_job(sweep, setting, n): n for n in networks}, []
    try:
        for done in runner.run(waiting):
            network = waiting[done.job]
            result = results[network.recipe]
            result.add_time(network, {"seconds": done.seconds, "cpu_seconds": done.cpu_seconds})
            if done.status:
                failed += [] if runner.stopped_by else [done.job]
                continue
            found = predict_out_of_fold(sweep, network, setting)
            result.add(network, found | {"peak_memory": done.peak_memory} | provenance)
            if not setting.keep_models:
                for path in sweep.files(setting.models_dir, network)[0]:
                    path.unlink()
    except Interrupted:  # the time of all that ran is recorded
        for result in ours:
            result.end()
        raise
    if failed:
        raise RunError(failures(failed, networks))


def make_job(sweep, setting, network):
    """The run of train.py that makes one network."""
    recipe, planes, number = network
    run = sweep.run_of(network)
    folder = setting.models_dir
    arguments = (ROOT / "train.py", "--task", *sweep.task.split("+"), "--plane", *planes.split("+"),
                 "--data-dir", setting.data_dir, "--recipe",
                 folder / "recipes" / f"{recipe}.toml", "--protocol", sweep.protocol,
                 "--folds", sweep.folds, "--repeat", sweep.seeds, "--networks", number,
                 "--device", setting.device, "--precision", setting.precision,
                 "--models-dir", folder, "--logs-dir", folder / "logs", "--resume")  # fmt: skip
    title = f"{recipe}, {planes}, seed {run.seed}, fold {run.fold}"
    log = folder / "output" / f"{recipe}-{planes}-{number}.txt"
    models, state = sweep.files(folder, network)
    files = (*(path.name for path in (*models, state)), f"recipes/{recipe}.toml")
    return Job(title, tuple(map(str, arguments)), log, files=files)


def predict_out_of_fold(sweep, network, setting):
    """The exams that a network was not trained on, as it sees them.

    Returns:
        {"ids": {finding: [...]} of those with a label, "logits": {finding: [float, ...]}, "views":
        the same averaged over random views, "valid_ids" and "valid": ids and logits of the
        validation exams, "epochs": {finding: int}}.

    Raises:
        InputError: it was trained on other exams, another fold, another seed or by another recipe.
    """
    planes, device = network.planes, torch.device(setting.device)
    run = sweep.run_of(network)
    expected = {"seed": run.seed, "fold": run.fold, "folds": sweep.folds}
    found = {"ids": {}, "logits": {}, "views": {}, "valid_ids": {}, "valid": {}, "epochs": {}}
    for task in sweep.task.split("+"):
        path = sweep.model_file(setting.models_dir, task, network)
        model, metadata = load_model(path, task, column_name(planes, network.recipe))
        model = model.to(device)
        sets = exams_of(setting.data_dir, task, planes)
        check_network(path, metadata, sets, expected)
        check_recipe(path, metadata, sweep.recipes[network.recipe])
        for exams in sets.values():
            exams.intensity, exams.channels = metadata["intensity"], metadata["channels"]
        out_of_fold = sets["train"].subset(sets["train"].rows_of(metadata["out_of_fold"]))
        found["ids"][task], found["valid_ids"][task] = out_of_fold.ids, sets["valid"].ids
        found["epochs"][task] = metadata["epoch"]
        for which, exams in (("logits", out_of_fold), ("valid", sets["valid"])):
            logits = engine.predict(model, exams, device, setting.precision, path.stem)[:, 0]
            found[which][task] = rounded(logits)
        if sweep.views:
            like = make_exams(Config(**metadata["arguments"]), setting.data_dir, train=True)
            exams = out_of_fold.subset(range(len(out_of_fold)), like.transform)
            seen = predict_views(model, exams, device, setting.precision, sweep.views)
            found["views"][task] = rounded((seen + found["logits"][task]) / (sweep.views + 1))
    return found


def check_recipe(path, metadata, recipe):
    """Raise InputError where the model at `path` was trained by another recipe than `recipe`."""
    wanted = THE_ARTICLES | {key.replace("-", "_"): value for key, value in recipe.items()}
    trained = metadata["arguments"]
    other = [f"--{name.replace('_', '-')} {trained[name]}"
             for name, value in wanted.items() if trained[name] != value]  # fmt: skip
    if other:
        raise InputError(
            f"{path}: was trained with {', '.join(other)}, which is not the sweep's recipe; delete "
            "it, or give another --models-dir"
        )


def rounded(logits):
    return [round(float(logit), 4) for logit in logits]


def predict_views(model, exams, device, precision, views):
    """Logits of exams, summed over random views of each as training draws them: float32 (n,)."""
    torch.manual_seed(0)
    drawn = (exams.draw(range(len(exams))) for _ in range(views))
    return sum(engine.predict(model, exams, device, precision, "views", v)[:, 0] for v in drawn)


@cache
def exams_of(data_dir, task, planes):
    """{split: MRDataset}, once for all networks: their voxels are hashed to compare them."""
    return labelled_sets(data_dir, task, [planes])[planes]


def write_about(sweep, setting, has_networks):
    """OUT/sweep.json, so that the tables need neither the data nor the sweep's file: {"labels":
    {finding: {id: 0 or 1}} of the training exams, "valid": the same of the validation exams,
    "in_company": {finding: number of training exams that share a group}, "stacks", "exams":
    {finding and planes: hash of ids, labels and voxels}}.

    Args:
        has_networks: whether there are predictions of an earlier run.

    Raises:
        InputError: they are of other exams or labels, so recipes would be compared on two sets.
    """
    columns = sorted({planes for each in sweep.planes.values() for planes in each})
    tasks, path = sweep.task.split("+"), setting.out / "sweep.json"
    exams = {}
    for task, planes in itertools.product(tasks, columns):
        with suppress(InputError):  # a damaged volume is named by the trainings that read it
            train = exams_of(setting.data_dir, task, planes)["train"]
            exams[f"{task} {planes}"] = train.fingerprint()
    about = {"labels": {}, "valid": {}, "in_company": {}, "stacks": sweep.stacks, "exams": exams}
    for task in tasks:
        sets = exams_of(setting.data_dir, task, next(iter(sweep.planes.values()))[0])
        about["labels"][task] = labels_of(sets["train"])
        about["valid"][task] = labels_of(sets["valid"].listed)  # a plane may lack some
        sizes = Counter(sets["train"].groups)
        about["in_company"][task] = sum(size for size in sizes.values() if size > 1)
    if has_networks and path.is_file():
        before = json.loads(read_text(path))
        known = before.get("exams", {})  # earlier versions recorded labels only
        other = [name for name in known.keys() & exams.keys() if known[name] != exams[name]]
        other += [
            task
            for task, labels in about["labels"].items()
            for exam_id, label in before["labels"].get(task, {}).items()
            if labels.get(exam_id, label) != label  # which exams there are depends on the plane
        ]
        if other:
            raise InputError(
                f"{path}: networks there were trained on other exams or labels than "
                f"{setting.data_dir} has; give another --out, or the data as before"
            )
    write_text(path, json.dumps(about) + "\n")


def labels_of(exams):
    """{id: 0 or 1} of an MRDataset (or Listed) of one finding, those that are known."""
    pairs = zip(exams.ids, exams.labels[:, 0], strict=True)
    return {exam_id: int(label >= 0.5) for exam_id, label in pairs if not np.isnan(label)}


if __name__ == "__main__":
    cli.exit_with_status(lambda: run(parse_arguments()))
