"""The report of a run: its figures are those of results.json, and names stay text."""

import csv
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import assert_one_line_error, run_script

from mrnet.errors import InputError
from mrnet.networks.saved import digest_of
from mrnet.reports import report
from mrnet.reports.model_card import Subject, worst_of, write_card
from mrnet.reports.report import mistakes_of, subgroup, weights_of, write_report
from mrnet.stacking.results import Results, read_results
from mrnet.training.config import read_recipe


class Page(HTMLParser):
    """The figures of a page, its tags and its text."""

    def __init__(self, text):
        super().__init__()
        self.figures, self.tags, self.text, self.value = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.value = dict(attributes)["value"] if tag == "data" else None

    def handle_data(self, data):
        if self.value is not None:
            self.figures.append((self.value, data))
            self.value = None
        self.text.append(data)


@pytest.fixture(scope="module")
def work(trained, tmp_path_factory):
    """A copy of the trained models, which these tests write into."""
    copy = tmp_path_factory.mktemp("report") / "work"
    shutil.copytree(trained[0], copy)
    return copy


def make(work, *more):
    out = work / "report" / "report.html"
    done = run_script("tools/report.py", work / "models", "--out", out, *more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"report     {out}")
    return out.read_text(), done.stdout


def numbers_in(value):
    if isinstance(value, dict | list):
        return {n for one in (value.values() if isinstance(value, dict) else value)
                for n in numbers_in(one)}  # fmt: skip
    return {value} if isinstance(value, int | float) and not isinstance(value, bool) else set()


def test_figures_are_those_of_the_results(work):
    text, _ = make(work)
    page = Page(text)
    results = json.loads((work / "models/acl-results.json").read_text())
    stack = json.loads((work / "models/acl-stack.json").read_text())
    with open(work / "models/acl-predictions.csv") as file:
        predicted = {float(row["stack"]) for row in csv.DictReader(file)}
    known = numbers_in(results["valid"]) | numbers_in(stack["combinations"]) | predicted
    shown = {float(value) for value, _ in page.figures}
    assert len(shown - known) == 1  # minutes, of the models
    for value, written in page.figures:
        assert float(written.replace("−", "-")) == pytest.approx(float(value), abs=0.051)
    for row in results["valid"].values():
        for name in ("auc", "auc_low", "auc_high", "sensitivity", "specificity", "tp", "fn", "fp"):
            assert name not in row or row[name] in shown
    for column, row in results["valid"].items():
        if "auc" in row:
            assert f"{row['auc']:.3f}" in "".join(page.text), column
    assert "script" not in page.tags and len(text) < 3e6
    assert not re.search(r"https?://(?!www\.w3\.org)", text)  # offline: names of XML only


def test_made_twice_the_same_but_for_the_time(work):
    once, _ = make(work)
    again, _ = make(work)
    assert re.sub(r"Made [^.]*", "", once) == re.sub(r"Made [^.]*", "", again)


def test_pictures_of_mistakes_say_that_right_knees_are_mirrored(work, tmp_path):
    results = read_results(work / "models/acl-results.json")
    for mirrored in (False, True):
        networks = [
            (column, metadata | {"dataset": metadata["dataset"] | {"mirrored": mirrored}})
            for column, metadata in results.networks
        ]
        write_report([results._replace(networks=networks)], tmp_path / "report.html")
        text = (tmp_path / "report.html").read_text()
        assert ("are shown mirrored, as left ones" in text) == mirrored


def test_mistakes_are_the_worst_first(work):
    results = read_results(work / "models/acl-results.json")
    text, _ = make(work)
    assert text.count("data:image/jpeg") == 3 * len(mistakes_of(results))
    threshold = results.rows["stack"]["threshold"]
    labels, scores = np.array([1, 0] * 5), threshold + np.array([-3, 1, -1, 3, -2, 2, 1, -1, 0, 0])
    others = results._replace(ids=list("abcdefghij"), labels=labels, scores={"stack": scores},
                              networks=[])  # fmt: skip
    # Exams at the threshold are called positive: i is found, j is a false alarm.
    missed = [(row, "false negative") for row in (0, 4, 2)]
    alarms = [(row, "false positive") for row in (3, 5, 1, 9)]
    assert mistakes_of(others, most=4) == missed + alarms
    assert mistakes_of(others, most=2) == missed[:2] + alarms[:2]


