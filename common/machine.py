"""What a process may use of its machine: cores and memory. Needs no torch: importers ask, too."""

import math
import os
from pathlib import Path

import psutil


def usable_cores():
    """Cores that this process may run on: fewer than the machine's under taskset, SLURM or a
    container's cpuset."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory(root=Path("/")):
    """Bytes of memory that this process may still take: the machine's, or its container's if less.

    Args:
        root: folder that holds proc and sys.
    """
    room = psutil.virtual_memory().available
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return room
    groups = {}
    for line in lines:  # "0::/path" is cgroup version 2, "9:memory:/path" version 1
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            groups["memory" if controllers else ""] = path.strip("/")
    for controller, path in groups.items():
        top = root / "sys/fs/cgroup" / controller
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if not controller:
            names = ("memory.max", "memory.current", "inactive_file")
        # The limits of all groups above count too; within a container the path may not exist.
        for folder in [top / path, *(top / path).parents]:
            if folder.is_relative_to(top):
                room = min(room, cgroup_room(folder, *names))
    return max(room, 0)


def cgroup_room(folder, limit, usage, reclaimable):
    """Bytes between a control group's limit and its usage; infinite without a limit.

    Args:
        folder: of the control group; the rest are names of its files, and of a line of memory.stat.
    """
    try:
        most = (folder / limit).read_text().strip()
        used = int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return math.inf if most == "max" else int(most) - used + int(stat.get(reclaimable, 0))
    except (OSError, ValueError):
        return math.inf
