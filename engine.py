"""What all scripts share: device, precision, the loops of an epoch, start-up, exit status.

A root file of its own, because nothing imports a script and training, stacking, prediction and the
benchmark must run the very same loops.
"""

import errno
import importlib.metadata
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from scipy.special import expit
from tqdm import tqdm

from common.errors import InputError, Interrupted, RunError, one_line
from dataloader import PLANES, Augmentation, feed
from metrics import MetricError

PRECISIONS = ("auto", "fp32", "bf16")
CACHES = ("auto", "device", "ram", "disk")
# Room to leave beside cached volumes: what a training step on the largest exam takes.
DEVICE_ROOM, RAM_ROOM = 2e9, 1.5e9


def run(main):
    """Call `main` and leave with the project's exit status; users see one line, no traceback."""
    script = Path(sys.argv[0]).name
    try:
        main()
        status = 0
    except (InputError, MetricError) as error:
        status, message = 2, f"error: {error}"
    except RunError as error:
        status, message = 1, f"failed: {error}"
    except Interrupted as stop:
        status, message = 128 + stop.number, f"interrupted. {stop}"
    except KeyboardInterrupt as interrupt:
        status, message = 130, f"interrupted. {interrupt}".strip()
    except torch.OutOfMemoryError:
        status, message = 1, "failed: out of device memory; try --cache disk, --precision bf16"
    except (MemoryError, RuntimeError) as error:
        # oneDNN's convolutions have no better words for it than the last two.
        said = ("can't allocate memory", "can't start new thread", "could not create a primitive",
                "could not create a memory", "could not execute a primitive")  # fmt: skip
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in said):
            raise
        status, message = (
            1,
            "failed: out of memory; close other programs, or train with --cache disk",
        )
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status, message = 1, "failed: nobody reads the output any more"
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO):
            raise
        status, message = 1, f"failed: {error.filename or 'a file'}: {error.strerror}"
    if status:
        print(f"{script}: {message}", file=sys.stderr)
    sys.exit(status)


@contextmanager
def stop_after_step():
    """Within it SIGINT, SIGTERM and SIGHUP only ask `train_epoch` to stop; a second one stops at
    once. A signal that was ignored from the start, as nohup does, stays ignored.

    Yields:
        list that holds the signal's number once one has come.
    """

    def ask(number, frame):
        asked.append(number)
        restore()
        print("\nstopping after this step; the same again stops at once", file=sys.stderr)

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    before = catch_signals(ask)
    try:
        yield asked
    finally:
        restore()
        asked.clear()


asked = []  # the signal that asks to stop


def catch_signals(handler):
    """Have `handler` called for what asks a process to end -> {number: handler of before}."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in numbers}


def command_to_resume():
    """What the user types to go on."""
    words = [word for word in sys.argv[1:] if word != "--resume"]
    return shlex.join(["python", Path(sys.argv[0]).name, *words, "--resume"])


class NoWriter:
    """Stands in for TensorBoard's SummaryWriter where logs cannot be written."""

    def __getattr__(self, name):
        return lambda *args, **more: None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def open_writer(folder, purge_step=None):
    """TensorBoard's SummaryWriter, or a NoWriter, said in one line, where it cannot write."""
    # Half a second to import, and predicting does not need it.
    from torch.utils.tensorboard import SummaryWriter

    try:
        return SummaryWriter(folder, purge_step=purge_step)
    except OSError as error:
        print(f"logs       NONE: {folder} cannot be written ({error.strerror}); going on without")
        return NoWriter()


def add_machine_arguments(parser):
    """--device and --precision, the same for every script that runs a network."""
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: a GPU if there is one",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="auto takes bf16 where the device has it: about twice as fast, and AUCs differ by no "
        "more than those of two seeds",
    )


def pick_device(name):
    """ "auto", "cpu" or "cuda" -> torch.device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device here; use --device cpu (or auto)")
    return torch.device(name)


def has_bf16(device):
    """Whether the device multiplies bfloat16 natively; elsewhere autocast is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def pick_precision(name, device):
    """ "auto", "fp32" or "bf16" -> "fp32" or "bf16"."""
    if name == "bf16" and not has_bf16(device):
        raise InputError(f"--precision bf16: this {device.type} has no bfloat16 units; use fp32")
    return ("bf16" if has_bf16(device) else "fp32") if name == "auto" else name


def available_memory(root=Path("/")):
    """Bytes of memory that this process may still take: the machine's, or its container's less.

    Args:
        root: where /proc and /sys are looked for.
    """
    room = psutil.virtual_memory().available
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return room
    groups = {}
    for line in lines:  # "0::/path" is version 2, "9:memory:/path" version 1
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            groups["memory" if controllers else ""] = path.strip("/")
    for controller, path in groups.items():
        top = root / "sys/fs/cgroup" / controller
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if not controller:
            names = ("memory.max", "memory.current", "inactive_file")
        # The limits of all groups above count too; within a container the path may not be there.
        for folder in [top / path, *(top / path).parents]:
            if folder.is_relative_to(top):
                room = min(room, cgroup_room(folder, *names))
    return max(room, 0)


