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
OUT/lesions.json: where each lesion lies in each plane. Sizes and places are those of an adult knee,
approximately; nothing here was measured on patients, and no result on it says anything about them.

Knee coordinates, mm: u to lateral, v to posterior, w to superior, origin between the condyles on
the joint line. Patient coordinates: x to the patient's left, y to posterior, z to superior.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial, reduce
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the workers are the parallelism

import numpy as np  # noqa: E402
from scipy import ndimage  # noqa: E402
from tqdm import tqdm  # noqa: E402

PLANES = ("axial", "coronal", "sagittal")
PREVALENCE = {"abnormal": 0.80, "acl": 0.20, "meniscus": 0.37}  # MRNet, Bien et al. 2018

# --- how hard the tasks are -----------------------------------------------------------------------
PARTIAL_TEARS = 0.30  # share of ACL tears that are partial: smaller, darker, some fibres left
TEAR_RADIUS = (7.0, 12.5)  # mm; half extent of the bright mass that replaces torn fibres
TEAR_SIGNAL = (0.62, 1.00)  # fluid is 0.95
INTACT_SIGNAL = (0.03, 0.20)  # an intact ACL may be grey too
CLEFT_WIDTH = (1.8, 3.2)  # mm; a meniscal tear's bright line
DISPLACED_TEARS = 0.35  # share of meniscal tears with a part missing, filled by fluid
EFFUSION = {"acl": 0.60, "meniscus": 0.50, "other": 0.75, "normal": 0.0}  # how often
OEDEMA = {"acl": 0.45, "meniscus": 0.35, "other": 0.55, "normal": 0.0}

# --- the scan -------------------------------------------------------------------------------------
GRID = 0.8  # mm; the 3-D knee is drawn at this step
HALF = (64.0, 80.0, 80.0)  # mm; it reaches so far in u, v, w
FIELD_OF_VIEW = 150.0  # mm; a slice's side
# Range that the slices cover along x, y or z in mm, and the distance from slice to slice.
COVER = {"axial": (-52.0, 58.0), "coronal": (-52.0, 44.0), "sagittal": (-43.0, 43.0)}
SPACING = {"axial": (3.9, 5.4), "coronal": (3.6, 5.0), "sagittal": (3.4, 4.6)}
THICKNESS = 0.85  # of the spacing; the rest is the gap between slices

# --- tissue, fat-suppressed proton density --------------------------------------------------------
AIR, FAT, MARROW, MUSCLE, SYNOVIUM = 0.0, 0.20, 0.20, 0.38, 0.36
CARTILAGE, FLUID, VESSEL, SKIN, DARK = 0.62, 0.95, 0.75, 0.35, 0.05


class Knee:
    """A 3-D knee on a grid: paints tissue by implicit surfaces, each in its own bounding box."""

    def __init__(self, rng):
        self.rng = rng
        self.axes = [np.arange(-h, h, GRID, dtype=np.float32) for h in HALF]
        self.signal = np.full([len(a) for a in self.axes], AIR, np.float32)
        self.lesions = []

    def box(self, low, high):
        """Index slices and broadcastable coordinates u, v, w of the box from low to high, mm."""
        where, points = [], []
        for k, axis in enumerate(self.axes):
            i, j = np.searchsorted(axis, [low[k], high[k]])
            where.append(slice(max(i, 0), max(j, i + 1)))
            points.append(axis[where[k]].reshape([-1 if k == n else 1 for n in range(3)]))
        return tuple(where), points

    def paint(self, where, distance, value, soft=0.45):
        """Blend `value` in where `distance` (mm) is negative; `soft` is the width of its edge."""
        cover = 1 / (1 + np.exp(np.clip(distance / (soft / 2), -30, 30)))
        part = self.signal[where]
        part += cover * (value - part)

    def add(self, shape, value, soft=0.45):
        """Paint a shape made by one of the functions below: (low, high, distance)."""
        low, high, distance = shape
        where, points = self.box(low, high)
        self.paint(where, distance(*points), value, soft)

    def note(self, kind, task, where, mask):
        """Remember a lesion's voxels as points in knee coordinates (n, 3)."""
        found = np.argwhere(mask)
        if len(found):
            origin = [axis[s.start] for axis, s in zip(self.axes, where, strict=True)]
            self.lesions.append((kind, task, found * GRID + origin))


