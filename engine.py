"""What all scripts share: device, precision, the loops of an epoch, start-up, exit status.

A root file of its own, because nothing imports a script and training, stacking, prediction and the
benchmark must run the very same loops.
"""

import errno
import importlib.metadata
import os
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from scipy.special import expit
from tqdm import tqdm

from dataloader import PLANES, Augmentation, InputError
from metrics import MetricError

PRECISIONS = ("auto", "fp32", "bf16")
CACHES = ("auto", "device", "ram", "disk")
# Room to leave beside cached volumes: what a training step on the largest exam takes.
DEVICE_ROOM, RAM_ROOM = 2e9, 1.5e9


class RunError(Exception):
    """The run failed for a reason outside the code; the message is one line. Exit status 1."""


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
    except KeyboardInterrupt as interrupt:
        status, message = 130, f"interrupted. {interrupt}".strip()
    except torch.OutOfMemoryError:
        status, message = 1, "failed: out of device memory; try --cache disk, --precision bf16"
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


def keep_volumes(data_sets, where, device):
    """Keep the volumes of all data sets where training reads them fastest, and say so.

    Args:
        where: "device", "ram", "disk" (read again in every epoch), or "auto" for the first of
            these with room.
    """
    wanted = sum(exams.nbytes for exams in data_sets)
    room = {"ram": psutil.virtual_memory().available - RAM_ROOM}
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


def autocast(device, precision):
    """Context in which convolutions run in `precision`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


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
    """Print the one block that says what runs: device, versions, commit, arguments."""
    said = " ".join(f"{name} {version}" for name, version in versions().items())
    print(f"device     {device} ({device_name(device)}), {precision}")
    print(f"versions   {said}")
    print(f"commit     {git_sha()}")
    print("arguments  " + " ".join(f"{k}={v}" for k, v in sorted(vars(args).items())))


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


def train_epoch(model, exams, optimizer, device, precision, what="train"):
    """One pass over all exams in random order, one exam a step.

    Random numbers come from torch's default generator: seed it before each epoch and the epoch is
    the same wherever training was resumed.

    Args:
        exams: MRDataset with an Augmentation, another transform or none.

    Returns:
        order int (n,), and logits and weighted losses float32 (n,), in the order of the steps.
    """
    model.train()
    n = len(exams)
    order = torch.randperm(n).tolist()
    transforms = [exams.transform] * n
    if isinstance(exams.transform, Augmentation):  # all draws cross to the device at once
        poses = exams.transform.draw(n).to(device)
        transforms = [partial(exams.transform, pose=pose) for pose in poses]
    labels = torch.from_numpy(exams.labels[order]).to(device)
    weights = torch.from_numpy(exams.weights[order]).to(device)
    logits, losses = torch.empty(n, device=device), torch.empty(n, device=device)
    for step, i in enumerate(progress(order, what)):
        volume = exams.exam(i, transforms[step], device)
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, precision):
            logit = model(volume[None])  # (s, 1, H, W) -> (1, s, 1, H, W) -> (1, 1)
        loss = F.binary_cross_entropy_with_logits(
            logit[0], labels[step : step + 1], weights[step : step + 1]
        )
        loss.backward()
        optimizer.step()
        logits[step], losses[step] = logit.detach()[0, 0], loss.detach()
    return np.array(order), logits.cpu().numpy(), losses.cpu().numpy()


@torch.inference_mode()
def predict(model, exams, device, precision, what="predict"):
    """Logits of all exams, in their order, without augmentation: float32 (n,)."""
    model.eval()
    logits = torch.empty(len(exams), device=device)
    for i in progress(range(len(exams)), what):
        with autocast(device, precision):
            logits[i] = model(exams.exam(i, None, device)[None])[0, 0]
    return logits.cpu().numpy()


def combine(stack, probabilities):
    """What a stack makes of the planes that are there.

    Args:
        stack: dict as `checkpoint.load_stack` returns it.
        probabilities: {plane: float64 (n,)}, at least one plane.

    Returns:
        float64 (n,) stacked probability, and the threshold of this set of planes.
    """
    planes = [plane for plane in PLANES if plane in probabilities]
    combination = stack["combinations"]["+".join(planes)]
    features = np.stack([probabilities[plane] for plane in planes], axis=1)  # (n, planes)
    if stack["features"] == "logit":
        features = logit(features)
    score = features @ np.asarray(combination["coefficients"]) + combination["intercept"]
    return expit(score), combination["threshold"]


def losses_of(labels, weights, logits):
    """Class-weighted cross-entropy of each exam: three float32 (n,) -> float32 (n,)."""
    logits, labels, weights = (torch.from_numpy(x) for x in (logits, labels, weights))
    return F.binary_cross_entropy_with_logits(logits, labels, weights, reduction="none").numpy()


def sigmoid(logits):
    """Probabilities of logits, float64."""
    return expit(np.asarray(logits, np.float64))


def logit(probabilities):
    """Log odds of probabilities, finite even for 0 and 1."""
    tiny = np.finfo(np.float32).tiny
    p = np.asarray(probabilities, np.float64)
    return np.log(np.clip(p, tiny, None)) - np.log(np.clip(1 - p, tiny, None))