def cgroup_room(folder, limit, usage, reclaimable):
    """Bytes between a control group's limit and what it uses; infinite without a limit."""
    try:
        most = (folder / limit).read_text().strip()
        used = int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return math.inf if most == "max" else int(most) - used + int(stat.get(reclaimable, 0))
    except (OSError, ValueError):
        return math.inf


def keep_volumes(data_sets, where, device):
    """Keep the volumes of all data sets where training reads them fastest, and say so.

    Args:
        where: "device", "ram", "disk" (read again in every epoch), or "auto" for the first of
            these with room.
    """
    wanted = sum(exams.nbytes for exams in data_sets)
    room = {"ram": available_memory() - RAM_ROOM}
    if device.type == "cuda":
        room = {"device": torch.cuda.mem_get_info(device)[0] - DEVICE_ROOM} | room
    if where == "auto":
        where = next((place for place in room if wanted <= room[place]), "disk")
    if where == "device" and device.type == "cpu":
        where = "ram"
    if where != "disk":
        if wanted > room[where]:
            raise InputError(
                f"--cache {where}: {wanted / 1e9:.1f} GB of volumes, room for "
                f"{max(room[where], 0) / 1e9:.1f} GB; use --cache disk (or auto)"
            )
        for exams in data_sets:
            exams.keep(device if where == "device" else "cpu", partial(progress, what="reading"))
    print(f"cache      {where} ({wanted / 1e9:.2f} GB of volumes)")
    return where


def autocast(device, precision):
    """Context in which convolutions run in `precision`."""
    # Each weight is used once a step, so autocast's cache of cast weights would save nothing.
    return torch.autocast(
        device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False
    )


def git_sha():
    """Commit of the code, "+" appended when files differ from it; "unknown" outside git."""
    here = Path(__file__).parent
    try:
        git = ["git", "-C", str(here)]
        sha = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return sha + ("+" if changed else "")


def versions():
    """Versions of what the numbers depend on."""
    names = ("torchvision", "numpy", "scikit-learn")
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **{name: importlib.metadata.version(name) for name in names},
    }


def device_name(device):
    """What the device calls itself, with the threads in use on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            name = next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        pass
    return f"{name}, {torch.get_num_threads()} threads"


def start_up(args, device, precision):
    """Print the one block that says what runs: device, versions, commit, arguments -> commit."""
    said = " ".join(f"{name} {version}" for name, version in versions().items())
    print(f"device     {device} ({device_name(device)}), {precision}")
    print(f"versions   {said}")
    commit = git_sha()
    print(f"commit     {commit}")
    plain = {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in vars(args).items()}
    print("arguments  " + " ".join(f"{k}={v}" for k, v in sorted(plain.items())))
    return commit


def name_dataset(dataset):
    """What a data set's description says in a few words; see `dataloader.read_dataset`."""
    if dataset is None:
        return "not described (no dataset.json)"
    said = one_line(f"{dataset['name']}, version {dataset['version']}")
    return said + (", SYNTHETIC exams" if dataset["synthetic"] else "")


def progress(items, what, total=None):
    """A progress bar on a terminal, nothing in a file."""
    return tqdm(
        items,
        desc=what,
        total=total,
        leave=False,
        disable=not sys.stderr.isatty(),
        unit="exam",
        dynamic_ncols=True,
    )


def training_step(model, optimizer, volume, label, weight, precision):
    """Forward, class-weighted cross-entropy, backward, update, for one exam.

    Args:
        volume: float32 (s, 1, H, W) as the network is fed it; label, weight: float32 (1,).

    Returns:
        logit (1,) and weighted loss (), on the device: nothing here waits for it.
    """
    optimizer.zero_grad(set_to_none=True)
    with autocast(volume.device, precision):
        logit = model(volume[None])[0]  # (s, 1, H, W) -> (1, s, 1, H, W) -> (1, 1) -> (1,)
    del volume  # backward, where memory peaks, does not need it
    loss = F.binary_cross_entropy_with_logits(logit, label, weight)
    loss.backward()
    optimizer.step()
    return logit.detach(), loss.detach()


def fill_bucket(volume, buffer):
    """Copy (s, H, W) into (b, H, W), b >= s, repeating the last slice.

    Repeated slices change neither the maximum over slices nor the sum of its gradients.
    """
    s = len(volume)
    buffer[:s].copy_(volume, non_blocking=True)
    buffer[s:].copy_(volume[-1:].expand_as(buffer[s:]), non_blocking=True)


