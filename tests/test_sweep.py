"""Sweeps: what they run, that nothing is repeated, and their table against hand sums."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import numpy as np
import pytest
from conftest import ROOT, assert_one_line_error, run_script, write_exams
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score

from common.config import THE_ARTICLES, Config, read_recipe
from common.errors import InputError, Interrupted
from common.figures import cost_figure
from common.files import held
from common.jobs import Done, Job, Jobs, bytes_of_a_job
from common.metrics import Difference, mean_auc_difference
from tools import sweep as sweep_module
from tools.sweep import (
    Network,
    Results,
    Setting,
    check_recipe,
    read_sweep,
    run_rounds,
    train_networks,
)
from tools.sweep_table import (
    HEADS,
    VIEWS,
    Line,
    Row,
    all_rows,
    auc_in_folds,
    cost_points,
    dropped_recipes,
    leave_out,
    lines_of,
    read_results,
    stack_row,
)
from tools.sweep_valid import all_valid_rows

HEAD = """
task = "acl"
planes = ["axial"]
folds = 2
seeds = 1
protocol = "article"
views = 1
"""
RECIPES = """
[recipes.article]
epochs = 1
pretrained = false
[recipes.faster]
like = "article"
lr = 1e-3
select = "last"
[stacks.both]
recipes = ["article", "faster"]
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
    names = [tuple(network) for network in sweep.networks()]
    assert names[:3] == [("article", "axial", 1), ("faster", "axial", 1), ("article", "axial", 2)]
    planes = read_sweep(
        sweep_file(tmp_path, (HEAD + RECIPES).replace('"axial"', '"axial", "coronal"'))
    )
    names = [tuple(network) for network in planes.networks()]
    assert names[1] == ("article", "coronal", 1) and len(names) == 8
    joint = HEAD.replace('"axial"', '"sagittal+axial", "coronal"') + RECIPES
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


def test_a_bar_is_the_interval_of_the_difference():
    gain = Difference(0.03, 0.01, 0.05, 0.004)
    row = Row("best", "axial", None, None, [], 0.0)
    lines = [
        Line(row, [0.85, 0.87], 0.86, gain, 0.01, 0.1, 0.5),
        Line(row._replace(recipe="article"), [0.83], 0.83, None, None, 0.1, 1.0),
        Line(row._replace(recipe="best" + VIEWS), [0.9], 0.9, gain, 0.01, 0.1, 0.5),
    ]
    points = cost_points(lines)
    assert points["article", "axial"] == (1.0, 0.83, None) and len(points) == 2
    time, auc, ends = points["best", "axial"]
    assert (time, auc) == pytest.approx((0.5, 0.86)) and ends == pytest.approx((0.84, 0.88))
    assert [axes.get_title() for axes in cost_figure(points).axes] == ["axial"]