def ellipsoid(centre, radii):
    """Distance is exact on the surface's axes and close to it elsewhere."""
    centre, radii = np.float32(centre), np.float32(radii)

    def distance(u, v, w):
        r = np.sqrt(
            sum(((p - c) / s) ** 2 for p, c, s in zip((u, v, w), centre, radii, strict=True))
        )
        return (r - 1) * radii.min()

    return centre - radii - 4, centre + radii + 4, distance


def capsule(start, end, radius, end_radius=None, flat=(1, 1, 1)):
    """A rod from start to end; the radius may change; `flat` divides distances along an axis."""
    start, end, flat = np.float32(start), np.float32(end), np.float32(flat)
    end_radius = radius if end_radius is None else end_radius
    reach = max(radius, end_radius) * flat + 4

    def distance(u, v, w):
        along = (end - start) / flat
        from_start = [(p - s) / f for p, s, f in zip((u, v, w), start, flat, strict=True)]
        t = sum(d * a for d, a in zip(from_start, along, strict=True)) / (along @ along)
        t = np.clip(t, 0, 1)
        apart = sum((d - t * a) ** 2 for d, a in zip(from_start, along, strict=True))
        return np.sqrt(apart) - (radius + t * (end_radius - radius))

    return np.minimum(start, end) - reach, np.maximum(start, end) + reach, distance


def union(a, b, blend=4.0):
    """Smooth minimum of two distances: a fillet of about `blend` mm where they meet."""
    h = np.clip(0.5 + 0.5 * (b - a) / blend, 0, 1)
    return b + h * (a - b) - blend * h * (1 - h)


def intersection(*distances):
    """Distance to what all shapes share."""
    return reduce(np.maximum, distances)


def femur_distance(u, v, w):
    shaft = capsule((0, -3, 95), (0, 0, 34), 13, 17)[2](u, v, w)
    flare = ellipsoid((0, 2, 28), (33, 21, 22))[2](u, v, w)
    medial = ellipsoid((-22.5, 7, 15.5), (15, 27, 19))[2](u, v, w)
    lateral = ellipsoid((22.5, 6, 16), (15, 26, 18.5))[2](u, v, w)
    trochlea = ellipsoid((1, -13, 20), (27, 14, 17))[2](u, v, w)
    groove = ellipsoid((1, -31, 20), (9, 9, 24))[2](u, v, w)
    notch = ellipsoid((0, 19, 3), (9.5, 27, 17))[2](u, v, w)
    bone = union(union(shaft, flare, 8), union(union(medial, lateral, 3), trochlea, 5), 5)
    return np.maximum(bone, -union(notch, groove, 1))


def tibia_distance(u, v, w):
    narrow = np.clip((-w - 12) / 38, 0, 1)
    scale = 1 - 0.60 * narrow * narrow * (3 - 2 * narrow)  # plateau to shaft
    radial = (np.sqrt((u / 37) ** 2 + ((v - 5) / 25) ** 2) - scale) * 25
    dished = 0.0022 * ((np.abs(u) - 20) ** 2) - 0.8  # each plateau is a shallow dish
    bone = union(np.maximum(radial, w + 9.5 - np.clip(dished, -1, 2)), radial * 0 + 60, 1)
    for side in (-1, 1):
        bone = union(bone, ellipsoid((5 * side, 5, -9), (3.5, 8, 5))[2](u, v, w), 3)
    return union(bone, ellipsoid((2, -17, -36), (9, 9, 13))[2](u, v, w), 6)


def patella_distance(u, v, w):
    body = ellipsoid((0, -41, 24), (21, 8, 20))[2](u, v, w)
    return union(body, ellipsoid((-2, -36.5, 25), (7, 6, 14))[2](u, v, w), 6)


