"""How fast one epoch is, beside the article's own loop and without each of our own parts.

    python -m tools.benchmark                    # make bench: about 8 minutes on two cores
    python -m tools.benchmark --device cuda --exams 96       # CUDA graphs and GPU kernels, too
    python -m tools.benchmark --growth                 # time against slices and exams
    python -m tools.benchmark --backbones --runs 3 --exams 4 --valid 2      # every backbone

Makes random volumes of MRNet's size in a temporary folder, runs every variant once a round so that
a machine that slows down slows all of them, and prints medians over the rounds with their spread.
Writes benchmarks/<what>-<device>-<torch>.csv.

The slow row is the article's loop (tools/article_loop.py).
"""

import copy
import multiprocessing
import re
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it finds its own folder only

import train
from dataloader import Augmentation, MRDataset
from model import MRNet
from mrnet.errors import InputError
from mrnet.files import write_csv
from mrnet.layout.labels import trainable
from mrnet.layout.planes import PLANES
from mrnet.networks.backbones import BACKBONES, GreyConv2d, convolutional_part, torchvision_network
from mrnet.runtime import cli
from mrnet.runtime.devices import device_name, has_bf16, pick_device, pick_precision
from mrnet.training.config import Config
from mrnet.training.datasets import cache_volumes, trainable_planes
from mrnet.training.graphs import as_graphs
from mrnet.training.optimization import make_optimizer, make_scheduler
from mrnet.training.train_state import TrainState
from tools.article_loop import ArticlesLoop, torchs_defaults

SIDE = 256
# MRNet's slices an exam: 17 to 61, mean about 30 (Bien et al. 2018 and the data set's volumes).
FEWEST, MOST = 17, 61
OURS, ARTICLE = "ours", "the article's loop"


def parse_arguments():
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--exams", type=int, default=40, help="training exams per epoch; MRNet 1130"
    )
    parser.add_argument("--valid", type=int, default=10, help="validation exams; MRNet 120")
    parser.add_argument(
        "--runs", type=cli.positive_int, default=5, help="rounds; the median of each is shown"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=11,
        help="of the article's DataLoader; 11 are the article's, as many as cores may be faster",
    )
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="leave out the other variants")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--data-dir",
        type=Path,
        help="the first exams of this folder instead of random ones, without the floor, which is "
        "of slices of 256 x 256",
    )
    what.add_argument("--growth", action="store_true", help="time against slices and exams instead")
    what.add_argument(
        "--backbones",
        nargs="*",
        choices=BACKBONES,
        metavar="NAME",
        help="every backbone (or those named) beside torchvision's plain three-channel fp32 loop, "
        "and the memory of an exam of 30 and of 61 slices",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: a GPU if there is one",
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder of the CSVs")
    return parser.parse_args()


# --- exams ----------------------------------------------------------------------------------------


def write_exams(root, counts, count_slices):
    """Write random smooth volumes in MRNet's layout: time does not depend on the picture.

    Args:
        counts: {split: exams}.
        count_slices: numpy's random generator -> slices of an exam.
    """
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.random((1, MOST * 4, 40, 40), np.float32))
    knee = F.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear")[0].mul(255).byte().numpy()
    first = 0
    for split, n in counts.items():
        (root / split / PLANES[0]).mkdir(parents=True)
        for i in range(first, first + n):
            s = count_slices(rng)
            start = rng.integers(0, len(knee) - s)
            np.save(root / split / PLANES[0] / f"{i:04d}.npy", knee[start : start + s])
        write_csv(root / f"{split}-acl.csv", [[first + i, int(i % 5 == 0)] for i in range(n)])
        first += n


def count_slices_as_mrnet(rng):
    """A number of slices as MRNet's: 17 to 61 with mean 30, drawn from a beta distribution."""
    return round(FEWEST + (MOST - FEWEST) * rng.beta(2.2, 5.2))


def load_exams(root, counts, device):
    """The first exams of both splits of a folder, of its first plane and finding: two MRDatasets,
    on a GPU that has room for them."""
    task, plane = trainable(root)[0][0], trainable_planes(root)[0][0]
    sets = [MRDataset(root, task, plane, train) for train in (True, False)]
    sets = [one.subset(range(min(n, len(one)))) for n, one in zip(counts, sets, strict=True)]
    cache_volumes(sets, "auto", device)
    return sets


