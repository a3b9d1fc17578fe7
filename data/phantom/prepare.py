"""Synthetic knee MRI exams in MRNet's layout: the data that a fresh clone trains on.

    python data/phantom/prepare.py                                 # 200 + 60 exams, 3 to 6 minutes
    python data/phantom/prepare.py --exams 1130 --valid 120 --out /tmp/phantom
    python data/phantom/prepare.py --as rsna --out /tmp/rsna        # see docs/rsna.md
    python train.py --task acl --plane sagittal --data-dir data/phantom

One 3-D knee per exam, drawn from geometry with the contrast of fat-suppressed proton density
(fluid bright, muscle grey, fat and marrow dark grey, ligaments, menisci and cortex nearly black),
turned, bent a little and cut in three planes. Tasks and prevalences are MRNet's: abnormal 80 %,
torn ACL 20 %, torn meniscus 37 % (Bien et al., PLOS Medicine 2018, training set). An exam has 17 to
30 slices a plane where MRNet's have 17 to 61, so that a laptop's demo stays short.

Writes OUT/{train,valid}/{axial,coronal,sagittal}/0000.npy, uint8 (s, size, size), the six CSVs and
OUT/lesions.json: where each lesion lies in each plane (see make_exam). Sizes and places are
those of an adult knee, approximately; nothing was measured on patients, and no result on these
exams says anything about patients. With --as rsna it writes DICOM and CSVs in the form of RSNA's
knee set of 2026 instead (data/phantom/rsna.py).
"""

import importlib.util
import json
import shutil
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))  # started as a script, it finds its own folder

from data.phantom.exam import draw_exam  # noqa: E402
from data.phantom.lesions import PREVALENCE, draw_labels  # noqa: E402
from data.phantom.rsna import NEEDS, TRUTH, make_study, write_tables  # noqa: E402
from data.phantom.scanner import Cut, place, scan  # noqa: E402
from mrnet.errors import InputError  # noqa: E402
from mrnet.files import write_csv, write_text  # noqa: E402
from mrnet.layout.planes import ORIENTATION, SPLITS, TARGET  # noqa: E402
from mrnet.layout.volumes import write_volume  # noqa: E402
from mrnet.runtime import cli  # noqa: E402
from mrnet.runtime.machine import usable_cores  # noqa: E402
from mrnet.scans.register import write_dataset  # noqa: E402

LESIONS = "lesions.json"
VERSION = "5"  # of the knees that are drawn; raise it with every change of the pixels


def make_exam(exam_id, split, labels, seed, size, out):
    """Draw, cut and write one exam.

    Returns its entry of lesions.json: side; split; planes, each with the geometry that scan()
    describes (step_mm is mm per slice, row and column); lesions, each with kind (acl, meniscus,
    effusion, oedema), the task it belongs to (each is a reason for abnormal too), its centre in
    patient mm, and place()'s indices for each plane.
    """
    knee, pose, side, _, rng = draw_exam(exam_id, labels, seed)
    planes = {}
    for plane in TARGET:
        volume, planes[plane] = scan(knee, pose, plane, Cut(size), rng)
        write_volume(out / split / plane / f"{exam_id:04d}.npy", volume)
    lesions = []
    for kind, task, points in knee.lesions:
        points = pose.to_patient(points)
        centre = points.mean(axis=0).round(2).tolist()
        places = {plane: place(points, geometry, knee.grid) for plane, geometry in planes.items()}
        lesions.append({"kind": kind, "task": task, "mm": centre, "planes": places})
    side = "left" if side > 0 else "right"
    return str(exam_id), {"side": side, "split": split, "planes": planes, "lesions": lesions}


