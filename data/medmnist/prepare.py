"""A 3-D set of MedMNIST with two classes to MRNet's layout: real exams that may be passed on.

    python data/medmnist/prepare.py adrenalmnist3d.npz data/adrenal
    python data/medmnist/prepare.py adrenalmnist3d.npz data/adrenal-test --valid test
    python train.py --task adrenal --plane sagittal --data-dir data/adrenal

Get the .npz from https://medmnist.com (MedMNIST v2, Yang et al., Scientific Data 10:41, 2023, CC BY
4.0). AdrenalMNIST3D, VesselMNIST3D, NoduleMNIST3D and SynapseMNIST3D have two classes. They are no
knees; README's figures on real exams are of AdrenalMNIST3D, shapes of adrenal glands in CT.

Writes OUT/{train,valid}/{axial,coronal,sagittal}/0000.npy, uint8 (s, size, size), cut along the
three axes, enlarged bilinearly, slices that hold nothing left out, and OUT/<split>-TASK.csv.
"""

import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))  # started as a script, it finds its own folder

from mrnet.errors import InputError  # noqa: E402
from mrnet.files import MAX_BYTES, open_regular, open_zip, write_csv  # noqa: E402
from mrnet.layout.volumes import (
    SMALLEST_SIDE,  # noqa: E402
    write_volume,  # noqa: E402
)
from mrnet.runtime import cli  # noqa: E402
from mrnet.scans.register import write_dataset  # noqa: E402

PLANES = ("axial", "coronal", "sagittal")  # along axis 0, 1, 2 of a volume
MAX_SIDE = 512  # voxels; the sets have 28 or 64


def parse_arguments():
    parser = cli.make_parser(__doc__)
    parser.add_argument("source", type=Path, help="a 3-D set's .npz, as downloaded")
    parser.add_argument("out", type=Path, help="data folder to write to")
    parser.add_argument("--task", help="name of the task; default: the file's, without mnist3d")
    parser.add_argument(
        "--size", type=int, default=112, help="px; 64 trains three times faster, with less detail"
    )
    parser.add_argument(
        "--valid",
        choices=("val", "test"),
        default="val",
        help="the part that becomes the validation exams; test once, when all choices are made",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="write over the exams that OUT has already"
    )
    args = parser.parse_args()
    if args.size < SMALLEST_SIDE:
        parser.error(f"--size is at least {SMALLEST_SIDE}, which AlexNet needs")
    args.task = args.task or args.source.stem.split("mnist3d")[0]
    return args


def read_part(path, part):
    """Volumes uint8 (n, D, H, W) and labels int (n,), 0 or 1, of one part. Unpickles nothing.

    Raises:
        InputError: not such a file, another shape, or other than two classes.
    """
    try:
        with open_regular(path) as file:
            size = sum(info.file_size for info in open_zip(file).infolist())
            if size > MAX_BYTES:
                raise InputError(f"{path}: unpacks to {size >> 20} MiB; download it again")
            file.seek(0)
            arrays = np.load(file, allow_pickle=False)
            volumes, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"].ravel()
    except (OSError, KeyError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error):
        raise InputError(
            f"{path}: no whole .npz with {part}_images and {part}_labels; download it again"
        ) from None
    if volumes.ndim != 4 or volumes.dtype != np.uint8 or len(volumes) != len(labels):
        raise InputError(
            f"{path}: {part}_images {volumes.dtype} {volumes.shape} with {len(labels)} labels; "
            "expected uint8 (n, D, H, W), a 3-D set"
        )
    if max(volumes.shape[1:]) > MAX_SIDE:
        raise InputError(f"{path}: volumes of {volumes.shape[1:]} voxels; take a 3-D set")
    if np.unique(labels).tolist() != [0, 1]:
        raise InputError(f"{path}: {part}_labels are not 0 and 1; take a set with two classes")
    return volumes, labels.astype(int)


def slices_along(volume, axis, size):
    """uint8 (D, H, W) -> uint8 (s, size, size): slices along `axis` that hold anything."""
    slices = [image for image in np.moveaxis(volume, axis, 0) if image.any()]
    bilinear = Image.Resampling.BILINEAR
    return np.stack(
        [np.asarray(Image.fromarray(image).resize((size, size), bilinear)) for image in slices]
    )


def run():
    args = parse_arguments()
    for path in filter(Path.exists, (args.out / split for split in ("train", "valid"))):
        if not args.overwrite:
            raise InputError(f"{path}: exists; choose another folder or add --overwrite")
    parts = {"train": read_part(args.source, "train"), "valid": read_part(args.source, args.valid)}
    write_dataset(
        args.out,
        name=args.source.stem,
        version="MedMNIST v2",
        synthetic=False,
        source=f"{args.source.name}, training and {args.valid} part, {args.size} px",
        licence="see https://medmnist.com; AdrenalMNIST3D: CC BY 4.0",
        orientation=None,  # planes are the array's axes
    )
    first = 0
    for split, (volumes, labels) in parts.items():
        rows = {}
        for i, volume in enumerate(tqdm(volumes, split, unit="exam", disable=None), start=first):
            if volume.min() == volume.max():
                print(f"left out {split} exam {i}: blank, every voxel is {volume.min()}")
                continue
            rows[i] = labels[i - first]
            for axis, plane in enumerate(PLANES):
                path = args.out / split / plane / f"{i:04d}.npy"
                write_volume(path, slices_along(volume, axis, args.size))
        write_csv(args.out / f"{split}-{args.task}.csv", rows.items())
        print(f"{split:5}  {len(rows):5d} exams, {sum(rows.values())} positive")
        first += len(volumes)
    print(f"written  {args.out}, task {args.task}")


def main():
    try:
        run()
    except InputError as error:
        print(f"prepare.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        return f"prepare.py: failed: {error.filename}: {error.strerror}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
