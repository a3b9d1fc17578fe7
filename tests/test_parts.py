"""predict.py --part, and tools/merge.py: every exam exactly once."""

import csv
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from conftest import ROOT, assert_one_line_error, run_script

from common.archive import alone_with_rows, make_jobs, problems_in
from common.errors import InputError
from common.files import alone_at, csv_line, from_cell
from common.jobs import Done
from common.parts import Part, check_names, write_part

pytestmark = pytest.mark.whole


def predict(work, exams, out, *more):
    return run_script("predict.py", exams, "--models-dir", work / "models", "--precision", "fp32",
                      "--out", out, *more)  # fmt: skip


@pytest.fixture(scope="module")
def parts(trained, tmp_path_factory):
    """The exams of a data folder in three parts, and in one run: {1, 2, 3, "all": file}."""
    work, _ = trained
    folder = tmp_path_factory.mktemp("parts")
    files = {}
    for number in (1, 2, 3):
        files[number] = folder / f"part{number}.csv"
        done = predict(work, work / "data", files[number], "--part", f"{number}/3")
        assert done.returncode == 0, done.stderr
    files["all"] = folder / "all.csv"
    assert predict(work, work / "data", files["all"]).returncode == 0
    return files


@pytest.fixture
def own(parts, tmp_path):
    """Copies that a test may damage."""
    for path in parts[1].parent.iterdir():
        shutil.copy(path, tmp_path)
    return [tmp_path / parts[number].name for number in (1, 2, 3)]


def merge(files, out, *more):
    return run_script("tools/merge.py", *files, "--out", out, *more)


def test_parts_share_a_list_out():
    whole = list(range(11))
    found = [Part(number, 4).take(whole) for number in range(1, 5)]
    assert sorted(sum(found, [])) == whole and {len(one) for one in found} == {2, 3}


def test_merged_parts_are_one_run(parts, tmp_path):
    done = merge([parts[3], parts[1], parts[2]], tmp_path / "merged.csv")
    assert done.returncode == 0, done.stderr
    assert "30 exams from 3 parts, each once" in done.stdout
    assert (tmp_path / "merged.csv").read_bytes() == parts["all"].read_bytes()
    assert_one_line_error(merge([parts[1]], tmp_path / "merged.csv"), "exists; --overwrite")


def test_json_lines_are_merged_as_well(trained, tmp_path):
    work, _ = trained
    for name, words in (("1", ["--part", "1/2"]), ("2", ["--part", "2/2"]), ("all", [])):
        done = predict(work, work / "data/valid", tmp_path / name, "--jsonl", *words)
        assert done.returncode == 0, done.stderr
    assert merge([tmp_path / "1", tmp_path / "2"], tmp_path / "merged").returncode == 0
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "all").read_bytes()


def test_what_is_missing_or_twice_is_said(own, trained, tmp_path):
    work, out = trained[0], tmp_path / "merged.csv"
    assert_one_line_error(merge(own[:2], out), "part 3 of 3 is missing")
    assert_one_line_error(merge([*own[:2], own[1]], out), "part2.csv: part 2, as", "once")
    lines = own[1].read_text().splitlines(keepends=True)
    own[1].write_text("".join(lines[:-1]))
    done = merge(own, out)
    assert_one_line_error(done, "part2.csv: 9 of 10 exams; run its part again with --resume")
    for end in (lines[3][:40], lines[3][:-1], lines[3][:-2]):
        own[1].write_text("".join([*lines[:3], end]))
        assert_one_line_error(merge(own, out), "part2.csv: ends in the middle")
    own[1].write_text("".join([lines[0], lines[2], lines[1], *lines[3:]]))
    assert_one_line_error(merge(own, out), "other exams than the list has")
    own[1].write_text("".join([*lines, lines[-1].replace("0", "1", 1)]))
    assert_one_line_error(merge(own, out), "part2.csv: more exams")
    assert not out.exists()
    done = predict(work, work / "data", own[1], "--part", "2/3", "--resume")
    assert done.returncode == 0, done.stderr
    assert merge(own, out).returncode == 0


def write_part_file(path, part, keys, tasks=("acl", "men"), rows=None):
    """Rows as predict.py writes them, of its part of `keys`; `rows` of them only."""
    head = ("exam", "source", "task", "model", "error")
    lines = [(name, source, task, "m", "") for source, name in part.take(keys) for task in tasks]
    path.write_text("".join(csv_line(line) for line in [head, *lines[:rows]]))
    write_part(path, part, keys)
    return path


