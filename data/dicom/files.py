"""Files that may hold exams: on disk or in zip archives, damaged or hostile ones included."""

import functools
import gzip
import logging
import os
import re
import stat
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from common.errors import InputError

MAX_BYTES = 2**29  # of one file once unpacked: zip and gzip bombs
# Names of what may hold an exam and is not opened; a .nii.gz is, and packed text holds none.
PACKED = re.compile(
    r"(\.(tar|tgz|tbz2?|txz|rar|7z|bz2|xz)|(?<!\.(nii|csv|tsv|txt|log|xml))(?<!\.json)\.gz)$",
    re.IGNORECASE,
)
MAX_MEMBERS = 200_000  # of one zip file
COPY_AGAIN = "truncated or damaged; copy or export it again"


@functools.lru_cache(maxsize=4)
def archive(path):
    """A zip file, kept open: an exam's members are read one by one."""
    return zipfile.ZipFile(path)


@dataclass(frozen=True, order=True)
class File:
    """A file on disk, or the member of a zip file."""

    path: Path
    member: str = ""

    def __str__(self):
        return f"{self.path}:{self.member}" if self.member else str(self.path)

    @property
    def name(self):
        return PurePosixPath(self.member).name if self.member else self.path.name

    @property
    def folder(self):
        return self.path / PurePosixPath(self.member).parent if self.member else self.path.parent

    def open(self):
        return archive(self.path).open(self.member) if self.member else open(self.path, "rb")

    def head(self, size):
        with self.open() as stream:
            return stream.read(size)

    def read(self):
        """All bytes, unpacked if the name ends in .gz."""
        with self.open() as packed:
            stream = gzip.GzipFile(fileobj=packed) if self.name.lower().endswith(".gz") else packed
            data = stream.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise InputError(f"{self}: over {MAX_BYTES >> 20} MiB; split it into single series")
        return data


@contextmanager
def quiet():
    """Without what pydicom, highdicom and nibabel log and warn of: it quotes the header."""
    loggers = [logging.getLogger(name) for name in ("pydicom", "highdicom", "nibabel.global")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def reading(file):
    """Turn whatever a reader raises into one InputError, without its text: it may quote patients.

    MemoryError too: a damaged header can ask for any size.
    """
    try:
        yield
    except (InputError, ImportError):
        raise
    except Exception as error:
        if getattr(error, "strerror", None):
            raise InputError(f"{file}: {error.strerror}; make it readable") from None
        raise InputError(f"{file}: {type(error).__name__}, {COPY_AGAIN}") from None


def zip_members(path):
    """The members of a zip file. Of a hostile or damaged one nothing is used: InputError."""
    with reading(path):
        members = archive(path).infolist()
    if len(members) > MAX_MEMBERS:
        raise InputError(f"{path}: {len(members)} members; split it into one zip an exam")
    for info in members:
        parts = re.split(r"[/\\]", info.filename)
        absolute = parts[0] == "" or ":" in parts[0]
        if absolute or ".." in parts or stat.S_ISLNK(info.external_attr >> 16):
            raise InputError(
                f"{path}: member '{info.filename}' leads out of the folder; "
                "nothing of this zip is used, ask its sender for a clean one"
            )
        if info.flag_bits & 1:
            raise InputError(f"{path}: encrypted; unpack it first and give the folder")
        if info.file_size > MAX_BYTES:
            raise InputError(
                f"{path}: member '{info.filename}' unpacks to {info.file_size >> 20} MiB, "
                f"more than {MAX_BYTES >> 20}; unpack it first and give the folder"
            )
    return [File(path, info.filename) for info in members if not info.is_dir()]


def find_files(source, report):
    """Every file under `source` (a folder, zip or single file), zip members included.

    Links to folders are followed, each folder once. No pipes, no sockets.

    Returns:
        files, sorted; and what may have held some but cannot be read: damaged zip files, archives
        of other kinds, folders without permission, links that lead nowhere. Each of these is a
        fault in the report.
    """
    found, unread = [], []

    def lost(path, why, member=""):
        report.fault(why)
        unread.append(File(Path(path), member))

    paths = [source]
    if source.is_dir():
        paths = sorted(walk(source, lambda e: lost(e.filename, f"{e.filename}: {e.strerror}")))
    for path in paths:
        if not path.exists():
            lost(path, f"{path}: a link that leads nowhere; fetch or copy the file itself")
        elif path.suffix.lower() == ".zip":
            try:
                found += sorted(zip_members(path))
            except InputError as error:
                lost(path, str(error))
        elif path.is_file():
            found.append(File(path))
    files = []
    for file in found:
        if PACKED.search(file.name) or (file.member and file.name.lower().endswith(".zip")):
            lost(file.path, f"{file}: an archive that is not opened; unpack it first", file.member)
        else:
            files.append(file)
    return files, unread


def walk(source, on_error):
    """Paths of the files under a folder, through links to folders, each folder once: under its own
    name rather than a link's, which it may have had all the time."""
    seen, waiting = set(), [source]
    while waiting:
        links = []
        for folder, below, names in os.walk(waiting.pop(0), onerror=on_error):
            real = os.path.realpath(folder)
            if real in seen:
                below.clear()
                continue
            seen.add(real)
            yield from (Path(folder, name) for name in names)
            links += [path for name in below if os.path.islink(path := os.path.join(folder, name))]
        waiting += sorted(links)
