"""Shapes of tissue as distances to their surface: implicit surfaces, all in mm.

A distance is negative inside. Coordinates u, v, w are float32 arrays that broadcast to the grid.
"""

from functools import reduce

import numpy as np
from scipy import ndimage


def ellipsoid(centre, radii):
    """A shape: (low, high, distance in mm, to first order in the surface's neighbourhood)."""
    centre, radii = np.float32(centre), np.float32(radii)

    def distance(u, v, w):
        near = [(p - c) / r for p, c, r in zip((u, v, w), centre, radii, strict=True)]
        level = np.sqrt(sum(n * n for n in near))
        slope = np.sqrt(sum((n / r) ** 2 for n, r in zip(near, radii, strict=True)))
        return level * (level - 1) / (slope + 1e-3)

    return centre - radii - 4, centre + radii + 4, distance


def capsule(start, end, radius, end_radius=None, flat=(1, 1, 1)):
    """A rod from start to end; the radius may change; `flat` widens it along an axis."""
    start, end, flat = np.float32(start), np.float32(end), np.float32(flat)
    end_radius = radius if end_radius is None else end_radius
    reach = max(radius, end_radius) * flat + 4
    along = (end - start) / flat

    def distance(u, v, w):
        apart = [(p - s) / f for p, s, f in zip((u, v, w), start, flat, strict=True)]
        t = sum(d * a for d, a in zip(apart, along, strict=True)) / (along @ along)
        t = np.clip(t, 0, 1)
        apart = sum((d - t * a) ** 2 for d, a in zip(apart, along, strict=True))
        return np.sqrt(apart) - (radius + t * (end_radius - radius))

    return np.minimum(start, end) - reach, np.maximum(start, end) + reach, distance


def union(a, b, blend=4.0):
    """Smooth minimum of two distances: a fillet of about `blend` mm where they meet."""
    h = np.clip(0.5 + 0.5 * (b - a) / blend, 0, 1)
    return b + h * (a - b) - blend * h * (1 - h)


def shared(a, b, blend=2.0):
    """Smooth maximum: what both shapes share, its edges rounded."""
    return -union(-a, -b, blend)


def all_of(*distances):
    return reduce(np.maximum, distances)


def inside(distance, soft):
    """1 inside, 0 outside, `soft` mm wide at the edge."""
    return 1 / (1 + np.exp(np.clip(distance * (2 / soft), -30, 30)))


def tube(sections, u, v, w):
    """Distance to a tube along w with elliptic `sections`; w is (1, 1, n)."""
    knots = np.float32(sorted(sections))
    smooth = 6 / abs(w.flat[1] - w.flat[0])  # mm; no kinks at the knots
    centre_u, centre_v, half_u, half_v = (
        ndimage.gaussian_filter1d(np.interp(w, knots[:, 0], k), smooth, mode="nearest")
        for k in knots[:, 1:].T.astype(np.float64)
    )
    near_u, near_v = (
        ((p - c) / h).astype(np.float32)
        for p, c, h in ((u, centre_u, half_u), (v, centre_v, half_v))
    )
    level = np.sqrt(near_u**2 + near_v**2)
    slope = np.sqrt((near_u / np.float32(half_u)) ** 2 + (near_v / np.float32(half_v)) ** 2)
    return level * (level - 1) / (slope + 1e-3)


def double(field):
    """Linear interpolation to twice the resolution: (a, b, c) -> (2a, 2b, 2c)."""
    for axis in range(3):
        field = np.moveaxis(field, axis, 0)
        finer = np.empty((2 * len(field), *field.shape[1:]), np.float32)
        finer[::2] = field
        finer[1:-1:2] = (field[:-1] + field[1:]) / 2
        finer[-1] = field[-1]
        field = np.moveaxis(finer, 0, axis)
    return np.ascontiguousarray(field)


def smooth_noise(rng, shape, sigma):
    """Normal noise smoothed by `sigma` voxels, along all axes or each: float32 of that shape."""
    return ndimage.gaussian_filter(rng.standard_normal(shape, np.float32), sigma, truncate=2.5)


def coarse_noise(rng, shape, sigma):
    field = smooth_noise(rng, shape, sigma)
    return field / field.std()
