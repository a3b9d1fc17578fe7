"""Sweeps: what they run, that nothing is repeated, and their table against hand sums."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, assert_one_line_error, run_script, write_exams
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score

from mrnet.errors import InputError, RunError
from mrnet.evaluation.figures import cost_figure
from mrnet.evaluation.metrics import Difference, auc_difference, mean_auc_difference
from mrnet.files import file_lock
from mrnet.runtime.jobs import Job, JobResult, Jobs
from mrnet.training.config import THE_ARTICLES, read_recipe
from mrnet.training.memory import bytes_of_a_job
from tools import sweep as sweep_module
from tools.sweep import Results, Setting, read_sweep, train_networks
from tools.sweep_table import (
    FORMAT,
    Line,
    Row,
    auc_in_folds,
    compare,
    cost_points,
    leave_out,
    list_rows,
    make_stack,
    read_results,
)

HEAD = """
task = "acl"
planes = ["axial"]
folds = 2
seeds = 1
protocol = "article"
"""
RECIPES = """
[recipes.article]
epochs = 1
pretrained = false
[recipes.faster]
like = "article"
lr = 1e-3
select = "last"
"""


def sweep_file(folder, text=HEAD + RECIPES):
    path = folder / "try.toml"
    path.write_text(text)
    return path


def test_recipes_inherit(tmp_path):
    sweep = read_sweep(sweep_file(tmp_path))
    assert sweep.recipes["faster"] == {
        "epochs": 1, "pretrained": False, "lr": 1e-3, "select": "last",
    }  # fmt: skip
    names = [network[:3] for network in sweep.networks()]
    assert names[:3] == [("article", "axial", 1), ("faster", "axial", 1), ("article", "axial", 2)]
    joint = HEAD.replace('"axial"', '"axial+sagittal", "coronal"') + RECIPES
    joint = read_sweep(sweep_file(tmp_path, joint.replace("1e-3", '1e-3\nplanes = ["coronal"]')))
    assert joint.planes == {"article": ["axial+sagittal", "coronal"], "faster": ["coronal"]}
    assert joint.bytes_of("article") == bytes_of_a_job("alexnet", planes=2)


@pytest.mark.parametrize("name", ["article", "best", "fast", "fastest"])
def test_recipes_are_those_of_the_finalists(name):
    tried = read_sweep(ROOT / "sweeps" / "final.toml").recipes[name]
    _, recipe = read_recipe(name)
    assert recipe == (THE_ARTICLES if name == "article" else {}) | {
        key.replace("-", "_"): value for key, value in tried.items()
    }


@pytest.mark.parametrize(
    "text, words",
    [
        (HEAD, "lacks recipes"),
        (HEAD + "[recipes.a]\n", "lacks [recipes.article]"),
        (HEAD + '[recipes.article]\nlike = "article"\n', "no recipe above article"),
        (HEAD + "[recipes.article]\nlearning = 1\n", "unknown learning"),
        (HEAD + "[recipes.article]\nhead-lr = 1\nhead_lr = 2\n", "twice, with - and with _"),
        (HEAD.replace("folds = 2", "folds = 1") + RECIPES, "at least 2 folds"),
        (HEAD + "views = 4\n" + RECIPES + "[stacks]\n", "unknown or wrong: views, stacks"),
        (HEAD.replace('"axial"', '"axial+axial"') + RECIPES, "planes = ['axial+axial']"),
        (HEAD.replace('"axial"', '"oblique"') + RECIPES, "planes = ['oblique']: takes a list"),
        (HEAD.replace('"axial"', "") + RECIPES, "planes = []: takes a list"),
        (HEAD + RECIPES.replace("lr = 1e-3", 'planes = "axial"'), "planes = axial: takes a list"),
        ("=", "not a sweep"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, words):
    path = sweep_file(tmp_path, text)
    with pytest.raises(InputError) as refused:
        read_sweep(path)
    assert str(path) in str(refused.value) and words in str(refused.value)


def run_sweep(work, *more):
    return run_script(
        "tools/sweep.py", work / "try.toml", "--data-dir", work / "data", "--out", work / "out",
        "--models-dir", work / "models", "--precision", "fp32", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    work = tmp_path_factory.mktemp("sweep")
    write_exams(work / "data", train=18)
    sweep_file(work)
    return work, run_sweep(work)


@pytest.mark.whole
def test_a_sweep_predicts_every_exam_out_of_fold(swept):
    work, done = swept
    assert done.returncode == 0, done.stderr
    exams, recipes = read_results(work / "out")
    assert exams["labels"]["acl"] == {str(i): int(i % 3 == 0) for i in range(18)}
    assert list(recipes) == ["article", "faster"]
    for name, networks in recipes.items():
        assert [(one["planes"], one["seed"], one["fold"]) for one in networks] == [
            ("axial", 0, 1), ("axial", 0, 2),
        ]  # fmt: skip
        ids = [list(one["logits"]["acl"]) for one in networks]
        assert sorted(ids[0] + ids[1]) == sorted(map(str, range(18)))
        assert ids[0] == list(recipes["article"][0]["logits"]["acl"])
        assert all(one["cpu_seconds"] > 0 and one["peak_memory"] > 1e8 for one in networks)
        assert f"| {name} " in done.stdout
    assert not list((work / "models").glob("*.pt"))


@pytest.mark.whole
def test_exams_without_a_label_of_one_of_two_findings(tmp_path):
    data = write_exams(tmp_path / "data", train=18)
    for split, ids in (("train", range(18)), ("valid", range(18, 26))):
        rows = [f"{i},{'' if i % 4 == 1 else int(i % 2)}\n" for i in ids]
        (data / f"{split}-some.csv").write_text("".join(rows))
    text = HEAD.replace('"acl"', '"acl+some"') + RECIPES.partition("[recipes.faster]")[0]
    sweep_file(tmp_path, text)
    done = run_sweep(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\nacl: 18 exams, 6 positive" in done.stdout
    assert "\nsome: 13 exams, 4 positive" in done.stdout  # 3, 7, 11, 15; 1, 5, ... are unknown
    for network in read_results(tmp_path / "out")[1]["article"]:
        wanted = [exam_id for exam_id in network["logits"]["acl"] if int(exam_id) % 4 != 1]
        assert list(network["logits"]["some"]) == wanted


@pytest.mark.whole
def test_nothing_is_repeated(swept):
    work, _ = swept
    path = work / "out" / "faster.json"
    content = json.loads(path.read_text())
    first, second = content["networks"]
    path.write_text(json.dumps(content | {"networks": [first]}))
    (work / "models" / "acl-axial-fold1of2.pt").touch()  # killed before it was deleted
    done = run_sweep(work)
    assert not list((work / "models").glob("*.pt"))
    assert "1/1  faster, axial, seed 0, fold 2" in done.stdout, done.stderr
    again = json.loads(path.read_text())["networks"]
    assert again[0] == first and again[1]["logits"] == second["logits"]


@pytest.mark.whole
def test_other_exams_under_the_same_ids_are_refused(swept, tmp_path):
    work, _ = swept
    out = shutil.copytree(work / "out", tmp_path / "out")
    data = shutil.copytree(work / "data", tmp_path / "data")
    command = ("tools/sweep.py", work / "try.toml", "--out", out, "--models-dir",
               tmp_path / "models", "--precision", "fp32", "--data-dir")  # fmt: skip
    assert run_script(*command, work / "data").returncode == 0  # nothing to do
    before = (out / "sweep.json").read_bytes()
    path = data / "train" / "axial" / "0003.npy"
    np.save(path, 255 - np.load(path))
    done = run_script(*command, data)
    assert_one_line_error(done, out / "sweep.json", "other exams or labels")
    assert (out / "sweep.json").read_bytes() == before


@pytest.mark.whole
def test_another_recipe_under_the_same_name_is_refused(swept, tmp_path):
    work, _ = swept
    path = sweep_file(tmp_path, HEAD + RECIPES.replace("lr = 1e-3", "lr = 1e-4"))
    done = run_script(
        "tools/sweep.py", path, "--data-dir", work / "data", "--out", work / "out",
        "--models-dir", tmp_path / "models",
    )  # fmt: skip
    assert_one_line_error(done, work / "out" / "faster.json", "another recipe")


@pytest.mark.parametrize("folder", ["out", "models"])
def test_folders_that_another_sweep_writes_are_left_alone(exams, tmp_path, folder):
    sweep_file(tmp_path)
    (tmp_path / folder).mkdir()
    with file_lock(tmp_path / folder / ".sweep.lock", "busy"):
        done = run_sweep(tmp_path)
    option = {"out": "--out", "models": "--models-dir"}[folder]
    assert_one_line_error(done, tmp_path / folder, "another sweep", option)
    assert not (tmp_path / "models" / "recipes").exists()


@pytest.mark.whole
def test_a_damaged_volume_is_named_before_anything_is_trained(tmp_path):
    write_exams(tmp_path / "data", train=18)
    path = tmp_path / "data" / "train" / "axial" / "0003.npy"
    path.write_bytes(b"no volume")
    sweep_file(tmp_path)
    assert_one_line_error(run_sweep(tmp_path), path)


@pytest.mark.whole
def test_a_signal_stops_a_sweep_after_the_step(tmp_path):
    write_exams(tmp_path / "data", train=18)
    text = (HEAD + RECIPES).replace("epochs = 1", "epochs = 500")
    command = [sys.executable, "-m", "tools.sweep", sweep_file(tmp_path, text), "--data-dir",
               tmp_path / "data", "--out", tmp_path / "out", "--models-dir",
               tmp_path / "models"]  # fmt: skip
    running = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while len(list((tmp_path / "models").glob("*.state"))) < 2:
        time.sleep(0.1)
        assert running.poll() is None
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM and "Start it again" in errors
    assert len(list((tmp_path / "models").glob("*.state"))) == 2


class FakeRunner:
    """Stands in for Jobs: every training takes 10 s, those of fold 2 end with `status`."""

    stopped_by = 0

    def __init__(self, status=0):
        self.status = status

    def run(self, jobs):
        for job in jobs:
            yield JobResult(job, self.status if "fold 2" in job.name else 0, 10.0, 9.0, 10**9)


@pytest.fixture
def without_networks(monkeypatch):
    found = {"logits": {"acl": {}}, "epochs": {}}
    monkeypatch.setattr(sweep_module, "predict_out_of_fold", lambda *args: dict(found))


def test_failures_are_named_and_the_others_go_on(tmp_path, without_networks):
    sweep = read_sweep(sweep_file(tmp_path))
    setting = Setting(tmp_path, tmp_path, "cpu", "fp32")
    results = {name: Results(tmp_path, sweep, name) for name in sweep.recipes}
    with pytest.raises(RunError, match="2 of 4 networks failed, the last, faster, axial, seed 0, "):
        train_networks(sweep, setting, FakeRunner(status=1), results, {"precision": "fp32"})
    assert [one["fold"] for one in Results(tmp_path, sweep, "faster").networks] == [1]


@pytest.mark.parametrize("left", ["acl-axial-fold1of2.state", "acl-axial-fold1of2.pt"])
def test_the_time_of_an_interrupted_training_is_not_known(tmp_path, without_networks, left):
    sweep = read_sweep(sweep_file(tmp_path, HEAD + "[recipes.article]\n"))
    (tmp_path / left).touch()  # by a sweep that was killed
    setting = Setting(tmp_path, tmp_path, "cpu", "fp32")
    results = {"article": Results(tmp_path, sweep, "article")}
    train_networks(sweep, setting, FakeRunner(), results, {"precision": "fp32"})
    again = Results(tmp_path, sweep, "article").networks
    assert [(one["seconds"], one["cpu_seconds"]) for one in again] == [(None, None), (10.0, 9.0)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        "3",
        '{"folds": 2, "networks": {}}',
        '{"format": "mrnet-sweep-1"}',
        '{"format": "mrnet-sweep-2", "task": "acl", "folds": 2, "protocol": "article", '
        '"recipe": {}, "networks": [{"planes": "axial"}], "labels": {"acl": {"1": 2}}, '
        '"grouped": {}, "exams": {}}',
    ],
)
@pytest.mark.parametrize("name", ["article.json", "sweep.json"])
def test_damaged_or_earlier_results_are_refused(tmp_path, name, text):
    folder = write_results(tmp_path / "out", {"article": 1.0, "better": 1.5})
    (folder / name).write_text(text)
    with pytest.raises(InputError, match=f"{name}: damaged, or not of format {FORMAT}"):
        read_results(folder)


def test_a_job_says_its_status_and_time(tmp_path):
    code = "import sys, time; t = time.process_time()\nwhile time.process_time() < t + 0.5: pass\n"
    jobs = [Job(str(n), ("-c", f"{code}sys.exit({n})"), tmp_path / f"{n}.txt") for n in (0, 3)]
    done = {one.job.name: one for one in Jobs(2).run(jobs)}
    assert {name: one.status for name, one in done.items()} == {"0": 0, "3": 3}
    assert all(0.5 <= one.cpu_seconds < 3 and one.seconds >= 0.5 for one in done.values())
    assert (tmp_path / "3.txt").read_text().startswith("\n$ python -c ")


@pytest.mark.whole
def test_jobs_do_not_outlive_whoever_takes_their_results(tmp_path):
    quick = Job("quick", ("-c", "pass"), tmp_path / "quick.txt")
    code = f"import time; time.sleep(5); open({str(tmp_path / 'late')!r}, 'w')"
    with pytest.raises(ZeroDivisionError):
        for _ in Jobs(2).run([quick, Job("slow", ("-c", code), tmp_path / "slow.txt")]):
            raise ZeroDivisionError
    time.sleep(6)
    assert not (tmp_path / "late").exists()


# --- the table ------------------------------------------------------------------------------------


def write_results(folder, gains, seeds=1, folds=2, n=400, planes=("axial",)):
    """A sweep's results with binormal scores: {recipe: distance of the classes}."""
    rng = np.random.default_rng(0)
    truth = (np.arange(n) % 5 == 0).astype(int)
    labels = {"acl": {str(i): int(label) for i, label in enumerate(truth)}}
    folder.mkdir()
    exams = {"format": FORMAT, "labels": labels, "grouped": {"acl": 0}, "exams": {}}
    (folder / "sweep.json").write_text(json.dumps(exams))
    knee = rng.standard_normal(n)
    for name, gain in gains.items():
        networks = []
        for plane in planes:
            for number in range(seeds * folds):
                logits = gain * truth + knee + 0.3 * rng.standard_normal(n)
                ids = [i for i in range(n) if i % folds == number % folds]
                networks.append({
                    "planes": plane, "seed": number // folds, "fold": number % folds + 1,
                    "logits": {"acl": {str(i): logits[i] for i in ids}}, "precision": "fp32",
                    "seconds": 10.0, "cpu_seconds": 10.0 if name == "article" else 5.0,
                    "peak_memory": 10**9,
                })  # fmt: skip
        content = {"format": FORMAT, "task": "acl", "folds": folds, "protocol": "held-out",
                   "recipe": {}, "networks": networks}  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def edit_networks(path, change):
    """Rewrite a recipe's file with `change` applied to its list of networks."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"networks": change(content["networks"])}))


def read_rows(folder):
    exams, recipes = read_results(folder)
    return list_rows("acl", exams["labels"]["acl"], recipes)


def compared(folder, against="article"):
    """int (n,) labels, {recipe: its Line}, with "recipe, stack" for stacks."""
    truth, rows = read_rows(folder)
    return truth, {
        line.row.recipe + (", stack" if line.row.column == "stack" else ""): line
        for line in compare(truth, rows, against)
    }


def scores_of(networks, n=400):
    """float64 (n,) logits of one seed's networks."""
    scores = np.full(n, np.nan)
    for network in networks:
        for exam_id, value in network["logits"]["acl"].items():
            scores[int(exam_id)] = value
    return scores


