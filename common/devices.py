"""Where networks run: device, precision, where volumes are cached, CUDA graphs."""

import math
import platform
from pathlib import Path

import psutil
import torch

from common.errors import InputError
from dataloader import View

PRECISIONS = ("auto", "fp32", "bf16")
CACHES = ("auto", "device", "disk")
DEVICE_ROOM = 2e9  # bytes to leave free beside volumes: a training step on the largest exam


# --- device and precision -------------------------------------------------------------------------


def pick_device(name):
    """ "auto", "cpu" or "cuda" -> torch.device. Raises InputError where there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device here; use --device cpu (or auto)")
    return torch.device(name)


def has_bf16(device):
    """Whether the device multiplies bfloat16 natively; elsewhere autocast is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def pick_precision(name, device):
    """ "auto", "fp32" or "bf16" -> "fp32" or "bf16". Raises InputError without bf16 units."""
    if name == "bf16" and not has_bf16(device):
        raise InputError(f"--precision bf16: this {device.type} has no bfloat16 units; use fp32")
    return ("bf16" if has_bf16(device) else "fp32") if name == "auto" else name


def autocast(device, precision):
    """Context in which convolutions run in `precision`, "fp32" or "bf16"."""
    # Each weight is used once a step, so autocast's cache of cast weights would save nothing.
    return torch.autocast(
        device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False
    )


def device_name(device):
    """The device's product name, with the number of threads in use on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            name = next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        pass
    return f"{name}, {torch.get_num_threads()} threads"


# --- cached volumes -------------------------------------------------------------------------------


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


def cache_volumes(data_sets, where, device, progress=iter):
    """Keep the volumes of all data sets on a GPU that has room, and print whether they are there.

    Elsewhere each is read again in every epoch: from the page cache of the operating system, which
    all processes share, as fast as from memory of its own (docs/speed.md).

    Args:
        data_sets: list of MRDataset.
        where: "device", "disk", or "auto" for the first of these with room.
        progress: wraps the iteration over a data set's volumes.

    Returns:
        "device" or "disk".

    Raises:
        InputError: no room.
    """
    needed, room = sum(exams.nbytes for exams in data_sets), 0
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[0] - DEVICE_ROOM
    if where == "auto" or device.type == "cpu":
        where = "device" if needed <= room else "disk"
    if where == "device":
        if needed > room:
            raise InputError(
                f"--cache device: {needed / 1e9:.1f} GB of volumes, room for "
                f"{max(room, 0) / 1e9:.1f} GB; use --cache disk (or auto)"
            )
        for exams in data_sets:
            exams.cache(device, progress)
    print(f"cache      {where} ({needed / 1e9:.2f} GB of volumes)")
    return where


# --- CUDA graphs ----------------------------------------------------------------------------------


def fill_bucket(volume, buffer):
    """Copy (s, H, W) into (b, H, W), b >= s, repeating the last slice.

    Repeated slices change neither the maximum over slices nor the sum of its gradients.
    """
    s = len(volume)
    buffer[:s].copy_(volume, non_blocking=True)
    buffer[s:].copy_(volume[-1:].expand_as(buffer[s:]), non_blocking=True)


class GraphedSteps:
    """Whole training steps as CUDA graphs, one for each bucket of slice counts.

    An eager step of this small network waits for the launch of some hundred kernels; replaying a
    graph is one launch. The graph holds augmentation, forward, backward and update; the optimizer
    must be capturable with its learning rate in a tensor.

    Args:
        step: engine.TrainingStep of single exams, the step that is captured.
    """

    BUCKET = 4  # slices; at most 3 are repeated
    EAGER = 3  # steps before the first capture: the optimizer's state and the libraries' must exist

    def __init__(self, step):
        self.step, self.model, self.device = step, step.model, step.device
        self.graphs, self.pool, self.stream = {}, None, torch.cuda.Stream()
        self.eager_left = self.EAGER

    def __call__(self, exams, rows, views, targets, weights):
        """One step on one exam, as TrainingStep: logits and losses, valid until the next call."""
        (i,), ((pose, _),) = rows, views
        volume = exams.volume(i)
        bucket = -(-len(volume) // self.BUCKET) * self.BUCKET
        key = (bucket, *volume.shape[1:], pose is None, targets.shape[1])
        if self.eager_left:
            self.eager_left -= 1
            buffers = self.make_buffers(key, volume.device)
            self.fill(buffers, volume, pose, targets, weights)
            with torch.cuda.stream(self.stream):
                self.stream.wait_stream(torch.cuda.default_stream())
                results = self.on_buffers(exams, *buffers)
            torch.cuda.default_stream().wait_stream(self.stream)
            return results
        if key not in self.graphs:
            self.graphs[key] = self.capture(exams, key, volume.device)
        graph, buffers, results = self.graphs[key]
        self.fill(buffers, volume, pose, targets, weights)
        graph.replay()
        return results

    def make_buffers(self, key, device):
        """What a graph reads: volume uint8 (b, H, W), pose (4,) or None, target and weight
        (1, tasks)."""
        volume = torch.zeros(key[:3], dtype=torch.uint8, device=device)
        pose = None if key[3] else torch.zeros(4, device=device)
        return volume, pose, *(torch.zeros(1, key[4], device=device) for _ in range(2))

    def fill(self, buffers, volume, pose, target, weight):
        """Copy one exam into the buffers that a graph reads."""
        fill_bucket(volume, buffers[0])
        for buffer, value in zip(buffers[1:], (pose, target, weight), strict=True):
            if buffer is not None:
                buffer.copy_(value)

    def capture(self, exams, key, device):
        """Record one step: graph, its buffers, and the tensors that hold its results."""
        buffers = self.make_buffers(key, device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            results = self.on_buffers(exams, *buffers)
        self.pool = self.pool or graph.pool()
        return graph, buffers, results

    def on_buffers(self, exams, volume, pose, target, weight):
        """The step on what buffers hold."""
        exam = exams.prepare(volume, self.device, View(pose, None))
        return self.step.on_exams(iter([exam]), target, weight)
