"""Show the class activation maps of an exam: a page for the browser, a sheet, an animation.

    python explain.py data/phantom --exam 207 --task acl --out report
    python explain.py ~/scans/knee7.zip --out report              # DICOM; every saved finding
    python explain.py data/phantom --all --task acl --out report  # an index over a page each

Writes OUT/<exam>-<task>.html (one file, opens without a server or a network, a tab for each task),
.png (the slices that count most) and .gif (all slices). With --all it writes OUT/index.html, to
sort and filter the exams by probability and error, and a page for each; a second run goes on where
the first one stopped. The maps are exact: summed over all slices, plus the bias, they are the logit
(MRNet.heat_maps). Several tasks are joined by + in the page's name. Research use only, not a
medical device.

OUT/exams.jsonl has a line for each exam of --all: exam, source (its folder), input and model
(hashes of the exam and of the networks), page, error (what could not be used), tasks, findings
(of each task probability, threshold, decision, decided_from, planes, picture), root (hash of where
the exams are), dicom (whether --dicom wrote its results), warnings (of what was used all the same),
side (of the knee: L, R or empty).
"""

import hashlib
import os
import sys
import time
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from mrnet.errors import InputError, RunError, count_unusable, counted, printable
from mrnet.files import alone_at, read_text, write_text
from mrnet.inference.answering import (
    Options,
    add_exam_arguments,
    load_tasks,
    model_of,
    open_fit_exams,
)
from mrnet.inference.exams import FolderExams
from mrnet.inference.explanation import explain_exam, unusable_of
from mrnet.layout.description import describe_datasets
from mrnet.layout.labels import id_of
from mrnet.layout.planes import SPLITS
from mrnet.reports.explain_index import (
    INDEX,
    Rows,
    labels_beside,
    make_folder,
    make_index,
    page_name,
    shows_training,
    write_exam,
)
from mrnet.reports.explain_page import (
    FRAME_SECONDS,
    NOTICE,
    animation,
    contact_sheet,
    headline,
    make_page,
    mirroring,
)
from mrnet.runtime import cli
from mrnet.runtime.devices import pick_device, pick_precision


class Output(NamedTuple):
    """Where files go."""

    folder: Path
    overwrite: bool
    dicom: Path | None  # folder of DICOM results


def parse_arguments():
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "exams",
        nargs="+",
        type=Path,
        metavar="EXAM",
        help="one exam's .npy files, a folder or zip of DICOM or NIfTI, or a data folder",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--exam", help="which one, where EXAM holds several: 207, valid/0207, a DICOM exam's folder"
    )
    which.add_argument(
        "--all",
        action="store_true",
        help="every exam (of a data folder those of --split), with an index over their pages; "
        "about a second and 2 MB for an exam of 256 px",
    )
    parser.add_argument(
        "--split",
        choices=(*SPLITS, "both"),
        default="valid",
        help="with --all: which exams of a data folder",
    )
    parser.add_argument(
        "--task",
        action="append",
        help="the finding to explain; may be repeated; without it, every task with a saved model",
    )
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder to write to")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files of the same name in --out; with --all, explain every exam again",
    )
    parser.add_argument(
        "--dicom",
        type=Path,
        metavar="FOLDER",
        help="of an exam from DICOM: also write its heat maps as a series of the same study, and "
        "its probabilities as a structured report, to FOLDER/<exam>. They hold the patient's name "
        "and number, as the study does (pip install -r requirements-dicom-results.txt)",
    )
    add_exam_arguments(parser)
    machine = parser.add_argument_group("machine")
    cli.add_machine_arguments(machine)
    return parser.parse_args()


def pick_exam(exams, wanted, source):
    """The (source, name) of the exam `wanted`, which may lack leading zeros.

    Raises:
        InputError: none, or several.
    """
    if wanted is None and len(exams) == 1:
        return next(iter(exams))
    found = [key for key in exams if wanted is not None and is_called(key, wanted)]
    if len(found) == 1:
        return found[0]
    names = ["/".join(key).lstrip("/") for key in islice(found or exams, 5)]
    raise InputError(
        f"{source}: {len(found) or len(exams)} exams{f' called {wanted}' if found else ''}; give "
        f"--exam with one of {', '.join(names)} ..."
    )


