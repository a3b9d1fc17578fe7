"""The article's training loop, for comparison: what tools/benchmark.py times as the slow baseline.

Written here after the article and its author's code (docs/differences.md names the commit): a
DataLoader of one exam a batch with workers, rotation and shift as two bilinear resamplings one
after the other, three float copies of the grey image, the whole AlexNet in fp32 with two output
units, loss and AUC over a growing list and a TensorBoard point in every step, and a validation that
records gradients. Its workers start anew for each epoch and each validation, which only enough
exams make up for.
"""

import math
import random
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

# Decorator: cuDNN with torch's defaults, which others' loops run with: TF32, any algorithm.
torchs_defaults = torch.backends.cudnn.flags(
    enabled=True, benchmark=False, deterministic=False, allow_tf32=True
)
SHIFT = 0.11  # of the side, at most; the text says 25 px of 256


def bilinear_by_hand(volume, matrix):
    """One affine resampling of (s, H, W) as the article's library did it: the slices are channels,
    each channel has its own copy of the coordinates, and each of the four corners its own integer
    rows, columns and addresses."""
    s, height, width = volume.shape
    pixels = torch.from_numpy(np.indices((height, width)).reshape(2, -1).T)  # (H W, 2)
    centre = torch.tensor([height / 2 - 0.5, width / 2 - 0.5])
    points = pixels.unsqueeze(0).repeat(s, 1, 1).float() - centre  # (s, H W, 2)
    points = points.bmm(matrix[:, :2].T.repeat(s, 1, 1)) + matrix[:, 2].expand_as(points) + centre
    y, x = points[..., 0].clamp(0, height - 2), points[..., 1].clamp(0, width - 2)
    y0, x0 = y.floor(), x.floor()
    rows = (y0 * width).long(), ((y0 + 1) * width).long()
    columns = x0.long(), (x0 + 1).long()
    flat = volume.reshape(s, -1)
    below, right = y - y0, x - x0
    above, left = 1 - below, 1 - right
    return (
        flat.gather(1, rows[0] + columns[0]) * above * left
        + flat.gather(1, rows[0] + columns[1]) * above * right
        + flat.gather(1, rows[1] + columns[0]) * below * left
        + flat.gather(1, rows[1] + columns[1]) * below * right
    ).view(s, height, width)


def articles_transform(volume):
    """Rotate, then shift, then flip, then three copies: (s, H, W) -> (s, 3, H, W) float32."""
    volume = torch.tensor(volume, dtype=torch.float32)
    angle = math.radians(random.uniform(-25, 25))
    turn = torch.tensor(
        [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]]
    )
    volume = bilinear_by_hand(volume, turn)
    down, right = (random.uniform(-SHIFT, SHIFT) * side for side in volume.shape[1:])
    volume = bilinear_by_hand(volume, torch.tensor([[1, 0, down], [0, 1, right]]))
    if random.random() < 0.5:
        volume = volume.flip(-1)
    return volume.repeat(3, 1, 1, 1).permute(1, 0, 2, 3)


class ArticlesDataset(torch.utils.data.Dataset):
    """Loads a volume from disk in every epoch, augments on the CPU, weights both outputs."""

    def __init__(self, exams, train):
        self.exams, self.train = exams, train

    def __len__(self):
        return len(self.exams)

    def __getitem__(self, i):
        volume = np.load(self.exams.paths[i])
        label = torch.eye(2)[int(self.exams.labels[i, 0])]  # negative, positive
        weight = torch.FloatTensor(self.exams.class_weights[self.exams.tasks[0]])
        if self.train:
            return articles_transform(volume), label, weight
        return torch.FloatTensor(np.stack((volume,) * 3, axis=1)), label, weight


class ArticlesNet(nn.Module):
    """The whole AlexNet is kept, though only its features are used."""

    def __init__(self):
        super().__init__()
        from torchvision.models import alexnet  # 170 MB of memory, which other rows do not need

        self.pretrained_model = alexnet(weights=None)
        self.pooling_layer = nn.AdaptiveAvgPool2d(1)
        self.classifer = nn.Linear(256, 2)

    def forward(self, x):
        x = torch.squeeze(x, dim=0)
        pooled = self.pooling_layer(self.pretrained_model.features(x))
        return self.classifer(torch.max(pooled.view(pooled.size(0), -1), 0, keepdim=True)[0])


class ArticlesLoop:
    """One epoch of training and of validation as the article wrote them."""

    def __init__(self, sets, device, workers, folder):
        self.device = device
        # More workers than cores are the article's, and torch advises against them.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        self.loaders = [
            DataLoader(
                ArticlesDataset(exams, train), batch_size=1, shuffle=train, num_workers=workers
            )
            for exams, train in zip(sets, (True, False), strict=True)
        ]
        self.model = ArticlesNet().to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-5, weight_decay=0.1)
        self.writer = SummaryWriter(folder)

    @torchs_defaults
    def epoch(self, train):
        self.model.train(train)
        labels, predictions, losses = [], [], []
        for step, (volume, label, weight) in enumerate(self.loaders[0 if train else 1]):
            volume, label, weight = (x.to(self.device) for x in (volume, label, weight))
            if train:
                self.optimizer.zero_grad()
            logit = self.model(volume.float())
            loss = F.binary_cross_entropy_with_logits(logit, label, weight=weight)
            if train:
                loss.backward()
                self.optimizer.step()
            losses.append(loss.item())
            labels.append(int(label[0, 1]))
            predictions.append(torch.sigmoid(logit)[0, 1].item())
            auc = roc_auc_score(labels, predictions) if len(set(labels)) == 2 else 0.5
            self.writer.add_scalar("loss", losses[-1], step)
            self.writer.add_scalar("auc", auc, step)

    def train(self):
        self.epoch(train=True)

    def evaluate(self):
        self.epoch(train=False)
