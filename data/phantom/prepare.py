"""Synthetic knee MRI exams in MRNet's layout: the data that a fresh clone trains on.

    python data/phantom/prepare.py                                 # 200 + 60 exams, about 3 minutes
    python data/phantom/prepare.py --exams 1130 --valid 120 --out /tmp/phantom
    python train.py --task acl --plane sagittal --data-dir data/phantom

One 3-D knee per exam, drawn from geometry with the contrast of fat-suppressed proton density
(fluid bright, muscle grey, fat and marrow dark grey, ligaments, menisci and cortex nearly black),
turned, bent a little and cut in three planes. Tasks and prevalences are MRNet's: abnormal 80 %,
torn ACL 20 %, torn meniscus 37 % (Bien et al., PLOS Medicine 2018, training set). An exam has 17 to
30 slices a plane where MRNet's have 17 to 61, so that a laptop's demo stays short.

Writes OUT/{train,valid}/{axial,coronal,sagittal}/0000.npy, uint8 (s, size, size), the six CSVs and
OUT/lesions.json: where each lesion lies in each plane (make_exam says how). Sizes and places are
those of an adult knee, approximately; nothing was measured on patients, and no result on these
exams says anything about patients.

Knee coordinates, mm: u to lateral, v to posterior, w to superior, origin between the condyles on
the joint line. Patient coordinates: x to the patient's left, y to posterior, z to superior.
"""

import argparse
import json
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial, reduce
from pathlib import Path

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))  # started as a script, it finds its own folder

from common.errors import InputError  # noqa: E402
from data.common import ORIENTATION, write_dataset  # noqa: E402
from data.common import TARGET as PLANES  # noqa: E402

VERSION = "1"  # of the knees that are drawn; raise it with every change of the pixels
PREVALENCE = {"abnormal": 0.80, "acl": 0.20, "meniscus": 0.37}  # MRNet, Bien et al. 2018
SPLITS = ("train", "valid")
# --- how hard the tasks are -----------------------------------------------------------------------
PARTIAL_TEARS = 0.35  # share of torn ACLs that are partial: smaller, darker, some fibres left
PARTIAL_SIZE, PARTIAL_SIGNAL = 0.75, 0.75  # of a complete tear's
TEAR_RADIUS = (8.5, 13.5)  # mm; half length of the bright mass in place of torn fibres
TEAR_SIGNAL = (0.70, 1.00)  # of that mass; fluid is 0.95, muscle 0.38
INTACT_SIGNAL = (0.03, 0.17)  # an intact ACL may be grey too (mucoid change, partial volume)
INTACT_RADIUS = (3.6, 5.2)  # mm; half thickness of an ACL
NOTCH_FLUID = 0.40  # share of knees with some harmless fluid beside the cruciates
CLEFT_WIDTH = (2.0, 3.4)  # mm; a meniscal tear's bright line
CLEFT_SIGNAL = (0.70, 1.00)  # of fluid's
CLEFT_HALF_ANGLE = (0.35, 0.70)  # rad round the meniscus; 15 mm each
DISPLACED_TEARS = 0.35  # share of meniscal tears whose free edge is gone, with fluid in its place
INTACT_MENISCUS = (0.03, 0.16)  # signal; degeneration makes an intact meniscus grey inside
EFFUSION = {"acl": 0.60, "meniscus": 0.50, "other": 0.75, "normal": 0.0}  # how often, by group
OEDEMA = {"acl": 0.45, "meniscus": 0.35, "other": 0.55, "normal": 0.0}
OEDEMA_SIGNAL = (0.45, 0.80)
NOISE = (0.015, 0.035)  # standard deviation of the Rician noise; fluid is 0.95

# --- the scan -------------------------------------------------------------------------------------
GRID = 0.8  # mm; the 3-D knee is drawn at this step
HALF = (67.2, 80.0, 88.0)  # mm; it reaches so far in u, v, w; twice GRID divides it
FIELD_OF_VIEW = 160.0  # mm; a slice's side
COVER = {"axial": (-50, 60), "coronal": (-56, 46), "sagittal": (-46, 46)}  # mm along z, y, x
SPACING = {"axial": (4.0, 5.4), "coronal": (3.8, 5.2), "sagittal": (3.5, 4.8)}  # mm, slice to slice
THICKNESS = 0.85  # of the spacing, hence 3 to 4.6 mm; the rest is the gap between slices
NODE = 5.0  # mm; the way from slice to knee is smooth, computed at these steps and interpolated
VISIBLE_AREA = 5.0  # mm2; a lesion with a smaller section is not called visible in that slice

# --- tissue, fat-suppressed proton density --------------------------------------------------------
AIR, FAT, MARROW, MUSCLE, SYNOVIUM, SKIN = 0.0, 0.20, 0.18, 0.38, 0.36, 0.36
CARTILAGE, FLUID, VESSEL, NERVE, DARK = 0.58, 0.95, 0.75, 0.40, 0.05

# --- anatomy, mm ----------------------------------------------------------------------------------
# The limb's outline and the muscles' sections as ellipses from top to bottom:
# (w, centre u, centre v, half width, half depth). Muscles overlap: nearest wins, fascia between.
LIMB = [(90, 0, 2, 63, 66), (30, 0, 2, 58, 61), (0, 0, 5, 55, 57), (-30, 1, 12, 53, 49),
        (-90, 2, 15, 56, 50)]  # fmt: skip
