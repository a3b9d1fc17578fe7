"""How fast one epoch is, beside the article's own loop, with each ingredient taken away in turn.

    python -m tools.benchmark                    # make bench: about 8 minutes on two cores
    python -m tools.benchmark --exams 1130 --valid 120 --runs 3 --device cuda
    python -m tools.benchmark --growth                 # time against slices and exams
    python -m tools.benchmark --whole-run --exams 1130 --valid 120   # train.py: start-up, memory
    python -m tools.benchmark --backbones --runs 3 --exams 4 --valid 1      # every backbone
    python -m tools.benchmark --at-once 1 2 4 --exams 100    # networks an hour, side by side

Makes random volumes of MRNet's size in a temporary folder, runs every variant once a round so that
a machine that slows down slows all of them, and prints medians over the rounds with their spread.
Writes benchmarks/<what>-<device>-<torch>.csv.

The slow row is the article's loop (tools/article_loop.py).
"""

import copy
import multiprocessing
import queue
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it finds its own folder only

from common import cli
from common.datasets import trainable_planes
from common.devices import CACHES, cache_volumes, device_name, pick_device, pick_precision
from common.errors import InputError, RunError
from common.files import write_csv
from common.labels import trainable
from common.planes import PLANES
from dataloader import MRDataset
from model import BACKBONES, MRNet, convolutional_part, torchvision_network
from tools.benchmark_variants import ARTICLE, COMPILED, OURS, Ours, variants

SIDE = 256
# MRNet's slices an exam: 17 to 61, mean about 30 (Bien et al. 2018 and the data set's volumes).
FEWEST, MOST = 17, 61
WARM_UP = 40  # exams


def parse_arguments():
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--exams", type=int, default=40, help="training exams per epoch; MRNet 1130"
    )
    parser.add_argument("--valid", type=int, default=10, help="validation exams; MRNet 120")
    parser.add_argument(
        "--data-dir",
        type=Path,
        help="the first exams of this folder instead of random ones; for the table of an epoch, "
        "then without the floor, which is of slices of 256 x 256",
    )
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
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--growth", action="store_true", help="time against slices and exams instead"
    )
    instead.add_argument(
        "--backbones",
        nargs="*",
        choices=BACKBONES,
        metavar="NAME",
        help="every backbone (or those named) beside torchvision's plain three-channel fp32 loop, "
        "and the memory of an exam of 30 and of 61 slices",
    )
    instead.add_argument(
        "--at-once",
        nargs="+",
        type=cli.positive_int,
        metavar="N",
        help="networks an hour when N processes share the device (training epochs only)",
    )
    instead.add_argument(
        "--whole-run",
        action="store_true",
        help="two epochs of train.py instead: start-up, seconds per epoch, memory",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: a GPU if there is one",
    )
    parser.add_argument("--cache", choices=CACHES, default="auto", help="as in train.py")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder of the CSVs")
    return parser.parse_args()


def write_exams(root, counts, slices):
    """Random smooth volumes in MRNet's layout: the arithmetic does not depend on the picture."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.random((1, MOST * 4, 40, 40), np.float32))
    knee = F.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear")[0].mul(255).byte().numpy()
    first = 0
    for split, n in counts.items():
        (root / split / PLANES[0]).mkdir(parents=True, exist_ok=True)
        labels = [int(i % 5 == 0) for i in range(n)]
        for i in range(n):
            s = slices(rng)
            start = rng.integers(0, len(knee) - s)
            np.save(root / split / PLANES[0] / f"{first + i:04d}.npy", knee[start : start + s])
        rows = "".join(f"{first + i},{label}\n" for i, label in enumerate(labels))
        (root / f"{split}-acl.csv").write_text(rows)
        first += n


def both_splits(root):
    """MRDataset to train on and to validate on: the first plane and finding of a folder."""
    task = trainable(root)[0][0]
    plane = trainable_planes(root)[0][0]
    return [MRDataset(root, task, plane, train) for train in (True, False)]


def mrnet_slices(rng):
    """A slice count as MRNet's: 17 to 61 with mean 30, drawn from a beta distribution."""
    return round(FEWEST + (MOST - FEWEST) * rng.beta(2.2, 5.2))


# --- measuring ------------------------------------------------------------------------------------


def seconds(work, device):
    """Wall time of work(), the device's queue included."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def product_rate(device, precision):
    """FLOP/s of a square matrix product, median of 15: what the hardware gives at best."""
    side = 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    a @ b
    return 2 * side**3 / statistics.median(seconds(lambda: a @ b, device) for _ in range(15))


@lru_cache
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


def memory(device):
    """Bytes in use: peak on a GPU, resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss


def torchs_defaults():
    """Within it cuDNN has torch's defaults, which others' loops run with: TF32, any algorithm."""
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=False, allow_tf32=True
    )


