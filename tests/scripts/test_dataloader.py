"""The data set against its files, the augmentation against other implementations."""

import argparse
import errno
import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PLANES
from scipy import ndimage
from scipy.stats import binom
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import affine

from dataloader import Augmentation, MRDataset, grey_levels, preprocess, resample, rescale
from mrnet.errors import InputError
from mrnet.layout import labels
from mrnet.layout.description import MRNET, read_dataset, read_own_labels
from mrnet.layout.labels import OWN_LABELS, LabelRow, label_rows, read_groups, read_labels, tasks
from mrnet.layout.volumes import open_volume, read_volume, volume_path
from mrnet.runtime import cli
from mrnet.scans.register import EXAMS, Register, merge_csv
from mrnet.training.datasets import MultiPlaneDataset


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
    assert valid.class_weights == {"acl": (1.0, 2.0)}
    assert valid.weights[:, 0].tolist() == [2, 2, 2, 1]
    valid.set_class_weights(3.0)
    assert valid.weights[:, 0].tolist() == [3, 3, 3, 1]
    assert valid.targets[:, 0].tolist() == [1, 1, 1, 0]


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
    augmentation = Augmentation()
    moved = augmentation.apply(one.expand(4, 64, 64), augmentation.draw(1)[0])
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
    exams, still = (MRDataset(shared_exams, "acl", "axial", transform=t)
                    for t in (Augmentation(), None))  # fmt: skip
    assert torch.equal(exams.exam(0), still.exam(0))
    assert not torch.equal(exams[0][0], still[0][0])  # as it is trained on


def test_each_plane_is_moved_as_if_alone_and_by_a_pose_of_its_own(shared_exams):
    axes = dict(zip(PLANES, ("columns", "rows", "slices"), strict=True))
    moves = {plane: Augmentation(mirror) for plane, mirror in axes.items()}
    exams = MultiPlaneDataset(shared_exams, "acl", PLANES, transform=moves)
    alone = {p: MRDataset(shared_exams, "acl", p, transform=moves[p]) for p in PLANES}
    exams.slices = (0.5, 0.5)
    torch.manual_seed(0)
    rows, poses = [3, 7, 0], set()
    for i, view in zip(rows, exams.draw(rows), strict=True):
        moved = exams.exam(i, view=view)
        assert list(moved) == list(PLANES)
        for plane, one in view.items():
            assert torch.equal(moved[plane], alone[plane].exam(i, view=one))
            assert len(one.rows) == round(len(np.load(alone[plane].paths[i])) / 2)
            poses.add(tuple(one.drawn.tolist()))
    assert len(poses) == 9


def test_planes_are_left_out_as_often_as_asked_for_and_one_stays(shared_exams):
    exams = MultiPlaneDataset(shared_exams, "acl", PLANES)
    exams.plane_dropout = 0.3
    torch.manual_seed(0)
    views = exams.draw([0] * 2000)
    # Where all three would go, 0.027 of all steps, one of them stays.
    for count, p in ((1, 3 * 0.7 * 0.09 + 0.027), (2, 3 * 0.49 * 0.3), (3, 0.343)):
        low, high = binom.interval(0.9999, 2000, p)
        assert low <= sum(len(view) == count for view in views) <= high
    low, high = binom.interval(0.9999, 2000, 0.7 + 0.027 / 3)
    for plane in PLANES:
        assert low <= sum(plane in view for view in views) <= high
    assert {len(view) for view in views} == {1, 2, 3}


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
    with pytest.raises(InputError, match="0004.npy.*whole") as caught:
        MRDataset(exams, "acl", "axial")
    assert "empty" not in str(caught.value) and "None" not in str(caught.value)


@pytest.mark.parametrize("value", [0, 7])
def test_a_blank_volume_is_refused(tmp_path, value):
    np.save(tmp_path / "1.npy", np.full((3, 64, 64), value, np.uint8))
    with pytest.raises(InputError, match=f"1.npy: blank, every voxel is {value}"):
        read_volume(tmp_path / "1.npy")


@pytest.mark.parametrize("values", [[0.5], [-1.0], [256.0], [math.nan], [math.inf]])
def test_values_that_are_no_grey_levels(exams, values):
    path = damaged(exams, "", np.full((3, 64, 64), values, np.float32))
    with pytest.raises(InputError, match="0004.npy"):
        read_volume(path)


