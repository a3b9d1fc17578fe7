"""The tissue of a knee, painted layer by layer, with or without lesions.

Sizes and places are those of an adult knee, approximately; nothing was measured on patients.
Lengths in mm, knee coordinates as in data/phantom/knee.py.
"""

import numpy as np

from data.phantom.knee import Knee
from data.phantom.menisci import paint_menisci
from data.phantom.shapes import (
    all_of,
    capsule,
    coarse_noise,
    double,
    ellipsoid,
    inside,
    shared,
    tube,
    union,
)

# Signal of tissue, fat-suppressed proton density.
FAT, MARROW, MUSCLE, SYNOVIUM, SKIN = 0.20, 0.18, 0.38, 0.36, 0.36
CARTILAGE, FLUID, VESSEL, NERVE, DARK = 0.58, 0.95, 0.75, 0.40, 0.05
INTACT_SIGNAL = (0.03, 0.17)  # an intact ACL may be grey too (mucoid change, partial volume)
INTACT_RADIUS = (3.6, 5.2)  # mm; half thickness of an ACL
MUCOID = 0.10  # share of intact ACLs with mucoid degeneration: thick and grey, as a tear may look
MUCOID_RADIUS, MUCOID_SIGNAL = (5.0, 6.5), (0.28, 0.48)
NOTCH_FLUID = 0.40  # share of knees with some harmless fluid beside the cruciates
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


def paint_acl(knee, tear):
    """The anterior cruciate ligament; `tear` is None or a dict that describes the tear.

    A tear's mass is ill defined; a complete tear leaves frayed stumps, of which the tibial one
    sags, a partial tear leaves some fibres across.
    """
    rng = knee.rng
    femoral, tibial = np.add(ACL, rng.normal(0, 0.6, (2, 3)))
    thick, grey = rng.uniform(*INTACT_RADIUS), rng.uniform(*INTACT_SIGNAL)
    mucoid = rng.uniform(*MUCOID_RADIUS), rng.uniform(*MUCOID_SIGNAL)
    if rng.random() < MUCOID and tear is None:
        thick, grey = mucoid
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


def draw_knee(rng, lesions):
    """The knee with its lesions on the grid: a Knee."""
    knee = Knee(rng)
    paint_soft_tissue(knee)
    paint_joint_space(knee, lesions["effusion"])
    paint_menisci(knee, lesions["meniscus"], lesions["extrusion"], lesions["cyst"])
    paint_ligaments(knee, lesions["acl"])
    paint_bones(knee, lesions["oedema"])
    if lesions["abnormal"]:
        knee.settle()
    return knee
