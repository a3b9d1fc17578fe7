"""Files of tensors, numbers and strings: written whole or not at all, read without running them."""

import hashlib
import io
import pickle
import pickletools
import re
import zipfile
from typing import NamedTuple

import torch

from mrnet.errors import InputError, is_out_of_memory, one_line
from mrnet.files import MAX_BYTES, open_regular, open_zip, read_bytes, write_bytes

FORMAT = "mrnet-model-4"
STATE_FORMAT = "mrnet-training-4"
MAX_STATE = 2**32  # bytes of a training's state, which holds the weights several times
# What torch.save writes into a file of tensors and plain values.
BUILDS_TENSORS = re.compile(
    r"torch \w+Storage|torch\._utils _rebuild_(tensor_v2|parameter)|collections OrderedDict"
)


def read_checkpoint(path, expected=FORMAT):
    """A dict of tensors, numbers and strings that `write_checkpoint` wrote.

    Args:
        expected: its format.

    Raises:
        InputError: missing, damaged, or of another format.
    """
    return read_with_digest(path, expected)[0]


def read_with_digest(path, expected):
    """`read_checkpoint`, and the `digest_of` the very file that was read: another may lie there a
    moment later."""
    try:
        data = read_bytes(path, MAX_STATE if expected == STATE_FORMAT else MAX_BYTES)
        check_archive(data)
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such saved model") from None
    except PermissionError:
        raise InputError(f"{path}: no permission to read it; change its permissions") from None
    except Exception as error:  # torch raises many kinds for a damaged archive
        if is_out_of_memory(error):
            raise
        why = one_line(error)
        if isinstance(error, pickle.UnpicklingError):  # whose text advises to run what is in it
            why = "it holds more than tensors and plain values"
        raise InputError(
            f"{path}: damaged, or not a saved model ({why}); delete it and train again"
        ) from None
    if not isinstance(content, dict) or content.get("format") != expected:
        raise InputError(
            f"{path}: not a {expected} file; it was made by another program or version, delete it "
            "and train again"
        )
    return content, hashlib.sha256(data).hexdigest()


def check_archive(data):
    """Raise ValueError where a saved file takes more memory than its bytes: torch.save compresses
    nothing, and names no function but those that build tensors.

    Args:
        data: bytes of the file.
    """
    with open_zip(io.BytesIO(data)) as archive:
        members = archive.infolist()
        size = sum(info.file_size for info in members)
        if size > len(data) or any(info.compress_type != zipfile.ZIP_STORED for info in members):
            raise ValueError(f"it unpacks to {size >> 20} MiB")
        for name in (name for name in archive.namelist() if name.endswith("/data.pkl")):
            for code, value, _ in pickletools.genops(archive.read(name)):
                if code.name.endswith("GLOBAL") and not BUILDS_TENSORS.fullmatch(value or ""):
                    raise pickle.UnpicklingError


def write_checkpoint(path, content):
    """Write a dict of tensors, numbers and strings atomically."""
    # Serialised in memory first: on a full disk torch.save fails with a RuntimeError of its own.
    serialised = io.BytesIO()
    torch.save(content, serialised)
    write_bytes(path, serialised.getvalue())


def digest_of(path):
    """SHA-256 of a file, hexadecimal: a stack identifies by it the networks it was fitted on."""
    with open_regular(path, most=None) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def body_digest(model):
    """SHA-256 of all that an exam's features come from, hexadecimal: of all but the classifiers.

    The findings of one training that chose the same epoch have it in common.

    Args:
        model: MRNet or MultiPlaneMRNet.
    """
    found = hashlib.sha256(f"{type(model).__name__} {model.backbone} {model.pooling}".encode())
    for name, tensor in model.state_dict().items():
        if "classifier" not in name.split("."):
            found.update(name.encode())
            found.update(tensor.cpu().numpy().tobytes())
    return found.hexdigest()


class BackboneKey(NamedTuple):
    """What the features of an exam depend on, beside the exam, the device and the precision."""

    digest: str  # `body_digest`
    planes: tuple  # that went through it
    intensity: str
    channels: str