def is_called(key, wanted):
    source, name = key
    if wanted in (source, "/".join(key)):  # for DICOM, the folder is enough
        return True
    folder, _, wanted = wanted.rpartition("/")
    return folder in ("", source) and id_of(wanted) == id_of(name)


def check_overwrite(paths, exam, overwrite):
    """Refuse to replace the files of another exam.

    Raises:
        InputError: a file of this name is there and is not known to be of this very exam.
    """
    page = paths[0]
    try:
        own = f'"input": "{exam.input}"' in read_text(page, errors="replace")
    except OSError:
        own = False
    for path in paths:
        if path.exists() and not own and not overwrite:
            raise InputError(
                f"{path}: exists and may be of another exam; give another folder as --out, or "
                "--overwrite"
            )


# --- one exam -------------------------------------------------------------------------------------


def explain_one(exam, tasks, output, options):
    """Write the page of an exam, and a sheet and an animation for each task."""
    began = time.perf_counter()
    findings = explain_exam(exam, tasks, *options)
    shown = [finding for finding in findings if finding.planes]
    if not shown:
        if output.dicom:  # what earlier networks said must not stay
            write_dicom(exam, findings, options, output.dicom)
        raise InputError(f"exam {exam.name}: {why_not(findings)}")
    page = output.folder / page_name(exam, findings)
    starts = [output.folder / f"{exam.name}-{finding.task}" for finding in shown]
    pictures = [start.with_name(start.name + end) for start in starts for end in (".png", ".gif")]
    check_overwrite((page, *pictures), exam, output.overwrite)
    for finding in shown:
        print(headline(exam, finding))
        for dataset in describe_datasets(finding.models.datasets):
            print(f"trained on {dataset}")
    make_folder(output.folder)
    write_text(page, make_page(exam, shown))
    slices = sum(len(one.volume) for one in shown[0].planes.values())
    seconds, size = time.perf_counter() - began, page.stat().st_size / 1e6
    print(f"page       {page}  {size:.2f} MB, {slices} slices, {seconds:.1f} s")
    for finding, start in zip(shown, starts, strict=True):
        write_pictures(exam, finding, start)
    if output.dicom:
        write_dicom(exam, findings, options, output.dicom)
    print(NOTICE)
    refuse_unusable(exam, findings)


def write_dicom(exam, findings, options, folder):
    """An exam's heat maps and probabilities as DICOM, beside its own study."""
    for path, count in dicom_results().write_results(exam, findings, options, folder):
        print(f"DICOM      {path}  {count} files" if count > 1 else f"DICOM      {path}")


def dicom_results():
    """The module that writes DICOM, which only some installations can.

    Raises:
        InputError: a package is missing.
    """
    try:
        from mrnet.reports import dicom_results
    except ImportError as error:
        raise InputError(
            f"--dicom: {error.name} is missing; pip install -r requirements-dicom-results.txt"
        ) from None
    return dicom_results


def write_pictures(exam, finding, start):
    """START.png, the slices that add most, and START.gif, all slices."""
    words = headline(exam, finding), mirroring(exam, finding.models)
    sheet, gif = (start.with_name(start.name + end) for end in (".png", ".gif"))
    contact_sheet(finding.planes, *words).savefig(sheet)
    print(f"sheet      {sheet}")
    first, *others = animation(finding.planes, *words)
    first.save(gif, save_all=True, append_images=others, duration=1000 * FRAME_SECONDS, loop=0)
    print(f"animation  {gif}")


def why_not(findings):
    """Why no task has an answer about an exam."""
    for finding in findings:
        for why in finding.unusable.values():
            return why
    have = ", ".join(sorted({plane for f in findings for plane in f.models.planes})) or "no plane"
    names = " or ".join(finding.task for finding in findings)
    return f"no volume of a plane with a {names} model (models: {have})"