def test_the_surest_mistakes_are_those_that_are_counted():
    """An exam without coronal slices has the threshold of axial alone."""
    networks = [(plane, {"plane": plane}) for plane in ("axial", "coronal")]
    others = {"b": 0.7, "e": 0.7}
    scores = {"axial": np.full(6, 0.5), "coronal": np.array([0.1, np.nan, 0.1, 0.9, np.nan, 0.9]),
              "stack": np.array([0.3, 0.6, 0.35, 0.5, 0.65, 0.9])}  # fmt: skip
    rows = {"stack": {"auc": 0.5, "threshold": 0.4}, "coronal": {"auc": 0.5, "threshold": 0.9}}
    results = Results(
        folder=None, task="acl", content={"valid": rows, "other_thresholds": others},
        ids=list("abcdef"),
        labels=np.array([1.0, 1, 1, 0, 0, 0]), scores=scores,
        train_ids=None, train_labels=None, train_scores=None,
        stack=None, networks=networks,
    )  # fmt: skip
    assert results.called.tolist() == [False, False, False, True, False, True]
    assert worst_of(results, "stack") == {"missed": 0.3, "alarm": 0.9}
    labels = np.array([1.0, 1, 0, 0, 0, 1])
    assert worst_of(results._replace(labels=labels), "stack") == {"missed": 0.3, "alarm": 0.5}
    assert worst_of(results, "coronal") == {"missed": 0.1, "alarm": 0.9}


def test_the_card_of_a_network_counts_the_exams_that_it_was_trained_on(work, tmp_path):
    results = read_results(work / "models/acl-results.json")
    column, metadata = results.networks[0]
    labels = np.array([1.0, 0, 1, 0, 1, 0, 1, 0])
    p = np.where(np.arange(8) == 7, np.nan, 0.5)  # exam 17 has no such plane
    results = results._replace(
        train_ids=[str(n) for n in range(10, 18)], train_labels=labels, train_scores={column: p}
    )
    data = shutil.copytree(work / "data", tmp_path / "data")
    (data / "train-groups.csv").write_text("10,Anna\n11,Anna\n12,Berta\n14,Carla\n15,Carla\n")
    content = results.content | {"arguments": {"data_dir": str(data)}}
    results = results._replace(content=content)

    def row(**more):
        network = [(column, metadata | more)]
        write_card(Subject("acl-axial", "acl", network, column, results, ""), "onnx", "m.onnx",
                   tmp_path / "README.md")  # fmt: skip
        lines = (tmp_path / "README.md").read_text().splitlines()
        return next(line for line in lines if line.startswith("| training exams"))

    # Exams 10 to 16 have the plane; 10, 12, 14 and 16 are positive.
    assert row() == "| training exams | 7, 4 positive, of 3 groups |"
    held_out = {"out_of_fold": ["10", "11"], "tuning": ["16"]}
    assert row(**held_out) == "| training exams | 4, 2 positive, of 2 groups |"
    stack = Subject("acl-stack", "acl", results.networks, "stack", results, "")
    write_card(stack, "onnx", "m.onnx", tmp_path / "README.md")
    assert "| training exams | 8, 4 positive, of 3 groups |" in (tmp_path / "README.md").read_text()


def test_the_weights_are_those_of_the_regression_of_most_planes():
    """With plane dropout a joint network is the one column of every set of planes."""
    sets = {"axial": 1.0, "coronal": 2.0, "axial+coronal": 3.0}
    combinations = {
        planes: {"columns": ["axial+coronal"], "coefficients": [weight], "intercept": -weight}
        for planes, weight in sets.items()
    }
    found = weights_of({"combinations": combinations})
    assert found == {"axial+coronal": 3.0, "intercept": -3.0}


def test_subgroups(work):
    results = read_results(work / "models/acl-results.json")
    everyone = subgroup(results, "all", "", np.ones(len(results.ids), bool))
    row = results.rows["stack"]
    assert everyone.auc == pytest.approx([row[f"auc{end}"] for end in ("", "_low", "_high")])
    assert everyone.sensitivity.value == pytest.approx(row["sensitivity"])
    assert everyone.specificity.value == pytest.approx(row["specificity"])
    negative = subgroup(results, "all", "", results.labels == 0)
    assert negative.auc is None and negative.sensitivity is None and negative.positives == 0


HOSTILE = "<script>alert(1)</script>"