def test_a_row_of_the_table(tmp_path):
    folder = write_results(tmp_path / "out", {"article": 1.0, "better": 1.5}, seeds=2)
    truth, found = compared(folder)
    networks = json.loads((folder / "better.json").read_text())["networks"]
    runs = [scores_of(networks[:2]), scores_of(networks[2:])]
    aucs = [roc_auc_score(truth, run) for run in runs]
    inside = [
        roc_auc_score([truth[int(i)] for i in each], list(each.values()))
        for each in (network["logits"]["acl"] for network in networks)
    ]
    line = found["better"]
    assert line.aucs == pytest.approx(aucs) and line.in_folds == pytest.approx(np.mean(inside))
    briers = [brier_score_loss(truth, expit(run)) for run in runs]
    assert line.brier == pytest.approx(np.mean(briers)) and line.time == 0.5
    gains = np.subtract(aucs, found["article"].aucs)
    assert line.gain.value == pytest.approx(gains.mean()) and line.gain.p < 0.05
    assert line.gain.low < gains.min() and line.adjusted == line.gain.p
    assert found["article"].gain is None


def test_a_joint_network_is_compared_with_the_stack_of_another_recipe(tmp_path):
    gains, planes = {"article": 1.0, "fast": 1.2, "joint": 1.5}, ("axial", "sagittal")
    folder = write_results(tmp_path / "out", gains, planes=planes)
    edit_networks(
        folder / "joint.json",
        lambda networks: [one | {"planes": "axial+sagittal"} for one in networks[:2]],
    )
    truth, found = compared(folder, "fast")
    networks = json.loads((folder / "fast.json").read_text())["networks"]
    x = expit(np.column_stack([scores_of(networks[:2]), scores_of(networks[2:])]))
    stack, even = np.empty(len(truth)), np.arange(len(truth)) % 2 == 0
    for fold in (even, ~even):
        fitted = LogisticRegression().fit(x[~fold], truth[~fold])
        stack[fold] = fitted.predict_proba(x[fold])[:, 1]
    assert expit(found["fast, stack"].row.logits[0]) == pytest.approx(stack)
    joint = scores_of(json.loads((folder / "joint.json").read_text())["networks"])
    assert found["joint"].gain == pytest.approx(auc_difference(truth, joint, stack))
    assert found["joint"].time == 5 / (5 + 5) and found["fast, stack"].gain is None
    done = run_script("tools/sweep_table.py", folder, "--against", "fast")
    assert "- fast [95 %]" in done.stdout
    done = run_script("tools/sweep_table.py", folder, "--against", "slow")
    assert_one_line_error(done, "no networks of recipe slow")


