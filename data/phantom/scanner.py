"""How a knee lies in the scanner, is cut into slices and looks on them.

Patient coordinates, mm: x to the patient's left, y to posterior, z to superior.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from data.phantom.knee import HALF
from mrnet.layout.planes import TARGET

FIELD_OF_VIEW = 160.0  # mm; a slice's side
COVER = {"axial": (-50, 60), "coronal": (-56, 46), "sagittal": (-46, 46)}  # mm along z, y, x
SPACING = {"axial": (4.0, 5.4), "coronal": (3.8, 5.2), "sagittal": (3.5, 4.8)}  # mm, slice to slice
THICKNESS = 0.85  # of the spacing, nominally; drawn as 3 or 5 voxels of the knee, 2.4 or 4 mm
NODE = 5.0  # mm; the way from slice to knee is smooth, computed at these steps and interpolated
VISIBLE_AREA = 5.0  # mm2; a lesion with a smaller section is not called visible in that slice
NOISE = (0.015, 0.035)  # standard deviation of the Rician noise; fluid is 0.95


class Pose:
    """How one knee lies in the scanner: patient coordinates (mm) to knee coordinates and back."""

    def __init__(self, rng, side):
        """side: +1 for a left knee, whose lateral is the patient's left; -1 for a right one."""
        turn = Rotation.from_euler("xyz", rng.normal(0, [4, 3, 5]), degrees=True).as_matrix()
        self.matrix = np.diag([side, 1, 1]) @ turn / rng.uniform(0.90, 1.08)
        self.shift = rng.normal(0, [3, 3, 4])
        frequency, phase = rng.uniform(0.03, 0.07, (3, 3)), rng.uniform(0, 6.3, 3)  # rad/mm, rad
        self.wave = frequency, phase, rng.uniform(0.4, 1.4, 3)  # mm

    def bend(self, points):
        """A smooth displacement of a millimetre or so, so that no two bones are alike."""
        frequency, phase, size = self.wave
        return size * np.sin(points @ frequency + phase)

    def to_knee(self, points):
        """(..., 3) patient mm -> (..., 3) knee mm."""
        return (points - self.shift) @ self.matrix.T + self.bend(points)

    def to_patient(self, points):
        """(n, 3) knee mm -> (n, 3) patient mm, by fixed-point iteration."""
        back = np.linalg.inv(self.matrix).T
        found = points @ back + self.shift
        for _ in range(8):
            found = (points - self.bend(found)) @ back + self.shift
        return found


class Cut(NamedTuple):
    """How finely a knee is cut into slices."""

    size: int  # px, a slice's side
    field_of_view: float = FIELD_OF_VIEW  # mm, the same
    spacing: dict | None = None  # {plane: (least, most)}, mm from slice to slice; None for SPACING


def scan(knee, pose, plane, cut, rng):
    """Cut one plane: uint8 (s, size, size) and its geometry.

    Args:
        cut: Cut.

    The geometry takes patient mm to voxel indices: index = (direction * mm[axis] - start) / step,
    each for slices, rows and columns.
    """
    axes, size, field_of_view = TARGET[plane], cut.size, cut.field_of_view
    step = rng.uniform(*(cut.spacing or SPACING)[plane])
    low, high = sorted(axes[0][1] * end for end in COVER[plane])
    positions = np.arange(low + rng.uniform(0, step), high, step)
    pixel = field_of_view / size
    sides = (np.arange(size) + 0.5) * pixel - field_of_view / 2
    nodes = np.linspace(-field_of_view / 2, field_of_view / 2, round(field_of_view / NODE) + 1)
    part, node = np.modf((sides - nodes[0]) / (nodes[1] - nodes[0]))
    part, node = part.astype(np.float32), node.astype(int)
    points = np.empty((len(nodes), len(nodes), 3))
    thick = averaged(knee.signal, axes[0][0], THICKNESS * step / knee.grid)
    volume = np.empty((len(positions), size, size), np.float32)
    for s, position in enumerate(positions):
        values = (position, nodes[:, None], nodes[None, :])
        for (axis, way), value in zip(axes, values, strict=True):
            points[..., axis] = way * value
        where = np.moveaxis((pose.to_knee(points) + HALF) / knee.grid, -1, 0)  # (3, k, k)
        where = np.ascontiguousarray(where, np.float32)
        # (3, k, k) -> (3, size, size), linearly; a matrix product would start BLAS threads
        fine = lerp(where[:, node], where[:, node + 1], part[:, None])
        fine = lerp(fine[..., node], fine[..., node + 1], part)
        volume[s] = ndimage.map_coordinates(thick, fine, order=1, mode="nearest")
    return as_scanner(volume, rng), {
        "axes": [axis for axis, _ in axes],
        "directions": [way for _, way in axes],
        "start_mm": [float(positions[0]), float(sides[0]), float(sides[0])],
        "step_mm": [float(step), pixel, pixel],
        "slices": len(positions),
    }