def test_names_stay_text_and_what_is_left_out_is_said(work, monkeypatch):
    monkeypatch.setattr(report, "MOST_VALUES", 9)  # each of the ten exams has an age of its own
    metadata = work / "metadata.csv"
    results = read_results(work / "models/acl-results.json")
    rows = [f'{i},"{HOSTILE}",{n},=1+1\x07\n' for n, i in enumerate(results.ids)]
    rows[0] = f"{results.ids[0]},=HYPERLINK(),0,other\n"
    metadata.write_text("id,<b>site</b>,age,sex\n" + "".join(rows))
    text, said = make(work, "--metadata", metadata)
    page = Page(text)
    assert "script" not in page.tags and "b" not in page.tags
    assert HOSTILE in page.text and "<b>site</b>" in page.text
    assert "at the threshold for the planes that an exam has" in text
    assert "intervals that overlap do not show that there is no difference" in text
    assert "left out  acl: no subgroups by age" in said and "no subgroups by age" in text


def test_pages_are_linked(work):
    exam = read_results(work / "models/acl-results.json")
    row, _ = mistakes_of(exam)[0]
    pages = work / "pages"
    pages.mkdir()
    (pages / f"{int(exam.ids[row]):04d}-acl.html").write_text("")
    text, _ = make(work, "--pages", pages)
    assert f'href="../pages/{int(exam.ids[row]):04d}-acl.html#acl"' in text


def test_checklist_has_every_item(work):
    make(work)
    text = (work / "report/claim.md").read_text()
    assert re.findall(r"^(\d+)\. ", text, re.M) == [str(n) for n in range(1, 45)]
    row = json.loads((work / "models/acl-results.json").read_text())["valid"]["stack"]
    assert f"AUC {row['auc']:.3f}" in text and "**TO DO:**" in text


def test_a_folder_gets_the_report(work, tmp_path):
    done = run_script("tools/report.py", work / "models/acl-results.json", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "claim.md"}


@pytest.mark.whole
def test_a_checklist_that_was_edited_is_kept(work, tmp_path):
    found = [read_results(work / "models/acl-results.json")]
    out, checklist = tmp_path / "report.html", tmp_path / "claim.md"
    for _ in range(2):  # its own is replaced
        assert not [line for line in write_report(found, out) if "claim.md" in line]
    for text in (checklist.read_text().replace("**TO DO:** the title.", "Knees"), "my own claim\n"):
        checklist.write_text(text)
        out.unlink()
        (line,) = [line for line in write_report(found, out) if "claim.md" in line]
        assert "kept" in line and checklist.read_text() == text and out.exists()


@pytest.mark.whole
def test_groups_in_both_splits_are_said_in_report_card_and_checklist(work, tmp_path):
    results = read_results(work / "models/acl-results.json")
    data = shutil.copytree(work / "data", tmp_path / "data")
    content = results.content | {"arguments": {"data_dir": str(data)}}
    results = results._replace(content=content)

    def texts():
        write_report([results], tmp_path / "report.html")
        subject = Subject("acl-stack", "acl", results.networks, "stack", results, "")
        write_card(subject, "onnx", "acl-stack.onnx", tmp_path / "README.md")
        return [(tmp_path / n).read_text() for n in ("report.html", "claim.md", "README.md")]

    def write_groups(split, ids, groups):
        # Exam 900 has no label of this finding: its group is nothing to it.
        rows = [*zip(ids, groups, strict=False), (900, "Emma")]
        (data / f"{split}-groups.csv").write_text("".join(f"{i},{g}\n" for i, g in rows))

    write_groups("train", results.train_ids, ["Anna", "Berta", "Berta", "Carla"])
    page, claim, card = texts()
    assert "3 groups, not known whether validation exams are of them" in page
    assert "as no valid-groups.csv lists them" in claim and "BOTH" not in page + claim + card
    assert "of 3 groups" in card
    write_groups("valid", results.ids, ["Berta", "Carla", "Dora"])
    found = texts()
    assert all("2 groups are in BOTH splits" in text for text in found)
    assert "none split" not in found[0] and "positive, 3 groups</dd>" in found[0]
    write_groups("valid", results.ids, ["Dora", "Dora"])
    page, claim, card = texts()
    assert "3 groups, none split" in page and "BOTH" not in page + claim + card
    assert "*-groups.csv (3 in training)." in claim


