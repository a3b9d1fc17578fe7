"""One page about a run: what was trained on what, how good it is, where it is wrong.

    write_report(read_all(["models"]), "models/report.html")

Figures come from the results and predictions that train_logistic_regression.py wrote, nothing is
measured again; only the heat maps of the exams that the stack gets wrong are computed here. Beside
the page goes claim.md, the CLAIM checklist (Tejani et al., Radiology: AI 2024;6(4):e240300) with
what the run knows filled in.
"""

import csv
import glob
import hashlib
import os
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from mrnet.errors import InputError, OneClassError, one_line
from mrnet.evaluation.figures import as_svg, learning_figure, reliability_figure, roc_figure
from mrnet.evaluation.metrics import auc_interval, wilson_interval
from mrnet.files import find_target, open_regular, write_text
from mrnet.inference.exams import FolderExams, read_planes
from mrnet.inference.explanation import explain_planes
from mrnet.inference.task_models import load_task
from mrnet.layout.description import describe_dataset
from mrnet.layout.labels import id_of, read_groups
from mrnet.layout.planes import SPLITS
from mrnet.reports.explain_page import MIRRORED, NOTICE, jpeg, slice_picture
from mrnet.runtime import cli
from mrnet.runtime.devices import pick_device, pick_precision
from mrnet.runtime.provenance import made
from mrnet.stacking.results import find_results, read_results
from mrnet.stacking.stacking import STACK, largest_combination
from mrnet.training.config import beyond_article, selection_of

WORST = 4  # exams of each kind of error that are shown
PICTURE_SIDE, PICTURE_QUALITY = 224, 85
MOST_VALUES = 12  # of a column that makes subgroups

# (who, protocol, {task: AUC}); none of these is ours.
PUBLISHED = (
    (
        "Stanford MRNet (Bien et al., PLOS Medicine 2018)",
        "hidden test set of 120 exams",
        {"abnormal": 0.937, "acl": 0.965, "meniscus": 0.847},
    ),
    (
        "AlexNet rebuild by FragLegs (GitHub)",
        "the public 120 validation exams, not used for choices",
        {"abnormal": 0.940, "acl": 0.960, "meniscus": 0.839},
    ),
    (
        "the article",
        "the public 120, which selected the epochs; stack fitted on training exams",
        {"acl": 0.95},
    ),
)


class Mistake(NamedTuple):
    """An exam on the wrong side of the threshold."""

    exam_id: str
    kind: str  # "false negative" or "false positive"
    probability: float
    pictures: list  # of each plane (title, data URI); its slice that spoke most for the mistake
    page: str | None  # relative address of its page by explain.py


class Subgroup(NamedTuple):
    """The stack's figures on the exams that share a value of a column."""

    column: str
    value: str
    n: int
    positives: int
    auc: tuple | None  # metrics.Interval; None where all labels are the same
    sensitivity: tuple | None  # None without positives
    specificity: tuple | None


# --- the exams that it gets wrong -----------------------------------------------------------------


def mistakes_of(results, most=WORST):
    """[(row, kind)] of the worst false negatives, then of the worst false positives."""
    scores, called, positive = results.scores[STACK], results.called, results.labels == 1
    order = np.argsort(scores, kind="stable")
    missed = [(row, "false negative") for row in order if positive[row] and not called[row]]
    alarms = [(row, "false positive") for row in order[::-1] if called[row] and not positive[row]]
    return missed[:most] + alarms[:most]


def explain_mistakes(results, data_dir, why, pages, out):
    """Each of `mistakes_of` with its pictures.

    Args:
        data_dir: where the exams are.
        why: there can be no pictures, "" if there can.
        pages: folder with pages by explain.py, or None.
        out: path of the report, which links to them.

    Returns:
        [Mistake], and why they have no pictures: a line, or "".
    """
    wanted, found, keys = mistakes_of(results), [], {}
    try:
        if not why:
            device = pick_device("auto")
            models = load_task(results.folder, results.task, results.content["recipes"], device)
            exams = FolderExams(data_dir)
            keys = {id_of(name): (source, name) for source, name in exams
                    if source == "valid"}  # fmt: skip
            explain = partial(
                explain_planes, device=device, precision=pick_precision("auto", device)
            )
    except InputError as error:
        why = one_line(error)
    for row, kind in cli.progress(wanted, f"{results.task}, exams it gets wrong"):
        exam_id, pictures = results.ids[row], []
        if exam_id in keys:
            exam = exams.load(keys[exam_id])
            volumes, _ = read_planes(exam, models)
            explained, _ = explain(models, volumes)
            pictures = [picture_of(one, kind) for one in explained.values()]
        elif not why:
            why = f"{data_dir} does not have these exams"
        page = page_of(exam_id, results.task, pages, out)
        found.append(Mistake(exam_id, kind, float(results.scores[STACK][row]), pictures, page))
    return found, why


