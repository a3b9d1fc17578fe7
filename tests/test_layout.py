"""The layout of the code: which files there are, who imports whom, how long functions are."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from conftest import FILES, ROOT, imports_of, module_of, needs_make

SCRIPTS = {"train", "train_logistic_regression", "predict", "explain", "reproduce"}
LAYERS = [  # each imports from itself and from those before it only
    {
        "common.errors",
        "common.documents",
        "common.files",
        "common.kernels",
        "common.labels",
        "common.machine",
        "common.names",
        "common.pickles",
        "common.planes",
        "common.provenance",
        "common.volumes",
    },
    {"model", "dataloader", "data", "common.description"},
    {"common"},
    SCRIPTS | {"hubconf"},
    {"tools"},
]


def layer_of(module):
    """Position in LAYERS, by the longest name that fits; None for other packages."""
    for name in (module, module.split(".")[0]):
        for i, layer in enumerate(LAYERS):
            if name in layer:
                return i
    return None


def functions():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield module_of(path), node


def test_the_root_holds_the_articles_files_and_three_commands():
    found = {path.name for path in ROOT.glob("*.py")}
    assert found == {f"{name}.py" for name in SCRIPTS | {"model", "dataloader", "hubconf"}}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_run_downwards(path):
    module = module_of(path)
    mine = layer_of(module)
    for other in imports_of(path):
        theirs = layer_of(other)
        assert theirs is None or theirs <= mine, f"{module} imports {other}"
        if module in SCRIPTS:
            assert other not in SCRIPTS, f"{module} imports the script {other}"


def test_imports_have_no_circle():
    modules = {module_of(path) for path in FILES}
    graph = {module_of(path): imports_of(path) & modules for path in FILES}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_train_reads_like_the_article():
    text = (ROOT / "train.py").read_text()
    assert len(text.splitlines()) <= 450
    places = [text.index(f"def {name}(") for name in
              ("parse_arguments", "run", "train_model", "evaluate_model")]  # fmt: skip
    assert places == sorted(places)


def test_functions_fit_a_screen_and_take_what_they_use():
    for module, node in functions():
        where = f"{module}.{node.name}"
        if not node.name.startswith("parse"):
            assert node.end_lineno - node.lineno < 60, where
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        names = {argument.arg for argument in arguments} - {"self", "cls"}
        is_kernel = "jit" in map(ast.unparse, node.decorator_list)  # addresses and sizes
        assert len(names) <= 6 or is_kernel, where
        # An argparse.Namespace stays in the one function that reads it.
        assert "args" not in names or node.name == "run", where


def modules_in(tree):
    """Names that a file has for the modules that it imports."""
    ours, found = {module_of(path) for path in FILES}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = (one for one in node.names if f"{node.module}.{one.name}" in ours)
            found |= {alias.asname or alias.name for alias in names}
    return found


def written_attributes(tree):
    """Attributes of imported modules that a file writes to, but PyTorch's own settings."""
    modules = modules_in(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            name = ast.unparse(node)
            if name.split(".")[0] in modules and not name.startswith("torch.backends."):
                yield name


def test_nothing_global_is_written_to():
    for path in FILES:
        tree = ast.parse(path.read_text())
        assert not any(isinstance(node, ast.Global) for node in ast.walk(tree)), path
        assert list(written_attributes(tree)) == [], path


def test_tools_run_from_any_folder(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "tools/check.py", tmp_path / "none"],
                          cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2 and "none: no such data folder" in done.stderr
    for path in (ROOT / "tools").glob("*.py"):
        lines = path.read_text().splitlines()
        first = next((i for i, line in enumerate(lines) if line.startswith("from common")), None)
        if "    cli.exit_with_status" in "\n".join(lines):
            assert lines[first - 2].startswith("sys.path.insert(0, str(Path(__file__).parents[1]))")


@needs_make
def test_make_alone_lists_its_targets():
    done = subprocess.run(["make", "-C", ROOT], capture_output=True, text=True)
    assert "make demo  " in done.stdout and "train.py --task" not in done.stdout


@pytest.mark.parametrize("source", sorted(p.parent.name for p in ROOT.glob("data/*/prepare.py")))
def test_importers_start_without_torch(source):
    """They take 0.3 s to start, not 2, and predict.py starts several."""
    code = f"import sys, data.{source}.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
