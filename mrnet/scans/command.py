"""What the importers' commands share: their options, and how they report faults."""

import argparse
import sys

from tqdm import tqdm

from mrnet.layout.planes import TARGET

FIELDS_OF_VIEW = (20.0, 500.0)  # mm


def add_preparation(group, mirror=False):
    """--field-of-view, --t1-plane, --t1 and --mirror, the same for every importer of DICOM."""
    group.add_argument(
        "--field-of-view",
        type=millimetres,
        metavar="MM",
        help="keep a centred square of this side, so that a pixel has the same size in every "
        "scanner, such as 140; smaller pictures get a black margin. Default: the whole picture",
    )
    group.add_argument(
        "--t1-plane",
        action="append",
        default=[],
        choices=list(TARGET),
        metavar="PLANE",
        help="take T1 series for this plane, not fluid-sensitive ones, for networks that learnt "
        "from such: MRNet's coronal series are T1 (Bien et al. 2018); may be repeated",
    )
    t1 = "also the best series that are not fluid-sensitive, as planes coronal-t1 and sagittal-t1"
    group.add_argument("--t1", action="store_true", help=t1)
    group.add_argument(
        "--mirror",
        action=argparse.BooleanOptionalAction,
        default=mirror,
        help="mirror right knees to left ones",
    )


def millimetres(text):
    """A field of view's side as argparse takes it."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not FIELDS_OF_VIEW[0] <= value <= FIELDS_OF_VIEW[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of mm from 20 to 500")
    return value


class Report:
    """Prints messages without breaking the progress bar, and counts failures.

    Args:
        collect: keep the lines for `take` instead of printing them.
    """

    def __init__(self, collect=False):
        self.failures, self.lines = 0, [] if collect else None

    def log(self, text, stream=None):
        # descriptions and file names may hold control characters and any script
        text = "".join(c if c.isprintable() else "?" for c in text)
        if self.lines is not None:
            self.lines.append(["stderr" if stream is sys.stderr else "stdout", text])
            return
        stream = stream or sys.stdout
        encoding = getattr(stream, "encoding", None) or "utf-8"
        tqdm.write(text.encode(encoding, "replace").decode(encoding), file=stream)

    def warn(self, text):
        self.log(f"warning: {text}", sys.stderr)

    def fault(self, text):
        self.failures += 1
        self.log(f"error: {text}", sys.stderr)

    def take(self):
        """The lines collected since the last call: [["stdout" or "stderr", text], ...]."""
        lines, self.lines = self.lines, []
        return lines