def test_whole_numbers_of_other_types_are_taken(exams):
    volume = np.full((3, 64, 64), 255, np.int64)
    volume[0, 0, 0] = 0
    path = damaged(exams, "", volume)
    assert read_volume(path).dtype == np.uint8 and read_volume(path).max() == 255


@pytest.mark.parametrize(
    "text, words",
    [
        ("0,1\n1,2\n", "line 2"),
        ("0,1\n1,x\n", "line 2"),
        ("0,1\n1,\n", "1 exam of one class only"),
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
    assert part.ids == ["3", "7"] and part.weights.tolist() == [[2], [1]]
    assert torch.equal(part[1][0], whole[7][0])
    assert part.nbytes == sum(np.load(p).size for p in part.paths)
    assert part.fingerprint() != whole.fingerprint()


# --- labels, groups, descriptions -----------------------------------------------------------------


def test_rows_of_labels_and_their_faults(tmp_path):
    text = (
        "\ufeff007,1\r\n\r\n 12 ,0 \n12,1\n0,2\nx,1\n3\n1234567890123,0\n000,1\n1,1.5\n2,0.7\n3,\n"
    )
    text += "4,0.6666666666666666\n"
    path = tmp_path / "train-acl.csv"
    path.write_bytes(text.encode())
    rows = list(label_rows(tmp_path, "acl", "train"))
    good = [(row.exam_id, row.label) for row in rows if row.fault is None]
    assert good[:3] == [("7", 1.0), ("12", 0.0), ("2", 0.7)]
    assert good[3][0] == "3" and np.isnan(good[3][1])
    assert good[4:] == [("4", 2 / 3)]  # as Python prints it
    faults = [fault.removeprefix(f"{path}, line ") for *_, fault in rows if fault]
    assert all(row == LabelRow(fault=row.fault) for row in rows if row.fault)
    assert faults == [
        "4: id 12 is listed twice; keep one row",
        "5: label '2' is not from 0 to 1, or empty",
        "6: expected `id,label` with a whole-number id",
        "7: expected `id,label` with a whole-number id",
        "8: expected `id,label` with a whole-number id",
        "9: id 0 is listed twice; keep one row",
        "10: label '1.5' is not from 0 to 1, or empty",
    ]
    path.write_bytes(b"0,1\n\xff\xff,0\n")
    *_, (*_, fault) = label_rows(tmp_path, "acl", "train")
    assert str(path) in fault and "cannot be read as a CSV of `id,label`" in fault
    (row,) = label_rows(tmp_path, "acl", "valid")
    assert row.exam_id is row.label is None and "valid-acl.csv: cannot be read" in row.fault


def test_labels_may_have_weights(exams):
    path = exams / "train-acl.csv"
    before = MRDataset(exams, "acl", "axial")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([f"{lines[0]},3", f"{lines[1]},0.5", f"{lines[2]},1", *lines[3:]]))
    after = MRDataset(exams, "acl", "axial")
    trust = np.array([3, 0.5] + [1] * (len(lines) - 2), np.float32)[:, None]
    np.testing.assert_allclose(after.weights, before.weights * trust)
    np.testing.assert_array_equal(after.targets, before.targets)
    assert after.class_weights == before.class_weights  # trust is no count
    assert after.fingerprint() != before.fingerprint()
    assert after.subset([1, 3]).label_weights[:, 0].tolist() == [0.5, 1]
    for weight in ("0", "-1", "nan", "inf", "x", "", "1e9"):
        path.write_text(f"{lines[0]},{weight}\n")
        (row,) = label_rows(exams, "acl", "train")
        assert "line 1: weight" in row.fault


def test_labels_in_the_order_of_the_file(exams):
    (exams / "valid-acl.csv").write_text("13,0\n12,1\n19,0\n")
    ids, labels = read_labels(exams, "acl", "valid")
    assert ids == ["13", "12", "19"] and labels.tolist() == [0, 1, 0] and labels.dtype == np.float32
    (exams / "train-other.csv").write_text("0,1\n1,0\n")
    (exams / "valid-other.csv").write_text("12,1\n13,0\n")
    (exams / "train-groups.csv").write_text("0,1\n")
    (exams / "valid-groups.csv").write_text("12,1\n")
    assert tasks(exams) == ["acl", "other"]
    (exams / "train-other.csv").unlink()
    with pytest.raises(InputError, match="no task 'other' without train-other.csv; tasks here: ac"):
        read_labels(exams, "other", "valid")
    with pytest.raises(InputError, match="without train-cyst.csv and valid-cyst.csv; tasks here"):
        read_labels(exams, "cyst", "valid")
    (exams / "valid-acl.csv").write_text("12,1\n13,1\n")
    with pytest.raises(InputError, match="valid-acl.csv: 2 exams of one class only; training and"):
        read_labels(exams, "acl", "valid")


def test_groups_that_name_no_exam_are_refused_and_exams_without_one_counted(exams):
    path = exams / "train-groups.csv"
    path.write_text("".join(f"{i + 1000},p{i // 2}\n" for i in range(12)))
    with pytest.raises(
        InputError, match="train-groups.csv: names none of the 12 exams, such as 0;"
    ):
        MRDataset(exams, "acl", "axial")
    for named, line in (
        (12, ""),
        (11, "1 of 12 exams has no group (train-groups.csv); it counts as one"),
        (2, "10 of 12 exams have no group (train-groups.csv); each counts as one"),
    ):
        path.write_text("".join(f"{i},p{i // 2}\n" for i in range(named)))
        assert MRDataset(exams, "acl", "axial").without_group == line


@pytest.mark.parametrize("digit", ["\u0661", "\u00b2", "\uff11"])  # Arabic-Indic, superscript, wide
def test_digits_of_other_scripts_are_no_ids(tmp_path, digit):
    (tmp_path / "train-acl.csv").write_text(f"{digit},1\n", encoding="utf-8")
    assert "line 1: expected `id,label`" in next(label_rows(tmp_path, "acl", "train")).fault
    (tmp_path / "train-groups.csv").write_text(f"{digit},a\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 1: expected `id,group`"):
        read_groups(tmp_path, "train")
    (tmp_path / OWN_LABELS).write_text(f"{digit},acl\n", encoding="utf-8")
    with pytest.raises(InputError, match="not a CSV of id,task"):
        read_own_labels(tmp_path)
    (tmp_path / EXAMS).write_text(f"id,exam,patient\n{digit},a,b\n", encoding="utf-8")
    with pytest.raises(InputError, match="not a CSV of id,exam,patient"):
        Register(tmp_path)
    with pytest.raises(InputError, match="not a CSV of two columns with ids"):
        merge_csv(tmp_path / "train-acl.csv", {})
    with pytest.raises(argparse.ArgumentTypeError):
        cli.positive_int(digit)


def test_a_header_is_named(tmp_path):
    path = tmp_path / "train-acl.csv"
    path.write_text("id,label\n1,0\n")
    faults = [row.fault for row in label_rows(tmp_path, "acl", "train")]
    assert faults == [f"{path}: line 1 is a header; delete it", None]


def test_a_data_set_one_folder_down_is_found(tmp_path, exams):
    below = shutil.move(exams, tmp_path / "MRNet-v1.0")
    with pytest.raises(InputError, match=f"is in {below}; give --data-dir {below}$"):
        tasks(tmp_path)


def test_a_task_that_looks_like_two_is_refused(exams):
    for split in ("train", "valid"):
        shutil.copy(exams / f"{split}-acl.csv", exams / f"{split}-a+b.csv")
    with pytest.raises(InputError, match="train-a[+]b.csv: [+] joins the names of several tasks"):
        tasks(exams)


def test_groups_are_read_by_id(tmp_path):
    assert read_groups(tmp_path, "train") == {}
    path = tmp_path / "train-groups.csv"
    path.write_text("\ufeff007, a b \n\n12,scanner 3\n000,x\n", encoding="utf-8")
    assert read_groups(tmp_path, "train") == {"7": "a b", "12": "scanner 3", "0": "x"}
    for text, words in (
        ("1,a\n2\n", "line 2: expected `id,group`"),
        ("x,a\n", "line 1: expected `id,group`"),
        ("1, \n", "line 1: expected `id,group`"),
        ("1,a,b\n", "line 1: expected `id,group`"),
        ("1,a\n\n01,b\n", "line 3: id 1 is listed twice"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=f"train-groups.csv, {words}"):
            read_groups(tmp_path, "train")
    path.write_bytes(b"\xff\xfe\xfd,1\n")
    with pytest.raises(InputError, match="train-groups.csv: cannot be read .*; create it again"):
        read_groups(tmp_path, "train")


DESCRIPTION = {"name": "n", "version": "1", "synthetic": False, "orientation": {"axial": "IPL"}}


@pytest.mark.parametrize(
    "change",
    [{"name": 3}, {"version": 1}, {"synthetic": "no"}, {"synthetic": 0}, {"orientation": "IPL"},
     {"name": None}, {"t1_planes": "coronal"}, {"t1_planes": ["knee"]}, {"mirrored": "no"},
     {"orientation": {"axial": 3}}, {"field_of_view": "160"}, {"square": "stretch"}],
)  # fmt: skip
def test_description_of_a_data_set(tmp_path, change):
    assert read_dataset(tmp_path) is None
    path = tmp_path / "dataset.json"
    more = {"orientation": None, "licence": "MIT", "t1_planes": ["coronal"]}
    for content in (DESCRIPTION, DESCRIPTION | more):
        path.write_text(json.dumps(content))
        assert read_dataset(tmp_path) == content
    path.write_text('{"synthetic": true, ' + json.dumps(DESCRIPTION)[1:])
    with pytest.raises(InputError, match="synthetic.* is there twice"):
        read_dataset(tmp_path)
    path.write_text(json.dumps(DESCRIPTION | change))
    with pytest.raises(InputError, match="dataset.json: not a description of a data set.*expected"):
        read_dataset(tmp_path)
    del content["version"]
    twice = json.dumps(DESCRIPTION).replace('"name"', '"name": "x", "name"')
    for text in (twice, json.dumps(content), "{", "[1]", '"x"', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(InputError, match="dataset.json.*see data/README.md, or move it away"):
            read_dataset(tmp_path)


def test_mrnet_is_known_by_its_exams(tmp_path):
    """Stanford publishes it without dataset.json; its coronal series are T1."""
    for task in ("abnormal", "acl", "meniscus"):
        for split, ids in (("train", range(1130)), ("valid", range(1130, 1250))):
            rows = "".join(f"{i:04d},{i % 2}\n" for i in ids)
            (tmp_path / f"{split}-{task}.csv").write_text(rows)
    found = read_dataset(tmp_path)
    assert found == MRNET and found["t1_planes"] == ["coronal"] and not found["synthetic"]
    (tmp_path / "dataset.json").write_text(json.dumps(DESCRIPTION))
    assert read_dataset(tmp_path) == DESCRIPTION
    (tmp_path / "dataset.json").unlink()
    (tmp_path / "valid-acl.csv").write_text("1130,0\n")
    assert read_dataset(tmp_path) is None


def test_where_a_volume_lies(tmp_path):
    assert volume_path("d", "valid", "axial", "7") == Path("d/valid/axial/0007.npy")
    assert volume_path("d", "train", "axial", "12345") == Path("d/train/axial/12345.npy")


# --- volumes --------------------------------------------------------------------------------------


def test_the_smallest_volume_and_both_orders(tmp_path):
    path = tmp_path / "0.npy"
    volume = np.random.default_rng(0).integers(0, 256, (1, 63, 64), dtype=np.uint8)
    for stored in (volume, np.asfortranarray(volume), volume.astype(">u2"), volume.astype(float)):
        np.save(path, stored)
        found = read_volume(path)
        assert np.array_equal(found, volume) and found.flags.c_contiguous
        assert found.dtype == np.uint8 and found.flags.writeable
    np.save(path, volume[:, :62])
    with pytest.raises(InputError, match="slices of 62 x 64 px; at least 63 px are needed"):
        open_volume(path)
    np.save(path, volume.astype(complex))
    with pytest.raises(InputError, match="holds complex128, expected uint8 grey levels 0 to 255"):
        open_volume(path)
    np.save(path, np.full((2, 64, 64), 300, np.int16))
    with pytest.raises(InputError, match="int16 values from 300 to 300; rescale them"):
        read_volume(path)
    np.save(path, np.eye(64, dtype=np.int16)[None])
    assert read_volume(path).max() == 1


def test_no_memory_is_not_the_files_fault(tmp_path, monkeypatch):
    def full(*args, **more):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    (tmp_path / "0.npy").touch()
    monkeypatch.setattr(np.lib.format, "open_memmap", full)
    with pytest.raises(MemoryError, match="0.npy"):
        open_volume(tmp_path / "0.npy")


def test_grey_levels_are_stretched_unless_raw():
    volume = torch.tensor([[[10, 60], [110, 35]]], dtype=torch.uint8)
    assert rescale(volume, "raw").tolist() == volume.float().tolist()
    stretched = rescale(volume, "standardized")
    torch.testing.assert_close(stretched, (volume.float() - 10) * 2.55)
    flat = rescale(torch.full((1, 2, 2), 9, dtype=torch.uint8), "standardized")
    assert flat.abs().max() == 0  # no division by zero
    black = preprocess(volume, "standardized", transform=lambda grey: grey * 0)  # stays black
    torch.testing.assert_close(black, torch.full((1, 1, 2, 2), -58.09 / 49.73))
    brighter = preprocess(volume, "raw", transform=lambda grey: grey + 1)
    assert brighter.flatten()[0] == 11


def test_augmentation_applies_the_pose_that_is_given():
    grey, apply = torch.rand(2, 64, 64) * 255, Augmentation().apply
    still, flip = torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, -1.0]])
    torch.testing.assert_close(apply(grey, still), grey, atol=1e-3, rtol=0)
    torch.testing.assert_close(apply(grey, flip), grey.flip(-1), atol=1e-3, rtol=0)
    pose = torch.tensor([0.3, 0.1, -0.05, 1.0])
    torch.testing.assert_close(apply(grey, pose), resample(grey, pose))


