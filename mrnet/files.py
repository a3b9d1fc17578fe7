"""Files that appear whole or not at all.

Everything is written to a temporary file beside its place, flushed to the disk and renamed, so a
reader sees the old file or the new one and never a part. Needs neither torch nor NumPy, so the
importers under data/ write with it too.
"""

import csv
import errno
import getpass
import glob
import hashlib
import io
import os
import re
import stat
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mrnet.errors import InputError

# A first character that begins a formula, but not a number's sign, nor a dash alone (OWASP, "CSV
# Injection").
FORMULA = re.compile(r"'|[=@]|[+-](?!$|[0-9.]+(e[+-]?[0-9]+)?$)")
ROOT = Path(__file__).parents[1]  # the project's folder
UMASK = os.umask(0)
os.umask(UMASK)
MAX_BYTES = 2**29  # of a file that is read as a whole
MAX_DIRECTORY = 2**24  # bytes of a zip file's list of members, some 150,000 of them


def open_regular(path, mode="rb", most=MAX_BYTES, **options):
    """`open` for reading, of a regular file or a link to one: a pipe would wait for its writer for
    ever, and a device may have no end.

    Args:
        most: bytes; None for a file of which only parts are read.

    Raises:
        OSError: another kind of file, or a larger one; it has a `strerror`.
    """

    def opener(path, flags):
        handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
        status = os.fstat(handle)
        if stat.S_ISREG(status.st_mode) and (most is None or status.st_size <= most):
            return handle
        os.close(handle)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        raise OSError(errno.EFBIG, f"Larger than {most >> 20} MiB", str(path))

    return open(path, mode, opener=opener, **options)


def read_bytes(path, most=MAX_BYTES):
    """The bytes of a file; arguments and errors as `open_regular`."""
    with open_regular(path, most=most) as file:
        return file.read()


def read_text(path, errors="strict"):
    """The text of a UTF-8 file; errors as `open_regular`."""
    with open_regular(path, "r", encoding="utf-8", errors=errors) as file:
        return file.read()


def open_zip(file):
    """A ZipFile, of a file that is open for reading: zipfile would take a minute for the list of
    millions of members.

    Raises:
        zipfile.BadZipFile: too many members, or no zip file.
    """
    end = zipfile._EndRecData(file)
    if end and end[zipfile._ECD_SIZE] > MAX_DIRECTORY:
        raise zipfile.BadZipFile("too many members")
    return zipfile.ZipFile(file)


@contextmanager
def file_lock(path, busy):
    """Hold the lock file at `path`, against other processes.

    Raises:
        InputError: another one holds it; `busy` is its text.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(busy) from None
    try:
        yield
    finally:
        lock.release()


def alone_at(path, busy):
    """Within it no other process of this user on this machine is within it for the same path, which
    need not exist. Nothing is left beside it: the lock lies among the temporary files.

    Raises:
        InputError: another one is; `busy` is its text.
    """
    user = getattr(os, "getuid", getpass.getuser)()  # a container's user may have no name
    whose = hashlib.sha256(f"{user} {Path(path).resolve()}".encode()).hexdigest()[:16]
    return file_lock(Path(tempfile.gettempdir()) / f"mrnet-{whose}.lock", busy)


def find_target(path):
    """The Path that a file at `path` is written to: where a symbolic link leads.

    Raises:
        InputError: a folder, a device or anything else that is no regular file is there.
    """
    target = Path(os.path.realpath(path))
    if os.path.lexists(target) and not target.is_file():
        raise InputError(f"{path}: exists and is not a regular file; name another file")
    return target


@contextmanager
def named_in_errors(path):
    """Within it an OSError that names no file, as of a write to a full disk, names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def atomic(path, mode=None):
    """Yield a temporary path beside `path`; on success flush it and rename it to `path`. Where that
    is a symbolic link, the file that it leads to is replaced.

    Args:
        mode: permissions of the file; by default those of any new file of this user.

    Raises:
        InputError: as `find_target`.
    """
    target = find_target(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}."
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=prefix, suffix=".tmp")
    os.close(handle)
    try:
        with named_in_errors(path):
            yield Path(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~UMASK if mode is None else mode)
        os.replace(temporary, target)
        flush_folder(target.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def unwritable(path, error):
    """An InputError that says why an output file cannot be written.

    Args:
        error: OSError.
    """
    return InputError(f"{path}: cannot be written ({error.strerror}); give another --out")


def remove_leftovers(path):
    """Remove the temporary files that killed runs of `atomic` left for `path`, which no other
    process writes now."""
    path = find_target(path)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        leftover.unlink()


def flush_folder(folder):
    """Flush a folder, so that a renamed file keeps its name over a power loss."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_bytes(path, data, mode=None):
    """Write a file atomically; `data` is bytes, `mode` as in `atomic`."""
    with atomic(path, mode) as temporary:
        temporary.write_bytes(data)


def write_text(path, text):
    """Write a text file atomically, UTF-8."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_csv(path, rows):
    """Write rows of plain values as CSV, atomically."""
    write_text(path, "".join(map(csv_line, rows)))


def csv_line(cells):
    """Plain values as a line of CSV in which no text is a formula."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(map(as_cell, cells))
    return text.getvalue()


def as_cell(value):
    """A text that a spreadsheet program would compute, such as "=1+1", with ' before it.

    So are texts that begin with ' themselves: `from_cell` takes away what was added.
    """
    return f"'{value}" if isinstance(value, str) and FORMULA.match(value) else value


def from_cell(text):
    """What `as_cell` was given."""
    return text[1:] if text.startswith("'") and FORMULA.match(text[1:]) else text


def check_writable(folder, option="--models-dir"):
    """Raise InputError before the first epoch if nothing can be written to `folder`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"{folder}: cannot write there ({error.strerror}); give another {option}"
        ) from None
