"""tools/export.py: what its users' libraries read back."""

import ast
import csv
import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import PLANES, assert_one_line_error, metadata_of, run_script
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from mrnet.documents import parse_json
from mrnet.errors import InputError
from mrnet.inference.exam_model import ExamModel, preparation_of
from mrnet.inference.task_models import Network
from mrnet.layout.description import MRNET
from mrnet.networks.backbones import BACKBONES
from mrnet.reports.model_card import Subject, subject_of_stack, write_card
from mrnet.training.checkpoint import build_model
from tools import export


def exams_of(work, row):
    paths = {plane: work / f"data/valid/{plane}/{int(row['id']):04d}.npy" for plane in PLANES}
    return {plane: np.load(path) for plane, path in paths.items()}


@pytest.mark.whole
def test_onnxruntime_answers_as_the_stack_does(trained, tmp_path):
    work, _ = trained
    done = export_to(tmp_path / "acl", work / "models/acl-stack.json", "onnx")
    assert done.returncode == 0, done.stderr
    assert "5 sizes" in done.stdout
    out = tmp_path / "acl" / "acl-stack.onnx"
    onnx.checker.check_model(onnx.load(out), full_check=True)
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == list(PLANES)
    assert {one.type for one in session.get_inputs()} == {"tensor(uint8)"}
    with open(work / "models/acl-predictions.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "valid"]
    found = [float(session.run(["probability"], exams_of(work, row))[0]) for row in rows]
    assert found == pytest.approx([float(row["stack"]) for row in rows], abs=1e-5)
    card = ModelCard.load(tmp_path / "acl" / "README.md")
    written = json.loads((work / "models/acl-results.json").read_text())["valid"]["stack"]
    assert figures_of(card) == {
        name: written[key]
        for name, key in (("AUC", "auc"), ("sensitivity", "sensitivity"),
                          ("specificity", "specificity"), ("Brier score", "brier"))
    }  # fmt: skip
    assert card.data.license == "other" and card.data.library_name == "onnx"
    decides = f"At the threshold {written['threshold']:.8f} it misses {written['fn']} of "
    assert f"{decides}{written['positives']} positive" in card.text
    inside = session.get_modelmeta().custom_metadata_map
    assert (inside["task"], float(inside["threshold"])) == ("acl", written["threshold"])
    assert json.loads(inside["mirrored"]) is False and json.loads(inside["window"]) == [0.5, 99.5]
    for name in (
        "How to prepare a volume",
        "Intended use",
        "Data",
        "Training",
        "Figures",
        "Where it fails",
    ):
        assert f"## {name}" in card.text
    for key in ("auc", "sensitivity", "specificity"):
        words = [f"{written[key + end]:.3f}" for end in ("", "_low", "_high")]
        assert "{} [{}, {}]".format(*words) in card.text


@pytest.mark.slow
@pytest.mark.parametrize("pooling, channels, planes", [
    ("attention", "neighbours", ("axial",)),
    ("mean", "grey", PLANES),
])  # fmt: skip
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_pooling_and_number_of_planes(tmp_path, backbone, pooling, channels, planes):
    torch.manual_seed(0)
    architecture = {"backbone": backbone, "pooling": pooling, "dropout": 0, "share_backbone": False}
    model = build_model(architecture, list(planes)).eval()
    network = Network(model, planes, "standardized", channels, False, "", {})
    # Raises unless onnxruntime answers as torch does, at five sizes.
    export.to_onnx(ExamModel("acl", network).eval(), {}, tmp_path / "model.onnx")


def figures_of(card):
    (result,) = card.data.to_dict()["model-index"]
    (result,) = result["results"]
    return {one["name"]: one["value"] for one in result["metrics"]}


def export_to(out, model, form, *more):
    return run_script("tools/export.py", model, "--format", form, "--out", out, *more)


def test_safetensors_hold_the_weights(trained, tmp_path):
    path, out = trained[0] / "models/acl-axial.pt", tmp_path / "acl"
    done = export_to(out, path, "safetensors")
    assert done.returncode == 0, done.stderr
    weights, saved = load_file(out / "model.safetensors"), torch.load(path, weights_only=True)
    assert weights.keys() == saved["model"].keys()
    assert all(torch.equal(weights[name], saved["model"][name]) for name in weights)
    config = json.loads((out / "config.json").read_text())
    assert (config["task"], config["plane"]) == ("acl", "axial")
    phantom = {"orientation": {"axial": "IPL"}, "contrast": {"axial": "fluid-sensitive"}}
    assert config["preparation"].items() >= phantom.items()
    assert config["preprocessing"]["mean"] == 58.09 and config["dataset"]["synthetic"] is True
    card = ModelCard.load(out / "README.md")
    rows = json.loads((trained[0] / "models/acl-results.json").read_text())["valid"]
    assert figures_of(card)["AUC"] == rows["axial"]["auc"]
    assert config["threshold"] == rows["axial"]["threshold"]
    assert f"At the threshold {config['threshold']:.8f} it misses" in card.text
    assert "synthetic-training" in card.data.tags and "says nothing" not in card.data.tags
    assert "Trained on synthetic exams" in card.text and "acl-axial" in card.text
    assert_one_line_error(export_to(out, path, "safetensors"), "exists", "--overwrite")
    assert export_to(out, path, "safetensors", "--overwrite").returncode == 0


HOSTILE = '<script>alert(1)</script> "]: {x}\n---\n| #'


def test_a_card_of_a_lone_network_with_a_hostile_name(trained, tmp_path):
    saved = torch.load(trained[0] / "models/acl-axial.pt", weights_only=True)
    saved["metadata"]["dataset"] |= {"name": HOSTILE, "licence": HOSTILE}
    saved["metadata"]["metrics"]["train"]["auc"] = math.nan  # of exams of one class
    torch.save(saved, tmp_path / "acl-axial.pt")
    done = export_to(tmp_path / "out", tmp_path / "acl-axial.pt", "safetensors")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.license_name == HOSTILE and "model-index" not in card.data.to_dict()
    config = parse_json((tmp_path / "out" / "config.json").read_text())  # which refuses NaN
    assert config["threshold"] is None and config["metrics"]["train"]["auc"] is None
    assert "<script>" not in card.text and "Not measured: no stack with this network" in card.text


def test_a_card_of_a_stack_whose_results_are_lost(trained, tmp_path):
    shutil.copytree(trained[0] / "models", tmp_path / "models")
    (tmp_path / "models" / "acl-results.json").unlink()
    subject = subject_of_stack(tmp_path / "models" / "acl-stack.json", "acl", ["article"])
    stack = json.loads((tmp_path / "models" / "acl-stack.json").read_text())
    assert subject.threshold == stack["combinations"]["axial+coronal+sagittal"]["threshold"]
    write_card(subject, "onnx", "acl-stack.onnx", tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text()
    assert "Not measured: " in text and "acl-results.json" in text.replace("\\", "")
    assert "3 networks" in text and "TO DO" in text


# As data/rsna/prepare.py describes its exams, and what a user of the networks must do.
MIRRORED = {"name": "rsna", "version": "3", "synthetic": False, "mirrored": True,
            "orientation": {"axial": "IPL", "coronal": "PIL", "sagittal": "LIP"},
            "field_of_view": 140.0, "t1_planes": ["coronal"]}  # fmt: skip
PREPARATION = {"orientation": {"coronal": "PIL"}, "contrast": {"coronal": "T1"}, "mirrored": True,
               "field_of_view": 140.0, "square": "pad", "side": 256,
               "window": [0.5, 99.5]}  # fmt: skip


def test_an_onnx_file_holds_what_decides_and_how_to_prepare(tmp_path, monkeypatch):
    program = Program()
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **more: program)
    monkeypatch.setattr(export, "largest_difference", lambda model, out: 0.0)
    model = SimpleNamespace(task="acl", planes=["coronal"])
    networks = [("coronal", {"plane": "coronal", "dataset": MIRRORED})]
    subject = Subject("acl-coronal", "acl", networks, "coronal", None, "", 0.1234567890123)
    export.to_onnx(model, export.properties_of(subject), tmp_path / "a.onnx")
    found = program.model.metadata_props
    assert found.pop("task") == "acl" and found.pop("threshold") == "0.1234567890123"
    assert {name: json.loads(text) for name, text in found.items()} == PREPARATION
    networks = [("coronal", {"plane": "coronal", "dataset": None})]
    bare = subject._replace(networks=networks, threshold=None)
    assert export.properties_of(bare) == {"task": "acl"}


def test_what_a_scan_must_be_before_networks_take_it():
    """Each plane's own; of a stack all networks', which must agree."""
    of = [{"plane": plane, "dataset": MIRRORED} for plane in ("sagittal-t1", "axial+coronal")]
    found = preparation_of(of)
    assert found["orientation"] == {"axial": "IPL", "coronal": "PIL", "sagittal-t1": "LIP"}
    assert found["contrast"] == {"axial": "fluid-sensitive", "coronal": "T1",
                                 "sagittal-t1": "not fluid-sensitive"}  # fmt: skip
    other = {"plane": "sagittal", "dataset": MIRRORED | {"mirrored": False}}
    with pytest.raises(InputError, match="different mirrored, True and False"):
        preparation_of([*of, other])
    mrnet = preparation_of([{"plane": "coronal", "dataset": MRNET}])
    assert mrnet["contrast"] == {"coronal": "T1"} and mrnet["mirrored"] is False
    assert mrnet["field_of_view"] is None
    chest = {"plane": "axial", "dataset": MIRRORED | {"orientation": None}}
    assert preparation_of([chest]) == {}


def test_the_card_tells_to_mirror_right_knees(tmp_path):
    def card(**more):
        path = tmp_path / "README.md"
        metadata = metadata_of(plane="coronal", dataset=MIRRORED | more)
        subject = Subject("acl-coronal", "acl", [("coronal", metadata)], "coronal", None, "none")
        write_card(subject, "onnx", "a.onnx", path)
        text = path.read_text()
        return text[text.index("## How to prepare") : text.index("## Intended use")]

    text = card()
    for words in ("Right knees are mirrored", "140.0 x 140.0 mm", "coronal T1", "coronal PIL",
                  "percentile 0.5", "percentile 99.5"):  # fmt: skip
        assert words in text
    text = card(mirrored=False, field_of_view=None, square="crop")
    assert "none mirrored" in text and "shorter side" in text and " mm " not in text
    assert "Not recorded" in card(orientation=None)


def test_the_cards_command_for_onnx_is_python(tmp_path):
    """Planes with a sequence in their name, too."""
    networks = [(plane, metadata_of(plane=plane)) for plane in ("axial", "coronal-t1")]
    subject = Subject("acl-stack", "acl", networks, "stack", None, "none")
    write_card(subject, "onnx", "a.onnx", tmp_path / "README.md")
    (line,) = re.findall("^ +(session.run.*)$", (tmp_path / "README.md").read_text(), re.M)
    _, given = ast.parse(line).body[0].value.args
    assert [key.value for key in given.keys] == ["axial", "coronal-t1"]
    assert [value.id for value in given.values] == ["axial", "coronal_t1"]


@pytest.mark.parametrize("difference", [2e-5, float("nan")])
def test_a_difference_is_an_error_and_leaves_no_file(trained, tmp_path, monkeypatch, difference):
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **more: Program())
    monkeypatch.setattr(export, "largest_difference", lambda model, out: difference)
    path = trained[0] / "models/acl-axial.pt"
    done = export_to(tmp_path / "a", path, "onnx")
    assert_one_line_error(done, "acl-axial.onnx", "differ from torch", status=1)
    assert not (tmp_path / "a").exists()


class Program:
    """Stands in for an exported program."""

    def __init__(self):
        self.model = SimpleNamespace(metadata_props={})

    def save(self, path):
        path.write_bytes(b"onnx")


def test_a_stack_without_a_regression_of_all_planes_is_refused_in_one_line(trained, tmp_path):
    models = shutil.copytree(trained[0] / "models", tmp_path / "models")
    stack = json.loads((models / "acl-stack.json").read_text())
    del stack["combinations"]["axial+coronal+sagittal"]
    (models / "acl-stack.json").write_text(json.dumps(stack))
    done = export_to(tmp_path / "out", models / "acl-stack.json", "onnx")
    assert_one_line_error(done, "acl-stack.json", "axial+coronal+sagittal", "acl-axial.pt")
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_named(trained, tmp_path, monkeypatch):
    def run(name, form):
        return run_script("tools/export.py", trained[0] / "models" / name, "--format", form)

    assert_one_line_error(run("acl-stack.json", "safetensors"), "--format onnx")
    assert_one_line_error(run("none.pt", "onnx"), "none.pt")
    assert_one_line_error(run("cyst-stack.json", "onnx"), "cyst")
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    assert_one_line_error(run("acl-axial.pt", "onnx"), "onnxscript", "requirements-export.txt")
