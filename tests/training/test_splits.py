"""Which exams train, select and report: folds, tuning exams, groups, seeds."""

from functools import partial

import numpy as np
import pytest
from conftest import let_planes_lack, write_exams

from dataloader import Augmentation, MRDataset
from mrnet.errors import InputError
from mrnet.layout.labels import trainable
from mrnet.layout.names import folds_path
from mrnet.training.splits import (
    fingerprints_of,
    plan_splits,
    split_exams,
    tuning_rows,
    write_folds,
)


def labels_of(positives, negatives):
    return np.array([1] * positives + [0] * negatives, np.float32)


@pytest.fixture
def sets(tmp_path):
    """60 training exams, every third positive, and 8 validation exams."""
    root = write_exams(tmp_path / "data", train=60)
    train = MRDataset(root, "acl", "axial", transform=Augmentation())
    return train, MRDataset(root, "acl", "axial", train=False)


def test_folds_cover_all_rows_once_and_share_out_the_classes():
    labels = labels_of(10, 25)
    folds = split_exams(labels, 5, seed=3)
    assert len(folds) == 5 and sorted(np.concatenate(folds)) == list(range(35))
    for out in folds:
        assert (labels[out] == 1).sum() == 2 and (labels[out] == 0).sum() == 5


def test_folds_follow_the_seed():
    labels = labels_of(10, 25)
    one, same, other = (np.concatenate(split_exams(labels, 5, seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_as_many_folds_as_the_rarer_class_has_exams():
    assert len(split_exams(labels_of(3, 9), 3, seed=0)) == 3
    for labels in (labels_of(3, 9), labels_of(9, 3)):
        with pytest.raises(InputError, match="4 folds of 12 exams: the rarer class has 3 exams"):
            split_exams(labels, 4, seed=0)


def test_a_group_is_in_one_fold():
    labels, groups = labels_of(12, 12), np.repeat(np.arange(8), 3)
    folds = split_exams(labels, 2, seed=0, groups=groups)
    assert sorted(np.concatenate(folds)) == list(range(24))
    assert not set(groups[folds[0]]) & set(groups[folds[1]])
    again, other = (split_exams(labels, 2, seed, groups=groups) for seed in (0, 3))
    assert np.array_equal(folds[0], again[0]) and not np.array_equal(folds[0], other[0])
    # Groups of one exam each are no groups: the folds are those without.
    alone = split_exams(labels, 2, seed=0, groups=np.arange(24))
    for a, b in zip(alone, split_exams(labels, 2, seed=0), strict=True):
        assert np.array_equal(a, b)


def test_too_few_groups_are_refused():
    labels = np.array([0, 1, 0, 1, 0, 1, 0, 1], np.float32)
    with pytest.raises(InputError, match="3 folds of 2 groups .train-groups.csv.: use fewer folds"):
        split_exams(labels, 3, seed=0, groups=[0, 0, 0, 0, 1, 1, 1, 1])
    split_exams(labels, 2, seed=0, groups=[0, 0, 0, 0, 1, 1, 1, 1])
    with pytest.raises(InputError, match="2 folds of 4 exams in 2 groups: a fold would hold one"):
        split_exams(labels_of(2, 2), 2, seed=0, groups=[0, 0, 1, 1])


def test_the_articles_protocol_selects_on_the_validation_exams(sets):
    train, valid = sets
    (split,) = plan_splits(train, valid, "article", 1, range(4, 5))
    assert (split.seed, split.fold, split.suffix) == (4, 0, "")
    assert split.train_set.ids == train.ids and split.train_set.transform is train.transform
    assert split.selection_set is split.valid_set is valid and split.selected_on == "valid"
    assert split.out_of_fold == split.tuning == []
    assert split.data_sets == {"train": split.train_set, "selection": valid, "valid": valid}
    assert fingerprints_of(split.data_sets)["train"] == train.fingerprint()


def test_held_out_selects_on_a_tenth_of_each_class(sets):
    train, valid = sets
    (split,) = plan_splits(train, valid, "held-out", 1, range(1))
    assert split.selected_on == "tune" and split.selection_set.transform is None
    assert split.selection_set.ids == split.tuning and len(split.tuning) == 6
    assert split.selection_set.labels.sum() == 2  # 20 of 60 are positive
    assert not set(split.tuning) & set(split.train_set.ids) and split.out_of_fold == []
    assert sorted([*split.tuning, *split.train_set.ids]) == sorted(train.ids)
    assert len(split.train_set.labels) == 54 and split.valid_set is valid


def test_folds_within_seeds(sets):
    train, valid = sets
    splits = plan_splits(train, valid, "held-out", 2, range(5, 7))
    assert [(one.seed, one.fold) for one in splits] == [(5, 1), (5, 2), (6, 1), (6, 2)]
    assert [one.suffix for one in splits] == [
        "-fold1of2-seed5", "-fold2of2-seed5", "-fold1of2-seed6", "-fold2of2-seed6",
    ]  # fmt: skip
    for one in splits:
        parts = [set(one.train_set.ids), set(one.tuning), set(one.out_of_fold)]
        assert sum(map(len, parts)) == 60 and set.union(*parts) == set(train.ids)
    assert sorted(splits[0].out_of_fold + splits[1].out_of_fold) == sorted(train.ids)
    again = plan_splits(train, valid, "article", 2, range(5, 6))  # the seed alone makes the folds
    assert [one.out_of_fold for one in again] == [one.out_of_fold for one in splits[:2]]
    assert splits[2].out_of_fold not in (splits[0].out_of_fold, splits[1].out_of_fold)
    # The tuning exams are of every other fold.
    first, *others = plan_splits(train, valid, "held-out", 3, range(1))
    assert all(set(first.tuning) & set(one.out_of_fold) for one in others)
    (alone,) = plan_splits(train, valid, "article", 1, range(7, 8))
    assert alone.suffix == ""
    assert [one.suffix for one in plan_splits(train, valid, "article", 1, range(2))] == [
        "-seed0", "-seed1",
    ]  # fmt: skip


def test_random_seeds_differ_between_seeds_folds_and_epochs(sets):
    train, valid = sets
    splits = plan_splits(train, valid, "article", 3, range(3))
    seeds = [one.random_seed(epoch) for one in splits for epoch in range(51)]
    assert len(set(seeds)) == len(seeds) and splits[0].random_seed() == splits[0].random_seed(0)
    # As in every version before: a model of then is trained again to the last digit.
    assert splits[4].random_seed(7) == (1 * 1009 + 2) * 100_003 + 7


def test_ten_exams_of_each_class_are_enough_for_held_out():
    rows = np.arange(20)
    labels, groups = labels_of(10, 10), np.arange(20)
    assert len(tuning_rows(labels, rows, 0, groups)) == 2
    for positives in (9, 11):
        with pytest.raises(InputError, match=rf"needs 10 training.*20, {positives} positive"):
            tuning_rows(labels_of(positives, 20 - positives), rows, 0, groups)
    # Rows that are not asked for are never taken.
    some = np.arange(5, 45)
    taken = tuning_rows(np.arange(50) % 2, some, 0, np.arange(50))
    assert set(taken) <= set(some) and len(taken) == 4
    # An eleventh of groups of two: both of a group, or none.
    taken = tuning_rows(np.arange(80) // 2 % 2, np.arange(80), 0, np.arange(80) // 2)
    assert all((row ^ 1) in taken for row in taken)


def test_tuning_exams_have_a_seed_of_their_own():
    labels, rows, groups = labels_of(30, 30), np.arange(60), np.arange(60)
    tuning = set(tuning_rows(labels, rows, 0, groups))
    assert tuning != set(split_exams(labels, 10, seed=0)[0])
    assert tuning == set(split_exams(labels, 10, seed=1000)[0])


def test_csv_of_folds(sets, tmp_path):
    train, valid = sets
    path_of = partial(folds_path, tmp_path, "acl", "axial", 2)
    write_folds(path_of, plan_splits(train, valid, "article", 1, range(1)))
    assert not list(tmp_path.glob("*.csv"))
    splits = plan_splits(train, valid, "article", 2, range(3, 5))
    write_folds(path_of, splits)
    assert path_of(4).read_text().splitlines()[-1] == f"4,{splits[3].out_of_fold[-1]},2"
    head, *rows = path_of(3).read_text().splitlines()
    assert head == "seed,id,fold" and len(rows) == 60
    assert rows[0] == f"3,{splits[0].out_of_fold[0]},1"
    assert rows[-1] == f"3,{splits[1].out_of_fold[-1]},2"


@pytest.mark.parametrize("protocol", ["article", "held-out"])
def test_a_patient_is_never_split(tmp_path, protocol):
    root = write_exams(tmp_path / "data", train=120)
    patients = {str(i): str(i // 4) for i in range(120)}
    rows = "".join(f"{exam_id},{patient}\n" for exam_id, patient in patients.items())
    (root / "train-groups.csv").write_text(rows)
    train, valid = (MRDataset(root, "acl", "axial", train=t) for t in (True, False))
    for split in plan_splits(train, valid, protocol, 2, range(2)):
        parts = (split.train_set.ids, split.tuning, split.out_of_fold)
        parts = [{patients[exam_id] for exam_id in ids} for ids in parts]
        assert sum(map(len, parts)) == len(set().union(*parts)) == 30


def test_folds_are_the_same_in_every_plane_whatever_a_plane_lacks(tmp_path):
    root = write_exams(tmp_path, train=60)
    let_planes_lack(root)
    valid = MRDataset(root, "acl", "axial", train=False)
    lacking = {"axial": {"1", "2"}, "coronal": {"2", "7", "9"}, "sagittal": set()}
    fold_of = {}
    for plane, ids in lacking.items():
        for exam_id in ids:
            (root / "train" / plane / f"{int(exam_id):04d}.npy").unlink()
        exams = MRDataset(root, "acl", plane)
        assert exams.absent == len(ids) and set(exams.ids).isdisjoint(ids)
        assert len(exams) == 60 - len(ids) == len(exams.labels) == len(exams.groups)
        for split in plan_splits(exams, valid, "held-out", 2, range(1)):
            parts = [split.train_set.ids, split.tuning, split.out_of_fold]
            assert sorted(sum(parts, [])) == sorted(exams.ids)
            for part, found in enumerate(parts):
                for exam_id in found:
                    fold_of.setdefault((exam_id, split.fold), set()).add(part)
    assert all(len(parts) == 1 for parts in fold_of.values()) and len(fold_of) == 120


def test_a_finding_of_one_class_is_left_out_and_a_faulty_file_is_not(tmp_path):
    root = write_exams(tmp_path, train=9)
    for split in ("train", "valid"):
        text = (root / f"{split}-acl.csv").read_text()
        (root / f"{split}-other.csv").write_text(text.replace(",1", ","))
    names, why = trainable(root)
    assert names == ["acl"] and "train-other.csv: 6 exams of one class only" in why["other"]
    (root / "train-other.csv").write_text("0,x\n")
    with pytest.raises(InputError, match="train-other.csv, line 1"):
        trainable(root)


def test_a_plane_that_leaves_one_class_only_is_refused(tmp_path):
    root = write_exams(tmp_path, train=9)
    let_planes_lack(root)
    for exam_id in (0, 3, 6):
        (root / "train" / "axial" / f"000{exam_id}.npy").unlink()
    with pytest.raises(InputError, match="train-acl.csv: one class only among the 6 .* axial"):
        MRDataset(root, "acl", "axial")
    assert len(MRDataset(root, "acl", "coronal")) == 9


def test_an_epoch_is_not_selected_on_exams_without_labels(sets):
    train, valid = sets
    unlabelled = train.subset(range(len(train.ids)), transform=None)
    unlabelled.labels = np.full_like(unlabelled.labels, np.nan)
    with pytest.raises(InputError, match="none of the .* exams that select .* out$"):
        plan_splits(train, unlabelled, "article", 1, range(1))
    plan_splits(train, unlabelled, "article", 1, range(1), "last")
