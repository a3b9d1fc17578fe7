"""One epoch of ours, and with an ingredient taken away: the rows of tools/benchmark.py."""

import copy
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from common import engine
from common.devices import has_bf16, pick_precision
from common.graphs import GraphedStep
from common.optimization import freeze_convolutions
from dataloader import Augmentation, resample
from model import GreyConv2d, MRNet, space_to_depth_convolution
from tools.article_loop import ArticlesLoop

OURS, ARTICLE = "ours", "the article's loop"
COMPILED = "torch.compile"  # minutes: only if --only names it
AUTOTUNE = "max-autotune-no-cudagraphs"  # the graphs are ours


class Ours:
    """One epoch of engine.py, the loop that train.py runs."""

    def __init__(self, sets, device, precision="auto", network=MRNet, augmentation=Augmentation,
                 **options):  # fmt: skip
        train_set, self.valid_set = sets
        self.train_set = copy.copy(train_set)
        self.train_set.transform = augmentation()
        self.device, self.precision = device, pick_precision(precision, device)
        self.model = network().to(device)
        freeze_convolutions(self.model, options.get("frozen", 0))
        cuda = device.type == "cuda"
        on_gpu = train_set.cached[0] is not None and train_set.cached[0].is_cuda
        self.optimizer = torch.optim.Adam(
            [one for one in self.model.parameters() if one.requires_grad],
            lr=torch.tensor(1e-5, device=device),
            weight_decay=0.1,
            fused=options.get("fused", True),
            capturable=cuda,
        )
        kind = GraphedStep if options.get("graphs", True) and on_gpu else engine.TrainingStep
        self.step = kind(self.model, self.optimizer, self.precision)
        if kind is GraphedStep:
            self.step.eager_left = options.get("eager", GraphedStep.EAGER)
            self.capture()

    def capture(self):
        """Capture the graphs, a step for each shape of an exam: once a run, not once an epoch."""
        self.model.train()
        shapes = self.train_set.shapes
        rows = [*{tuple(shape): i for i, shape in enumerate(shapes)}.values()]
        rows = rows[:1] * GraphedStep.EAGER + rows
        views = self.train_set.draw(rows, self.device)
        one = torch.ones(1, self.train_set.targets.shape[1], device=self.device)
        for k, row in enumerate(rows):
            self.step(self.train_set, [row], views[k : k + 1], one, one)

    def train(self):
        engine.train_epoch(self.step, self.train_set)

    def evaluate(self):
        engine.predict(self.model, self.valid_set, self.device, self.precision)


class OnDisk(Ours):
    """--cache disk: every volume is read and copied to the GPU in every epoch, steps are eager."""

    def __init__(self, sets, device):
        sets = [copy.copy(exams) for exams in sets]
        for exams in sets:
            exams.cached = [None] * len(exams)
        super().__init__(sets, device)


class PartOfTheSlices(Ours):
    """--slices"""

    def __init__(self, part, sets, device, **options):
        some = copy.copy(sets[0])
        some.slices = (part, part)
        super().__init__([some, sets[1]], device, **options)


class ThreeFindings(Ours):
    """--task with three findings: one network for all of them."""

    def __init__(self, sets, device):
        super().__init__([with_findings(exams, 3) for exams in sets], device,
                         network=partial(MRNet, tasks=3))  # fmt: skip


def with_findings(exams, n):
    """A data set with its labels n times side by side."""
    several = copy.copy(exams)
    for name in ("labels", "targets", "weights"):
        setattr(several, name, np.repeat(getattr(exams, name), n, axis=1))
    return several


class ThreeChannels(MRNet):
    def forward(self, x):
        return super().forward(x.expand(-1, 3, -1, -1).contiguous())


class SummedConv2d(GreyConv2d):
    """The summed first convolution as it stands: 11 x 11, stride 4, one channel."""

    def forward(self, x):
        return F.conv2d(x, self.weight.sum(1, keepdim=True), self.bias, self.stride, self.padding)


class WithoutBlocks(MRNet):
    def __init__(self):
        super().__init__()
        self.pretrained_model[0] = SummedConv2d(3, 64, kernel_size=11, stride=4, padding=2)
        self.to(memory_format=torch.channels_last)


class WithoutChannelsLast(MRNet):
    def __init__(self):
        super().__init__()
        self.to(memory_format=torch.contiguous_format)

    def feature_maps(self, x):
        x = space_to_depth_convolution(x, self.pretrained_model[0]).contiguous()
        return self.pretrained_model[1:](x)


class CudnnConv2d(GreyConv2d):
    """The first convolution as a CPU has it: 4 x 4 blocks, and cuDNN's convolution of them."""

    def forward(self, x):
        return space_to_depth_convolution(x, self)


class WithoutPatches(MRNet):
    def __init__(self):
        super().__init__()
        self.pretrained_model[0].__class__ = CudnnConv2d


class WithTorchsPooling(MRNet):
    def __init__(self):
        super().__init__()
        for i in (1, 4, 11):
            self.pretrained_model[i] = torch.nn.Sequential(
                torch.nn.MaxPool2d(3, 2), torch.nn.ReLU(inplace=True)
            )


class Compiled(Ours):
    """torch.compile of the convolutional part, once for all slice counts."""

    def __init__(self, mode, sets, device):
        def network():
            made = WithTorchsPooling()
            made.pretrained_model.compile(dynamic=True, mode=mode)
            return made

        # Nothing may be left to compile while a graph is captured.
        super().__init__(sets, device, network=network, eager=len(sets[0]) + GraphedStep.EAGER)
        self.step.eager_left = 0
        self.capture()


class TwoResamplings(Augmentation):
    def apply(self, grey, drawn):
        still = torch.zeros_like(drawn)
        still[3] = 1.0
        turned = torch.cat([drawn[:1], still[1:3], drawn[3:]])
        return resample(resample(grey, turned), torch.cat([still[:1], drawn[1:3], still[3:]]))


def variants(device, workers, folder):
    """Name -> maker of something with train() and evaluate(), the slow baseline last."""
    made = {
        OURS: Ours,
        "- bf16 (fp32)": partial(Ours, precision="fp32"),
        "- channels_last": partial(Ours, network=WithoutChannelsLast),
        "- one channel (3 copies)": partial(Ours, network=ThreeChannels),
        "- one resampling (2)": partial(Ours, augmentation=TwoResamplings),
        "three findings in one": ThreeFindings,
        "half of the slices": partial(PartOfTheSlices, 0.5),
        "a third of the slices": partial(PartOfTheSlices, 1 / 3),
        "two convolutions frozen": partial(Ours, frozen=2),
        "a third of the slices, two frozen": partial(PartOfTheSlices, 1 / 3, frozen=2),
    }
    if not has_bf16(device):
        del made["- bf16 (fp32)"]
    if device.type == "cpu":
        made["- 4x4 blocks"] = partial(Ours, network=WithoutBlocks)
    else:
        made |= {
            "- CUDA graphs": partial(Ours, graphs=False),
            "- first convolution as product": partial(Ours, network=WithoutPatches),
            "- pooling kernel": partial(Ours, network=WithTorchsPooling),
            "- fused Adam": partial(Ours, fused=False),
            "- volumes on the GPU, graphs": OnDisk,
            COMPILED: partial(Compiled, "default"),
            f"{COMPILED}, max-autotune": partial(Compiled, AUTOTUNE),
        }
    return made | {ARTICLE: partial(ArticlesLoop, workers=workers, folder=folder)}
