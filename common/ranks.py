"""Processes that train one network together: the ranks that torchrun starts.

    torchrun --nproc-per-node 4 train.py --task acl --plane sagittal --accumulate 8

Every rank holds the network. The exams of a step are shared out over the ranks and the gradients
summed, so that all of them take the step that one process would take; the exams of an evaluation
are shared out without repeating any. The first rank alone writes files and prints. In a process
that torchrun did not start nothing here does anything.
"""

import os
from contextlib import contextmanager, redirect_stdout

import torch
import torch.distributed as dist

from common.errors import InputError


@contextmanager
def process_group(device, exams_in_step):
    """Within it this process is one of torchrun's ranks, if torchrun started it.

    Args:
        device: torch.device; each rank takes a GPU of its own.
        exams_in_step: of all ranks together.

    Raises:
        InputError: more ranks than exams in a step, or than GPUs, or of several machines.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    ranks, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    if exams_in_step < ranks:
        raise InputError(f"{ranks} ranks share the exams of a step: give --accumulate {ranks} or "
                         "more (or train a network on each GPU: reproduce.py --jobs)")  # fmt: skip
    if ranks != int(os.environ["LOCAL_WORLD_SIZE"]):
        raise InputError("torchrun --nnodes: the ranks must be of one machine; on several, train a "
                         "network on each: reproduce.py --cluster ray")  # fmt: skip
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise InputError(f"torchrun --nproc-per-node: {torch.cuda.device_count()} GPUs here")
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if is_first():
        print(f"ranks      {ranks}, which share the {exams_in_step} exams of a step")
        yield
    else:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield
    dist.destroy_process_group()  # after an error the others may be waiting: not then


def rank():
    """Number of this rank, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first():
    """Whether this rank writes files and prints."""
    return rank() == 0


def share(items):
    """This rank's part of a list or range that all ranks have: every world_size()-th."""
    return items[rank() :: world_size()]


@contextmanager
def first_alone():
    """Within it the first rank is alone; the others come when it has left."""
    if not is_first():
        barrier()
    yield
    if is_first():
        barrier()


def differ(seed, step):
    """Let the random numbers of each rank differ in a step: dropout's, and no others are drawn
    there. Each step has its own, so that a resumed epoch has those of one without a stop: of the
    generators only the first rank's is saved.

    Args:
        seed: of the epoch.
        step: number within the epoch.
    """
    if rank():
        torch.manual_seed(seed + (rank() << 40) + step)


def barrier():
    """Go on when all ranks have come here."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1))  # on the CPU: dist.barrier() would take a GPU's queue


def add_up(tensor):
    """Sum a tensor over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)


def add_up_step(model, results):
    """Sum a step's gradients over the ranks, and the tensors `results`, in place and in one
    message."""
    if world_size() == 1:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    # What no exam of the step reaches (a plane that was dropped) is not updated, as in one process.
    reached = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
    dist.all_reduce(reached, dist.ReduceOp.MAX)
    for parameter, is_reached in zip(parameters, reached.tolist(), strict=True):
        if is_reached and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    tensors = [p.grad for p in parameters if p.grad is not None] + results
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view(tensor.shape))


def any_stops(stop_requested):
    """Whether a rank was asked to stop, and with it all of them.

    Args:
        stop_requested: list of signals' numbers; one that reached another rank is added.
    """
    if world_size() == 1:
        return bool(stop_requested)
    number = torch.tensor(stop_requested[0] if stop_requested else 0)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    if number and not stop_requested:
        stop_requested.append(int(number))
    return bool(number)  # a signal that came in the meantime is one that the others do not know of