KNEECAP_BULGE = [(75, 0, -20, 20, 20), (45, 0, -36, 32, 25), (20, 0, -38, 34, 25),
                 (-36, 2, -27, 24, 15), (-62, 0, -5, 20, 15)]  # fmt: skip
MUSCLES = {
    "vastus lateralis": [(95, 33, -18, 25, 34), (62, 34, -16, 21, 29), (32, 33, -22, 1, 1)],
    "vastus medialis": [(95, -32, -14, 24, 32), (52, -36, -14, 20, 28), (18, -36, -22, 1, 1)],
    "vastus intermedius": [(95, 0, -22, 26, 18), (75, 0, -24, 18, 8), (58, 0, -24, 1, 1)],
    "semimembranosus": [(95, -18, 36, 22, 22), (40, -24, 38, 17, 17), (2, -31, 33, 2, 2)],
    "semitendinosus": [(95, -24, 54, 14, 12), (50, -30, 52, 4, 4), (0, -38, 34, 2, 2)],
    "biceps femoris": [(95, 26, 40, 24, 24), (35, 37, 34, 14, 17), (-14, 40, 24, 2, 3)],
    "sartorius": [(95, -48, 22, 11, 15), (20, -44, 26, 6, 15), (-30, -36, 14, 2, 8)],
    "gastrocnemius medialis": [(30, -17, 34, 2, 2), (8, -19, 41, 13, 10), (-90, -24, 40, 30, 22)],
    "gastrocnemius lateralis": [(28, 18, 33, 2, 2), (6, 20, 40, 12, 10), (-90, 24, 40, 28, 20)],
    "popliteus": [(-12, 14, 27, 4, 3), (-30, 2, 25, 20, 9), (-66, -12, 18, 3, 3)],
    "soleus": [(-24, 20, 29, 8, 6), (-90, 4, 27, 36, 13)],
    "tibialis anterior": [(-20, 26, -14, 2, 2), (-48, 29, -12, 13, 13), (-90, 28, -10, 17, 17)],
    "peroneus": [(-30, 42, 8, 3, 3), (-60, 43, 8, 9, 14), (-90, 43, 8, 12, 16)],
}
FASCIA = 1.1  # mm between muscles
LONG_TUBES = [  # points from top to bottom, radius, signal
    ([(5, 37, 88), (2, 38, 20), (1, 34, -30), (3, 30, -88)], 3.0, VESSEL),  # popliteal artery
    ([(-1, 43, 88), (-3, 44, 20), (-2, 40, -30), (-1, 33, -88)], 4.0, VESSEL),  # popliteal vein
    ([(9, 47, 88), (8, 49, 20), (5, 48, -30), (4, 46, -88)], 2.6, NERVE),  # tibial nerve
    ([(-52, 24, 88), (-47, 26, 0), (-43, 22, -88)], 1.7, VESSEL),  # great saphenous vein
]
TIBIA = [(0, 0, 3, 38.5, 24.5), (-12, 0, 3, 38, 24), (-22, 0, 1, 33, 22), (-38, 0, -1, 24, 18),
         (-60, -1, -2, 17, 15.5), (-95, -2, -2, 14, 15)]  # fmt: skip
ACL = [(8.0, 15.0, 17.5), (-1.5, -8.0, -6.0)]  # lateral condyle's inner wall, front of the tibia
PCL = [(-7, 1, 9.5), (-5, 11, 11), (-3, 19, 6), (-1, 24.5, -3), (0, 27, -15)]
MCL = [(-38.5, 3, 24), (-40, 2, 0), (-38.5, 0, -14), (-29, -4, -36)]
LCL = [(38, 7, 20), (42, 13, 0), (41, 18, -17)]
RETINACULA = [[(-19, -43, 30), (-33, -28, 28), (-39, -8, 24)], [(21, -43, 30), (34, -26, 28),
              (39, -6, 24)]]  # fmt: skip
ILIOTIBIAL = [(45, -4, 88), (43, -12, 20), (32, -19, -16)]
QUADRICEPS = [(0, -40, 90), (0, -44, 70), (0, -47, 47)]
PATELLAR = [(0, -49, 18), (1, -43, -10), (2, -31, -38)]
RECESSES = [  # centre, half sizes, and how much an effusion of 1 adds to them
    ("suprapatellar", (0, -31, 58), (15, 0.8, 14), (7, 7, 9)),
    ("medial gutter", (-36, -16, 24), (1.0, 7, 9), (3.5, 5, 8)),
    ("lateral gutter", (36, -18, 26), (1.0, 7, 9), (3.5, 5, 8)),
    ("behind the PCL", (-1, 30, 4), (6, 0.7, 6), (4, 3.0, 4)),
    ("popliteal", (-23, 39, 10), (3, 0.6, 6), (3, 4.0, 8)),
    ("over the tibia", (0, -22, 0), (12, 1.0, 3), (6, 2.5, 4)),
]


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


