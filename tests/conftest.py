"""Small exams in MRNet's layout, made in a temporary folder."""

import ast
import contextlib
import csv
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from filelock import FileLock

from mrnet.runtime import cli
from mrnet.training.checkpoint import ARCHITECTURE
from mrnet.training.config import Config
from train import evaluate_model

ROOT = Path(__file__).parent.parent
PLANES = ("axial", "coronal", "sagittal")
needs_make = pytest.mark.skipif(not shutil.which("make"), reason="needs make")
FILES = sorted(  # of the project's code
    path for folder in (".", "mrnet", "tools", "data") for path in ROOT.glob(f"{folder}/*.py")
) + sorted([*ROOT.glob("mrnet/*/*.py"), *ROOT.glob("data/*/*.py")])
# Importers keep a key of the user's there; no test may touch the real one.
os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="mrnet-tests-")


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports_of(path):
    """Names of the modules that a file imports, those within functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            within = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {module_of(p) for p in FILES}
            found |= (within & modules) or {node.module}
    return found


def write_exams(root, task="acl", train=12, valid=8, size=64, seed=0):
    """Noise with a bright square in one slice of each positive exam; every third is positive."""
    rng = np.random.default_rng(seed)
    first = 0
    for split, n in (("train", train), ("valid", valid)):
        rows = []
        for exam_id in range(first, first + n):
            label = int(exam_id % 3 == 0)
            for plane in PLANES:
                volume = rng.integers(0, 120, (rng.integers(2, 5), size, size), dtype=np.uint8)
                if label:
                    volume[0, 10:50, 10:50] = 250
                folder = root / split / plane
                folder.mkdir(parents=True, exist_ok=True)
                np.save(folder / f"{exam_id:04d}.npy", volume)
            rows.append(f"{exam_id},{label}\n")
        (root / f"{split}-{task}.csv").write_text("".join(rows))
        first += n
    return root


def write_findings(root):
    """Labels of three findings: hard, soft, and partly unknown."""
    write_exams(root)
    for split, ids in (("train", range(12)), ("valid", range(12, 20))):
        soft = "".join(f"{i},{(0.1, 0.7, 1)[i % 3]}\n" for i in ids)
        some = "".join(f"{i},{'' if i % 4 == 1 else int(i % 2)}\n" for i in ids)
        (root / f"{split}-soft.csv").write_text(soft)
        (root / f"{split}-some.csv").write_text(some)
    return root


def let_planes_lack(root):
    """Say in dataset.json that exams may lack planes."""
    content = {"name": "some", "version": "1", "synthetic": True, "orientation": None}
    (root / "dataset.json").write_text(json.dumps(content | {"may_lack_planes": True}))


@pytest.fixture
def exams(tmp_path):
    """A fresh data folder for each test, so a test may damage it."""
    return write_exams(tmp_path / "data")


@pytest.fixture(scope="session")
def shared_exams(tmp_path_factory):
    """One data folder for all tests that only read."""
    return write_exams(tmp_path_factory.mktemp("shared") / "data")


def metadata_of(task="acl", plane="axial", **more):
    """The metadata of a saved model of one seed that no exam selected, as far as it must be."""
    arguments = asdict(Config(task, plane))
    names = ("task", "plane", "recipe", "intensity", "channels", "plane_dropout", "protocol")
    return {
        **{name: arguments[name] for name in names},
        "architecture": {name: arguments[name] for name in ARCHITECTURE},
        "arguments": arguments,
        "seed": 0,
        "fold": 0,
        "epoch": 3,
        "out_of_fold": [],
        "tuning": [],
        "prevalence": 0.4,
        "data": {"train": "0", "valid": "1"},
        "slices": {one: [2, 40] for one in plane.split("+")},
        "dataset": None,
        "metrics": {},
        **more,
    }


@contextlib.contextmanager
def small_file_system(folder, size):
    """A file system of `size`, such as "45m", mounted at a new folder."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def run_process(script, *args, timeout=300):
    """Run a script of the project as a process of its own, text output."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def predict_exams(model, exams, device, precision):
    """Logits of exams, float32 (n, tasks), as train.py predicts them."""
    config = Config(exams.tasks[0], "axial", device=device.type, precision=precision)
    return evaluate_model(model, exams, config)[1]


QUICK = ("--no-pretrained", "--epochs", "2", "--lr", "1e-4", "--log-every", "5")


@pytest.fixture(scope="session")
def trained(tmp_path_factory, worker_id):
    """A tiny phantom, three trained planes and their stack: folder and each command's output.

    For tests that only read: all of pytest's processes share it.
    """
    base = tmp_path_factory.getbasetemp()
    work = (base if worker_id == "master" else base.parent) / "trained"
    with FileLock(f"{work}.lock"):
        if not (work / "said.json").exists():
            said = {name: Finished(*done)._asdict() for name, done in train_three_planes(work)}
            (work / "said.json").write_text(json.dumps(said))
    said = json.loads((work / "said.json").read_text())
    return work, {name: Finished(**done) for name, done in said.items()}


def train_three_planes(work):
    """Yields each command's name and (exit status, stdout, stderr)."""
    phantom = ("--exams", 20, "--valid", 10, "--size", 64, "--out", work / "data")
    done = run_process("data/phantom/prepare.py", *phantom)
    yield "phantom", (done.returncode, done.stdout, done.stderr)
    files = ("--data-dir", work / "data", "--models-dir", work / "models", "--logs-dir",
             work / "logs", "--precision", "fp32")  # fmt: skip
    for plane in PLANES:
        yield plane, run_script("train.py", "--task", "acl", "--plane", plane, *files, *QUICK)
    yield "stack", run_script("train_logistic_regression.py", *files)


