"""Train every task on every plane, stack them, and print one table beside the published figures.

    python reproduce.py                                     # make reproduce: MRNet under data/
    python reproduce.py --data-dir data/phantom -- --epochs 4 --lr 3e-5
    python reproduce.py --tasks acl -- --protocol held-out --folds 5
    python reproduce.py --together -- --recipe mine         # all findings of a plane in one network
    python reproduce.py --cluster ray -- --folds 5          # on the machines of a Ray cluster

Every network (a task, a plane, a fold, a seed) is one run of train.py, several side by side, each
with a log of its own; then train_logistic_regression.py stacks each task. A plane without a folder
in both splits is left out (a set of one plane has a "stack" of one). What follows `--` goes to
train.py. Interrupt it and start it again: no finished model is repeated. Writes
models/reproduce/results.json, results.md, means.json (mean AUC over the findings), report.html
(one page to show) and claim.md (the CLAIM checklist), apart from what other commands make.
"""

import argparse
import signal
import subprocess
import sys
from pathlib import Path

from mrnet.documents import as_json
from mrnet.errors import Interrupted, RunError, counted
from mrnet.files import ROOT, check_writable, file_lock, write_text
from mrnet.layout.description import read_own_labels
from mrnet.layout.names import ARTICLE, results_path
from mrnet.reports.report import read_all, write_report
from mrnet.reports.table import markdown
from mrnet.runtime import cli
from mrnet.runtime.cluster import Machines
from mrnet.runtime.jobs import Job, failures
from mrnet.training.config import THE_ARTICLES, read_recipe
from mrnet.training.datasets import all_tasks, trainable_planes
from mrnet.training.memory import bytes_of_a_job


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
    together = "one network for all findings of a plane, in the time of one, instead of one each"
    parser.add_argument("--together", action="store_true", help=together)
    cli.add_jobs_arguments(parser)
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


def read_training(recipe):
    """What of train.py's arguments matters here as well.

    Returns:
        the arguments that train_logistic_regression.py needs, the recipe's name, how many networks
        a task and plane has, the device and the backbone.
    """
    parser = argparse.ArgumentParser(prog=cli.script_name(), add_help=False)
    for name in ("--folds", "--repeat"):
        parser.add_argument(name, type=cli.positive_int)
    for name in ("--seed", "--device", "--precision"):
        parser.add_argument(name)
    parser.add_argument("--recipe", default=ARTICLE)
    parser.add_argument("--backbone")
    known = vars(parser.parse_known_args(recipe)[0])
    name, values = read_recipe(known.pop("recipe"))
    backbone = known.pop("backbone") or (THE_ARTICLES | values)["backbone"]
    words = [word for name, value in known.items() if value for word in (f"--{name}", str(value))]
    return (
        [*words, "--recipes", name],
        name,
        (known["folds"] or 1) * (known["repeat"] or 1),
        known["device"] or "auto",
        backbone,
    )


def make_jobs(findings, planes, count, places, training):
    """A Job for every network.

    Args:
        findings: list of lists of tasks; those of one list share a network.
        planes: list.
        count: networks of a task and plane.
        places: {"data", "models", "logs": Path}.
        training: list, arguments of train.py.
    """
    jobs = []
    for together in findings:
        for plane in planes:
            size = bytes_of(places["data"], plane)
            for number in range(1, count + 1):
                name = "+".join(together)
                arguments = (ROOT / "train.py", "--task", *together, "--plane", plane, "--resume",
                             *as_arguments(places), "--networks", number, *training)  # fmt: skip
                log = places["models"] / "output" / f"{name}-{plane}-{number}.txt"
                title = f"{name}, {plane}" + (f", network {number}" if count > 1 else "")
                jobs.append(Job(title, tuple(map(str, arguments)), log, size))
    return jobs


def as_arguments(places):
    return [word for name, path in places.items() for word in (f"--{name}-dir", path)]


def bytes_of(data_dir, plane):
    """Size of a plane's volumes, at least 1."""
    return 1 + sum(path.stat().st_size for path in Path(data_dir).glob(f"*/{plane}/*.npy"))


def run(args):
    """Train every network, stack each task, write the table."""
    check_writable(args.models_dir)
    busy = f"{args.models_dir}: another reproduce.py runs there; wait for it, or give --models-dir"
    with file_lock(args.models_dir / ".reproduce.lock", busy):
        wanted = args.tasks or all_tasks(args.data_dir)
        words, recipe, count, device, backbone = read_training(args.recipe)
        places = {"data": args.data_dir, "models": args.models_dir, "logs": args.logs_dir}
        findings = [wanted] if args.together else [[task] for task in wanted]
        planes, left = trainable_planes(args.data_dir)
        if left:
            print(f"left out   {', '.join(left)}: no folder in both train and valid")
        jobs = make_jobs(findings, planes, count, places, args.recipe)
        runner = Machines.of(vars(args)).pick(device, len(jobs), bytes_of_a_job(backbone))
        print(f"{counted(len(jobs), 'network')}, {runner.at_once} at a time with "
              f"{counted(runner.threads, 'thread')} each; "
              f"what they print: {args.models_dir / 'output'}", flush=True)  # fmt: skip
        if args.cluster and "--precision" not in args.recipe:
            print(
                "note: each machine takes its own precision; `-- --precision fp32` is one for all"
            )
        failed = [done.job for done in runner.run(jobs) if done.status]
        if failed:
            raise RunError(failures(failed, jobs))
        stacked = ("--task", *wanted, "--planes", *planes)
        call("train_logistic_regression.py", *stacked, *as_arguments(places), *words)
        found = read_all(results_path(args.models_dir, task, [recipe]) for task in wanted)
        table, means = markdown(found, read_own_labels(args.data_dir))
        for name, content in (
            ("results.json", {results.task: results.content for results in found}),
            ("means.json", means),
        ):
            write_text(args.models_dir / name, as_json(content, indent=2) + "\n")
        write_text(args.models_dir / "results.md", table)
        written = args.models_dir / "results.json"
        print(f"\n{table}\nwritten    {written}, means.json, results.md", flush=True)
        report = args.models_dir / "report.html"
        for line in write_report(found, report):
            print(f"left out of the report  {line}")
        print(f"checklist  {report.with_name('claim.md')}\nreport     {report}")


if __name__ == "__main__":
    cli.exit_with_status(lambda: run(parse_arguments()))