def paint_soft_tissue(knee):
    """Skin, fat, muscles, vessels: everything that the joint lies in."""
    rng = knee.rng
    where, (u, v, w) = knee.box([-h for h in HALF], HALF)
    girth = 1 + 0.0011 * (w - 5) + 0.03 * np.sin(w / 31)
    limb = (np.sqrt((u / 58) ** 2 + ((v - 6) / 62) ** 2) - girth) * 58
    knee.paint(where, limb, SKIN)
    knee.paint(where, limb + 1.8, FAT)
    muscles = [
        ((-17, 36, 30), (-23, 40, -82), 11, 17),  # gastrocnemius, medial head
        ((17, 35, 26), (20, 39, -82), 10, 15),  # gastrocnemius, lateral head
        ((6, 27, -22), (-8, 25, -46), 7, 9),  # popliteus
        ((4, 26, -50), (4, 28, -85), 10, 16),  # soleus
        ((-27, 33, 85), (-27, 36, 8), 13, 6),  # semimembranosus
        ((-36, 22, 85), (-40, 24, -10), 8, 4),  # sartorius and gracilis
        ((29, 33, 85), (36, 28, 2), 13, 5),  # biceps femoris
        ((-27, -14, 88), (-30, -18, 32), 20, 8),  # vastus medialis
        ((27, -16, 88), (29, -18, 40), 19, 7),  # vastus lateralis
        ((0, -22, 90), (0, -16, 66), 15, 4),  # vastus intermedius
        ((25, -8, -38), (22, -6, -88), 8, 15),  # tibialis anterior
        ((37, 8, -34), (36, 8, -88), 5, 9),  # peronei
    ]
    for start, end, radius, end_radius in muscles:
        bulk = rng.uniform(1.15, 1.4)
        knee.add(
            capsule(start, end, radius * bulk, end_radius * bulk), DARK + 0.11, soft=1.2
        )  # fascia
        inner = capsule(start, end, radius * bulk - 0.9, end_radius * bulk - 0.9)
        knee.add(inner, MUSCLE * rng.uniform(0.92, 1.08), soft=1.0)
    for start, end, radius in (
        ((4, 41, 85), (2, 38, -85), 3.2),
        ((-4, 44, 85), (-3, 41, -85), 4.2),
    ):
        knee.add(capsule(start, end, radius + 0.8), DARK + 0.1)
        knee.add(capsule(start, end, radius), VESSEL * rng.uniform(0.7, 1.1))
    nerve = capsule((9, 46, 85), (8, 45, -85), 2.5)
    knee.add(nerve, 0.42)


def paint_joint_space(knee, effusion):
    """Synovium, Hoffa's fat pad, fluid. `effusion` 0 to 1 fills the recesses; returns nothing."""
    rng = knee.rng
    knee.add(ellipsoid((0, 4, 2), (40, 31, 22)), 0.27, soft=3)  # capsule and fat round the notch
    knee.add(ellipsoid((0, -31, -4), (23, 13, 18)), 0.23, soft=2)  # Hoffa's fat pad
    for _ in range(5):  # its septa
        at = (rng.uniform(-10, 10), rng.uniform(-38, -26), rng.uniform(-14, 6))
        turn = (at[0] + rng.uniform(-9, 9), at[1] + rng.uniform(-4, 4), at[2] + rng.uniform(-9, 9))
        knee.add(capsule(at, turn, 0.6), 0.36)
    knee.add(ellipsoid((0, 4, -6), (35, 24, 6)), SYNOVIUM, soft=2)  # between the bones
    recesses = [
        ((0, -27, 54), (19, 1.2 + 6.5 * effusion, 17)),  # suprapatellar
        ((-25, -24, 24), (5, 1 + 5 * effusion, 13)),  # medial gutter
        ((26, -24, 26), (5, 1 + 5 * effusion, 13)),  # lateral gutter
        ((0, 27, 8), (9, 0.8 + 3 * effusion, 7)),  # behind the PCL
        ((-20, 34, 6), (6, 0.6 + 3.5 * effusion, 8 + 4 * effusion)),  # popliteal
    ]
    for k, (centre, radii) in enumerate(recesses):
        low, high, distance = ellipsoid(centre, radii)
        where, points = knee.box(low, high)
        inside = distance(*points)
        knee.paint(where, inside, FLUID * (1 if effusion else 0.85), soft=1.0)
        if effusion and k == 0:
            knee.note("effusion", "abnormal", where, inside < 0)


