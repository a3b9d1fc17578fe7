"""A saved network with its preprocessing inside: grey slices in, a probability out."""

import torch
from torch import nn

from common.checkpoint import column_name, load_model
from common.config import ARTICLE
from dataloader import CHANNELS, preprocess


class ExamModel(nn.Module):
    """One saved network that takes slices as they are stored.

    Args:
        network: MRNet or MultiPlaneMRNet of one finding.
        metadata: of the model, as `checkpoint.load_model` returns it.

    Attributes:
        task: the finding.
        planes: list, the order of `forward`'s arguments.
    """

    def __init__(self, network, metadata):
        super().__init__()
        self.network, self.task = network, metadata["task"]
        self.planes = metadata["plane"].split("+")
        self.intensity = metadata["intensity"]
        self.channels = metadata.get("channels", CHANNELS[0])

    def forward(self, *volumes):
        """Slices of each plane, uint8 (s, H, W) in MRNet's orientation -> probability float32 ().

        Raises:
            ValueError: another number of planes, or not uint8 (s, H, W).
        """
        if len(volumes) != len(self.planes):
            raise ValueError(f"takes {', '.join(self.planes)}, not {len(volumes)} volumes")
        for plane, volume in zip(self.planes, volumes, strict=True):
            if volume.dtype != torch.uint8 or volume.dim() != 3:
                raise ValueError(
                    f"{plane}: expected uint8 (s, H, W), not {volume.dtype} {tuple(volume.shape)}"
                )
        exam = [preprocess(volume, self.intensity, self.channels) for volume in volumes]
        one = exam[0] if len(exam) == 1 else dict(zip(self.planes, exam, strict=True))
        return torch.sigmoid(self.network(one).squeeze())


def load_exam_model(path, task=None, plane=None):
    """The ExamModel of a model that train.py saved, in evaluation mode on the CPU.

    Args:
        task, plane: what it must be a model of, if given; planes joined by + for several.

    Raises:
        InputError: missing, damaged, or of another task or plane.
    """
    network, metadata = load_model(path, task)
    if plane is not None:  # whatever its recipe
        load_model(path, task, column_name(plane, metadata.get("recipe", ARTICLE)))
    return ExamModel(network, metadata).eval()