def picture_of(one, kind):
    """(title, data URI) of the slice of a PlaneMaps that spoke most for the mistake."""
    sums = one.slice_sums
    at = int(np.argmax(sums) if kind == "false positive" else np.argmin(sums))
    text = f"{one.title}, slice {at + 1} of {len(sums)}: {sums[at]:+.2f}"
    return text, jpeg(slice_picture(one, at), PICTURE_SIDE, PICTURE_QUALITY)


def page_of(exam_id, task, pages, out):
    """Address of an exam's page by explain.py, relative to the report; None where there is none."""
    for folder in (Path(pages) / "valid", Path(pages)) if pages else ():
        for path in sorted(folder.glob(f"*{glob.escape(exam_id)}-*.html")):
            name, _, of = path.stem.partition("-")
            if id_of(name) == exam_id and task in of.split("+"):
                return Path(os.path.relpath(path, Path(out).parent)).as_posix()
    return None


# --- subgroups ------------------------------------------------------------------------------------


def read_columns(data_dir, metadata):
    """Columns that divide the validation exams.

    Args:
        data_dir: folder whose groups are one, or None.
        metadata: path of a CSV with a line of titles, `id` first, or None.

    Returns:
        {title: {id without leading zeros: value}}

    Raises:
        InputError: not such a CSV.
    """
    columns = {}
    try:
        if groups := read_groups(data_dir, "valid") if data_dir else {}:
            columns["group"] = groups
        if metadata:
            with open_regular(metadata, "r", newline="", encoding="utf-8-sig") as file:
                reader, seen = csv.DictReader(file), set()
                if (reader.fieldnames or [""])[0] != "id":
                    raise ValueError("no line of titles that begins with `id`")
                for row in reader:
                    exam_id = id_of(row.pop("id"))
                    if exam_id in seen:
                        raise ValueError(f"line {reader.line_num}: exam {exam_id} is there twice")
                    seen.add(exam_id)
                    for title, value in row.items():
                        if isinstance(title, str) and value:
                            columns.setdefault(title, {})[exam_id] = value.strip()
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(
            f"{metadata}: cannot be read as a CSV of exams ({one_line(error)}); its first line is "
            "`id,site,sex` with any columns after the id"
        ) from None
    return columns


def subgroups_of(results, columns):
    """The stack in each part of the validation exams: [Subgroup], [what was left out and why]."""
    found, skipped = [], []
    for title, values in columns.items():
        of = np.array([values.get(exam_id, "(none)") for exam_id in results.ids])
        counts = Counter(of.tolist())
        if len(counts) > MOST_VALUES or len(counts) < 2:
            skipped.append(f"{title}: {len(counts)} different values, not 2 to {MOST_VALUES}")
            continue
        found += [subgroup(results, title, value, of == value) for value in sorted(counts)]
    return found, skipped


def subgroup(results, title, value, rows):
    """The Subgroup of some exams; `rows` is bool (n,)."""
    labels, scores = results.labels[rows], results.scores[STACK][rows]
    called, positive = results.called[rows], labels == 1
    try:
        auc = auc_interval(labels, scores)
    except OneClassError:
        auc = None
    parts = [
        wilson_interval(int((called[part] == is_right).sum()), int(part.sum()))
        if part.any()
        else None
        for part, is_right in ((positive, True), (~positive, False))
    ]
    return Subgroup(title, value, len(labels), int(positive.sum()), auc, *parts)


# --- facts ----------------------------------------------------------------------------------------


