"""What a result was made with: commit, versions, time."""

import functools
import importlib.metadata
import platform
import subprocess
from datetime import datetime
from pathlib import Path

import torch


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


def made():
    """When and by which code something is made, for the foot of a page."""
    return f"{datetime.now():%Y-%m-%d %H:%M}, commit {git_sha()}"


def versions():
    """Versions of what the numbers depend on: {name: version}."""
    names = ("torchvision", "numpy", "scikit-learn")
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **{name: importlib.metadata.version(name) for name in names},
    }
