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

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mrnet.networks.backbones import BACKBONES, GPU_SHARE, MOST_ACTIVATIONS, make_features

POOLINGS = ("max", "mean", "attention")
ATTENTION_SIZE = 128  # hidden units of the gated attention; Ilse et al. 2018


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