def repeat_labels(exams, n):
    """A data set with its labels n times side by side, as if they were n findings."""
    several = copy.copy(exams)
    for name in ("labels", "targets", "weights"):
        setattr(several, name, np.repeat(getattr(exams, name), n, axis=1))
    return several


# --- what is measured -----------------------------------------------------------------------------


class Ours:
    """Epochs as train.py runs them.

    Args:
        sets: MRDataset to train on and to validate on.
        make_network: a number of findings -> MRNet.
        graphs: take CUDA graphs where volumes are on a GPU.
        recipe: arguments of Config that differ from the article's.
    """

    def __init__(self, sets, device, make_network=MRNet, graphs=True, **recipe):
        self.valid_set = sets[1]
        recipe = {"precision": pick_precision("auto", device)} | recipe
        graphs = graphs and sets[0].cached[0] is not None
        more = {"cuda_graphs": graphs, "device": device.type} | recipe
        self.config = Config("acl", sets[0].plane, **more)
        slices = (self.config.slices, self.config.slices)
        self.train_set = sets[0].prepared(transform=Augmentation(), slices=slices)
        self.model = make_network(tasks=self.train_set.targets.shape[1]).to(device)
        optimizer = make_optimizer(self.model, self.config)
        scheduler = make_scheduler(self.config, optimizer, len(self.train_set))
        self.state = TrainState(self.model, optimizer, scheduler, self.train_set.tasks)
        self.step = partial(train.training_step, self.model, optimizer, self.config)
        if graphs:
            self.step = as_graphs(self.step, self.model, self.config)

    def train(self):
        train.train_model(self.state, self.step, self.train_set, self.config)

    def evaluate(self):
        train.evaluate_model(self.model, self.valid_set, self.config)


class PlainLoop:
    """The plain loop for a backbone: torchvision's own network on three equal channels, eager,
    fp32, contiguous; one exam a step."""

    def __init__(self, sets, device, backbone):
        self.train_set, self.valid_set = sets
        self.device = device
        self.features = convolutional_part(torchvision_network(backbone)).to(device)
        self.head = torch.nn.Linear(BACKBONES[backbone].channels, 1).to(device)
        parameters = [*self.features.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=1e-5, weight_decay=0.1)

    def logit(self, exams, i):
        x = exams.exam(i, self.device).expand(-1, 3, -1, -1).contiguous()
        slices = F.adaptive_avg_pool2d(self.features(x), 1).flatten(1)
        return self.head(slices.max(dim=0, keepdim=True)[0])

    @torchs_defaults
    def train(self):
        self.features.train()
        target = torch.ones(1, 1, device=self.device)
        for i in range(len(self.train_set)):
            self.optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(self.logit(self.train_set, i), target).backward()
            self.optimizer.step()

    @torchs_defaults
    @torch.no_grad()
    def evaluate(self):
        self.features.eval()
        for i in range(len(self.valid_set)):
            self.logit(self.valid_set, i)


class TorchsConv2d(GreyConv2d):
    """The first convolution for one grey channel, without our own layout of its input."""

    def forward(self, x):
        return F.conv2d(x, self.weight.sum(1, keepdim=True), self.bias, self.stride, self.padding)


def with_torchs_convolution(tasks):
    """MRNet, its first convolution computed by torch alone."""
    model = MRNet(tasks=tasks)
    model.pretrained_model[0].__class__ = TorchsConv2d
    return model


def with_torchs_pooling(tasks):
    """MRNet without the pooling kernel."""
    model = MRNet(tasks=tasks)
    for i in (1, 4, 11):
        pooling = torch.nn.MaxPool2d(3, 2), torch.nn.ReLU(inplace=True)
        model.pretrained_model[i] = torch.nn.Sequential(*pooling)
    return model