@pytest.mark.parametrize(
    "text, words",
    [
        (HEAD, "lacks recipes"),
        (HEAD + "[recipes.a]\n", "lacks [recipes.article]"),
        (HEAD + '[recipes.article]\nlike = "b"\n', "no such recipe"),
        (HEAD + '[recipes.article]\nlike = "article"\n', "in a circle"),
        (HEAD + "[recipes.article]\nlearning = 1\n", "unknown learning"),
        (
            HEAD + '[recipes.article]\n[stacks]\na = { recipe = ["article"] }\n',
            "stack a: takes recipes",
        ),
        (HEAD + '[recipes.article]\n[stacks]\na = { recipes = ["b"] }\n', "names of [recipes]"),
        (HEAD + "[recipes.article]\n[stacks]\na = 1\n", "stack a"),
        (
            HEAD + '[recipes.article]\n[stacks]\na = { recipes = ["article"], features = "x" }\n',
            "probability or logit",
        ),
        (HEAD.replace("folds = 2", "folds = 1") + RECIPES, "at least 2 folds"),
        (HEAD + "x = 1\n" + RECIPES, "unknown or wrong: x"),
        (HEAD.replace('"axial"', '"axial", "axial"') + RECIPES, "each once"),
        (HEAD.replace('"axial"', '"axial+sagittal", "sagittal+axial"') + RECIPES, "each once"),
        (HEAD.replace('"axial"', '"axial+axial"') + RECIPES, "each once"),
        (HEAD.replace('"axial"', '"oblique"') + RECIPES, "planes = ['oblique']: takes a list"),
        (HEAD.replace('"axial"', "") + RECIPES, "planes = []: takes a list"),
        (HEAD + RECIPES.replace("lr = 1e-3", 'planes = "axial"'), "planes = axial: takes a list"),
        ("=", "not a sweep"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, words):
    path = sweep_file(tmp_path, text)
    assert_one_line_error(run_script("tools/sweep.py", path), path, words)


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
    labels, stacks, recipes = read_results(work / "out")
    assert list(recipes) == ["article", "faster"] and stacks == {
        "both": {"recipes": ["article", "faster"]}
    }
    assert labels["acl"] == {str(i): int(i % 3 == 0) for i in range(18)}
    for name, content in recipes.items():
        assert set(content["networks"]) == {"axial 1", "axial 2"}
        for planes in ("axial",):
            folds = [content["networks"][f"{planes} {n}"] for n in (1, 2)]
            ids = [fold["ids"]["acl"] for fold in folds]
            assert sorted(ids[0] + ids[1]) == sorted(map(str, range(18)))
            assert folds[0]["ids"] == recipes["article"]["networks"][f"{planes} 1"]["ids"]
            assert all(len(fold["valid"]["acl"]) == 8 for fold in folds)
            assert all(
                np.shape(fold["views"]["acl"]) == np.shape(fold["logits"]["acl"])
                and fold["views"] != fold["logits"]
                for fold in folds
            )
            assert all(fold["cpu_seconds"] > 0 and fold["peak_memory"] > 1e8 for fold in folds)
        assert f"| {name} " in done.stdout and f"| {name}, views " in done.stdout
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
    _, _, recipes = read_results(tmp_path / "out")
    for network in recipes["article"]["networks"].values():
        for task in ("acl", "some"):
            assert len(network["ids"][task]) == len(network["logits"][task])
        wanted = [i for i in network["ids"]["acl"] if int(i) % 4 != 1]
        assert network["ids"]["some"] == wanted
    done = run_script("tools/sweep_table.py", tmp_path / "out", "--without", tmp_path / "out")
    assert "without 18 exams" in done.stdout


@pytest.mark.whole
def test_nothing_is_repeated(swept):
    work, _ = swept
    path = work / "out" / "faster.json"
    before = path.read_text()
    content = json.loads(before)
    del content["networks"]["axial 2"]
    path.write_text(json.dumps(content))
    (work / "models" / "acl-axial-fold1of2.pt").touch()  # killed before it was deleted
    done = run_sweep(work)
    assert not list((work / "models").glob("*.pt"))
    assert "1/1  faster, axial, seed 0, fold 2" in done.stdout, done.stderr
    again = json.loads(path.read_text())["networks"]["axial 2"]
    assert again["logits"] == json.loads(before)["networks"]["axial 2"]["logits"]


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
    with held(tmp_path / folder / ".sweep.lock", "busy"):
        done = run_sweep(tmp_path)
    option = {"out": "--out", "models": "--models-dir"}[folder]
    assert_one_line_error(done, tmp_path / folder, "another sweep", option)
    assert not (tmp_path / "models" / "recipes").exists()


def test_a_network_of_another_recipe_is_refused(tmp_path):
    recipe = read_sweep(sweep_file(tmp_path)).recipes["faster"]
    arguments = asdict(Config("acl", "axial", pretrained=False, epochs=1, lr=1e-3, select="last"))
    check_recipe(tmp_path / "m.pt", {"arguments": arguments}, recipe)
    for change, words in (({"lr": 1e-4}, "--lr 0.0001"), ({"clip": 1.0}, "--clip 1.0")):
        with pytest.raises(InputError, match=f"m.pt: was trained with {words}, which is not"):
            check_recipe(tmp_path / "m.pt", {"arguments": arguments | change}, recipe)


def test_results_are_of_one_number_of_views(tmp_path):
    sweep, path = read_sweep(sweep_file(tmp_path)), tmp_path / "article.json"
    Results(tmp_path, sweep, "article").write()
    Results(tmp_path, sweep, "article")
    with pytest.raises(InputError, match="article.json: was made with another views"):
        Results(tmp_path, sweep._replace(views=4), "article")
    content = json.loads(path.read_text())
    del content["views"]  # as an earlier version wrote it
    path.write_text(json.dumps(content))
    assert Results(tmp_path, sweep, "article").content["views"] == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3"])
def test_damaged_results_are_named(tmp_path, text):
    sweep = read_sweep(sweep_file(tmp_path))
    (tmp_path / "article.json").write_text(text)
    with pytest.raises(InputError, match="article.json: damaged"):
        Results(tmp_path, sweep, "article")


@pytest.mark.whole
def test_failures_are_named_and_the_others_go_on(tmp_path):
    write_exams(tmp_path / "data", train=18)
    (tmp_path / "data" / "train" / "coronal" / "0003.npy").write_bytes(b"no volume")
    sweep_file(tmp_path, HEAD + RECIPES.replace("lr = 1e-3", 'planes = ["coronal"]'))
    done = run_sweep(tmp_path)
    assert_one_line_error(done, "2 of 4 networks failed", status=1)
    assert "faster, coronal, seed 0, fold 1, FAILED with status 2" in done.stdout
    assert "0003.npy" in done.stderr
    assert len(json.loads((tmp_path / "out" / "article.json").read_text())["networks"]) == 2


@pytest.mark.whole
def test_a_signal_stops_after_the_step_and_the_time_is_kept(tmp_path):
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
    parts = json.loads((tmp_path / "out" / "article.json").read_text())["times"]
    assert parts["axial 1"]["cpu_seconds"] > 0
    assert len(list((tmp_path / "models").glob("*.state"))) == 2


class FakeRunner:
    """Stands in for Jobs: every training takes 10 s."""

    stopped_by, threads = 0, 1

    def __init__(self):
        self.names = []

    def run(self, jobs):
        for job in jobs:
            self.names.append(job.name)
            yield Done(job, 0, 10.0, 10.0, 10**9)


def test_the_time_of_a_training_is_not_known_after_a_kill(tmp_path, monkeypatch):
    found = {"ids": {"acl": []}, "logits": {"acl": []}}
    monkeypatch.setattr(sweep_module, "predict_out_of_fold", lambda *args: dict(found))
    sweep = read_sweep(sweep_file(tmp_path))
    setting = Setting(tmp_path, tmp_path, tmp_path, True, "cpu", "fp32")
    results = {"article": Results(tmp_path, sweep, "article")}
    first, second = (Network("article", "axial", number) for number in (1, 2))
    for network in (first, second):  # both were interrupted; a SIGTERM let the second be recorded
        sweep.files(tmp_path, network)[1].touch()
    results["article"].add_time(second, {"seconds": 3.0, "cpu_seconds": 2.0})
    train_networks(sweep, [first, second], setting, FakeRunner(), results, {})
    again = Results(tmp_path, sweep, "article")
    assert again.get(first)["cpu_seconds"] is None and again.get(first)["seconds"] is None
    assert again.get(second)["cpu_seconds"] == 12.0 and again.get(second)["seconds"] == 13.0


def test_the_time_before_a_kill_does_not_pass_for_all(tmp_path, monkeypatch):
    """Three sessions: one that a signal ended, one that was killed, and the last; the second
    network waited in all of them. And one whose machine was lost."""
    found = {"ids": {"acl": []}, "logits": {"acl": []}}
    monkeypatch.setattr(sweep_module, "predict_out_of_fold", lambda *args: dict(found))
    sweep = read_sweep(sweep_file(tmp_path))
    setting = Setting(tmp_path, tmp_path, tmp_path, True, "cpu", "fp32")
    first, second = (Network("article", "axial", number) for number in (1, 2))

    class Session(FakeRunner):
        """One second of the first network, and then its end."""

        def __init__(self, end):
            super().__init__()
            self.end = end

        def run(self, jobs):
            (job, *_) = jobs
            sweep.files(tmp_path, first)[1].touch()
            if self.end is Interrupted:
                yield Done(job, 143, 1.0, 1.0, 10**9)
                raise Interrupted(15, "")
            raise self.end

    class Killed(BaseException):
        pass

    for end in (Interrupted, Killed):
        results = {"article": Results(tmp_path, sweep, "article")}
        with pytest.raises(end):
            train_networks(sweep, [first, second], setting, Session(end), results, {})
    results = {"article": Results(tmp_path, sweep, "article")}
    train_networks(sweep, [first, second], setting, FakeRunner(), results, {})
    again = Results(tmp_path, sweep, "article")
    assert again.get(first)["seconds"] is None and again.get(second)["seconds"] == 10.0
    assert "running" not in again.content
    lost = Network("article", "axial", 3)
    again.add_time(lost, {"seconds": None, "cpu_seconds": None})
    again.add_time(lost, {"seconds": 3.0, "cpu_seconds": 3.0})
    assert again.content["times"]["axial 3"] == {"seconds": None, "cpu_seconds": None}


def test_a_job_says_its_status_and_time(tmp_path):
    code = "import sys, time; t = time.process_time()\nwhile time.process_time() < t + 0.5: pass\n"
    jobs = [Job(str(n), ("-c", f"{code}sys.exit({n})"), tmp_path / f"{n}.txt") for n in (0, 3)]
    done = {one.job.name: one for one in Jobs(2).run(jobs)}
    assert {name: one.status for name, one in done.items()} == {"0": 0, "3": 3}
    assert all(0.5 <= one.cpu_seconds < 3 and one.seconds >= 0.5 for one in done.values())
    assert (tmp_path / "3.txt").read_text().startswith("\n$ python -c ")


def test_jobs_do_not_outlive_whoever_takes_their_results(tmp_path):
    quick = Job("quick", ("-c", "pass"), tmp_path / "quick.txt")
    code = f"import time; time.sleep(5); open({str(tmp_path / 'late')!r}, 'w')"
    with pytest.raises(ZeroDivisionError):
        for _ in Jobs(2).run([quick, Job("slow", ("-c", code), tmp_path / "slow.txt")]):
            raise ZeroDivisionError
    time.sleep(6)
    assert not (tmp_path / "late").exists()


# --- the table ------------------------------------------------------------------------------------


def write_results(folder, gains, seeds=1, folds=2, n=400, seed=0):
    """A sweep's results with binormal scores: {recipe: distance of the classes}."""
    rng = np.random.default_rng(seed)
    truth = (np.arange(n) % 5 == 0).astype(int)
    labels = {"acl": {str(i): int(label) for i, label in enumerate(truth)}}
    folder.mkdir()
    (folder / "sweep.json").write_text(json.dumps({"labels": labels, "stacks": {}}))
    knee = rng.standard_normal(n)
    for name, gain in gains.items():
        networks = {}
        for number in range(seeds * folds):
            ids = [i for i in range(n) if i % folds == number % folds]
            logits = gain * truth + knee + 0.3 * rng.standard_normal(n)
            networks[f"axial {number + 1}"] = {
                "ids": [str(i) for i in ids], "logits": {"acl": [logits[i] for i in ids]},
                "cpu_seconds": 10.0 if name == "article" else 5.0, "peak_memory": 1e9,
            }  # fmt: skip
        content = {"folds": folds, "seeds": seeds, "networks": networks}
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def lines(folder):
    labels, stacks, recipes = read_results(folder)
    truth, rows = all_rows(labels, stacks, recipes, "acl")
    return truth, {line.row.recipe: line for line in lines_of(truth, rows)}


def test_the_validation_exams_are_predicted_by_all_folds_and_stacked(tmp_path):
    folder = write_results(tmp_path / "out", {"article": 1.0, "better": 1.5}, seeds=2)
    done = run_script("tools/sweep_valid.py", folder)
    assert_one_line_error(done, "has no labels of the validation exams")
    rng, truth = np.random.default_rng(7), np.repeat([0, 1], [40, 20])
    about = json.loads((folder / "sweep.json").read_text())
    about["valid"] = {"acl": {f"v{i}": int(label) for i, label in enumerate(truth)}}
    about["in_company"] = {"acl": 7}
    (folder / "sweep.json").write_text(json.dumps(about))
    contents = {}
    for name in ("article", "better"):
        content = contents[name] = json.loads((folder / f"{name}.json").read_text())
        networks = content["networks"]
        for key in list(networks):
            networks[key]["valid"] = {"acl": (truth + rng.standard_normal(60)).tolist()}
            logits = [x + rng.standard_normal() for x in networks[key]["logits"]["acl"]]
            other = networks[key] | {"logits": {"acl": logits}}
            other["valid"] = {"acl": (2 * truth + rng.standard_normal(60)).tolist()}
            networks[key.replace("axial", "coronal")] = other
        (folder / f"{name}.json").write_text(json.dumps(content))
    labels, _, recipes = read_results(folder)
    found, rows = all_valid_rows(labels, about["valid"], recipes, "acl")
    assert (found == truth).all() and len(rows) == 6
    row = {(row.recipe, row.column): row for row in rows}["better", "stack"]
    networks, both = contents["better"]["networks"], ("axial", "coronal")
    train, y = np.empty((400, 2)), np.array(list(labels["acl"].values()))
    for column, plane in enumerate(both):  # of the second seed
        for number in (3, 4):
            network = networks[f"{plane} {number}"]
            train[np.array(network["ids"], int), column] = expit(network["logits"]["acl"])
    valid = np.transpose([
        np.mean([expit(networks[f"{plane} {n}"]["valid"]["acl"]) for n in (3, 4)], axis=0)
        for plane in both
    ])  # fmt: skip
    expected = LogisticRegression().fit(train, y).predict_proba(valid)[:, 1]
    assert row.scores[1] == pytest.approx(expected)
    done = run_script("tools/sweep_valid.py", folder)
    assert "acl: 60 validation exams, 20 positive" in done.stdout
    assert "7 of the 400 exams share a group" in run_script("tools/sweep_table.py", folder).stdout


def test_exams_that_chose_the_recipes_are_left_out(tmp_path):
    folder = write_results(tmp_path / "out", {"article": 1.0, "better": 1.5})
    search = tmp_path / "search"
    shutil.copytree(folder, search)
    for path in search.glob("*.json"):
        content = json.loads(path.read_text())
        if "networks" in content:  # the search saw fold 1 only
            content["networks"] = {"axial 1": content["networks"]["axial 1"]}
            path.write_text(json.dumps(content))
    networks = json.loads((folder / "better.json").read_text())["networks"]
    labels, stacks, recipes = read_results(folder)
    truth, rows = all_rows(labels, stacks, recipes, "acl")
    rows, out = leave_out(rows, labels["acl"], search)
    assert out.sum() == len(networks["axial 1"]["ids"])
    (line,) = [one for one in lines_of(truth, rows) if one.row.recipe == "better"]
    rest = networks["axial 2"]
    expected = roc_auc_score(truth[np.array(rest["ids"], int)], rest["logits"]["acl"])
    assert line.aucs == pytest.approx([expected]) and line.in_folds == pytest.approx(expected)
    done = run_script("tools/sweep_table.py", folder, "--without", search)
    assert f"{len(rest['ids'])} exams" in done.stdout
    done = run_script("tools/sweep_table.py", folder, "--without", tmp_path)
    assert_one_line_error(done, "no results of a sweep")


def test_a_row_of_the_table(tmp_path):
    folder = write_results(tmp_path / "out", {"article": 1.0, "better": 1.5}, seeds=2)
    truth, found = lines(folder)
    networks = json.loads((folder / "better.json").read_text())["networks"]
    aucs, inside, briers = [], [], []
    for seed in (0, 1):
        scores = np.empty(len(truth))
        for fold in (1, 2):
            network = networks[f"axial {2 * seed + fold}"]
            rows = np.array(network["ids"], int)
            scores[rows] = network["logits"]["acl"]
            inside.append(roc_auc_score(truth[rows], scores[rows]))
        aucs.append(roc_auc_score(truth, scores))
        briers.append(brier_score_loss(truth, expit(scores)))
    line = found["better"]
    assert line.aucs == pytest.approx(aucs) and line.in_folds == pytest.approx(np.mean(inside))
    assert line.brier == pytest.approx(np.mean(briers)) and line.time == 0.5
    gains = np.subtract(aucs, found["article"].aucs)
    assert line.gain.value == pytest.approx(gains.mean()) and line.gain.p < 0.05
    assert line.gain.low < gains.min() and line.adjusted == line.gain.p
    assert found["article"].gain is None


@pytest.mark.parametrize("unknown, time", [((1,), "0.50"), ((1, 2), "–")])
def test_times_that_are_not_known_are_left_out_of_the_mean(tmp_path, unknown, time):
    folder = write_results(tmp_path / "out", {"article": 1.0, "better": 1.5})
    content = json.loads((folder / "better.json").read_text())
    for number in unknown:
        content["networks"][f"axial {number}"]["cpu_seconds"] = None
    (folder / "better.json").write_text(json.dumps(content))
    _, found = lines(folder)
    assert found["better"].cells()[HEADS.index("time")] == time
    assert found["article"].cells()[HEADS.index("time")] == "1.00"
    drawn = {name for name, _ in cost_points(found.values())}
    assert drawn == ({"article"} if time == "–" else {"article", "better"})


@pytest.mark.parametrize("folds", [[1] * 8 + [2] * 4, [1, 2] * 4 + [3] * 4, range(1, 13)])
def test_a_fold_of_one_class_is_left_out(folds):
    truth = np.array([0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0])
    scores, folds = np.random.default_rng(0).random(12), np.array(folds)
    found = auc_in_folds(truth, Row("a", "axial", scores[None], folds[None], [1.0], 0.0))
    each = [roc_auc_score(truth[folds == k], scores[folds == k])
            for k in set(folds) if len(set(truth[folds == k])) == 2]  # fmt: skip
    wanted = np.mean(each) if each else np.nan
    assert found == pytest.approx(wanted, nan_ok=True)


def test_seeds_widen_the_interval_of_their_own_row_alone(tmp_path):
    gains = {"article": 1.0, "again": 1.0, "steady": 1.0}
    folder = write_results(tmp_path / "out", gains, seeds=3)
    labels, stacks, recipes = read_results(folder)
    recipes["steady"] = recipes["article"]  # its difference does not vary
    truth, rows = all_rows(labels, stacks, recipes, "acl")
    found = {row.recipe: row for row in rows}
    wanted = mean_auc_difference(truth, found["again"].scores, found["article"].scores)
    gains = {line.row.recipe: line.gain for line in lines_of(truth, rows) if line.gain}
    assert gains["again"] == wanted and gains["steady"] == (0, 0, 0, 1)


def test_what_is_clearly_behind_is_dropped_but_never_the_article(tmp_path):
    gains = {"article": 0.2, "good": 1.5, "as-good": 1.5, "bad": 0.2}
    assert dropped_recipes(write_results(tmp_path / "out", gains)) == {"bad"}


def test_what_was_dropped_stays_so_when_the_sweep_goes_on(tmp_path, monkeypatch):
    gains = {"article": 0.2, "good": 1.5, "bad": 0.2}
    folder = write_results(tmp_path / "out", gains)
    text = HEAD + "".join(f"[recipes.{name}]\n" for name in gains)
    sweep, taken = read_sweep(sweep_file(tmp_path, text)), {}
    for name in gains:  # interrupted after the first fold
        content = json.loads((folder / f"{name}.json").read_text())
        taken[name] = content["networks"].pop("axial 2")
        content |= {"task": "acl", "protocol": "article", "recipe": {}}
        (folder / f"{name}.json").write_text(json.dumps(content))
    monkeypatch.setattr(sweep_module, "predict_out_of_fold", lambda _, n, *more: taken[n.recipe])
    monkeypatch.setattr(sweep_module, "write_about", lambda *args: None)
    setting = Setting(tmp_path, folder, tmp_path / "models", True, "cpu", "fp32")
    about = {"git": "", "versions": {}, "machine": ""}
    runner = FakeRunner()
    run_rounds(sweep, setting, runner, True, about)
    assert runner.names == ["article, axial, seed 0, fold 2", "good, axial, seed 0, fold 2"]
    again = FakeRunner()
    run_rounds(sweep, setting, again, True, about)
    assert again.names == []


def test_equal_recipes_are_seldom_dropped(tmp_path):
    """Twelve as good as each other, one column, one fold: without the division by their number
    most of such sweeps drop some."""
    names = ["article", *(f"r{k}" for k in range(12))]
    dropped = [
        len(dropped_recipes(write_results(tmp_path / str(seed), dict.fromkeys(names, 1.0), n=150,
                                          folds=1, seed=seed)))
        for seed in range(12)
    ]  # fmt: skip
    assert np.count_nonzero(dropped) <= 3


def test_precisions_side_by_side_are_said(tmp_path):
    folder = write_results(tmp_path / "out", {"article": 1.0, "better": 1.5})
    assert "by precision" not in run_script("tools/sweep_table.py", folder).stdout
    content = json.loads((folder / "better.json").read_text())
    for network in content["networks"].values():
        network["precision"] = "bf16"
    (folder / "better.json").write_text(json.dumps(content))
    assert "by precision: bf16 2, not known 2" in run_script("tools/sweep_table.py", folder).stdout


def test_recipes_in_part_are_compared_on_the_exams_of_both(tmp_path):
    folder = write_results(tmp_path / "out", {"article": 1.0, "part": 1.5})
    content = json.loads((folder / "part.json").read_text())
    del content["networks"]["axial 2"]
    (folder / "part.json").write_text(json.dumps(content))
    truth, found = lines(folder)
    even = np.arange(len(truth)) % 2 == 0
    row, base = found["part"].row.scores[0], found["article"].row.scores[0]
    wanted = roc_auc_score(truth[even], row[even]) - roc_auc_score(truth[even], base[even])
    assert found["part"].gain.value == pytest.approx(wanted)


def keep_seeds(path, seeds, folds=2):
    """Let a recipe's file be of a sweep of so many seeds."""
    content = json.loads(path.read_text())
    keys = [f"axial {number + 1}" for number in range(seeds * folds)]
    content |= {"seeds": seeds, "networks": {key: content["networks"][key] for key in keys}}
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("fewer", ["article", "better"])
def test_recipes_of_different_numbers_of_seeds_are_compared_on_those_of_both(
    tmp_path, seeds, fewer
):
    folder = write_results(tmp_path / "out", {"article": 1.0, "better": 1.5}, seeds=3)
    _, whole = lines(folder)
    keep_seeds(folder / f"{fewer}.json", seeds)
    _, found = lines(folder)
    counts = {name: len(line.aucs) for name, line in found.items()}
    assert counts == {"article": 3, "better": 3} | {fewer: seeds}
    each = np.subtract(whole["better"].aucs, whole["article"].aucs)[:seeds]
    assert found["better"].gain.value == pytest.approx(each.mean())


def test_a_sweep_that_was_given_fewer_seeds_keeps_those_that_there_are(tmp_path):
    folder = write_results(tmp_path / "out", {"article": 1.0, "better": 1.5}, seeds=3)
    _, whole = lines(folder)
    for path in folder.glob("[ab]*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"seeds": 1}))
    _, found = lines(folder)
    assert found["better"].aucs == whole["better"].aucs
    assert found["better"].gain == whole["better"].gain


def test_a_stack_of_averaged_seeds_is_compared_with_each_seed(tmp_path):
    folder = write_results(tmp_path / "out", {"article": 1.0, "other": 1.0, "more": 1.0}, seeds=3)
    keep_seeds(folder / "more.json", 2)
    about = json.loads((folder / "sweep.json").read_text())
    stacks = {"mean": {"recipes": ["article", "other"], "average_seeds": True}}
    (folder / "sweep.json").write_text(json.dumps(about | {"stacks": stacks}))
    labels, stacks, recipes = read_results(folder)
    truth, rows = all_rows(labels, stacks, recipes, "acl")
    rows = {row.recipe: row._replace(column="axial") for row in rows}
    (line,) = [one for one in lines_of(truth, list(rows.values())) if one.row.recipe == "mean"]
    (scores,) = rows["mean"].scores
    gains = [roc_auc_score(truth, scores) - roc_auc_score(truth, one)
             for one in rows["article"].scores]  # fmt: skip
    assert line.gain.value == pytest.approx(np.mean(gains)) and line.time == 4.5
    parts = [rows[name] for name in ("article", "more")]
    assert stack_row("two", parts, truth, average_seeds=True).cpu_seconds == [(10 + 5) * 2]


def test_recipes_of_different_numbers_of_seeds_are_stacked_by_the_seeds_of_both(tmp_path):
    folder = write_results(tmp_path / "out", {"article": 1.0, "other": 1.0}, seeds=3)
    keep_seeds(folder / "other.json", 2)
    about = json.loads((folder / "sweep.json").read_text())
    stacks = {"both": {"recipes": ["article", "other"]}}
    (folder / "sweep.json").write_text(json.dumps(about | {"stacks": stacks}))
    _, found = lines(folder)
    assert len(found["both"].aucs) == 2 and len(found["article"].aucs) == 3


def test_a_seed_that_has_only_begun_waits(tmp_path):
    folder = write_results(tmp_path / "out", {"article": 1.0, "better": 1.5}, seeds=2)
    _, whole = lines(folder)
    for name in ("article", "better"):
        path = folder / f"{name}.json"
        content = json.loads(path.read_text())
        del content["networks"]["axial 4"]  # seed 1, fold 2
        path.write_text(json.dumps(content))
    _, found = lines(folder)
    assert found["better"].aucs == whole["better"].aucs[:1]
    gain = whole["better"].aucs[0] - whole["article"].aucs[0]
    assert found["better"].gain.value == pytest.approx(gain)  # on all exams, not on half of them
    done = run_script("tools/sweep_table.py", folder)
    assert "left out: better, axial, seed 1: 200 exams of 400 so far" in done.stdout, done.stderr


def test_recipes_without_a_complete_seed_in_common_have_no_difference(tmp_path):
    folder = write_results(tmp_path / "out", {"article": 1.0, "better": 1.5}, seeds=2)
    for name, lost in (("article", "axial 4"), ("better", "axial 2")):
        path = folder / f"{name}.json"
        content = json.loads(path.read_text())
        del content["networks"][lost]
        path.write_text(json.dumps(content))
    _, found = lines(folder)
    assert found["better"].gain is None and len(found["better"].aucs) == 1


def test_a_stack_never_sees_the_labels_of_its_own_fold(tmp_path):
    folder = write_results(tmp_path / "out", {"article": 1.0, "other": 1.0})
    labels, stacks, recipes = read_results(folder)
    truth, rows = all_rows(labels, stacks, recipes, "acl")
    before = stack_row("both", rows, truth)
    first = before.folds[0] == 1
    changed = np.where(first, 1 - truth, truth)
    after = stack_row("both", rows, changed)
    np.testing.assert_array_equal(before.scores[0, first], after.scores[0, first])
    assert (before.scores[0, ~first] != after.scores[0, ~first]).all()
    assert roc_auc_score(truth, before.scores[0]) > 0.7


def test_each_finding_has_a_picture(tmp_path):
    folder = write_results(tmp_path / "out", {"article": 1.0, "better": 1.5})
    done = run_script("tools/sweep_table.py", folder, "--plot", tmp_path / "one.png")
    assert done.returncode == 0 and [p.name for p in tmp_path.glob("*.png")] == ["one.png"]
    for path in folder.glob("*.json"):
        content = json.loads(path.read_text())
        for network in content.get("networks", {}).values():
            network["logits"]["other"] = network["logits"]["acl"]
        if "labels" in content:
            content["labels"]["other"] = content["labels"]["acl"]
        path.write_text(json.dumps(content))
    done = run_script("tools/sweep_table.py", folder, "--plot", tmp_path / "two.png")
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.glob("two*")} == {"two-acl.png", "two-other.png"}


def test_labels_without_information_give_no_auc(tmp_path):
    folder = write_results(tmp_path / "out", {"article": 0.0, "other": 0.0})
    labels, stacks, recipes = read_results(folder)
    truth, rows = all_rows(labels, stacks, recipes, "acl")
    assert abs(roc_auc_score(truth, stack_row("both", rows, truth).scores[0]) - 0.5) < 0.07
