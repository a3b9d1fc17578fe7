"""explain.py --all: the index over a folder's exams, and several findings of one exam in tabs."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
import pytest
import torch
from conftest import (
    PLANES,
    ROOT,
    assert_one_line_error,
    page_content,
    run_process,
    run_script,
    write_exams,
)
from PIL import Image
from test_explain import MIRRORS, maps_of

from mrnet.errors import InputError
from mrnet.inference.exams import Exam, FolderExams
from mrnet.inference.explanation import Finding
from mrnet.reports.explain_index import (
    ROWS,
    Row,
    Rows,
    as_line,
    make_index,
    shows_training,
    write_exam,
)
from mrnet.stacking.stacking import DIGITS

HOSTILE = "<img src=x onerror=alert(1)>#?%41"


def second_finding(models):
    """The networks of acl once more under the name of another finding."""
    for path in sorted(models.glob("acl-*.pt")):
        saved = torch.load(path, weights_only=True)
        saved["metadata"]["task"] = "cyst"
        torch.save(saved, models / path.name.replace("acl", "cyst"))


@pytest.fixture(scope="module")
def work(trained, tmp_path_factory):
    """A copy of a trained run, eight of whose exams are looked at, one with a hostile name."""
    work = tmp_path_factory.mktemp("index")
    shutil.copytree(trained[0] / "models", work / "models")
    second_finding(work / "models")
    for plane in PLANES:
        files = sorted((trained[0] / "data" / "valid" / plane).glob("*.npy"))[:5]
        (work / "data" / "valid" / plane).mkdir(parents=True)
        (work / "data" / "train" / plane).mkdir(parents=True)
        for file in files[:3]:
            shutil.copy(file, work / "data" / "valid" / plane)
        shutil.copy(files[3], work / "data" / "train" / plane)
    shutil.copy(files[4], work / "data" / "valid" / "sagittal" / f"{HOSTILE}.npy")
    for name in ("dataset.json", "valid-acl.csv"):
        shutil.copy(trained[0] / "data" / name, work / "data" / name)
    return work


def explain(work, *more, out="report", run=run_script):
    return run("explain.py", work / "data", "--all", "--split", "both", "--models-dir",
               work / "models", "--out", work / out, "--precision", "fp32", *more)  # fmt: skip


@pytest.fixture(scope="module")
def index(work):
    done = explain(work)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 exams explained" in done.stdout
    return page_content(work / "report" / "index.html")


def test_the_validation_exams_are_explained_by_default(work, tmp_path):
    done = run_script("explain.py", work / "data", "--all", "--task", "acl", "--models-dir",
                      work / "models", "--out", tmp_path, "--precision", "fp32")  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = page_content(tmp_path / "index.html")["rows"]
    assert [row["source"] for row in rows] == ["valid"] * 4


@pytest.mark.parametrize("folders", [("valid",), ("train",), ("hospital", "train")])
def test_where_there_is_no_such_split_all_exams_stay(tmp_path, folders):
    for name in folders:
        (tmp_path / name / "axial").mkdir(parents=True)
        (tmp_path / name / "axial" / "0001.npy").touch()
    exams = FolderExams(tmp_path)
    exams.keep_split("valid")
    assert len(exams) == len(folders)


def test_index_says_what_was_predicted(work, index):
    done = run_script("predict.py", work / "data", "--jsonl", "--models-dir", work / "models",
                      "--precision", "fp32")  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 2 * len(index["rows"]) == 10
    for row in rows:
        (one,) = [
            r for r in index["rows"] if (r["source"], r["exam"]) == (row["source"], row["exam"])
        ]
        finding = one["findings"][row["task"]]
        assert (work / "report" / unquote(one["page"])).is_file()
        assert finding["decision"] == row["decision"] and finding["threshold"] == row["threshold"]
        if row["stack"] is not None:  # the very numbers, of which rows have eight digits
            assert round(finding["probability"], DIGITS) == row["stack"]
        assert {p: round(value, DIGITS) for p, value in finding["planes"].items()} == {
            plane: row[plane] for plane in row["planes"]
        }
        picture = Image.open(work / "report" / unquote(finding["picture"]))
        assert picture.size == (384, 128) and np.asarray(picture).std() > 5


def test_index_has_the_labels_that_are_known(work, index):
    with open(work / "data" / "valid-acl.csv", newline="") as file:
        labels = {row[0]: float(row[1]) for row in csv.reader(file)}
    for row in index["rows"]:
        known = row["source"] == "valid" and row["exam"] != HOSTILE
        assert row["labels"]["cyst"] is None
        assert row["labels"]["acl"] == (labels[row["exam"].lstrip("0")] if known else None)


def test_a_second_run_does_what_is_new_or_changed(work, index):
    copy = work / "again"
    shutil.copytree(work / "data", work / "more" / "data")
    (work / "more" / "models").symlink_to(work / "models")
    more = work / "more"
    assert "5 exams explained" in explain(more, out=copy).stdout
    before = (copy / ROWS).read_text()
    done = explain(more, out=copy)
    assert "0 exams explained, 5 were there" in done.stdout and (copy / ROWS).read_text() == before
    # One exam changed, one has gone, one page was lost, the last line was cut off.
    first, second, third = sorted((more / "data" / "valid" / "axial").iterdir())
    np.save(first, np.flip(np.load(first)).copy())
    for plane in PLANES:
        (more / "data" / "valid" / plane / second.name).unlink()
    (copy / "valid" / f"{third.stem}-acl+cyst.html").unlink()
    (copy / ROWS).write_text(before[:-20])
    done = explain(more, out=copy)
    assert done.returncode == 0 and "3 exams explained, 1 were there" in done.stdout
    rows = [json.loads(line)["exam"] for line in (copy / ROWS).read_text().splitlines()]
    assert second.stem not in rows and len(rows) == 4 == len(
        page_content(copy / "index.html")["rows"]
    )
    assert (copy / "valid" / f"{third.stem}-acl+cyst.html").is_file()
    # Other findings, or another's folder, are refused.
    done = explain(more, "--task", "acl", out=copy)
    assert_one_line_error(done, "holds exams explained for acl, cyst", "--overwrite")
    (copy / ROWS).write_text("id,label\n")
    assert_one_line_error(explain(more, out=copy), ROWS, "--out")
    (copy / ROWS).unlink()
    (copy / "index.html").write_text("mine")
    assert_one_line_error(explain(more, out=copy), "other exams", "--overwrite")
    assert (copy / "index.html").read_text() == "mine"
    assert explain(more, "--task", "acl", "--overwrite", out=copy).returncode == 0


def test_pages_of_other_exams_with_the_same_numbers_stay(work, index, tmp_path):
    """Whatever the networks, and however often it is asked."""
    copy = shutil.copytree(work / "report", tmp_path / "report")
    before = {path: path.read_bytes() for path in copy.rglob("*.*")}
    shutil.copytree(work / "data", tmp_path / "data")
    (tmp_path / "models").symlink_to(work / "models")
    for more in ((), ("--partial",), ("--partial",)):
        done = explain(tmp_path, *more, out=copy)
        assert_one_line_error(done, "holds exams of another folder", "--overwrite")
        assert {path: path.read_bytes() for path in copy.rglob("*.*")} == before


def test_twice_the_same_files_but_for_the_time(work, index):
    assert explain(work, out="twice").returncode == 0
    files = sorted(p.relative_to(work / "report") for p in (work / "report").rglob("*.*"))
    assert len(files) == 2 + 3 * 5
    for file in files:
        one, other = ((work / folder / file).read_bytes() for folder in ("report", "twice"))
        made = re.compile(rb'"made": "[^"]*"')
        assert made.sub(b"", one) == made.sub(b"", other), file


def test_a_faulty_exam_is_named_and_the_others_go_on(work, tmp_path):
    shutil.copytree(work / "data", tmp_path / "data")
    for plane in PLANES:
        (tmp_path / "data" / "train" / plane).joinpath("bad\x1b[2J.npy").write_bytes(b"no volume")
    (tmp_path / "models").symlink_to(work / "models")
    done = explain(tmp_path, "--task", "acl")
    assert done.returncode == 1 and "error: train/bad?[2J: " in done.stderr
    assert "5 exams explained, 1 not, " in done.stdout
    assert "1 exam could" in done.stderr and "\x1b" not in done.stdout + done.stderr
    rows = page_content(tmp_path / "report" / "index.html")["rows"]
    (bad,) = [row for row in rows if row["exam"] == "bad\x1b[2J"]
    assert bad["page"] is None and "bad" in bad["error"] and len(rows) == 6
    # It is tried again, the others are not.
    done = explain(tmp_path, "--task", "acl")
    assert done.returncode == 1 and "0 exams explained, 1 not, 5 were there" in done.stdout
    (tmp_path / "data" / "valid-acl.csv").write_text("7,yes\n")
    assert_one_line_error(explain(tmp_path, "--task", "acl"), "valid-acl.csv", "yes")


def test_an_exam_without_an_answer_for_every_task(work, tmp_path):
    """The networks of one task lack a plane that the exam has."""
    shutil.copytree(work / "models", tmp_path / "models")
    (tmp_path / "models" / "cyst-sagittal.pt").unlink()
    shutil.copytree(work / "data", tmp_path / "data")
    assert explain(tmp_path).returncode == 0
    row = page_content(tmp_path / "report" / "index.html")["rows"][-1]
    assert row["exam"] == HOSTILE and list(row["findings"]) == ["acl"]
    assert "5 were there" in explain(tmp_path).stdout


def test_what_was_warned_of_is_said(tmp_path):
    """In the page, in the index's row, and in exams.jsonl for the next run."""
    warnings = ("medial and lateral may be exchanged", "series 3 is 40 degrees from axial")
    exam = Exam("0123456789abcdef-R", "knee7", {}, {}, "hash", warnings=warnings)
    finding = Finding(MIRRORS, {"axial": maps_of()}, None, {})
    row = write_exam(exam, [finding], "model", tmp_path, Path())
    assert page_content(tmp_path / row.page)["warnings"] == list(warnings)
    assert Row(**json.loads(as_line(row))) == row and row.warnings == list(warnings)
    (tmp_path / "index.html").write_text(make_index([row], [], {}, 0, False))
    (said,) = page_content(tmp_path / "index.html")["rows"]
    assert said["warnings"] == list(warnings) and said["side"] == "R"