def test_exams_that_lack_a_plane_are_stacked_from_the_others(tmp_path):
    folder = write_results(tmp_path / "out", {"article": 1.0}, planes=("axial", "sagittal"))
    missing = {str(i) for i in range(0, 400, 7)}  # of the sagittal plane

    def leave_some_out(networks):
        for network in networks[2:]:
            found = network["logits"]["acl"]
            network["logits"]["acl"] = {i: v for i, v in found.items() if i not in missing}
        return networks

    edit_networks(folder / "article.json", leave_some_out)
    _, rows = read_rows(folder)
    stack = rows[-1]
    assert stack.column == "stack" and np.isfinite(stack.logits).all()
    alone, even = rows[0].logits[0], np.arange(400) % 2 == 0
    truth = (np.arange(400) % 5 == 0).astype(int)
    fitted = LogisticRegression().fit(expit(alone[~even, None]), truth[~even])
    assert expit(stack.logits[0, 0]) == pytest.approx(
        fitted.predict_proba([[expit(alone[0])]])[0, 1]
    )


def test_exams_that_chose_the_recipes_are_left_out(tmp_path):
    folder = write_results(tmp_path / "out", {"article": 1.0, "better": 1.5})
    search = shutil.copytree(folder, tmp_path / "search")
    for name in ("article", "better"):  # the search saw fold 1 only
        edit_networks(search / f"{name}.json", lambda networks: networks[:1])
    exams, _ = read_results(folder)
    truth, rows = read_rows(folder)
    rows, out = leave_out(rows, exams["labels"]["acl"], search)
    assert out.sum() == 200
    (line,) = [one for one in compare(truth, rows) if one.row.recipe == "better"]
    rest = json.loads((folder / "better.json").read_text())["networks"][1]["logits"]["acl"]
    expected = roc_auc_score([truth[int(i)] for i in rest], list(rest.values()))
    assert line.aucs == pytest.approx([expected]) and line.in_folds == pytest.approx(expected)
    done = run_script("tools/sweep_table.py", folder, "--without", search)
    assert "without 200 exams" in done.stdout and "acl: 200 exams" in done.stdout
    done = run_script("tools/sweep_table.py", folder, "--without", tmp_path)
    assert_one_line_error(done, "no such file")


