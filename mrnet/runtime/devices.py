"""Where networks run: device, precision, where volumes are cached."""

import os
import platform
import sys

import torch

from mrnet.errors import InputError


def pick_device(name):
    """ "auto", "cpu", "cuda" or "mps" -> torch.device; makes a GPU's convolutions exact and
    repeatable.

    Raises:
        InputError: no such device.
    """
    is_there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((gpu for gpu in is_there if is_there[gpu]), "cpu")
    if not is_there.get(name, True):
        raise InputError(
            f"--device {name}: no {name.upper()} device here; use --device cpu (or auto)"
        )
    if name == "mps":
        let_mps_fall_back()
    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32; who wants speed has bf16
    torch.backends.cudnn.deterministic = True  # to the last digit, in the same time
    return torch.device(name)


def let_mps_fall_back():
    """Have operations that Apple's GPU lacks run on the CPU, of which torch warns: started again,
    as torch reads this setting when it is loaded."""
    if "PYTORCH_ENABLE_MPS_FALLBACK" not in os.environ:
        os.environ["PYTORCH_ENABLE_MPS_FALLBACK"] = "1"
        print("device     mps; what it lacks runs on the CPU", flush=True)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def has_bf16(device):
    """Whether the device multiplies bfloat16 natively; elsewhere autocast is slower than fp32."""
    if device.type == "mps":
        return False  # never tried there
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def pick_precision(name, device):
    """ "auto", "fp32" or "bf16" -> "fp32" or "bf16". Raises InputError without bf16 units."""
    if name == "bf16" and not has_bf16(device):
        raise InputError(f"--precision bf16: this {device.type} has no bfloat16 units; use fp32")
    return ("bf16" if has_bf16(device) else "fp32") if name == "auto" else name


def autocast(device, precision):
    """Context in which convolutions run in `precision`, "fp32" or "bf16"."""
    # Each weight is used once a step, so autocast's cache of cast weights would save nothing.
    return torch.autocast(
        device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False
    )


def device_name(device):
    """The device's product name, with the number of threads in use on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            name = next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        pass
    return f"{name}, {torch.get_num_threads()} threads"
