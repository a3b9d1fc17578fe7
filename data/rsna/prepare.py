"""RSNA's knee set of 2026 (Kaggle) to MRNet's layout.

    pip install -r requirements-dicom.txt
    python data/rsna/prepare.py ~/rsna data/rsna                            # resumable
    python data/rsna/prepare.py ~/rsna data/rsna --labels teacher.csv --unsaid 0.5
    python data/rsna/prepare.py ~/rsna data/rsna --field-of-view 140 --workers 8
    python data/rsna/prepare.py ~/rsna data/rsna --t1    # planes sagittal-t1 and coronal-t1 as well

Reads train.csv, train_series.csv and train_series/<study>/<series>/*.dcm and writes
OUT/{train,valid}/<plane>/0000.npy, uint8 (s, 256, 256), the best fluid-sensitive series of each
plane; twelve CSVs OUT/{train,valid}-<finding>.csv, a label from 0 to 1 or nothing;
OUT/{train,valid}-groups.csv, one group for studies of one scanner, one patient or one report, which
no fold and no split shares (those of a patient or report that several scanners saw go with the
scanner that saw most of them); OUT/exams.csv (numbers) and OUT/problems.txt: every study, series,
file and row that could not be used, by its UID or path, and why. Nothing else leaves the DICOM and
the CSVs but pixels, labels, numbers and hashes.

The set's format is taken from its published description; its licence (RSNA MIRA) forbids passing it
on. Nothing here was run on the set itself.
"""

import argparse
import logging
import math
import random
import signal
import sys
import time
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))  # started as a script, it finds its own folder

from mrnet.errors import InputError, counted  # noqa: E402
from mrnet.files import read_text, write_csv, write_text  # noqa: E402
from mrnet.layout.description import read_dataset  # noqa: E402
from mrnet.layout.labels import OWN_LABELS  # noqa: E402
from mrnet.runtime import cli  # noqa: E402
from mrnet.runtime.machine import usable_cores  # noqa: E402
from mrnet.scans.command import Report, add_preparation  # noqa: E402
from mrnet.scans.origin import describe  # noqa: E402
from mrnet.scans.register import Register, merge_csv, write_dataset, write_planes  # noqa: E402
from mrnet.scans.rsna import convert, digest_of, find_studies, identity_of  # noqa: E402
from mrnet.scans.rsna_tables import (  # noqa: E402
    FAT,
    FINDINGS,
    FLUID,
    PLANE,
    combine_labels,
    read_labels,
    read_series,
)
from mrnet.scans.serve import run_importer, serve  # noqa: E402
from mrnet.scans.studies import Choice, Volumes  # noqa: E402

VERSION = "4"  # of what is written from the same files; raise it with every change of the pixels
THE_SET = {
    "name": "rsna-knee-2026",
    "synthetic": False,
    "source": "RSNA Knee Abnormality Detection 2026 (Kaggle), by data/rsna/prepare.py",
    "licence": "RSNA MIRA licence: not to be passed on",
}
SEED = 0  # of the cut into train and valid
NOT_THERE, NO_ROW = "in the CSVs, but not in train_series", "no row in train.csv"
OF_A_PATIENT = 20  # studies; a PatientID that more share is a word such as "anonymous"


def parse(argv):
    parser = cli.make_parser(__doc__)
    parser.add_argument("root", type=Path, help="folder of train.csv and train_series/")
    parser.add_argument("out", type=Path, help="data folder to write to")
    group = parser.add_argument_group("labels")
    labels = "another CSV with train.csv's columns and labels from 0 to 1; several are averaged. "
    labels += "The set's own labels win over them"
    add = group.add_argument
    add("--labels", type=Path, action="append", default=[], metavar="CSV", help=labels)
    unsaid = "a value in --labels that means `the report does not say`: such labels are unknown"
    add("--unsaid", type=float, metavar="VALUE", help=unsaid)
    gold = "weight of the set's own labels in the loss, beside 1 for those of --labels"
    add("--gold-weight", type=float, default=1.0, help=gold)
    group = parser.add_argument_group("pictures")
    add_preparation(group, mirror=True)
    group = parser.add_argument_group("run")
    valid = "share of the studies to validate on, cut by groups"
    group.add_argument("--valid", type=float, default=0.1, help=valid)
    workers = "processes that decode, about 500 MB each"
    group.add_argument("--workers", type=int, default=usable_cores(), help=workers)
    group.add_argument("--overwrite", action="store_true", help="convert studies again")
    group.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not 0 < args.valid < 1:
        parser.error("--valid is above 0 and below 1")
    if not 1 <= args.workers <= 1000 or not 0 < args.gold_weight <= 1000:
        parser.error("--workers is from 1 to 1000, --gold-weight above 0 and at most 1000")
    return args


