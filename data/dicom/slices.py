"""A volume cut into slices of one plane, oriented as MRNet's: grey levels, direction, size."""

import numpy as np
from PIL import Image

from common.errors import InputError
from data.common import TARGET

SIDE = 256  # px; MRNet's slices
WINDOW = (0.5, 99.5)  # percentiles of a volume that become 0 and 255
MAX_OBLONG = 20  # ratio of a slice's sides, as a damaged PixelSpacing gives
PLANE_OF_AXIS = {target[0][0]: plane for plane, target in TARGET.items()}


def plane_of(direction):
    """Unit vector across the slices -> name of the nearest plane, degrees from it."""
    axis = int(np.argmax(np.abs(direction)))
    return PLANE_OF_AXIS[axis], float(np.degrees(np.arccos(min(1.0, abs(direction[axis])))))


def window(grey, file):
    """Any float32 array -> 0..255 between the WINDOW percentiles, in place."""
    finite = np.isfinite(grey)
    if not finite.all():
        grey[~finite] = grey[finite].min() if finite.any() else 0
    low, high = np.percentile(grey, WINDOW)
    if not high > low:
        low, high = float(grey.min()), float(grey.max())
    if not high > low:
        raise InputError(f"{file}: every pixel has the same value; export the series again")
    np.subtract(grey, low, out=grey)
    np.multiply(grey, 255 / (high - low), out=grey)
    return np.clip(grey, 0, 255, out=grey)


def cut(grey, series, axis, square):
    """Cut a volume along one of its axes into slices as CONVENTION has them.

    Args:
        grey: float32 0..255 of series.shape.
        axis: the array axis that becomes the slices.
        square: "pad" keeps all of the slices' longer side, "crop" all of the shorter.

    Returns:
        uint8 (s, 256, 256), square pixels.
    """
    plane, _ = plane_of(series.directions[axis])
    target = TARGET[plane]
    rows, columns = (a for a in range(3) if a != axis)
    along = np.abs(series.directions)
    down, right = target[1][0], target[2][0]
    if along[rows, down] + along[columns, right] < along[columns, down] + along[rows, right]:
        rows, columns = columns, rows
    order = (axis, rows, columns)
    grey = grey.transpose(order)
    flips = [
        i
        for i, (a, (patient, sign)) in enumerate(zip(order, target, strict=True))
        if series.directions[a][patient] * sign < 0
    ]
    grey = np.flip(grey, flips)
    slab, s = series.slab(axis), series.slices(axis)
    if slab > 1:
        # (s * slab, H, W) -> (s, H, W)
        grey = grey[: s * slab].reshape(s, slab, *grey.shape[1:]).mean(axis=1)
    height, width = grey.shape[1] * series.spacing[rows], grey.shape[2] * series.spacing[columns]
    if max(height, width) > MAX_OBLONG * min(height, width):
        raise InputError(
            f"{series.file}: slices of {height:.3g} x {width:.3g} mm; correct the pixel spacing"
        )
    return to_square(grey, height, width, square)


def to_square(grey, height, width, square):
    """float32 (s, H, W) 0..255, slices of height x width mm -> uint8 (s, 256, 256)."""
    pixel = (max if square == "pad" else min)(height, width) / SIDE
    height, width = max(1, round(height / pixel)), max(1, round(width / pixel))
    top, left = (height - SIDE) // 2, (width - SIDE) // 2
    inside = (slice(max(0, top), top + SIDE), slice(max(0, left), left + SIDE))
    out = np.zeros((len(grey), SIDE, SIDE), np.uint8)
    for image, to in zip(grey, out, strict=True):
        image = Image.fromarray(np.ascontiguousarray(image))
        image = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))[inside]
        y, x = max(0, -top), max(0, -left)
        to[y : y + image.shape[0], x : x + image.shape[1]] = np.rint(image)
    return out