def refuse_unusable(exam, findings):
    """Raise RunError where a plane that was there could not be used."""
    if words := unusable_of(findings):
        decided = any(finding.decision for finding in findings)
        done = "left out of the decision" if decided else "so there is no decision (--partial)"
        raise RunError(f"exam {exam.name}: {words}; {done}")


# --- all exams ------------------------------------------------------------------------------------


def explain_all(exams, root, tasks, output, options):
    """A page for every exam, and the index over them; what is there already stays.

    Args:
        root: hash of where the exams are.
    """
    began, out, model = time.perf_counter(), output.folder, model_of(tasks, options)
    labels = labels_beside(exams, tasks)
    rows = Rows(out, [models.task for models in tasks], model, root, output.overwrite)
    known, new, explained, failed = rows.inputs, 0, 0, 0
    if output.dicom:  # explained before is not yet written there, or not by these networks
        name_of = dicom_results().report_name

        def is_written(key):
            row, folder = rows.rows[key], output.dicom / key[1]
            return row.dicom and all((folder / name_of(task)).exists() for task in row.findings)

        known = {key: digest for key, digest in known.items() if is_written(key)}
    try:
        for exam in cli.progress(exams.each(known), "explain", total=len(exams)):
            if exam.unchanged:
                continue
            new += 1
            findings = explain_exam(exam, tasks, *options)
            # A converted exam's name is a hash; its folder's name may say who it is.
            folder = exam.source if isinstance(exams, FolderExams) else ""
            row = write_exam(exam, findings, model, out, Path(folder))
            if output.dicom:
                try:
                    dicom_results().write_results(exam, findings, options, output.dicom)
                    row = row._replace(dicom=True)
                except InputError as error:
                    row = row._replace(error="; ".join(filter(None, [row.error, str(error)])))
            rows.add(row)
            explained += row.page is not None
            if row.error:
                failed += 1
                name = "/".join(exam.key).lstrip("/")
                tqdm.write(f"error: {printable(name)}: {printable(row.error)}", file=sys.stderr)
            exams.remove(exam)
    except KeyboardInterrupt:
        count = counted(len(rows.rows), "exam")
        words = f"{count} explained, in {out / INDEX}; the same command goes on"
        raise KeyboardInterrupt(words) from None
    finally:
        done = rows.finish(exams)
        about = labels, len(exams) - len(done), shows_training(exams)
        write_text(out / INDEX, make_index(done, tasks, *about))
    words = f"{counted(explained, 'exam')} explained"
    words += f", {new - explained} not" if new > explained else ""
    words += f", {len(done) - new} were there" if len(done) > new else ""
    seconds = time.perf_counter() - began
    print(f"index      {out / INDEX}  {words}, {seconds:.1f} s\n{NOTICE}")
    if exams.fault:
        raise RunError(f"{exams.fault}; {counted(failed, 'exam')} without an answer")
    if unusable := count_unusable(failed, exams.failed):
        raise RunError(unusable)


@cli.unwind_on_signals()
def run(args):
    """Explain one exam, or all of them."""
    device = pick_device(args.device)
    options = Options(device, pick_precision(args.precision, device), args.partial)
    tasks = load_tasks(args.models_dir, args.task, device, args.recipes)
    output = Output(args.out, args.overwrite, args.dicom)
    with open_fit_exams(args.exams, args.plane, tasks, args.allow_synthetic) as exams:
        if args.dicom:
            dicom_results()  # what is missing is said before the work
            exams.ask_origin()
        if args.all:
            if isinstance(exams, FolderExams) and args.split != "both":
                exams.keep_split(args.split)
            where = "\0".join(str(path.absolute()) for path in args.exams)
            root = hashlib.sha256(os.fsencode(where)).hexdigest()[:16]
            make_folder(args.out)
            busy = f"{args.out}: another run writes pages there; wait for that one"
            with alone_at(args.out, busy):
                explain_all(exams, root, tasks, output, options)
        else:
            exam = exams.load(pick_exam(exams, args.exam, args.exams[0]))
            explain_one(exam, tasks, output, options)
            if exams.failed and len(exams) == 1:
                raise RunError(count_unusable(0, exams.failed))


if __name__ == "__main__":
    cli.exit_with_status(lambda: run(parse_arguments()))
