"""One phantom exam before it is scanned: the knee, how it lies, what is wrong with it."""

from typing import NamedTuple

import numpy as np

from data.phantom.anatomy import draw_knee
from data.phantom.knee import Knee
from data.phantom.lesions import draw_lesions
from data.phantom.scanner import Pose


class Drawn(NamedTuple):
    """A knee in the scanner."""

    knee: Knee
    pose: Pose
    side: int  # +1 left, -1 right
    lesions: dict  # as draw_lesions returns them
    rng: np.random.Generator  # for scanning it


def draw_exam(exam_id, labels, seed):
    """Draw one exam: Drawn. Four streams, so that the same knee can be drawn with other lesions."""
    lesion_rng, knee_rng, pose_rng, scan_rng = np.random.default_rng([seed, exam_id]).spawn(4)
    lesions = draw_lesions(lesion_rng, labels)
    knee = draw_knee(knee_rng, lesions)
    side = int(pose_rng.choice([-1, 1]))
    return Drawn(knee, Pose(pose_rng, side), side, lesions, scan_rng)
