"""MRNet: one logit for one knee MRI exam of any number of slices.

    from model import MRNet
    logit = MRNet()(torch.randn(1, 30, 1, 256, 256))  # (1, 1); random weights until you load some

AlexNet's five convolutional layers process each slice alone, global average pooling makes each
slice a vector of 256 numbers, the maximum over slices makes the exam one such vector, and a linear
layer turns it into a logit.

Sources: Bien et al., "Deep-learning-assisted diagnosis for knee magnetic resonance imaging",
PLOS Medicine 15(11), 2018 (MRNet); Krizhevsky, "One weird trick for parallelizing convolutional
neural networks", arXiv:1404.5997 (this AlexNet); torchvision.models.alexnet (its layers).
"""

import torch
import torch.nn.functional as F
from torch import nn

CHANNELS = 256  # channels of AlexNet's last convolution
SMALLEST_SIDE = 63  # px; below it AlexNet's third pooling has nothing left to pool
# Receptive fields: the centres of neighbouring cells of the last feature maps are CELL_STEP px
# apart, the first is at CELL_FIRST px; from strides and paddings of the layers below.
CELL_STEP, CELL_FIRST = 32, 31


def alexnet_features():
    """AlexNet's convolutional part with PyTorch's default random weights, 2.5 M parameters.

    Layer for layer torchvision's `alexnet().features`, written out because importing torchvision
    takes 170 MB of memory and more than a second. Only the order of ReLU and pooling differs: they
    commute, with the same gradient, and ReLU has a quarter of the values left to work on.
    """
    return nn.Sequential(
        nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(64, 192, kernel_size=5, padding=2),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(192, 384, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(256, CHANNELS, kernel_size=3, padding=1),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.ReLU(inplace=True),
    )


class MRNet(nn.Module):
    """The article's network: AlexNet features, average pool, max over slices, linear classifier.

    Args:
        features: state dict for `pretrained_model` (torchvision's `alexnet().features`), or None
            for random weights.
        dropout: probability of dropping each of the 256 exam features before the classifier. The
            article's text mentions dropout and its code has none, so 0 is the default.
    """

    def __init__(self, features=None, dropout=0.0):
        super().__init__()
        self.pretrained_model = alexnet_features()
        if features is not None:
            self.pretrained_model.load_state_dict(features)
        self.pooling_layer = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(CHANNELS, 1)
        self.to(memory_format=torch.channels_last)  # the layout that convolutions run fastest in

    def forward(self, x):
        """One exam -> one logit, no sigmoid.

        Args:
            x: float (1, s, 3, H, W) as in the article, or (1, s, 1, H, W): the same logit as with
                three equal channels, without the copies. H and W at least 63 px.

        Returns:
            float32 (1, 1).
        """
        x = x.squeeze(0)  # (1, s, c, H, W) -> (s, c, H, W)
        maps = self.feature_maps(x)  # (s, 256, 7, 7) for 256 x 256
        # Pooled in fp32 even after bf16 convolutions: free, and the maximum is precise.
        maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
        slices = self.pooling_layer(maps).flatten(1)  # (s, 256, 1, 1) -> (s, 256)
        exam = slices.amax(dim=0, keepdim=True)  # (s, 256) -> (1, 256)
        with torch.autocast(x.device.type, enabled=False):
            return self.classifier(self.dropout(exam))  # (1, 256) -> (1, 1)

    def feature_maps(self, x):
        """Last feature maps of each slice: (s, 1 or 3, H, W) -> (s, 256, h, w)."""
        first = self.pretrained_model[0]
        x = first(x) if x.shape[1] == 3 else first_convolution_of_grey(x, first)
        return self.pretrained_model[1:](x)

    @torch.inference_mode()
    def heat_maps(self, volume):
        """Class activation maps that add up to the exam's logit, exactly.

        The logit is linear in the last feature maps: each channel's maximum over slices is the
        spatial mean of its map in one slice. That map, times the classifier's weight, over h * w,
        is what the channel adds; the sum over all slices and cells, plus the classifier's bias, is
        the logit. Source: class activation maps, Zhou et al., CVPR 2016.

        Args:
            volume: float32 (s, 1, H, W), preprocessed, on the network's device.

        Returns:
            maps: float32 array (s, h, w), in units of the logit; above 0 is for the finding.
            logit: float, as `forward` returns it in evaluation mode.
        """
        features = self.feature_maps(volume).float()  # (s, 256, h, w)
        s, channels, h, w = features.shape
        slices = features.mean(dim=(2, 3))  # (s, 256, h, w) -> (s, 256)
        exam, best_slice = slices.max(
            dim=0
        )  # (256,), and the slice that each channel's maximum is in
        weight = self.classifier.weight[0]
        best_maps = features[
            best_slice, torch.arange(channels, device=best_slice.device)
        ]  # (256, h, w)
        maps = torch.zeros(s, h, w, device=features.device)
        maps.index_add_(0, best_slice, best_maps * (weight / (h * w))[:, None, None])
        # No matrix product: autocast would round it to bf16, and the sum would not be exact.
        logit = (exam * weight).sum().item() + self.classifier.bias.item()
        return maps.cpu().numpy(), logit


def first_convolution_of_grey(x, conv):
    """AlexNet's first convolution on a grey image: what `conv` gives for three equal channels.

    The weights are summed over their input channels on the way in, so the parameter keeps its
    pretrained shape and its gradient is exact. A kernel of 11 with stride 4 over one channel is
    slow everywhere; the same sum over 4 x 4 blocks laid out as 16 channels is a plain 3 x 3
    convolution (tools/benchmark.py measures the gain).

    Args:
        x: float (s, 1, H, W).
        conv: Conv2d(3, 64, kernel_size=11, stride=4, padding=2).

    Returns:
        (s, 64, h, w) with h = (H - 7) // 4 + 1.
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


def enlarge_maps(maps, height, width):
    """Heat maps resampled to the size of the slices, bilinearly.

    Each cell is placed at the centre of its receptive field, CELL_STEP * i + CELL_FIRST px:
    stretching 7 cells over 256 px would be off by up to 13 px. Beyond the outer cells, their value.

    Args:
        maps: float32 array (s, h, w).

    Returns:
        float32 array (s, height, width).
    """
    h, w = maps.shape[1:]
    # Position of each pixel in cells, then in grid_sample's -1..1 between the outer cells' centres.
    y, x = ((torch.arange(n) - CELL_FIRST) / CELL_STEP for n in (height, width))
    y, x = 2 * y / max(h - 1, 1) - 1, 2 * x / max(w - 1, 1) - 1
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)[None]  # (1, H, W, 2)
    maps = torch.from_numpy(maps)[None]  # the slices are the channels: (1, s, h, w)
    return F.grid_sample(maps, grid, padding_mode="border", align_corners=True)[0].numpy()
