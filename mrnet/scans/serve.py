"""How an importer of DICOM runs: to its exit status, or as the server of predict.py and explain.py.

As a server it converts the exams that they ask for, in a process of its own, so that the reader of
foreign files shares no memory with the networks.
"""

import json
import sys
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext

from mrnet.errors import InputError
from mrnet.files import alone_at
from mrnet.layout.planes import TARGET
from mrnet.layout.volumes import write_volume
from mrnet.scans.files import quiet


def run_importer(work, out, report, what="exams"):
    """Call `work` -> exit status; what may go wrong outside the code is one line and no traceback.

    Args:
        work: function without arguments that returns an exit status.
        out: folder that it writes to.
        report: Report; one that collects its lines is a server's.
        what: "exams" or "studies".
    """
    try:
        with quiet(), nullcontext() if report.lines is not None else alone_in(out):
            return work()
    except InputError as error:
        status, message = 2, str(error)
    except ImportError as error:
        status = 2
        message = f"{error.name} is missing; pip install -r requirements-dicom.txt"
    except BrokenProcessPool:
        status = 1
        message = "a worker process ended before its work was done; if memory was short, give "
        message += f"fewer --workers: written {what} are whole, the same command goes on"
    except OSError as error:
        status = 1
        message = f"{error.filename or out}: {error.strerror}; written {what} are whole"
    except KeyboardInterrupt:
        report.log(f"interrupted; finished {what} are whole, the same command goes on", sys.stderr)
        return 130
    report.fault(message)
    if report.lines is not None:
        answer({"failed": message, "lines": report.take()[:-1]})
    return status


def alone_in(out):
    """Within it no other importer writes to the folder: they would give out the same numbers, and
    delete each other's unfinished exams. Raises InputError where one does."""
    return alone_at(out, f"{out}: another import is writing to it; wait for that one")


def serve(exams, digest, convert, out, report):
    """List exams, then convert those that standard input names, as lines of JSON.

    First line out: {"exams": [[name, source], ...], "lines": [...]}. A line in: {"exam": name,
    "unless": digest or null, "origin": whether it is wanted}. Its answer: {"exam", "input": digest,
    "planes": {plane: file}, "unusable": {plane: why}, "fault": why nothing could be written, or
    null, "origin": as `origin.describe` returns it, or why there is none, or null, "lines"}; no
    more than {"exam", "input", "lines"} where the digest is the one that was given.

    Args:
        exams: list of what has a `name` and a `source`.
        digest: function of an exam: hash of all that its volumes depend on, hexadecimal.
        convert: function of an exam: {plane: uint8 (s, H, W)}, {plane: why it cannot be used}, and
            a function that returns where it comes from.
        out: folder to write to.
        report: Report that collects its lines.
    """
    named = {exam.name: exam for exam in exams}
    listed = [[exam.name, exam.source] for exam in exams]
    answer({"exams": listed, "lines": report.take()})
    for line in sys.stdin:
        request = json.loads(line)
        exam = named[request["exam"]]
        reply = {"exam": exam.name, "input": digest(exam)}
        if reply["input"] != request["unless"]:
            volumes, unusable, describe = attempt(convert, exam)
            reply |= {"planes": {}, "unusable": unusable, "fault": None, "origin": None}
            try:
                for plane, volume in volumes.items():
                    path = out / exam.name / f"{plane}.npy"
                    write_volume(path, volume)
                    reply["planes"][plane] = str(path)
                reply["origin"] = describe() if request["origin"] else None
            except InputError as error:
                reply["origin"] = str(error)
            except OSError as error:
                reply["fault"] = f"{out}: {error.strerror}"
        answer(reply | {"lines": report.take()})
    return 0


def attempt(convert, exam):
    """convert(exam), as `serve` takes it; where the machine cannot, that is of this exam alone."""
    try:
        return convert(exam)
    except (OSError, MemoryError) as error:
        why = getattr(error, "strerror", None) or "not enough memory"
        return {}, dict.fromkeys(TARGET, f"it cannot be read: {why}"), lambda: None


def answer(content):
    print(json.dumps(content), flush=True)
