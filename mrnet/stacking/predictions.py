"""What findings' saved networks say about the labelled exams: the columns of their stacks."""

import shlex
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mrnet.errors import InputError
from mrnet.layout.names import list_runs, model_path, unfinished_states
from mrnet.networks.saved import BackboneKey, body_digest
from mrnet.runtime.cli import progress
from mrnet.runtime.devices import autocast
from mrnet.stacking.stacking import combinations_of
from mrnet.training.checkpoint import load_with_digest
from mrnet.training.datasets import MultiPlaneDataset


class BaseModels(NamedTuple):
    """The networks that a stack combines: what train.py wrote with these arguments."""

    models_dir: Path
    task: str
    columns: dict  # {column of the stack: planes that its networks take, joined by +}
    folds: int
    repeat: int
    first_seed: int

    @property
    def seeds(self):
        return range(self.first_seed, self.first_seed + self.repeat)

    @property
    def runs(self):
        return list_runs(self.folds, self.seeds)

    def path(self, column, run):
        """File of one column's network of a Run."""
        return model_path(self.models_dir, self.task, column, run.suffix)

    def all_paths(self, column):
        return [self.path(column, run) for run in self.runs]


def check_base_models(base_models, data_dir):
    """Raise InputError for a plane that is not trained, with the command that trains it."""
    for column, planes in base_models.columns.items():
        for path in base_models.all_paths(column):
            unfinished = unfinished_states(path, base_models.task)
            if unfinished or not path.is_file():
                folds, repeat = base_models.folds, base_models.repeat
                more = f" --folds {folds}" if folds > 1 else ""
                more += f" --repeat {repeat}" if repeat > 1 else ""
                recipe = column.removeprefix(planes).removeprefix("-")
                more += f" --recipe {recipe}" if recipe else ""
                plane = planes.replace("+", " ")
                words = base_models.task, data_dir, base_models.models_dir
                task, data, models = (shlex.quote(str(word)) for word in words)
                raise InputError(
                    f"{path}: the {column} plane of {base_models.task} is not trained"
                    f"{' to its end' if unfinished else ''}. Run python train.py --task "
                    f"{task} --plane {plane} --data-dir {data} --models-dir {models} --seed "
                    f"{base_models.first_seed}{more} --resume, with the recipe of the other planes"
                )


def check_network(path, metadata, sets, expected):
    """Refuse a network that was trained on other exams, another fold or another seed.

    Args:
        metadata: of the model at `path`.
        sets: {split: MRDataset} of its plane.
        expected: {"seed", "fold", "folds": int}.

    Raises:
        InputError: with what it was trained on.
    """
    found = {"folds": metadata["arguments"]["folds"]}
    found |= {name: metadata[name] for name in ("seed", "fold")}
    other = [f"{name} {found[name]}" for name in expected if found[name] != expected[name]]
    if other:
        raise InputError(
            f"{path}: was trained with {', '.join(other)}; give --seed, --folds and --repeat as "
            "train.py had them, or train it again"
        )
    unused = {*metadata["out_of_fold"], *metadata["tuning"]}
    ids = sets["train"].ids
    rows = [row for row, exam_id in enumerate(ids) if exam_id not in unused]
    splits = {"valid": sets["valid"], "train": sets["train"].subset(rows)}
    for split, exams in splits.items():
        if exams.fingerprint() != metadata["data"].get(split):
            kind = {"valid": "validation", "train": "training"}[split]
            raise InputError(
                f"{path}: its {kind} exams differ from those in {sets[split].root}; give the "
                "--data-dir that it was trained on, or train it again"
            )


class ColumnLogits(NamedTuple):
    """Predictions of one column's networks of one seed, from all their planes first, then from
    those sets of planes that they can also do with. NaN for exams that lack these planes."""

    # {planes: float64 (n, 1)}; with folds, of the network that was not trained on the exam
    train: dict
    valid: dict  # {planes: float64 (m, networks)}
    trainings: list  # arguments of each network's
    tuning: list  # ids of the selection exams that no network was trained on, where it is one
    folds: dict  # {id: number of the network that was not trained on it}; {} without folds
    digests: dict  # {file name: SHA-256} of the networks that were loaded


