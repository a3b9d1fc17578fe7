"""What a GPU needs to be fast: functions as CUDA graphs, and a kernel where torch's own is slow.

The kernel is the maximum of 3 x 3 windows with ReLU, in Triton. It comes with torch's CUDA packages
for Linux and needs a C compiler and Python's headers; where it cannot be used, torch's own
operations do the same.
"""

import functools
import sys
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F

from mrnet.errors import one_line

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

BLOCK = 1024  # values a program works on
MOST_VALUES = 2**31 - 1  # addresses are 32 bits wide
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # sums are float32


def max_pool_relu(x):
    """F.relu(F.max_pool2d(x, 3, 2)), with the same gradient.

    Args:
        x: float (s, c, H, W) on a GPU.

    Returns:
        (s, c, h, w), h = (H - 3) // 2 + 1.
    """
    is_fit = x.dtype in DTYPES and x.numel() <= MOST_VALUES
    if is_fit and x.is_contiguous(memory_format=torch.channels_last) and triton_works():
        return PoolingFunction.apply(x)
    return F.relu(F.max_pool2d(x, 3, 2))


@functools.cache
def triton_works():
    """Whether Triton can compile and run here; if not, it is said once."""
    try:
        if triton is None:
            raise ImportError("Triton is not installed")
        PoolingFunction.apply(empty((1, 16, 4, 4), torch.zeros(1, device="cuda")))
    except Exception as error:  # no compiler, no headers, a GPU that it does not know: many kinds
        print(f"pooling by torch, a sixth slower: {one_line(error)}", file=sys.stderr)
        return False
    return True


def empty(shape, like):
    """A tensor of a shape, in channels_last, of the type of another and beside it."""
    kind = {"dtype": like.dtype, "device": like.device}
    return torch.empty(shape, memory_format=torch.channels_last, **kind)


class PoolingFunction(torch.autograd.Function):
    """Both directions in one kernel each, for x in channels_last."""

    @staticmethod
    def forward(ctx, x):
        s, c, height, width = x.shape
        out = empty((s, c, (height - 3) // 2 + 1, (width - 3) // 2 + 1), x)
        places = torch.empty_like(out, dtype=torch.int8)
        grid = (triton.cdiv(out.numel(), BLOCK),)
        with torch.cuda.device_of(x):
            pool[grid](x, out, places, out.numel(), c, height, width, *out.shape[2:], BLOCK=BLOCK)
        ctx.save_for_backward(places)
        ctx.size = x.shape
        return out

    @staticmethod
    def backward(ctx, gradient):
        (places,) = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        _, c, height, width = ctx.size
        result = empty(ctx.size, gradient)
        grid = (triton.cdiv(result.numel(), BLOCK),)
        with torch.cuda.device_of(gradient):
            pool_backward[grid](gradient, places, result, result.numel(), c, height, width,
                                *gradient.shape[2:], BLOCK=BLOCK)  # fmt: skip
        return result


if triton is not None:
    # One kernel for all sizes of slices: another could not be loaded while a graph is captured.
    jit = triton.jit(do_not_specialize=["height", "width", "h", "w"])

    @jit
    def pool(x, out, places, n, c, height, width, h, w, BLOCK: tl.constexpr):
        """Values and places 0 to 8 of the maxima; place -1 where ReLU cuts them off."""
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        channel, cell = i % c, i // c
        column, row, slice_ = cell % w, cell // w % h, cell // (w * h)
        start = ((slice_ * height + 2 * row) * width + 2 * column) * c + channel
        best = tl.load(x + start, mask=i < n, other=0.0)
        place = tl.zeros([BLOCK], tl.int32)
        for k in tl.static_range(1, 9):
            value = tl.load(x + start + (k // 3 * width + k % 3) * c, mask=i < n, other=0.0)
            more = (value > best) | (value != value)  # as torch: the first, or not a number
            best, place = tl.where(more, value, best), tl.where(more, k, place)
        place = tl.where(best <= 0, -1, place)
        tl.store(out + i, tl.where(best <= 0, 0.0, best), mask=i < n)
        tl.store(places + i, place.to(tl.int8), mask=i < n)

    @jit
    def pool_backward(gradient, places, result, n, c, height, width, h, w, BLOCK: tl.constexpr):
        """Each value's gradient, gathered from the windows that it was the maximum of."""
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        channel, cell = i % c, i // c
        x, y, slice_ = cell % width, cell // width % height, cell // (width * height)
        total = tl.zeros([BLOCK], tl.float32)
        for k in tl.static_range(4):
            row, column = y // 2 - k // 2, x // 2 - k % 2
            place = (y - 2 * row) * 3 + x - 2 * column
            inside = (i < n) & (row >= 0) & (row < h) & (column >= 0) & (column < w)
            inside = inside & (y - 2 * row < 3) & (x - 2 * column < 3)
            at = ((slice_ * h + row) * w + column) * c + channel
            hit = inside & (tl.load(places + at, mask=inside, other=-1) == place)
            total += tl.load(gradient + at, mask=hit, other=0.0).to(tl.float32)
        tl.store(result + i, total.to(result.dtype.element_ty), mask=i < n)


class Graphed:
    """A function that replays CUDA graphs, for one whose work on a GPU is shorter than its launch.

    An eager step of a small network waits for the launch of some hundred kernels; replaying a graph
    is one launch. There is a graph for each combination of constants and of tensors' shapes; the
    function's arguments must lie on the GPU, and it must wait for nothing there.

    Args:
        function: of constants, then of tensors, either of which may be None; it returns tensors.
        warm_up: eager calls before the first capture: the optimizer's state and the libraries' must
            exist by then.
    """

    MOST = 96  # graphs; an archive may have hundreds of slice counts, and the rest are eager

    def __init__(self, function, warm_up):
        self.function, self.eager_left = function, warm_up
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.graphs = {}

    def __call__(self, constants, tensors):
        """function(*constants, *tensors).

        Args:
            constants: tuple of what is the same wherever it is equal or the same object.

        Returns:
            what the function returned when it was captured, with this call's values until the next.
        """
        key = (*map(id_of, constants), *(None if one is None else one.shape for one in tensors))
        if key not in self.graphs:
            if self.eager_left or len(self.graphs) >= self.MOST:
                self.eager_left = max(0, self.eager_left - 1)
                return self.eager(constants, tensors)
            self.graphs[key] = self.capture(partial(self.function, *constants), tensors)
        graph, buffers, results = self.graphs[key]
        for buffer, value in zip(buffers, tensors, strict=True):
            if buffer is not None:
                buffer.copy_(value, non_blocking=True)
        graph.replay()
        return results

    def eager(self, constants, tensors):
        """The same without a graph."""
        with self.on_capture_stream():
            return self.function(*constants, *tensors)

    @contextmanager
    def on_capture_stream(self):
        """On the stream that graphs are captured on: no work of another may be part of one."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def capture(self, work, tensors):
        """A graph of `work`, the buffers that it reads, and what holds its results."""
        buffers = [None if value is None else torch.empty_like(value) for value in tensors]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            results = work(*buffers)
        return graph, buffers, results


def id_of(constant):
    """What a constant is told from others by: a number by its value, an object by itself."""
    return constant if isinstance(constant, int | float | bool | str) else id(constant)
