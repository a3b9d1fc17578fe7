"""MRNet: one logit for one knee MRI exam of any number of slices.

    from model import MRNet
    logit = MRNet()(torch.randn(1, 30, 1, 256, 256))  # (1, 1); random weights until you load some
    network = MRNet(backbone="resnet18", pooling="attention", tasks=3)

A convolutional backbone (AlexNet's in the article, ten others of torchvision's) processes each
slice alone, global average pooling makes each slice a vector, pooling over slices (the maximum, in
the article) makes the exam one such vector, and a linear layer turns it into one logit a finding.
`MultiPlaneMRNet` joins the vectors of several planes before the linear layer.

Sources: Bien et al., "Deep-learning-assisted diagnosis for knee magnetic resonance imaging",
PLOS Medicine 15(11), 2018 (MRNet); Krizhevsky, "One weird trick for parallelizing convolutional
neural networks", arXiv:1404.5997 (this AlexNet); torchvision.models (the backbones' layers); Ilse
et al., "Attention-based deep multiple instance learning", ICML 2018 (gated attention).
"""

import math
from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

POOLINGS = ("max", "mean", "attention")
ATTENTION_SIZE = 128  # hidden units of the gated attention; Ilse et al. 2018
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
            from common.kernels import max_pool_relu  # Triton: 70 MB that a CPU does not need

            return max_pool_relu(x)
        return F.relu(super().forward(x))