def test_a_run_of_last_epochs_is_not_said_to_be_selected(work, tmp_path):
    results = read_results(work / "models/acl-results.json")

    def texts(**arguments):
        networks = [(column, metadata | {"arguments": metadata["arguments"] | arguments})
                    for column, metadata in results.networks]  # fmt: skip
        changed = results._replace(networks=networks)
        write_report([changed], tmp_path / "report.html", tmp_path / "gone")
        subject = Subject("acl-stack", "acl", networks, "stack", changed, "")
        write_card(subject, "onnx", "acl-stack.onnx", tmp_path / "README.md")
        return [(tmp_path / n).read_text() for n in ("report.html", "claim.md", "README.md")]

    page, claim, card = texts()
    assert "exams reported here also selected the epochs (the article's protocol)." in page
    assert "the epoch with the best AUC on the validation exams themselves (optimistic)." in claim
    assert "protocol article, which is optimistic: the same exams chose the epochs." in card
    last = {"select": "last", "epochs": 8, "patience": 8, "lr_scheduler": "cosine"}
    page, claim, card = texts(**last)
    assert 'class="banner">Optimistic' not in page and "that select the epoch" not in page
    assert "26. Selection of the final model: none, the last epoch.\n" in claim
    assert "protocol article." in card
    page, claim, card = texts(**last | {"patience": 3})
    assert "also stopped the training (the article's protocol)." in page
    assert "none, the last epoch, though the validation exams themselves (optimistic) s" in claim
    assert "optimistic: the same exams stopped the training." in card


@pytest.mark.whole
def test_recipes_and_findings_that_differ_are_told_apart(work, tmp_path):
    results = read_results(work / "models/acl-results.json")

    def changed(task, train_labels, *arguments, **dataset):
        networks = [
            (column, about | {"arguments": about["arguments"] | read_recipe("article")[1] | more,
                              "dataset": about["dataset"] | dataset})
            for (column, about), more in zip(results.networks, arguments, strict=True)
        ]  # fmt: skip
        return results._replace(task=task, train_labels=train_labels, networks=networks)

    def text(*found):
        write_report(found, tmp_path / "report.html", tmp_path / "gone")
        return [(tmp_path / name).read_text() for name in ("report.html", "claim.md")]

    article, fast = {}, {"epochs": 4, "lr": 1e-4}
    cyst = changed("cyst", np.ones(7), article, fast, fast)
    page, claim = text(cyst)
    words = "beyond the article: coronal, sagittal: lr 0.0001, epochs 4"
    assert words in page and words in claim
    assert "refused." in claim and "21. Sample size. 7 training and 10 validation exams, " in claim
    page, claim = text(changed("acl", np.ones(9), *[fast] * 3, may_lack_planes=True), cyst)
    assert page.count("article: lr 0.0001, epochs 4<") == page.count(f"{words}<") == 1
    assert "acl: 9 training and 10 validation exams; cyst: 7 training and 10 val" in claim
    assert "; acl: an exam that lacks a plane is left out of the networks that need it" in claim
    assert "; cyst: a plane that is missing is refused.\n" in claim
    assert "acl: recipe article; beyond the article: lr 0.0001, epochs 4; aug" in claim
    assert "27. Ensembles: 3 networks a finding, stacked on probabilities.\n" in claim
    page, claim = text(changed("acl", np.ones(9), article, article, article))
    assert "beyond the article" not in page + claim


def test_what_is_not_there_in_one_line(work, tmp_path):
    assert_one_line_error(run_script("tools/report.py", tmp_path), str(tmp_path), "results")
    (tmp_path / "acl-results.json").write_text("[]")
    assert_one_line_error(run_script("tools/report.py", tmp_path), "acl-results.json", "damaged")
    (tmp_path / "m.csv").write_text("exam,site\n1,a\n")
    done = run_script("tools/report.py", work / "models", "--metadata", tmp_path / "m.csv")
    assert_one_line_error(done, "m.csv", "id,site")
    (tmp_path / "m.csv").write_text("id,site\n1,a\n0001,b\n")
    done = run_script("tools/report.py", work / "models", "--metadata", tmp_path / "m.csv")
    assert_one_line_error(done, "m.csv", "line 3: exam 1 is there twice")


@pytest.mark.whole
def test_a_report_of_other_exams_with_the_same_numbers(work, tmp_path):
    data = shutil.copytree(work / "data", tmp_path / "data")
    (data / "valid-groups.csv").write_text("".join(f"{n},{n % 2}\n" for n in range(100)))
    text, said = make(work, "--data-dir", data)
    assert "data:image/jpeg" in text and "no pictures" not in said and "<td>group</td>" in text
    path = sorted((data / "valid" / "axial").iterdir())[0]
    np.save(path, 255 - np.load(path))
    text, said = make(work, "--data-dir", data)
    assert "data:image/jpeg" not in text and "has other exams or labels than those" in said
    assert "<td>group</td>" not in text