# --- groups and splits ----------------------------------------------------------------------------


def group_studies(uids, scanners, *keys):
    """Studies of one patient, or with the same report, are one case; cases of one scanner are one
    group: {uid: number of its group}.

    A case that was seen on several scanners belongs to the one that saw most of it. If it joined
    them, a few such cases would join all scanners to one group.

    Args:
        uids: of the studies.
        scanners: {uid: scanner; "" if unknown}.
        keys: dicts {uid: patient or report; "" if unknown}.
    """
    parent = {uid: uid for uid in uids}

    def root(uid):
        while parent[uid] != uid:
            parent[uid] = parent[parent[uid]]
            uid = parent[uid]
        return uid

    for key in keys:
        first = {}
        for uid in uids:
            if key.get(uid):
                parent[root(uid)] = root(first.setdefault(key[uid], uid))
    seen = defaultdict(Counter)  # case -> scanners
    for uid in uids:
        seen[root(uid)][scanners.get(uid) or ""] += 1
    group_of, numbers = {}, {}
    for case, counts in seen.items():
        counts.pop("", None)
        scanner = counts.most_common(1)[0][0] if counts else None
        group_of[case] = ("scanner", scanner) if scanner else ("case", case)
    return {uid: numbers.setdefault(group_of[root(uid)], len(numbers)) for uid in uids}


def count_elsewhere(groups, scanners):
    """Number of studies that are not of the scanner that most of their group are of."""
    seen = defaultdict(Counter)
    for uid, group in groups.items():
        if scanners[uid]:
            seen[group][scanners[uid]] += 1
    return sum(counts.total() - max(counts.values()) for counts in seen.values())


def known_patients(patients, report):
    """{uid: patient's number} without numbers that so many studies share that they name nobody."""
    shared = {n for n, count in Counter(patients.values()).items() if n and count > OF_A_PATIENT}
    if shared:
        count = sum(number in shared for number in patients.values())
        report.log(f"PatientID that more than {OF_A_PATIENT} studies share, not used: {count}")
    return {uid: "" if number in shared else number for uid, number in patients.items()}


def split_groups(groups, share, seed=SEED):
    """Which studies validate: a set of uids, whole groups, as near to `share` as a random order of
    the groups comes.

    Raises:
        InputError: one group holds nearly everything.
    """
    members = defaultdict(list)
    for uid, group in groups.items():
        members[group].append(uid)
    order, wanted, chosen = sorted(members), share * len(groups), []
    random.Random(seed).shuffle(order)
    for group in order:
        if abs(len(chosen) + len(members[group]) - wanted) < abs(len(chosen) - wanted):
            chosen += members[group]
    if not chosen:
        raise InputError(
            f"{len(groups)} studies in {len(members)} groups, the largest of "
            f"{max(map(len, members.values()))}: no group is small enough for --valid {share:g}; "
            "give a larger one"
        )
    return set(chosen)


# --- conversion -----------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What a worker tells of one study."""

    planes: dict  # {plane: number of slices}
    done: object  # Converted, without its volumes


def write_study(study, number, folder, choice):
    """Convert one study and write its planes: Outcome. Runs in a worker."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = convert(study, Volumes(choice))
    slices = {plane: len(volume) for plane, volume in done.volumes.items()}
    write_planes(folder, number, choice.planes, done.volumes)
    done.volumes = {}
    return Outcome(slices, done)


def quiet_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)  # it quotes headers


def in_parallel(pool, function, items, what):
    """Results of a function of each item's arguments, in order, with a progress bar."""
    results = pool.map(function, *zip(*items, strict=True), chunksize=1)
    return tqdm(results, total=len(items), desc=what, unit="study", disable=None)


class Summary:
    """Counts what became of all studies, and keeps a line for each problem."""

    def __init__(self):
        self.counts, self.notes, self.problems, self.doubts = Counter(), Counter(), [], []

    def add(self, study, outcome):
        done = outcome.done
        self.counts["studies"] += 1
        self.counts["slices"] += sum(outcome.planes.values())
        self.counts["without any plane"] += not outcome.planes
        self.counts[f"side {done.side or 'unknown'}"] += 1
        self.counts["mirrored"] += done.mirrored
        self.counts["planes smaller than the field of view"] += done.padded
        self.notes.update(done.notes)
        self.problems += done.faults
        self.doubts += done.doubts
        for plane, why in done.missing.items():
            self.counts[f"without {plane}"] += 1
            self.problems.append(f"study {study.uid}: {plane} missing: {why}")