def test_names_that_a_spreadsheet_would_run_are_merged(tmp_path):
    keys = [("", "=1"), ("@site", "-knee"), ("", "'q"), ("a,b", 'x"y')]
    parts = [write_part_file(tmp_path / str(n), Part(n, 2), keys) for n in (1, 2)]
    done = merge(parts, tmp_path / "all")
    assert done.returncode == 0 and "4 exams" in done.stdout, done.stderr
    done = [row["exam"] for row in csv.DictReader((tmp_path / "all").read_text().splitlines())]
    assert list(map(from_cell, done[::2])) == [name for _, name in keys]


def test_a_finding_that_is_missing_is_said(tmp_path):
    keys = [("", str(n)) for n in range(4)]
    parts = [write_part_file(tmp_path / str(n), Part(n, 2), keys, rows=rows)
             for n, rows in ((1, None), (2, 3))]  # fmt: skip
    assert_one_line_error(merge(parts, tmp_path / "all"), "exam 3 has rows of acl only", "men")
    with pytest.raises(InputError, match="/a: two exams of the list have this name"):
        check_names([("", "b"), ("", "a"), ("", "a")])


def test_parts_of_other_lists_or_networks_are_refused(own, trained, tmp_path):
    work, out = trained[0], tmp_path / "merged.csv"
    done = predict(work, work / "data", own[1], "--part", "2/4", "--overwrite")
    assert done.returncode == 0
    assert_one_line_error(merge(own, out), "part 2/4 of another list of exams")
    done = predict(work, work / "data/valid", own[1], "--part", "2/3", "--overwrite")
    assert_one_line_error(merge(own, out), "of another list of exams", "exams came or went")
    done = predict(work, work / "data", own[1], "--part", "2/3", "--overwrite", "--partial")
    assert done.returncode == 0
    assert_one_line_error(merge(own, out), "part2.csv", "predicted by other networks")
    (tmp_path / "part2.csv.part.json").write_text('{"number": 2}')
    assert_one_line_error(merge(own, out), "damaged, or not of a part")
    (tmp_path / "part2.csv.part.json").unlink()
    assert_one_line_error(merge(own, out), "part2.csv.part.json: no such file")


def test_a_part_needs_a_file_and_several_exams(trained, tmp_path, capsys):
    work, _ = trained
    done = predict(work, work / "data", "-", "--part", "1/2")
    assert done.returncode == 2 and "--part needs a file as --out" in done.stderr
    done = predict(work, work / "data", tmp_path / "x", "--part", "3/2")
    assert done.returncode == 2 and "is not a part such as 2/4" in done.stderr
    one = work / "data/valid/axial/0020.npy"
    assert_one_line_error(predict(work, one, tmp_path / "x", "--part", "1/2"), "no parts")


@pytest.mark.slow
def test_twenty_thousand_studies_in_four_parts_two_of_them_killed_twice(trained, tmp_path):
    """The merged rows are a serial run's, and no part's memory grows with the number of exams."""
    work, n = trained[0], 20_000
    folder = tmp_path / "exams" / "axial"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for k in range(n):
        np.save(folder / f"{k:05d}.npy", rng.integers(0, 256, (2, 64, 64), dtype=np.uint8))
    command = [sys.executable, ROOT / "predict.py", tmp_path / "exams", "--models-dir",
               work / "models", "--precision", "fp32", "--allow-synthetic"]  # fmt: skip
    memory = {}  # of each process: rows, resident bytes, and those of them that no file holds
    for part in (1, 2, 3, 4):
        out = tmp_path / f"part{part}.csv"
        for kill in (True, True, False) if part in (2, 3) else (False,):
            words = ["--part", f"{part}/4", "--out", out, "--resume"]
            running = subprocess.Popen([*command, *words], stdout=subprocess.DEVNULL)
            lines, wanted = 0, lines_of(out) + random.randint(200, 1500)
            while running.poll() is None:
                time.sleep(0.05)
                lines = lines_of(out)
                if lines > 1 and (sizes := memory_of(running.pid)):
                    memory.setdefault(running.pid, []).append((lines, *sizes))
                if kill and lines > wanted:
                    running.send_signal(signal.SIGKILL)
            assert running.wait() == (-signal.SIGKILL if kill else 0)
    whole = tmp_path / "all.csv"
    subprocess.run([*command, "--out", whole], check=True, stdout=subprocess.DEVNULL)
    done = merge([tmp_path / f"part{part}.csv" for part in (4, 3, 2, 1)], tmp_path / "merged.csv")
    assert done.returncode == 0 and f"{n} exams from 4 parts" in done.stdout, done.stderr
    assert (tmp_path / "merged.csv").read_bytes() == whole.read_bytes()
    long = [seen for seen in memory.values() if seen[-1][0] - seen[0][0] > 2000]
    assert len(long) >= 4
    for seen in long:
        early = np.max([sizes for lines, *sizes in seen if lines < seen[0][0] + 500], axis=0)
        late = np.max([sizes for _, *sizes in seen], axis=0)
        print(f"MB resident, private: {early / 1e6} within 500 exams, then {late / 1e6}")
        assert np.all(late > 1e8) and np.all(late < early + (30e6, 10e6))


