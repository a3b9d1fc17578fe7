"""The stack: features, regression, thresholds, decision, and its file."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PLANES, metadata_of
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_curve
from sklearn.model_selection import PredefinedSplit, cross_val_predict

from model import MRNet, MultiPlaneMRNet
from mrnet.errors import InputError
from mrnet.evaluation.metrics import roc_auc, wilson_interval
from mrnet.inference.exam_model import StackModel
from mrnet.inference.task_models import Network, load_task, saved_tasks
from mrnet.layout.names import stack_path
from mrnet.networks.saved import digest_of
from mrnet.stacking import stacking
from mrnet.stacking.caveats import below_chance, derived_caveats, list_caveats, threshold_source
from mrnet.stacking.fitting import make_stack, names_untuned
from mrnet.stacking.results import GAIN, RATES, evaluate_scores
from mrnet.stacking.stacking import (
    combination_of,
    combinations_of,
    combine,
    combine_all,
    cross_fitted,
    decide,
    fit_combinations,
    load_stack,
    planes_of_exams,
    save_stack,
    stack_features,
    threshold_for,
)
from mrnet.training.checkpoint import save_model
from train_logistic_regression import trained_on

RECIPES = ["article"]


def logit(p):
    return math.log(p / (1 - p))


def some_logits(n=40, networks=2, seed=0):
    rng = np.random.default_rng(seed)
    labels = (np.arange(n) % 3 == 0).astype(np.float32)
    return labels, {
        plane: rng.normal(size=(n, networks)) + labels[:, None] * (i + 1)
        for i, plane in enumerate(PLANES)
    }


def whole(logits):
    """Each plane's networks take this plane only."""
    return {plane: {plane: values} for plane, values in logits.items()}


def one_combination(planes, threshold=0.4):
    columns = planes.split("+")
    return {"columns": columns, "coefficients": [1.0] * len(columns), "intercept": -1,
            "threshold": threshold}  # fmt: skip


def a_stack(**more):
    combinations = {planes: one_combination(planes) for planes in combinations_of(PLANES)}
    return {"task": "acl", "features": "probability", "combinations": combinations,
            "base_models": {plane: [f"acl-{plane}.pt"] for plane in PLANES},
            "digests": {f"acl-{plane}.pt": "0" * 64 for plane in PLANES},
            "thresholds": "chosen on 20 exams"} | more  # fmt: skip


def test_every_set_of_planes():
    assert combinations_of(PLANES) == ["axial", "coronal", "sagittal", "axial+coronal",
        "axial+sagittal", "coronal+sagittal", "axial+coronal+sagittal"]  # fmt: skip
    assert combinations_of(["sagittal-t1", "sagittal"]) == [
        "sagittal", "sagittal-t1", "sagittal+sagittal-t1",
    ]  # fmt: skip


def test_features_are_means_of_probabilities_or_of_logits():
    logits = {"axial": np.array([[logit(0.2), logit(0.4)]]), "sagittal": np.array([[1.0, 3.0]])}
    features = stack_features("probability", logits.values())
    sigmoids = (1 / (1 + math.exp(-1)) + 1 / (1 + math.exp(-3))) / 2
    np.testing.assert_allclose(features, [[0.3, sigmoids]])
    features = stack_features("logit", [logits["sagittal"]])
    np.testing.assert_allclose(features, [[2.0]])


@pytest.mark.parametrize("kind", ["probability", "logit"])
def test_a_stack_as_a_network_answers_as_the_stack_does(kind):
    torch.manual_seed(0)
    columns = {"axial": ("axial",), "axial+coronal": ("axial", "coronal")}

    def network(planes):
        ones = {plane: MRNet().eval() for plane in planes}
        model = ones["axial"] if len(ones) == 1 else MultiPlaneMRNet(ones).eval()
        return Network(model, planes, "raw", "grey", False, "", {})

    networks = {name: [network(planes) for _ in range(2)] for name, planes in columns.items()}
    whole = {"columns": list(columns), "coefficients": [1.5, -2.0], "intercept": 0.25,
             "threshold": 0.4}  # fmt: skip
    stack = {"features": kind, "combinations": {"axial+coronal": whole}}
    models = SimpleNamespace(task="acl", planes=["axial", "coronal"], stack=stack,
                             networks=networks)  # fmt: skip
    volumes = {plane: torch.randint(0, 256, (s, 64, 64), dtype=torch.uint8)
               for plane, s in (("axial", 2), ("coronal", 3))}  # fmt: skip
    fed = {plane: volume[:, None].float() for plane, volume in volumes.items()}
    with torch.inference_mode():
        found = StackModel(models)(*volumes.values()).item()
        logits = {
            name: np.array([[one.model(fed if len(one.planes) > 1 else fed["axial"]).item()
                             for one in ones]])
            for name, ones in networks.items()
        }  # fmt: skip
    assert all(np.ptp(one) > 0.1 for one in logits.values())
    (wanted,), _ = combine(stack, models.planes, logits)
    assert found == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("kind", ["probability", "logit"])
