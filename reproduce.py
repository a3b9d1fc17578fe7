"""Train every task on every plane, stack them, and print one table beside the published figures.

    python reproduce.py                                     # make reproduce: MRNet under data/
    python reproduce.py --data-dir data/phantom -- --epochs 4 --lr 3e-5
    python reproduce.py --tasks acl -- --protocol held-out --folds 5

Runs train.py and train_logistic_regression.py as they stand; what follows `--` goes to train.py.
Interrupt it and start it again: no finished model is repeated. Writes models/reproduce/results.json
and results.md, apart from the models that other commands make.
"""

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path

from tabulate import tabulate

from common import cli
from common.config import ARTICLE, read_recipe
from common.errors import Interrupted, RunError
from common.files import write_text
from common.stacking import start_of_results
from dataloader import PLANES, tasks

# (who, protocol, {task: AUC}); none of these is ours.
PUBLISHED = (
    (
        "Stanford MRNet (Bien et al., PLOS Medicine 2018)",
        "hidden test set of 120 exams",
        {"abnormal": 0.937, "acl": 0.965, "meniscus": 0.847},
    ),
    (
        "AlexNet rebuild by FragLegs (GitHub)",
        "the public 120 validation exams, not used for choices",
        {"abnormal": 0.940, "acl": 0.960, "meniscus": 0.839},
    ),
    (
        "the article",
        "the public 120, which selected the epochs; stack fitted on training exams",
        {"acl": 0.95},
    ),
)


def parse_arguments():
    parser = cli.make_parser(__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="in MRNet's layout")
    parser.add_argument("--tasks", nargs="+", help="default: all tasks in the data folder")
    parser.add_argument(
        "--models-dir",
        type=Path,
        default=Path("models/reproduce"),
        help="for the models and the table",
    )
    parser.add_argument(
        "--logs-dir", type=Path, default=Path("logs/reproduce"), help="for TensorBoard"
    )
    parser.add_argument("recipe", nargs="*", help="after `--`: arguments for train.py")
    return parser.parse_args()


def call(script, *arguments):
    """Run one of the project's scripts; end with its status if it fails."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)]
    print(f"\n$ python {script} {' '.join(map(str, arguments))}", flush=True)
    # A process group of its own gets no Ctrl-C from the terminal: it would get ours as well, and a
    # second signal means at once.
    child, forwarded = subprocess.Popen(command, start_new_session=True), []

    def forward(number, frame):
        forwarded.append(number)
        child.send_signal(number)

    before = cli.catch_signals(forward)
    status = child.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if forwarded:
        raise Interrupted(forwarded[0], "Start it again: finished networks are not repeated")
    if status:
        raise RunError(f"{script} ended with status {status}; fix the cause and start again")


def shared_with_stack(recipe):
    """The arguments of train.py that train_logistic_regression.py needs as well, and the name of
    the recipe."""
    names = ("--folds", "--repeat", "--seed", "--device", "--precision")
    parser = argparse.ArgumentParser(add_help=False)
    for name in names:
        parser.add_argument(name)
    parser.add_argument("--recipe", default=ARTICLE)
    known = vars(parser.parse_known_args(recipe)[0])
    name = read_recipe(known.pop("recipe"))[0]
    words = [word for name, value in known.items() if value for word in (f"--{name}", value)]
    return [*words, "--recipes", name], name


def markdown(results):
    """One table: a row for each column of the stacks and the stack, and the published figures."""
    first = next(iter(results.values()))
    protocol = f"{first['protocol']}, folds {first['folds']}"
    if first["protocol"] == "article":
        protocol += " (optimistic)"
    rows = []
    for name in (name for name, row in first["valid"].items() if "auc" in row):
        found = [result["valid"][name] for result in results.values()]
        aucs = [f"{one['auc']:.3f} [{one['auc_low']:.3f}, {one['auc_high']:.3f}]" for one in found]
        rows.append([f"ours, {name}", protocol, *aucs])
    for who, how, figures in PUBLISHED:
        cells = [f"{figures[task]:.3f}" if task in figures else "" for task in results]
        if any(cells):
            rows.append([who, how, *cells])
    table = tabulate(rows, ["who", "protocol", *results], tablefmt="pipe", disable_numparse=True)
    n, positives = first["valid"]["stack"]["n"], first["valid"]["stack"]["positives"]
    return (
        f"{table}\n\nValidation AUC [95 % interval, DeLong]; {n} exams, in the first task "
        f"{positives} positive. Published figures are those of MRNet's exams.\n"
    )


def run(args):
    """Run train.py and train_logistic_regression.py for each task, then write the table."""
    wanted = args.tasks or tasks(args.data_dir)
    places = ("--data-dir", args.data_dir, "--models-dir", args.models_dir)
    places += ("--logs-dir", args.logs_dir)
    results = {}
    for task in wanted:
        for plane in PLANES:
            call("train.py", "--task", task, "--plane", plane, *places, "--resume", *args.recipe)
        words, recipe = shared_with_stack(args.recipe)
        call("train_logistic_regression.py", "--task", task, *places, *words)
        start = start_of_results(args.models_dir, task, [recipe])
        results[task] = json.loads(Path(f"{start}-results.json").read_text())
    table = markdown(results)
    write_text(args.models_dir / "results.json", json.dumps(results, indent=2) + "\n")
    write_text(args.models_dir / "results.md", table)
    print(f"\n{table}\nwritten  {args.models_dir / 'results.json'}, results.md")


if __name__ == "__main__":
    cli.exit_with_status(lambda: run(parse_arguments()))
