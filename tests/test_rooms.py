"""The rooms of the code: each file imports from its own and from those before it."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from conftest import FILES, ROOT, imports_of, module_of, needs_make

SCRIPTS = {"train", "train_logistic_regression", "predict", "explain", "reproduce", "hubconf"}
ROOMS = [  # from the ground
    {"mrnet.errors", "mrnet.files", "mrnet.documents"},
    {"mrnet.runtime"},
    {"mrnet.layout"},
    {"mrnet.networks"},
    {"model", "dataloader"},
    {"mrnet.scans"},
    {"mrnet.evaluation"},
    {"mrnet.training"},
    {"mrnet.stacking"},
    {"mrnet.inference"},
    {"mrnet.reports"},
    SCRIPTS,
    {"data"},
    {"tools"},
]
# tools/benchmark times the training loop itself.
IMPORTS_A_SCRIPT = {("tools.benchmark", "train")}


def room_of(module):
    """Position in ROOMS, by the longest name that fits; None for other packages."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        for position, room in enumerate(ROOMS):
            if ".".join(parts[:length]) in room:
                return position
    return None


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_run_downwards(path):
    module = module_of(path)
    mine = room_of(module)
    for other in imports_of(path):
        theirs = room_of(other)
        assert theirs is None or theirs <= mine, f"{module} imports {other}"
        if other in SCRIPTS and (module, other) not in IMPORTS_A_SCRIPT:
            raise AssertionError(f"{module} imports the script {other}")


def test_every_file_of_mrnet_is_in_a_room():
    for path in FILES:
        module = module_of(path)
        assert module == "mrnet.__init__" or room_of(module) is not None, module


def test_imports_have_no_circle():
    modules = {module_of(path) for path in FILES}
    graph = {module_of(path): imports_of(path) & modules for path in FILES}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_a_room_says_what_it_is_and_holds_no_code():
    for path in (ROOT / "mrnet").rglob("__init__.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree) and len(tree.body) == 1, path


@pytest.mark.parametrize(
    "module",
    ["mrnet.layout.labels", "mrnet.layout.description", "mrnet.scans.studies",
     "mrnet.scans.register"]
    + [f"data.{path.parent.name}.prepare" for path in sorted(ROOT.glob("data/*/prepare.py"))],
)  # fmt: skip
def test_importers_start_without_torch(module):
    """They take 0.3 s to start, not 2, and predict.py starts several."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_tools_run_from_any_folder(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "tools/check.py", tmp_path / "none"],
                          cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2 and "none: no such data folder" in done.stderr
    for path in (ROOT / "tools").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "    cli.exit_with_status" in text:
            before = text.partition("\nfrom mrnet")[0]
            assert "sys.path.insert(0, str(Path(__file__).parents[1]))" in before, path


@needs_make
def test_make_alone_lists_its_targets():
    done = subprocess.run(["make", "-C", ROOT], capture_output=True, text=True)
    assert "make demo  " in done.stdout and "train.py --task" not in done.stdout
