"""Where the cells of a backbone's last feature maps lie in a slice."""

import torch
import torch.nn.functional as F

from mrnet.networks.backbones import BACKBONES


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