def test_a_stack_is_scikit_learns_regression_of_the_planes_that_exist(kind):
    labels, logits = some_logits()
    nobody = np.zeros(len(labels), bool)
    stack = {"features": kind,
             "combinations": fit_combinations(kind, whole(logits), labels, nobody)}  # fmt: skip
    assert list(stack["combinations"]) == combinations_of(PLANES)
    for planes in (["axial", "coronal", "sagittal"], ["axial", "sagittal"], ["coronal"]):
        x = stack_features(kind, [logits[plane] for plane in planes])
        wanted = LogisticRegression().fit(x, labels).predict_proba(x)[:, 1]
        # In any order of the planes.
        given = {plane: logits[plane] for plane in reversed(planes)}
        stacked, threshold = combine(stack, planes, given)
        np.testing.assert_allclose(stacked, wanted, atol=1e-9)
        assert threshold == threshold_for(labels, wanted, nobody)
        assert wanted.min() / 2 <= threshold <= wanted.max()


def scikit_learns_cross_fit(x, labels, folds):
    given = LogisticRegression(), x, labels
    return cross_val_predict(*given, cv=PredefinedSplit(folds), method="predict_proba")[:, 1]


def test_a_training_exam_is_stacked_by_what_was_fitted_on_the_other_folds():
    labels, logits = some_logits()
    folds = np.random.default_rng(1).integers(1, 5, len(labels))
    x = np.stack([logits[plane].mean(axis=1) for plane in PLANES], axis=1)
    found = cross_fitted("logit", whole(logits), labels, folds)
    np.testing.assert_allclose(found, scikit_learns_cross_fit(x, labels, folds), rtol=1e-9)
    # An exam's own label changes the others' only.
    other = labels.copy()
    other[7] = 1 - other[7]
    changed = cross_fitted("logit", whole(logits), other, folds) != found
    assert not changed[folds == folds[7]].any() and changed[folds != folds[7]].all()


def test_cross_fitting_where_planes_are_missing():
    labels, logits = some_logits()
    full, folds = whole(logits), np.arange(len(labels)) % 2
    full["coronal"]["coronal"][:9] = np.nan
    full["axial"]["axial"][3:] = np.nan  # positive 0, negative 1 and 2
    full["sagittal"]["sagittal"][[0, 1]] = np.nan
    found = cross_fitted("logit", full, labels, folds)
    # Exams 0 and 1 have axial alone. Of the other fold exam 1 has it too, which is negative; of
    # exam 1's other fold 0 and 2 have it, which are of both classes.
    assert np.isnan(found[0]) and np.isfinite(found[1:]).all()
    axial = logits["axial"].mean(axis=1, keepdims=True)
    two = LogisticRegression().fit(axial[[0, 2]], labels[[0, 2]])
    assert found[1] == pytest.approx(two.predict_proba(axial[[1]])[0, 1])
    x = np.stack([logits[plane].mean(axis=1) for plane in ("coronal", "sagittal")], axis=1)
    wanted = scikit_learns_cross_fit(x[9:], labels[9:], folds[9:])
    np.testing.assert_allclose(found[9:], wanted, rtol=1e-9)