def meniscus_coordinates(u, v, side):
    """Ring coordinate (1 at the outer rim) and angle (0 lateral-most to the rim, + posterior)."""
    wide, deep, middle = (15.5, 21.0, 6.0) if side < 0 else (15.0, 17.0, 5.0)
    across, along = (u - 21.5 * side) * side / wide, (v - middle) / deep
    return np.sqrt(across**2 + along**2), np.arctan2(along, across)


def paint_menisci(knee, tear):
    """Two dark wedges on the tibial plateau; `tear` is None or a dict that places a tear."""
    for side in (-1, 1):  # medial, lateral
        where, (u, v, w) = knee.box(
            (-42 if side < 0 else 3, -22, -13), (-3 if side < 0 else 42, 33, 3)
        )
        ring, angle = meniscus_coordinates(u, v, side)
        opening = 2.45 if side < 0 else 2.75  # the C is open towards the midline
        inner = 0.46
        floor, rise = -7.2, 7.0 * np.clip((ring - inner) / (1 - inner), 0, None)
        wedge = intersection(
            (ring - 1) * 15,
            (inner - ring) * 15,
            (w - floor - rise) * 0.8,
            floor - 0.8 - w,
            (np.abs(angle) - opening) * 9,
        )
        knee.paint(where, wedge, DARK, soft=0.5)
        if tear is None or tear["side"] != side:
            continue
        turned = np.abs(angle - tear["angle"]) - tear["half_angle"]
        if tear["kind"] == "horizontal":
            cleft = np.abs(w - floor - 0.45 * rise - 0.6) - tear["width"] / 2
        elif tear["kind"] == "vertical":
            cleft = np.abs((ring - 0.74) * 15 + 0.25 * (w - floor)) - tear["width"] / 2
        else:  # radial: through the whole wedge
            cleft = np.abs(angle - tear["angle"]) * 15 - tear["width"]
        cleft = intersection(cleft, wedge - 0.8, turned * 13)
        if tear["displaced"]:  # the free edge is gone, fluid in its place
            lost = intersection((ring - 0.70) * 15, wedge - 0.6, turned * 13)
            cleft = np.minimum(cleft, lost)
        knee.paint(where, cleft, FLUID * tear["signal"], soft=0.5)
        knee.note("meniscus", "meniscus", where, cleft < 0)


ACL = np.float32([(7.0, 15.5, 14.5), (-1.5, -6.5, -7.5)])  # femoral and tibial attachment
PCL = np.float32([(-6.5, 0, 9), (-3.5, 15, 6.5), (-1, 24, -4), (0, 29, -15)])


def paint_ligaments(knee, tear):
    """Cruciates, collaterals, tendons; `tear` is None or a dict that describes a torn ACL."""
    rng = knee.rng
    for start, end in zip(PCL[:-1], PCL[1:], strict=True):
        knee.add(capsule(start, end, 4.6), DARK, soft=0.7)
    paint_acl(knee, tear)
    knee.add(capsule((-37, 4, 24), (-36, -2, -42), 1.5, flat=(1, 6, 1)), DARK)  # MCL
    knee.add(capsule((37, 8, 18), (41, 19, -20), 1.9), DARK)  # LCL
    bow = rng.uniform(-2, 2)
    tendon = [(0, -35, 92), (0, -42, 46), (0, -48, 8), (0, -41 + bow, -14), (0, -28, -38)]
    for k in (0, 2, 3):  # quadriceps tendon, patellar tendon in two parts
        knee.add(capsule(tendon[k], tendon[k + 1], 2.7, flat=(4.5, 1, 1)), DARK, soft=0.7)