@pytest.mark.parametrize("unknown, time", [((0,), "0.50"), ((0, 1), "–")])
def test_times_that_are_not_known_are_left_out_of_the_mean(tmp_path, unknown, time):
    folder = write_results(tmp_path / "out", {"article": 1.0, "better": 1.5})
    edit_networks(
        folder / "better.json",
        lambda networks: [
            one | {"cpu_seconds": None} if i in unknown else one for i, one in enumerate(networks)
        ],
    )
    _, found = compared(folder)
    assert found["better"].cells()[-2] == time and found["article"].cells()[-2] == "1.00"
    drawn = {name for name, _ in cost_points(found.values())}
    assert drawn == ({"article"} if time == "–" else {"article", "better"})


@pytest.mark.parametrize("folds", [[1] * 8 + [2] * 4, [1, 2] * 4 + [3] * 4, range(1, 13)])
def test_a_fold_of_one_class_is_left_out(folds):
    truth = np.array([0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0])
    scores, folds = np.random.default_rng(0).random(12), np.array(folds)
    found = auc_in_folds(truth, Row("a", "axial", scores[None], folds[None], 1.0, 0.0))
    each = [roc_auc_score(truth[folds == k], scores[folds == k])
            for k in set(folds) if len(set(truth[folds == k])) == 2]  # fmt: skip
    wanted = np.mean(each) if each else np.nan
    assert found == pytest.approx(wanted, nan_ok=True)


