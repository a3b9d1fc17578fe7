"""The convolutional networks that MRNet is built on, cut before their classifiers.

Sources: Krizhevsky, "One weird trick for parallelizing convolutional neural networks",
arXiv:1404.5997 (this AlexNet); torchvision.models (the layers of all of them).
"""

from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

# Values that a training step keeps at once for backward, 3.6 GB in fp32; beyond it slices go
# through the backbone in chunks and backward computes each chunk again: 61 slices fit in 8 GB.
# On a GPU, a quarter of its memory.
MOST_ACTIVATIONS = 900e6
GPU_SHARE = 0.25


class Backbone(NamedTuple):
    """A convolutional network of torchvision's, cut before its classifier."""

    channels: int  # of its last feature maps
    smallest_side: int  # px
    # Receptive fields: the centres of neighbouring cells of the last feature maps are cell_step px
    # apart, the first is at cell_first px; from strides and paddings of the layers below.
    cell_step: int
    cell_first: float
    activations: int  # values that backward keeps, per pixel of a slice; measured
    # The input as the weights expect it is x * scale + offset, for each input channel.
    scale: tuple = (1.0, 1.0, 1.0)
    offset: tuple = (0.0, 0.0, 0.0)


# Inception's weights are of Google's, which had pixels from -1 to 1 in place of ImageNet's mean
# (0.485, 0.456, 0.406) and SD (0.229, 0.224, 0.225): torchvision's `transform_input`.
BACKBONES = {
    "alexnet": Backbone(256, 63, 32, 31, 17),
    "squeezenet1_1": Backbone(512, 17, 16, 15, 97),
    "vgg11": Backbone(512, 32, 32, 15.5, 240),
    "vgg16": Backbone(512, 32, 32, 15.5, 362),
    "resnet18": Backbone(512, 32, 32, 0, 109),
    "resnet34": Backbone(512, 32, 32, 0, 159),
    "resnet50": Backbone(2048, 32, 32, 0, 428),
    "inception_v3": Backbone(2048, 75, 32, 37, 253, scale=(0.229 / 0.5, 0.224 / 0.5, 0.225 / 0.5),
                             offset=(-0.015 / 0.5, -0.044 / 0.5, -0.094 / 0.5)),
    "densenet121": Backbone(1024, 32, 32, 14, 650),
    "efficientnet_b0": Backbone(1280, 32, 32, 0, 439),
    "convnext_tiny": Backbone(768, 32, 32, 15.5, 1058),
}  # fmt: skip


def make_features(backbone):
    """A backbone's convolutional part with random weights: (s, 3, H, W) -> (s, channels, h, w).

    Its first convolution also takes one grey channel, with the result of three equal ones.

    Args:
        backbone: name in BACKBONES.
    """
    if backbone == "alexnet":
        return alexnet_features()
    return cut(torchvision_network(backbone))


def torchvision_network(backbone, aux_logits=False):
    """torchvision's own classifier with random weights.

    Args:
        aux_logits: with Inception's auxiliary branch.
    """
    from torchvision import models  # 170 MB of memory, and AlexNet does not need it

    more = {"aux_logits": aux_logits, "init_weights": False} if "inception" in backbone else {}
    return getattr(models, backbone)(weights=None, **more)


def cut(network):
    """The convolutional part of a classifier of torchvision's, names of its parameters kept."""
    features = convolutional_part(network)
    replace_first_convolution(features)
    return features


def convolutional_part(network):
    """The layers of a classifier of torchvision's before its pooling, as they are."""
    if hasattr(network, "features"):
        layers = OrderedDict(network.features.named_children())
        if type(network).__name__ == "DenseNet":  # in its forward
            layers["relu"] = nn.ReLU(inplace=True)
    else:  # ResNet and Inception: layers in a row, then the classifier's
        layers = OrderedDict(network.named_children())
        for name in ("avgpool", "dropout", "fc", "AuxLogits"):
            layers.pop(name, None)
    return nn.Sequential(layers)


