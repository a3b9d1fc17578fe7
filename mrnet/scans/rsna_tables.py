"""The CSV files of RSNA's knee set (2026), read by the names of their columns.

Names of columns and words are compared without case and spaces, UIDs without spaces around them; a
column that is missing is refused by name, never guessed, and every row that cannot be used is
counted and named.
"""

import csv
import math
import re
from typing import NamedTuple

from mrnet.errors import InputError
from mrnet.files import open_regular

# Columns of train.csv and sample_submission.csv, in the set's order -> task of train-<task>.csv.
FINDINGS = {
    "ACL": "acl",
    "MCL": "mcl",
    "Medial Meniscus": "medial-meniscus",
    "Lateral Meniscus": "lateral-meniscus",
    "Medial OA": "medial-oa",
    "Lateral OA": "lateral-oa",
    "PF OA": "pf-oa",
    "Effusion": "effusion",
    "Synovitis": "synovitis",
    "Baker's": "bakers",
    "Contusion": "contusion",
    "Fracture": "fracture",
}
STUDY, SERIES, REPORT = "StudyInstanceUID", "SeriesInstanceUID", "Report"
PLANE, FLUID, FAT = "Anatomical_Plane", "Fluid_Sensitive", "Fat_Suppression"
UNKNOWN = math.nan


class SeriesRow(NamedTuple):
    """What train_series.csv says of one series; None where it says nothing that can be used."""

    plane: str | None  # "axial", "coronal" or "sagittal"
    fluid: bool | None  # fluid-sensitive
    fat: bool | None  # fat-suppressed


class Table(NamedTuple):
    """Rows of a CSV file, and what was left out."""

    rows: list  # of dicts {name of a wanted column: text without spaces around it}
    faults: list  # one line for each row that is no row: file, line, why
    count: int  # rows of the file: those of `rows` and those of `faults`


def read_table(path, required, optional=()):
    """A CSV file's rows: Table.

    Raises:
        InputError: it cannot be read, or a required column is missing or there twice.
    """
    try:
        with open_regular(path, "r", newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file)
            head = next(lines, [])
            places = find_columns(path, head, required, optional)
            rows, faults = [], []
            for line in lines:
                if not line:
                    continue
                if len(line) != len(head):
                    faults.append(
                        f"{path}, line {lines.line_num}: {len(line)} columns, the head has "
                        f"{len(head)}"
                    )
                    continue
                rows.append({name: line[k].strip(" \t\r\n\0") for name, k in places.items()})
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the folder that holds it") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a CSV ({type(error).__name__})") from None
    return Table(rows, faults, len(rows) + len(faults))


def find_columns(path, head, required, optional):
    """{name: place} of the wanted columns of a head."""
    places = {}
    for place, text in enumerate(head):
        for name in (*required, *optional):
            if plain(text) == plain(name):
                if name in places:
                    raise InputError(f"{path}: two columns {name}; remove one")
                places[name] = place
    missing = [name for name in required if name not in places]
    if missing:
        there = ", ".join(map(repr, head[:20])) or "nothing"
        raise InputError(f"{path}: lacks the column {', '.join(missing)}; it has {there:.300}")
    return places


def plain(text):
    """A name without case, spaces, underscores and kinds of apostrophe."""
    return re.sub(r"[\s_'\u2019`]", "", text).casefold()


def read_series(path, may_lack=()):
    """train_series.csv or test_series.csv.

    Args:
        may_lack: columns that are taken as empty where they are missing.

    Returns:
        {study UID: {series UID: SeriesRow}}, and faults: a line for each row that is left out or
        says something that is not understood, and for each column of `may_lack` that is missing.
    """
    required = [name for name in (STUDY, SERIES, PLANE, FLUID, FAT) if name not in may_lack]
    table = read_table(path, required, may_lack)
    studies, faults = {}, list(table.faults)
    for name in may_lack:
        if table.rows and name not in table.rows[0]:
            faults.append(f"{path}: lacks the column {name}; headers and geometry decide instead")
            for row in table.rows:
                row[name] = ""
    for row in table.rows:
        study, series = row[STUDY], row[SERIES]
        if not study or not series:
            faults.append(f"{path}: a row without {STUDY} or {SERIES}")
            continue
        plane = row[PLANE].casefold()
        if plane not in ("", "axial", "coronal", "sagittal"):
            faults.append(f"{path}: series {series}: unknown {PLANE} {row[PLANE]!r:.40}")
            plane = ""
        flags = []
        for name in (FLUID, FAT):
            known = {"0": False, "1": True, "": None}
            if row[name] not in known:
                faults.append(f"{path}: series {series}: {name} {row[name]!r:.40} is not 0 or 1")
            flags.append(known.get(row[name]))
        if series in studies.setdefault(study, {}):
            faults.append(f"{path}: series {series} is listed twice; the first row counts")
            continue
        studies[study][series] = SeriesRow(plane or None, *flags)
    return studies, faults


class Labels(NamedTuple):
    """Labels of studies from one CSV file."""

    values: dict  # {study UID: {column of FINDINGS: 0 to 1, or UNKNOWN}}
    reports: dict  # {study UID: text}; empty where there is no such column
    faults: list


def read_labels(path, unsaid=None):
    """train.csv, or a CSV with its columns and labels from 0 to 1: Labels.

    Args:
        unsaid: a value that means that nothing is known, such as 0.5; None for none.
    """
    table = read_table(path, (STUDY, *FINDINGS), (REPORT,))
    values, reports, faults = {}, {}, list(table.faults)
    for row in table.rows:
        study = row[STUDY]
        labels = {name: parse_label(row[name], unsaid) for name in FINDINGS}
        wrong = [f"{name} {row[name]!r:.20}" for name, label in labels.items() if label is None]
        if not study or study in values:
            faults.append(f"{path}: study {study or 'without UID'} is there twice or not named")
        elif wrong:
            faults.append(f"{path}: study {study}: {', '.join(wrong)}: not from 0 to 1, or empty")
        else:
            values[study] = labels
            if REPORT in row:
                reports[study] = row[REPORT]
    return Labels(values, reports, faults)


def parse_label(text, unsaid=None):
    """0 to 1, UNKNOWN where it is empty or means that nothing is known, None if it is neither."""
    if not text:
        return UNKNOWN
    if not re.fullmatch(r"[0-9]*\.?[0-9]+([eE]-?[0-9]{1,3})?|[01]\.", text, re.ASCII):
        return None
    value = float(text)
    if unsaid is not None and value == unsaid:
        return UNKNOWN
    return value if value <= 1 else None


def combine_labels(gold, others):
    """The set's own labels where it has them, else the mean of what the others say.

    Args:
        gold: Labels.values of the set.
        others: list of Labels.values.

    Returns:
        {study UID: {column: label or UNKNOWN}} of all studies that any of them has, and
        {study UID: {column: True where the label is the set's own}}.
    """
    studies = dict.fromkeys(study for table in (gold, *others) for study in table)
    labels, own = {}, {}
    for study in studies:
        labels[study], own[study] = {}, {}
        for name in FINDINGS:
            label = gold.get(study, {}).get(name, UNKNOWN)
            own[study][name] = not math.isnan(label)
            said = [table[study][name] for table in others if study in table]
            said = [value for value in said if not math.isnan(value)]
            if math.isnan(label) and said:
                label = sum(said) / len(said)
            labels[study][name] = label
    return labels, own