def test_tuning_exams_choose_the_threshold_and_are_not_fitted_on():
    labels, logits = some_logits()
    tuning = np.arange(40) >= 25
    combinations = fit_combinations("logit", whole(logits), labels, tuning)
    x = logits["sagittal"].mean(axis=1, keepdims=True)
    fitted = LogisticRegression().fit(x[:25], labels[:25])
    assert combinations["sagittal"]["coefficients"] == pytest.approx(fitted.coef_[0])
    assert combinations["sagittal"]["intercept"] == pytest.approx(fitted.intercept_[0])
    p = fitted.predict_proba(x)[:, 1]
    called = p[25:] >= combinations["sagittal"]["threshold"]
    fpr, tpr, _ = roc_curve(labels[25:], p[25:])
    assert called[labels[25:] == 1].mean() - called[labels[25:] == 0].mean() == (tpr - fpr).max()
    assert combinations["sagittal"]["threshold"] == threshold_for(labels[25:], p[25:], tuning[25:])
    wanted = fit_combinations("logit", whole(logits), labels, tuning, sensitivity=0.6)["sagittal"]
    called = p[25:] >= wanted["threshold"]
    assert called[labels[25:] == 1].sum() == 3  # of 5 positives
    assert wanted["threshold"] != combinations["sagittal"]["threshold"]


def test_thresholds():
    labels = np.array([0, 0, 1, 0, 1, 1], np.float32)
    p = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    nobody = np.zeros(6, bool)
    approx = pytest.approx
    assert threshold_for(labels, p, nobody) == approx(0.25)  # 1 + 2/3, as much as at 0.5
    assert threshold_for(labels, p, nobody, sensitivity=1.0) == approx(0.25)
    assert threshold_for(labels, p, nobody, sensitivity=0.6) == approx(0.45)
    some = np.array([1, 0, 0, 0, 0, 1], bool)
    assert threshold_for(labels, p, some) == approx(0.35)


def test_decisions():
    stack = a_stack(features="logit")
    # sum of logits - 1: the threshold 0.4 lies at logit(0.4)
    edge = 1 + logit(0.4)
    for value, label in ((edge + 1e-6, "positive"), (edge - 1e-6, "negative")):
        probability, threshold, said, _ = decide(stack, ["axial"], {"axial": [value]})
        assert said == label and threshold == 0.4 and type(probability) is float
        assert probability == pytest.approx(0.4, abs=1e-5)
    logits = {"axial": [0.0, 4.0], "coronal": [1.0, -1.0]}
    two = decide(stack, list(logits), logits)
    assert two.probability == pytest.approx(1 / (1 + math.exp(-1)))
    at = a_stack(features="logit")
    at["combinations"]["axial"] |= {"intercept": 0, "threshold": 0.5}
    assert decide(at, ["axial"], {"axial": [0.0]}).label == "positive"  # at the threshold
    del at["combinations"]["axial"]
    assert decide(at, ["axial"], {"axial": [0.0]}) is None


def test_counts_are_of_the_decisions_that_are_given():
    labels = np.array([1, 1, 0, 0, 1, 0], np.float32)
    p = np.array([0.3, 0.8, 0.3, 0.1, 0.2, 0.2])
    scores = {"axial": p, "stack": p}
    thresholds, own = {"axial": 0.3, "stack": 0.9}, np.array([0.3, 0.3, 0.3, 0.3, 0.2, 0.25])
    both = ({"train": labels, "valid": labels}, {"train": scores, "valid": scores})
    rows = evaluate_scores(*both, thresholds, own)
    counts = {name: [rows[name][key] for key in ("tp", "fn", "fp", "tn")] for name in scores}
    assert counts == {"axial": [2, 1, 1, 2], "stack": [3, 0, 1, 2]}
    row = rows["stack"]
    assert [row[f"sensitivity{end}"] for end in ("", "_low", "_high")] == [*wilson_interval(3, 3)]
    assert [row[f"accuracy{end}"] for end in ("", "_low", "_high")] == [*wilson_interval(5, 6)]
    assert [row[f"{key}_at_half"] for key in RATES] == [1 / 3, 1, 4 / 6]
    assert row["train_auc"] == roc_auc(labels, p)


