"""An importer (data/dicom/prepare.py, data/rsna/prepare.py) that converts exams on request.

A process of its own: the reader of foreign files shares no memory with the models, and decodes
while they compute. What it is asked and answers: data/dicom/serve.py.
"""

import json
import subprocess
import sys
from contextlib import suppress


class Importer:
    """A running importer.

    Args:
        script: Path of its prepare.py.
        source: Path of the scans.
        folder: that it writes converted volumes to.
        options: arguments, as the exams shall be prepared.

    Attributes:
        fault: why it could not go on, such as a full disk, or None.
        listing: its first answer, {"exams": [[name, source], ...], "lines"}; {} if it failed.
    """

    def __init__(self, script, source, folder, options):
        self.source, self.fault = source, None
        command = [sys.executable, script, "--serve", *options, "--", source, folder]
        self.process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
        )
        self.listing = self.receive()

    def request(self, exam, unless, origin):
        """Ask for an exam by name; arguments as in `serve`."""
        try:
            words = {"exam": exam, "unless": unless, "origin": origin}
            self.process.stdin.write(json.dumps(words) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # the importer has ended: `receive` reports it

    def receive(self):
        """Its next answer; {} if it has ended, or {"lines"} with its last ones, and a `fault`."""
        line = self.process.stdout.readline()
        reply = json.loads(line) if line.endswith("\n") else {}
        if reply and "failed" not in reply:
            return reply
        status = self.process.wait()
        if status == 130:
            raise KeyboardInterrupt
        ended = f"{self.source}: the importer ended with status {status}"
        self.fault = reply.get("failed") or self.fault or ended
        return {"lines": reply["lines"]} if reply else {}

    def close(self):
        self.process.kill()
        self.process.wait()
        with suppress(OSError):  # what was written and never read
            self.process.stdin.close()
        self.process.stdout.close()
