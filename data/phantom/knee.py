"""A 3-D knee on a grid, on which tissue is painted.

Knee coordinates, mm: u to lateral, v to posterior, w to superior, origin between the condyles on
the joint line.
"""

import numpy as np

from data.phantom.lesions import TASK_OF
from data.phantom.shapes import capsule, double, inside, smooth_noise

GRID = 0.8  # mm; the 3-D knee is drawn at this step
HALF = (67.2, 80.0, 88.0)  # mm; it reaches so far in u, v, w; twice GRID divides it
AIR = 0.0  # signal
COARSE = 1.75  # voxels; noise of this grain and more is interpolated


class Knee:
    """A 3-D knee on a grid: paints tissue by implicit surfaces, each in its own bounding box.

    Attributes:
        grid: mm between its voxels.
        signal: float32 (2 * HALF / GRID), 0 for air to about 1 for fluid.
        solid: bool, same shape; bone and cartilage, where no lesion of soft tissue can be.
        lesions: [(kind, task, points)], points (n, 3) in knee coordinates; see settle().
    """

    def __init__(self, rng):
        self.rng, self.grid = rng, GRID
        self.axes = [np.arange(-h, h - GRID / 2, GRID, dtype=np.float32) for h in HALF]
        self.signal = np.full([len(a) for a in self.axes], AIR, np.float32)
        self.solid = np.zeros(self.signal.shape, bool)
        self.notes, self.lesions = [], []
        # What differs from knee to knee beside size, pose and bend:
        self.notch_width = rng.uniform(8.8, 11.0)  # mm; half
        self.groove = rng.uniform(-29.5, -27.0)  # mm; the trochlea's floor, v
        self.kneecap = rng.normal(0, 2.0)  # mm; patella high or low
        self.fat_layer = rng.uniform(4.0, 11.0)  # mm under the skin

    def box(self, low, high):
        """Index slices and broadcastable coordinates u, v, w of the box from low to high, mm."""
        where, points = [], []
        for k, axis in enumerate(self.axes):
            i, j = np.searchsorted(axis, [low[k], high[k]])
            where.append(slice(max(i, 0), max(j, i + 1)))
            points.append(axis[where[k]].reshape([-1 if k == n else 1 for n in range(3)]))
        return tuple(where), points

    def paint(self, where, distance, value, soft=0.5):
        """Blend `value` in where `distance` (mm) is negative."""
        signal = self.signal[where]
        signal += inside(distance, soft) * (value - signal)

    def add(self, shape, value, soft=0.5):
        """Paint a shape: (low, high, distance)."""
        low, high, distance = shape
        where, points = self.box(low - 3 * soft, high + 3 * soft)  # no edge of the box shows
        self.paint(where, distance(*points), value, soft)

    def add_chain(self, points, radius, value, flat=(1, 1, 1)):
        for start, end in zip(points[:-1], points[1:], strict=True):
            self.add(capsule(start, end, radius, flat=flat), value, soft=0.6)

    def note(self, kind, where, mask):
        """Remember a lesion's voxels in a box: kind is one of TASK_OF."""
        self.notes.append((kind, where, mask))

    def settle(self):
        """Turn the notes into lesions, once the bones are drawn, which hide soft tissue."""
        for kind, where, mask in self.notes:
            found = np.argwhere(mask if kind == "oedema" else mask & ~self.solid[where])
            if len(found):
                corner = [axis[s.start] for axis, s in zip(self.axes, where, strict=True)]
                self.lesions.append((kind, TASK_OF[kind], found * self.grid + corner))

    def cloud(self, where, step):
        """Smooth noise of mean 0 and SD about 1 over a box; `step` mm is its grain.

        A grain of some voxels is drawn at half the resolution and interpolated.
        """
        shape = [s.stop - s.start for s in where]
        grain = step / self.grid  # voxels
        factor = 2 if grain >= COARSE else 1
        field = smooth_noise(self.rng, [-(-n // factor) for n in shape], grain / factor)
        if factor == 2:
            field = double(field)[tuple(map(slice, shape))]
        return field / (field.std() + 1e-6)