class MRNet(nn.Module):
    """The article's network: backbone, average pool, pooling over slices, linear classifier.

    Args:
        features: state dict for `pretrained_model` (as `make_features` names its parameters;
            torchvision's `alexnet().features`), or None for random weights.
        dropout: probability of dropping each of the exam's features before the classifier. The
            article's text mentions dropout and its code has none, so 0 is the default.
        backbone: name in BACKBONES.
        pooling: over slices, one of POOLINGS.
        tasks: number of findings, each with a logit.
    """

    def __init__(self, features=None, dropout=0.0, backbone="alexnet", pooling="max", tasks=1):
        super().__init__()
        self.backbone, self.pooling = backbone, pooling
        self.pretrained_model = make_features(backbone)
        self.has_features = features is not None
        if self.has_features:
            self.pretrained_model.load_state_dict(features)
        self.pooling_layer = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        channels = BACKBONES[backbone].channels
        if pooling == "attention":
            self.attention = GatedAttention(channels)
        self.classifier = nn.Linear(channels, tasks)
        expected, is_plain = BACKBONES[backbone], BACKBONES[backbone].offset == (0.0, 0.0, 0.0)
        for name in ("scale", "offset"):
            values = None if is_plain else torch.tensor(getattr(expected, name))[:, None, None]
            self.register_buffer(name, values, persistent=False)
        self.to(memory_format=torch.channels_last)  # the layout that convolutions run fastest in

    def train(self, mode=True):
        """As in torch, but batch normalisation keeps the statistics of `features`, ImageNet's: a
        batch is the slices of one exam, whose own say more about the exam than about knees. Random
        weights have none to keep."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm) and self.has_features:
                module.eval()
        return self

    def forward(self, x):
        """One exam -> one logit a finding, no sigmoid.

        Args:
            x: float (1, s, 3, H, W) as in the article, or (1, s, 1, H, W): the same logit as with
                three equal channels, without the copies. Without the first 1, too. H and W at
                least the backbone's smallest side.

        Returns:
            float32 (1, tasks).
        """
        return self.classify(self.exam_features(x))

    def classify(self, features):
        """Features of an exam (1, channels) -> one logit a finding, float32 (1, tasks)."""
        with torch.autocast(features.device.type, enabled=False):
            return self.classifier(self.dropout(features))

    def exam_features(self, x):
        """One exam -> its features, `x` as in `forward`: float32 (1, channels)."""
        x = x.reshape(-1, *x.shape[-3:])  # (1, s, c, H, W) -> (s, c, H, W)
        return self.pool(self.feature_maps(x))

    def pool(self, maps):
        """Last feature maps (s, channels, h, w) -> features of the exam, float32 (1, channels)."""
        slices = self.slice_features(maps)  # (s, channels)
        if self.pooling == "max":
            return slices.amax(dim=0, keepdim=True)  # (s, channels) -> (1, channels)
        return (slices * self.slice_weights(slices)).sum(dim=0, keepdim=True)

    def feature_maps(self, x):
        """Last feature maps of each slice: (s, 1 or 3, H, W) -> (s, channels, h, w)."""
        if self.scale is not None:
            x = x * self.scale + self.offset  # one channel becomes three that differ
        chunks = self.chunks((x.shape[0], *x.shape[2:]), x.device)
        if chunks == 1:
            return self.pretrained_model(x)
        chunks = x.chunk(chunks)
        if not torch.is_grad_enabled():
            return torch.cat([self.pretrained_model(chunk) for chunk in chunks])
        return torch.cat(
            [checkpoint(self.pretrained_model, chunk, use_reentrant=False) for chunk in chunks]
        )

    def chunks(self, shape, device):
        """Parts that the slices of an exam (s, H, W) go through the backbone in, to fit memory."""
        most = MOST_ACTIVATIONS
        if device.type == "cuda":  # 4 bytes each
            most = GPU_SHARE * torch.cuda.get_device_properties(device).total_memory / 4
        return math.ceil(math.prod(shape) * BACKBONES[self.backbone].activations / most)

    def slice_features(self, maps):
        """Global average of feature maps, in fp32: (s, channels, h, w) -> (s, channels)."""
        # In fp32 even after bf16 convolutions: free, and the maximum is precise.
        maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
        return self.pooling_layer(maps).flatten(1)  # (s, channels, 1, 1) -> (s, channels)

    def slice_weights(self, slices):
        """What each slice counts in each exam feature; each channel's weights sum to 1.

        Args:
            slices: float32 (s, channels).

        Returns:
            (s, channels), (s, 1) or (1, 1) to be broadcast: one-hot for the maximum.
        """
        if self.pooling == "max":
            return F.one_hot(slices.argmax(dim=0), len(slices)).T.to(slices.dtype)
        if self.pooling == "mean":
            return slices.new_full((1, 1), 1 / len(slices))
        with torch.autocast(slices.device.type, enabled=False):
            return self.attention(slices)

    def contributions(self, maps, weight):
        """What each cell of the last feature maps adds to a weighted sum of the exam's features.

        The sum is linear in the maps once the slices' weights are fixed: a channel's exam feature
        is the mean over cells of its maps, each slice with its weight.

        Args:
            maps: float32 (s, channels, h, w), of `exam_maps`.
            weight: float32 (channels,).

        Returns:
            float32 (s, h, w).
        """
        slices = self.slice_features(maps)  # (s, channels)
        weights = self.slice_weights(slices) * weight  # (s, channels)
        cells = maps.shape[2] * maps.shape[3]
        # No matrix product: autocast would round it to bf16, and the sum would not be exact.
        return (maps * (weights / cells).expand_as(slices)[:, :, None, None]).sum(dim=1)

    @torch.inference_mode()
    def exam_maps(self, volume):
        """What `heat_maps_of` takes: the last feature maps, float32 (s, channels, h, w); the same
        for networks that differ in their classifiers alone."""
        return self.feature_maps(volume).float()

    def heat_maps(self, volume):
        """Class activation maps that add up to the exam's logit of the first finding, exactly.

        Each channel's feature maps, times the classifier's weight and the slices' weights in the
        pooling, over h * w: the sum over all channels, slices and cells, plus the classifier's
        bias, is the logit. Source: class activation maps, Zhou et al., CVPR 2016.

        Args:
            volume: float32 (s, 1 or 3, H, W), preprocessed, on the network's device.

        Returns:
            maps: float32 array (s, h, w), in units of the logit; above 0 is for the finding.
            logit: float, the very number that `forward` returns in evaluation mode; the maps add
                up to it but for float32's rounding.
        """
        return self.heat_maps_of(self.exam_maps(volume))

    @torch.inference_mode()
    def heat_maps_of(self, maps):
        """`heat_maps` from the `exam_maps` of a volume."""
        parts = self.contributions(maps, self.classifier.weight[0])
        return parts.cpu().numpy(), self.classify(self.pool(maps))[0, 0].item()


class MultiPlaneMRNet(nn.Module):
    """Several planes in one network: their exam features side by side, then one linear classifier.

    Each plane's own classifier stays, for an auxiliary loss in training.

    Args:
        networks: {plane: MRNet}, all with as many findings; two may share their backbone.
        dropout: as in MRNet, before the joint classifier.
    """

    def __init__(self, networks, dropout=0.0):
        super().__init__()
        self.networks = nn.ModuleDict(networks)
        self.dropout = nn.Dropout(dropout)
        first = next(iter(networks.values()))
        self.backbone, self.pooling = first.backbone, first.pooling
        sizes = [network.classifier.in_features for network in networks.values()]
        self.classifier = nn.Linear(sum(sizes), first.classifier.out_features)

    def forward(self, exam):
        """One exam -> one logit a finding.

        Args:
            exam: {plane: as MRNet.forward takes it}, of at least one plane; the features of a plane
                that is missing are 0.

        Returns:
            float32 (1, tasks).
        """
        return self.all_logits(exam)[:1]

    classify = MRNet.classify

    def exam_features(self, exam):
        """The planes' features side by side, `exam` as in `forward`: float32 (1, all channels)."""
        networks = self.networks
        return self.join({p: networks[p].exam_features(exam[p]) for p in networks if p in exam})

    def join(self, found):
        """Side by side, 0 for a plane that is missing: {plane: (1, channels)} -> (1, channels of
        all planes), 768 of three AlexNets."""
        like = next(iter(found.values()))
        return torch.cat(
            [
                found[plane] if plane in found else like.new_zeros(1, net.classifier.in_features)
                for plane, net in self.networks.items()
            ],
            dim=1,
        )

    def all_logits(self, exam):
        """The joint logits, then those of each plane there is: float32 (1 + planes, tasks)."""
        found, logits = {}, []
        for plane, network in self.networks.items():
            if plane in exam:
                found[plane] = network.exam_features(exam[plane])
                logits.append(network.classify(found[plane]))
        return torch.cat([self.classify(self.join(found)), *logits])

    def exam_maps(self, exam):
        """As MRNet.exam_maps, of each plane that there is: {plane: float32 (s, channels, h, w)}."""
        return {p: net.exam_maps(exam[p]) for p, net in self.networks.items() if p in exam}

    heat_maps = MRNet.heat_maps

    @torch.inference_mode()
    def heat_maps_of(self, maps):
        """As MRNet.heat_maps_of, of all planes together.

        Args:
            maps: `exam_maps` of an exam.

        Returns:
            {plane: float32 array (s, h, w)} that add up to the joint logit less the bias, and the
            joint logit.
        """
        sizes = [network.classifier.in_features for network in self.networks.values()]
        weights = dict(zip(self.networks, self.classifier.weight[0].split(sizes), strict=True))
        networks = {plane: self.networks[plane] for plane in maps}
        found = {p: net.contributions(maps[p], weights[p]) for p, net in networks.items()}
        features = self.join({p: net.pool(maps[p]) for p, net in networks.items()})
        logit = self.classify(features)[0, 0].item()
        return {p: parts.cpu().numpy() for p, parts in found.items()}, logit