class Knee:
    """A 3-D knee on a grid: paints tissue by implicit surfaces, each in its own bounding box.

    Attributes:
        signal: float32 (2 * HALF / GRID), 0 for air to about 1 for fluid.
        solid: bool, same shape; bone and cartilage, where no lesion of soft tissue can be.
        lesions: [(kind, task, points)], points (n, 3) in knee coordinates; see settle().
    """

    def __init__(self, rng):
        self.rng = rng
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
        """Blend `value` in where `distance` (mm, negative inside) says so."""
        part = self.signal[where]
        part += inside(distance, soft) * (value - part)

    def add(self, shape, value, soft=0.5):
        """Paint a shape: (low, high, distance)."""
        low, high, distance = shape
        where, points = self.box(low - 3 * soft, high + 3 * soft)  # no edge of the box shows
        self.paint(where, distance(*points), value, soft)

    def add_chain(self, points, radius, value, flat=(1, 1, 1), soft=0.6):
        for start, end in zip(points[:-1], points[1:], strict=True):
            self.add(capsule(start, end, radius, flat=flat), value, soft)

    def note(self, kind, where, mask):
        """Remember a lesion's voxels in a box: kind is acl, meniscus, effusion or oedema."""
        self.notes.append((kind, where, mask))

    def settle(self):
        """Turn the notes into lesions, once the bones are drawn, which hide soft tissue."""
        for kind, where, mask in self.notes:
            found = np.argwhere(mask if kind == "oedema" else mask & ~self.solid[where])
            if len(found):
                corner = [axis[s.start] for axis, s in zip(self.axes, where, strict=True)]
                task = kind if kind in PREVALENCE else "abnormal"
                self.lesions.append((kind, task, found * GRID + corner))

    def cloud(self, where, step):
        """Smooth noise of mean 0 and deviation about 1 over a box; `step` mm is its grain."""
        shape = [s.stop - s.start for s in where]
        field = ndimage.gaussian_filter(
            self.rng.standard_normal(shape, np.float32), step / GRID, truncate=2.5
        )
        return field / (field.std() + 1e-6)


def coarse_noise(rng, shape, sigma):
    field = ndimage.gaussian_filter(rng.standard_normal(shape, np.float32), sigma, truncate=2.5)
    return field / field.std()


def paint_soft_tissue(knee):
    """Skin, fat with its septa, muscles with fascia, vessels: what the joint lies in.

    Drawn at half the resolution, twice GRID, and interpolated: nothing here is thinner than 2 mm.
    """
    rng = knee.rng
    u, v, w = (
        a[::2].reshape([-1 if k == n else 1 for n in range(3)]) for k, a in enumerate(knee.axes)
    )
    limb = union(tube(LIMB, u, v, w), tube(KNEECAP_BULGE, u, v, w), 14)
    septa = coarse_noise(rng, limb.shape, (3.0, 3.0, 2.0))
    fat = FAT + 0.07 * np.exp(-((septa / 0.13) ** 2))
    nearest = second = np.full(limb.shape, 99, np.float32)
    shade = np.zeros(limb.shape, np.float32)
    for sections in MUSCLES.values():
        bulk = rng.uniform(1.0, 1.15)
        grown = [(at, cu, cv, hu * bulk, hv * bulk) for at, cu, cv, hu, hv in sections]
        distance = tube(grown, u, v, w) + 0.6
        top, bottom = max(sections)[0], min(sections)[0]
        distance = all_of(distance, w - top, bottom - w)
        shade = np.where(distance < nearest, np.float32(rng.uniform(0.90, 1.10)), shade)
        second = np.minimum(second, np.maximum(nearest, distance))
        nearest = np.minimum(nearest, distance)
    between = (FASCIA + nearest - second) / 2
    muscle = all_of(nearest, between, limb + knee.fat_layer)
    fibres = coarse_noise(rng, limb.shape, (0.9, 0.9, 7.0))
    streaks = np.exp(-((np.clip(fibres, None, 2.4) - 2.4) ** 2) / 0.5)  # a little fat in muscle
    flesh = MUSCLE * shade * (1 + 0.05 * fibres) * (1 - 0.35 * streaks)
    edge = inside(muscle, 1.6)
    tissue = edge * flesh + (1 - edge) * fat
    tissue += inside(np.abs(muscle - 0.9) - 0.3, 1.2) * (DARK + 0.07 - tissue) * 0.7  # fascia
    deep = inside(limb + 1.9, 1.2)
    tissue = deep * tissue + (1 - deep) * SKIN
    knee.signal[:] = double(tissue * inside(limb, 1.2))
    for points, radius, value in LONG_TUBES:
        knee.add_chain(points, radius + 0.7, 0.13)
        knee.add_chain(points, radius, value * rng.uniform(0.75, 1.1))


