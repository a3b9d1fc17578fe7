"""Saved networks with their preprocessing inside: grey slices in, a probability out."""

import torch
from torch import nn

from dataloader import preprocess
from mrnet.errors import InputError, one_line
from mrnet.inference.task_models import as_network, load_task
from mrnet.layout.description import contrast
from mrnet.layout.names import stack_path
from mrnet.layout.planes import T1_PLANES, in_order, view_of
from mrnet.layout.volumes import SIDE, WINDOW
from mrnet.training.checkpoint import load_model

NO_FLUID = "not fluid-sensitive"  # contrast of T1_PLANES


def preparation_of(networks):
    """What must be done to a scan before networks take it, as their training exams were prepared.
    Nothing inside a network does or checks it: an unmirrored right knee, say, has its medial and
    lateral side exchanged.

    Args:
        networks: list of the metadata of saved models.

    Returns:
        dict with what the networks' data sets recorded, {} where they recorded nothing:
        "orientation": {plane: letters, where slices, rows and columns grow to}.
        "contrast": {plane: "T1", "fluid-sensitive" or NO_FLUID}.
        "mirrored": whether right knees are mirrored to left ones.
        "field_of_view": side of the centred square that is kept, mm; None for the whole slice.
        "square": what makes a slice without a field of view square, "pad" or "crop".
        "side": of a slice, px; "window": percentiles of a volume that become 0 and 255. The
            importers' own: exams that came as arrays may have been made otherwise.

    Raises:
        InputError: the networks learnt from exams that were prepared in different ways.
    """
    found = {}  # {(name, plane, or "" where it is of all): value}
    for metadata in networks:
        dataset = metadata["dataset"] or {}
        if not dataset.get("orientation"):  # not known, or not of knees
            continue
        mine = {
            ("mirrored", ""): bool(dataset.get("mirrored")),
            ("field_of_view", ""): dataset.get("field_of_view"),
            ("square", ""): dataset.get("square") or "pad",
        }
        for plane in metadata["plane"].split("+"):
            mine["orientation", plane] = dataset["orientation"].get(view_of(plane))
            is_further = plane in T1_PLANES
            mine["contrast", plane] = NO_FLUID if is_further else contrast(dataset, plane)
        for (name, plane), value in mine.items():
            if found.setdefault((name, plane), value) != value:
                raise InputError(
                    f"the networks learnt from exams of different {name}, {found[name, plane]} "
                    f"and {value}; give one of them, or train all on exams prepared alike"
                )
    if not found:
        return {}
    planes = in_order({plane for _, plane in found})
    by_plane = {
        name: {plane: found[name, plane] for plane in planes}
        for name in ("orientation", "contrast")
    }
    whole = {name: value for (name, plane), value in found.items() if not plane}
    return by_plane | whole | {"side": SIDE, "window": list(WINDOW)}


class ExamModel(nn.Module):
    """One saved network that takes slices as they are stored.

    Args:
        task: the finding.
        network: task_models.Network.
        preparation: as `preparation_of` returns it.

    Attributes:
        task: the finding.
        planes: list, the order of `forward`'s arguments.
        preparation: what must be done to a scan before `forward` takes it.
    """

    def __init__(self, task, network, preparation=None):
        super().__init__()
        self.preparation = preparation or {}
        self.task, self.network, self.planes = task, network.model, list(network.planes)
        self.intensity, self.channels = network.intensity, network.channels

    def forward(self, *volumes):
        """Slices of each plane, uint8 (s, H, W), prepared -> probability float32 ().

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
        logit = self.network(one).squeeze()
        if not torch.compiler.is_exporting() and not torch.isfinite(logit):
            raise ValueError(f"the network's logit is {logit.item()}: it diverged, train it again")
        return logit


def load_exam_model(path, task=None, plane=None):
    """The ExamModel of a model that train.py saved, in evaluation mode on the CPU.

    Args:
        task, plane: what it must be a model of, if given; planes joined by + for several.

    Raises:
        InputError: missing, damaged, or of another task or plane.
    """
    model, metadata = load_model(path, task)
    if plane not in (None, metadata["plane"]):  # whatever its recipe
        raise InputError(
            f"{path}: a model of {metadata['task']}, {metadata['plane']}, not of {one_line(plane)}"
        )
    network = as_network(model, metadata, "cpu")
    return ExamModel(metadata["task"], network, preparation_of([metadata])).eval()


class StackModel(nn.Module):
    """All networks of a finding and their logistic regression, of exams with all planes.

    What `stacking.combine` does with arrays, as a graph that can be exported.

    Args:
        models: task_models.TaskModels with a stack.

    Attributes:
        task, planes: as in ExamModel.
    """

    def __init__(self, models):
        super().__init__()
        self.task, self.planes, self.kind = models.task, models.planes, models.stack["features"]
        whole = models.stack["combinations"]["+".join(self.planes)]
        self.columns = nn.ModuleList(
            nn.ModuleList(ExamModel(models.task, network) for network in models.networks[name])
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


def load_stack_model(models_dir, task, recipes):
    """The StackModel of a finding, in evaluation mode on the CPU.

    Raises:
        InputError: no stack, none of all planes, or as `task_models.load_task`.
    """
    models = load_task(models_dir, task, recipes)
    if models.stack is None:
        raise InputError(f"{models_dir}: {task} has no stack; run train_logistic_regression.py")
    if (whole := "+".join(models.planes)) not in models.stack["combinations"]:
        first = next(name for names in models.stack["base_models"].values() for name in names)
        raise InputError(
            f"{stack_path(models_dir, task, recipes)}: has no regression of {whole}, too few "
            f"training exams have all of these planes; export its networks singly, such as {first}"
        )
    return StackModel(models).eval()