def lines_of(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def memory_of(pid):
    """Bytes of a process: resident, and those of them that no file holds; () once it has ended."""
    try:
        memory = psutil.Process(pid).memory_info()
    except psutil.Error:
        return ()
    return (memory.rss, memory.rss - memory.shared) if memory.rss else ()


# --- several processes ----------------------------------------------------------------------------


def test_jobs_predict_what_one_process_predicts(parts, trained, tmp_path):
    work, out = trained[0], tmp_path / "all.csv"
    done = predict(work, work / "data", out, "--jobs", 3, "--threads", 1)
    assert done.returncode == 0, done.stderr
    assert "30 exams from 3 parts" in done.stdout
    assert out.read_bytes() == parts["all"].read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["all.csv"]
    assert_one_line_error(predict(work, work / "data", out, "--jobs", 3), "exists; --resume")
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:11]))  # the rows of ten exams stay
    done = predict(work, work / "data", out, "--jobs", 2, "--resume")
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == parts["all"].read_bytes()


def test_jobs_with_bad_input_start_no_process(trained, tmp_path):
    work = trained[0]

    def jobs(exams, out, *more):
        return predict(work, exams, out, "--jobs", 2, *more)

    done = jobs(work / "data/valid", "-")
    assert done.returncode == 2 and "--jobs and --cluster need a file" in done.stderr
    for alone in (("--threads", 2), ("--jobs-per-gpu", 2)):
        done = predict(work, work / "data", tmp_path / "x.csv", *alone)
        assert done.returncode == 2 and "--threads and --jobs-per-gpu are for" in done.stderr
    assert_one_line_error(jobs(tmp_path / "none", tmp_path / "x.csv"), "none: no such file")
    one = work / "data/valid/axial/0020.npy"
    assert_one_line_error(jobs(one, tmp_path / "x.csv"), "one exam has no parts; leave out --jobs")
    for out in (tmp_path / "none/x.csv", tmp_path / "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        assert_one_line_error(jobs(work / "data", out, "--overwrite"), f"{out}: cannot be written")
    (tmp_path / "y.csv.parts").write_text("a file of that name")
    assert_one_line_error(jobs(work / "data", tmp_path / "y.csv"), "y.csv: cannot be written")
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "y.csv.parts"}