def paint_joint_space(knee, effusion):
    """Capsule, Hoffa's fat pad, fluid; `effusion` from 0, none, to 1 fills the recesses."""
    rng = knee.rng
    knee.add(ellipsoid((0, 6, 2), (36, 26, 20)), 0.24, soft=5)  # where no muscle reaches
    knee.add(ellipsoid((0, 9, 5), (11, 22, 16)), SYNOVIUM, soft=3)  # the notch
    knee.add(ellipsoid((0, -33, -4), (24, 14, 21)), 0.21, soft=3)  # Hoffa's fat pad
    for _ in range(7):  # its septa
        at = np.array([rng.uniform(-12, 12), rng.uniform(-38, -25), rng.uniform(-14, 8)])
        knee.add(capsule(at, at + rng.uniform(-8, 8, 3), 0.5), 0.32, soft=1.0)
    some, at = rng.random() < NOTCH_FLUID, rng.uniform((-3, 2, 2), (3, 16, 8))
    if some:
        knee.add(ellipsoid(at, rng.uniform(2, 4.5, 3)), 0.75, soft=2.0)
    for name, centre, radii, more in RECESSES:
        centre = np.add(centre, (0, 0, knee.kneecap if centre[1] < -30 else 0))
        if not effusion and name in ("behind the PCL", "popliteal"):
            continue
        low, high, distance = ellipsoid(centre, np.add(radii, np.multiply(more, effusion)))
        where, points = knee.box(low, high)
        lumpy = distance(*points) + (0.3 + 1.0 * effusion) * knee.cloud(where, 5)
        knee.paint(where, lumpy - 0.8, SYNOVIUM, soft=0.8)
        knee.paint(where, lumpy, FLUID * (0.97 if effusion else 0.75), soft=0.8)
        if effusion and name != "over the tibia":
            knee.note("effusion", where, lumpy < 0)


def paint_menisci(knee, tear):
    """Two dark wedges between femur and tibia; `tear` is None or a dict that places a tear.

    The bones are drawn later and cut the wedges' upper and lower faces to their own shape.
    """
    for side in (-1, 1):  # medial, lateral
        ends = sorted([2 * side, 44 * side])
        where, (u, v, w) = knee.box((ends[0], -26, -16), (ends[1], 34, 8))
        wide, deep, middle, opening = (18, 23, 4, 2.35) if side < 0 else (17, 19.5, 2, 2.75)
        across, along = (u - 20 * side) * side / wide, (v - middle) / deep
        ring, angle = np.hypot(across, along), np.arctan2(along, across)  # 1 at the rim; 0 outwards
        inner = (0.46 if side < 0 else 0.42) - 0.10 * np.sin(angle)  # the posterior horn is broad
        height = np.clip((ring - inner) / (1 - inner), 0, 1.1)  # 0 at the free edge, 1 at the rim
        floor = -6.8 - 0.07 * (v - 3)
        wedge = all_of(
            (ring - 1) * 17, (inner - ring) * 17, (w - floor - 2.6 - 8 * height) * 0.9,
            floor - 2 - w, (np.abs(angle) - opening) * 12,
        )  # fmt: skip
        knee.paint(where, all_of((ring - 1.02) * 17, np.abs(w - floor - 3) - 4), 0.55, soft=1.0)
        rest = knee.rng.uniform(*INTACT_MENISCUS)
        knee.paint(where, wedge + 0 * u, DARK, soft=0.6)
        core = np.hypot((height - 0.62) * 8, w - floor - 4.4) - 1.2
        knee.signal[where] += rest * inside(core, 1.6) * inside(wedge, 0.6)
        if tear is None or tear["side"] != side:
            continue
        along = np.clip(np.abs(angle - tear["angle"]) / tear["half_angle"], 0, 1)  # 1 at its ends
        thin = tear["width"] / 2 * (1.3 * np.sqrt(1 - along**2) - 0.3) - 0.6 * (along == 1)
        middle_height = floor + 2.3 + 3.0 * height
        flat = np.abs(w - middle_height - tear["slant"] * (height - 0.5) * 3)
        upright = np.abs((height - 0.55) * 8 + tear["slant"] * (w - middle_height) * 0.4)
        both = np.minimum(flat, upright)
        cleft = {"horizontal": flat, "vertical": upright, "complex": both}[tear["kind"]] - thin
        if tear["displaced"]:  # the free edge is gone
            cleft = np.minimum(cleft, (height - 0.5 * (1 - along**2)) * 8 + 2 * (along == 1))
        cleft = all_of(cleft, wedge - 0.6)
        knee.paint(where, cleft, FLUID * tear["signal"], soft=0.6)
        knee.note("meniscus", where, cleft < 0)


def paint_acl(knee, tear):
    """The anterior cruciate ligament; `tear` is None or a dict that describes the tear.

    A tear's mass is ill defined; a complete tear leaves frayed stumps, of which the tibial one
    sags, a partial tear leaves some fibres across.
    """
    rng = knee.rng
    femoral, tibial = np.add(ACL, rng.normal(0, 0.6, (2, 3)))
    thick, grey = rng.uniform(*INTACT_RADIUS), rng.uniform(*INTACT_SIGNAL)
    where, points = knee.box(np.minimum(femoral, tibial) - 20, np.maximum(femoral, tibial) + 20)
    ripple, wisps = knee.cloud(where, 1.2), knee.cloud(where, 2.4)
    across = (points[1] - points[2]) * 0.70 + points[0] * 0.3  # the ligament runs along v + w
    fibres = grey + 0.02 + 0.05 * np.sin(across * 1.9 + rng.uniform(0, 6)) + 0.03 * ripple
    fibres = np.clip(fibres, 0.03, None)

    def band(start, end, width):
        return capsule(start, end, width * 0.85, width * 1.15, (0.8, 1, 1))[2](*points)

    whole = band(femoral, tibial, thick)
    if tear is None:
        knee.paint(where, whole, fibres, soft=0.9)
        return
    centre = femoral + tear["at"] * (tibial - femoral)
    if tear["partial"]:
        knee.paint(where, whole - 0.4, fibres + 0.08, soft=1.2)
    else:
        ends = femoral + (centre - femoral) * 0.8, tibial + (centre - tibial) * 0.8
        for start, end in ((femoral, ends[0]), (ends[1] - (0, 0, tear["sag"]), tibial)):
            knee.paint(where, band(start, end, thick * 0.9) + 0.7 * wisps, fibres + 0.10, soft=1.6)
    mass = ellipsoid(centre, tear["radii"])[2](*points) + 1.6 * wisps
    left = inside(whole + 0.5 * thick, 1.5) * 0.55 if tear["partial"] else 0.0
    signal = np.clip(tear["signal"] + 0.08 * ripple, 0.3, 1.0)
    signal = signal + left * (fibres - signal)
    knee.paint(where, mass, signal, soft=3.0)
    knee.note("acl", where, mass < 0)


