"""Names of planes and splits in MRNet's layout (data/README.md). Without torch."""

from pathlib import Path

PLANES = ("axial", "coronal", "sagittal")  # MRNet's; of which contrast, tells dataset.json
SEQUENCES = ("t1", "t2", "pd", "stir", "gre", "dess")  # of further series, as in "sagittal-t1"
# Every name of a plane's folder, in the order in which planes are joined and printed.
ALL_PLANES = (*PLANES, *(f"{plane}-{name}" for plane in PLANES for name in SEQUENCES))
SPLITS = ("train", "valid")
ALL_SPLITS = (*SPLITS, "test")  # KneeMRI has a test split, too
# Per plane (patient axis 0 x, 1 y, 2 z; sign) along which slices, rows and columns grow, as in
# MRNet. x grows to the patient's left, y to posterior, z to superior (LPS; PS3.3 C.7.6.2.1.1).
TARGET = {
    "axial": ((2, -1), (1, 1), (0, 1)),
    "coronal": ((1, 1), (2, -1), (0, 1)),
    "sagittal": ((0, 1), (2, -1), (1, 1)),
}
LETTERS = {(0, 1): "L", (0, -1): "R", (1, 1): "P", (1, -1): "A", (2, 1): "S", (2, -1): "I"}
# The same as letters, where slices, rows and columns grow to: {"axial": "IPL", ...}.
ORIENTATION = {
    plane: "".join(LETTERS[direction] for direction in target) for plane, target in TARGET.items()
}
T1_PLANES = ("coronal-t1", "sagittal-t1")  # of series that are not fluid-sensitive


def in_order(planes):
    """Names of planes in the order of ALL_PLANES, each once: list; others are left out."""
    return [plane for plane in ALL_PLANES if plane in planes]


def planes_of(root_dir):
    """MRNet's planes, and every further one that has a folder in a split of `root_dir`: list."""
    root = Path(root_dir)
    return [p for p in ALL_PLANES if p in PLANES or any((root / s / p).is_dir() for s in SPLITS)]


def describe_missing(exam_id, missing, found):
    """Which planes an exam has and has not: "exam 3: axial is missing (found: coronal)"."""
    is_missing = "is missing" if len(missing) == 1 else "are missing"
    there = ", ".join(in_order(found)) or "no plane"
    return f"exam {exam_id}: {', '.join(in_order(missing))} {is_missing} (found: {there})"


def view_of(plane):
    """The plane of PLANES that a plane's slices lie in: "sagittal" for "sagittal-t1"."""
    return plane.partition("-")[0]