def test_rows_of_an_earlier_version_are_refused(tmp_path):
    exam = Exam("0123456789abcdef-R", "knee7", {}, {}, "hash")
    content = json.loads(as_line(write_exam(exam, [], "model", tmp_path, Path())))
    del content["root"]  # the same name may be of another folder's exam
    (tmp_path / "exams.jsonl").write_text(json.dumps(content) + "\n")
    with pytest.raises(InputError, match="earlier version.*--overwrite"):
        Rows(tmp_path, [], "model", "root", False)
    content |= {"root": "root", "findings": {"acl": {"probability": 7}}}
    (tmp_path / "exams.jsonl").write_text(json.dumps(content) + "\n")
    with pytest.raises(InputError, match="damaged.*findings.acl.probability: a number from 0 to 1"):
        Rows(tmp_path, [], "model", "root", False)


def test_a_root_called_train_holds_training_exams(tmp_path):
    for name in ("train", "valid"):
        (tmp_path / name / "axial").mkdir(parents=True)
        (tmp_path / name / "axial" / "0001.npy").touch()
    assert shows_training(FolderExams(tmp_path / "train"))
    assert shows_training(FolderExams(tmp_path))
    assert not shows_training(FolderExams(tmp_path / "valid"))
    for said in (False, True):
        (tmp_path / "index.html").write_text(make_index([], [], {}, 0, said))
        assert page_content(tmp_path / "index.html")["training"] == said


