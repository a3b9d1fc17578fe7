"""DICOM exams and NIfTI volumes to MRNet's layout.

    pip install -r requirements-dicom.txt
    python data/dicom/prepare.py ~/scans data/scans              # folders or zips of DICOM or NIfTI
    python data/dicom/prepare.py exam.zip data/scans --overwrite --series "T2 TSE" --series 7
    python data/dicom/prepare.py ~/scans data/mine --split train --labels labels.csv

Writes OUT/<split>/<plane>/0000.npy, uint8 (s, 256, 256). One exam is one knee of one DICOM study,
or one folder of NIfTI files. Numbers go on where those of OUT end, and OUT/exams.csv keeps them: an
exam that OUT has already keeps its number. OUT/<split>-groups.csv has a number for each patient, so
that no two folds share one. The output holds pixels, numbers and hashes: no name, date or UID
leaves the DICOM but with --id-map, and nothing read is ever executed.
"""

import argparse
import csv
import hashlib
import re
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))  # started as a script, it finds its own folder

from mrnet.errors import InputError, counted  # noqa: E402
from mrnet.files import open_regular, write_csv  # noqa: E402
from mrnet.runtime import cli  # noqa: E402
from mrnet.scans.command import Report, add_preparation  # noqa: E402
from mrnet.scans.origin import describe  # noqa: E402
from mrnet.scans.register import (  # noqa: E402
    Register,
    keyed_hash,
    merge_csv,
    patient_key,
    write_dataset,
    write_planes,
)
from mrnet.scans.serve import run_importer, serve  # noqa: E402
from mrnet.scans.studies import Choice, digest_of, find_exams, volumes_of  # noqa: E402

VERSION = "4"  # of what is written from the same files; raise it with every change of the pixels
CONVENTION = """
orientation of what is written (the patient's right and left):
  sagittal  rows superior to inferior, columns anterior to posterior, slices right to left
  coronal   rows superior to inferior, columns right to left, slices anterior to posterior
  axial     rows anterior to posterior, columns right to left, slices superior to inferior
"""


