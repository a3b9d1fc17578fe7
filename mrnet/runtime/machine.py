"""What a process may use of its machine: cores and memory. Needs no torch: importers ask, too."""

import math
import os
from pathlib import Path

import psutil


def usable_cores(root=Path("/")):
    """Cores that this process may use: fewer than the machine's under taskset, SLURM, a container's
    cpuset or its quota of processor time, which is rounded up.

    Args:
        root: folder that holds proc and sys.
    """
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quotas = (cgroup_cores(*group) for group in control_groups("cpu", root))
    return min([cores, *quotas])


def available_memory(root=Path("/")):
    """Bytes of memory that this process may still take: the machine's, or its container's if less.

    Args:
        root: folder that holds proc and sys.
    """
    room = psutil.virtual_memory().available
    for folder, version in control_groups("memory", root):
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if version == 2:
            names = ("memory.max", "memory.current", "inactive_file")
        room = min(room, cgroup_room(folder, *names))
    return max(room, 0)


def control_groups(controller, root):
    """This process's control groups and all groups above, whose limits count too: yields the folder
    of each, and 1 or 2, its version of Linux's control groups. None on other systems.

    Args:
        controller: of version 1, "cpu" or "memory"; version 2 has one hierarchy for all.
        root: folder that holds proc and sys.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    groups = {}
    for line in lines:  # "0::/path" is version 2, "9:memory:/path" version 1
        _, controllers, path = line.split(":", 2)
        if controllers == "" or controller in controllers.split(","):
            groups[controller if controllers else ""] = path.strip("/")
    for name, path in groups.items():
        top = root / "sys/fs/cgroup" / name
        for folder in [top / path, *(top / path).parents]:  # within a container some do not exist
            if folder.is_relative_to(top):
                yield folder, 1 if name else 2


def cgroup_cores(folder, version):
    """Cores that the quota of the control group at `folder` amounts to, rounded up; infinite
    without a quota."""
    try:
        if version == 2:
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            names = "cpu.cfs_quota_us", "cpu.cfs_period_us"
            quota, period = ((folder / name).read_text().strip() for name in names)
        return math.inf if quota in ("max", "-1") else max(1, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


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
