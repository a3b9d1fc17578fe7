"""Training steps as CUDA graphs: a GPU that would wait for Python does not."""

from contextlib import contextmanager

import torch

from mrnet.errors import InputError
from mrnet.training.engine import TrainingStep


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


class GraphedStep(TrainingStep):
    """A TrainingStep that replays CUDA graphs, for volumes on a GPU.

    An eager step of a small network waits for the launch of some hundred kernels; replaying a graph
    is one launch. One graph for each shape of an exam holds augmentation, forward and backward, one
    more the update; exams that go through the network in chunks are eager. The optimizer must be
    capturable, its learning rate in a tensor.
    """

    EAGER = 3  # steps before the first capture: the optimizer's state and the libraries' must exist
    MOST = 96  # graphs; an archive may have hundreds of slice counts, and the rest are eager
    FREES_GRADIENTS = False  # graphs add to gradients that stay where they are

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.graphs, self.eager_left = {}, self.EAGER
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    def backward(self, exams, volume, view, target, weight, exams_in_step):
        def work(volume, drawn, rows, target, weight):
            seen = view._replace(drawn=drawn, rows=rows)
            return eager(exams, volume, seen, target, weight, exams_in_step)

        eager, given = super().backward, (volume, *view, target, weight)
        if self.model.chunks(volume.shape, self.device) > 1 or self.eager_left:
            with self.on_capture_stream():
                return work(*given)
        key = (id(exams), exams_in_step, *(None if one is None else one.shape for one in given))
        return self.replay(key, work, given)

    def update(self):
        if self.eager_left:
            self.eager_left -= 1
            with self.on_capture_stream():
                super().update()
        else:
            self.replay("update", super().update)

    @contextmanager
    def on_capture_stream(self):
        """On the stream that graphs are captured on: no work of another may be part of one."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def replay(self, key, work, given=()):
        """work(*given) as a graph, captured where `key` is new.

        Args:
            given: tensors, or None, of the same shapes wherever the key is the same.

        Returns:
            what it returned when it was captured, with this call's values until the next.
        """
        if key not in self.graphs:
            if len(self.graphs) >= self.MOST:
                with self.on_capture_stream():
                    return work(*given)
            self.graphs[key] = self.capture(work, given)
        graph, buffers, results = self.graphs[key]
        for buffer, value in zip(buffers, given, strict=True):
            if buffer is not None:
                buffer.copy_(value, non_blocking=True)
        graph.replay()
        return results

    def capture(self, work, given):
        """A graph of `work`, the buffers that it reads, and what holds its results."""
        buffers = [None if value is None else torch.empty_like(value) for value in given]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            results = work(*buffers)
        return graph, buffers, results