def test_seeds_widen_the_interval_of_their_own_row_alone(tmp_path):
    gains = {"article": 1.0, "again": 1.0, "steady": 1.0}
    folder = write_results(tmp_path / "out", gains, seeds=3)
    shutil.copy(folder / "article.json", folder / "steady.json")  # its difference does not vary
    truth, found = compared(folder)
    wanted = mean_auc_difference(truth, found["again"].row.logits, found["article"].row.logits)
    assert found["again"].gain == wanted and found["steady"].gain == (0, 0, 0, 1)


def test_what_intervals_do_not_cover_is_said(tmp_path):
    folder = write_results(tmp_path / "out", {"article": 1.0, "better": 1.5})
    done = run_script("tools/sweep_table.py", folder)
    assert "by precision" not in done.stdout and "share a group" not in done.stdout
    edit_networks(
        folder / "better.json", lambda networks: [one | {"precision": "bf16"} for one in networks]
    )
    exams = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps(exams | {"grouped": {"acl": 7}}))
    done = run_script("tools/sweep_table.py", folder)
    assert "by precision: bf16 2, fp32 2" in done.stdout
    assert "7 of the 400 exams share a group" in done.stdout


def test_recipes_in_part_are_compared_on_the_exams_of_both(tmp_path):
    folder = write_results(tmp_path / "out", {"article": 1.0, "part": 1.5})
    edit_networks(folder / "part.json", lambda networks: networks[:1])
    truth, found = compared(folder)
    even = np.arange(len(truth)) % 2 == 0
    row, base = found["part"].row.logits[0], found["article"].row.logits[0]
    wanted = roc_auc_score(truth[even], row[even]) - roc_auc_score(truth[even], base[even])
    assert found["part"].gain.value == pytest.approx(wanted)


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("fewer", ["article", "better"])
def test_recipes_of_different_numbers_of_seeds_are_compared_on_those_of_both(
    tmp_path, seeds, fewer
):
    folder = write_results(tmp_path / "out", {"article": 1.0, "better": 1.5}, seeds=3)
    _, whole = compared(folder)
    edit_networks(folder / f"{fewer}.json", lambda networks: networks[: 2 * seeds])
    _, found = compared(folder)
    counts = {name: len(line.aucs) for name, line in found.items()}
    assert counts == {"article": 3, "better": 3} | {fewer: seeds}
    each = np.subtract(whole["better"].aucs, whole["article"].aucs)[:seeds]
    assert found["better"].gain.value == pytest.approx(each.mean())