def measure(makers, sets, device, cache, runs):
    """Time every variant in every round.

    Args:
        makers: {name: maker}, as `variants` returns them.
        sets: MRDataset to train on and to validate on.
        cache: as train.py's --cache.

    Yields:
        after each round {name: ([train seconds], [evaluation seconds], [bytes])}, and slices of
        either data set.
    """
    times = {name: ([], [], []) for name in makers}
    cached = [copy.deepcopy(exams) for exams in sets]
    cache_volumes(cached, cache, device)
    slices = [sum(exams.slice_counts) for exams in sets]
    for round_ in range(runs + 1):  # the first round, of a few exams, warms up and is thrown away
        for name, make in makers.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            asked = sets if name == ARTICLE else cached
            if not round_:
                asked = [exams.subset(range(min(WARM_UP, len(exams)))) for exams in asked]
            with torchs_defaults() if name == ARTICLE else nullcontext():
                loop = make(asked, device)
                took = seconds(loop.train, device), seconds(loop.evaluate, device)
            about = f"round {round_} of {runs}: {name:<33} {sum(took):6.2f} s"
            print(about, file=sys.stderr, flush=True)
            measured = *took, memory(device)
            if round_:
                for kept, value in zip(times[name], measured, strict=True):
                    kept.append(value)
        if round_:
            yield times, slices


def floor_row(device, precision):
    """The row of the floor of slices of 256 x 256: the hardware's time for their arithmetic."""
    rate = product_rate(device, precision)
    train, evaluation = (1e3 * flops / rate for flops in flops_a_slice(device))
    floor = f"floor: {precision} matrix product, {rate / 1e9:,.0f} GFLOP/s"
    return {"variant": floor, "train ms/slice": train, "evaluate ms/slice": evaluation}


def table(times, slices):
    """Rows of plain values, one a variant."""
    epochs = {name: [a + b for a, b in zip(*t[:2], strict=True)] for name, t in times.items()}
    middle = statistics.median
    rows = []
    for name, (train, evaluation, used) in times.items():
        a_slice = [1e3 * t / slices[0] for t in train]
        row = {
            "variant": name,
            "train ms/slice": middle(a_slice),
            "min": min(a_slice),
            "max": max(a_slice),
            "evaluate ms/slice": 1e3 * middle(evaluation) / slices[1],
            "epoch s": middle(epochs[name]),
        }
        # Ratios round by round: a machine that slows down slows both sides.
        if OURS in times:
            pairs = zip(train, times[OURS][0], strict=True)
            row["training by ours"] = middle(a / b for a, b in pairs)
        for title, other in (("slower than ours", OURS), ("faster than article", ARTICLE)):
            if other in epochs:
                pairs = list(zip(epochs[name], epochs[other], strict=True))
                row[title] = middle(a / b if other == OURS else b / a for a, b in pairs)
        row["GB"] = max(used) / 1e9
        rows.append(row)
    return rows