def run(args, choice, report, pool):
    """Convert the set, by a pool of processes -> exit status."""
    began = time.perf_counter()
    own = read_labels(args.root / "train.csv")
    others = [read_labels(path, args.unsaid) for path in args.labels]
    listed, faults = read_series(args.root / "train_series.csv")
    for table in (own, *others):
        faults += table.faults
    studies = find_studies(args.root / "train_series", listed, report)
    labels, is_own = combine_labels(own.values, [table.values for table in others])
    faults += unmatched({*listed, *own.values}, labels, {study.uid for study in studies})
    studies = [study for study in studies if study.uid in labels]
    if not studies:
        raise InputError(f"{args.root}: no study that train.csv has as well")
    uids = [study.uid for study in studies]
    scanners, patients = identities(studies, pool)
    reports = {uid: " ".join(text.casefold().split()) for uid, text in own.reports.items()}
    groups = group_studies(uids, scanners, known_patients(patients, report), reports)
    valid = split_groups(groups, args.valid)
    sizes = Counter(groups.values())
    if elsewhere := count_elsewhere(groups, scanners):
        report.log(f"studies in the group of another scanner, which saw their patient: {elsewhere}")
    report.log(f"groups by scanner, patient and report: {len(sizes)}, the largest of "
               f"{max(sizes.values())} studies")  # fmt: skip
    register, numbers, todo = number_studies(studies, valid, args.out, args.overwrite, report)
    given = read_dataset(args.root) or {}  # of a phantom in the set's form; the set has none
    write_dataset(
        args.out,
        [numbers[study.uid] for study, _ in todo],
        report,
        **{name: given.get(name, value) for name, value in THE_SET.items()},
        version=VERSION,
        **choice.record,
    )
    register.save()
    items = [(study, numbers[study.uid], args.out / split, choice) for study, split in todo]
    summary = Summary()
    if items:
        outcomes = in_parallel(pool, write_study, items, "studies")
        for (study, _), outcome in zip(todo, outcomes, strict=True):
            summary.add(study, outcome)
    register.clear(report)
    usable = {number for number in numbers.values() if register.split_of(number)}
    weight = {True: args.gold_weight, False: 1.0}
    texts = {
        uid: [label_cells(labels[uid][name], weight[is_own[uid][name]]) for name in FINDINGS]
        for uid in uids
    }
    write_tables(args.out, texts, groups, valid, {u: n for u, n in numbers.items() if n in usable})
    if others:
        write_own(args.out / OWN_LABELS, is_own, {u: n for u, n in numbers.items() if n in usable})
    problems = faults + summary.problems + summary.doubts
    write_problems(args.out / "problems.txt", problems, args.overwrite)
    tell(report, summary, (len(faults), len(uids), len(usable)), args.out, began)
    return 1 if faults or summary.problems else 0


def identities(studies, pool):
    """`identity_of` of at least one study: {uid: scanner}, {uid: patient's number}."""
    found = in_parallel(pool, identity_of, [(study,) for study in studies], "scanners")
    uids = [study.uid for study in studies]
    return (dict(zip(uids, key, strict=True)) for key in zip(*found, strict=True))


def unmatched(listed, labels, there):
    """A line for each study that is in a CSV but not on disk, or on disk without labels; all UIDs,
    `there` those on disk."""
    lost = [f"study {uid}: {NOT_THERE}" for uid in sorted(listed - there)]
    return lost + [f"study {uid}: {NO_ROW}" for uid in sorted(there - labels.keys())]


def number_studies(studies, valid, out, overwrite, report):
    """The register of `out` with all studies in it, {uid: number}, and the studies to convert with
    their split.

    Raises:
        InputError: a study is in the other split already, or one that `out` has is not given.
    """
    register, numbers, todo = Register(out), {}, []
    register.clear(report)
    given = {study.name for study in studies}
    others = [number for exam, (number, _) in register.rows.items() if exam not in given]
    for number in sorted(others):
        # The tables are written anew, of these studies; groups are numbered among them.
        if there := register.split_of(number):
            raise InputError(
                f"{out}: exam {number:04d} of {there} is of a study that is not given now, in "
                "train_series or train.csv, and would lose its labels; give all studies at once, "
                "or another OUT"
            )
    for study in studies:
        number = numbers[study.uid] = register.number(study.name)
        split = "valid" if study.uid in valid else "train"
        there = register.split_of(number)
        if there not in (None, split):
            raise InputError(
                f"{out}: study {study.uid} is in {there} already and would be in {split} now; "
                "give the same studies and --valid as before, or another folder"
            )
        if there is None or overwrite:
            todo.append((study, split))
    return register, numbers, todo