def list_variants(sets, device, workers, folder):
    """{name: maker of an object with train() and evaluate()}, the slow baseline last.

    Args:
        workers: of the article's DataLoader.
        folder: for the article's log.
    """
    ours = partial(Ours, sets, device)
    variants = {OURS: ours}
    if has_bf16(device):
        variants["without bf16"] = partial(ours, precision="fp32")
    variants["without our first convolution"] = partial(ours, make_network=with_torchs_convolution)
    if device.type == "cuda":
        variants["without our pooling"] = partial(ours, make_network=with_torchs_pooling)
        variants["without CUDA graphs"] = partial(ours, graphs=False)
    return variants | {
        "three findings in one": lambda: Ours([repeat_labels(one, 3) for one in sets], device),
        "half of the slices": partial(ours, slices=0.5),
        "a third of the slices, two frozen": partial(ours, slices=1 / 3, freeze=2),
        ARTICLE: partial(ArticlesLoop, sets, device, workers, folder),
    }


# --- measuring ------------------------------------------------------------------------------------


def measure(loops, device, runs):
    """Time an epoch of training and of evaluation, every loop in every round.

    Args:
        loops: {name: object with train() and evaluate()}.

    Returns:
        {name: seconds, float array (2, runs)}: training and evaluation.
    """
    # The first round warms up; a GPU's first steps are eager, and leave graphs to the second.
    warm_up = 2 if device.type == "cuda" else 1
    times = {name: [] for name in loops}
    for round_ in range(1, warm_up + runs + 1):
        for name, loop in loops.items():
            times[name].append([seconds(loop.train, device), seconds(loop.evaluate, device)])
            took = f"round {round_} of {warm_up + runs}: {name:<33} {sum(times[name][-1]):6.2f} s"
            print(took, file=sys.stderr, flush=True)
    return {name: np.array(rounds[warm_up:]).T for name, rounds in times.items()}


def seconds(work, device):
    """Wall time of work(), the device's queue included."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def epoch_table(times, slices):
    """Rows of plain values, one a variant.

    Args:
        times: as `measure` returns them.
        slices: of the training and of the validation exams.
    """
    rows = []
    for name, (training, evaluation) in times.items():
        a_slice = 1e3 * training / slices[0]
        row = {
            "variant": name,
            "train ms/slice": np.median(a_slice),
            "min": a_slice.min(),
            "max": a_slice.max(),
            "evaluate ms/slice": 1e3 * np.median(evaluation) / slices[1],
            "epoch s": np.median(training + evaluation),
        }
        # Ratios round by round: a machine that slows down slows both sides.
        if OURS in times:
            row["training by ours"] = np.median(training / times[OURS][0])
        if ARTICLE in times:
            article = times[ARTICLE].sum(axis=0)
            row["faster than article"] = np.median(article / (training + evaluation))
        rows.append(row)
    return rows


def floor_row(device):
    """The row of the floor: the hardware's time for the arithmetic of slices of 256 x 256."""
    precision = pick_precision("auto", device)
    rate = product_rate(device, precision)
    train, evaluation = (1e3 * flops / rate for flops in flops_a_slice(device))
    floor = f"floor: {precision} matrix product, {rate / 1e9:,.0f} GFLOP/s"
    return {"variant": floor, "train ms/slice": train, "evaluate ms/slice": evaluation}


def product_rate(device, precision):
    """FLOP/s of a square matrix product, median of 15: what the hardware gives at best."""
    side = 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    a @ b
    return 2 * side**3 / statistics.median(seconds(lambda: a @ b, device) for _ in range(15))


def flops_a_slice(device, slices=30):
    """Floating point operations a slice of 256 x 256 for one training step and one evaluation.

    Those that our network does: one grey channel in the first convolution.
    """
    model, x = MRNet().to(device), torch.rand(1, slices, 1, SIDE, SIDE, device=device)
    with FlopCounterMode(display=False) as training:
        model(x).sum().backward()
    with FlopCounterMode(display=False) as evaluation, torch.inference_mode():
        model(x)
    return training.get_total_flops() / slices, evaluation.get_total_flops() / slices


def measure_growth(device, runs):
    """Training time of one exam against its slices, and of an epoch against its exams: rows."""
    rows = []
    for s, n in [(10, 6), (20, 6), (50, 6), (100, 6), (200, 6), (30, 6), (30, 12), (30, 24)]:
        with tempfile.TemporaryDirectory() as folder:
            write_exams(Path(folder), {"train": n, "valid": 2}, lambda _, s=s: s)
            loop = Ours(load_exams(folder, (n, 2), device), device)
        times = measure({f"{n} exams of {s} slices": loop}, device, runs)
        took = 1e3 * np.median(next(iter(times.values()))[0])
        rows.append(
            {"slices": s, "exams": n, "ms per exam": took / n, "ms per slice": took / n / s}
        )
    return rows