def training_facts(networks):
    """What some networks were trained on and how: dict.

    Args:
        networks: list of (column, metadata).
    """
    metadata = [one for _, one in networks]
    arguments = [one["arguments"] for one in metadata]
    return {
        "datasets": unique(describe_dataset(one["dataset"]) for one in metadata),
        "synthetic": any((one["dataset"] or {}).get("synthetic") for one in metadata),
        "source": unique((one["dataset"] or {}).get("source") for one in metadata),
        "licence": unique((one["dataset"] or {}).get("licence") for one in metadata),
        "networks": len(metadata),
        "columns": unique(column for column, _ in networks),
        "seeds": unique(one["seed"] for one in metadata),
        "backbones": unique(a["backbone"] for a in arguments),
        "pretrained": unique(one.get("pretrained") for one in metadata),
        "augment": unique(a["augment"] for a in arguments),
        "select": unique(a["select"] for a in arguments),
        "decided": selection_of(arguments),
        "differences": differences_of([column for column, _ in networks], arguments),
        "plane_dropout": any(a["plane_dropout"] > 0 for a in arguments),
        "mirrored": any((m["dataset"] or {}).get("mirrored") for m in metadata),
        "may_lack_planes": any((m["dataset"] or {}).get("may_lack_planes") for m in metadata),
        "machines": unique(one.get("machine") for one in metadata),
        "precision": unique(one.get("precision") for one in metadata),
        "commits": unique(one.get("git") for one in metadata),
    }


def differences_of(columns, arguments):
    """What networks have beyond the article's recipe, in words: "lr 0.0001, epochs 8"; where they
    differ "axial-best: lr 0.0001; axial-other: epochs 8"; "" for nothing.

    Args:
        columns: of each network, list.
        arguments: of each network's training, list of {argument: value}.
    """
    found = {}  # {what: the columns that have it}
    for column, one in zip(columns, arguments, strict=True):
        what = ", ".join(f"{key} {value}" for key, value in beyond_article(one).items())
        found.setdefault(what, {})[column] = None
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{', '.join(of)}: {what}" for what, of in found.items() if what)


def facts_of(results, data_dir):
    """What one finding was trained on and how, for the page and the checklist: dict.

    Args:
        data_dir: Path of the folder with its exams' groups, or None.
    """
    metadata = [one for _, one in results.networks]
    groups = groups_of(results, data_dir)
    exams = {split: {"groups": len(found)} for split, found in groups.items()}
    for split, labels in (("train", results.train_labels), ("valid", results.labels)):
        exams[split] |= {"n": len(labels), "positives": int(labels.sum())}
    times = [sum(e["seconds"] for e in one["history"]) for one in metadata if one.get("history")]
    found = training_facts(results.networks)
    return found | {
        "exams": exams,
        "shared_groups": len(set.intersection(*groups.values())) if all(groups.values()) else None,
        "folds": results.content["folds"],
        "protocol": results.content["protocol"],
        "selection": results.selection,
        "recipes": results.content["recipes"],
        "features": results.stack["features"],
        "commits": unique([*found["commits"], results.content["git"]]),
        "versions": results.content["versions"],
        "minutes": sum(times) / 60 if len(times) == len(metadata) else None,
    }


def groups_of(results, data_dir):
    """{split: groups of the stack's exams, set}, empty where no file lists them."""
    found = {}
    for split, ids in zip(SPLITS, (results.train_ids, results.ids), strict=True):
        listed = read_groups(data_dir, split) if data_dir else {}
        found[split] = {listed[exam_id] for exam_id in ids if exam_id in listed}
    return found


def selections_of(tasks):
    """[(what the validation exams decided, the findings that it is true of)], "" for all of them.

    Args:
        tasks: dicts with at least `name` and `facts`.
    """
    found = {}
    for task in tasks:
        found.setdefault(task["facts"]["selection"], []).append(task["name"])
    names = {what: "" if len(found) == 1 else ", ".join(of) for what, of in found.items()}
    return [pair for pair in names.items() if pair[0]]


def weights_of(stack):
    """{column: weight, "intercept": weight} of a stack's regression of most planes."""
    whole = stack["combinations"][largest_combination(stack["combinations"])]
    weights = dict(zip(whole["columns"], whole["coefficients"], strict=True))
    return weights | {"intercept": whole["intercept"]}


def unique(values):
    """The different values, in order, without None."""
    return [v for v in dict.fromkeys(values) if v is not None]


# --- page -----------------------------------------------------------------------------------------


def figures_of(results):
    """SVG elements of a finding's figures, {name: Markup or list of them}."""
    task, positive = results.task, results.labels
    curves = {}
    for column, metadata in results.networks:
        if metadata.get("history"):
            curves.setdefault(column, []).append(metadata["history"])
    # The figures cannot hold what XML cannot: control characters.
    title = one_line(task)
    return {
        "roc": Markup(
            as_svg(partial(roc_figure, positive, results.scores, band=STACK), f"roc {task}")
        ),
        "calibration": Markup(
            as_svg(
                partial(reliability_figure, positive, results.scores[STACK], title), f"cal {task}"
            )
        ),
        "learning": [
            Markup(as_svg(partial(learning_figure, column, found), f"curves {task} {column}"))
            for column, found in curves.items()
        ],
    }