def paint_acl(knee, tear):
    rng = knee.rng
    femoral, tibial = ACL + rng.normal(0, 0.7, ACL.shape)
    thick = rng.uniform(3.8, 5.2)
    low, high, distance = capsule(femoral, tibial, thick * 0.85, thick * 1.1, (0.85, 1, 1))
    where, points = knee.box(low - 12, high + 12)
    band = distance(*points)
    u, v, w = points
    fibres = rng.uniform(*INTACT_SIGNAL) + 0.10 * np.sin(
        (v + w) * 0.75 + 0.9 * u + rng.uniform(0, 6)
    )
    if tear is None:
        knee.paint(where, band, np.clip(fibres, 0.03, 0.4), soft=0.9)
        return
    centre = femoral + tear["at"] * (tibial - femoral)
    radii = np.float32(tear["radii"])
    mass = ellipsoid(centre, radii)[2](*points)
    wisps = rng.normal(0, 1, np.broadcast_shapes(*(p.shape for p in points))).astype(np.float32)
    wisps = ndimage.gaussian_filter(wisps, 2.2)
    mass = mass + 2.2 * wisps / wisps.std()  # an ill-defined edge
    sagged = band + (0.0 if tear["partial"] else 0.5)  # what is left of the fibres is thinner
    knee.paint(where, sagged, np.clip(fibres + 0.1, 0.05, 0.45), soft=1.4)
    left = 0.45 * (band < -thick * 0.35) if tear["partial"] else 0.0
    knee.paint(where, mass, tear["signal"] * (1 - left) + 0.08 * wisps / wisps.std(), soft=3.0)
    knee.note("acl", "acl", where, mass < 0)


def paint_bones(knee, oedema):
    """Cartilage, cortex and marrow of femur, tibia, patella and fibula, with or without oedema."""
    rng = knee.rng
    fibula = union_of(
        ellipsoid((37, 20, -25), (8, 9, 10)), capsule((37, 20, -30), (36, 18, -95), 6)
    )
    bones = [
        ((-44, -34, -8), (44, 38, 90), femur_distance, 2.4),
        ((-44, -32, -90), (44, 34, 2), tibia_distance, 2.2),
        ((-27, -54, -2), (27, -24, 50), patella_distance, 2.8),
        ((24, 6, -90), (50, 34, -8), fibula, 0),
    ]
    for low, high, distance, cartilage in bones:
        where, points = knee.box(low, high)
        surface = distance(*points)
        if cartilage:
            u, v, w = points
            # Cartilage covers what faces the joint: lower femur, plateau, back of the patella.
            upper = w - 26 - 0.45 * np.clip(-v, 0, 30)
            facing = intersection(surface - cartilage, upper, np.abs(u) - 32, -12 - w, -v - 40)
            knee.paint(where, facing, CARTILAGE, soft=0.6)
        knee.paint(where, surface, DARK, soft=0.5)
        knee.paint(where, surface + 1.1, MARROW * rng.uniform(0.9, 1.1), soft=0.6)
        for centre, radius, signal in oedema:
            spot = np.sqrt(sum((p - c) ** 2 for p, c in zip(points, centre, strict=True)))
            inside = 1 / (1 + np.exp(np.clip((surface + 1.5) / 0.4, -30, 30)))
            glow = np.exp(-((spot / radius) ** 2)) * inside
            knee.signal[where] += (signal - MARROW) * glow
            knee.note("oedema", "abnormal", where, (spot < radius) & (surface < -1.5))


