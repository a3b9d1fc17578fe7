"""Models for other programs: ONNX, or safetensors with config.json.

    python -m tools.export models/acl-sagittal.pt --format onnx             # acl-sagittal.onnx
    python -m tools.export models/acl-stack.json --format onnx              # three planes in one
    python -m tools.export models/acl-sagittal.pt --format safetensors      # and -config.json

ONNX: preprocessing is inside. Each plane is an input of its name, uint8 (slices, height, width) of
any size from the backbone's smallest on, in MRNet's orientation; the output is `probability`,
float32 (). After export onnxruntime answers about random exams of five sizes and is compared with
torch. Safetensors: the weights as torch has them; the configuration says how to prepare slices.
Needs `pip install -r requirements-export.txt`.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch

from common import cli
from common.checkpoint import load_model
from common.config import ARTICLE
from common.errors import InputError, RunError
from common.exam_model import load_exam_model, load_stack_model
from common.files import atomic, write_text
from common.stacking import stack_name
from dataloader import MEAN, STD
from model import BACKBONES, SMALLEST_SIDE

NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "safetensors": ("safetensors",)}
SIZES = ((1, 96, 96), (5, 96, 112), (17, 200, 144), (30, 256, 256), (44, 128, 128))  # s, H, W
TOLERANCE = 1e-5  # of the probability


def parse_arguments():
    parser = cli.make_parser(__doc__)
    model = "a model that train.py wrote, or with onnx a <task>-stack.json"
    parser.add_argument("model", type=Path, help=model)
    parser.add_argument("--format", choices=NEEDED, required=True, help="what to write")
    parser.add_argument("--out", type=Path, help="default: the model's name with another ending")
    return parser.parse_args()


def require(packages):
    """Raise InputError with what is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"{', '.join(missing)}: not installed; pip install -r requirements-export.txt"
        )


def load(path):
    """The ExamModel or StackModel of a file."""
    if path.suffix != ".json":
        return load_exam_model(path)
    task, _, rest = path.stem.partition(f"-{stack_name()}")
    recipes = rest.removeprefix("-").split("+") if rest else [ARTICLE]
    return load_stack_model(path.parent, task, recipes)


def random_exam(planes, size, seed):
    """Noise: a tensor uint8 `size` for each plane."""
    rng = np.random.default_rng(seed)
    return tuple(torch.from_numpy(rng.integers(0, 256, size, dtype=np.uint8)) for _ in planes)


def to_onnx(model, out):
    """Write an ExamModel or StackModel as ONNX."""
    any_size = dict.fromkeys(range(3), torch.export.Dim.DYNAMIC)
    with atomic(out) as temporary:
        program = torch.onnx.export(
            model,
            random_exam(model.planes, SIZES[1], 0),
            dynamo=True,
            dynamic_shapes={"volumes": (any_size,) * len(model.planes)},
            input_names=list(model.planes),
            output_names=["probability"],
            external_data=False,
            verbose=False,
        )
        program.save(temporary)


@torch.inference_mode()
def largest_difference(model, path):
    """Of onnxruntime's probability from torch's, over an exam of each of SIZES."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    differences = []
    for seed, size in enumerate(SIZES):
        exam = random_exam(model.planes, size, seed)
        given = {name: one.numpy() for name, one in zip(model.planes, exam, strict=True)}
        differences.append(abs(float(session.run(None, given)[0]) - model(*exam).item()))
    return max(differences)


def to_safetensors(path, out):
    """Write the weights of a model of train.py, and beside them what they are: the path of this."""
    from safetensors.torch import save_file

    network, metadata = load_model(path)
    config = {name: metadata.get(name) for name in ("task", "plane", "recipe", "architecture",
              "intensity", "channels", "dataset", "metrics", "protocol", "git")}  # fmt: skip
    config["preprocessing"] = {
        "input": "uint8 (slices, height, width); raw: grey levels as they are; standardized: "
        "stretched to 0..255 over the exam, minus mean, by std",
        "mean": float(MEAN),
        "std": float(STD),
        "smallest_side": max(SMALLEST_SIDE, BACKBONES[network.backbone].smallest_side),
    }
    with atomic(out) as temporary:
        # A backbone that planes share stands in the file once for each of them.
        weights = {name: one.clone().contiguous() for name, one in network.state_dict().items()}
        save_file(weights, temporary, metadata={"format": "pt"})
    about = out.with_name(f"{out.stem}-config.json")
    write_text(about, json.dumps(config, indent=2) + "\n")
    return about


def run(args):
    """Export one model and compare what can be compared."""
    require(NEEDED[args.format])
    out = args.out or args.model.with_suffix(f".{args.format}")
    if args.format == "safetensors":
        if args.model.suffix == ".json":
            raise InputError(f"{args.model}: a stack has no weights of this form; --format onnx")
        print(f"configuration  {to_safetensors(args.model, out)}\nweights        {out}")
        return
    model = load(args.model)
    to_onnx(model, out)
    difference = largest_difference(model, out)
    if difference > TOLERANCE:
        raise RunError(f"{out}: differs from torch by {difference:.1g}; do not use it")
    size = out.stat().st_size / 1e6
    print(f"onnx  {out}  {size:.1f} MB, {', '.join(model.planes)}; differs from torch by at most "
          f"{difference:.1g} over {len(SIZES)} sizes")  # fmt: skip


if __name__ == "__main__":
    cli.exit_with_status(lambda: run(parse_arguments()))
