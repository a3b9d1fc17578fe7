"""tools/export.py: what its users' libraries read back."""

import csv
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import PLANES, assert_one_line_error, run_script
from safetensors.torch import load_file

from tools import export


def exams_of(work, row):
    paths = {plane: work / f"data/valid/{plane}/{int(row['id']):04d}.npy" for plane in PLANES}
    return {plane: np.load(path) for plane, path in paths.items()}


def test_onnxruntime_answers_as_the_stack_does(trained, tmp_path):
    work, _ = trained
    out = tmp_path / "acl.onnx"
    done = run_script("tools/export.py", work / "models/acl-stack.json", "--format", "onnx",
                      "--out", out)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "5 sizes" in done.stdout
    onnx.checker.check_model(onnx.load(out), full_check=True)
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == list(PLANES)
    assert {one.type for one in session.get_inputs()} == {"tensor(uint8)"}
    with open(work / "models/acl-predictions.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "valid"]
    found = [float(session.run(["probability"], exams_of(work, row))[0]) for row in rows]
    assert found == pytest.approx([float(row["stack"]) for row in rows], abs=1e-5)


def test_safetensors_hold_the_weights(trained, tmp_path):
    path = trained[0] / "models/acl-axial.pt"
    out = tmp_path / "acl.safetensors"
    done = run_script("tools/export.py", path, "--format", "safetensors", "--out", out)
    assert done.returncode == 0, done.stderr
    weights, saved = load_file(out), torch.load(path, weights_only=True)
    assert weights.keys() == saved["model"].keys()
    assert all(torch.equal(weights[name], saved["model"][name]) for name in weights)
    config = json.loads((tmp_path / "acl-config.json").read_text())
    assert (config["task"], config["plane"]) == ("acl", "axial")
    assert config["preprocessing"]["mean"] == 58.09 and config["dataset"]["synthetic"] is True


def test_a_difference_is_an_error(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "to_onnx", lambda model, out: None)
    monkeypatch.setattr(export, "largest_difference", lambda model, out: 2e-5)
    path = trained[0] / "models/acl-axial.pt"
    done = run_script("tools/export.py", path, "--format", "onnx", "--out", tmp_path / "a.onnx")
    assert_one_line_error(done, "a.onnx", "differs from torch", status=1)


def test_what_is_missing_is_named(trained, tmp_path, monkeypatch):
    def run(name, form):
        return run_script("tools/export.py", trained[0] / "models" / name, "--format", form)

    assert_one_line_error(run("acl-stack.json", "safetensors"), "--format onnx")
    assert_one_line_error(run("none.pt", "onnx"), "none.pt")
    assert_one_line_error(run("cyst-stack.json", "onnx"), "cyst")
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    assert_one_line_error(run("acl-axial.pt", "onnx"), "onnxscript", "requirements-export.txt")