class GraphedSteps:
    """Whole training steps as CUDA graphs, one for each bucket of slice counts.

    Replaying a graph costs one launch where a step launches some hundred kernels, which is what an
    eager step of this small network waits for. The graph holds augmentation, forward, backward and
    update; the optimizer must be capturable with its learning rate in a tensor.
    """

    BUCKET = 4  # slices; at most 3 are repeated
    EAGER = 3  # steps before the first capture: the optimizer's state and the libraries' must exist

    def __init__(self, model, optimizer, precision):
        self.model, self.optimizer, self.precision = model, optimizer, precision
        self.graphs, self.pool, self.stream = {}, None, torch.cuda.Stream()
        self.eager_left = self.EAGER

    def __call__(self, exams, i, pose, label, weight):
        """One step on exam i: logit (1,) and loss (), valid until the next call."""
        volume = exams.volume(i)
        bucket = -(-len(volume) // self.BUCKET) * self.BUCKET
        key = (bucket, *volume.shape[1:], pose is None)
        if self.eager_left:
            self.eager_left -= 1
            buffers = self.make_buffers(key, volume.device)
            self.fill(buffers, volume, pose, label, weight)
            with torch.cuda.stream(self.stream):
                self.stream.wait_stream(torch.cuda.default_stream())
                results = self.run(exams, *buffers)
            torch.cuda.default_stream().wait_stream(self.stream)
            return results
        if key not in self.graphs:
            self.graphs[key] = self.capture(exams, key, volume.device)
        graph, buffers, results = self.graphs[key]
        self.fill(buffers, volume, pose, label, weight)
        graph.replay()
        return results

    def make_buffers(self, key, device):
        """What a graph reads: volume uint8 (b, H, W), pose (4,) or None, label and weight (1,)."""
        volume = torch.zeros(key[:3], dtype=torch.uint8, device=device)
        pose = None if key[3] else torch.zeros(4, device=device)
        return volume, pose, torch.zeros(1, device=device), torch.zeros(1, device=device)

    def fill(self, buffers, volume, pose, label, weight):
        fill_bucket(volume, buffers[0])
        for buffer, value in zip(buffers[1:], (pose, label, weight), strict=True):
            if buffer is not None:
                buffer.copy_(value)

    def run(self, exams, volume, pose, label, weight):
        transform = None if pose is None else partial(exams.transform, pose=pose)
        fed = feed(volume, exams.intensity, transform)
        return training_step(self.model, self.optimizer, fed, label, weight, self.precision)

    def capture(self, exams, key, device):
        buffers = self.make_buffers(key, device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            results = self.run(exams, *buffers)
        self.pool = self.pool or graph.pool()
        return graph, buffers, results


def random_states(device):
    """States of torch's generators, to go on with within an epoch: CPU, and the device's own."""
    states = {"random": torch.get_rng_state()}
    if device.type == "cuda":  # dropout draws there
        states["device_random"] = torch.cuda.get_rng_state(device)
    return states


def train_epoch(model, exams, optimizer, device, precision, what="train", graphs=None, done=None):
    """One pass over all exams in random order, one exam a step.

    Random numbers come from torch's default generator: seed it before each epoch and the epoch is
    the same wherever training was resumed.

    Args:
        exams: MRDataset with an Augmentation, another transform or none; another than these two
            cannot be part of a graph.
        graphs: GraphedSteps, for volumes kept on a CUDA device.
        done: what an interrupted epoch left, to go on with: {"logits", "losses"}, float32 (k,), and
            what `random_states` gave.

    Returns:
        order int (n,), and logits and weighted losses float32 (n,), in the order of the steps; only
        those of the first steps where `stop_after_step` was asked to stop.
    """
    if graphs is not None and not isinstance(exams.transform, Augmentation | None):
        raise ValueError(f"no CUDA graph has a {type(exams.transform).__name__}; leave graphs out")
    model.train()
    n = len(exams)
    order = torch.randperm(n).tolist()
    poses, transforms = [None] * n, [exams.transform] * n
    if isinstance(exams.transform, Augmentation):  # all draws cross to the device at once
        poses = exams.transform.draw(n).to(device)
        transforms = [partial(exams.transform, pose=pose) for pose in poses]
    labels = torch.from_numpy(exams.labels[order]).to(device)
    weights = torch.from_numpy(exams.weights[order]).to(device)
    logits, losses = torch.empty(n, device=device), torch.empty(n, device=device)
    begin = 0
    if done is not None:
        begin = len(done["logits"])
        logits[:begin], losses[:begin] = done["logits"], done["losses"]
        torch.set_rng_state(done["random"])
        if "device_random" in done and device.type == "cuda":
            torch.cuda.set_rng_state(done["device_random"], device)
    end = begin
    for end, i in enumerate(progress(order[begin:], what), start=begin + 1):
        step = end - 1
        label, weight = labels[step : step + 1], weights[step : step + 1]
        if graphs is None:
            # No name for the volume, so that training_step can let go of it.
            logit, loss = training_step(
                model, optimizer, exams.exam(i, transforms[step], device), label, weight, precision
            )
        else:
            logit, loss = graphs(exams, i, poses[step], label, weight)
        logits[step : step + 1], losses[step] = logit, loss
        if asked:
            break
    return np.array(order), logits[:end].cpu().numpy(), losses[:end].cpu().numpy()


@torch.inference_mode()
def predict(model, exams, device, precision, what="predict"):
    """Logits of all exams, in their order, without augmentation: float32 (n,)."""
    model.eval()
    logits = torch.empty(len(exams), device=device)
    for i in progress(range(len(exams)), what):
        with autocast(device, precision):
            logits[i] = model(exams.exam(i, None, device)[None])[0, 0]
    return logits.cpu().numpy()


def stack_features(kind, planes, logits):
    """What the regression sees of each plane's networks: {plane: (n, networks)} -> (n, planes).

    Args:
        kind: "probability", the mean of the networks' probabilities, or "logit", of their logits.
    """
    values = sigmoid if kind == "probability" else np.asarray
    return np.stack([values(logits[plane]).mean(axis=1) for plane in planes], axis=1)


def combine(stack, logits):
    """What a stack makes of the planes that are there.

    Args:
        stack: dict as `checkpoint.load_stack` returns it.
        logits: {plane: float64 (n, networks)}, at least one plane.

    Returns:
        float64 (n,) stacked probability, and the threshold of this set of planes.
    """
    planes = [plane for plane in PLANES if plane in logits]
    combination = stack["combinations"]["+".join(planes)]
    features = stack_features(stack["features"], planes, logits)
    score = features @ np.asarray(combination["coefficients"]) + combination["intercept"]
    return expit(score), combination["threshold"]


def verdict(stack, logits):
    """What a stack says of one exam.

    Args:
        stack: dict as `checkpoint.load_stack` returns it.
        logits: {plane: [float, one for each network]}, at least one plane.

    Returns:
        stacked probability and threshold, floats, and "positive" or "negative".
    """
    columns = {plane: np.array([values]) for plane, values in logits.items()}
    (stacked,), threshold = combine(stack, columns)
    return float(stacked), threshold, "positive" if stacked >= threshold else "negative"


def losses_of(labels, weights, logits):
    """Class-weighted cross-entropy of each exam: three float32 (n,) -> float32 (n,)."""
    logits, labels, weights = (torch.from_numpy(x) for x in (logits, labels, weights))
    return F.binary_cross_entropy_with_logits(logits, labels, weights, reduction="none").numpy()


def sigmoid(logits):
    """Probabilities of logits, float64."""
    return expit(np.asarray(logits, np.float64))


@torch.inference_mode()
def predict_volume(networks, volume, device, precision):
    """Logits of one plane of one exam: list of float, one for each of its networks.

    Args:
        networks: list of (MRNet, intensity), as in `checkpoint.TaskModels`.
        volume: uint8 array (s, H, W).
    """
    logits, stored = [], torch.from_numpy(volume).to(device)
    for model, intensity in networks:
        with autocast(device, precision):
            logits.append(model(feed(stored, intensity)[None]).item())
    return logits


@torch.inference_mode()
def class_activation_maps(model, volume):
    """Where an exam's logit comes from, exactly.

    The logit is linear in the last feature maps: each channel's maximum over slices is the spatial
    mean of its map in one slice. That map, times the classifier's weight, over h * w, is what the
    channel adds; the sum over all slices and cells, plus the classifier's bias, is the logit. Class
    activation maps: Zhou et al., CVPR 2016.

    Args:
        model: MRNet.
        volume: float32 (s, 1, H, W) as the network is fed it, on the model's device.

    Returns:
        maps: float32 array (s, h, w), in units of the logit; above 0 speaks for the finding.
        logit: float, as `model` gives it in evaluation mode.
    """
    features = model.feature_maps(volume).float()  # (s, 256, h, w)
    s, channels, h, w = features.shape
    slices = features.mean(dim=(2, 3))  # (s, 256, h, w) -> (s, 256)
    exam, winner = slices.max(dim=0)  # (256,), and the slice that each channel took
    weight = model.classifier.weight[0]
    won = features[winner, torch.arange(channels, device=winner.device)]  # (256, h, w)
    maps = torch.zeros(s, h, w, device=features.device)
    maps.index_add_(0, winner, won * (weight / (h * w))[:, None, None])
    # No matrix product: within autocast it would be rounded to bf16, and the sum would not hold.
    logit = (exam * weight).sum().item() + model.classifier.bias.item()
    return maps.cpu().numpy(), logit
