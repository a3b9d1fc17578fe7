"""Names of files: one rule for train.py, reproduce.py, the stack and sweeps."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from mrnet.errors import InputError
from mrnet.layout.names import (
    Run,
    column_name,
    folds_path,
    list_runs,
    model_path,
    predictions_path,
    results_path,
    stack_path,
    state_path,
)


def test_seeds_and_folds_are_named_only_where_there_are_several():
    assert list_runs(1, range(4, 5)) == [Run(4, 0, "")]
    assert list_runs(1, [0, 1]) == [Run(0, 0, "-seed0"), Run(1, 0, "-seed1")]
    assert list_runs(2, [7]) == [Run(7, 1, "-fold1of2"), Run(7, 2, "-fold2of2")]
    both = list_runs(2, range(2))
    assert [run.suffix for run in both] == [
        "-fold1of2-seed0", "-fold2of2-seed0", "-fold1of2-seed1", "-fold2of2-seed1"
    ]  # fmt: skip


@pytest.mark.parametrize("folds, repeat", [(10**12, 1), (1, 10**6), (5, 201)])
def test_so_many_networks_are_refused_before_they_are_listed(folds, repeat):
    with pytest.raises(InputError, match="networks of each task and plane; at most 1000"):
        list_runs(folds, range(repeat))


def test_paths():
    path = model_path("m", "acl", column_name("axial+coronal", "v1.5"), "-seed1")
    assert path == Path("m/acl-axial+coronal-v1.5-seed1.pt")
    assert state_path(path) == Path("m/acl-axial+coronal-v1.5-seed1.state")
    assert column_name("axial", "article") == "axial"
    assert folds_path("m", "a+b", "axial", 5, 3) == Path("m/a+b-axial-folds5-seed3.csv")
    for recipes, end in ((["article"], ""), (["article", "best"], "-article+best")):
        assert stack_path("m", "acl", recipes) == Path(f"m/acl-stack{end}.json")
        assert results_path("m", "acl", recipes) == Path(f"m/acl{end}-results.json")
        assert predictions_path("m", "acl", recipes) == Path(f"m/acl{end}-predictions.csv")


def test_names_need_no_torch():
    code = "import sys, mrnet.layout.names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
