"""Files that may hold exams: on disk or in zip archives, damaged or hostile ones included."""

import functools
import gzip
import io
import logging
import os
import re
import stat
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mrnet.errors import InputError
from mrnet.files import MAX_BYTES, open_regular, open_zip

# Zip and gzip bombs: no file unpacks to more than MAX_BYTES, nor to more than so many times its
# size where that is more than the bytes that any may have.
MOST_TIMES, ANY_BYTES = 100, 2**26
# Names of what may hold an exam and is not opened; a .nii.gz is, and packed text holds none.
PACKED = re.compile(
    r"(\.(tar|tgz|tbz2?|txz|rar|7z|bz2|xz)|(?<!\.(nii|csv|tsv|txt|log|xml))(?<!\.json)\.gz)$",
    re.IGNORECASE,
)
MAX_MEMBERS = 200_000  # of one zip file
SMALLEST = 132  # bytes; no exam is in a smaller member
# Of a DICOM file without its pixels: calls of read, each for an element or a part of one, and bytes
# of one element. Enhanced files have some 10 kB a frame. pydicom takes seconds for so many.
MAX_READS, MAX_ELEMENT = 2**18, 6 * 2**20
DEFLATED = b"1.2.840.10008.1.2.1.99"  # the transfer syntax that is zlib as a whole
# The first element of a DICOM file without preamble: of group 2 or 8, little endian, its value's
# type given or, if this is implicit, its length less than 256 bytes.
BARE = re.compile(rb"[\2\10]\0.\0([A-Z]{2}|.\0\0\0)", re.DOTALL)
COPY_AGAIN = "truncated or damaged; copy or export it again"


@functools.lru_cache(maxsize=4)
def archive(path):
    """A zip file, kept open: an exam's members are read one by one."""
    return open_zip(open_regular(path, most=None))


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

    def open(self, most=None):
        """The file as a stream; `most` as `open_regular` takes it, of a file on disk."""
        if self.member:
            return archive(self.path).open(self.member)
        return open_regular(self.path, most=most)

    def head(self, size):
        with self.open() as stream:
            return stream.read(size)

    def read(self):
        """All bytes, unpacked if the name ends in .gz."""
        with self.open() as stream:
            data, most = stream.read(MAX_BYTES + 1), MAX_BYTES
        if self.name.lower().endswith(".gz"):
            most = most_unpacked(len(data))
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(most + 1)
        if len(data) > most:
            raise InputError(f"{self}: over {most >> 20} MiB; split it into single series")
        return data


def most_unpacked(size):
    """Bytes that a packed file of `size` bytes may unpack to."""
    return min(MAX_BYTES, max(ANY_BYTES, MOST_TIMES * size))


class BoundedStream:
    """A stream for pydicom, which would take hours for a header of zeros.

    Args:
        file: File, for messages.
        stream: its bytes.
        largest: bytes of one read.

    Raises:
        InputError: by `read`, after MAX_READS calls or for more than `largest` bytes.
    """

    def __init__(self, file, stream, largest=MAX_ELEMENT):
        self.file, self.largest, self.left = file, largest, MAX_READS
        self.read_stream, self.seek, self.tell = stream.read, stream.seek, stream.tell

    def read(self, size=-1):
        self.left -= 1
        if self.left < 0 or size > self.largest:
            raise InputError(f"{self.file}: a header without an end, {COPY_AGAIN}")
        return self.read_stream(size)


def read_dicom(file, tags=None, stop_before_pixels=True):
    """`pydicom.dcmread` of a File, in bounded time.

    Args:
        tags: names of the attributes to read; None for all.
    """
    import pydicom

    head = file.head(1024)
    if DEFLATED in head:
        stream = io.BytesIO(inflate(file))
    elif stop_before_pixels:
        stream = file.open()
    else:
        stream = io.BytesIO(file.read())
    with reading(file), stream:
        return pydicom.dcmread(
            BoundedStream(file, stream, MAX_ELEMENT if stop_before_pixels else MAX_BYTES),
            stop_before_pixels=stop_before_pixels,
            specific_tags=tags,
            force=is_dicom(head),  # without preamble
        )


def inflate(file):
    """The data set of a File of the DEFLATED transfer syntax, without its preamble and meta group,
    which tells its own length (PS3.10 7.1)."""
    data = file.read()
    meta = 132 if data[128:132] == b"DICM" else 0
    size = 12 + int.from_bytes(data[meta + 8 : meta + 12], "little")
    most, unzip = most_unpacked(len(data)), zlib.decompressobj(-zlib.MAX_WBITS)
    data = unzip.decompress(data[meta + size :], most)
    if unzip.unconsumed_tail:
        raise InputError(f"{file}: a large deflated file; inflate it with dcmconv first")
    return data


def is_dicom(head):
    """Whether a file's first 132 bytes or more are DICOM's, with or without preamble."""
    return head[128:132] == b"DICM" or bool(BARE.match(head))


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
        if info.file_size > (most := most_unpacked(info.compress_size)):
            raise InputError(
                f"{path}: member '{info.filename}' unpacks to {info.file_size >> 20} MiB, "
                f"more than {most >> 20}; unpack it first and give the folder"
            )
    size = sum(info.file_size for info in members)
    if size > max(MAX_BYTES, MOST_TIMES * path.stat().st_size):
        raise InputError(
            f"{path}: unpacks to {size >> 20} MiB, more than {MOST_TIMES} times its size; "
            "nothing of this zip is used, ask its sender for a clean one"
        )
    whole = (info for info in members if info.file_size >= SMALLEST)
    return [File(path, info.filename) for info in whole if not info.is_dir()]


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
        elif not path.is_file():
            report.log(f"skipped: {path}, not a regular file")
        elif path.suffix.lower() == ".zip":
            try:
                found += sorted(zip_members(path))
            except InputError as error:
                lost(path, str(error))
        else:
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