def test_what_the_tuning_exams_could_not_choose_is_named():
    labels, logits = some_logits()
    full, tuning = whole(logits), np.arange(40) >= 25
    full["sagittal"]["sagittal"][tuning & (labels == 1)] = np.nan
    combinations = fit_combinations("logit", full, labels, tuning)
    without = ["axial", "coronal", "axial+coronal"]
    assert [name for name, one in combinations.items() if one["tuned"]] == without
    scores = {plane: found[plane][:, 0] for plane, found in full.items()} | {"stack": labels}
    untuned = names_untuned(combinations, scores, labels, tuning)
    assert untuned == ["sagittal", "axial+sagittal", "coronal+sagittal", "axial+coronal+sagittal"]
    line = threshold_source(tuning, untuned, "selected the epochs", 1, 1)
    assert f"but of {', '.join(untuned)}, whose tuning exams are of one class" in line
    chosen = "chosen on 15 training exams that no network was trained on"
    assert line.startswith(f"{chosen}; they selected the epochs; but of sagittal, ")
    assert threshold_source(tuning, [], "", 1, 1) == chosen


def test_only_exams_that_decided_something_make_figures_optimistic():
    scores = {"axial": np.array([0.2, 0.3])}
    found = [list_caveats(decided, 5, "chosen", scores, ["a", "b"])
             for decided in ("selected the epochs", "stopped the training", "")]  # fmt: skip
    assert found == [
        ["* thresholds: chosen",
         "OPTIMISTIC: the epochs were selected on the validation exams reported here"],
        ["* thresholds: chosen",
         "OPTIMISTIC: the validation exams reported here stopped the training"],
        ["* thresholds: chosen"],
    ]  # fmt: skip


def test_what_is_below_chance_is_said():
    rows = {"axial": {"auc_high": 0.49}, "sagittal": {"auc_high": 0.5}, "stack": {"auc_high": 0.3}}
    (line,) = below_chance(rows | {GAIN: {"plane": "axial"}})
    assert line.startswith("WARNING: axial, stack: below chance:")
    assert not list(below_chance({"axial": {"auc_high": 0.5}}))


def test_the_networks_know_their_data_folder(tmp_path):
    def save(task, data_dir, **more):
        metadata = metadata_of(task) | {"data_dir": str(data_dir)} | more
        save_model(tmp_path / f"{task}-{metadata['recipe']}.pt", MRNet(), metadata)

    assert trained_on(tmp_path, ["acl"], ["article"]) == Path("data")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    save("acl", tmp_path / "one")
    save("acl", tmp_path / "two", recipe="best")
    save("cyst", tmp_path / "gone")
    assert trained_on(tmp_path, ["acl"], ["article"]) == tmp_path / "one"
    assert trained_on(tmp_path, ["acl"], ["best"]) == tmp_path / "two"
    with pytest.raises(InputError, match="gone: .* is not there; give --data-dir"):
        trained_on(tmp_path, ["cyst"], ["article"])
    for asked in ((["acl"], ["article", "best"]), (["all"], ["article"])):
        with pytest.raises(InputError, match="acl-article.pt on .*one and .* give --data-dir"):
            trained_on(tmp_path, *asked)


def test_exams_of_one_group_are_said_to_narrow_the_intervals():
    scores = {"axial": np.full(6, 0.5)}
    groups = ["exam 1", "Anna", "Berta", "Anna", "Berta", "Berta"]
    assert list_caveats("", 5, "chosen", scores, groups)[1:] == [
        "5 of the 6 validation exams share a group (a patient, a scanner) with another "
        "(valid-groups.csv): intervals take exams as independent and are too narrow"
    ]
    assert len(list_caveats("", 5, "chosen", scores, sorted(set(groups)))) == 1


def test_labels_that_are_not_the_sets_own_are_said(tmp_path):
    def caveats(ids):
        exams = SimpleNamespace(root=tmp_path, tasks=("acl",), ids=ids)
        train = SimpleNamespace(root=tmp_path, tasks=("acl",), ids=ids[:3])
        scores = {"axial": np.full(len(ids), 0.5)}
        derived = derived_caveats({"valid": exams, "train": train})
        return list_caveats("", 5, "chosen", scores, ids, derived)[1:]

    assert caveats(["1", "2", "3"]) == []  # nothing says that the labels are not alike
    (tmp_path / "own-labels.csv").write_text("0001,acl\n2,acl\n3,effusion\n")
    assert caveats(["1", "2"]) == []
    assert caveats(["1", "2", "3", "4"]) == [
        "2 of the 4 validation labels are derived, not the set's own (own-labels.csv): an AUC on "
        "both kinds says nothing about either",
        "1 of the 3 training labels are derived, not the set's own (own-labels.csv): an AUC on "
        "both kinds says nothing about either",
    ]
    assert caveats(["3", "4"]) == [
        f"2 of the 2 {split} labels are derived, not the set's own (own-labels.csv): agreement "
        "with them is measured, not truth"
        for split in ("validation", "training")
    ]


