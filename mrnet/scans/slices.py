"""A volume cut into slices of one plane, oriented as MRNet's: grey levels, direction, size."""

import numpy as np

from mrnet.errors import InputError
from mrnet.layout.planes import TARGET
from mrnet.scans.pixels import to_square

MAX_OBLONG = 20  # ratio of a slice's sides, as a damaged PixelSpacing gives
PLANE_OF_AXIS = {target[0][0]: plane for plane, target in TARGET.items()}


def plane_of(direction):
    """Unit vector across the slices -> name of the nearest plane, degrees from it."""
    axis = int(np.argmax(np.abs(direction)))
    return PLANE_OF_AXIS[axis], float(np.degrees(np.arccos(min(1.0, abs(direction[axis])))))


def orient(series, axis):
    """The array axes of a Series that become slices, rows and columns, and which of these three
    (0, 1, 2) are then reversed."""
    target = TARGET[plane_of(series.directions[axis])[0]]
    rows, columns = (a for a in range(3) if a != axis)
    along = np.abs(series.directions)
    down, right = target[1][0], target[2][0]
    if along[rows, down] + along[columns, right] < along[columns, down] + along[rows, right]:
        rows, columns = columns, rows
    order = (axis, rows, columns)
    flips = [
        i
        for i, (a, (patient, sign)) in enumerate(zip(order, target, strict=True))
        if series.directions[a][patient] * sign < 0
    ]
    return order, flips


def cut(grey, series, axis, square, field_of_view=None):
    """Cut a volume along one of its axes into slices as CONVENTION has them.

    Args:
        grey: float32 0..255 of series.shape.
        axis: the array axis that becomes the slices.
        square, field_of_view: mm; as `to_square` takes them.

    Returns:
        uint8 (s, 256, 256), square pixels.
    """
    order, flips = orient(series, axis)
    _, rows, columns = order
    grey = np.flip(grey.transpose(order), flips)
    slab, s = series.slab(axis), series.slices(axis)
    if slab > 1:
        # (s * slab, H, W) -> (s, H, W)
        grey = grey[: s * slab].reshape(s, slab, *grey.shape[1:]).mean(axis=1)
    height, width = grey.shape[1] * series.spacing[rows], grey.shape[2] * series.spacing[columns]
    if max(height, width) > MAX_OBLONG * min(height, width):
        raise InputError(
            f"{series.file}: slices of {height:.3g} x {width:.3g} mm; correct the pixel spacing"
        )
    return to_square(grey, height, width, square, field_of_view)


def mirrored(plane, volume):
    """A right knee as a left one: uint8 (s, H, W), right and left exchanged."""
    axis = 0 if plane == "sagittal" else 2
    return np.ascontiguousarray(np.flip(volume, axis))