def test_jobs_with_other_options_go_on_after_a_signal(trained, tmp_path):
    """Options reach every process; an interrupted run leaves its parts, which --resume takes, in
    the same number; what else lies in their folder stays."""
    work, out = trained[0], tmp_path / "all.jsonl"
    exams = shutil.copytree(work / "data", tmp_path / "exams")
    options = ("--jsonl", "--task", "acl", "--partial", "--recipes", "article")
    whole = tmp_path / "whole.jsonl"
    assert predict(work, exams, whole, *options).returncode == 0
    words = [exams, "--models-dir", work / "models", "--precision", "fp32", "--out", out, *options]
    command = [sys.executable, ROOT / "predict.py", *words, "--jobs", "2"]
    running = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "all.jsonl.parts"
    while not list(folder.glob("*.txt")):
        assert running.poll() is None
        time.sleep(0.02)
    time.sleep(0.5)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 143 and "Resume with: python predict.py" in said
    assert not out.exists() and folder.is_dir()
    (folder / "mine.txt").touch()
    assert_one_line_error(predict(work, exams, out, *options, "--jobs", 2), "--resume continues")
    assert_one_line_error(predict(work, exams, out, *options, "--resume"), "give --jobs 2")
    done = predict(work, exams, out, *options, "--jobs", 3, "--resume")
    assert done.returncode == 0, done.stderr
    assert "from 2 parts" in done.stdout
    assert out.read_bytes() == whole.read_bytes()
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_jobs_name_what_cannot_be_used_and_keep_the_logs(trained, tmp_path):
    work, out = trained[0], tmp_path / "all.csv"
    exams = shutil.copytree(work / "data" / "valid", tmp_path / "exams")
    (exams / "axial" / "0021.npy").write_bytes(b"no volume")
    done = predict(work, exams, out, "--jobs", 4, "--allow-synthetic")
    assert done.returncode == 1 and "10 exams from 4 parts" in done.stdout
    first, last = done.stderr.splitlines()
    assert first.startswith("error: 0021: ") and "0021.npy" in first and "named above" in last
    logs = "".join(path.read_text() for path in (tmp_path / "all.csv.parts").glob("*.txt"))
    assert logs.count("$ python") == 4 and "FAILED" not in done.stdout  # none was tried again
    whole = tmp_path / "whole.csv"
    assert predict(work, exams, whole, "--allow-synthetic").returncode == 1
    assert out.read_bytes() == whole.read_bytes()


def test_a_parts_warnings_are_repeated_too(tmp_path):
    log = tmp_path / "part1.txt"
    earlier = "\n$ python predict.py\nwarning: gone\n"
    log.write_text(f"{earlier}\n$ python predict.py\nwarning: odd\nnote\nerror: 7: damaged\n")
    assert problems_in(log) == ["warning: odd", "error: 7: damaged"]


def test_a_part_that_dies_with_status_1_is_not_a_part_that_ended(trained, tmp_path):
    """A run has ended well when it says so: old rows of an exam that has changed are not merged."""
    work, ended = trained[0], tmp_path / "part1of2.rows.part.json"
    job = make_jobs({"exams": [tmp_path]}, tmp_path, 2)[0]
    assert job.ended == ended
    statuses = (0, 1, 2, -9)
    assert [Done(job, n, 0, 0, 0).is_fine for n in statuses] == [True, False, False, False]
    ended.touch()
    assert [Done(job, n, 0, 0, 0).is_fine for n in statuses] == [True, True, False, False]
    for number, broken in ((1, False), (2, True)):
        words = ("--part", f"{number}/2", "--resume")
        assert predict(work, work / "data", tmp_path / f"{number}.csv", *words).returncode == 0
        if broken:  # its next run dies while it lists the exams
            exams = shutil.copytree(work / "data", tmp_path / "exams")
            (exams / "dataset.json").write_text("{")
            assert predict(work, exams, tmp_path / "2.csv", *words).returncode == 2
    done = merge([tmp_path / "1.csv", tmp_path / "2.csv"], tmp_path / "all.csv")
    assert_one_line_error(done, "2.csv.part.json: no such file", "after its run has ended")


def test_an_archive_that_another_run_predicts(tmp_path):
    with (
        alone_with_rows(tmp_path / "x.csv"),
        pytest.raises(InputError, match="x.csv: another run predicts it; wait for that one"),
        alone_with_rows(tmp_path / "x.csv"),
    ):
        pass


def test_two_runs_do_not_write_one_file(trained, tmp_path):
    """Such as a cron job that lasts longer than an hour, with --resume."""
    work, out = trained[0], tmp_path / "x.csv"
    with alone_with_rows(out):
        for how in (("--resume",), ("--overwrite",), ("--resume", "--jobs", 2)):
            done = predict(work, work / "data", out, *how)
            assert_one_line_error(done, "x.csv: another run predicts it; wait for that one")
    with alone_at(tmp_path / "pages", ""):
        done = run_script("explain.py", work / "data", "--all", "--models-dir", work / "models",
                          "--out", tmp_path / "pages")  # fmt: skip
    assert_one_line_error(done, "another run writes pages there; wait for that one")
    assert {path.name for path in tmp_path.rglob("*")} == {"pages"}
