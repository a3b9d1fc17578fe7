"""Which lesions a knee has, and how large and bright they are: how hard the tasks are."""

import numpy as np

PREVALENCE = {"abnormal": 0.80, "acl": 0.20, "meniscus": 0.37}  # MRNet, Bien et al. 2018
TASK_OF = {"acl": "acl", "meniscus": "meniscus", "extrusion": "meniscus", "fragment": "meniscus",
           "cyst": "meniscus", "effusion": "abnormal", "oedema": "abnormal"}  # fmt: skip
# The anterior cruciate ligament
PARTIAL_TEARS = 0.35  # share of torn ACLs that are partial: smaller, darker, some fibres left
PARTIAL_SIZE, PARTIAL_SIGNAL = 0.75, 0.75  # of a complete tear's
SUBTLE_ACL = 0.08  # share of torn ACLs of which hardly anything shows
SUBTLE_SIZE, SUBTLE_SIGNAL = 0.40, 0.40  # of a complete tear's
TEAR_RADIUS = (7.0, 13.0)  # mm; half length of the bright mass in place of torn fibres
TEAR_SIGNAL = (0.55, 1.00)  # of that mass; fluid is 0.95, muscle 0.38
# The menisci
CLEFT_WIDTH = (2.4, 4.4)  # mm; a meniscal tear's bright line
CLEFT_SIGNAL = (0.70, 1.00)  # of fluid's
SUBTLE_TEARS = 1 / 3  # share of meniscal tears that are a thin, faint line and nothing else
SUBTLE_WIDTH, SUBTLE_CLEFT = (0.4, 0.8), (0.20, 0.40)  # mm; of fluid's signal
CLEFT_HALF_ANGLE = (0.45, 0.90)  # rad round the meniscus; 15 mm each
DISPLACED_TEARS = 0.50  # share of meniscal tears whose free edge is gone, with fluid in its place
BUCKET_HANDLES = 0.25  # share of medial tears whose free edge lies in the notch
EXTRUDED = 0.75  # share of torn menisci that stand over the edge of the tibia
EXTRUSION, NO_EXTRUSION = (3.0, 6.0), (0.0, 1.5)  # mm
CYSTS = 0.40  # share of torn menisci with a cyst beside them
CYST_RADIUS = (4.0, 7.0)  # mm
# The rest of the joint: how often, by group, and how much
EFFUSION = {"acl": 0.70, "meniscus": 0.60, "other": 0.75, "normal": 0.30}
EFFUSION_SIZE = (0.20, 1.0)
OEDEMA = {"acl": 0.45, "meniscus": 0.35, "other": 0.55, "normal": 0.15}
OEDEMA_RADIUS, OEDEMA_SIGNAL = (6.0, 13.0), (0.36, 0.80)
# What a normal knee may have: some fluid, some red marrow.
HARMLESS_EFFUSION = (0.05, 0.30)
HARMLESS_RADIUS, HARMLESS_SIGNAL = (5.0, 8.0), (0.26, 0.42)


def draw_labels(rng, n):
    """Labels of n exams with MRNet's prevalences, exact but for rounding.

    Returns:
        list of n dicts: 0 or 1 for each task and for subtle_tear, SUBTLE_TEARS of the torn menisci,
        exact but for rounding, since a few positive exams leave much to chance.
    """
    counts = {task: min(max(round(share * n), 1), n - 1) for task, share in PREVALENCE.items()}
    acl = rng.permutation(np.arange(n) < counts["acl"])
    meniscus = rng.permutation(np.arange(n) < counts["meniscus"])
    abnormal = acl | meniscus
    missing = max(counts["abnormal"] - abnormal.sum(), 0)
    abnormal[rng.permutation(np.flatnonzero(~abnormal))[:missing]] = True
    torn = np.flatnonzero(meniscus)
    subtle = np.zeros(n, bool)
    subtle[rng.spawn(1)[0].permutation(torn)[: round(SUBTLE_TEARS * len(torn))]] = True
    columns = {"abnormal": abnormal, "acl": acl, "meniscus": meniscus, "subtle_tear": subtle}
    return [{task: int(column[i]) for task, column in columns.items()} for i in range(n)]