# --- the data set ---------------------------------------------------------------------------------


def test_exams_subsets_and_fingerprints(exams):
    (exams / "train-groups.csv").write_text("0,p1\n3,p1\n")
    whole = MRDataset(exams, "acl", "coronal", transform=Augmentation())
    assert (whole.split, whole.plane, whole.root) == ("train", "coronal", exams)
    assert whole.tasks == ("acl",) and whole.slice_counts == [shape[0] for shape in whole.shapes]
    assert whole.groups[:4] == ["p1", "exam 1", "exam 2", "p1"] and whole.description is None
    assert whole.shapes == [np.load(path).shape for path in whole.paths] and len(whole) == 12
    assert whole.rows_of(["3", "99", "0"]) == [3, 0]
    volume, label, weight = whole[-12]
    assert (label.tolist(), weight.tolist()) == ([1.0], [2.0]) and volume.dtype == torch.float32
    assert whole[1][1].tolist() == [0.0] and whole[1][2].tolist() == [1.0]
    part = whole.subset([5, 3])
    assert part.transform is None and part.groups == ["exam 5", "p1"]
    assert part.labels.tolist() == [[0], [1]] and part.paths == [whole.paths[5], whole.paths[3]]
    assert torch.equal(part.exam(1), whole.exam(3)) and part.class_weights == whole.class_weights

    def digest(i):
        return hashlib.sha256(np.load(whole.paths[i])).hexdigest()[:32]

    rows = [f"{i},{int(i == 3)},{np.load(whole.paths[i]).shape},{digest(i)}\n" for i in (5, 3)]
    wanted = hashlib.sha256("".join(rows).encode()).hexdigest()[:32]
    assert part.fingerprint() == wanted
    whole.cache("cpu")
    assert all(torch.equal(whole.volume(i), whole.cached[i]) for i in range(12))
    assert whole.subset([5, 3]).cached[1] is whole.cached[3]
    progress = []
    whole.cache("cpu", progress=lambda paths: progress.append(len(paths)) or paths)
    assert progress == [12] and whole.subset([5, 3]).fingerprint() == wanted


@pytest.mark.parametrize("train, reads", [(True, 2), (False, 4)])
def test_labels_are_those_of_the_start(exams, monkeypatch, train, reads):
    """Each CSV is read once; one that is edited meanwhile changes no finding's exams."""
    for half in ("train", "valid"):
        text = (exams / f"{half}-acl.csv").read_text()
        (exams / f"{half}-some.csv").write_text(text.replace("4,0\n", "4,\n"))  # 4 and 14
    calls, real = [], label_rows
    monkeypatch.setattr(labels, "label_rows", lambda *of: calls.append(of) or real(*of))
    both = MRDataset(exams, ["acl", "some"], "axial", train)
    assert len(calls) == len(set(calls)) == reads
    assert both.unknown == {"acl": 0, "some": 1} and len(both.known["some"]) == len(both) - 1
    before = both.finding("some")
    alone = MRDataset(exams, "some", "axial", train)
    assert before.ids == alone.ids and before.fingerprint() == alone.fingerprint()
    path = exams / f"{both.split}-some.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[2:]))
    assert both.finding("some").fingerprint() == before.fingerprint()