def save(rows, what, device, folder):
    """Write the rows as CSV: its path."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    path = folder / f"{what}-{name}-torch-{torch.__version__.split('+')[0]}.csv"
    columns = list(rows[0])
    cells = [[row.get(name, "") for name in columns] for row in rows]
    cells = [[f"{v:.4g}" if isinstance(v, float) else v for v in line] for line in cells]
    write_csv(path, [columns, *cells])
    return path


def growth(device, runs):
    """Training time of one exam against its slices, and of an epoch against its exams."""
    rows = []
    for s, n in [(10, 6), (20, 6), (50, 6), (100, 6), (200, 6), (30, 6), (30, 12), (30, 24)]:
        with tempfile.TemporaryDirectory() as folder:
            write_exams(Path(folder), {"train": n, "valid": 2}, lambda _, s=s: s)
            exams = MRDataset(folder, "acl", PLANES[0])
            cache_volumes([exams], "auto", device)
            loop = Ours((exams, exams), device)
            loop.train()
            took = 1e3 * statistics.median(seconds(loop.train, device) for _ in range(runs))
            rows.append(
                {"slices": s, "exams": n, "ms per exam": took / n, "ms per slice": took / n / s}
            )
    return rows


def train_one(root, device, epochs, together, spans):
    """One of several networks that train at once, in a process of its own.

    Args:
        together: multiprocessing.Barrier; all begin when all are ready.
        spans: queue that gets begin and end of the epochs, s.
    """
    exams, device = MRDataset(root, "acl", PLANES[0]), torch.device(device)
    cache_volumes([exams], "auto", device)
    loop = Ours((exams, exams), device)
    loop.train()
    together.wait(timeout=600)
    began = time.perf_counter()
    seconds(lambda: [loop.train() for _ in range(epochs)], device)
    spans.put((began, time.perf_counter()))


def next_span(spans, processes):
    """What the next of some processes puts into the queue; RunError where one of them failed."""
    while True:
        try:
            return spans.get(timeout=5)
        except queue.Empty:
            if any(process.exitcode for process in processes):
                raise RunError(f"one of {len(processes)} networks at once failed") from None


def at_once(counts, root, device, epochs):
    """Networks an hour when several processes share the device: a row for each number of them."""
    context, rows = multiprocessing.get_context("spawn"), []
    for n in counts:
        together, spans = context.Barrier(n), context.Queue()
        work = (root, device.type, epochs, together, spans)
        processes = [context.Process(target=train_one, args=work, daemon=True) for _ in range(n)]
        for process in processes:
            process.start()
        begun, ended = zip(*(next_span(spans, processes) for _ in processes), strict=True)
        epoch = (max(ended) - min(begun)) / epochs
        rows.append({"networks at once": n, "s an epoch": epoch,
                     "networks of 10 epochs an hour": n * 360 / epoch})  # fmt: skip
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


class PlainLoop:
    """The plain loop for a backbone: torchvision's own network on three equal channels, eager,
    fp32, contiguous; one exam a step."""

    def __init__(self, backbone, exams, device):
        self.exams, self.device = exams, device
        self.features = convolutional_part(torchvision_network(backbone)).to(device)
        self.head = torch.nn.Linear(BACKBONES[backbone].channels, 1).to(device)
        parameters = [*self.features.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=1e-5, weight_decay=0.1)

    def logit(self, i):
        x = self.exams.exam(i, self.device).expand(-1, 3, -1, -1).contiguous()
        slices = F.adaptive_avg_pool2d(self.features(x), 1).flatten(1)
        return self.head(slices.max(dim=0, keepdim=True)[0])

    def train(self):
        self.features.train()
        for i in range(len(self.exams)):
            self.optimizer.zero_grad()
            logit, target = self.logit(i), torch.ones(1, 1, device=self.device)
            F.binary_cross_entropy_with_logits(logit, target).backward()
            self.optimizer.step()

    @torch.no_grad()
    def evaluate(self):
        self.features.eval()
        for i in range(len(self.exams)):
            self.logit(i)


def backbone_row(backbone, exams, device, runs):
    """One backbone: parameters, ms a slice of ours and of the plain loop, round by round."""
    loops = {
        "ours": partial(Ours, network=partial(MRNet, backbone=backbone)),
        "plain": lambda sets, device: PlainLoop(backbone, sets[0], device),
    }
    loops = {name: make((exams, exams), device) for name, make in loops.items()}
    times = {(name, what): [] for name in loops for what in ("train", "evaluate")}
    for round_ in range(runs + 1):  # the first round warms up
        for name, what in times:
            with torchs_defaults() if name == "plain" else nullcontext():
                took = 1e3 * seconds(getattr(loops[name], what), device) / sum(exams.slice_counts)
            times[name, what] += [took] if round_ else []
    middle = statistics.median
    row = {"backbone": backbone}
    row["parameters, M"] = sum(p.numel() for p in loops["ours"].model.parameters()) / 1e6
    for what in ("train", "evaluate"):
        ours, plain = times["ours", what], times["plain", what]
        row |= {f"{what} ms/slice": middle(ours), f"plain {what} ms/slice": middle(plain)}
        row[f"{what} faster"] = middle(b / a for a, b in zip(ours, plain, strict=True))
    return row


def peak_memory(backbone, slices, device):
    """GB that a process takes at most in two training steps on an exam of some slices, fp32."""
    code = (
        "import torch\n"
        "from common.engine import TrainingStep\n"
        "from model import MRNet\n"
        f"model = MRNet(backbone='{backbone}').to('{device.type}').train()\n"
        "step = TrainingStep(model, torch.optim.Adam(model.parameters()), 'fp32')\n"
        "one = torch.ones(1, 1, device=step.device)\n"
        "class Exams:\n"
        "    volume = lambda self, i: None\n"
        "    prepare = lambda self, volume, device, view: torch.rand("
        f"{slices}, 1, {SIDE}, {SIDE}, device=device)\n"
        "[step(Exams(), [0], [None], one, one) for _ in range(2)]\n"
        "if step.device.type == 'cuda':\n"
        "    print(torch.cuda.max_memory_allocated())\n"
        "else:\n"  # getrusage would count what the parent had before exec
        "    status = open('/proc/self/status').read()\n"
        "    print(1024 * int(status.split('VmHWM:')[1].split()[0]))\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    return int(done.stdout) / 1e9 if done.returncode == 0 else float("nan")


def backbones(names, root, device, runs):
    """A row for each backbone."""
    exams = MRDataset(root, "acl", PLANES[0])
    cache_volumes([exams], "auto", device)
    rows = []
    for name in names or BACKBONES:
        rows.append(backbone_row(name, exams, device, runs))
        print(rows[-1], file=sys.stderr, flush=True)

    def add_memory(row):
        for slices in (30, 61):
            row[f"GB at {slices}"] = peak_memory(row["backbone"], slices, device)
        return row

    # On a GPU a process is mostly its start, so two run beside each other.
    with ThreadPoolExecutor(2 if device.type == "cuda" else 1) as pool:
        return list(pool.map(add_memory, rows))


def whole_run(root, device, cache):
    """Two epochs of train.py in a process of its own, as a user starts it: one row of values."""
    command = [sys.executable, str(Path(__file__).parent.parent / "train.py"), "--task", "acl"]
    command += ["--plane", PLANES[0], "--data-dir", str(root), "--models-dir", str(root / "models")]
    command += ["--logs-dir", str(root / "logs"), "--epochs", "2", "--no-pretrained"]
    command += ["--device", device.type, "--cache", cache]
    began, epochs = time.perf_counter(), []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout:
            first = line.split()[:1]
            if first == ["epoch"]:  # the head of the table of epochs: the first step comes next
                start_up = time.perf_counter() - began
                last = start_up
            elif first and first[0].isdigit():
                now = time.perf_counter() - began
                epochs.append((now - last, psutil.Process(child.pid).memory_info().rss))
                last = now
    if child.returncode:
        raise RunError(f"train.py ended with status {child.returncode}")
    (one, after_one), (two, after_two) = epochs
    data_sets = both_splits(root)
    volumes = sum(exams.nbytes for exams in data_sets)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # Linux counts in KiB
    return {
        "exams": sum(map(len, data_sets)),
        "start-up s": start_up,
        "epoch 1 s": one,
        "epoch 2 s": two,
        "volumes GB": volumes / 1e9,
        "GB after epoch 1": after_one / 1e9,
        "GB after epoch 2": after_two / 1e9,
        "peak GB": peak / 1e9,
        "peak less volumes GB": (peak - volumes) / 1e9,
    }


def chosen(makers, only):
    """The makers that `only` names, None for all that take no minutes to compile.

    Raises:
        InputError: there is no such variant.
    """
    if unknown := set(only or ()) - set(makers):
        raise InputError(
            f"--only {', '.join(sorted(unknown))}: no such variant on this device; "
            f"there are {', '.join(makers)}"
        )
    names = only or [name for name in makers if not name.startswith(COMPILED)]
    return {name: makers[name] for name in names}


def run(args):
    """Measure, print the table and write it."""
    device = pick_device(args.device)
    precision = pick_precision("auto", device)
    cli.print_start_up(vars(args), device, precision)
    other = args.growth or args.at_once or args.whole_run or args.backbones is not None
    if args.data_dir and other:
        raise InputError("--data-dir: for the table of an epoch only; leave the other option out")
    if args.growth:
        rows, what = growth(device, args.runs), "growth"
    else:
        with tempfile.TemporaryDirectory() as folder:
            if not args.data_dir:
                counts = {"train": args.exams, "valid": args.valid}
                write_exams(Path(folder), counts, mrnet_slices)
            if args.backbones is not None:
                rows = backbones(args.backbones, Path(folder), device, args.runs)
                what = "backbones"
            elif args.at_once:
                rows = at_once(args.at_once, Path(folder), device, args.runs)
                what = "at-once"
            elif args.whole_run:
                rows, what = [whole_run(Path(folder), device, args.cache)], "run"
            else:
                what = "own-exams" if args.data_dir else "epoch"
                makers = chosen(variants(device, args.workers, Path(folder) / "logs"), args.only)
                both = zip(
                    (args.exams, args.valid), both_splits(args.data_dir or folder), strict=True
                )
                sets = [exams.subset(range(min(n, len(exams)))) for n, exams in both]
                for times, slices in measure(makers, sets, device, args.cache, args.runs):
                    rows = table(times, slices)
                    rows += [] if args.data_dir else [floor_row(device, precision)]
                    save(rows, what, device, args.out)  # so an interruption leaves some rounds
                print(
                    f"an epoch of {sets[0].plane}: {len(sets[0])} exams with {slices[0]} slices, "
                    f"and {len(sets[1])} with {slices[1]} to validate; medians of {args.runs} "
                    "rounds after a warm-up"
                )
    print("\n" + tabulate(rows, headers="keys", floatfmt=".2f"))
    print(f"\nwritten  {save(rows, what, device, args.out)}")


if __name__ == "__main__":
    cli.exit_with_status(lambda: run(parse_arguments()))
