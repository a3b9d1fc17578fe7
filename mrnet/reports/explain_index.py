"""Every exam of a folder explained: OUT/index.html over one page each, exams.jsonl to go on from.

    OUT/index.html                   all exams: sorted, filtered, searched
    OUT/exams.jsonl                  a line each, written when its page is whole
    OUT/valid/0237-acl.html, .jpg    its page, and its picture in the index

What is kept of an exam in memory is its line of exams.jsonl.
"""

import io
import math
import os
from pathlib import Path
from typing import NamedTuple, TypedDict
from urllib.parse import quote

import numpy as np
from PIL import Image, ImageOps

from mrnet.documents import Count, Probability, as_json, check, parse_json
from mrnet.errors import InputError, one_line
from mrnet.files import named_in_errors, read_text, write_bytes, write_text
from mrnet.inference.explanation import list_warnings, unusable_of
from mrnet.layout.description import describe_datasets
from mrnet.layout.labels import id_of, label_rows
from mrnet.layout.planes import PLANES, SPLITS, in_order
from mrnet.reports.explain_page import MIRRORED, as_text, decimals, fill, make_page, slice_picture
from mrnet.runtime.provenance import made

TRAINING = SPLITS[0]  # folder of the exams that networks learn from
ROWS, INDEX = "exams.jsonl", "index.html"
THUMBNAIL_SIDE, THUMBNAIL_QUALITY = 128, 80  # px of each plane in the index


class FindingRow(TypedDict):
    """What the index says of a finding of an exam."""

    probability: Probability
    threshold: Probability | None
    digits: Count  # after the point, as both are shown
    decision: str | None
    decided_from: str  # planes, where they are fewer than those shown
    planes: dict[str, Probability]
    picture: str  # relative to the index


class Row(NamedTuple):
    """What the index says of an exam: plain values, a line of exams.jsonl."""

    exam: str
    source: str
    input: str  # hash of its files
    model: str  # hash of networks, stacks and options
    page: str | None  # relative to the index
    error: str | None  # what could not be used
    tasks: list[str]  # that it was explained for
    findings: dict[str, FindingRow]  # of the tasks with an answer
    root: str  # hash of where the exams are
    dicom: bool  # its results were written as DICOM, too
    warnings: list[str]  # of what was used all the same
    side: str  # of the knee: L, R or "" where it is not known

    @property
    def key(self):
        return self.source, self.exam


# --- one exam -------------------------------------------------------------------------------------


def write_exam(exam, findings, model, out, folder):
    """Write an exam's page and pictures -> its Row.

    Args:
        exam: exams.Exam.
        findings: list of explanation.Finding.
        model: hash of all that an answer depends on but the exam.
        folder: where below `out` they go.
    """
    shown = [finding for finding in findings if finding.planes]
    page = folder / page_name(exam, findings) if shown else None
    described = {}
    for finding in shown:
        picture = folder / f"{exam.name}-{finding.task}.jpg"
        write_bytes(out / picture, thumbnail(finding.planes, finding.models.planes))
        described[finding.task] = describe(finding) | {"picture": picture.as_posix()}
    if page:
        write_text(out / page, make_page(exam, shown))
    error = unusable_of(findings)
    if not (error or shown):
        error = "no volume of a plane that there are networks for"
    name = page.as_posix() if page else None
    tasks = [finding.task for finding in findings]
    return Row(
        exam.name,
        exam.source,
        exam.input,
        model,
        name,
        error or None,
        tasks,
        described,
        root="",  # `Rows.add` knows it
        dicom=False,
        warnings=list_warnings(exam, findings),
        side=exam.side,
    )


def make_folder(out):
    """Make the folder of pages. Raises InputError where it cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: {error.strerror}; give another folder as --out") from None


def page_name(exam, findings):
    """File name of an exam's page."""
    return f"{exam.name}-{'+'.join(finding.task for finding in findings)}.html"


def describe(finding):
    """The probabilities and the decision of a Finding with planes: plain values."""
    decision, parts = finding.decision, finding.probabilities
    return {
        "probability": decision.probability if decision else sum(parts.values()) / len(parts),
        "threshold": decision.threshold if decision else None,
        "digits": decimals(decision.probability, decision.threshold, 3) if decision else 3,
        "decision": decision.label if decision else None,
        "decided_from": finding.decided_from,
        "planes": parts,
    }