def union_of(a, b):
    return lambda u, v, w: union(a[2](u, v, w), b[2](u, v, w), 3)


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
    acl = meniscus = None
    if labels["acl"]:
        partial_tear = rng.random() < PARTIAL_TEARS
        size = rng.uniform(*TEAR_RADIUS) * (0.7 if partial_tear else 1)
        acl = {
            "at": rng.choice([0.3, 0.5, 0.7], p=[0.35, 0.5, 0.15]) + rng.uniform(-0.08, 0.08),
            "radii": (size * rng.uniform(0.6, 0.8), size, size * rng.uniform(0.8, 1.1)),
            "signal": rng.uniform(*TEAR_SIGNAL) * (0.75 if partial_tear else 1),
            "partial": partial_tear,
        }
    if labels["meniscus"]:
        place = rng.choice([1.3, 0.2, -1.2], p=[0.65, 0.2, 0.15])  # posterior horn, body, anterior
        meniscus = {
            "side": -1 if rng.random() < 0.7 else 1,
            "angle": place + rng.uniform(-0.3, 0.3),
            "half_angle": rng.uniform(0.35, 0.7),
            "kind": rng.choice(["horizontal", "vertical", "radial"], p=[0.5, 0.3, 0.2]),
            "width": rng.uniform(*CLEFT_WIDTH),
            "signal": rng.uniform(0.7, 1.0),
            "displaced": rng.random() < DISPLACED_TEARS,
        }
    oedema = []
    if with_oedema:
        for _ in range(rng.integers(1, 3)):
            side = rng.choice([-1, 1])
            centre = (
                side * rng.uniform(16, 27),
                rng.uniform(-10, 22),
                rng.choice([rng.uniform(4, 18), rng.uniform(-26, -15)]),
            )
            oedema.append((centre, rng.uniform(7, 13), rng.uniform(0.5, 0.85)))
    effusion = rng.uniform(0.35, 1.0) if with_effusion else 0.0
    return {"acl": acl, "meniscus": meniscus, "oedema": oedema, "effusion": effusion}