def paint_ligaments(knee, tear):
    """Cruciates, collaterals, retinacula and the extensor's tendons."""
    lift = np.array([0, 0, knee.kneecap])
    for k, (start, end) in enumerate(zip(PCL[:-1], PCL[1:], strict=True)):
        knee.add(capsule(start, end, 4.0 + 0.25 * k, 4.2 + 0.25 * k), DARK + 0.01, soft=0.8)
    paint_acl(knee, tear)
    knee.add_chain(MCL, 0.9, DARK, flat=(1, 6, 1))
    knee.add_chain(LCL, 1.9, DARK + 0.02)
    knee.add_chain([(34, 8, 2), (37, 18, 1), (30, 29, -8)], 2.0, DARK + 0.03)  # popliteus tendon
    knee.add_chain([(-31, 33, 12), (-31, 32, -4), (-29, 27, -10)], 2.4, DARK + 0.02)  # semimembr.
    knee.add_chain(ILIOTIBIAL, 0.9, DARK + 0.03, flat=(1, 7, 1))
    for points in RETINACULA:
        knee.add_chain(points, 0.75, DARK + 0.05, flat=(1, 1, 18))
    knee.add_chain([p + lift * (i > 0) for i, p in enumerate(QUADRICEPS)], 3.0, DARK + 0.02,
                   flat=(5.5, 1, 1))  # fmt: skip
    knee.add_chain([p + lift * (i < 1) for i, p in enumerate(PATELLAR)], 2.3, DARK + 0.01,
                   flat=(5.5, 1, 1))  # fmt: skip


def femur(knee, u, v, w):
    """Distance to the femur's surface and its cartilage's thickness, mm."""
    bone = union(
        tube([(95, 1, -2, 14, 14), (62, 1, -2, 16, 15), (40, 0, -3, 26, 18), (24, 0, -3, 34, 22),
              (12, 0, -4, 27, 18)], u, v, w),
        ellipsoid((0, -10, 20), (27, 19, 17))[2](u, v, w), 6,
    )  # fmt: skip
    bone = shared(bone, 14 - w, 6)
    for centre, radii in (
        ((-23, 11, 20), (13, 20, 20)), ((-21.5, -5, 21.5), (14, 25, 21.5)),  # medial condyle
        ((23, 10, 20), (13, 20, 19.5)), ((21.5, -6, 22), (14, 27, 21.5)),  # lateral condyle
    ):  # fmt: skip
        bone = union(bone, ellipsoid(centre, radii)[2](u, v, w), 5)
    groove = capsule((0, knee.groove - 16, 60), (0, knee.groove - 15, 6), 16, flat=(1.25, 1, 1))
    bone = shared(bone, -groove[2](u, v, w), 5)
    roof = (w - 8.5 - 0.82 * (v + 2) + 0.06 * u * u) * 0.76  # Blumensaat's line, 39 degrees
    notch = shared(np.abs(u) - knee.notch_width, roof, 7)
    top = 44 - 0.7 * np.clip(v + 24, 0, 24)  # the cartilage's upper end, front to back
    cover = np.clip((top - w) / 5, 0, 1) * np.clip((34.5 - np.abs(u)) / 4, 0, 1)
    return shared(bone, -notch, 2), 2.4 * cover * np.clip((notch - 0.5) / 3, 0, 1)


def tibia(knee, u, v, w):
    """Distance to the tibia's surface and its cartilage's thickness, mm."""
    wall = tube(TIBIA, u, v, w)
    for side in (-1, 1):  # two plateaus rather than one oval
        wall = union(wall, ellipsoid((18.5 * side, 4, -14), (20, 22, 13))[2](u, v, w), 5)
    dish = -1.3 * np.exp(-(((u + 21) / 10) ** 2) - ((v - 3) / 14) ** 2)
    plateau = w + 7.3 + 0.07 * (v - 3) - dish  # slopes 4 degrees to posterior
    bone = shared(wall, plateau, 2.5)
    for side in (-1, 1):  # the intercondylar spines
        bone = union(bone, ellipsoid((6 * side, 5, -7), (3, 7, 6.5))[2](u, v, w), 3)
    bone = union(bone, ellipsoid((3, -20, -36), (10, 7, 13))[2](u, v, w), 7)  # tubercle
    fossa = capsule((0, 37, 0), (0, 34, -20), 12)[2](u, v, w)  # where the PCL ends
    cover = np.clip((np.abs(u) - 7) / 4, 0, 1) * np.clip(-wall / 3, 0, 1)
    return shared(bone, -fossa, 3), 2.3 * cover * inside(plateau - 4, 1)


