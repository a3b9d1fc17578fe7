"""Grey levels and sizes: scans as MRNet's slices, 256 px square, 0 to 255."""

import math

import numpy as np
from PIL import Image

from mrnet.errors import InputError
from mrnet.layout.volumes import SIDE, WINDOW

NEAREST = 2**15
LEVELS = 2**17  # whole numbers up to this range are counted


def percentiles(grey, wanted):
    """`np.percentile`, its very numbers; of whole numbers, as nearly all scans are, by counting
    them: 3.6 times as fast.

    Args:
        grey: float32, finite.
        wanted: percentages.
    """
    low, high = float(grey.min()), float(grey.max())
    if not (low.is_integer() and high - low < LEVELS):
        return np.percentile(grey, wanted)
    counts = np.zeros(int(high - low) + 1, np.int64)
    for image in grey.reshape(len(grey), -1):  # a slice stays in the processor's cache
        levels = (image - np.float32(low)).astype(np.intp)
        if not np.array_equal(levels + low, image):
            return np.percentile(grey, wanted)
        counts += np.bincount(levels, minlength=len(counts))
    below = counts.cumsum()
    places = np.asarray(wanted) / 100 * (grey.size - 1)
    found = []
    for place in places:
        pair = np.searchsorted(below, [np.floor(place), np.ceil(place)], side="right")
        pair = (pair + low).astype(np.float32)
        found.append(np.quantile(pair, place - np.floor(place)))
    return np.array(found)


def window(grey, file):
    """Any float32 array -> 0..255 between the WINDOW percentiles, in place.

    Raises:
        InputError: every pixel has the same value.
    """
    finite = np.isfinite(grey)
    if not finite.all():
        grey[~finite] = grey[finite].min() if finite.any() else 0
    low, high = percentiles(grey, WINDOW)
    if not high > low:
        low, high = float(grey.min()), float(grey.max())
    # float32 has no grey levels between numbers that are so near to each other
    if not max(abs(low), abs(high)) / NEAREST < high - low < math.inf:
        raise InputError(f"{file}: every pixel has the same value; export or unpack it again")
    np.subtract(grey, low, out=grey)
    np.multiply(grey, 255 / (high - low), out=grey)
    return np.clip(grey, 0, 255, out=grey)


def square_grid(height, width, square="pad", field_of_view=None):
    """How `to_square` lays a slice on its square; arguments as there.

    Returns:
        Rows and columns that the whole slice is resampled to, and which of them are the square's
        first row and column: below 0 where the slice is smaller and gets a margin.
    """
    pixel = (field_of_view or (max if square == "pad" else min)(height, width)) / SIDE
    height, width = max(1, round(height / pixel)), max(1, round(width / pixel))
    return height, width, (height - SIDE) // 2, (width - SIDE) // 2


def to_square(grey, height, width, square="pad", field_of_view=None):
    """Slices with square pixels on a square: float32 (s, H, W) 0..255 -> uint8 (s, SIDE, SIDE).

    Args:
        height, width: of a slice, in mm or any other unit.
        square: "pad" keeps all of the slices' longer side, "crop" all of the shorter.
        field_of_view: side of what is kept, in the unit of `height`, instead: a pixel is then the
            same size in every exam.
    """
    height, width, top, left = square_grid(height, width, square, field_of_view)
    inside = (slice(max(0, top), top + SIDE), slice(max(0, left), left + SIDE))
    out = np.zeros((len(grey), SIDE, SIDE), np.uint8)
    for image, to in zip(grey, out, strict=True):
        image = Image.fromarray(np.ascontiguousarray(image))
        image = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))[inside]
        y, x = max(0, -top), max(0, -left)
        to[y : y + image.shape[0], x : x + image.shape[1]] = np.rint(image)
    return out