def replace_first_convolution(module):
    """Make the first Conv2d within a module a GreyConv2d with the same parameters.

    Returns:
        whether there was one.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d):
            grey = GreyConv2d(child.in_channels, child.out_channels, child.kernel_size,
                              child.stride, child.padding, bias=child.bias is not None)  # fmt: skip
            grey.load_state_dict(child.state_dict())
            setattr(module, name, grey)
            return True
        if replace_first_convolution(child):
            return True
    return False


def alexnet_features():
    """AlexNet's convolutional part with PyTorch's default random weights, 2.5 M parameters.

    Layer for layer torchvision's `alexnet().features`, written out because importing torchvision
    takes 170 MB of memory and more than a second. Only the order of ReLU and pooling differs: they
    commute, with the same gradient, and ReLU has a quarter of the values left to work on. Pooling
    does both; the layers' numbers are torchvision's.
    """
    return nn.Sequential(
        GreyConv2d(3, 64, kernel_size=11, stride=4, padding=2),
        MaxPoolReLU(),
        nn.Identity(),
        nn.Conv2d(64, 192, kernel_size=5, padding=2),
        MaxPoolReLU(),
        nn.Identity(),
        nn.Conv2d(192, 384, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, kernel_size=3, padding=1),
        MaxPoolReLU(),
    )


class MaxPoolReLU(nn.MaxPool2d):
    """The maximum of 3 x 3 windows, two apart, then ReLU."""

    def __init__(self):
        super().__init__(kernel_size=3, stride=2)

    def forward(self, x):
        """(s, c, H, W) -> (s, c, h, w)."""
        if x.is_cuda:
            from mrnet.networks.gpu import max_pool_relu

            return max_pool_relu(x)
        return F.relu(super().forward(x))


class GreyConv2d(nn.Conv2d):
    """A convolution of three channels that takes one grey channel as well, as three equal ones."""

    def forward(self, x):
        """(s, 3 or 1, H, W) -> (s, out, h, w)."""
        has_large_stride = self.stride[0] >= 4  # AlexNet's, ConvNeXt's
        if has_large_stride and x.is_cuda:
            return im2col_convolution(x, self)
        if x.shape[1] == self.in_channels:
            return super().forward(x)
        if has_large_stride:
            return space_to_depth_convolution(x, self)
        # As one channel that lies last: torch then keeps the layout of what follows.
        x = x.squeeze(1)[..., None].permute(0, 3, 1, 2)  # (s, 1, H, W), strides of (s, H, W, 1)
        weight = self.weight.sum(dim=1)[..., None].permute(0, 3, 1, 2)  # -> (out, 1, k, k)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def im2col_convolution(x, conv):
    """A first convolution as one matrix product, for a GPU.

    At each position of the kernel the pixels under it become a row (im2col). The input has so few
    channels that cuDNN takes the gradient of its weights in one block of threads, for a quarter of
    AlexNet's training step (docs/speed.md). The bias is one more column.

    Args:
        x: float (s, 1 or 3, H, W); one channel is taken as three equal ones.
        conv: Conv2d with square kernel, stride and padding.

    Returns:
        (s, out, h, w), in channels_last.
    """
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    weight = conv.weight
    if x.shape[1] != conv.in_channels:
        weight = weight.sum(dim=1, keepdim=True)
    columns = [weight.flatten(1)] + ([] if conv.bias is None else [conv.bias[:, None]])
    weight = torch.cat(columns, dim=1)
    size = weight.shape[1]
    weight = F.pad(weight, (0, -size % 8))  # rows of whole 16 bytes, for tensor cores
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    windows = F.pad(x, [conv.padding[0]] * 4).unfold(2, kernel, stride).unfold(3, kernel, stride)
    windows = windows.permute(0, 2, 3, 1, 4, 5)  # (s, h, w, c, k, k)
    values = windows[0, 0, 0].numel()
    patches = x.new_empty(*windows.shape[:3], weight.shape[1])
    patches[..., :values].unflatten(-1, windows.shape[3:]).copy_(windows)
    patches[..., values:size] = 1.0  # what the bias is multiplied by
    patches[..., size:] = 0.0
    return F.linear(patches, weight).permute(0, 3, 1, 2)


def space_to_depth_convolution(x, conv):
    """A convolution of large stride on a grey image: what `conv` gives for three equal channels.

    The weights are summed over their input channels on the way in, so the parameter keeps its
    pretrained shape and its gradient is exact. AlexNet's kernel of 11 with stride 4 over one
    channel is slow everywhere; the same sum over 4 x 4 blocks laid out as 16 channels is a plain
    3 x 3 convolution (tools/benchmark.py measures the gain).

    Args:
        x: float (s, 1, H, W).
        conv: Conv2d with square kernel and stride; AlexNet's is Conv2d(3, 64, 11, 4, 2).

    Returns:
        (s, out, h, w); h = (H - 7) // 4 + 1 for AlexNet.
    """
    stride, padding = conv.stride[0], conv.padding[0]
    kernel = conv.kernel_size[0]
    blocks = -(-kernel // stride)  # 11 -> 3 blocks of 4
    kernel_pad = blocks * stride - kernel  # one row and column of zero weights: 11 -> 12
    weight = conv.weight.sum(dim=1, keepdim=True)  # (64, 3, 11, 11) -> (64, 1, 11, 11)
    weight = F.pad(weight, (0, kernel_pad, 0, kernel_pad))  # -> (64, 1, 12, 12)
    weight = F.pixel_unshuffle(weight, stride)  # -> (64, 16, 3, 3)
    # Pad the bottom and right edges by exactly what the last output row and column read.
    pad_end = [
        stride * ((side + 2 * padding - kernel) // stride + blocks) - side - padding
        for side in x.shape[-2:]
    ]
    if torch.is_autocast_enabled(x.device.type):  # the rest only moves values: half the bytes
        x = x.to(torch.get_autocast_dtype(x.device.type))
    x = F.pad(x, (padding, pad_end[1], padding, pad_end[0]))
    x = F.pixel_unshuffle(x, stride)  # (s, 1, 4 h', 4 w') -> (s, 16, h', w')
    return F.conv2d(x.contiguous(memory_format=torch.channels_last), weight, conv.bias)