def test_networks_that_were_trained_again_are_not_reported_with_old_figures(work, tmp_path):
    models = shutil.copytree(work / "models", tmp_path / "models")
    read_results(models / "acl-results.json")
    stack = json.loads((models / "acl-stack.json").read_text())
    content = json.loads((models / "acl-results.json").read_text())
    shutil.copy(models / "acl-axial.pt", models / "acl-coronal.pt")
    with pytest.raises(InputError, match="acl-coronal.pt"):
        read_results(models / "acl-results.json")
    saved = torch.load(work / "models/acl-axial.pt", weights_only=True)
    saved["metadata"]["epoch"] += 1
    torch.save(saved, models / "acl-axial.pt")
    shutil.copy(work / "models/acl-coronal.pt", models / "acl-coronal.pt")
    with pytest.raises(InputError, match="acl-axial.pt: trained again after the stack was fitted"):
        read_results(models / "acl-results.json")
    shutil.copy(work / "models/acl-axial.pt", models / "acl-axial.pt")
    stack["digests"]["acl-axial.pt"] = "0" * 64
    (models / "acl-stack.json").write_text(json.dumps(stack))
    with pytest.raises(InputError, match="acl-results.json: not of the stack beside it"):
        read_results(models / "acl-results.json")
    del content["digests"]
    (models / "acl-results.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="acl-results.json: damaged, or of another version"):
        read_results(models / "acl-results.json")


def edit_results(change):
    def edit(folder):
        path = folder / "acl-results.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


def edit_predictions(old, new):
    def edit(folder):
        path, results = folder / "acl-predictions.csv", folder / "acl-results.json"
        path.write_text(re.sub(old, new, path.read_text(), count=1, flags=re.M))
        content = json.loads(results.read_text())
        content["predictions"] = digest_of(path)
        results.write_text(json.dumps(content))

    return edit


@pytest.mark.parametrize(
    "edit, words",
    [
        (edit_results(lambda c: c["valid"]["axial"].update(auc="x")), "valid.axial.auc: a number"),
        (edit_results(lambda c: c["valid"]["stack"].pop("fn")), "valid.stack.fn is missing"),
        (edit_results(lambda c: c.update(valid=[])), "valid: an object is expected"),
        (edit_results(lambda c: c["valid"]["axial"].update(ece=float("nan"))), "NaN is not a fin"),
        (edit_results(lambda c: c["arguments"].update(data_dir=7)), "arguments.data_dir: a text"),
        (edit_results(lambda c: c["digests"].update({"../x.pt": "0" * 64})), "digests, a key"),
        (edit_results(lambda c: c.update(extra=1)), "extra is not known here"),
        (edit_results(lambda c: c.update(caveats="none")), "caveats: a list is expected"),
        (edit_results(lambda c: c["valid"]["axial"].update(auc=0.123)), "valid.axial.auc: 0.123"),
        (edit_results(lambda c: c["valid"]["stack"].update(fn=99)), "valid.stack.fn: 99, a"),
        (edit_results(lambda c: c["valid"]["stack"].update(threshold=0.4)), "not the stack's"),
        (edit_predictions("^valid,(.*),[^,]+$", r"valid,\1,abc"), "'abc' is not from 0 to 1"),
        (edit_predictions("^valid,(.*),[^,]+$", r"valid,\1,nan"), "'nan' is not from 0 to 1"),
        (edit_predictions("^valid,(.*),[^,]+$", r"valid,\1,0.00000001"), "valid.stack."),
        (edit_predictions("^(valid,.*),1,", r"\1,0,"), "valid.axial.positives"),
        (edit_predictions("^valid,[0-9]+,", "valid,x,"), "or is no number"),
    ],
)  # fmt: skip
def test_damaged_and_edited_results_are_refused_in_one_line(work, tmp_path, edit, words):
    models = shutil.copytree(work / "models", tmp_path / "models")
    edit(models)
    done = run_script("tools/report.py", models, "--out", tmp_path / "report.html")
    assert_one_line_error(done, str(models), words)
    assert not (tmp_path / "report.html").exists()


def test_predictions_that_were_edited_are_refused(work, tmp_path):
    """Two positive exams change places, which changes no figure."""
    models = shutil.copytree(work / "models", tmp_path / "models")
    text = (models / "acl-predictions.csv").read_text()
    first, second = re.findall("^valid,([0-9]+),1,", text, re.M)[:2]
    text = text.replace(f"valid,{first},", "valid,x,").replace(
        f"valid,{second},", f"valid,{first},"
    )
    (models / "acl-predictions.csv").write_text(text.replace("valid,x,", f"valid,{second},"))
    with pytest.raises(InputError, match="acl-predictions.csv: edited, or not of acl-results.json"):
        read_results(models / "acl-results.json")


def test_a_report_without_the_exams_says_so(work, tmp_path):
    text, said = make(work, "--data-dir", tmp_path / "gone")
    assert "data:image/jpeg" not in text
    assert "no pictures" in said and "No pictures" in text
