"""The Rijeka KneeMRI volumes to MRNet's layout.

    python data/kneemri/prepare.py ~/kneemri data/kneemri                   # 60:20:20 by exam
    python data/kneemri/prepare.py ~/kneemri data/kneemri-stanford --split folder   # Stanford's
    python train.py --task acl --plane sagittal --data-dir data/kneemri
    python train_logistic_regression.py --planes sagittal --data-dir data/kneemri

917 sagittal volumes (proton density, fat-suppressed, 1.5 T) with the state of the anterior cruciate
ligament: Stajduhar et al., Computer Methods and Programs in Biomedicine 140, 2017. Unpack the
archives so that SOURCE holds metadata.csv and vol01 .. vol10 with their .pck files.

Writes OUT/{train,valid,test}/sagittal/0000.npy, uint8 (s, 256, 256), numbered as in metadata.csv,
OUT/<split>-{acl,acl-complete}.csv, and OUT/<split>-groups.csv with a number for each exam, which
may have several volumes. A .pck is a pickle, which may hold code: it is read by
mrnet/networks/pickles.py, which builds arrays and calls nothing.
"""

import argparse
import csv
import io
import re
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))  # started as a script, it finds its own folder

from mrnet.errors import InputError  # noqa: E402
from mrnet.files import open_regular, read_bytes, write_csv  # noqa: E402
from mrnet.layout.volumes import write_volume  # noqa: E402
from mrnet.networks.pickles import ArrayUnpickler, PickledArray  # noqa: E402
from mrnet.runtime import cli  # noqa: E402
from mrnet.scans.command import Report  # noqa: E402
from mrnet.scans.pixels import to_square, window  # noqa: E402
from mrnet.scans.register import write_dataset  # noqa: E402

GROUPS = "groups"
TASKS = {"acl": 0, "acl-complete": 1}  # positive above this aclDiagnosis (0, 1 partial, 2 complete)
FOLDERS = {  # Stanford's split, Bien et al., PLOS Medicine 2018
    "train": ("vol03", "vol04", "vol06", "vol07", "vol08", "vol09"),
    "valid": ("vol05", "vol10"),
    "test": ("vol01", "vol02"),
}
COLUMNS = ("examId", "aclDiagnosis", "volumeFilename")  # those of the eleven that are used
MAX_BYTES = 2**26  # of one .pck; the set's largest are under 20 MB
MAX_SIDE = 4096  # px


# --- volumes --------------------------------------------------------------------------------------


def read_pck(path):
    """One pickled volume -> integer array (s, H, W). Runs nothing that is in the file.

    Raises:
        InputError: missing, damaged, too large, more than one array of whole numbers, or not
            three-dimensional.
    """
    try:
        # latin1 keeps the bytes of strings that Python 2 wrote
        content = ArrayUnpickler(io.BytesIO(read_bytes(path, MAX_BYTES)), encoding="latin1").load()
        if not isinstance(content, PickledArray):
            raise ValueError("it holds no array")
        volume = content.array()
        if volume.dtype.kind not in "iu":
            raise ValueError(f"it holds {volume.dtype}, not whole numbers")
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        reason = "".join(c for c in reason if c.isprintable())
        raise InputError(f"{path}: refused, {reason}; unpack the archive again") from None
    if volume.ndim != 3 or min(volume.shape) < 1 or max(volume.shape) > MAX_SIDE:
        raise InputError(f"{path}: shape {volume.shape}, expected (s, H, W); unpack it again")
    return volume


def to_uint8(volume, path):
    """Integers (s, H, W) -> uint8 (s, 256, 256): percentile window, resized, padded to square."""
    return to_square(window(volume.astype(np.float32), path), *volume.shape[1:])


# --- metadata and splits --------------------------------------------------------------------------


def read_metadata(path):
    """metadata.csv -> list of dict with examId, aclDiagnosis (int) and volumeFilename.

    Columns are found by name, in any order.

    Raises:
        InputError: no such file, a column missing, a diagnosis other than 0, 1 or 2, a file name
            twice or with a folder in it.
    """
    try:
        with open_regular(path, "r", newline="", encoding="utf-8-sig") as file:
            table = list(csv.DictReader(file, skipinitialspace=True))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a CSV ({error}); download it again") from None
    rows, seen = [], set()
    for line, cells in enumerate(table, start=2):
        row = {name: str(cells.get(name) or "").strip() for name in COLUMNS}
        where, name, diagnosis = f"{path}, line {line}", row["volumeFilename"], row["aclDiagnosis"]
        missing = [column for column in COLUMNS if not row[column]]
        if missing:
            raise InputError(f"{where}: no {' and no '.join(missing)}; download it again")
        if re.search(r"[/\\:]|^\.", name):
            raise InputError(f"{where}: volumeFilename {name!r} is a path; give a plain file name")
        if name in seen:
            raise InputError(f"{where}: volumeFilename {name!r} is listed twice; keep one row")
        if diagnosis not in ("0", "1", "2"):
            raise InputError(f"{where}: aclDiagnosis {diagnosis!r} is not 0, 1 or 2; correct it")
        seen.add(name)
        rows.append({**row, "aclDiagnosis": int(diagnosis)})
    if not rows:
        raise InputError(f"{path}: no rows; download it again")
    return rows