def patella(knee, u, v, w):
    """Distance to the patella's surface and its cartilage's thickness, mm."""
    w = w - 29 - knee.kneecap
    ridge = knee.groove - 6.0
    facets = v - ridge - 1.6 + 0.40 * np.hypot(u + 2, 4) - 0.07 * (u + 2)  # medial one is steeper
    body = ellipsoid((1, -44, 0), (22.5, 11.5, 21.5))[2](u, v, w)
    body = union(body, ellipsoid((0, -46, -14), (9, 6, 9))[2](u, v, w), 5)  # the apex
    facing = np.clip((1 - np.hypot(u / 22, (w - 3) / 18)) * 5, 0, 1) * np.clip((v + 45) / 3, 0, 1)
    return shared(body, facets * 0.92, 2), 3.4 * facing


def fibula(knee, u, v, w):
    """Distance to the fibula's surface; no cartilage."""
    head = ellipsoid((37, 18, -24), (8.5, 9.5, 10))[2](u, v, w)
    return union(head, capsule((37, 17, -28), (36, 15, -100), 6, 5.5)[2](u, v, w), 6), None


BONES = [  # shape and the box that holds it
    (femur, (-46, -38, -6), (46, 38, 88)), (tibia, (-46, -36, -88), (46, 36, 6)),
    (fibula, (24, 2, -88), (50, 34, -8)), (patella, (-28, -60, -2), (30, -26, 58)),
]  # fmt: skip
SCARS = {femur: 31.0, tibia: -21.0}  # mm, w; the closed growth plates


def paint_bones(knee, oedema):
    """Cartilage, cortex and marrow, with or without oedema: [(centre, radius, signal), ...]."""
    rng = knee.rng
    for bone, low, high in BONES:
        where, points = knee.box(low, high)
        u, v, w = points
        surface, cartilage = bone(knee, u, v, w)
        grain = knee.cloud(where, 1.4)
        if cartilage is not None:
            film = surface - cartilage * 1.15  # a film of joint fluid over the cartilage
            knee.paint(where, film, 0.75, soft=0.5)
            knee.paint(where, surface - cartilage, CARTILAGE * (1 + 0.03 * grain), soft=0.5)
            knee.solid[where] |= surface < cartilage
        knee.paint(where, surface, DARK, soft=0.5)
        shaft = 0.02 if bone is fibula else 0.055
        cortex = 1.0 + shaft * np.clip(np.abs(w - 5) - 28, 0, 45)  # thick at the shaft
        marrow = MARROW * rng.uniform(0.9, 1.15) * (1 + 0.09 * grain)
        if bone in SCARS:
            scar = np.abs(w - SCARS[bone] - 2 * np.cos(u / 9) - 1.5 * np.sin(v / 8)) - 0.5
            marrow = marrow * (1 - 0.45 * inside(scar, 0.8))
        knee.paint(where, surface + cortex, marrow, soft=0.7)
        knee.solid[where] |= surface < 0
        for centre, radius, bright in oedema:
            spot = np.sqrt(sum((p - c) ** 2 for p, c in zip(points, centre, strict=True)))
            spot = spot + 0.22 * radius * knee.cloud(where, 4.5)
            held = inside(surface + 1.4, 0.7)
            knee.signal[where] += (bright - MARROW) * np.exp(-((spot / radius) ** 2)) * held
            mask = (spot < 0.9 * radius) & (surface < -1.4)
            if mask.any():
                knee.note("oedema", where, mask)


def draw_lesions(rng, labels):
    """What is wrong with one knee: arguments for the painters.

    Args:
        labels: {"abnormal": 0 or 1, "acl": 0 or 1, "meniscus": 0 or 1}.
    """
    group = next((task for task in ("acl", "meniscus") if labels[task]), None)
    group = group or ("other" if labels["abnormal"] else "normal")
    with_effusion, with_oedema = (rng.random() < share[group] for share in (EFFUSION, OEDEMA))
    if group == "other" and not (with_effusion or with_oedema):
        with_effusion = True
    lesions = {"acl": None, "meniscus": None, "oedema": [], "effusion": 0.0}
    if labels["acl"]:
        partial_tear = bool(rng.random() < PARTIAL_TEARS)
        size = rng.uniform(*TEAR_RADIUS) * (PARTIAL_SIZE if partial_tear else 1)
        place = rng.choice([0.30, 0.50, 0.72], p=[0.35, 0.5, 0.15])  # proximal, middle, distal
        lesions["acl"] = {
            "at": place + rng.uniform(-0.07, 0.07),
            "radii": (size * rng.uniform(0.6, 0.8), size, size * rng.uniform(0.8, 1.05)),
            "signal": rng.uniform(*TEAR_SIGNAL) * (PARTIAL_SIGNAL if partial_tear else 1),
            "partial": partial_tear,
            "sag": rng.uniform(1, 5),  # mm
        }
    if labels["meniscus"]:
        place = rng.choice([1.35, 0.2, -1.2], p=[0.65, 0.2, 0.15])  # posterior, body, anterior
        lesions["meniscus"] = {
            "side": -1 if rng.random() < 0.7 else 1,
            "angle": place + rng.uniform(-0.25, 0.25),
            "half_angle": rng.uniform(*CLEFT_HALF_ANGLE),
            "kind": rng.choice(["horizontal", "vertical", "complex"], p=[0.45, 0.3, 0.25]),
            "slant": rng.uniform(-1, 1),
            "width": rng.uniform(*CLEFT_WIDTH),
            "signal": rng.uniform(*CLEFT_SIGNAL),
            "displaced": bool(rng.random() < DISPLACED_TEARS),
        }
    if with_oedema:
        for _ in range(rng.integers(1, 3)):
            height = rng.choice([rng.uniform(6, 20), -rng.uniform(13, 22)])  # femur or tibia
            side = rng.choice([-1, 1])
            centre = (side * rng.uniform(14, 26), rng.uniform(-10, 18), height)
            lesions["oedema"].append((centre, rng.uniform(7, 13), rng.uniform(*OEDEMA_SIGNAL)))
    if with_effusion:
        lesions["effusion"] = rng.uniform(0.35, 1.0)
    return lesions


