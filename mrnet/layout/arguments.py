"""Options that name planes and recipes, the same for every command."""

import argparse

from mrnet.layout.names import ARTICLE
from mrnet.layout.planes import ALL_PLANES, PLANES, SEQUENCES


def plane_name(text):
    """Value of an option: one of ALL_PLANES."""
    if text not in ALL_PLANES:
        raise argparse.ArgumentTypeError(
            f"invalid choice: {text!r} (choose from {', '.join(PLANES)}, or one of these with "
            f"-{', -'.join(SEQUENCES)})"
        )
    return text


def add_recipes_argument(parser):
    parser.add_argument(
        "--recipes",
        nargs="+",
        metavar="RECIPE",
        default=[ARTICLE],
        help="name of the networks' recipe, as their files have it; several: the stack of all",
    )
