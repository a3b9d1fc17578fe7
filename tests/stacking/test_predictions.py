"""Predictions of saved networks: those that differ in their classifiers alone share the rest."""

import copy
import csv
import json

import numpy as np
import pytest
import torch
from conftest import (
    PLANES,
    assert_one_line_error,
    files,
    metadata_of,
    predict_exams,
    run_script,
    train_quickly,
    write_exams,
    write_findings,
)

from dataloader import MRDataset
from model import MRNet, MultiPlaneMRNet
from mrnet.inference.task_models import as_network
from mrnet.networks.saved import body_digest
from mrnet.stacking import predictions
from mrnet.stacking.predictions import Predictor
from mrnet.training.checkpoint import load_model, load_with_digest, save_model
from mrnet.training.datasets import MultiPlaneDataset

CPU = torch.device("cpu")


def findings_of(network, folder):
    """A network of several findings as it is saved and read: one model each."""
    metadata = metadata_of(intensity="raw")
    metadata["architecture"]["pooling"] = network.pooling
    for finding in range(network.classifier.out_features):
        save_model(folder / f"{finding}.pt", network, metadata, finding)
        yield load_model(folder / f"{finding}.pt")[0]


@pytest.fixture
def passes(monkeypatch):
    """The number of slices of each exam that went through a backbone."""
    seen, real = [], MRNet.feature_maps

    def count(network, x):
        seen.append(len(x))
        return real(network, x)

    monkeypatch.setattr(MRNet, "feature_maps", count)
    return seen


def exams_of(root, task="acl", planes="axial", train=False):
    kind = MultiPlaneDataset if isinstance(planes, list) else MRDataset
    exams = kind(root, task, planes, train)
    exams.taken = planes if isinstance(planes, list) else [planes]
    return exams


@pytest.mark.parametrize("pooling", ["max", "mean", "attention"])
def test_an_exam_goes_through_a_shared_body_once(tmp_path, passes, pooling):
    torch.manual_seed(0)
    first, second, third = findings_of(MRNet(pooling=pooling, tasks=3), tmp_path)
    exams = exams_of(write_exams(tmp_path / "data"))
    wanted = [predict_exams(model, exams, CPU, "bf16") for model in (first, second, third)]
    passes.clear()
    predict_once = Predictor(CPU, "bf16")
    for model, logits in zip((first, second, third), wanted, strict=True):
        assert np.array_equal(predict_once(model, exams, "predict"), logits)
    assert len(passes) == len(exams)
    assert len({logits.tobytes() for logits in wanted}) == 3


def test_what_an_exams_features_depend_on_is_told_apart(tmp_path, passes):
    write_findings(tmp_path / "data")
    (model, other) = findings_of(MRNet(tasks=2), tmp_path)
    predict_once, exams = Predictor(CPU, "fp32"), exams_of(tmp_path / "data")
    predict_once(model, exams, "predict")
    passes.clear()

    def found(model, exams):
        passes.clear()
        assert np.array_equal(
            predict_once(model, exams, "predict"), predict_exams(model, exams, CPU, "fp32")
        )
        return len(passes) - len(exams)  # those of the second are not shared

    assert found(other, exams) == 0
    for name, value in (("intensity", "slice"), ("channels", "neighbours")):
        before = getattr(exams, name)
        setattr(exams, name, value)
        assert found(other, exams) == len(exams), name
        setattr(exams, name, before)
    train = exams_of(tmp_path / "data", train=True)
    train.ids[:8] = exams.ids  # the same names in the other split
    assert found(other, train) == len(train)
    some = exams_of(tmp_path / "data", "some")  # another finding, fewer exams
    assert len(some) == 6 and found(model, some) == 0
    with torch.no_grad():
        other.pretrained_model[3].bias[7] += 1e-3  # another epoch
    assert found(other, exams) == len(exams)