class Finished(NamedTuple):
    """What a script left behind, as subprocess.CompletedProcess has it."""

    returncode: int
    stdout: str
    stderr: str


def content_of(path):
    """All that a saved model holds, weights to the last bit, but the seconds that epochs took."""
    content = torch.load(path, weights_only=True)
    for epoch in content["metadata"]["history"]:
        del epoch["seconds"]
    weights = {name: w.numpy().tobytes() for name, w in content["model"].items()}
    return weights, content["metadata"]


def contents(folder):
    return {path.name: content_of(path) for path in folder.glob("*.pt")}


def assert_same_training(one, two):
    """Two saved models of the same epochs, to the last bit.

    Args:
        one, two: as checkpoint.read_checkpoint returns them.
    """
    for name in ("metrics", "epoch"):
        assert one["metadata"][name] == two["metadata"][name]
    histories = one["metadata"]["history"], two["metadata"]["history"]
    for ours, theirs in zip(*histories, strict=True):
        assert ours | {"seconds": 0} == theirs | {"seconds": 0}
    assert all(torch.equal(one["model"][name], two["model"][name]) for name in one["model"])


def rows_of(path):
    """The rows of a CSV, dicts."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def page_content(path):
    """What a page of explain.py holds."""
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text("utf-8"), re.S)[1])


def finding_of(path):
    """What a page says of its only finding."""
    (finding,) = page_content(path)["findings"]
    return finding


def run_script(script, *args):
    """Run a script of the project as `python script args` does, inside this process: importing
    torch takes seconds, and most tests check one line of an error only."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [str(ROOT / script), *map(str, args)]
    status = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
            if script.startswith("data/"):
                status = module.main()
            else:
                cli.exit_with_status(lambda: module.run(module.parse_arguments()))
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.argv = argv
    return Finished(status, out.getvalue(), err.getvalue())


def files(work):
    """Arguments of train.py and the stack: everything within one folder."""
    return ("--data-dir", work / "data", "--models-dir", work / "models", "--logs-dir",
            work / "logs", "--precision", "fp32")  # fmt: skip


def train_quickly(work, *options, status=0):
    """train.py for one epoch, which must end with `status`."""
    done = run_script("train.py", *files(work), "--no-pretrained", "--epochs", "1", *options)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def assert_one_line_error(done, *words, status=2):
    """Exit status, one line on stderr without a traceback, and every word in it."""
    assert done.returncode == status, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    for word in words:
        assert str(word) in lines[0]


@pytest.fixture(scope="session")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs chromium and chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1400,1100"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield driver
    driver.quit()
