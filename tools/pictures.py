"""README's pictures from the demo's models: smaller copies with 256 colours, together below 500 kB.

make pictures
python -m tools.pictures models/pictures/0237-acl.png models/pictures/report.png
"""

import io
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it finds its own folder only

from common import cli
from common.errors import InputError
from common.files import write_bytes

WIDTH = 1000  # px


def parse_arguments():
    parser = cli.make_parser(__doc__)
    parser.add_argument("sheet", type=Path, help="PNG that explain.py wrote")
    parser.add_argument("report", type=Path, help="PNG of a browser's window with report.html")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder to write to")
    return parser.parse_args()


def smaller(path):
    """A PNG at most WIDTH px wide, with a palette: bytes.

    Raises:
        InputError: not a picture.
    """
    try:
        picture = Image.open(path).convert("RGB")
    except OSError:
        raise InputError(f"{path}: not a picture; run `make demo`, then `make pictures`") from None
    picture.thumbnail((WIDTH, picture.height), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        data, "PNG", optimize=True
    )
    return data.getvalue()


def run(args):
    """Write heat-maps.png and report.png."""
    for name, source in (("heat-maps.png", args.sheet), ("report.png", args.report)):
        data = smaller(source)
        write_bytes(args.out / name, data)
        print(f"written  {args.out / name}  {len(data) / 1e3:.0f} kB")


if __name__ == "__main__":
    cli.exit_with_status(lambda: run(parse_arguments()))
