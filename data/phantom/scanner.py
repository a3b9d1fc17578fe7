"""How a knee lies in the scanner, is cut into slices and looks on them.

Patient coordinates, mm: x to the patient's left, y to posterior, z to superior.
"""

import numpy as np
from scipy.spatial.transform import Rotation

from data.common import TARGET
from data.phantom.knee import HALF

FIELD_OF_VIEW = 160.0  # mm; a slice's side
COVER = {"axial": (-50, 60), "coronal": (-56, 46), "sagittal": (-46, 46)}  # mm along z, y, x
SPACING = {"axial": (4.0, 5.4), "coronal": (3.8, 5.2), "sagittal": (3.5, 4.8)}  # mm, slice to slice
THICKNESS = 0.85  # of the spacing, hence 3 to 4.6 mm; the rest is the gap between slices
ROWS = 32  # of a slice that are looked up at a time: what they need stays in the processor's cache
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


def scan(knee, pose, plane, size, rng, field_of_view=FIELD_OF_VIEW):
    """Cut one plane: uint8 (s, size, size) and its geometry.

    Args:
        field_of_view: mm, a slice's side.

    The geometry takes patient mm to voxel indices: index = (direction * mm[axis] - start) / step,
    each for slices, rows and columns.
    """
    axes = TARGET[plane]
    step = rng.uniform(*SPACING[plane])
    low, high = sorted(axes[0][1] * end for end in COVER[plane])
    positions = np.arange(low + rng.uniform(0, step), high, step)
    pixel = field_of_view / size
    sides = (np.arange(size) + 0.5) * pixel - field_of_view / 2
    nodes = np.linspace(-field_of_view / 2, field_of_view / 2, round(field_of_view / NODE) + 1)
    part, node = np.modf((sides - nodes[0]) / (nodes[1] - nodes[0]))
    node = node.astype(int)
    points = np.empty((len(nodes), len(nodes), 3))
    cuts = (-THICKNESS / 4 * step, THICKNESS / 4 * step)  # two cuts make a thick slice
    volume = np.zeros((len(positions), size, size), np.float32)
    for s, position in enumerate(positions):
        for offset in cuts:
            values = (position + offset, nodes[:, None], nodes[None, :])
            for (axis, way), value in zip(axes, values, strict=True):
                points[..., axis] = way * value
            where = np.moveaxis((pose.to_knee(points) + HALF) / knee.grid, -1, 0)  # (3, k, k)
            where = np.ascontiguousarray(where)
            for first in range(0, size, ROWS):
                rows = slice(first, first + ROWS)
                # (3, k, k) -> (3, ROWS, size), linearly; a matrix product would start BLAS threads
                fine = lerp(where[:, node[rows]], where[:, node[rows] + 1], part[rows, None])
                fine = lerp(fine[..., node], fine[..., node + 1], part)
                volume[s, rows] += interpolate(knee.signal, fine)
    return as_scanner(volume / len(cuts), rng), {
        "axes": [axis for axis, _ in axes],
        "directions": [way for _, way in axes],
        "start_mm": [float(positions[0]), float(sides[0]), float(sides[0])],
        "step_mm": [float(step), pixel, pixel],
        "slices": len(positions),
    }


def lerp(low, high, part):
    return low + part * (high - low)


def interpolate(volume, where):
    """Trilinear interpolation: float32 (a, b, c) at float64 indices (3, h, w) -> float32 (h, w).

    Beyond the volume it goes on as it was at the end. It gives what scipy.ndimage.map_coordinates
    (order=1, mode="nearest") gives, in 0.6 of its time.
    """
    corner, parts = 0, []
    for index, n in zip(where, volume.shape, strict=True):
        index = np.clip(index, 0, n - 1)
        low = np.minimum(index.astype(np.int32), n - 2)
        corner = corner * n + low
        parts.append(index - low)
    b, c = volume.shape[1:]
    corners = corner + sum(np.ix_((0, b * c), (0, c), (0, 1)))[..., None, None]
    values = volume.ravel().take(corners).astype(np.float64)  # (2, 2, 2, h, w)
    for part in parts:
        values = lerp(*values, part)
    return values.astype(np.float32)


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