def split_by_exam(rows, valid, test, seed):
    """One split name per row: drawn within each diagnosis, all series of one exam on one side."""
    worst = defaultdict(int)
    for row in rows:
        worst[row["examId"]] = max(worst[row["examId"]], row["aclDiagnosis"])
    rng, side = np.random.default_rng(seed), {}
    for diagnosis in (0, 1, 2):
        exams = sorted(exam for exam, d in worst.items() if d == diagnosis)
        rng.shuffle(exams)
        n_valid, n_test = round(valid * len(exams)), round(test * len(exams))
        for i, exam in enumerate(exams):
            side[exam] = "valid" if i < n_valid else "test" if i < n_valid + n_test else "train"
    return [side[row["examId"]] for row in rows]


def split_by_folder(rows, found):
    """One split name per row, by the volNN folder of its file; None for another folder."""
    side = {folder: split for split, folders in FOLDERS.items() for folder in folders}
    paths = (found.get(row["volumeFilename"]) for row in rows)
    return [side.get(path.parent.name.lower()) if path else None for path in paths]


# --- command line ---------------------------------------------------------------------------------


def run(args, report):
    """Convert everything -> exit status."""
    start = time.perf_counter()
    if not args.source.is_dir():
        raise InputError(f"{args.source}: no such folder; unpack KneeMRI's archives there")
    rows = read_metadata(args.source / "metadata.csv")
    found = {path.name: path for path in sorted(args.source.rglob("*.pck"))}
    if args.split == "exam":
        splits = split_by_exam(rows, args.valid, args.test, args.seed)
    else:
        splits = split_by_folder(rows, found)
    if not args.overwrite:
        outputs = [args.out / split for split in FOLDERS] + ([args.id_map] if args.id_map else [])
        for path in filter(Path.exists, outputs):
            raise InputError(f"{path}: exists; choose another folder or add --overwrite")

    write_dataset(
        args.out,
        name="KneeMRI",
        version="2017",
        synthetic=False,
        source="Stajduhar et al., Computer Methods and Programs in Biomedicine 140, 2017",
        licence="see the set's page",
        orientation=None,  # unknown
    )
    labels, written, groups = defaultdict(list), [], {}
    bar = tqdm(zip(rows, splits, strict=True), total=len(rows), unit="volume", disable=None)
    for number, (row, split) in enumerate(bar):
        name = row["volumeFilename"]
        try:
            if name not in found:
                raise InputError(f"{args.source}: no {name} in it; unpack its archive there")
            if split is None:
                raise InputError(f"{found[name]}: not in a folder vol01 .. vol10; use --split exam")
            volume = to_uint8(read_pck(found[name]), found[name])
        except InputError as error:
            report.fault(str(error))
            continue
        write_volume(args.out / split / "sagittal" / f"{number:04d}.npy", volume)
        written.append((number, name))
        # The series of one exam are one patient's; which exams share a patient is unknown.
        labels[split, GROUPS].append((number, groups.setdefault(row["examId"], len(groups))))
        for task, above in TASKS.items():
            labels[split, task].append((number, int(row["aclDiagnosis"] > above)))
    for (split, task), pairs in labels.items():
        write_csv(args.out / f"{split}-{task}.csv", pairs)
    if args.id_map:
        write_csv(args.id_map, [("id", "volumeFilename"), *written])

    for split in FOLDERS:
        counts = {task: [label for _, label in labels.get((split, task), [])] for task in TASKS}
        positives = ", ".join(f"{task} {sum(values)}" for task, values in counts.items())
        report.log(f"{split:5}  {len(counts['acl']):4d} volumes, positive: {positives}")
    report.log(
        f"{len(written)} of {len(rows)} volumes in {time.perf_counter() - start:.1f} s "
        f"-> {args.out}; failures: {report.failures}"
    )
    if not written:
        raise InputError(f"{args.source}: no volume could be used; unpack KneeMRI's archives there")
    return 1 if report.failures else 0


def parse(argv):
    parser = cli.make_parser(__doc__)
    parser.add_argument("source", type=Path, help="folder with metadata.csv and vol01 .. vol10")
    parser.add_argument("out", type=Path, help="data folder to write to")
    group = parser.add_argument_group("split")
    group.add_argument(
        "--split",
        choices=("exam", "folder"),
        default="exam",
        help="exam: drawn, series of one exam stay together; folder: Stanford's, to compare with "
        "the published 0.824 and 0.911 on its test set",
    )
    group.add_argument("--valid", type=float, default=0.2, help="part of the exams, for exam")
    group.add_argument("--test", type=float, default=0.2, help="part of the exams, 0 for none")
    group.add_argument("--seed", type=int, default=0, help="of the draw; results need its number")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--overwrite",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="write into OUT though it holds exams; delete it instead if the split changes",
    )
    group.add_argument("--id-map", type=Path, metavar="CSV", help="also write id,volumeFilename")
    args = parser.parse_args(argv)
    if not (0 < args.valid < 1 and 0 <= args.test < 1 and args.valid + args.test < 1):
        parser.error(f"--valid {args.valid} and --test {args.test} leave nothing to train on")
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: use 0 or more")
    return args


def main(argv=None):
    args, report = parse(argv), Report()
    try:
        return run(args, report)
    except InputError as error:
        report.fault(str(error))
        return 2
    except OSError as error:
        report.fault(f"{error.filename or args.out}: {error.strerror}")
        return 1
    except KeyboardInterrupt:
        report.log("interrupted; run it again with --overwrite", sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