def test_a_stack_is_read_as_it_was_written(tmp_path):
    path = stack_path(tmp_path, "acl", RECIPES)
    assert path == tmp_path / "acl-stack.json"
    joint = {"columns": ["axial+coronal", "axial-vgg16"], "coefficients": [1.0, 2.0],
             "intercept": 0.5, "threshold": 0.5}  # fmt: skip
    names = {"axial+coronal": ["acl-axial+coronal.pt"], "axial-vgg16": ["acl-axial-vgg16.pt"]}
    digests = {"acl-axial+coronal.pt": "1" * 64, "acl-axial-vgg16.pt": "2" * 64}
    other = a_stack(base_models=names, digests=digests, combinations={"axial+coronal": joint})
    for stack in (other, a_stack()):
        save_stack(path, stack)
        assert load_stack(tmp_path, "acl", RECIPES) == {"format": stacking.FORMAT} | stack
    assert path.read_text().endswith("}\n")


def faulty_stacks():
    for version in (1, 5, 99):
        yield {"format": f"mrnet-stack-{version}"}, "format: 'mrnet-stack-6' is expected, not"
    yield {"task": "meniscus"}, "task: it is of 'meniscus'"
    yield {"features": "other"}, "features: 'probability' or 'logit' is expected, not 'other'"
    yield {"combinations": {}}, "combinations: there are none"
    yield {"combinations": []}, r"combinations: an object is expected, not \[\]"
    yield {"combinations": {"knee": one_combination("axial")}}, "combinations.knee: not a set of p"
    yield {"other": 1}, "other is not known here"
    models, digests = a_stack()["base_models"], a_stack()["digests"]
    for name in ("../acl-axial.pt", "acl-axial.zip", 7, "a/acl-axial.pt", ".."):
        yield {"base_models": models | {"axial": [name]}}, "base_models.axial.0: a"
    yield {"base_models": {}}, "digests: not one of each"
    yield {"base_models": {plane: [] for plane in models}}, "base_models: a column has no n"
    yield {"base_models": models | {"knee": ["acl-knee.pt"]}}, "base_models: a column.s name"
    yield {"digests": []}, "digests: an object is expected"
    yield {"digests": digests | {"acl-axial.pt": "zz"}}, "digests.acl-axial.pt: a SHA-256"
    yield {"digests": {"acl-axial.pt": "0" * 64}}, "digests: not one of each of base_models"
    yield {"digests": digests | {"../x.pt": "0" * 64}}, "digests, a key: a file name"
    yield {"thresholds": None}, "thresholds: a text is expected, not None"
    for change, words in (
        ({"coefficients": [1.0, 2.0]}, ": not one coefficient of each of some columns"),
        ({"coefficients": ["1"]}, ".coefficients.0: a number is expected, not '1'"),
        ({"coefficients": None}, ".coefficients: a list is expected"),
        ({"intercept": 10**400}, ".intercept: a number is expected, not 1000"),
        ({"threshold": True}, ".threshold: a number is expected, not True"),
        ({"threshold": 1.5}, ".threshold: a number from 0 to 1 is expected, not 1.5"),
        ({"threshold": -0.1}, ".threshold: a number from 0 to 1"),
        ({"columns": ["axial-other"]}, ".columns: no networks of 'axial-other'"),
        ({"columns": ["coronal"]}, ".columns: no networks of 'coronal' that take one of its p"),
        ({"columns": []}, ": not one coefficient of each"),
        ({"columns": [], "coefficients": []}, ": not one coefficient of each"),
        ({"columns": ["axial"] * 2, "coefficients": [1.0] * 2}, ": not one coefficient of each"),
    ):
        combinations = a_stack()["combinations"]
        combinations["axial"] |= change
        yield {"combinations": combinations}, f"combinations.axial{words}"