def draw_knee(rng, lesions):
    """The knee with its lesions on the grid: a Knee."""
    knee = Knee(rng)
    paint_soft_tissue(knee)
    paint_joint_space(knee, lesions["effusion"])
    paint_menisci(knee, lesions["meniscus"])
    paint_ligaments(knee, lesions["acl"])
    paint_bones(knee, lesions["oedema"])
    texture = rng.normal(0, 1, [n // 3 for n in knee.signal.shape]).astype(np.float32)
    zoom = [n / m for n, m in zip(knee.signal.shape, texture.shape, strict=True)]
    knee.signal *= 1 + 0.09 * ndimage.zoom(texture, zoom, order=1)
    np.clip(knee.signal, 0, 1.1, out=knee.signal)
    return knee


class Pose:
    """How one knee lies in the scanner: patient coordinates (mm) to knee coordinates and back."""

    def __init__(self, rng, side):
        self.side = side  # +1 left knee (lateral is the patient's left), -1 right knee
        a, b, c = np.radians(rng.normal(0, [4, 3, 5]))
        about_x = np.array(
            [[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]]
        )
        about_y = np.array(
            [[math.cos(b), 0, math.sin(b)], [0, 1, 0], [-math.sin(b), 0, math.cos(b)]]
        )
        about_z = np.array(
            [[math.cos(c), -math.sin(c), 0], [math.sin(c), math.cos(c), 0], [0, 0, 1]]
        )
        size = rng.uniform(0.90, 1.10)
        self.matrix = about_x @ about_y @ about_z @ np.diag([side, 1, 1]) / size
        self.shift = rng.normal(0, [4, 4, 5])
        self.wave = (
            rng.uniform(0.05, 0.085, (3, 3)),
            rng.uniform(0, 6.3, 3),
            rng.uniform(0.6, 1.5, 3),
        )

    def bend(self, points):
        """A smooth displacement of a millimetre or so, so that no two bones are alike."""
        number, phase, size = self.wave
        return size * np.sin(points @ number + phase)

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


def slice_axes(plane):
    """Patient axes (index, direction) of slices, rows and columns, as MRNet has them."""
    return {
        "axial": ((2, -1), (1, 1), (0, 1)),
        "coronal": ((1, 1), (2, -1), (0, 1)),
        "sagittal": ((0, 1), (2, -1), (1, 1)),
    }[plane]


def scan(knee, pose, plane, size, rng):
    """Cut one plane: uint8 (s, size, size) and its geometry.

    The geometry maps patient mm to voxel indices: index = (direction * mm - start) / step, for
    slices, rows and columns.
    """
    axes = slice_axes(plane)
    step = rng.uniform(*SPACING[plane])
    low, high = sorted(axes[0][1] * c for c in COVER[plane])
    first = low + rng.uniform(0, step)
    positions = np.arange(first, high, step)
    pixel = FIELD_OF_VIEW / size
    sides = (np.arange(size) + 0.5) * pixel - FIELD_OF_VIEW / 2
    # The way into the knee is smooth: it is computed at nodes 5 mm apart and interpolated between.
    nodes = np.linspace(-FIELD_OF_VIEW / 2, FIELD_OF_VIEW / 2, round(FIELD_OF_VIEW / 5) + 1)
    between = np.stack([np.interp(sides, nodes, one) for one in np.eye(len(nodes))], axis=1)
    points = np.empty((len(nodes), len(nodes), 3))
    cuts = (-THICKNESS / 4 * step, THICKNESS / 4 * step)  # two cuts make a thick slice
    volume = np.zeros((len(positions), size, size), np.float32)
    for s, position in enumerate(positions):
        for offset in cuts:
            values = (position + offset, nodes[:, None], nodes[None, :])
            for (axis, way), value in zip(axes, values, strict=True):
                points[..., axis] = way * value
            where = np.moveaxis((pose.to_knee(points) + HALF) / GRID, -1, 0)  # (3, k, k)
            where = between @ where @ between.T  # (3, k, k) -> (3, size, size)
            volume[s] += ndimage.map_coordinates(knee.signal, where, order=1, prefilter=False)
    volume /= len(cuts)
    return as_scanner(volume, rng), {
        "axes": [axis for axis, _ in axes],
        "directions": [way for _, way in axes],
        "start_mm": [float(first), float(sides[0]), float(sides[0])],
        "step_mm": [float(step), pixel, pixel],
    }


def as_scanner(volume, rng):
    """Coil shading, noise and scale: signal 0..1 -> uint8."""
    s, h, w = volume.shape
    z, y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in (s, h, w))
    tilt, bowl = rng.normal(0, 0.10, 3), rng.uniform(-0.22, 0.02, 3)
    shade = [np.exp(t * c + b * c * c) for t, b, c in zip(tilt, bowl, (z, y, x), strict=True)]
    volume = volume * shade[0][:, None, None] * shade[1][:, None] * shade[2]
    noise = rng.uniform(0.018, 0.040)
    real = volume + rng.normal(0, noise, volume.shape).astype(np.float32)
    imaginary = rng.normal(0, noise, volume.shape).astype(np.float32)
    grey = np.hypot(real, imaginary) * rng.uniform(210, 260)  # Rician, as magnitude images have it
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8)


def place(points, geometry):
    """A lesion's centre and extent in one plane's voxel indices, from its points in patient mm."""
    axes, ways = geometry["axes"], np.array(geometry["directions"])
    index = (points[:, axes] * ways - geometry["start_mm"]) / geometry["step_mm"]
    low, high = np.quantile(index, [0.02, 0.98], axis=0)
    return {
        "centre": index.mean(axis=0).round(2).tolist(),
        "low": low.round(2).tolist(),
        "high": high.round(2).tolist(),
    }


