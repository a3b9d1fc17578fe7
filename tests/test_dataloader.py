"""The data set against its files, the augmentation against other implementations."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import affine

from common.errors import InputError
from dataloader import Augmentation, MRDataset, grey_levels, preprocess, read_volume, resample


def test_item_contract(shared_exams):
    exams = MRDataset(shared_exams, "acl", "axial")
    assert len(exams) == 12
    volume, label, weight = exams[0]
    stored = np.load(shared_exams / "train" / "axial" / "0000.npy")
    assert volume.dtype == label.dtype == weight.dtype == torch.float32
    assert volume.shape == (stored.shape[0], 1, 64, 64)
    assert label.tolist() == [1.0] and label.shape == weight.shape == (1,)
    # 4 positives, 8 negatives: positives weigh 8 / 4
    assert weight.tolist() == [2.0] and exams[1][2].tolist() == [1.0]


def test_standardized_is_stanfords_formula(shared_exams):
    stored = np.load(shared_exams / "train" / "axial" / "0003.npy").astype(np.float64)
    wanted = ((stored - stored.min()) / (stored.max() - stored.min()) * 255 - 58.09) / 49.73
    volume = MRDataset(shared_exams, "acl", "axial")[3][0]
    np.testing.assert_allclose(volume[:, 0].numpy(), wanted, atol=1e-5)
    raw = MRDataset(shared_exams, "acl", "axial", intensity="raw")[3][0]
    np.testing.assert_array_equal(raw[:, 0].numpy(), stored)


def test_validation_weights_are_counted_on_training_labels(exams):
    (exams / "valid-acl.csv").write_text("12,1\n13,1\n14,1\n15,0\n")
    valid = MRDataset(exams, "acl", "axial", train=False)
    assert valid.class_weights == (1.0, 2.0) and valid.weights.tolist() == [2, 2, 2, 1]
    valid.set_class_weights(0.5, 3.0)
    assert valid.weights.tolist() == [3, 3, 3, 0.5]


def test_works_in_torchs_dataloader(shared_exams):
    exams = MRDataset(shared_exams, "acl", "axial", transform=Augmentation())
    loader = torch.utils.data.DataLoader(exams, batch_size=1, shuffle=True)
    shapes = [(v.shape[0], v.shape[2:], y.shape, w.shape) for v, y, w in loader]
    assert shapes == [(1, (1, 64, 64), (1, 1), (1, 1))] * 12


def smooth_exam(height=96, width=96):
    noise = np.random.default_rng(0).random((3, height, width)) * 255
    return ndimage.gaussian_filter(noise, (0, 3, 3)).astype(np.float32)


@pytest.mark.parametrize("size", [(96, 96), (80, 120)])
@pytest.mark.parametrize("degrees, right, down", [(0, 7, -4), (25, 0, 0), (-13.5, 5.5, 9.25)])
def test_resample_is_torchvisions_affine(size, degrees, right, down):
    grey = smooth_exam(*size)
    pose = torch.tensor([math.radians(degrees), right / size[1], down / size[0], 1.0])
    mine = resample(torch.from_numpy(grey), pose)
    # torchvision turns clockwise for positive angles, and rounds nothing for floats
    theirs = affine(
        torch.from_numpy(grey)[:, None],
        angle=-degrees,
        translate=[right, down],
        scale=1.0,
        shear=[0.0, 0.0],
        interpolation=InterpolationMode.BILINEAR,
    )[:, 0]
    torch.testing.assert_close(mine, theirs, atol=2e-2, rtol=1e-3)


def test_resample_is_scipys_affine_with_flip():
    grey = smooth_exam()
    angle, right, down = math.radians(20), 6.0, -3.0
    pose = torch.tensor([angle, right / 96, down / 96, -1.0])
    mine = resample(torch.from_numpy(grey), pose).numpy()
    # Each output pixel (row, column) looks up flipped @ rotation^-1 @ (output - centre - shift).
    inverse = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    centre, shift = np.array([47.5, 47.5]), np.array([down, right])
    flipped = grey[:, :, ::-1]
    theirs = np.stack(
        [
            ndimage.affine_transform(
                s, inverse, centre - inverse @ (centre + shift), order=1, mode="grid-constant"
            )
            for s in flipped
        ]
    )
    np.testing.assert_allclose(mine, theirs, atol=2e-2)


def test_resample_moves_right_and_down_and_flips_exactly():
    grey = torch.zeros(2, 64, 64)
    grey[:, 20, 30] = 1.0
    moved = resample(grey, torch.tensor([0.0, 5 / 64, 3 / 64, 1.0]))
    assert moved[1, 23, 35] == pytest.approx(1.0, abs=1e-4)
    flipped = resample(grey, torch.tensor([0.0, 0.0, 0.0, -1.0]))
    torch.testing.assert_close(flipped, grey.flip(-1), atol=1e-4, rtol=0)


def test_outside_is_black_and_all_slices_move_alike():
    torch.manual_seed(1)
    one = torch.full((1, 64, 64), 200.0)
    moved = Augmentation()(one.expand(4, 64, 64))
    assert moved.min() == 0 and all(torch.equal(s, moved[0]) for s in moved)


def test_drawn_poses_are_the_articles():
    torch.manual_seed(0)
    angle, right, down, flip = Augmentation().draw(20_000).T
    for values, limit in ((angle, math.radians(25)), (right, 25 / 256), (down, 25 / 256)):
        assert values.abs().max() <= limit
        # U(-a, a) has deviation a / sqrt(3)
        assert values.std() == pytest.approx(limit / math.sqrt(3), rel=0.02)
        assert values.mean().abs() < 0.02 * limit
    assert set(flip.tolist()) == {-1.0, 1.0} and (flip < 0).float().mean() == pytest.approx(
        0.5, abs=0.02
    )


def test_evaluation_is_not_moved(shared_exams):
    exams = MRDataset(shared_exams, "acl", "axial", train=False)
    assert torch.equal(exams[0][0], exams[0][0])


def damaged(exams, name, content):
    path = exams / "train" / "axial" / "0004.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is None:
        path.unlink()
    else:
        np.save(path, content, allow_pickle=True)
    return path


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("missing", None, "no such volume"),
        ("empty file", b"", "empty"),
        ("not npy", b"PK\x03\x04 a zip", "not a whole, plain .npy"),
        ("no slices", np.zeros((0, 64, 64), np.uint8), "no slices"),
        ("two dimensions", np.zeros((64, 64), np.uint8), "2 dimensions"),
        ("small", np.zeros((3, 62, 64), np.uint8), "63"),
        ("pickled", np.array([[[{"a": 1}]]], dtype=object), "not a whole, plain .npy"),
        ("text", np.full((3, 64, 64), "x"), "expected uint8"),
    ],
)
def test_damaged_volume_is_named(exams, name, content, words):
    path = damaged(exams, name, content)
    with pytest.raises(InputError) as caught:
        MRDataset(exams, "acl", "axial")
    assert str(path) in str(caught.value) and words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truncated_volume_is_named(exams):
    path = exams / "train" / "axial" / "0004.npy"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="0004.npy.*whole"):
        MRDataset(exams, "acl", "axial")


@pytest.mark.parametrize("values", [[0.5], [-1.0], [256.0], [math.nan], [math.inf]])
def test_values_that_are_no_grey_levels(exams, values):
    path = damaged(exams, "", np.full((3, 64, 64), values, np.float32))
    with pytest.raises(InputError, match="0004.npy"):
        read_volume(path)


def test_whole_numbers_of_other_types_are_taken(exams):
    path = damaged(exams, "", np.full((3, 64, 64), 255, np.int64))
    assert read_volume(path).dtype == np.uint8 and read_volume(path).max() == 255


@pytest.mark.parametrize(
    "text, words",
    [
        ("0,1\n1,2\n", "line 2"),
        ("0,1\n1,\n", "line 2"),
        ("0,1\nx/../y,0\n", "line 2"),
        ("0,1\n0,1\n1,0\n", "line 2"),
        ("id,label\n0,1\n", "line 1"),
        ("0,1\n3,1\n", "one class"),
        ("", "one class"),
        ("0;1\n", "line 1"),
    ],
)
def test_bad_csv_is_named(exams, text, words):
    (exams / "train-acl.csv").write_text(text)
    with pytest.raises(InputError, match=words) as caught:
        MRDataset(exams, "acl", "axial")
    assert "train-acl.csv" in str(caught.value)


@pytest.mark.parametrize("intensity", ["standardized", "raw"])
def test_grey_levels_are_those_that_were_fed(intensity):
    volume = torch.randint(0, 256, (3, 64, 70), dtype=torch.uint8)
    volume[0, 0, :2] = torch.tensor([0, 255])  # stretching changes nothing
    grey = grey_levels(preprocess(volume, intensity), intensity)
    torch.testing.assert_close(grey[:, 0], volume.float(), atol=1e-4, rtol=0)


def test_unknown_task_lists_those_that_exist(exams):
    (exams / "train-meniscus.csv").write_text("0,1\n1,0\n")
    with pytest.raises(InputError, match="no task 'meniscus' without valid-meniscus.csv; .*acl"):
        MRDataset(exams, "meniscus", "axial")


def test_missing_data_says_how_to_get_it(tmp_path):
    for folder in (tmp_path / "nothing", tmp_path):
        with pytest.raises(InputError, match="stanfordmlgroup.*phantom/prepare.py"):
            MRDataset(folder, "acl", "axial")


def test_leading_zeros_in_ids_are_dropped(exams):
    (exams / "train-acl.csv").write_text("0000,1\n0001,0\n")
    assert MRDataset(exams, "acl", "axial").ids == ["0", "1"]


def test_subset_and_keep_give_the_same_exams(shared_exams):
    whole = MRDataset(shared_exams, "acl", "axial")
    part = whole.subset([3, 7])
    part.cache("cpu")
    assert part.ids == ["3", "7"] and len(part) == 2 and part.weights.tolist() == [2, 1]
    assert torch.equal(part[1][0], whole[7][0])
    assert part.nbytes == sum(np.load(p).size for p in part.paths)
    assert part.fingerprint() != whole.fingerprint()