def draw_lesions(rng, labels):
    """What is wrong with one knee: arguments for the painters.

    Args:
        labels: {"abnormal": 0 or 1, "acl": 0 or 1, "meniscus": 0 or 1, "subtle_tear": 0 or 1}.
    """
    group = next((task for task in ("acl", "meniscus") if labels[task]), None)
    group = group or ("other" if labels["abnormal"] else "normal")
    with_effusion, with_oedema = (rng.random() < share[group] for share in (EFFUSION, OEDEMA))
    if group == "other" and not (with_effusion or with_oedema):
        with_effusion = True
    lesions = {"abnormal": bool(labels["abnormal"]), "acl": None, "meniscus": None, "cyst": None}
    lesions |= {"oedema": [], "effusion": 0.0}
    lesions["extrusion"] = {side: rng.uniform(*NO_EXTRUSION) for side in (-1, 1)}
    if labels["acl"]:
        lesions["acl"] = draw_acl_tear(rng)
    if labels["meniscus"]:
        lesions |= draw_meniscal_tear(rng, labels["subtle_tear"], lesions["extrusion"])
    harmless = group == "normal"
    if with_oedema:
        radii = HARMLESS_RADIUS if harmless else OEDEMA_RADIUS
        signals = HARMLESS_SIGNAL if harmless else OEDEMA_SIGNAL
        for _ in range(rng.integers(1, 3)):
            height = rng.choice([rng.uniform(6, 20), -rng.uniform(13, 22)])  # femur or tibia
            side = rng.choice([-1, 1])
            centre = (side * rng.uniform(14, 26), rng.uniform(-10, 18), height)
            lesions["oedema"].append((centre, rng.uniform(*radii), rng.uniform(*signals)))
    if with_effusion:
        lesions["effusion"] = rng.uniform(*(HARMLESS_EFFUSION if harmless else EFFUSION_SIZE))
    return lesions


def draw_acl_tear(rng):
    """Where and how the ACL is torn: an argument of paint_acl."""
    kind = rng.choice(["subtle", "partial", "complete"], p=[
        SUBTLE_ACL, PARTIAL_TEARS, 1 - SUBTLE_ACL - PARTIAL_TEARS
    ])  # fmt: skip
    size = {"subtle": SUBTLE_SIZE, "partial": PARTIAL_SIZE, "complete": 1}[kind]
    signal = {"subtle": SUBTLE_SIGNAL, "partial": PARTIAL_SIGNAL, "complete": 1}[kind]
    size *= rng.uniform(*TEAR_RADIUS)
    place = rng.choice([0.30, 0.50, 0.72], p=[0.35, 0.5, 0.15])  # proximal, middle, distal
    return {
        "at": place + rng.uniform(-0.07, 0.07),
        "radii": (size * rng.uniform(0.6, 0.8), size, size * rng.uniform(0.8, 1.05)),
        "signal": rng.uniform(*TEAR_SIGNAL) * signal,
        "partial": kind != "complete",
        "sag": rng.uniform(1, 5),  # mm
    }


def draw_meniscal_tear(rng, subtle, extrusion):
    """Where and how a meniscus is torn, and what comes with it: meniscus, extrusion, cyst.

    Args:
        subtle: whether it is a thin, faint line and nothing else.
        extrusion: {side: mm} of intact menisci.
    """
    place = rng.choice([1.35, 0.2, -1.2], p=[0.65, 0.2, 0.15])  # posterior, body, anterior
    side = -1 if rng.random() < 0.7 else 1
    handle = not subtle and side < 0 and rng.random() < BUCKET_HANDLES
    angle = 0.3 if handle else place + rng.uniform(-0.25, 0.25)
    tear = {
        "side": side,
        "angle": angle,
        "half_angle": 1.4 if handle else rng.uniform(*CLEFT_HALF_ANGLE),
        "kind": rng.choice(["horizontal", "vertical", "complex"], p=[0.45, 0.3, 0.25]),
        "slant": rng.uniform(-1, 1),
        "width": rng.uniform(*(SUBTLE_WIDTH if subtle else CLEFT_WIDTH)),
        "signal": rng.uniform(*(SUBTLE_CLEFT if subtle else CLEFT_SIGNAL)),
        "displaced": bool(not subtle and rng.random() < DISPLACED_TEARS),
        "handle": rng.normal(0, 0.6, (2, 3)) if handle else None,  # mm, off its usual place
    }
    cyst = None
    if not subtle and rng.random() < EXTRUDED:
        extrusion = extrusion | {side: rng.uniform(*EXTRUSION)}
    if not subtle and rng.random() < CYSTS:
        radius = rng.uniform(*CYST_RADIUS)
        cyst = {"side": side, "angle": angle, "radius": radius, "phases": rng.uniform(0, 6.3, 3)}
    return {"meniscus": tear, "extrusion": extrusion, "cyst": cyst}