class GatedAttention(nn.Module):
    """Weights of the slices by gated attention (Ilse et al. 2018, equation 9).

    Args:
        channels: features of a slice.
    """

    def __init__(self, channels):
        super().__init__()
        self.tanh = nn.Linear(channels, ATTENTION_SIZE)
        self.gate = nn.Linear(channels, ATTENTION_SIZE)
        self.score = nn.Linear(ATTENTION_SIZE, 1)

    def forward(self, slices):
        """Slices (s, channels) -> weights (s, 1) that sum to 1."""
        hidden = torch.tanh(self.tanh(slices)) * torch.sigmoid(self.gate(slices))  # (s, 128)
        return torch.softmax(self.score(hidden), dim=0)


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


def upsample_maps(maps, height, width, backbone):
    """Heat maps resampled to the size of the slices, bilinearly.

    Each cell is placed at the centre of its receptive field, cell_step * i + cell_first px:
    stretching AlexNet's 7 cells over 256 px would be off by up to 13 px. Beyond the outer cells,
    their value.

    Args:
        maps: float32 array (s, h, w).
        backbone: whose maps they are, name in BACKBONES.

    Returns:
        float32 array (s, height, width).
    """
    h, w = maps.shape[1:]
    step, first = BACKBONES[backbone].cell_step, BACKBONES[backbone].cell_first
    # Position of each pixel in cells, then in grid_sample's -1..1 between the outer cells' centres.
    y, x = ((torch.arange(n) - first) / step for n in (height, width))
    y, x = 2 * y / max(h - 1, 1) - 1, 2 * x / max(w - 1, 1) - 1
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)[None]  # (1, H, W, 2)
    maps = torch.from_numpy(maps)[None]  # the slices are the channels: (1, s, h, w)
    return F.grid_sample(maps, grid, padding_mode="border", align_corners=True)[0].numpy()


def regrid(maps, backbone, other, shape):
    """Heat maps of one backbone on the cells of another, their sum unchanged.

    Each cell is shared out among the other's cells by their distance, as bilinear interpolation
    weighs them.

    Args:
        maps: float32 array (s, h, w).
        backbone, other: names in BACKBONES.
        shape: (s, h', w') of the result.

    Returns:
        float32 array of that shape.
    """
    if backbone == other:
        return maps
    mine, theirs = BACKBONES[backbone], BACKBONES[other]

    def shares(cells, others):
        """(others, cells), each column sums to 1."""
        at = torch.arange(cells) * mine.cell_step + mine.cell_first
        places = torch.arange(others) * theirs.cell_step + theirs.cell_first
        near = (1 - (places[:, None] - at).abs() / mine.cell_step).clamp(min=0)
        alone = F.one_hot((places[:, None] - at).abs().argmin(dim=0), others).T
        near = torch.where(near.sum(dim=0) > 0, near, alone)
        return near / near.sum(dim=0)

    rows, columns = (shares(n, m) for n, m in zip(maps.shape[1:], shape[1:], strict=True))
    return (rows @ torch.from_numpy(maps) @ columns.T).numpy()