def test_a_seed_that_has_only_begun_waits(tmp_path):
    planes = ("axial", "coronal")
    folder = write_results(tmp_path / "out", {"article": 1.0, "better": 1.5}, 2, planes=planes)
    _, whole = compared(folder)
    for name in ("article", "better"):  # seed 1, fold 2, coronal
        edit_networks(folder / f"{name}.json", lambda networks: networks[:-1])
    _, found = compared(folder)
    assert found["better"].aucs == whole["better"].aucs[:1]
    assert found["better, stack"].aucs == whole["better, stack"].aucs[:1]
    gain = whole["better"].aucs[0] - whole["article"].aucs[0]
    assert found["better"].gain.value == pytest.approx(gain)  # on all exams, not on half of them
    done = run_script("tools/sweep_table.py", folder)
    assert "left out: better, coronal, seed 1: 1 of 2 networks so far" in done.stdout, done.stderr


def test_recipes_without_a_complete_seed_in_common_have_no_difference(tmp_path):
    folder = write_results(tmp_path / "out", {"article": 1.0, "better": 1.5}, seeds=2)
    edit_networks(folder / "article.json", lambda networks: networks[:3])
    edit_networks(folder / "better.json", lambda networks: networks[1:])
    _, found = compared(folder)
    assert found["better"].gain is None and len(found["better"].aucs) == 1