class Predictor:
    """Predicts exams of one data folder with one network after the other.

    Those that differ in their classifiers alone, as the findings of one training that chose the
    same epoch, share the rest: an exam goes through it once. Keeps what each exam's classifiers are
    given, 1 KB with AlexNet.
    """

    def __init__(self, device, precision):
        self.device, self.precision = device, precision
        self.features = {}  # {(split, BackboneKey): {exam id: float32 (1, channels)}}

    def __call__(self, model, exams, what):
        """Logits of the exams that have all planes that are taken of them, or that a
        network of all its planes is asked about: float64 (n, 1), NaN for the others.

        Args:
            exams: MRDataset.
        """
        logits = np.full((len(exams), 1), np.nan)
        rows = range(len(exams))
        if isinstance(exams, MultiPlaneDataset) and exams.taken != list(exams.plane):
            rows = [row for row in rows if set(exams.taken) <= exams.paths[row].keys()]
        body = BackboneKey(body_digest(model), tuple(exams.taken), exams.intensity, exams.channels)
        known = self.features.setdefault((exams.split, body), {})
        missing = [row for row in rows if exams.ids[row] not in known]
        if missing:
            part = exams if len(missing) == len(exams) else exams.subset(missing)
            found = exam_features(model, part, self.device, self.precision, what)
            known.update(zip(part.ids, found, strict=True))
        with torch.inference_mode():
            for row in rows:
                logits[row] = model.classify(known[exams.ids[row]]).item()
                if not np.isfinite(logits[row]):
                    raise InputError(
                        f"{what}: the logit of {exams.paths[row]} is {logits[row, 0]}, the network "
                        "diverged; train it again with a lower --lr"
                    )
        return logits


@torch.inference_mode()
def exam_features(model, exams, device, precision, what):
    """What the classifier of a network is given of each exam: list of float32 (1, channels)."""
    model.eval()
    found = []
    for i in progress(range(len(exams)), what):
        with autocast(device, precision):
            found.append(model.exam_features(exams.exam(i, device)))
    return found


def predict_column(base_models, column, seed, sets, predict):
    """One column's logits for one seed: ColumnLogits.

    With folds, training exams are predicted out-of-fold, by the network that was not trained on
    them, else by the only network; validation exams by all networks.

    Args:
        sets: {split: MRDataset} of its planes.
        predict: Predictor.
    """
    runs = [run for run in base_models.runs if run.seed == seed]
    paths = [base_models.path(column, run) for run in runs]
    folds, trainings, tuning = base_models.folds, [], []
    train, valid, fold_of, digests = {}, {}, {}, {}
    for run, path in zip(runs, paths, strict=True):
        model, metadata, digests[path.name] = load_with_digest(path, base_models.task, column)
        expected = {"seed": seed, "fold": run.fold, "folds": folds}
        check_network(path, metadata, sets, expected)
        settings = {name: metadata[name] for name in ("intensity", "channels")}
        out = metadata["out_of_fold"] if folds > 1 else sets["train"].ids
        rows, model = sets["train"].rows_of(out), model.to(predict.device)
        for planes in sets_of_planes(metadata):
            settings["taken"] = planes.split("+")
            ours = {split: exams.prepared(**settings) for split, exams in sets.items()}
            logits = train.setdefault(planes, np.full((len(sets["train"]), 1), np.nan))
            logits[rows] = predict(model, ours["train"].subset(rows), path.stem)
            valid.setdefault(planes, []).append(predict(model, ours["valid"], path.stem))
        fold_of |= dict.fromkeys(out, run.fold) if folds > 1 else {}
        trainings.append(metadata["arguments"])
        tuning = metadata["tuning"] if folds == 1 else []
    if np.isnan(next(iter(train.values()))).any():
        raise InputError(f"{paths[0]}: its folds leave training exams out; train all folds again")
    valid = {key: np.concatenate(ones, axis=1).astype(np.float64) for key, ones in valid.items()}
    return ColumnLogits(train, valid, trainings, tuning, fold_of, digests)


def predict_columns(findings, sets, exams, device, precision):
    """What the networks of findings say: {task: {column: [ColumnLogits of all exams, one a seed]}}.

    Args:
        findings: list of BaseModels, of the same columns, folds and seeds.
        sets: {task: what `labelled_sets` returns}.
        exams: {task: {split: MRDataset}}.
    """
    found = {one.task: {column: [] for column in one.columns} for one in findings}
    for column, planes in findings[0].columns.items():
        for seed in findings[0].seeds:
            predict = Predictor(device, precision)  # its features are of this column and seed only
            for one in findings:
                ours = sets[one.task][planes]
                logits = predict_column(one, column, seed, ours, predict)
                found[one.task][column].append(spread(logits, ours, exams[one.task]))
    return found


def spread(found, sets, exams):
    """A ColumnLogits of the exams in `sets` as one of all `exams`, NaN for those without planes.

    Args:
        sets, exams: {split: MRDataset}.
    """

    def rows_of_all(split, logits):
        full = np.full((len(exams[split]), logits.shape[1]), np.nan)
        full[exams[split].rows_of(sets[split].ids)] = logits
        return full

    train, valid = (
        {planes: rows_of_all(split, logits) for planes, logits in by_planes.items()}
        for split, by_planes in (("train", found.train), ("valid", found.valid))
    )
    return found._replace(train=train, valid=valid)


def sets_of_planes(metadata):
    """The planes that a network takes, joined by +; with plane dropout, then each part of them."""
    planes = metadata["plane"]
    if not metadata["plane_dropout"]:
        return [planes]
    parts = combinations_of(planes.split("+"))[:-1]
    return [planes, *parts]
