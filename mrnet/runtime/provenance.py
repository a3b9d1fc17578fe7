"""What a result was made with: commit, versions, time."""

import functools
import hashlib
import importlib.metadata
import platform
import subprocess
from datetime import datetime
from pathlib import Path

from mrnet.files import ROOT

SOURCES = ("*.py", "mrnet/**/*.py", "data/*/*.py")  # of all that pixels depend on


@functools.cache
def git_sha():
    """Commit of the code, "+" appended when files differ from it; "unknown" outside git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        sha = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return sha + ("+" if changed else "")


@functools.cache
def code_version():
    """`git_sha`; where that does not tell the code, as files were changed or there is no git, with
    a hash of the source files."""
    sha = git_sha()
    return f"{sha} {source_digest(ROOT)}" if sha == "unknown" or sha.endswith("+") else sha


def source_digest(root):
    """Hash of the names and the contents of the code's files below `root`, 12 hex digits."""
    total = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in root.glob(pattern)):
        name = path.relative_to(root).as_posix()
        total.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()[:12]


def made():
    """When and by which code something is made, for the foot of a page."""
    return f"{datetime.now():%Y-%m-%d %H:%M}, commit {git_sha()}"


def versions():
    """Versions of what the numbers depend on: {name: version}."""
    import torch

    names = ("torchvision", "numpy", "scikit-learn")
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **{name: importlib.metadata.version(name) for name in names},
    }