def make_exam(exam_id, split, labels, seed, size, out):
    """Draw, cut and write one exam; returns its entry of lesions.json."""
    rng = np.random.default_rng([seed, exam_id])
    side = int(rng.choice([-1, 1]))
    knee = draw_knee(rng, draw_lesions(rng, labels))
    pose = Pose(rng, side)
    entry = {"side": "left" if side > 0 else "right", "split": split, "planes": {}, "lesions": []}
    for plane in PLANES:
        volume, geometry = scan(knee, pose, plane, size, rng)
        entry["planes"][plane] = geometry | {"slices": len(volume)}
        save_array(out / split / plane / f"{exam_id:04d}.npy", volume)
    for kind, task, points in knee.lesions:
        points = pose.to_patient(points)
        planes = {plane: place(points, entry["planes"][plane]) for plane in PLANES}
        entry["lesions"].append({"kind": kind, "task": task, "planes": planes})
    return str(exam_id), entry


def draw_labels(rng, n):
    """Labels of n exams with MRNet's prevalences, exact but for rounding: list of dicts."""
    counts = {task: min(max(round(share * n), 1), n - 1) for task, share in PREVALENCE.items()}
    acl = rng.permutation(np.arange(n) < counts["acl"])
    meniscus = rng.permutation(np.arange(n) < counts["meniscus"])
    hurt = acl | meniscus
    while hurt.all():  # a few exams only: leave one knee without a tear
        meniscus = rng.permutation(meniscus)
        hurt = acl | meniscus
    others = rng.permutation(np.flatnonzero(~hurt))[: max(counts["abnormal"] - hurt.sum(), 0)]
    abnormal = hurt.copy()
    abnormal[others] = True
    if abnormal.all():
        abnormal[others[-1]] = False
    return [
        {"abnormal": int(a), "acl": int(b), "meniscus": int(c)}
        for a, b, c in zip(abnormal, acl, meniscus, strict=True)
    ]


def save_array(path, array):
    """Write a .npy beside its place, then rename it: no reader ever sees a part."""
    replace(path, lambda file: np.save(file, array))


def save_text(path, text):
    replace(path, lambda file: file.write(text.encode()))


def replace(path, write):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False, suffix=".tmp") as file:
        try:
            write(file)
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--exams", type=int, default=200, help="training exams; MRNet has 1130")
    parser.add_argument("--valid", type=int, default=60, help="validation exams; MRNet has 120")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="data folder")
    parser.add_argument(
        "--size",
        type=int,
        default=256,
        help="px; 256 is MRNet's, 128 trains four times faster and blurs small tears",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args()
    for name, least in (("exams", 5), ("valid", 5), ("size", 63), ("workers", 1), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}")
    return parser, args


def main():
    parser, args = parse_arguments()
    known = args.out / "lesions.json"
    csvs = [args.out / f"{split}-{task}.csv" for split in ("train", "valid") for task in PREVALENCE]
    if any(path.exists() for path in csvs) and not known.exists():
        parser.error(f"{args.out} holds another data set; give an --out of its own")
    try:
        for path in [*csvs, known]:  # until they are back, the data set is not complete
            path.unlink(missing_ok=True)
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"cannot write to {args.out}: {error.strerror}")

    rng = np.random.default_rng(args.seed)
    splits = {"train": draw_labels(rng, args.exams), "valid": draw_labels(rng, args.valid)}
    jobs = [(split, labels) for split, rows in splits.items() for labels in rows]
    work = partial(make_exam, seed=args.seed, size=args.size, out=args.out)
    with ProcessPoolExecutor(args.workers) as pool:
        entries = pool.map(work, range(len(jobs)), *zip(*jobs, strict=True))
        bar = tqdm(
            entries, total=len(jobs), unit="exam", desc="knees", disable=not sys.stderr.isatty()
        )
        lesions = dict(bar)
    save_text(known, json.dumps(lesions))
    first = 0
    for split, rows in splits.items():
        for task in PREVALENCE:
            lines = (f"{first + i},{labels[task]}\n" for i, labels in enumerate(rows))
            save_text(args.out / f"{split}-{task}.csv", "".join(lines))
        first += len(rows)
        positive = ", ".join(f"{sum(r[task] for r in rows)} {task}" for task in PREVALENCE)
        print(f"{split}: {len(rows)} exams, {positive}")
    print(f"written to {args.out}; lesions in {known.name}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("prepare.py: interrupted; nothing is complete, run it again")
