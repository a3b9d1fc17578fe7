"""torch.hub: a saved network in one line, without the scripts.

    model = torch.hub.load("user/repository", "mrnet", weights="acl-sagittal.pt")
    print(model.preparation)    # what must be done to a scan first, such as right knees mirrored
    probability = model(torch.from_numpy(numpy.load("0207.npy")))      # uint8 (s, H, W) -> ()

A clone does as well: torch.hub.load("path/to/clone", "mrnet", source="local", weights=...).
"""

import sys
from pathlib import Path

dependencies = ["torch", "torchvision", "numpy", "scipy", "sklearn", "filelock", "tqdm"]


def mrnet(weights, task=None, plane=None):
    """A network that train.py saved, with its preprocessing inside.

    Args:
        weights: path of a model, such as "models/acl-sagittal.pt". It is read without unpickling
            anything but tensors and plain values.
        task, plane: refuse a model of another finding or plane; planes joined by + for several.

    Returns:
        torch.nn.Module in evaluation mode on the CPU, mrnet.inference.exam_model.ExamModel: it
        takes the slices of each of its `planes`, uint8 (s, H, W), and returns a probability,
        float32 (). Its `network` is the bare MRNet, which returns logits. Its `preparation` is a
        dict of what must be done to a scan before, as the training exams were prepared; nothing
        inside does or checks it: "orientation", "contrast", "mirrored" (right knees to left ones;
        in one that is not, medial and lateral are exchanged), "field_of_view" (mm), "square",
        "side" (px) and "window" (percentiles that become 0 and 255). {} where the training data did
        not record it.
    """
    refuse_other_modules()
    from mrnet.inference.exam_model import load_exam_model

    return load_exam_model(weights, task, plane)


def refuse_other_modules():
    """Raise ImportError where another project's module with a name of ours is loaded already:
    Python would take that one."""
    for name in ("model", "dataloader", "mrnet"):
        path = getattr(sys.modules.get(name), "__file__", None)
        if path and not Path(path).resolve().is_relative_to(Path(__file__).resolve().parent):
            raise ImportError(
                f"a module called {name} is loaded already, from {path}; load this network in a "
                "process of its own"
            )