def parse_arguments():
    parser = cli.make_parser(__doc__)
    exams = parser.add_argument_group("exams")
    exams.add_argument("--exams", type=int, default=200, help="to train on; MRNet has 1130")
    exams.add_argument("--valid", type=int, default=60, help="to validate on; MRNet has 120")
    exams.add_argument("--seed", type=int, default=0, help="same seed, same bytes")
    exams.add_argument(
        "--size",
        type=int,
        default=256,
        help="px; 256 is MRNet's, 128 trains four times faster and blurs small tears",
    )
    form = (
        "mrnet writes arrays, rsna the DICOM and CSVs of RSNA's knee set of 2026, --valid its test"
    )
    exams.add_argument("--as", choices=("mrnet", "rsna"), default="mrnet", dest="form", help=form)
    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, default=Path(__file__).parent, help="data folder")
    run.add_argument(
        "--workers", type=int, default=usable_cores(), help="processes of about 250 MB each"
    )
    args = parser.parse_args()
    for name, least, most in (
        ("exams", 5, 99_999),
        ("valid", 5, 99_999),
        ("seed", 0, 2**31 - 1),
        ("size", 63, 1024),
        ("workers", 1, 1000),
    ):
        if not least <= getattr(args, name) <= most:
            parser.error(f"--{name} must be at least {least} and at most {most}")
    if args.form == "rsna":
        if args.out == parser.get_default("out"):
            parser.error("--as rsna: give --out a folder of its own")
        if missing := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
            parser.error(
                f"--as rsna needs {', '.join(missing)}; "
                "pip install -r requirements-dicom.txt imagecodecs"
            )
    held = [
        p for s in SPLITS for form in (f"{s}-*.csv", f"{s}/*/*.npy") for p in args.out.glob(form)
    ]
    held += args.out.glob("*_series")
    mark = {"mrnet": LESIONS, "rsna": TRUTH}[args.form]
    if held and not (args.out / mark).exists():
        parser.error(f"{held[0]} belongs to another data set; give --out a folder of its own")
    return parser, args


def quiet_interrupt():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer


def begin(out, form, source):
    """Say in dataset.json that the knees are synthetic, and remove those of an earlier run.

    Args:
        form: "mrnet" or "rsna".
        source: the command that makes them.
    """
    write_dataset(
        out,
        name="phantom",
        version=VERSION,
        synthetic=True,
        source=source,
        licence="MIT",
        orientation=ORIENTATION if form == "mrnet" else None,  # DICOM has its own
    )
    if form == "rsna":
        for old in out.glob("*_series"):
            shutil.rmtree(old)
        return
    write_text(out / LESIONS, "{}")  # this folder is the phantom's, and not complete without CSVs
    for split in SPLITS:
        for old in (*out.glob(f"{split}-*.csv"), *out.glob(f"{split}/*/*.npy")):
            old.unlink()


def make_exams(make, jobs, workers):
    """Yield `make`'s results in the order of `jobs`, a list of (split, labels), with progress.

    Args:
        make: function of an exam's number, split and labels.
    """
    columns = range(len(jobs)), *zip(*jobs, strict=True)
    bar = partial(tqdm, total=len(jobs), unit="exam", desc="knees", disable=not sys.stderr.isatty())
    # Also with one worker: a process without torch draws the same to the last digit. Spawned, as
    # on every system.
    spawn = get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, quiet_interrupt) as pool:
        yield from bar(pool.map(make, *columns))


def run():
    parser, args = parse_arguments()
    rng = np.random.default_rng(args.seed)
    splits = {"train": draw_labels(rng, args.exams), "valid": draw_labels(rng, args.valid)}
    jobs = [(split, labels) for split, rows in splits.items() for labels in rows]
    try:
        source = f"data/phantom/prepare.py --seed {args.seed} --size {args.size}"
        begin(args.out, args.form, source)
    except InputError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"cannot write to {args.out}: {error.strerror}; give another --out")
    if args.form == "rsna":
        make = partial(make_study, seed=args.seed, out=args.out, total=len(jobs))
        write_tables(args.out, make_exams(make, jobs, args.workers), args.seed)
        return
    make = partial(make_exam, seed=args.seed, size=args.size, out=args.out)
    write_text(args.out / LESIONS, json.dumps(dict(make_exams(make, jobs, args.workers))))
    first = 0
    for split, rows in splits.items():
        for task in PREVALENCE:
            labels = enumerate((row[task] for row in rows), start=first)
            write_csv(args.out / f"{split}-{task}.csv", labels)
        first += len(rows)
        positive = ", ".join(f"{sum(r[task] for r in rows)} {task}" for task in PREVALENCE)
        print(f"{split}: {len(rows)} exams, {positive}")
    print(f"written to {args.out}; where the lesions are: {LESIONS}")


def main():
    try:
        run()
    except KeyboardInterrupt:
        print("prepare.py: interrupted; not complete, run it again", file=sys.stderr)
        return 130
    except OSError as error:
        return f"prepare.py: {error}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