def test_networks_of_several_planes_share_too(tmp_path, passes):
    torch.manual_seed(0)
    networks = {plane: MRNet(tasks=2) for plane in PLANES}
    both = MultiPlaneMRNet(networks).eval()
    exams = exams_of(write_exams(tmp_path / "data"), planes=list(PLANES))
    predict, logits = Predictor(CPU, "fp32"), []
    for finding in range(2):
        one = MultiPlaneMRNet({plane: MRNet() for plane in PLANES}).eval()
        state = both.state_dict()
        for name in state:
            if "classifier" in name:
                state[name] = state[name][finding : finding + 1]
        one.load_state_dict(state)
        with torch.inference_mode():
            expected = [both(exams.exam(i, CPU))[0, finding].item() for i in range(len(exams))]
        passes.clear()
        logits.append(predict(one, exams, "predict")[:, 0])
        assert len(passes) == (0 if finding else 3 * len(exams))
        assert logits[-1] == pytest.approx(expected, rel=1e-5)
    exams.taken = ["axial", "coronal"]  # with plane dropout
    predict(one, exams, "predict")
    assert len(passes) == 2 * len(exams)


def test_a_body_is_all_but_the_classifiers():
    torch.manual_seed(0)
    plain, other = MRNet(), MRNet(pooling="attention")
    other.load_state_dict(plain.state_dict(), strict=False)
    digest = body_digest(plain)
    mean = MRNet(pooling="mean")
    mean.load_state_dict(plain.state_dict())
    assert len({digest, body_digest(mean), body_digest(other), body_digest(MRNet())}) == 4
    torch.nn.init.zeros_(plain.classifier.weight)
    assert body_digest(plain) == digest
    for name, value in other.state_dict().items():
        before = body_digest(other)
        value[(0,) * value.dim()] += 1
        assert (body_digest(other) == before) == name.startswith("classifier."), name


def test_a_networks_features_of_one_exam_are_told_apart():
    torch.manual_seed(0)
    model = MultiPlaneMRNet({"axial": MRNet(), "coronal": MRNet()}).eval()
    rng = np.random.default_rng(0)
    both = {p: rng.integers(0, 255, (3, 64, 64), np.uint8) for p in ("axial", "coronal")}
    metadata = metadata_of(plane="axial+coronal", intensity="raw")
    network = as_network(model, metadata, CPU)
    other = as_network(copy.deepcopy(model), metadata, CPU)
    torch.nn.init.ones_(other.model.classifier.weight)
    another = as_network(
        MultiPlaneMRNet({"axial": MRNet(), "coronal": MRNet()}).eval(), metadata, CPU
    )
    others = [
        (network, both),
        (another, both),
        (other, both),
        (network, {"axial": both["axial"]}),
        (network._replace(intensity="standardized"), both),
        (network._replace(channels="neighbours"), both),
    ]
    known, logits, seen = {}, [], {}
    for one, volumes in others:
        logits.append(one.logit(volumes, CPU, "fp32", known))
        assert logits[-1] == one.logit(volumes, CPU, "fp32", {})
        maps, logit = one.heat_maps(volumes, CPU, "fp32", seen)
        alone, _ = one.heat_maps(volumes, CPU, "fp32", {})
        assert logit == pytest.approx(logits[-1], rel=1e-6) and maps.keys() == alone.keys()
        assert all(np.array_equal(maps[plane], alone[plane]) for plane in maps)
    assert len(set(logits)) == 6 and len(known) == 5  # `other` shares what `network` found
    assert seen.keys() == known.keys()


