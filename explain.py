"""Show the class activation maps of an exam: a page for the browser, a sheet, an animation.

    python explain.py data/phantom --exam 207 --task acl --out report
    python explain.py ~/scans/knee7.zip --task acl --out report         # DICOM

Writes OUT/<exam>-<task>.html (one file, opens without a server or a network), .png (the slices that
count most) and .gif (all slices). The maps are exact: summed over all slices, plus the bias, they
are the logit (MRNet.heat_maps). Research use only, not a medical device.
"""

import time
from itertools import islice
from pathlib import Path

from common import cli
from common.devices import pick_device, pick_precision
from common.errors import InputError, RunError
from common.exams import open_exams, read_planes, refuse_unfit
from common.explain_page import FRAME_SECONDS, NOTICE, animation, contact_sheet, headline, make_page
from common.explanation import explain_planes
from common.files import write_text
from common.stacking import decide, load_task


def parse_arguments():
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "exams",
        nargs="+",
        type=Path,
        metavar="EXAM",
        help="one exam's .npy files, a folder or zip of DICOM or NIfTI, or a data folder",
    )
    parser.add_argument(
        "--exam", help="which one, where EXAM holds several: 207, valid/0207, a DICOM exam's folder"
    )
    parser.add_argument("--task", required=True, help="the finding to explain")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder to write to")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files of the same name in --out"
    )
    cli.add_exam_arguments(parser)
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
    return folder in ("", source) and (wanted.lstrip("0") or "0") == (name.lstrip("0") or "0")


def check_overwrite(paths, exam, overwrite):
    """Refuse to replace the files of another exam.

    Raises:
        InputError: a file of this name is there and is not known to be of this very exam.
    """
    page = paths[0]
    try:
        own = f'"input": "{exam.input}"' in page.read_text(encoding="utf-8", errors="replace")
    except OSError:
        own = False
    for path in paths:
        if path.exists() and not own and not overwrite:
            raise InputError(
                f"{path}: exists and may be of another exam; give another folder as --out, or "
                "--overwrite"
            )


def run(args):
    """Explain one exam and write the three files."""
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    models = load_task(args.models_dir, args.task, device, args.recipes)
    with open_exams(args.exams, args.plane, datasets=models.datasets) as exams:
        refuse_unfit(models, exams.datasets, args.allow_synthetic)
        exam = exams.load(pick_exam(exams, args.exam, args.exams[0]))
        began = time.perf_counter()
        volumes, unusable = read_planes(exam, models)
        explained, logits = explain_planes(models, volumes, device, precision)
    if not explained:
        have = ", ".join(models.networks) or "no plane"
        why = next(iter(unusable.values()), f"no volume of a plane with a {models.task} model")
        raise InputError(f"exam {exam.name}: {why} (models: {have})")
    path = args.out / f"{exam.name}-{models.task}"
    page, sheet, gif = (path.with_name(path.name + end) for end in (".html", ".png", ".gif"))
    check_overwrite((page, sheet, gif), exam, args.overwrite)
    decision = None
    if models.stack and (args.partial or not unusable):
        decision = decide(models.stack, volumes, logits)
    title = headline(exam, models, explained, decision)
    print(title)
    for dataset in models.datasets or [None]:
        print(f"trained on {cli.describe_dataset(dataset)}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{args.out}: {error.strerror}; give another folder as --out") from None
    write_text(page, make_page(exam, models, explained, decision, unusable))
    slices = sum(len(one.volume) for one in explained.values())
    seconds = time.perf_counter() - began
    size = page.stat().st_size / 1e6
    print(f"page       {page}  {size:.2f} MB, {slices} slices, {seconds:.1f} s")
    contact_sheet(explained, title).savefig(sheet, dpi=100)
    print(f"sheet      {sheet}")
    first, *others = animation(explained, title)
    first.save(gif, save_all=True, append_images=others, duration=1000 * FRAME_SECONDS, loop=0)
    print(f"animation  {gif}\n{NOTICE}")
    if unusable:
        reasons = "; ".join(f"{plane}: {why}" for plane, why in unusable.items())
        done = "left out of the decision" if decision else "so there is no decision (--partial)"
        raise RunError(f"exam {exam.name}: {reasons}; {done}")


if __name__ == "__main__":
    cli.exit_with_status(lambda: run(parse_arguments()))
