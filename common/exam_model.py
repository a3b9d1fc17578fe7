"""Saved networks with their preprocessing inside: grey slices in, a probability out."""

import torch
from torch import nn

from common.checkpoint import column_name, load_model
from common.config import ARTICLE
from common.errors import InputError
from common.stacking import load_task
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
        return torch.sigmoid(self.logit(*volumes))

    def logit(self, *volumes):
        """As `forward`, the logit."""
        if len(volumes) != len(self.planes):
            raise ValueError(f"takes {', '.join(self.planes)}, not {len(volumes)} volumes")
        for plane, volume in zip(self.planes, volumes, strict=True):
            if volume.dtype != torch.uint8 or volume.dim() != 3:
                raise ValueError(
                    f"{plane}: expected uint8 (s, H, W), not {volume.dtype} {tuple(volume.shape)}"
                )
        exam = [preprocess(volume, self.intensity, self.channels) for volume in volumes]
        one = exam[0] if len(exam) == 1 else dict(zip(self.planes, exam, strict=True))
        return self.network(one).squeeze()


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


class StackModel(nn.Module):
    """All networks of a finding and their logistic regression, of exams with all planes.

    Args:
        models: stacking.TaskModels with a stack.

    Attributes:
        task, planes: as in ExamModel.
        threshold: the probability from which on the stack says positive.
    """

    def __init__(self, models):
        super().__init__()
        self.task, self.planes, self.kind = models.task, models.planes, models.stack["features"]
        whole = models.stack["combinations"]["+".join(self.planes)]
        self.threshold = whole["threshold"]
        self.columns = nn.ModuleList(
            nn.ModuleList(as_exam_model(models.task, network) for network in models.networks[name])
            for name in whole["columns"]
        )
        # Regression in double precision, as scikit-learn's.
        weights = torch.tensor([*whole["coefficients"], whole["intercept"]], dtype=torch.float64)
        self.register_buffer("weights", weights)

    def forward(self, *volumes):
        """As ExamModel's, for all planes."""
        given, features = dict(zip(self.planes, volumes, strict=True)), []
        for networks in self.columns:
            logits = [one.logit(*(given[plane] for plane in one.planes)) for one in networks]
            values = torch.stack(logits).double()
            features.append((values if self.kind == "logit" else values.sigmoid()).mean())
        score = (torch.stack(features) * self.weights[:-1]).sum() + self.weights[-1]
        return score.sigmoid().float()


def as_exam_model(task, network):
    """A stacking.Network as ExamModel."""
    about = {"task": task, "plane": "+".join(network.planes)}
    about |= {"intensity": network.intensity, "channels": network.channels}
    return ExamModel(network.model, about)


def load_stack_model(models_dir, task, recipes=(ARTICLE,)):
    """The StackModel of a finding, in evaluation mode on the CPU.

    Raises:
        InputError: no stack, or as `stacking.load_task`.
    """
    models = load_task(models_dir, task, recipes=recipes)
    if models.stack is None:
        raise InputError(f"{models_dir}: {task} has no stack; run train_logistic_regression.py")
    return StackModel(models).eval()
