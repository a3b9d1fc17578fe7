"""hubconf.py, as torch.hub loads it from another folder."""

import csv
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import FILES, ROOT, imports_of, module_of

import hubconf
from mrnet.errors import InputError
from mrnet.inference.exam_model import ExamModel, load_exam_model
from mrnet.inference.task_models import as_network
from mrnet.training.checkpoint import load_model

LOAD = """
import sys, numpy, torch
repository, weights, *exams = sys.argv[1:]
model = torch.hub.load(repository, "mrnet", source="local", task="acl", plane="axial",
                       weights=weights)
with torch.inference_mode():
    for exam in exams:
        print(model(torch.from_numpy(numpy.load(exam))).item())
"""


@pytest.mark.whole
def test_hub_gives_the_probabilities_that_the_stack_was_fitted_on(trained, tmp_path):
    work, _ = trained
    with open(work / "models/acl-predictions.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "valid"][:4]
    exams = [work / f"data/valid/axial/{int(row['id']):04d}.npy" for row in rows]
    command = [sys.executable, "-c", LOAD, ROOT, work / "models/acl-axial.pt", *exams]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [float(line) for line in done.stdout.split()]
    assert found == pytest.approx([float(row["axial"]) for row in rows], abs=1e-6)


def test_the_dependencies_are_all_that_it_imports():
    files, todo, others = {module_of(path): path for path in FILES}, ["hubconf"], set()
    for module in todo:
        for name in imports_of(files[module]):
            if name not in files:
                others.add(name.split(".")[0])
            elif name not in todo:
                todo.append(name)
    optional = {"triton"}  # of the kernels, which do without
    assert sorted(others - sys.stdlib_module_names - optional) == sorted(hubconf.dependencies)


def test_another_projects_module_of_the_same_name_is_not_used(tmp_path):
    (tmp_path / "model.py").write_text("MRNet = None")
    code = (
        f"import model, torch; torch.hub.load({str(ROOT)!r}, 'mrnet', source='local', weights='')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    line = done.stderr.splitlines()[-1]
    assert f"a module called model is loaded already, from {tmp_path / 'model.py'}" in line


def test_other_models_are_refused(trained):
    path = trained[0] / "models/acl-axial.pt"
    for wrong in ({"task": "meniscus"}, {"plane": "sagittal"}, {"plane": "axial+coronal"}):
        with pytest.raises(InputError, match="a model of acl, axial"):
            load_exam_model(path, **wrong)


def test_what_goes_in(trained):
    model = load_exam_model(trained[0] / "models/acl-axial.pt", "acl", "axial")
    assert model.preparation["orientation"] == {"axial": "IPL"}
    assert model.preparation["mirrored"] is False
    for name in model.preparation:  # each is explained
        assert f'"{name}"' in hubconf.mrnet.__doc__
    grey = torch.zeros(3, 64, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match="takes axial, not 2"):
        model(grey, grey)
    with pytest.raises(ValueError, match="axial: expected uint8"):
        model(grey.float())


@pytest.mark.parametrize("channels", ["grey", "neighbours"])
@pytest.mark.parametrize("intensity", ["standardized", "raw"])
def test_preprocessing_is_the_scripts(trained, channels, intensity):
    network, metadata = load_model(trained[0] / "models/acl-axial.pt")
    metadata |= {"channels": channels, "intensity": intensity}
    volume = np.random.default_rng(0).integers(0, 256, (5, 70, 80), dtype=np.uint8)
    cpu = torch.device("cpu")
    network = as_network(network, metadata, cpu)
    logit = network.logit({"axial": volume}, cpu, "fp32", {})
    with torch.inference_mode():
        probability = ExamModel("acl", network)(torch.from_numpy(volume)).item()
    assert probability == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-6)