def draw_knee(rng, lesions):
    """The knee with its lesions on the grid: a Knee."""
    knee = Knee(rng)
    paint_soft_tissue(knee)
    paint_joint_space(knee, lesions["effusion"])
    paint_menisci(knee, lesions["meniscus"])
    paint_ligaments(knee, lesions["acl"])
    paint_bones(knee, lesions["oedema"])
    knee.settle()
    return knee


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


def scan(knee, pose, plane, size, rng):
    """Cut one plane: uint8 (s, size, size) and its geometry.

    The geometry takes patient mm to voxel indices: index = (direction * mm[axis] - start) / step,
    each for slices, rows and columns.
    """
    axes = PLANES[plane]
    step = rng.uniform(*SPACING[plane])
    low, high = sorted(axes[0][1] * end for end in COVER[plane])
    positions = np.arange(low + rng.uniform(0, step), high, step)
    pixel = FIELD_OF_VIEW / size
    sides = (np.arange(size) + 0.5) * pixel - FIELD_OF_VIEW / 2
    nodes = np.linspace(-FIELD_OF_VIEW / 2, FIELD_OF_VIEW / 2, round(FIELD_OF_VIEW / NODE) + 1)
    part, node = np.modf((sides - nodes[0]) / NODE)
    node = node.astype(int)
    points = np.empty((len(nodes), len(nodes), 3))
    cuts = (-THICKNESS / 4 * step, THICKNESS / 4 * step)  # two cuts make a thick slice
    volume = np.zeros((len(positions), size, size), np.float32)
    for s, position in enumerate(positions):
        for offset in cuts:
            values = (position + offset, nodes[:, None], nodes[None, :])
            for (axis, way), value in zip(axes, values, strict=True):
                points[..., axis] = way * value
            where = np.moveaxis((pose.to_knee(points) + HALF) / GRID, -1, 0)  # (3, k, k)
            where = np.ascontiguousarray(where)
            # (3, k, k) -> (3, size, size), linearly; a matrix product would start BLAS threads
            where = where[:, node] + part[:, None] * (where[:, node + 1] - where[:, node])
            where = where[..., node] + part * (where[..., node + 1] - where[..., node])
            # Beyond the grid the limb goes on as it was at the end ("nearest").
            volume[s] += ndimage.map_coordinates(
                knee.signal, where, order=1, mode="nearest", prefilter=False
            )
    return as_scanner(volume / len(cuts), rng), {
        "axes": [axis for axis, _ in axes],
        "directions": [way for _, way in axes],
        "start_mm": [float(positions[0]), float(sides[0]), float(sides[0])],
        "step_mm": [float(step), pixel, pixel],
        "slices": len(positions),
    }


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


def place(points, geometry):
    """Where a lesion lies in one plane, from its voxels' centres in patient mm (n, 3).

    Returns centre, low and high as [slice, row, column] indices (low to high holds 96 % of the
    lesion along each), and the slices in which its section is at least VISIBLE_AREA.
    """
    index = points[:, geometry["axes"]] * geometry["directions"] - geometry["start_mm"]
    index = index / geometry["step_mm"]
    low, high = np.quantile(index, [0.02, 0.98], axis=0)
    nearest = np.rint(index[:, 0]).astype(int)
    inner = nearest[(nearest >= 0) & (nearest < geometry["slices"])]
    area = np.bincount(inner, minlength=geometry["slices"]) * GRID**3 / geometry["step_mm"][0]
    return {
        "centre": index.mean(axis=0).round(2).tolist(),
        "low": low.round(2).tolist(),
        "high": high.round(2).tolist(),
        "visible": np.flatnonzero(area >= VISIBLE_AREA).tolist(),
    }