def refuse_stack(tmp_path, text, words):
    path = stack_path(tmp_path, "acl", RECIPES)
    path.write_text(text)
    start = f"{path}: damaged, of another version, or not a stack"
    with pytest.raises(InputError, match=rf"{start}.*\({words}.*\); run train_logis"):
        load_stack(tmp_path, "acl", RECIPES)


@pytest.mark.parametrize("change, words", list(faulty_stacks()))
def test_a_damaged_stack_is_named(tmp_path, change, words):
    text = json.dumps({"format": stacking.FORMAT} | a_stack() | change)
    refuse_stack(tmp_path, text, words)


def test_a_stack_that_is_no_plain_json(tmp_path):
    text = json.dumps({"format": stacking.FORMAT} | a_stack())
    assert text.count('"threshold": 0.4') == 7
    for number in ("NaN", "Infinity", "-Infinity", "1e999"):
        changed = text.replace('"threshold": 0.4', f'"threshold": {number}', 1)
        refuse_stack(tmp_path, changed, f"{number} is not a finite number")
    twice = text.replace('"threshold": 0.4', '"threshold": 0.4, "threshold": 0.5', 1)
    refuse_stack(tmp_path, twice, "'threshold' is there twice")
    for other in ("[1]", "7", "null"):
        refuse_stack(tmp_path, other, "the whole: an object is expected")
    refuse_stack(tmp_path, "[" * 100_000, "nested too deeply")


def test_no_stack_says_what_makes_one(tmp_path):
    with pytest.raises(InputError, match="no such stack; run .*regression.py --task acl"):
        load_stack(tmp_path, "acl", RECIPES)


def write_models(folder, *names, dataset=None):
    for name in names:
        task, plane, *_ = name.split("-")
        metadata = metadata_of(task, plane, intensity="raw", dataset=dataset)
        save_model(folder / f"{name}.pt", MRNet(), metadata)


def test_tasks_with_models(tmp_path):
    with pytest.raises(InputError, match="no saved models.*another --models-dir"):
        saved_tasks(tmp_path, RECIPES)
    write_models(tmp_path, "cyst-axial", "acl-sagittal")
    save_stack(stack_path(tmp_path, "meniscus", RECIPES), a_stack())
    (tmp_path / "acl-axial-fold1of2.pt").touch()
    assert saved_tasks(tmp_path, RECIPES) == ["acl", "cyst", "meniscus"]
    with pytest.raises(InputError, match="no models of task 'x'; tasks here: acl, cyst, meniscus"):
        load_task(tmp_path, "x", RECIPES)


def test_everything_of_a_task(tmp_path):
    synthetic = {"name": "phantom", "version": "1", "synthetic": True, "orientation": None}
    write_models(tmp_path, "acl-axial", dataset=synthetic)
    write_models(tmp_path, "acl-coronal")
    models = load_task(tmp_path, "acl", RECIPES)
    assert models.task == "acl" and models.stack is None
    assert {plane: [n.intensity for n in found] for plane, found in models.networks.items()} == {
        "axial": ["raw"], "coronal": ["raw"],
    }  # fmt: skip
    assert all(not n.model.training for found in models.networks.values() for n in found)
    assert models.datasets == [synthetic, None] and models.is_synthetic
    assert len(models.digest) == 12
    write_models(tmp_path, "acl-axial")
    again = load_task(tmp_path, "acl", RECIPES)
    assert again.digest != models.digest
    assert again.datasets == [None] and not again.is_synthetic
    with pytest.raises(InputError, match="no models of task 'cyst'; tasks here: acl"):
        load_task(tmp_path, "cyst", RECIPES)
    write_models(tmp_path, "acl-axial", "acl-coronal", dataset=synthetic)
    assert load_task(tmp_path, "acl", RECIPES).datasets == [synthetic]  # once
    there = load_task(tmp_path, "acl", RECIPES, "meta").networks.values()
    assert all(p.is_meta for found in there for n in found for p in n.model.parameters())


@pytest.mark.parametrize("name", ["cyst-axial", "acl-sagittal"])
def test_a_model_of_another_task_or_plane_is_refused(tmp_path, name):
    write_models(tmp_path, name)
    (tmp_path / f"{name}.pt").rename(tmp_path / "acl-axial.pt")
    with pytest.raises(InputError, match="acl-axial.pt: a model of " + name.replace("-", ", ")):
        load_task(tmp_path, "acl", RECIPES)


