"""The two menisci, intact or torn, and what a tear brings with it.

A tear reaches the surface of the meniscus (a signal that does not is degeneration); its free edge
may be gone, and with a bucket handle lie in the notch; a torn meniscus more often than an intact
one stands over the edge of the tibia, and a cyst may lie beside it. Places and shares:
data/phantom/lesions.py. Coordinates as in data/phantom/knee.py.
"""

import numpy as np

from data.phantom.shapes import all_of, capsule, ellipsoid, inside

DARK, FLUID, BED = 0.05, 0.95, 0.55  # signals; a film of fluid and synovium surrounds a meniscus
INTACT = (0.03, 0.16)  # signal; degeneration makes an intact meniscus grey inside
# Half width, half depth, v of the middle, and how far round it reaches (rad), by side.
SHAPES = {-1: (18, 23, 4, 2.35), 1: (17, 19.5, 2, 2.75)}  # medial, lateral
EDGE = 38.5  # mm; where the tibia ends
HANDLE = ((-2.5, -9, -4.5), (-2.5, 17, -2.0))  # a bucket handle's place: below the PCL, parallel


def paint_menisci(knee, tear, extrusion, cyst):
    """Two dark wedges between femur and tibia.

    The bones are drawn later and cut the wedges' upper and lower faces to their own shape.

    Args:
        tear: None or a dict that places a tear.
        extrusion: {side: mm} that the body of each meniscus stands over.
        cyst: None or {"side", "angle", "radius" mm, "phases" rad (3,)}.
    """
    for side in (-1, 1):
        torn = tear if tear is not None and tear["side"] == side else None
        paint_meniscus(knee, side, torn, extrusion[side])
    if tear is not None and tear["handle"] is not None:
        paint_handle(knee, tear["handle"])
    if cyst is not None:
        paint_cyst(knee, cyst)


def paint_meniscus(knee, side, tear, extrusion):
    """One meniscus; `side` is -1 for the medial one."""
    ends = sorted([2 * side, 48 * side])
    where, (u, v, w) = knee.box((ends[0], -26, -16), (ends[1], 34, 8))
    wide, deep, middle, opening = SHAPES[side]
    shift = extrusion * np.exp(-(((v - middle) / 14) ** 2))  # the body more than the horns
    across, along = ((u - 20 * side) * side - shift) / wide, (v - middle) / deep
    ring, angle = np.hypot(across, along), np.arctan2(along, across)  # 1 at the rim; 0 outwards
    inner = (0.46 if side < 0 else 0.42) - 0.10 * np.sin(angle)  # the posterior horn is broad
    height = np.clip((ring - inner) / (1 - inner), 0, 1.1)  # 0 at the free edge, 1 at the rim
    floor = -6.8 - 0.07 * (v - 3)
    wedge = all_of(
        (ring - 1) * 17, (inner - ring) * 17, (w - floor - 2.6 - 8 * height) * 0.9,
        floor - 2 - w, (np.abs(angle) - opening) * 12,
    )  # fmt: skip
    knee.paint(where, all_of((ring - 1.02) * 17, np.abs(w - floor - 3) - 4), BED, soft=1.0)
    rest = knee.rng.uniform(*INTACT)
    knee.paint(where, wedge + 0 * u, DARK, soft=0.6)
    core = np.hypot((height - 0.62) * 8, w - floor - 4.4) - 1.2
    knee.signal[where] += rest * inside(core, 1.6) * inside(wedge, 0.6)
    if tear is None:
        return
    cleft = all_of(cleft_of(tear, angle, height, w - floor), wedge - 0.6)
    knee.paint(where, cleft, FLUID * tear["signal"], soft=0.6)
    knee.note("meniscus", where, cleft < 0)
    over = all_of(wedge + 0 * u, EDGE - u * side)
    if extrusion > 2 and (over < 0).any():
        knee.note("extrusion", where, over < 0)


def cleft_of(tear, angle, height, above):
    """Distance to a tear's cleft; `above` is the height over the meniscus's floor, mm."""
    along = np.clip(np.abs(angle - tear["angle"]) / tear["half_angle"], 0, 1)  # 1 at its ends
    thin = tear["width"] / 2 * (1.3 * np.sqrt(1 - along**2) - 0.3) - 0.6 * (along == 1)
    middle_height = 2.3 + 3.0 * height
    flat = np.abs(above - middle_height - tear["slant"] * (height - 0.5) * 3)
    upright = np.abs((height - 0.55) * 8 + tear["slant"] * (above - middle_height) * 0.4)
    both = np.minimum(flat, upright)
    cleft = {"horizontal": flat, "vertical": upright, "complex": both}[tear["kind"]] - thin
    if tear["displaced"] or tear["handle"] is not None:  # the free edge is gone
        cleft = np.minimum(cleft, (height - 0.6 * (1 - along**2)) * 8 + 2 * (along == 1))
    return cleft


def paint_handle(knee, shift):
    """The inner part of a medial meniscus, torn off and turned into the notch; shift mm (2, 3)."""
    start, end = np.add(HANDLE, shift)
    low, high, distance = capsule(start, end, 2.3)
    where, points = knee.box(low, high)
    band = distance(*points)
    knee.paint(where, band - 1.2, FLUID * 0.8, soft=1.0)
    knee.paint(where, band, DARK, soft=0.6)
    knee.note("fragment", where, band < 0)


def paint_cyst(knee, cyst):
    """A lobed pocket of fluid at a meniscus's rim."""
    side, angle, radius = cyst["side"], cyst["angle"], cyst["radius"]
    wide, deep, middle, _ = SHAPES[side]
    at = np.array([side * (20 + wide * np.cos(angle)), middle + deep * np.sin(angle), -3.0])
    at += radius * 0.7 * np.array([side * np.cos(angle), np.sin(angle), 0])
    low, high, distance = ellipsoid(at, radius * np.array([0.8, 1.3, 1.0]))
    where, points = knee.box(low, high)
    waves = (np.sin(1.1 * p + phase) for p, phase in zip(points, cyst["phases"], strict=True))
    lumpy = distance(*points) + 0.5 * sum(waves)
    knee.paint(where, lumpy, FLUID, soft=0.6)
    knee.note("cyst", where, lumpy < 0)
