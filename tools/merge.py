"""Put together what `predict.py --part` wrote on several machines.

    python predict.py ~/archive --part 1/4 --out part1.csv         # on the first machine, and so on
    python -m tools.merge part*.csv --out all.csv

Refuses unless every exam of the list is there exactly once, predicted by the same networks; the
rows are then those of one run over the whole list, in its order. A part that was killed goes on
with --resume.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it finds its own folder only

from common import cli
from common.errors import InputError
from common.parts import merge


def parse_arguments():
    parser = cli.make_parser(__doc__)
    parts = "what predict.py --part wrote, with the .part.json beside each; in any order"
    parser.add_argument("parts", nargs="+", type=Path, metavar="PART", help=parts)
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    return parser.parse_args()


def run(args):
    """Check and write all rows."""
    if args.out.exists() and not args.overwrite:
        raise InputError(f"{args.out}: exists; --overwrite replaces it")
    failed = merge(args.parts, args.out)
    if failed:
        print(f"{failed} of them with an `error`, named there", file=sys.stderr)


if __name__ == "__main__":
    cli.exit_with_status(lambda: run(parse_arguments()))