def write_tables(out, labels, groups, valid, numbers):
    """Write the CSVs of labels and groups.

    Args:
        labels: {uid: [cells of each of FINDINGS]}.
        numbers: {uid: number} of the exams that have a plane.
    """
    for split in ("train", "valid"):
        ours = {u: n for u, n in numbers.items() if (u in valid) == (split == "valid")}
        merge_csv(out / f"{split}-groups.csv", {n: groups[uid] for uid, n in ours.items()})
        for column, task in enumerate(FINDINGS.values()):
            rows = sorted((number, *labels[uid][column]) for uid, number in ours.items())
            write_csv(out / f"{split}-{task}.csv", rows)


def write_own(path, is_own, numbers):
    """Write which labels are the set's own, rows of exam's number and task: figures on them and on
    derived ones are never mixed (mrnet/reports/table.py)."""
    rows = [
        (number, task)
        for uid, number in numbers.items()
        for name, task in FINDINGS.items()
        if is_own[uid][name]
    ]
    write_csv(path, sorted(rows))


def write_problems(path, problems, afresh):
    """Write a line for each problem, beside those of earlier runs unless all is done `afresh`."""
    before = [] if afresh or not path.exists() else read_text(path).splitlines()
    before = [line for line in before if not line.endswith((NOT_THERE, NO_ROW))]  # found anew
    lines = dict.fromkeys([*before, *(" ".join(problem.split()) for problem in problems)])
    write_text(path, "".join(f"{line}\n" for line in lines))


def label_cells(label, weight):
    """A label as the layout has it: 0, 1, 0.xxxx or nothing, and a weight other than 1."""
    if math.isnan(label):
        return ("",)
    text = f"{label:.4f}".rstrip("0").rstrip(".")
    return (text,) if weight == 1 else (text, f"{weight:g}")


def tell(report, summary, counts, out, began):
    """Print what was done and what was not."""
    faults, asked, usable = counts
    seconds, n = time.perf_counter() - began, summary.counts["studies"]
    for note, count in sorted(summary.notes.items()):
        report.log(f"{note}: {count} series")
    for name, count in sorted(summary.counts.items()):
        if count and name not in ("studies", "slices"):
            report.log(f"{name}: {count}")
    report.log(
        f"{counted(n, 'study')} converted, {summary.counts['slices']} slices in {seconds:.1f} s "
        f"({n / seconds:.2f} studies/s); {usable} of {asked} studies have a plane -> {out}"
    )
    if summary.doubts:
        where = out / "problems.txt"
        report.warn(f"knees that are not mirrored: {len(summary.doubts)}; each is in {where}")
    if faults or summary.problems:
        report.fault(
            f"{faults} rows and {len(summary.problems)} studies, series or files could not be "
            f"used; each is in {out / 'problems.txt'}"
        )


def serve_studies(root, out, choice, report):
    """List the studies of test_series/, then convert those that are asked for.

    Args:
        root: folder of the studies; its CSV of series is beside it, with the same name.
    """
    # What a test set does not tell must not stop a submission.
    listed, faults = read_series(root.with_name(f"{root.name}.csv"), (PLANE, FLUID, FAT))
    for fault in faults:
        report.warn(fault)

    def convert_study(study):
        reader = Volumes(choice)
        done = convert(study, reader)
        # Rows repeat the first few: that medial and lateral may be exchanged is among them.
        for line in done.doubts + done.faults:
            report.warn(line)
        # What nobody scanned is no fault: the stack has a regression without it.
        unusable = {p: why for p, why in done.missing.items() if p not in done.not_scanned}
        return done.volumes, unusable, partial(describe, reader.taken, choice, done.side)

    return serve(find_studies(root, listed, report), digest_of, convert_study, out, report)


def main(argv=None):
    args = parse(argv)
    report = Report(collect=args.serve)
    choice = Choice([], "pad", args.field_of_view, args.mirror, args.t1, tuple(args.t1_plane))
    if args.serve:
        work = partial(serve_studies, args.root, args.out, choice, report)
        return run_importer(work, args.out, report, "studies")
    spawn = get_context("spawn")  # the same on every system
    with ProcessPoolExecutor(args.workers, spawn, quiet_worker) as pool:
        return run_importer(partial(run, args, choice, report, pool), args.out, report, "studies")


if __name__ == "__main__":
    sys.exit(main())
