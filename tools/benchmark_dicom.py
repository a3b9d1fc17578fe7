"""How fast studies are read: data/rsna/prepare.py beside a plain pydicom loop.

    python -m tools.benchmark_dicom                             # 12 studies, two processes
    python -m tools.benchmark_dicom --studies 40 --workers 8

Makes studies of three series of 30 slices of 512 x 512 px (a phantom knee), once as they are and
once as lossless JPEG 2000, in a temporary folder. The loop reads every file of the three series in
one process, sorts the slices, scales them to 256 x 256 and saves them: no choice of series, no
geometry, no check. prepare.py does what it always does. Each is run --rounds times, taking turns,
and the median counts. The files are in the page cache, so this is the work, not the disk.
"""

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it finds its own folder only

from common import cli
from common.files import write_csv
from data.common import TARGET
from data.phantom import scanner
from data.phantom.exam import draw_exam
from data.phantom.rsna import Scanner, SeriesPlan, scan_series, write_series
from data.rsna.tables import FAT, FINDINGS, FLUID, PLANE, SERIES, STUDY

ROOT = Path(__file__).parent.parent
SLICES, SIDE = 30, 512
KNEE = {"abnormal": 1, "acl": 1, "meniscus": 0}


def parse_arguments():
    parser = cli.make_parser(__doc__)
    parser.add_argument("--studies", type=cli.positive_int, default=12)
    parser.add_argument("--workers", type=cli.process_count, default=2, help="of prepare.py")
    parser.add_argument("--rounds", type=cli.positive_int, default=3)
    syntaxes = ("explicit", "jpeg 2000", "jpeg lossless", "implicit")
    parser.add_argument("--syntax", nargs="+", choices=syntaxes, default=syntaxes[:2])
    return parser.parse_args()


def make_set(root, studies, syntax):
    """A set of equal knees under different UIDs."""
    thick = {plane: (high - low) / SLICES for plane, (low, high) in scanner.COVER.items()}
    spacing = {plane: (step, step) for plane, step in thick.items()}
    habits = Scanner(
        ("Maker", "Model", "1", 1.5), SIDE, 160.0, syntax, 0.0, False, False,
        frozenset({"Laterality"}), (1.0, 0.0), spacing,
    )  # fmt: skip
    drawn, rows = draw_exam(0, KNEE, 0), []
    scans = {plane: scan_series(drawn, SeriesPlan(plane, "PD FS"), habits) for plane in TARGET}
    for number in range(studies):
        uid = f"1.2.{number}"
        habits = habits._replace(name=("Maker", f"Model {number}", "1", 1.5))  # no common group
        for k, (plane, (volume, places, steps)) in enumerate(scans.items()):
            about = {"StudyInstanceUID": uid, "SeriesInstanceUID": f"{uid}.{k}", "Laterality": "L"}
            about |= {"SeriesNumber": k, "FrameOfReferenceUID": f"{uid}.9"}
            folder = root / "train_series" / uid / f"{uid}.{k}"
            geometry = places + (80.0, 0, 0), np.eye(3), steps
            write_series(folder, volume, geometry, SeriesPlan(plane, "PD FS"), habits, about)
            rows.append([uid, f"{uid}.{k}", 1, 1, plane.capitalize()])
    write_csv(root / "train_series.csv", [[STUDY, SERIES, FLUID, FAT, PLANE], *rows])
    labels = [[f"1.2.{n}", f"report {n}", n % 2, *[""] * 11] for n in range(studies)]
    write_csv(root / "train.csv", [[STUDY, "Report", *FINDINGS], *labels])


def plain_loop(root, out):
    """What one writes first: seconds."""
    import pydicom

    began = time.perf_counter()
    for study in sorted((root / "train_series").iterdir()):
        for series in sorted(study.iterdir()):
            files = [pydicom.dcmread(path) for path in series.iterdir()]
            files.sort(key=lambda file: file.InstanceNumber if "InstanceNumber" in file else 0)
            volume = np.stack([file.pixel_array for file in files]).astype(np.float32)
            low, high = np.percentile(volume, (0.5, 99.5))
            volume = np.clip((volume - low) * (255 / (high - low)), 0, 255)
            small = [Image.fromarray(one).resize((256, 256)) for one in volume]
            np.save(out / f"{series.name}.npy", np.stack(small).astype(np.uint8))
    return time.perf_counter() - began


def prepare(root, out, workers):
    """data/rsna/prepare.py: seconds, from its start to its end."""
    command = [sys.executable, ROOT / "data/rsna/prepare.py", root, out, "--valid", "0.3"]
    command += ["--workers", str(workers), "--field-of-view", "140"]
    began = time.perf_counter()
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def run(args):
    """Make both sets, time both ways, print studies a second."""
    with tempfile.TemporaryDirectory() as folder:
        for syntax in args.syntax:
            root = Path(folder) / syntax.replace(" ", "-")
            make_set(root, args.studies, syntax)
            seconds = {"a plain pydicom loop": [], "prepare.py": []}
            for _ in range(args.rounds):
                out = Path(folder) / "out"
                out.mkdir()
                seconds["a plain pydicom loop"].append(plain_loop(root, out))
                shutil.rmtree(out)
                seconds["prepare.py"].append(prepare(root, out, args.workers))
                shutil.rmtree(out)
            for name, found in seconds.items():
                speeds = [args.studies / one for one in found]
                print(f"{syntax:<10} {name:<21} {statistics.median(speeds):6.2f} studies/s  "
                      f"({min(speeds):.2f} to {max(speeds):.2f})", flush=True)  # fmt: skip


if __name__ == "__main__":
    cli.exit_with_status(lambda: run(parse_arguments()))