def test_warnings_in_a_browser(browser, tmp_path):
    exam = Exam("0123456789abcdef-R", "", {}, {}, "hash", warnings=("<b>lateral</b> or not",))
    row = write_exam(
        exam, [Finding(MIRRORS, {"axial": maps_of()}, None, {})], "m", tmp_path, Path()
    )
    (tmp_path / "index.html").write_text(make_index([row], [MIRRORS], {}, 0, False))
    for page, words in ((row.page, "This right knee"), ("index.html", "right knee, shown")):
        browser.get((tmp_path / page).as_uri())
        text = browser.find_element("tag name", "body").text
        assert "arning: <b>lateral</b> or not" in text and words in text
        assert [one for one in browser.get_log("browser") if one["level"] == "SEVERE"] == []


def test_one_exam_or_all(work):
    done = run_process("explain.py", work / "data", "--all", "--exam", "3")
    assert done.returncode == 2 and "not allowed with" in done.stderr


PEAK = """
import resource, runpy, sys
sys.argv[0] = "explain.py"
try: runpy.run_path("explain.py", run_name="__main__")
finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def measure(_, *args):
    """explain.py in a process of its own, whose last line is its peak memory in MiB."""
    command = [sys.executable, "-c", PEAK, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_exams(work, tmp_path):
    """1,000 exams against 100: what is kept of each is a line."""
    peaks = []
    for count in (100, 1000):
        data = write_exams(tmp_path / str(count) / "data", train=1, valid=count)
        shutil.copy(work / "data" / "dataset.json", data)
        (data.parent / "models").symlink_to(work / "models")
        done = explain(data.parent, "--task", "acl", run=measure)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] < peaks[0] + 60, peaks


# --- in a browser ---------------------------------------------------------------------------------


def shown(browser):
    return [row.text.splitlines() for row in browser.find_elements("css selector", "#rows tr")]


def set_to(browser, name, value):
    browser.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1]; "
        "e.dispatchEvent(new Event('input'))", name, value,
    )  # fmt: skip


def test_a_name_that_is_no_text(browser, work, tmp_path):
    (tmp_path / "data" / "axial").mkdir(parents=True)
    shutil.copy(work / "data" / "dataset.json", tmp_path / "data")
    (tmp_path / "models").symlink_to(work / "models")
    source = next((work / "data" / "valid" / "axial").glob("*.npy"))
    for name in (b"caf\xe9.npy", b"later.npy"):
        shutil.copy(source, os.fsencode(tmp_path / "data" / "axial") + b"/" + name)
    done = explain(tmp_path, "--task", "acl")
    assert done.returncode == 0, done.stderr
    browser.get((tmp_path / "report" / "index.html").as_uri())
    assert len(shown(browser)) == 2 and "2 of 2 exams" in browser.page_source
    link = browser.find_element("css selector", "#rows a").get_attribute("href")
    assert unquote_to_bytes(link).endswith(b"/report/caf\xe9-acl.html#acl")


def test_index_in_a_browser(browser, work, index):
    browser.get((work / "report" / "index.html").as_uri())
    assert len(shown(browser)) == 5 and "5 of 5 exams" in browser.page_source
    assert "Exams under train may be" in browser.page_source
    rows = {(r["source"], r["exam"]): r for r in index["rows"]}
    set_to(browser, "sort", "high")
    values = [float(line[2].split(",")[0]) for line in shown(browser)]
    expected = sorted((r["findings"]["acl"]["probability"] for r in rows.values()), reverse=True)
    assert values == pytest.approx(expected, abs=6e-4)
    wrong = [
        r["exam"] for r in rows.values()
        if r["labels"]["acl"] is not None
        and (r["labels"]["acl"] >= 0.5) != (r["findings"]["acl"]["decision"] == "positive")
    ]  # fmt: skip
    set_to(browser, "filter", "wrong")
    assert sorted(line[0] for line in shown(browser)) == sorted(wrong)
    set_to(browser, "filter", "undecided")
    set_to(browser, "task", "cyst")
    assert len(shown(browser)) == 5  # no stack, no decision
    set_to(browser, "filter", "all")
    set_to(browser, "search", "IMG SRC")
    ((name, *_),) = shown(browser)
    assert name == HOSTILE and not browser.find_elements("css selector", "img[src=x]")
    image = browser.find_element("css selector", "#rows img")
    loaded = "return arguments[0].complete && arguments[0].naturalWidth"
    browser.execute_async_script("arguments[0].decode().then(() => arguments[1](true))", image)
    assert browser.execute_script(loaded, image) == 384
    browser.find_element("css selector", "#rows a").click()  # to its page, at this finding
    assert browser.find_element("id", "title").text == f"cyst, exam {HOSTILE}"
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_findings_in_tabs(browser, work, index):
    row = next(row for row in index["rows"] if row["exam"].isdecimal())
    browser.get((work / "report" / unquote(row["page"])).as_uri())
    title = browser.find_element("id", "title")
    tabs = browser.find_elements("css selector", "#tabs button")
    assert [tab.text.split()[0] for tab in tabs] == ["acl", "cyst"]
    seen = "section:not([hidden] *)"
    assert len(browser.find_elements("css selector", seen)) == 3 and "acl" in title.text
    tabs[1].click()
    assert len(browser.find_elements("css selector", seen)) == 3 and "cyst" in title.text
    assert tabs[1].get_attribute("aria-selected") == "true"
    assert "no decision" in browser.find_element("id", "summaries").text
    slider = browser.find_element("css selector", "div:not([hidden]).planes input.slice")
    before = int(slider.get_attribute("value"))
    body = browser.find_element("tag name", "body")
    body.send_keys("\ue014" if before == 1 else "\ue012")  # a slice on or back
    moved = slider.get_attribute("value")
    assert int(moved) != before
    body.send_keys("1")
    assert "acl" in title.text
    body.send_keys("2")  # where it was left
    assert slider.is_displayed() and slider.get_attribute("value") == moved
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
