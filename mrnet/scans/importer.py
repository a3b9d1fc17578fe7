"""An importer (data/dicom/prepare.py, data/rsna/prepare.py) that converts exams on request.

A process of its own: the reader of foreign files shares no memory with the models, and decodes
while they compute. What it is asked and answers: mrnet/scans/serve.py.
"""

import json
import subprocess
import sys
from collections import deque
from contextlib import suppress

CRASHES = 3  # one after the other, after which an importer is not started again


class Importer:
    """A running importer. One that a decoder or the system ends costs the exam that it converted
    then, and is started again for the others.

    Args:
        script: Path of its prepare.py.
        source: Path of the scans.
        folder: that it writes converted volumes to.
        options: arguments, as the exams shall be prepared.

    Attributes:
        fault: why it could not go on, such as a full disk, or None.
        listing: its first answer, {"exams": [[name, source], ...], "lines"}; without
            "exams" if it failed. None before `read_listing`.
    """

    def __init__(self, script, source, folder, options):
        self.source, self.fault, self.listing = source, None, None
        command = [sys.executable, script, "--serve", *options, "--", source, folder]
        self.command = list(map(str, command))
        self.asked, self.crashes = deque(), 0  # requests without an answer; crashes in a row
        self.is_over = False  # it is not started again
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
        )

    def read_listing(self):
        """Wait for its first answer."""
        self.listing = self.receive()
        if "crash" in self.listing:
            self.fault, self.is_over = self.listing["crash"], True

    def request(self, exam, unless, origin):
        """Ask for an exam by name; arguments as in `serve`."""
        self.asked.append(json.dumps({"exam": exam, "unless": unless, "origin": origin}) + "\n")
        self.send(self.asked[-1])

    def send(self, line):
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except OSError:
            pass  # the importer has ended: `receive` reports it

    def answer(self):
        """The answer to the oldest request: what the importer says of the exam; {"crash": why} if
        it ended in the middle of it; else as `receive`, with a `fault`."""
        reply = self.receive()
        self.asked.popleft()
        if "exam" in reply:
            self.crashes = 0
        elif "crash" in reply and not self.is_over:
            self.crashes += 1
            if self.crashes == CRASHES:
                self.is_over = True
                self.fault = f"{reply['crash']} at {CRASHES} exams, one after the other"
                return {"crash": self.fault}
            print(f"warning: {reply['crash']}; it is started again", file=sys.stderr)
            reply["crash"] += " while it converted this exam"
            self.close()
            self.start()
            self.read_listing()
            for line in self.asked:
                self.send(line)
        return reply

    def receive(self):
        """Its next answer; {"lines"} with its last ones, and a `fault`, if it could not go on;
        {"crash": why} if it was ended."""
        line = self.process.stdout.readline()
        reply = json.loads(line) if line.endswith("\n") else {}
        if reply and "failed" not in reply:
            return reply
        status = self.process.wait()
        if status == 130:
            raise KeyboardInterrupt
        if reply:
            self.fault, self.is_over = reply["failed"], True
            return {"lines": reply["lines"]}
        return {"crash": f"{self.source}: the importer ended with status {status}"}

    def close(self):
        self.process.kill()
        self.process.wait()
        with suppress(OSError):  # what was written and never read
            self.process.stdin.close()
        self.process.stdout.close()