def number(value, form=".3f"):
    """A figure that can be read back whole from the page, or a dash."""
    if value is None:
        return "–"
    text = format(value, form).replace("-", "−")
    return Markup('<data value="{}">{}</data>').format(repr(value), text)


def with_interval(row, name="auc"):
    """A figure with its interval, of a row of results or of an Interval."""
    if row is None:
        return "–"
    return Markup("{} [{}, {}]").format(*map(number, interval_of(row, name)))


def plain_interval(row, name="auc"):
    """`with_interval` without tags."""
    return "–" if row is None else "{:.3f} [{:.3f}, {:.3f}]".format(*interval_of(row, name))


def interval_of(row, name):
    """Value, low and high of a row of results, or of an Interval."""
    keys = (name, f"{name}_low", f"{name}_high")
    return [row[key] for key in keys] if isinstance(row, dict) else row


def plain_markdown(text):
    """Any text as one line of Markdown that shows it and does nothing else."""
    return Markup(re.sub(r"([\\`*_\[\]|!#])", r"\\\1", str(escape(one_line(text)))))


def environment():
    """Jinja2 with everything escaped that is put into a template."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": number, "md": plain_markdown}
    made.filters |= {"interval": with_interval, "plain": plain_interval}
    return made


def read_all(sources):
    """[Results] of folders of models or of single *-results.json: their order, each task once."""
    return [read_results(path) for path in find_results(sources)]


def write_report(found, out, data_dir=None, metadata=None, pages=None):
    """Write the page at `out`, and claim.md beside it unless one is there that was edited.

    Args:
        found: [Results], at least one.
        data_dir: where the validation exams are; by default where the stack was fitted.
        metadata: CSV of the validation exams, `id` and any columns, for subgroups; or None.
        pages: folder of pages by explain.py to link to, or None.

    Returns:
        lines that say what the page lacks and why.

    Raises:
        InputError: `metadata` is no such CSV, or as `files.find_target`.
    """
    find_target(out)
    tasks, missing = [], []
    for results in found:
        place = Path(data_dir or results.data_dir)
        why = results.why_not_at(place)
        known = None if why else place  # what another folder says of exams is not about these
        mistakes, why = explain_mistakes(results, place, why, pages, out)
        subgroups, skipped = subgroups_of(results, read_columns(known, metadata))
        if known is None:
            missing.append(f"{results.task}: no pictures of mistakes and no groups: {why}")
        elif why and mistakes:
            missing.append(f"{results.task}: no pictures of the exams it gets wrong: {why}")
        missing += [f"{results.task}: no subgroups by {reason}" for reason in skipped]
        tasks.append(
            {
                "name": results.task,
                "results": results.content,
                "rows": results.rows,
                "gain": results.content["valid"]["stack against best plane"],
                "weights": weights_of(results.stack),
                "facts": facts_of(results, known),
                "figures": figures_of(results),
                "mistakes": mistakes,
                "no_pictures": why,
                "subgroups": subgroups,
            }
        )
    names = [task["name"] for task in tasks]
    context = {
        "tasks": tasks,
        "published": [row for row in PUBLISHED if any(name in row[2] for name in names)],
        "columns": unique(name for task in tasks for name in task["rows"]),
        "synthetic": any(task["facts"]["synthetic"] for task in tasks),
        "selections": selections_of(tasks),
        "caveats": unique(line.lstrip("* ") for t in tasks for line in t["results"]["caveats"]),
        "missing": missing,
        "notice": NOTICE,
        "mirroring": MIRRORED[""],
        "made": made(),
    }
    templates = environment()
    write_text(out, templates.get_template("report.html").render(context))
    checklist = templates.get_template("claim.md").render(context)
    return missing + write_checklist(Path(out).with_name("claim.md"), checklist)


def write_checklist(path, text):
    """Write claim.md, but not over one that was edited or is another's: its last line holds a hash
    of the rest.

    Returns:
        list of the line that says so, empty where it was written.
    """
    if find_target(path).exists():
        there = path.read_text(encoding="utf-8", errors="replace")
        if there != with_hash(there.rpartition("\n<!--")[0]):
            return [f"{path}: kept, it was edited or is another's; move it away for a new one"]
    write_text(path, with_hash(text))
    return []


def with_hash(text):
    return f"{text}\n<!-- as made: {hashlib.sha256(text.encode()).hexdigest()} -->\n"
