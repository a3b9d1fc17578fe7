"""How much memory training a network takes."""

from mrnet.networks.backbones import BACKBONES, MOST_ACTIVATIONS
from mrnet.training.config import THE_ARTICLES

# A job takes no more than this in memory; measured peaks of each backbone are in docs/speed.md.
BYTES_OF_A_PROCESS = 1.6e9  # torch, the network, its optimizer's state and an exam
BYTES_OF_AN_ACTIVATION = 5.6  # that backward keeps: 4, and its gradient for a while
PIXELS_OF_AN_EXAM = 61 * 256**2  # the largest of MRNet's


def bytes_of_a_job(backbone=THE_ARTICLES["backbone"], planes=1):
    """Memory that training a network takes at most on a CPU, with exams of MRNet's size; an
    unknown backbone counts as the article's (train.py rejects it)."""
    known = BACKBONES.get(backbone, BACKBONES[THE_ARTICLES["backbone"]])
    activations = min(MOST_ACTIVATIONS, PIXELS_OF_AN_EXAM * known.activations)
    return BYTES_OF_A_PROCESS + planes * BYTES_OF_AN_ACTIVATION * activations
