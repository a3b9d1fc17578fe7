"""Which series of a study show the same knee: by laterality, else by where they lie, and of one
knee in the scanner's middle by what it is called.

A study may hold both knees, and an answer from the axial plane of one and the sagittal plane of the
other is worse than none. Series that cannot be assigned to a knee are refused with the reason. One
that lies apart from a clear majority, as of the calf, is left out, and this is said.
"""

import numpy as np

from mrnet.scans.slices import plane_of

BOTH_KNEES = 250.0  # mm from right to left, from which on a field of view may hold both knees
KNEES_APART = 60.0  # mm from right to left between two knees' centres, at least
OFF_CENTRE = 25.0  # mm from the scanner's middle, from which on a knee's side is certain
OVERLAP = 0.5  # of the shorter extent along each axis, for two series to be of one place
MAJORITY = 2 / 3  # of a knee's series; what lies apart from so many is left out
SIDES_MIXED = "its series are called left and right knee; give each knee's files on their own"
SIDE_UNKNOWN = "its side is not recorded and cannot be derived from its place"


def box_of(series):
    """Lowest and highest corner of a series in patient coordinates: float (2, 3), mm (LPS)."""
    edges = series.directions * (series.spacing * (np.array(series.shape) - 1))[:, None]  # (3, 3)
    corners = np.array(np.meshgrid(*[(0, 1)] * 3)).reshape(3, -1).T @ edges + series.origin
    return np.stack([corners.min(axis=0), corners.max(axis=0)])


def centre_of(series):
    """Middle of a series, from right to left, in mm."""
    return float(box_of(series)[:, 0].mean())


def same_frame(a, b):
    """Whether the coordinates of two series can be compared: one DICOM frame of reference."""
    return not a.frame or not b.frame or a.frame == b.frame


def same_place(a, b):
    """Whether two series in one frame of reference overlap as two views of one knee do."""
    one, two = box_of(a), box_of(b)
    shared = np.minimum(one[1], two[1]) - np.maximum(one[0], two[0])
    shorter = np.minimum(np.ptp(one, axis=0), np.ptp(two, axis=0))
    apart = abs(one[:, 0].mean() - two[:, 0].mean())
    return bool((shared >= OVERLAP * shorter).all() and apart < KNEES_APART)


def places(series):
    """Lists of series that lie together, each in a frame of reference and a place of its own."""
    found = []
    for one in series:
        near = [p for p in found if any(same_frame(one, o) and same_place(one, o) for o in p)]
        found = [p for p in found if p not in near] + [[one, *(o for p in near for o in p)]]
    return found


def torn_apart(series):
    """Why series that should show one knee do not, or ''."""
    for i, a in enumerate(series):
        for b in series[:i]:
            if same_frame(a, b) and not same_place(a, b):
                return f"{b.name} and {a.name} do not overlap in space, so they are not one knee"
    return ""


def planes_of(series):
    return {plane_of(one.directions[axis])[0] for one in series for axis in one.through}


def without_apart(series):
    """The series of one knee without what lies apart from a clear majority that shows every plane;
    that gets a fault. Where there is no such majority, all of them.

    Returns:
        the series that stay, and why they do not show one knee, or ''.
    """
    group = max(places(series), key=len)
    apart = [
        one
        for one in series
        if not any(one is other for other in group)
        and any(same_frame(one, other) and not same_place(one, other) for other in group)
    ]
    rest = [one for one in series if not any(one is other for other in apart)]
    is_clear = len(rest) >= MAJORITY * len(series) and planes_of(rest) == planes_of(series)
    if not is_clear or torn_apart(rest):
        return series, torn_apart(series)
    for one in apart:
        one.is_apart = True
        one.fault = f"{one.file}: it does not overlap in space with the other series of the knee"
    return rest, ""