def test_a_stack_never_sees_the_labels_of_its_own_fold(tmp_path):
    folder = write_results(tmp_path / "out", {"article": 1.0}, planes=("axial", "coronal"))
    truth, (*rows, before) = read_rows(folder)
    first = before.folds[0] == 1
    after = make_stack(rows, np.where(first, 1 - truth, truth))
    np.testing.assert_array_equal(before.logits[0, first], after.logits[0, first])
    assert (before.logits[0, ~first] != after.logits[0, ~first]).all()
    assert roc_auc_score(truth, before.logits[0]) > 0.7


def test_labels_without_information_give_no_auc(tmp_path):
    folder = write_results(tmp_path / "out", {"article": 0.0}, planes=("axial", "coronal"))
    truth, rows = read_rows(folder)
    assert abs(roc_auc_score(truth, rows[-1].logits[0]) - 0.5) < 0.07


def test_each_finding_has_a_picture(tmp_path):
    folder = write_results(tmp_path / "out", {"article": 1.0, "better": 1.5})
    done = run_script("tools/sweep_table.py", folder, "--plot", tmp_path / "one.png")
    assert done.returncode == 0 and [p.name for p in tmp_path.glob("*.png")] == ["one.png"]
    for path in folder.glob("*.json"):
        content = json.loads(path.read_text())
        for network in content.get("networks", ()):
            network["logits"]["other"] = network["logits"]["acl"]
        if "labels" in content:
            for key in ("labels", "grouped"):
                content[key]["other"] = content[key]["acl"]
        path.write_text(json.dumps(content))
    done = run_script("tools/sweep_table.py", folder, "--plot", tmp_path / "two.png")
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.glob("two*")} == {"two-acl.png", "two-other.png"}


def test_a_bar_is_the_interval_of_the_difference():
    gain = Difference(0.03, 0.01, 0.05, 0.004)
    row = Row("best", "axial", None, None, 1.0, 0.0)
    lines = [
        Line(row, [0.85, 0.87], 0.86, 0.1, 0.5, gain, 0.01),
        Line(row._replace(recipe="article"), [0.83], 0.83, 0.1, 1.0, None, None),
    ]
    points = cost_points(lines)
    assert points["article", "axial"] == (1.0, 0.83, None) and len(points) == 2
    time, auc, ends = points["best", "axial"]
    assert (time, auc) == pytest.approx((0.5, 0.86)) and ends == pytest.approx((0.84, 0.88))
    assert [axes.get_title() for axes in cost_figure(points, "article").axes] == ["axial"]