def make_exam(exam_id, split, labels, seed, size, out):
    """Draw, cut and write one exam.

    Returns its entry of lesions.json: side; split; planes, each with the geometry that scan()
    describes (step_mm is mm per slice, row and column); lesions, each with kind (acl, meniscus,
    effusion, oedema), the task it belongs to (each is a reason for abnormal too), its centre in
    patient mm, and place()'s indices for each plane.
    """
    # Four streams, so that the same knee can be drawn with other lesions.
    lesion_rng, knee_rng, pose_rng, scan_rng = np.random.default_rng([seed, exam_id]).spawn(4)
    knee = draw_knee(knee_rng, draw_lesions(lesion_rng, labels))
    side = int(pose_rng.choice([-1, 1]))
    pose = Pose(pose_rng, side)
    planes = {}
    for plane in PLANES:
        volume, planes[plane] = scan(knee, pose, plane, size, scan_rng)
        save(out / split / plane / f"{exam_id:04d}.npy", partial(np.save, arr=volume))
    lesions = []
    for kind, task, points in knee.lesions:
        points = pose.to_patient(points)
        centre = points.mean(axis=0).round(2).tolist()
        places = {plane: place(points, geometry) for plane, geometry in planes.items()}
        lesions.append({"kind": kind, "task": task, "mm": centre, "planes": places})
    side = "left" if side > 0 else "right"
    return str(exam_id), {"side": side, "split": split, "planes": planes, "lesions": lesions}


def draw_labels(rng, n):
    """Labels of n exams with MRNet's prevalences, exact but for rounding: list of n dicts."""
    counts = {task: min(max(round(share * n), 1), n - 1) for task, share in PREVALENCE.items()}
    acl = rng.permutation(np.arange(n) < counts["acl"])
    meniscus = rng.permutation(np.arange(n) < counts["meniscus"])
    abnormal = acl | meniscus
    missing = max(counts["abnormal"] - abnormal.sum(), 0)
    abnormal[rng.permutation(np.flatnonzero(~abnormal))[:missing]] = True
    columns = {"abnormal": abnormal, "acl": acl, "meniscus": meniscus}
    return [{task: int(column[i]) for task, column in columns.items()} for i in range(n)]


def save(path, write):
    """`write(file)` beside its place, then rename: no reader ever sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as file:
        write(file)
    os.replace(part, path)


def save_text(path, text):
    save(path, lambda file: file.write(text.encode()))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")  # one line


def parse_arguments():
    parser = Parser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    exams = parser.add_argument_group("exams")
    exams.add_argument("--exams", type=int, default=200, help="to train on; MRNet has 1130")
    exams.add_argument("--valid", type=int, default=60, help="to validate on; MRNet has 120")
    exams.add_argument("--seed", type=int, default=0, help="same seed, same bytes")
    exams.add_argument(
        "--size",
        type=int,
        default=256,
        help="px; 256 is MRNet's, 128 trains four times faster and blurs small tears",
    )
    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, default=Path(__file__).parent, help="data folder")
    run.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes of about 250 MB each"
    )
    args = parser.parse_args()
    for name, least in (("exams", 5), ("valid", 5), ("seed", 0), ("size", 63), ("workers", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}")
    held = [
        p for s in SPLITS for form in (f"{s}-*.csv", f"{s}/*/*.npy") for p in args.out.glob(form)
    ]
    if held and not (args.out / "lesions.json").exists():
        parser.error(f"{held[0]} belongs to another data set; give --out a folder of its own")
    return parser, args


def quiet_interrupt():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer


def make_exams(jobs, args):
    """Yield make_exam's results in the order of `jobs`, a list of (split, labels)."""
    work = partial(make_exam, seed=args.seed, size=args.size, out=args.out)
    columns = range(len(jobs)), *zip(*jobs, strict=True)
    if args.workers == 1:
        yield from map(work, *columns)
        return
    with ProcessPoolExecutor(args.workers, initializer=quiet_interrupt) as pool:
        yield from pool.map(work, *columns)


def main():
    parser, args = parse_arguments()
    rng = np.random.default_rng(args.seed)
    splits = {"train": draw_labels(rng, args.exams), "valid": draw_labels(rng, args.valid)}
    jobs = [(split, labels) for split, rows in splits.items() for labels in rows]
    lesions = args.out / "lesions.json"
    try:
        write_dataset(
            args.out,
            name="phantom",
            version=VERSION,
            synthetic=True,
            source=f"data/phantom/prepare.py --seed {args.seed} --size {args.size}",
            licence="MIT",
            orientation=ORIENTATION,
        )
        save_text(lesions, "{}")  # this folder is the phantom's, and not complete without CSVs
        for path in [p for split in SPLITS for p in args.out.glob(f"{split}-*.csv")]:
            path.unlink()
    except InputError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"cannot write to {args.out}: {error.strerror}; give another --out")
    hidden = not sys.stderr.isatty()
    done = tqdm(make_exams(jobs, args), total=len(jobs), unit="exam", desc="knees", disable=hidden)
    save_text(lesions, json.dumps(dict(done)))
    first = 0
    for split, rows in splits.items():
        for task in PREVALENCE:
            lines = (f"{first + i},{labels[task]}\n" for i, labels in enumerate(rows))
            save_text(args.out / f"{split}-{task}.csv", "".join(lines))
        first += len(rows)
        positive = ", ".join(f"{sum(r[task] for r in rows)} {task}" for task in PREVALENCE)
        print(f"{split}: {len(rows)} exams, {positive}")
    print(f"written to {args.out}; where the lesions are: {lesions.name}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("prepare.py: interrupted; not complete, run it again", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        sys.exit(f"prepare.py: {error}")