def mark_wide(series):
    """Give each series whose field of view may hold both knees a fault."""
    for one in series:
        across = int(np.argmax(np.abs(one.directions[:, 0])))  # the array's axis from right to left
        width = one.shape[across] * one.spacing[across]
        if not one.fault and (one.side == "B" or width > BOTH_KNEES):
            one.fault = (
                f"{one.file}: its field of view ({width:.0f} mm from right to left) may hold both "
                "knees; give a series of one knee"
            )


def mark_contradicted(sides):
    """A doubt for each series whose titles name the other knee than its Laterality or place."""
    for side, members in sides.items():
        for one in members:
            if side and one.said not in ("", side):
                of, other = ("left", "right") if side == "L" else ("right", "left")
                said = f"a {of} knee by its Laterality or place, but called {other}"
                one.doubt = f"{one.doubt}; {said}" if one.doubt else said


def sides_by_place(series, absolute):
    """Sides of the knees of a study without laterality.

    Args:
        series: of one study, none of them of both knees.
        absolute: whether x is 0 in the scanner's middle, so that a single knee has a side too.

    Returns:
        {"L", "R" or "": [Series, ...]}, and why not, or ''.
    """
    found = sorted(places(series), key=lambda place: np.mean([centre_of(one) for one in place]))
    if len(found) == 1:
        x = np.mean([centre_of(one) for one in series])
        said = {one.said for one in series} - {""}
        place = "" if not absolute or abs(x) < OFF_CENTRE else "L" if x > 0 else "R"
        if len(said) > 1 and not place:
            return {"": series}, SIDES_MIXED
        return {place or "".join(said): series}, torn_apart(series)
    if not all(same_frame(a, b) for a in series for b in series):
        return {"": series}, (
            "its series have several frames of reference and no laterality, so they may show "
            "two knees; give each knee's files on their own"
        )
    apart = np.diff([np.mean([centre_of(one) for one in place]) for place in found])
    if len(found) > 2:
        return {"": series}, torn_apart(series)
    if apart[0] < KNEES_APART:  # above each other
        rest, reason = without_apart(series)
        return ({"": rest}, reason) if reason else sides_by_place(rest, absolute)
    right, left = found
    return {"L": left, "R": right}, torn_apart(left) or torn_apart(right)


def split_knees(series, absolute):
    """The knees of a study.

    Args:
        series: list of Series of one study; those that cannot be used have a `fault`.
        absolute: as in `sides_by_place`; False for NIfTI.

    Returns:
        {"L", "R" or "" (not known): (list of Series, why this knee is refused or '')}.
    """
    mark_wide(series)
    whole = [one for one in series if not one.fault]
    trusted = whole or [one for one in series if one.side != "B"]
    sides, reasons = {}, {}
    tagged = sorted({one.side for one in trusted if one.side in ("L", "R")})
    if tagged:
        for side in tagged:
            sides[side], reasons[side] = without_apart([s for s in trusted if s.side == side])
    elif trusted:
        sides, reason = sides_by_place(trusted, absolute)
        reasons = dict.fromkeys(sides, reason)
    else:
        sides, reasons = {"": []}, {"": ""}
    known = {side: list(members) for side, members in sides.items()}
    for one in series:
        if any(one is other for members in known.values() for other in members):
            continue
        homes = [one.side] if one.side in known else []
        if not homes and one.side in ("L", "R"):  # a knee with no usable series at all
            sides.setdefault(one.side, []).append(one)
            continue
        if not homes and one.side != "B":
            homes = [
                side
                for side, members in known.items()
                if any(same_frame(one, m) and same_place(one, m) for m in members)
            ]
        if len(homes) != 1 and len(known) > 1 or not homes:
            one.fault = one.fault or f"{one.file}: {SIDE_UNKNOWN}"
            homes = list(known)  # it may be the plane that any of them lacks
        for side in homes:
            sides[side].append(one)
    mark_contradicted(sides)
    order = {id(one): i for i, one in enumerate(series)}
    return {
        side: (sorted(members, key=lambda one: order[id(one)]), reasons.get(side, ""))
        for side, members in sides.items()
    }