def thumbnail(explained, planes):
    """The slice that adds most of each plane, beside each other, with its map: JPEG bytes.

    Args:
        explained: as `explanation.explain_planes` returns it.
        planes: that the task's networks take; each has its place, so that exams line up.
    """
    first = {}  # networks that join planes come after those of one
    for one in explained.values():
        first.setdefault(one.plane, one)
    order = in_order({*PLANES, *planes})
    sheet = Image.new("RGB", (THUMBNAIL_SIDE * len(order), THUMBNAIL_SIDE))
    for plane, one in first.items():
        at = int(np.argmax(one.slice_sums))
        picture = Image.fromarray(slice_picture(one, at))
        picture = ImageOps.contain(picture, (THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        sheet.paste(picture, (THUMBNAIL_SIDE * order.index(plane), 0))
    data = io.BytesIO()
    sheet.save(data, "JPEG", quality=THUMBNAIL_QUALITY)
    return data.getvalue()


# --- what is there --------------------------------------------------------------------------------


class Rows:
    """OUT/exams.jsonl: the exams explained so far.

    Args:
        out: folder.
        names: tasks that each exam is explained for.
        model: exams that were explained by others are done again.
        root: hash of where the exams are.
        overwrite: do all again, over whatever is there.

    Raises:
        InputError: the folder holds pages of something else.
    """

    def __init__(self, out, names, model, root, overwrite):
        self.out, self.path, self.names = Path(out), Path(out) / ROWS, names
        self.root, self.rows = root, {}
        make_folder(self.out)
        if not overwrite:
            for row in self.read():
                if row.model == model and (row.page is None or (self.out / row.page).is_file()):
                    self.rows[row.key] = row
        self.write()

    def read(self):
        """The rows that are there; a half-written last line is left out."""
        if not self.path.exists():
            if any(self.out.glob("*.html")):
                raise self.refusal("holds pages of other exams")
            return
        lines = read_text(self.path, errors="replace").splitlines(keepends=True)
        for line in lines:
            if not line.endswith("\n"):
                break
            try:
                check(Row, content := parse_json(line))
                row = Row(**content)
                if row.tasks != self.names:
                    raise self.refusal(f"holds exams explained for {', '.join(row.tasks)}")
                if row.root != self.root:  # its exams may have the same numbers
                    raise self.refusal("holds exams of another folder, or this one has moved")
            except ValueError as error:
                why = f"{ROWS} is damaged, or an earlier version's ({one_line(error)})"
                raise self.refusal(why) from None
            yield row

    def refusal(self, why):
        return InputError(f"{self.out}: {why}; give another folder as --out, or --overwrite")

    def write(self):
        """All rows, in their order, atomically."""
        write_text(self.path, "".join(map(as_line, self.rows.values())))

    def add(self, row):
        row = row._replace(root=self.root)
        self.rows[row.key] = row
        with named_in_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(as_line(row))

    @property
    def inputs(self):
        """{(source, name): hash of the files} of the exams that are there without an error."""
        return {key: row.input for key, row in self.rows.items() if not row.error}

    def finish(self, keys):
        """Write the rows of `keys`, in their order and no others, and return them as a list."""
        self.rows = {key: self.rows[key] for key in keys if key in self.rows}
        self.write()
        return list(self.rows.values())


def as_line(row):
    return as_json(row._asdict()) + "\n"


# --- the index ------------------------------------------------------------------------------------


def make_index(rows, tasks, labels, unfinished, has_training):
    """The index as text.

    Args:
        rows: list of Row.
        tasks: list of task_models.TaskModels.
        labels: as `labels_beside` returns them.
        unfinished: exams that were not reached.
        has_training: the networks may have learned from some, as `shows_training`.
    """
    content = {
        "tasks": [models.task for models in tasks],
        "rows": [
            {
                "exam": as_text(row.exam),
                "source": as_text(row.source),
                "page": row.page and address(row.page),
                "error": row.error,
                "warnings": row.warnings,
                "side": row.side,
                "findings": {
                    task: finding | {"picture": address(finding["picture"])}
                    for task, finding in row.findings.items()
                },
                "labels": {
                    models.task: labels.get((row.source, models.task), {}).get(id_of(row.exam))
                    for models in tasks
                },
            }
            for row in rows
        ],
        "planes": in_order({*PLANES, *(plane for models in tasks for plane in models.planes)}),
        "unfinished": unfinished,
        "training": has_training or any(Path(row.source).name == TRAINING for row in rows),
        "synthetic": any(models.is_synthetic for models in tasks),
        "mirrored": MIRRORED[""] if any(models.is_mirrored for models in tasks) else "",
        "trained_on": {models.task: describe_datasets(models.datasets) for models in tasks},
        "made": made(),
    }
    return fill(PAGE, f"{', '.join(content['tasks'])}: {len(rows)} exams", content)


def address(path):
    """A relative path, whatever bytes its names hold, as a page links to it."""
    return quote(os.fsencode(path))


def shows_training(exams):
    """Whether a folder of plane folders is called train, the root itself perhaps.

    Args:
        exams: as `labels_beside` takes them.
    """
    return any(folder.absolute().name == TRAINING for folder in getattr(exams, "names", {}))


def labels_beside(exams, tasks):
    """What is known of exams in MRNet's layout, from the CSV beside each folder of planes.

    Args:
        exams: FolderExams, or others, which have no labels.
        tasks: list of task_models.TaskModels.

    Returns:
        {(source, task): {id without leading zeros: label 0 to 1}}, of the exams with a label.

    Raises:
        InputError: a CSV that is not `id,label`.
    """
    labels = {}
    for folder in getattr(exams, "names", {}):  # a folder of plane folders, such as data/valid
        source = exams.source_of(folder)
        for models in tasks:
            place = folder.absolute()
            rows = []
            if place.with_name(f"{place.name}-{models.task}.csv").is_file():
                rows = list(label_rows(place.parent, models.task, place.name))
            for row in rows:
                if row.fault:
                    raise InputError(row.fault)
            known = {row.exam_id: row.label for row in rows if not math.isnan(row.label)}
            labels[source, models.task] = known
    return labels


PAGE = (
    Path(__file__).with_name("templates").joinpath("explain_index.html").read_text(encoding="utf-8")
)
