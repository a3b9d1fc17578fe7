"""Augmentations beyond the article's: mirrors that fit anatomy, and stronger changes.

    from mrnet.training.augmentation import make_augmentation
    exams = MRDataset("data", "acl", "sagittal", transform=make_augmentation("strong", "sagittal"))

The article's own is `dataloader.Augmentation`.
"""

import math

import torch

from dataloader import Augmentation
from mrnet.layout.planes import ORIENTATION, view_of

AUGMENTATIONS = ("article", "anatomical", "strong", "none")
SLICES_OF_STRONG = 0.6  # least part of the slices in a step


def make_augmentation(name, plane, orientation=None):
    """The transform of a plane's training exams.

    Args:
        name: in AUGMENTATIONS. "article" flips columns in every plane, which swaps front and back
            in sagittal slices; "anatomical" and "strong" mirror left and right in every plane.
        orientation: three letters, where slices, rows and columns grow to; None is MRNet's.

    Returns:
        an Augmentation, or None.
    """
    if name == "none":
        return None
    if name == "article":
        return Augmentation()
    axes = [
        i for i, letter in enumerate(orientation or ORIENTATION[view_of(plane)]) if letter in "LR"
    ]
    mirror = ("slices", "rows", "columns")[axes[0]]
    return (StrongAugmentation if name == "strong" else Augmentation)(mirror=mirror)


class StrongAugmentation(Augmentation):
    """Pose, then gamma, contrast, blur, noise and cut-outs, the same for all slices.

    Each of the five with probability 0.5. Ranges: gamma 1/1.5 to 1.5 and contrast 0.75 to 1.33
    (both even on a logarithmic scale), blur of SD 0.4 to 1.2 px of 256, Gaussian noise of SD up to
    12 grey levels, one to three cut-outs of 8 to 25 % of the side, set to black.
    """

    GAMMA, CONTRAST = 1.5, 4 / 3
    BLUR, NOISE = (0.4 / 256, 1.2 / 256), 12.0  # of the side; grey levels
    CUTOUTS, CUTOUT_SIDE = 3, (0.08, 0.25)
    POSE = 4  # numbers of a pose
    on_device = False  # `apply` reads what `draw` gave

    def draw(self, n):
        """float32 (n, 27): the pose, five numbers that switch, and what each of the five needs."""
        return torch.cat([super().draw(n), torch.rand(n, 5 + 5 + 1 + 4 * self.CUTOUTS)], dim=1)

    def apply(self, grey, drawn):
        """Grey levels float32 (s, H, W), moved and changed by one row of `draw`."""
        from torchvision.transforms.v2 import functional as v2  # 170 MB that few trainings need

        grey = super().apply(grey, drawn[: self.POSE])
        switches, (gamma, contrast, blur, noise, seed, count), boxes = (
            part.tolist() for part in drawn[self.POSE :].split([5, 6, 4 * self.CUTOUTS])
        )
        switches = [one < 0.5 for one in switches]
        x = grey[:, None].clamp(0, 255).div_(255)  # torchvision's images: (s, 1, H, W), 0 to 1
        if switches[0]:
            x = v2.adjust_gamma(x, self.GAMMA ** (2 * gamma - 1))
        if switches[1]:  # around the mean of each slice
            x = v2.adjust_contrast(x, self.CONTRAST ** (2 * contrast - 1))
        if switches[2]:
            sd = max(x.shape[-2:]) * (self.BLUR[0] + blur * (self.BLUR[1] - self.BLUR[0]))
            x = v2.gaussian_blur(x, kernel_size=2 * math.ceil(3 * sd) + 1, sigma=sd)
        if switches[3]:
            generator = torch.Generator(x.device).manual_seed(int(seed * 2**24))
            sd = noise * self.NOISE / 255
            x = x + sd * torch.randn(x.shape, generator=generator, device=x.device)
        x = x.clamp(0, 1)
        if switches[4]:
            for k in range(1 + int(count * self.CUTOUTS)):
                top, left, height, width = self.box(x.shape[-2:], boxes[4 * k : 4 * k + 4])
                black = torch.zeros((), device=x.device)
                x = v2.erase(x, top, left, height, width, black)
        return x[:, 0] * 255

    def box(self, sides, numbers):
        """Top, left, height and width, px, of a cut-out from four numbers from 0 to 1."""
        low, high = self.CUTOUT_SIDE
        height, width = (
            max(1, round(side * (low + part * (high - low))))
            for side, part in zip(sides, numbers[2:], strict=True)
        )
        top = int(numbers[0] * (sides[0] - height + 1))
        left = int(numbers[1] * (sides[1] - width + 1))
        return top, left, height, width