def test_a_task_with_a_stack_has_the_stacks_networks(tmp_path):
    names = [f"acl-axial-fold{k}of2" for k in (1, 2)]
    write_models(tmp_path, *names, "acl-axial")
    files = [f"{name}.pt" for name in names]
    digests = {name: digest_of(tmp_path / name) for name in files}
    combinations = {"axial": one_combination("axial")}
    stack = a_stack(base_models={"axial": files}, digests=digests, combinations=combinations)
    save_stack(stack_path(tmp_path, "acl", RECIPES), stack)
    models = load_task(tmp_path, "acl", RECIPES)
    assert list(models.networks) == ["axial"] and len(models.networks["axial"]) == 2
    assert models.stack["digests"] == digests and models.datasets == [None]
    save_stack(stack_path(tmp_path, "acl", RECIPES), stack | {"thresholds": "other"})
    assert load_task(tmp_path, "acl", RECIPES).digest != models.digest
    write_models(tmp_path, names[1])
    with pytest.raises(InputError, match="fold2of2.pt: trained again after the stack was fitted"):
        load_task(tmp_path, "acl", RECIPES)


def test_exams_that_lack_a_plane_are_stacked_from_the_planes_they_have():
    labels, logits = some_logits()
    lacking = {"axial": [0, 3], "coronal": [3, 4, 5], "sagittal": [9]}
    full = whole(logits)
    for plane, rows in lacking.items():
        full[plane][plane][rows] = np.nan
    there = planes_of_exams(full)
    assert there[0] == "coronal+sagittal" and there[3] == "sagittal" and there[9] == "axial+coronal"
    none = np.zeros(len(labels), bool)
    stack = a_stack(combinations=fit_combinations("logit", full, labels, none), features="logit")
    stacked, thresholds = combine_all(stack, full)
    assert np.isfinite(stacked).all()
    for planes in ("axial+coronal+sagittal", "coronal+sagittal", "sagittal"):
        names = planes.split("+")
        x = np.stack([full[name][name].mean(axis=1) for name in names], axis=1)
        has = np.isfinite(x).all(axis=1)  # all that have these planes fit it
        fitted = LogisticRegression().fit(x[has], labels[has])
        rows = there == planes
        np.testing.assert_allclose(stacked[rows], fitted.predict_proba(x[rows])[:, 1], rtol=1e-12)
        assert set(thresholds[rows]) == {stack["combinations"][planes]["threshold"]}


def test_planes_that_too_few_exams_have_together_are_combined_from_fewer():
    """Nobody positive has all three planes: such exams get the largest set that was fitted."""
    labels, logits = some_logits()
    full = whole(logits)
    full["sagittal"]["sagittal"][labels == 1] = np.nan
    full["sagittal"]["sagittal"][:3] = logits["sagittal"][:3]
    full["axial"]["axial"][:3] = np.nan
    none = np.zeros(len(labels), bool)
    combinations = fit_combinations("logit", full, labels, none)
    assert "axial+coronal+sagittal" not in combinations and "axial+coronal" in combinations
    stack = a_stack(combinations=combinations, features="logit")
    assert combination_of(stack, PLANES) in ("axial+coronal", "coronal+sagittal")
    stacked, _ = combine_all(stack, full)
    assert np.isfinite(stacked).all()
    with pytest.raises(KeyError):
        combination_of(a_stack(combinations={"axial": {}}), ["coronal"])


def test_exams_that_cannot_be_stacked_are_refused_not_left_out():
    """Nobody positive has a coronal volume, and one exam has nothing else."""
    labels, logits = some_logits()
    logits = {plane: values.copy() for plane, values in logits.items()}
    logits["coronal"][labels == 1] = np.nan
    alone = np.flatnonzero(labels == 0)[4]
    none, both = np.zeros(len(labels), bool), {"train": labels, "valid": labels}
    for place, values in logits.items():
        if place != "coronal":
            values[alone] = np.nan
    logits = {"train": whole(logits), "valid": whole(some_logits()[1])}
    assert np.isnan(logits["train"]["axial"]["axial"][alone]).all()
    with pytest.raises(InputError, match="1 train exams have only coronal, .* of train-acl.csv"):
        make_stack("acl", "logit", logits, both, none)