@pytest.mark.whole
def test_nothing_is_written_before_all_findings_can_be(tmp_path):
    write_findings(tmp_path / "data")
    for plane in PLANES:
        train_quickly(tmp_path, "--task", "acl", "some", "--plane", plane)
    words = ("train_logistic_regression.py", *files(tmp_path), "--task", "acl")
    before = {path.name for path in (tmp_path / "models").iterdir()}
    (tmp_path / "data" / "valid-some.csv").write_text("12,two\n")
    assert_one_line_error(run_script(*words, "some"), "valid-some.csv")
    assert_one_line_error(run_script(*words, "soft"), "soft-axial.pt", "is not trained")
    assert_one_line_error(run_script(*words, "typo"), "typo", "tasks here: acl, soft, some")
    assert {path.name for path in (tmp_path / "models").iterdir()} == before


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_network_that_is_trained_again_while_it_is_stacked(tmp_path, monkeypatch, is_finished):
    """The stack is of the network that was asked; of none while another training goes on."""
    write_exams(tmp_path / "data")
    train_quickly(tmp_path, "--task", "acl", "--plane", "axial")
    path, real = tmp_path / "models" / "acl-axial.pt", predictions.exam_features
    model, metadata, asked = load_with_digest(path)

    def meanwhile(*args):
        save_model(path, model, metadata | {"seed": 7})
        if not is_finished:
            path.with_suffix(".state").touch()
        return real(*args)

    monkeypatch.setattr(predictions, "exam_features", meanwhile)
    words = ("train_logistic_regression.py", *files(tmp_path), "--planes", "axial")
    done = run_script(*words)
    stack = tmp_path / "models" / "acl-stack.json"
    if not is_finished:
        assert_one_line_error(done, path, "not trained to its end")
        assert not stack.exists()
        return
    assert json.loads(stack.read_text())["digests"] == {path.name: asked}, done.stderr
    done = run_script("predict.py", tmp_path / "data", "--models-dir", tmp_path / "models")
    assert_one_line_error(done, path, "trained again after the stack was fitted")


@pytest.mark.whole
def test_findings_together_have_the_stacks_and_rows_of_each_alone(tmp_path):
    write_findings(tmp_path / "data")
    (tmp_path / "last.toml").write_text('select = "last"\nlr = 1e-4\n')
    for plane in PLANES:
        train_quickly(
            tmp_path, "--task", "all", "--plane", plane, "--recipe", tmp_path / "last.toml"
        )
    words = ("train_logistic_regression.py", *files(tmp_path), "--recipes", "last", "--task")
    wanted = {}
    for task in ("acl", "soft", "some"):
        done = run_script(*words, task)
        assert done.returncode == 0, done.stderr
        wanted |= written(tmp_path / "models", task)
    for task in ("acl", "soft", "some"):
        for path in (tmp_path / "models").glob(f"{task}-*last*.[jc]s*"):
            path.unlink()
    done = run_script(*words, "all")
    assert done.returncode == 0, done.stderr
    found = [written(tmp_path / "models", task) for task in ("acl", "soft", "some")]
    assert found[0] | found[1] | found[2] == wanted and len(wanted) == 9

    words = ("predict.py", tmp_path / "data/valid", "--models-dir", tmp_path / "models",
             "--precision", "fp32", "--recipes", "last")  # fmt: skip
    together = run_script(*words)
    each = [run_script(*words, "--task", task) for task in ("acl", "soft", "some")]
    assert {done.returncode for done in (together, *each)} == {0}
    rows = [row for done in each for row in rows_of(done)]
    assert sorted(map(str, rows_of(together))) == sorted(map(str, rows))
    slices = {done.stderr.split(" slices in")[0].split()[-1] for done in (together, *each)}
    assert len(slices) == 1  # of one network, whatever the number of findings


def written(folder, task):
    """What a finding's stack is, without what tells runs apart: {file: content}."""
    found = {}
    for path in folder.glob(f"{task}-*last*.json"):
        content = json.loads(path.read_text())
        assert content.pop("arguments")["task"] == task
        found[path.name] = content
    (path,) = folder.glob(f"{task}-last-predictions.csv")
    return found | {path.name: path.read_text()}


def rows_of(done):
    return list(csv.DictReader(done.stdout.splitlines()))
