"""When training steps are CUDA graphs, and how: a GPU that would wait for Python does not."""

import torch

from dataloader import View
from mrnet.errors import InputError
from mrnet.networks.gpu import Graphed

EAGER_STEPS = 3  # of the optimizer, before the first capture


def use_graphs(asked, config, device, cached):
    """Whether a training's steps are CUDA graphs.

    Args:
        asked: bool, or None for wherever they can be.
        config: Config.
        cached: where the volumes are, as devices.cache_volumes returns it.

    Raises:
        InputError: asked for, and they cannot be.
    """
    on_gpu = device.type == "cuda" and cached == "device"
    if asked and not on_gpu:
        raise InputError("--cuda-graphs: needs --device cuda and room for --cache device")
    # Strong augmentation branches, one-cycle moves Adam's beta, which a graph holds as it was, and
    # several planes have too many combinations of slice counts.
    other = ["--augment strong"] if config.augment == "strong" else []
    other += ["--lr-scheduler one-cycle"] if config.lr_scheduler == "one-cycle" else []
    other += [f"--plane {' '.join(config.planes)}"] if len(config.planes) > 1 else []
    if asked and other:
        raise InputError(f"--cuda-graphs: not with {', '.join(other)}; leave one of them out")
    return on_gpu and not other and asked is not False


def as_graphs(step, model, config):
    """A training step that replays CUDA graphs, each from the raw volume and the drawn view to the
    update of the weights; exams that go through the network in chunks are eager.

    Args:
        step: train.py's `training_step` without its first three arguments, whose optimizer is
            capturable and has its learning rate in a tensor.
        model: MRNet; its gradients are made here, as graphs add to those that are there.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)

    def work(exams, exams_in_step, is_last, volume, drawn, rows, target, weight):
        return step(exams, volume, View(drawn, rows), target, weight, exams_in_step, is_last)

    graphed = Graphed(work, warm_up=EAGER_STEPS * config.accumulate)

    def graphed_step(exams, volume, view, target, weight, exams_in_step=1, is_last=True):
        call = graphed.eager if model.chunks(volume.shape, volume.device) > 1 else graphed
        return call((exams, exams_in_step, is_last), (volume, *view, target, weight))

    graphed_step.graphs = graphed.graphs
    return graphed_step