def read_labels(path, numbered):
    """`exam,task,label` -> dict task -> dict exam's number -> label. Raises InputError."""
    folders = defaultdict(list)
    for number, exam in numbered.items():
        folders[exam.source].append(number)
        folders[exam.name].append(number)
        if exam.side:
            folders[f"{exam.source}-{exam.side}"].append(number)
    for number in numbered:
        for name in (str(number), f"{number:04d}"):  # a folder of this name comes first
            folders.setdefault(name, [number])
    labels = defaultdict(dict)
    try:
        with open_regular(path, "r", newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a CSV ({error})") from None
    if not rows:
        raise InputError(f"{path}: no labels in it; write a row of exam,task,label for each")
    for line, row in enumerate(rows, start=2):
        exam, task, label = (str(row.get(k) or "").strip() for k in ("exam", "task", "label"))
        if not re.fullmatch("[A-Za-z0-9_-]{1,40}", task) or label not in ("0", "1"):
            raise InputError(
                f"{path}, line {line}: expected the columns exam,task,label, the task of letters, "
                "digits, - or _, the label 0 or 1"
            )
        found = folders.get(exam.rstrip("/") or ".", [])
        if len(found) != 1:
            known = ", ".join(sorted(folders)[:6])
            raise InputError(
                f"{path}, line {line}: '{exam}' names {len(found)} exams; give the folder of one "
                f"(of one knee: folder-L, folder-R), its name, or its number: {known} ..."
            )
        if labels[task].setdefault(found[0], int(label)) != int(label):
            raise InputError(f"{path}, line {line}: '{exam}' has another label of {task} above")
    return labels


def write_exam(exam, number, folder, choice, report):
    """Write the planes of one exam to `folder`/<plane> and count each plane that fails.

    Returns:
        number of slices.
    """
    title = f"exam {number:04d} ({exam.source})"
    volumes, *_ = volumes_of(exam, choice, report, title)
    write_planes(folder, number, choice.planes, volumes)
    missing = sorted(set(choice.planes) - volumes.keys())
    if volumes and missing:
        report.log(f"{title}  planes missing: {', '.join(missing)}")
    return sum(len(volume) for volume in volumes.values())


def number_exams(exams, out, split, overwrite, key, report):
    """The register of `out` with all `exams` in it, {number: Exam}, and the numbers to convert.

    Args:
        overwrite: convert exams again that are there.
        key: secret of `keyed_hash`.

    Raises:
        InputError: an exam is in the other split already.
    """
    register, numbered, wanted = Register(out), {}, []
    register.clear(report)
    patients = [keyed_hash(key, exam.study.patient) for exam in exams]
    for exam, patient in zip(exams, patients, strict=True):
        number = register.number(exam.name, patient)
        numbered[number] = exam
        found = register.split_of(number)
        if found not in (None, split):
            raise InputError(
                f"{out}: exam {exam.title} is exam {number:04d} of {found} already; the "
                "splits must not share exams"
            )
        if found is None or overwrite:
            wanted.append(number)
    return register, numbered, wanted


def exams_under(source, report):
    """`find_exams` where there are some.

    Raises:
        InputError: there is none.
    """
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    exams = find_exams(source, report)
    if not exams:
        lines = [text for stream, text in report.lines or () if stream == "stderr"]
        why = lines[0].removeprefix("error: ") if lines else "give the exams' folder"
        raise InputError(f"{source}: no readable DICOM or NIfTI in it; {why}")
    return exams


def run(args, choice, report):
    """Convert everything -> exit status."""
    start = time.perf_counter()
    exams = exams_under(args.source, report)
    key = patient_key()
    register, numbered, wanted = number_exams(
        exams, args.out, args.split, args.overwrite, key, report
    )
    labels = read_labels(args.labels, numbered) if args.labels else {}
    if args.id_map and args.id_map.exists() and not args.overwrite:
        raise InputError(f"{args.id_map}: exists; give another file or --overwrite")
    write_dataset(
        args.out,
        wanted,
        report,
        name=args.out.resolve().name,
        version=VERSION,
        synthetic=False,
        source="DICOM or NIfTI, by data/dicom/prepare.py",
        licence="",
        patient_key=hashlib.sha256(key).hexdigest()[:8],
        square="crop" if args.square == "crop" and not args.field_of_view else None,
        **choice.record,
    )
    register.save()  # first, so that an interrupted run goes on under the same numbers
    slices, full = {}, None
    for number in tqdm(wanted, desc="exams", unit="exam", disable=None):
        try:
            slices[number] = write_exam(
                numbered[number], number, args.out / args.split, choice, report
            )
        except OSError as error:
            full = error
            break
    register.clear(report)
    done = {n for n in numbered if n not in wanted} | {n for n, count in slices.items() if count}
    if full is None:
        write_labels(args.out, args.split, labels, done)
        write_groups(args.out, register)
        if args.id_map:
            write_id_map(args.id_map, numbered, done)
    kept = len(numbered) - len(wanted)
    report.log(
        f"{len(done) - kept} of {len(wanted)} exams, {sum(slices.values())} slices in "
        f"{time.perf_counter() - start:.1f} s -> {args.out / args.split}; "
        f"failures: {report.failures}" + (f"; exams that were there: {kept}" if kept else "")
    )
    if full is not None:
        report.fault(
            f"{full.filename or args.out}: {full.strerror}; {len(wanted) - len(slices)} of "
            f"{len(wanted)} exams are not written, from {numbered[wanted[len(slices)]].title} on; "
            "make room and run it again, it goes on there"
        )
        return 1
    if not done:
        raise InputError(
            f"{args.source}: no exam could be used, {counted(report.failures, 'failure')}"
        )
    return 1 if report.failures else 0


def write_labels(out, split, columns, done):
    """Merge {name: {exam's number: value}} of the exams `done` into OUT/<split>-<name>.csv."""
    for name, values in columns.items():
        merge_csv(out / f"{split}-{name}.csv", {n: v for n, v in values.items() if n in done})


def write_groups(out, register):
    """Write OUT/<split>-groups.csv of all exams with volumes: what this run tells of a patient
    changes the groups of earlier runs' exams, too."""
    found = defaultdict(dict)
    for number, group in register.groups().items():
        found[register.split_of(number)][number] = group
    found.pop(None, None)  # those without a volume
    for split, groups in found.items():
        merge_csv(out / f"{split}-groups.csv", groups)


def write_id_map(path, numbered, done):
    """Write what identifies the exams `done`: number, study UID, folder, name."""
    rows = [
        (number, exam.study.uid, exam.source, exam.name)
        for number, exam in sorted(numbered.items())
        if number in done
    ]
    write_csv(path, [("id", "study", "folder", "exam"), *rows])


# --- for predict.py and explain.py ----------------------------------------------------------------


def serve_exams(source, out, choice, report):
    """List the exams under `source`, then convert those that are asked for."""
    exams = exams_under(source, report)

    def convert(exam):
        volumes, unusable, taken = volumes_of(exam, choice, report, exam.title)
        return volumes, unusable, partial(describe, taken, choice, exam.side)

    return serve(exams, digest_of, convert, out, report)


# --- command line ---------------------------------------------------------------------------------


def parse(argv):
    parser = cli.make_parser(__doc__ + CONVENTION)
    parser.add_argument("source", type=Path, help="folder, zip file, or one .dcm or .nii file")
    parser.add_argument("out", type=Path, help="data folder to write to")
    group = parser.add_argument_group("choice of series")
    group.add_argument(
        "--series",
        action="append",
        default=[],
        metavar="TEXT",
        help="part of a series' description, or its number; may be repeated. Without it, "
        "fluid-sensitive fat-suppressed series are preferred, then 2-D ones to 3-D scans, straight "
        "ones, those with more slices",
    )
    group.add_argument(
        "--square",
        choices=("pad", "crop"),
        default="pad",
        help="oblong slices: pad keeps all of them; crop suits long coronal or sagittal fields "
        "of view, whose joint would become small",
    )
    add_preparation(group)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--split",
        choices=("train", "valid"),
        default="valid",
        help="valid suits exams that are only predicted",
    )
    group.add_argument(
        "--labels",
        type=Path,
        metavar="CSV",
        help="columns exam,task,label; exam is a folder below SOURCE (of one of two knees: "
        "folder-L), or the exam's name or number; label is 0 or 1. "
        "Makes OUT/<split>-<task>.csv",
    )
    group.add_argument(
        "--overwrite",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="convert exams again that OUT has already; they keep their numbers",
    )
    group.add_argument(
        "--id-map",
        type=Path,
        metavar="CSV",
        help="also write id, study UID, folder, exam. It identifies patients: keep it out of OUT",
    )
    group.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    report = Report(collect=args.serve)
    choice = Choice(args.series, args.square, args.field_of_view, args.mirror, args.t1,
                    tuple(args.t1_plane))  # fmt: skip
    work = partial(run, args, choice, report)
    if args.serve:
        work = partial(serve_exams, args.source, args.out, choice, report)
    return run_importer(work, args.out, report)


if __name__ == "__main__":
    sys.exit(main())
