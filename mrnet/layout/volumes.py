"""The volumes of a data folder, one .npy for each exam and plane. Without torch."""

import io
from pathlib import Path

import numpy as np

from mrnet.errors import InputError, is_out_of_memory, one_line
from mrnet.files import open_regular, write_bytes

SIDE = 256  # px; MRNet's slices
WINDOW = (0.5, 99.5)  # percentiles of a volume that become 0 and 255
MAX_VOXELS = 2**26  # 1024 slices of 256 px; MRNet's largest exam has 61
SMALLEST_SIDE = 63  # px: AlexNet's third pooling has nothing left to pool below it


def volume_path(root_dir, split, plane, exam_id):
    """Where an exam's volume lies: ids have no leading zeros in the CSV, files have four digits."""
    return Path(root_dir) / split / plane / f"{int(exam_id):04d}.npy"


def open_volume(path):
    """Memory-map one volume and check its header. Never unpickles.

    Returns:
        read-only array (s, H, W), usually uint8.

    Raises:
        InputError: missing, truncated, pickled or not a .npy, not three-dimensional, empty, or
            smaller than 63 px.
    """
    try:
        open_regular(path).close()  # NumPy would wait for a pipe's writer
        volume = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise InputError(f"{path}: no such volume; add it, or remove its id from the CSV") from None
    except Exception as error:  # numpy's header parser raises many kinds
        if is_out_of_memory(error):
            raise MemoryError(str(path)) from None  # the file is not to blame
        empty = Path(path).is_file() and Path(path).stat().st_size == 0
        reason = "it is empty" if empty else one_line(error)
        raise InputError(
            f"{path}: not a whole, plain .npy array ({reason}); copy or convert it again"
        ) from None
    if volume.size > MAX_VOXELS:
        raise InputError(f"{path}: {volume.shape}, more voxels than an exam has; convert it again")
    if volume.ndim != 3:
        raise InputError(f"{path}: {volume.ndim} dimensions {volume.shape}; expected (s, H, W)")
    if volume.shape[0] == 0:
        raise InputError(f"{path}: no slices; convert the exam again or leave it out of the CSV")
    if min(volume.shape[1:]) < SMALLEST_SIDE:
        raise InputError(
            f"{path}: slices of {volume.shape[1]} x {volume.shape[2]} px; "
            f"at least {SMALLEST_SIDE} px are needed, resize them"
        )
    if volume.dtype.kind not in "uif":
        raise InputError(f"{path}: holds {volume.dtype}, expected uint8 grey levels 0 to 255")
    return volume


def read_volume(path):
    """One volume from disk: uint8 array (s, H, W).

    Raises:
        InputError: as `open_volume`; values that are not whole numbers from 0 to 255; a blank
            volume, whose values are all equal.
    """
    try:
        volume = open_volume(path)
        if volume.dtype == np.uint8:
            return refuse_blank(path, np.array(volume, order="C"))
        grey = np.empty(volume.shape, np.uint8)
        for image, out in zip(volume, grey, strict=True):
            if not ((image >= 0) & (image <= 255) & (image == np.round(image))).all():  # nor NaN
                raise InputError(
                    f"{path}: {volume.dtype} values from {volume.min()} to {volume.max()}; "
                    "rescale them to whole grey levels 0 to 255 (uint8)"
                )
            out[:] = image
        return refuse_blank(path, grey)
    except OSError as error:
        if is_out_of_memory(error):
            raise MemoryError(str(path)) from None
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def refuse_blank(path, volume):
    """The volume at `path`, uint8 (s, H, W); InputError where all of its values are equal."""
    if volume.min() == volume.max():
        raise InputError(
            f"{path}: blank, every voxel is {volume.min()}; convert the exam again or leave it out "
            "of the CSV"
        )
    return volume


def check_side(path, shape, smallest, backbone):
    """Raise InputError where a volume's slices are smaller than a backbone needs.

    Args:
        shape: (s, H, W) of the volume at `path`.
        smallest: px.
    """
    if min(shape[1:]) < smallest:
        raise InputError(
            f"{path}: slices of {shape[1]} x {shape[2]} px; {backbone} needs at least {smallest} "
            "px, resize them or take another --backbone"
        )


def write_volume(path, volume):
    """Array -> .npy file, without pickle."""
    data = io.BytesIO()  # written directly to a file, NumPy hides why a write failed
    np.save(data, volume, allow_pickle=False)
    write_bytes(path, data.getvalue())