def measure_backbones(names, sets, device, runs):
    """A row for each backbone: parameters, time of ours and of the plain loop, memory."""
    rows = []
    # Each in a process of its own, which has the memory of nothing else.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as fresh_process:
        for name in names:
            ours = Ours(sets, device, make_network=partial(MRNet, backbone=name))
            loops = {name: ours, f"plain {name}": PlainLoop(sets, device, name)}
            times = list(measure(loops, device, runs).values())
            row = {"backbone": name}
            row["parameters, M"] = sum(p.numel() for p in ours.model.parameters()) / 1e6
            for k, what in enumerate(("train", "evaluate")):
                mine, plain = (1e3 * one[k] / sum(sets[k].slice_counts) for one in times)
                row[f"{what} ms/slice"] = np.median(mine)
                row[f"plain {what} ms/slice"] = np.median(plain)
                row[f"{what} faster"] = np.median(plain / mine)
            for slices in (30, 61):
                peak = fresh_process.submit(measure_memory, name, slices, device)
                row[f"GB at {slices}"] = peak.result()
            rows.append(row)
    return rows


def measure_memory(backbone, slices, device):
    """GB that this process has taken at most, after two fp32 training steps on an exam of some
    slices."""
    with tempfile.TemporaryDirectory() as folder:
        write_exams(Path(folder), {"train": 2, "valid": 2}, lambda _: slices)
        sets = load_exams(folder, (2, 2), device)
        Ours(sets, device, partial(MRNet, backbone=backbone), precision="fp32").train()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status").read_text()  # getrusage has the parent's before exec
    return 1024 * int(status.split("VmHWM:")[1].split()[0]) / 1e9


# --- the command ----------------------------------------------------------------------------------


def choose(variants, only):
    """The variants that `only` names, None for all of them.

    Raises:
        InputError: there is no such variant.
    """
    if unknown := set(only or ()) - set(variants):
        raise InputError(
            f"--only {', '.join(sorted(unknown))}: no such variant on this device; "
            f"there are {', '.join(variants)}"
        )
    return {name: variants[name] for name in only or variants}


def save(rows, what, device, folder):
    """Write the rows as CSV: its path."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    path = folder / f"{what}-{name}-torch-{torch.__version__.split('+')[0]}.csv"
    columns = list(rows[0])
    cells = [[row.get(name, "") for name in columns] for row in rows]
    cells = [[f"{v:.4g}" if isinstance(v, float) else v for v in line] for line in cells]
    write_csv(path, [columns, *cells])
    return path


def run(args):
    """Measure, print the table and write it."""
    device = pick_device(args.device)
    cli.print_start_up(vars(args), device, pick_precision("auto", device))
    with tempfile.TemporaryDirectory() as folder:
        if not (args.data_dir or args.growth):
            counts = {"train": args.exams, "valid": args.valid}
            write_exams(Path(folder), counts, count_slices_as_mrnet)
        if args.growth:
            rows, what = measure_growth(device, args.runs), "growth"
        else:
            sets = load_exams(args.data_dir or folder, (args.exams, args.valid), device)
            if args.backbones is not None:
                rows = measure_backbones(args.backbones or BACKBONES, sets, device, args.runs)
                what = "backbones"
            else:
                variants = list_variants(sets, device, args.workers, Path(folder) / "logs")
                loops = {name: make() for name, make in choose(variants, args.only).items()}
                slices = [sum(exams.slice_counts) for exams in sets]
                rows = epoch_table(measure(loops, device, args.runs), slices)
                rows += [] if args.data_dir else [floor_row(device)]
                what = "own-exams" if args.data_dir else "epoch"
                print(
                    f"an epoch of {sets[0].plane}: {len(sets[0])} exams with {slices[0]} slices, "
                    f"and {len(sets[1])} with {slices[1]} to validate; medians of {args.runs} "
                    "rounds after a warm-up"
                )
    print("\n" + tabulate(rows, headers="keys", floatfmt=".2f"))
    print(f"\nwritten  {save(rows, what, device, args.out)}")


if __name__ == "__main__":
    cli.exit_with_status(lambda: run(parse_arguments()))