def averaged(volume, axis, thickness):
    """Each voxel's mean with its neighbours along an axis, as a thick slice sees them.

    The knee lies in the scanner turned by a few degrees only, so that its own axis serves.

    Args:
        volume: float32 (a, b, c).
        thickness: voxels; the nearest odd number is averaged. The ends stay as they are.
    """
    reach = max(round((thickness - 1) / 2), 0)
    mean = np.moveaxis(volume.copy(), axis, 0)
    whole = np.moveaxis(volume, axis, 0)
    inner = mean[reach : len(mean) - reach]
    for offset in range(1, reach + 1):
        for k in (reach - offset, reach + offset):
            inner += whole[k : k + len(inner)]
    inner /= 2 * reach + 1
    return np.moveaxis(mean, 0, axis)


def lerp(low, high, part):
    return low + part * (high - low)


def as_scanner(volume, rng):
    """Contrast, coil shading, noise and scale: float32 signal 0..1 (s, h, w) -> uint8."""
    volume = np.clip(volume, 0, None) ** np.float32(rng.uniform(0.88, 1.12))
    tilt, bowl = rng.normal(0, 0.10, 3), rng.uniform(-0.22, 0.02, 3)
    for k, n in enumerate(volume.shape):
        x = np.linspace(-1, 1, n, dtype=np.float32).reshape([-1 if k == m else 1 for m in range(3)])
        volume *= np.exp(np.float32(tilt[k]) * x + np.float32(bowl[k]) * x * x)
    noise = np.float32(rng.uniform(*NOISE))
    real = volume + noise * rng.standard_normal(volume.shape, np.float32)
    imaginary = noise * rng.standard_normal(volume.shape, np.float32)
    grey = np.hypot(real, imaginary) * np.float32(rng.uniform(250, 310))  # a magnitude: Rician
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8)


def place(points, geometry, grid):
    """Where a lesion lies in one plane, from the centres (n, 3) of its voxels, patient mm.

    Args:
        grid: mm between neighbouring voxels.

    Returns centre, low and high as [slice, row, column] indices (low to high holds 96 % of the
    lesion along each), and the slices in which its section is at least VISIBLE_AREA.
    """
    index = points[:, geometry["axes"]] * geometry["directions"] - geometry["start_mm"]
    index = index / geometry["step_mm"]
    low, high = np.quantile(index, [0.02, 0.98], axis=0)
    nearest = np.rint(index[:, 0]).astype(int)
    inner = nearest[(nearest >= 0) & (nearest < geometry["slices"])]
    area = np.bincount(inner, minlength=geometry["slices"]) * grid**3 / geometry["step_mm"][0]
    return {
        "centre": index.mean(axis=0).round(2).tolist(),
        "low": low.round(2).tolist(),
        "high": high.round(2).tolist(),
        "visible": np.flatnonzero(area >= VISIBLE_AREA).tolist(),
    }
