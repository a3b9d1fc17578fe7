"""The card that goes with an exported model: README.md with its block of metadata.

What the training recorded is filled in, what only the author knows is marked TO DO. The sections
are those of Mitchell et al., Model Cards for Model Reporting, 2019 (arXiv 1810.03993); the block of
metadata is the one that Hugging Face's hub reads.
"""

import glob
from typing import NamedTuple

import numpy as np

from mrnet.errors import InputError, one_line
from mrnet.files import write_text
from mrnet.inference.exam_model import preparation_of
from mrnet.layout.labels import read_groups
from mrnet.layout.names import RESULTS, column_name, results_path
from mrnet.networks.saved import digest_of
from mrnet.reports.explain_page import NOTICE
from mrnet.reports.report import (
    environment,
    facts_of,
    read_columns,
    subgroups_of,
    training_facts,
    unique,
)
from mrnet.runtime.provenance import made
from mrnet.stacking.results import read_results
from mrnet.stacking.stacking import DIGITS, STACK, largest_combination, load_stack
from mrnet.training.checkpoint import load_model


class Subject(NamedTuple):
    """What a card is about."""

    name: str  # of the model, such as "acl-axial"
    task: str
    networks: list  # (column, metadata) of each network in it
    column: str  # of the results' rows: of one network, or "stack"
    results: object  # results.Results of the stack that it is part of, or None
    why_not: str  # why there are no results
    threshold: float | None = None  # from which on it says positive; None where none is its own


def subject_of_network(path):
    """The Subject of a model that train.py wrote; its figures are those of a stack that has it."""
    _, metadata = load_model(path)
    column = column_name(metadata["plane"], metadata["recipe"])
    about = (path.stem, metadata["task"], [(column, metadata)], column)
    why = "no stack with this network beside it (train_logistic_regression.py)"
    for place in sorted(path.parent.glob(f"{glob.escape(metadata['task'])}*{RESULTS}")):
        try:
            results = read_results(place)
        except InputError as error:
            why = one_line(error)
            continue
        if results.stack["digests"].get(path.name) == digest_of(path):
            count = sum(of == column for of, _ in results.networks)  # of several: of their mean
            threshold = results.rows[column]["threshold"] if count == 1 else None
            return Subject(*about, results, "", threshold)
    return Subject(*about, None, why)


def subject_of_stack(path, task, recipes):
    """The Subject of a task's stack."""
    stack = load_stack(path.parent, task, recipes)
    whole = stack["combinations"][largest_combination(stack["combinations"])]
    try:
        results, why = read_results(results_path(path.parent, task, recipes)), ""
        networks = results.networks
    except InputError as error:
        results, why = None, one_line(error)
        networks = [
            (column, load_model(path.parent / name)[1])
            for column, names in stack["base_models"].items()
            for name in names
        ]
    return Subject(path.stem, task, networks, STACK, results, why, whole["threshold"])


def write_card(subject, library, file, out):
    """Write a model card.

    Args:
        subject: Subject.
        library: "onnx" or "pytorch".
        file: name of the model's file beside the card.
        out: path.
    """
    results, facts = subject.results, training_facts(subject.networks)
    context = {
        "name": subject.name,
        "task": subject.task,
        "library": library,
        "file": file,
        "is_stack": subject.column == STACK,
        "planes": unique(p for _, m in subject.networks for p in m["plane"].split("+")),
        "preparation": preparation_of([metadata for _, metadata in subject.networks]),
        "recipes": unique(metadata["recipe"] for _, metadata in subject.networks),
        "facts": facts,
        "exams": None,
        "row": None,
        "other_exams": "",
        "why_not": subject.why_not,
        "has_threshold": subject.threshold is not None,
        "notice": NOTICE,
        "made": made(),
    }
    if results:
        other_exams = results.why_not_at(results.data_dir)
        data_dir = None if other_exams else results.data_dir
        whole = facts_of(results, data_dir)
        subgroups = []
        if subject.column == STACK:
            subgroups, _ = subgroups_of(results, read_columns(data_dir, None))
        context |= {
            "exams": whole["exams"] | {"train": training_exams(subject, data_dir, whole["exams"])},
            "shared_groups": whole["shared_groups"],
            "protocol": whole["protocol"],
            "selection": results._replace(networks=subject.networks).selection,
            "row": results.rows[subject.column],
            "threshold": f"{results.rows[subject.column]['threshold']:.{DIGITS}f}",
            "of_several": sum(column == subject.column for column, _ in results.networks),
            "worst": worst_of(results, subject.column),
            "subgroups": subgroups,
            "other_exams": other_exams,
            "caveats": [line.lstrip("* ") for line in results.content["caveats"]],
        }
    write_text(out, environment().get_template("model_card.md").render(context))


def training_exams(subject, data_dir, exams):
    """{"n", "positives", "groups"} of the training exams of a card's model.

    Args:
        data_dir: as `facts_of` takes it.
        exams: the same of each split of the stack's, which a network of a fold or of the held-out
            protocol has not seen all of.
    """
    if subject.column == STACK:
        return exams["train"]
    results, (network,) = subject.results, subject.networks
    rows = np.flatnonzero(results.trained_on(*network))
    listed = read_groups(data_dir, "train") if data_dir else {}
    groups = {listed.get(results.train_ids[row]) for row in rows} - {None}
    positives = int(results.train_labels[rows].sum())
    return {"n": len(rows), "positives": positives, "groups": len(groups)}


def worst_of(results, column):
    """{"missed": lowest probability of a miss, "alarm": highest of a false alarm}, None without."""
    scores, called = results.scores[column], results.called
    if column != STACK:
        called = scores >= results.rows[column]["threshold"]
    has_answer = ~np.isnan(scores)
    missed = scores[(results.labels == 1) & ~called & has_answer]
    alarms = scores[(results.labels == 0) & called]
    return {
        "missed": float(missed.min()) if len(missed) else None,
        "alarm": float(alarms.max()) if len(alarms) else None,
    }
