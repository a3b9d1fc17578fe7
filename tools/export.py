"""Models for other programs: ONNX, or safetensors with config.json.

    python -m tools.export models/acl-sagittal.pt --format onnx         # acl-sagittal-onnx/
    python -m tools.export models/acl-stack.json --format onnx          # three planes in one
    python -m tools.export models/acl-sagittal.pt --format safetensors  # and config.json

Each export is a folder to pass on as it is: the model, and README.md, its card with data, licence,
intended use, figures and failures, to be completed by the author.

ONNX: preprocessing is inside. Each plane is an input of its name, uint8 (slices, height, width) of
any size from the backbone's smallest on; the output is `probability`, float32 (). After export
onnxruntime answers about random exams of five sizes and is compared with torch. Safetensors: the
weights as torch has them; the configuration says how grey levels are scaled.
ONNX's metadata_props (a JSON value each, but the task) and config.json hold the task; the
threshold, where figures of the very model chose one; and what must be done to a scan first, as
mrnet/inference/exam_model.py's `preparation_of` describes it, where the training data recorded it:
orientation, contrast, mirrored (right knees), field_of_view, square, side, window.
Needs `pip install -r requirements-export.txt`.
"""

import importlib.util
import math
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it finds its own folder only

from dataloader import MEAN, STD
from mrnet.documents import as_json
from mrnet.errors import InputError, RunError
from mrnet.files import atomic, write_text
from mrnet.inference.exam_model import load_exam_model, load_stack_model, preparation_of
from mrnet.layout.names import ARTICLE, stack_name
from mrnet.layout.volumes import SMALLEST_SIDE
from mrnet.networks.backbones import BACKBONES
from mrnet.reports.model_card import subject_of_network, subject_of_stack, write_card
from mrnet.runtime import cli
from mrnet.training.checkpoint import load_model

NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "safetensors": ("safetensors",)}
SIZES = ((1, 96, 96), (5, 96, 112), (17, 200, 144), (30, 256, 256), (44, 128, 128))  # s, H, W
TOLERANCE = 1e-5  # of the probability


def parse_arguments():
    parser = cli.make_parser(__doc__)
    model = "a model that train.py wrote, or with onnx a <task>-stack.json"
    parser.add_argument("model", type=Path, help=model)
    parser.add_argument("--format", choices=NEEDED, required=True, help="what to write")
    parser.add_argument("--out", type=Path, help="folder; default: the model's name and the format")
    parser.add_argument("--overwrite", action="store_true", help="replace files in --out")
    return parser.parse_args()


def require(packages):
    """Raise InputError with what is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"{', '.join(missing)}: not installed; pip install -r requirements-export.txt"
        )


def load(path):
    """The ExamModel or StackModel of a file, and the Subject of its card."""
    if path.suffix != ".json":
        return load_exam_model(path), subject_of_network(path)
    task, _, rest = path.stem.partition(f"-{stack_name([ARTICLE])}")
    recipes = rest.removeprefix("-").split("+") if rest else [ARTICLE]
    return load_stack_model(path.parent, task, recipes), subject_of_stack(path, task, recipes)


def random_exam(planes, size, seed):
    """Noise: a tensor uint8 `size` for each plane."""
    rng = np.random.default_rng(seed)
    return tuple(torch.from_numpy(rng.integers(0, 256, size, dtype=np.uint8)) for _ in planes)


def properties_of(subject):
    """What an ONNX file says of itself: {name: text}, all but the task in JSON."""
    values = preparation_of([metadata for _, metadata in subject.networks])
    if subject.threshold is not None:
        values["threshold"] = subject.threshold  # to the last bit
    return {"task": subject.task} | {name: as_json(value) for name, value in values.items()}


def to_onnx(model, properties, out):
    """Write an ExamModel or StackModel as ONNX -> its largest difference from torch.

    Args:
        properties: as `properties_of` returns them, the file's metadata_props.

    Raises:
        RunError: onnxruntime answers otherwise; nothing is written.
    """
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
        program.model.metadata_props.update(properties)
        program.save(temporary)
        difference = largest_difference(model, temporary)
        if not difference <= TOLERANCE:
            raise RunError(f"{out}: would differ from torch by {difference:.1g}; not written")
    return difference


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
    return float(np.max(differences))  # NaN if any is


def to_safetensors(path, threshold, out):
    """Write the weights of a model of train.py, and config.json beside them, which says what they
    are and from which probability on they mean positive (`threshold`, of its Subject)."""
    from safetensors.torch import save_file

    network, metadata = load_model(path)
    config = {name: metadata.get(name) for name in ("task", "plane", "recipe", "architecture",
              "intensity", "channels", "dataset", "metrics", "protocol", "git")}  # fmt: skip
    config["metrics"] = {  # JSON has no NaN, the AUC of exams of one class
        exams: {name: value if math.isfinite(value) else None for name, value in found.items()}
        for exams, found in config["metrics"].items()
    }
    config["threshold"] = threshold
    config["preparation"] = preparation_of([metadata])
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
    write_text(out.with_name("config.json"), as_json(config, indent=2) + "\n")


def run(args):
    """Export one model and compare what can be compared."""
    require(NEEDED[args.format])
    if args.format == "safetensors" and args.model.suffix == ".json":
        raise InputError(f"{args.model}: a stack has no weights of this form; --format onnx")
    out = args.out or args.model.with_name(f"{args.model.stem}-{args.format}")
    if out.exists() and not args.overwrite:
        raise InputError(f"{out}: exists; give another folder as --out, or --overwrite")
    model, subject = load(args.model)
    is_onnx = args.format == "onnx"
    file = out / (f"{args.model.stem}.onnx" if is_onnx else "model.safetensors")
    about = ", ".join(model.planes)
    if is_onnx:
        try:
            difference = to_onnx(model, properties_of(subject), file)
        except RunError:
            with suppress(OSError):
                out.rmdir()  # where it is new
            raise
        about += f"; differs from torch by at most {difference:.1g} over {len(SIZES)} sizes"
    else:
        to_safetensors(args.model, subject.threshold, file)
    write_card(subject, "onnx" if is_onnx else "pytorch", file.name, out / "README.md")
    print(f"model  {file}  {file.stat().st_size / 1e6:.1f} MB, {about}")
    print(f"card   {out / 'README.md'}  complete what is marked TO DO before you pass it on")


if __name__ == "__main__":
    cli.exit_with_status(lambda: run(parse_arguments()))
