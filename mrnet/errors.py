"""What may go wrong outside the code. Each message is one line: what, where, what to do."""

import errno

# RuntimeErrors that mean out of memory, of a CPU and of a GPU; the last three are oneDNN's
# convolutions.
OUT_OF_MEMORY = (
    "can't allocate memory",
    "can't start new thread",
    "out of memory",
    "could not create a primitive",
    "could not create a memory",
    "could not execute a primitive",
)


class InputError(Exception):
    """Something that the user gave is wrong. Exit status 2."""


class MetricError(InputError, ValueError):
    """A metric cannot be computed from these arrays."""


class OneClassError(MetricError):
    """All labels are the same, so the metric is undefined."""


class RunError(Exception):
    """The run failed for a reason outside the code. Exit status 1."""


class Interrupted(Exception):
    """A signal n stopped the run, all is saved; the message says how to resume. Status 128 + n."""

    def __init__(self, number, message):
        super().__init__(message)
        self.number = number


def is_out_of_memory(error):
    """Whether an exception means that memory ran out, the machine's or a GPU's: no file that was
    being read is to blame."""
    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in OUT_OF_MEMORY)
    return isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM


def counted(number, noun):
    """A number and what it counts: "1 fault", "2 faults", "2 studies"."""
    plural = f"{noun[:-1]}ies" if noun == "study" else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def count_unusable(exams, files):
    """What could not be used, in words, of numbers of exams and of files; "" for nothing."""
    counts = {"exam": exams, "file": files}
    words = [counted(count, noun) for noun, count in counts.items() if count]
    return f"{' and '.join(words)} could not be used, named above" if words else ""


def printable(text):
    """A text without control characters, which would end a row or command a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def one_line(error):
    """The first line of an exception's message, or its name, short enough for a message."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return "".join(c for c in line if c.isprintable())
