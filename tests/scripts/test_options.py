"""Options beyond the article: each against an independent computation, and end to end."""

import copy
import csv
import itertools
import json
import math
import random
import shutil
import signal
from dataclasses import fields
from functools import partial

import numpy as np
import pytest
import torch
from conftest import (
    PLANES,
    assert_one_line_error,
    files,
    finding_of,
    predict_exams,
    run_script,
    train_quickly,
    write_exams,
    write_findings,
)
from torch.nn import functional as F

import reproduce
import train
from dataloader import MRDataset, preprocess
from model import MRNet
from mrnet.errors import InputError
from mrnet.evaluation.metrics import metrics_of
from mrnet.files import file_lock
from mrnet.networks.backbones import BACKBONES
from mrnet.stacking import predictions
from mrnet.training import config as configuration
from mrnet.training.augmentation import StrongAugmentation, make_augmentation
from mrnet.training.checkpoint import load_model
from mrnet.training.config import Config, read_recipe, selection_note, selection_of
from mrnet.training.datasets import MultiPlaneDataset, load_exams
from mrnet.training.optimization import (
    average_advice,
    make_average,
    make_optimizer,
    make_scheduler,
    steps_with_optimizer,
)
from mrnet.training.splits import plan_splits, split_exams
from mrnet.training.train_state import TrainState


def config(**more):
    return Config(**{"task": "acl", "plane": "axial", "pretrained": False} | more)


@pytest.fixture
def work(tmp_path):
    write_exams(tmp_path / "data")
    return tmp_path


# --- recipes --------------------------------------------------------------------------------------


def test_the_articles_recipe_names_every_argument_that_recipes_may_have():
    name, values = read_recipe("article")
    rest = {"task", "plane", "recipe", "seed", "protocol", "folds", "repeat", "precision",
            "device", "cuda_graphs"}  # fmt: skip
    assert name == "article" and set(values) == {f.name for f in fields(Config)} - rest
    assert config(pretrained=True).differences == {}
    assert config(lr=1.0).differences == {"pretrained": False, "lr": 1.0}


LAST = {"select": "last", "patience": 9, "epochs": 9, "lr_scheduler": "cosine"}


@pytest.mark.parametrize("recipe, more, decided", [
    ("article", {}, "selected the epochs"),
    ("article", {"select": "last"}, "stopped the training and set the learning rates"),
    ("article", LAST | {"patience": 8}, "stopped the training"),
    ("article", LAST | {"lr_scheduler": "plateau"}, "set the learning rates"),
    ("best", {}, ""), ("fast", {}, ""), ("fastest", {}, ""), ("phantom", {}, ""), ("rsna", {}, ""),
    ("best", {"epochs": 16}, "stopped the training"),
    ("best", {"select": "auc"}, "selected the epochs"),
])  # fmt: skip
def test_what_the_selection_exams_decide(recipe, more, decided):
    training = read_recipe("article")[1] | read_recipe(recipe)[1] | more
    assert selection_of([training]) == decided
    assert selection_of([LAST, training]) == selection_of([training, LAST]) == decided
    note = {
        "": ("the last epoch, no exams selected it",) * 2,
        "selected the epochs": ("optimistic: these exams selected the epoch",
                                "the epoch was selected on other exams"),
    }.get(decided, (f"optimistic: these exams {decided}", f"other exams {decided}"))  # fmt: skip
    assert tuple(selection_note(training, is_on_others) for is_on_others in (False, True)) == note


def test_a_recipe_of_ones_own(work):
    path = work / "quick-one.toml"
    path.write_text('lr = 3e-4\nepochs = 9\npretrained = false\npooling = "mean"\n')
    words = ("--recipe", path, "--epochs", "1", "--task", "acl", "--plane", "axial")
    done = run_script("train.py", *files(work), *words)
    assert done.returncode == 0, done.stderr
    assert ("recipe     quick-one; beyond the article: pretrained=False pooling=mean lr=0.0003 "
            "epochs=1") in done.stdout  # fmt: skip
    model, metadata = load_model(work / "models" / "acl-axial-quick-one.pt")
    assert model.pooling == "mean" and metadata["recipe"] == "quick-one"
    assert (metadata["arguments"]["lr"], metadata["arguments"]["epochs"]) == (3e-4, 1)


@pytest.mark.parametrize(
    "text, fault",
    [
        ("weight-decay = 0\nweight_decay = 1", "mine.toml: weight-decay twice, with - and with _;"),
        ("lr = 1e-4\nlearning-rate = 1\nbatch = 3", "unknown batch, learning-rate; a recipe may"),
        ("lr = -1", "recipe mine: argument --lr: '-1' is not a number above 0"),
        ('backbone = "lenet"', "recipe mine: argument --backbone: invalid choice: 'lenet'"),
        ("lr = ", "mine.toml: not a recipe"),
        ("task = 'acl'", "unknown task"),
    ],
)
def test_a_faulty_recipe_is_named(work, text, fault):
    (work / "mine.toml").write_text(text)
    words = ("--recipe", work / "mine.toml", "--task", "acl", "--plane", "axial")
    assert_one_line_error(run_script("train.py", *files(work), *words), fault)


def test_no_such_recipe(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="no such recipe; give the path of a .toml .*article"):
        read_recipe("other")
    monkeypatch.setattr(configuration, "RECIPES", tmp_path)
    (tmp_path / "other.toml").write_text("lr = 1e-3")
    assert read_recipe("other") == ("other", {"lr": 1e-3})


# --- what the network is given --------------------------------------------------------------------


def test_neighbours_are_the_slices_beside():
    volume = torch.arange(5, dtype=torch.uint8)[:, None, None].expand(5, 2, 2) * 10
    x = preprocess(volume, "raw", "neighbours")
    assert x.shape == (5, 3, 2, 2)
    assert x[:, :, 0, 0].tolist() == [
        [0, 0, 10], [0, 10, 20], [10, 20, 30], [20, 30, 40], [30, 40, 40],
    ]  # fmt: skip
    some = preprocess(volume, "raw", "neighbours", rows=torch.tensor([1, 4]))
    torch.testing.assert_close(some, x[[1, 4]])  # neighbours in the exam


def test_a_part_of_the_slices_is_drawn_for_each_step(tmp_path):
    exams = MRDataset(write_exams(tmp_path / "data"), "acl", "axial")
    assert all(view.rows is None for view in exams.draw(range(12)))
    exams.slices = (0.5, 0.5)
    exams.shapes = [(40, 64, 64)] * 12
    rows = [view.rows.tolist() for view in exams.draw([0] * 50)]
    assert all(len(set(r)) == 20 and r == sorted(r) for r in rows)
    counts = np.bincount(np.concatenate(rows), minlength=40)
    assert counts.min() >= 12 and counts.max() <= 38  # 25 +- 3.5
    assert all(set(np.diff(r)) == {2} for r in rows)  # every second, from the first or the next
    exams.slices = (0.6, 1.0)
    lengths = [len(view.rows) for view in exams.draw([0] * 200)]
    assert min(lengths) < 27 and max(lengths) > 37 and 24 <= min(lengths) <= max(lengths) <= 40
    exams = MRDataset(tmp_path / "data", "acl", "axial")
    exams.slices = (0.5, 0.5)
    view = exams.draw([3])[0]
    torch.testing.assert_close(exams.exam(3, view=view), exams.exam(3)[view.rows])


def test_a_part_of_the_slices_is_a_systematic_sample(tmp_path, monkeypatch):
    exams = MRDataset(write_exams(tmp_path / "data"), "acl", "axial")
    exams.slices = (0.4, 0.4)
    taken = np.concatenate([exams.draw_slices(17).numpy() for _ in range(4000)])
    # Seven of 17 slices, each with probability 7 / 17: a binomial count, five SD to each side.
    expected = 4000 * 7 / 17
    assert np.abs(np.bincount(taken) - expected).max() < 5 * math.sqrt(expected * 10 / 17)
    for count in range(1, 80):
        rows = exams.draw_slices(count)
        gaps = {*rows.diff().tolist()}  # 1 / 0.4, up to rounding
        assert rows[0] >= 0 and rows[-1] < count and gaps <= {1, 2, 3} and len(gaps) <= 2
    exams.slices = (1 / 3, 1 / 3)
    for count in (9, 30, 60):
        rows = exams.draw_slices(count)
        assert {*range(1, count - 1)} <= {
            *(rows[:, None] + torch.tensor([-1, 0, 1])).ravel().tolist()
        }
    # The largest number that torch.rand gives: the last slice, none beyond.
    monkeypatch.setattr(torch, "rand", lambda *args: torch.tensor(1 - 2**-24))
    assert [exams.draw_slices(count)[-1].item() for count in (9, 61, 512)] == [8, 60, 511]


def test_anatomical_mirrors_left_and_right():
    grey = torch.rand(4, 64, 64) * 255
    flipped = torch.tensor([0.0, 0.0, 0.0, -1.0])
    for plane, axis in (("sagittal", 0), ("coronal", 2), ("axial", 2)):
        mirrored = make_augmentation("anatomical", plane).apply(grey, flipped)
        torch.testing.assert_close(mirrored, grey.flip(axis), atol=1e-3, rtol=0)
    # Where an exam lies otherwise: rows that run from right to left.
    rows = make_augmentation("anatomical", "axial", "ILP").apply(grey, flipped)
    torch.testing.assert_close(rows, grey.flip(1), atol=1e-3, rtol=0)
    article = make_augmentation("article", "sagittal").apply(grey, flipped)
    torch.testing.assert_close(article, grey.flip(2), atol=1e-3, rtol=0)
    assert make_augmentation("none", "axial") is None


def strong(**switches):
    """A row of StrongAugmentation without a pose and with the named changes only."""
    names = ("gamma", "contrast", "blur", "noise", "cutout")
    row = torch.full((27,), 0.25)
    row[:4] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    row[4:9] = torch.tensor([0.0 if name in switches else 1.0 for name in names])
    return row


def test_strong_changes_are_what_they_say():
    torch.manual_seed(0)
    grey, change = torch.rand(3, 64, 64) * 255, StrongAugmentation().apply
    assert StrongAugmentation().draw(5).shape == (5, 27)
    torch.testing.assert_close(change(grey, strong()), grey, atol=1e-3, rtol=0)
    gamma = 255 * (grey / 255) ** (1.5**-0.5)
    torch.testing.assert_close(change(grey, strong(gamma=1)), gamma, atol=1e-2, rtol=0)
    mean, factor = grey.mean(dim=(1, 2), keepdim=True), (4 / 3) ** -0.5
    contrast = (mean + factor * (grey - mean)).clamp(0, 255)
    torch.testing.assert_close(change(grey, strong(contrast=1)), contrast, atol=1e-2, rtol=0)
    blurred = change(grey, strong(blur=1))  # SD 0.6 of 256 px: 0.15 px here
    assert (blurred - grey).abs().max() < 1
    noisy = change(grey.clamp(50, 200), strong(noise=1)) - grey.clamp(50, 200)
    assert noisy.std() == pytest.approx(3, rel=0.05)  # a quarter of 12 grey levels
    cut = change(grey + 1, strong(cutout=1)) == 0
    side = round(64 * (0.08 + 0.25 * 0.17))
    assert cut.sum() == 3 * side * side and (cut[0] == cut[1]).all()  # one, in all slices


def test_strong_draws_are_the_same_for_all_slices_and_for_a_resumed_run():
    grey = torch.rand(1, 64, 64).expand(4, 64, 64) * 200 + 20
    torch.manual_seed(0)
    augmentation = StrongAugmentation()
    for row in augmentation.draw(20):
        row[7] = 1.0  # noise differs from slice to slice, as in a scanner
        out = augmentation.apply(grey, row)
        assert (
            torch.equal(out, augmentation.apply(grey, row)) and 0 <= out.min() <= out.max() <= 255
        )
        torch.testing.assert_close(out, out[:1].expand_as(out), atol=1e-3, rtol=0)


# --- labels ---------------------------------------------------------------------------------------


def test_soft_and_unknown_labels(tmp_path):
    exams = MRDataset(write_findings(tmp_path / "data"), ["acl", "soft", "some"], "axial")
    assert exams.labels.shape == (12, 3) and exams.unknown == {"acl": 0, "soft": 0, "some": 3}
    assert np.isnan(exams.labels[[1, 5, 9], 2]).all() and np.isfinite(exams.labels).sum() == 33
    soft = np.array([0.1, 0.7, 1] * 4)
    weight = (12 - soft.sum()) / soft.sum()
    assert exams.class_weights["soft"] == pytest.approx((1, weight))
    # A label of 0.7 is seven positive and three negative exams of ten.
    logits = torch.randn(12, dtype=torch.float64)
    p = torch.sigmoid(logits).numpy()
    wanted = -(weight * soft * np.log(p) + (1 - soft) * np.log(1 - p))
    target, weights = (torch.from_numpy(x[:, 1]).double() for x in (exams.targets, exams.weights))
    losses = F.binary_cross_entropy_with_logits(logits, target, weights, reduction="none")
    np.testing.assert_allclose(losses.numpy(), wanted, rtol=1e-5)
    volume, target, weight = exams[1]
    assert target.shape == weight.shape == (3,) and target[2] == weight[2] == 0
    alone = MRDataset(tmp_path / "data", "some", "axial")
    assert alone.ids == [str(i) for i in range(12) if i % 4 != 1]
    assert exams.finding("some").fingerprint() == alone.fingerprint()
    assert (
        exams.finding("acl").fingerprint()
        == MRDataset(tmp_path / "data", "acl", "axial").fingerprint()
    )


def test_folds_of_several_findings_hold_both_classes_of_each():
    rng = np.random.default_rng(0)
    labels = (rng.random((90, 3)) < (0.5, 0.2, 0.3)).astype(np.float32)
    labels[rng.random((90, 3)) < 0.05] = np.nan
    folds = split_exams(labels, 5, seed=1)
    assert sorted(np.concatenate(folds)) == list(range(90))
    for out in folds:
        for column in labels[out].T:
            assert {0, 1} <= set(column[~np.isnan(column)])
    # As even as combinations of findings allow; shuffled folds differ by up to 5.
    positives = np.array([np.nansum(labels[out], axis=0) for out in folds])
    assert (np.ptp(positives, axis=0) <= 2).all()
    labels[:, 1] = 0
    labels[:3, 1] = 1
    with pytest.raises(InputError, match="the rarer class has 3 exams"):
        split_exams(labels, 5, seed=1)


# --- the step -------------------------------------------------------------------------------------


def gradient_of(model, exams, rows, **settings):
    """The gradient that a step on some exams takes, without the update."""
    found, optimizer = [], torch.optim.SGD(model.parameters())
    optimizer.step = lambda: found.extend(p.grad for p in model.parameters())
    planes = exams.plane if isinstance(exams.plane, str) else "+".join(exams.plane)
    step = partial(train.training_step, model, optimizer, Config("acl", planes, **settings), exams)
    for k, i in enumerate(rows):
        target, weight = (torch.from_numpy(of[[i]]) for of in (exams.targets, exams.weights))
        is_last = k + 1 == len(rows)
        step(exams.volume(i), exams.draw([i])[0], target, weight, len(rows), is_last)
    return torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.parametrize("n", [1, 3])
def test_accumulated_exams_are_one_batch_under_mean_reduction(tmp_path, n):
    exams = MRDataset(write_findings(tmp_path / "data"), ["acl", "soft", "some"], "axial")
    torch.manual_seed(0)
    model, rows = MRNet(tasks=3), [1, 5, 3][:n]
    found = gradient_of(model, exams, rows)
    model.zero_grad()
    logits = torch.cat([model(exams.exam(i)) for i in rows])
    targets, weights = (torch.from_numpy(x[rows]) for x in (exams.targets, exams.weights))
    F.binary_cross_entropy_with_logits(logits, targets, weights).backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()
    assert model.classifier.weight.grad[2].abs().sum() == 0 or n > 2  # 1 and 5 are unknown


@pytest.mark.parametrize(
    "backbone, n, frozen",
    [
        ("alexnet", 2, ["0.weight", "0.bias", "3.weight", "3.bias"]),
        ("squeezenet1_1", 1, ["0.weight", "0.bias"]),
        ("resnet18", 1, ["conv1.weight", "bn1.weight", "bn1.bias"]),
        ("convnext_tiny", 1, ["0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias"]),
    ],
)
def test_frozen_convolutions_stay_and_the_others_learn_as_without(backbone, n, frozen):
    model = MRNet(backbone=backbone, tasks=3).eval()  # ConvNeXt leaves out blocks at random
    free = copy.deepcopy(model)
    optimizer = make_optimizer(model, config(pretrained=True, freeze=n, optimizer="adamw", lr=1e-3))
    x = torch.rand(4, 3, 96, 96)
    for network in (model, free):
        network(x).square().sum().backward()
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    left = [f"pretrained_model.{name}" for name in frozen]
    wanted = dict(free.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in left), name
        assert (parameter.grad is None) == (name in left), name
        if name not in left:
            torch.testing.assert_close(parameter.grad, wanted[name].grad)


def test_the_backbone_of_each_plane_is_frozen(shared_exams):
    for share in (False, True):
        asked = config(plane="axial+coronal", share_backbone=share)
        model = train.start_state(
            asked, whole(MultiPlaneDataset(shared_exams, "acl", PLANES[:2]))
        ).model
        make_optimizer(model, config(pretrained=True, freeze=5))  # all of AlexNet's
        left = {name for name, one in model.named_parameters() if one.requires_grad}
        assert left == {name for name, _ in model.named_parameters() if "classifier" in name}
    with pytest.raises(InputError, match="--freeze 6: alexnet has 5 convolutions"):
        make_optimizer(MRNet(), config(pretrained=True, freeze=6))


def test_a_training_with_frozen_convolutions(work, monkeypatch):
    features = MRNet().pretrained_model.state_dict()
    monkeypatch.setattr(train, "imagenet_features", lambda backbone: features)
    words = ("--task", "acl", "--plane", "axial", "--epochs", "2", "--freeze", "2", "--lr", "1e-4",
             "--average-weights", "0.9")  # fmt: skip
    done = run_script("train.py", *files(work), *words)
    assert done.returncode == 0, done.stderr
    assert "beyond the article: freeze=2" in done.stdout
    saved = load_model(work / "models" / "acl-axial.pt")[0].pretrained_model.state_dict()
    assert {name for name in features if torch.equal(saved[name], features[name])} == {
        "0.weight", "0.bias", "3.weight", "3.bias",
    }  # fmt: skip


def test_a_short_last_step_counts_its_own_exams(tmp_path):
    exams, sizes = MRDataset(write_exams(tmp_path / "data"), "acl", "axial"), []
    model = MRNet()

    def step(*args):
        sizes.append(args[-2:])
        return train.training_step(model, optimizer, setting, *args)

    setting = Config("acl", "axial", accumulate=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    state = TrainState(model, optimizer, None, exams.tasks)
    (_, logits, losses), _ = train.train_model(state, step, exams, setting)
    five, two = [(5, False)] * 4 + [(5, True)], [(2, False), (2, True)]
    assert sizes == five + five + two and logits.shape == losses.shape == (12, 1)


def test_clipping_and_the_auxiliary_loss(tmp_path):
    exams = MultiPlaneDataset(write_exams(tmp_path / "data"), "acl", ["axial", "coronal"])
    state = train.start_state(config(plane="axial+coronal", dropout=0.0), whole(exams))
    model = state.model
    found = gradient_of(model, exams, [3], plane_weight=0.3)
    model.zero_grad()
    target, weight = torch.from_numpy(exams.targets[[3]]), torch.from_numpy(exams.weights[[3]])
    losses = [F.binary_cross_entropy_with_logits(logit[None], target, weight)
              for logit in model.all_logits(exams.exam(3))]  # fmt: skip
    (losses[0] + 0.3 * (losses[1] + losses[2]) / 2).backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()
    clipped = gradient_of(model, exams, [3], clip=1e-3, plane_weight=0.3)
    torch.testing.assert_close(clipped, wanted * 1e-3 / wanted.norm(), rtol=1e-3, atol=1e-9)


def whole(exams):
    """A Split of one data set in all roles."""
    return plan_splits(exams, exams, "article", 1, range(1))[0]


# --- optimizer, schedules, average ----------------------------------------------------------------


def rates(steps=10, losses=(0.5,) * 6, **more):
    """Learning rate of each step (each epoch for schedules that count epochs) from 1."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([parameter], lr=1.0)
    cfg = config(lr=1.0, **{"epochs": len(losses)} | more)
    scheduler = make_scheduler(cfg, optimizer, steps)
    state, found = TrainState(None, optimizer, scheduler, ["acl"]), []
    for loss in losses:
        for _ in range(steps if steps_with_optimizer(scheduler) else 1):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if steps_with_optimizer(scheduler):
                scheduler.step()
        state.update({"acl": {"loss": loss, "auc": 0.5}})
    return [*found, optimizer.param_groups[0]["lr"]]


def test_the_articles_schedules():
    # Three epochs without a better loss are waited for, the fourth lowers the rate.
    assert rates(lr_scheduler="plateau") == pytest.approx([1, 1, 1, 1, 1, 0.3, 0.3])
    # An improvement of less than 1 in 10,000 is none.
    less = [0.5 * (1 - 1e-5) ** i for i in range(6)]
    assert rates(losses=less, lr_scheduler="plateau")[5] == pytest.approx(0.3)
    more = [0.5 * (1 - 5e-4) ** i for i in range(6)]
    assert rates(losses=more, lr_scheduler="plateau")[5] == 1
    assert rates(lr_scheduler="step") == pytest.approx([1, 1, 1, 0.5, 0.5, 0.5, 0.25])
    assert rates(losses=[0.5] * 3, lr_scheduler="none") == [1, 1, 1, 1]


def test_schedules_that_count_steps():
    k = np.arange(61)
    cosine = (1 + np.cos(np.pi * k / 60)) / 2
    np.testing.assert_allclose(rates(lr_scheduler="cosine"), cosine, atol=1e-12)
    warm = np.where(k < 6, (k + 1) / 6, (1 + np.cos(np.pi * (k - 6) / 54)) / 2)
    np.testing.assert_allclose(rates(lr_scheduler="cosine", warmup=0.1), warm, atol=1e-12)
    np.testing.assert_allclose(
        rates(lr_scheduler="none", warmup=0.1), np.minimum(1, (k + 1) / 6), atol=1e-12
    )
    one = rates(lr_scheduler="one-cycle", warmup=0.25)[:60]
    # Smith's cycle with cosines: from 1/25 to 1, then to 1/250,000.
    peak = 0.25 * 60 - 1
    up = 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * 5 / peak)) / 2
    assert one[0] == pytest.approx(1 / 25) and one[5] == pytest.approx(up)
    assert one[14] == max(one) == pytest.approx(1) and one[59] == pytest.approx(4e-6, rel=1e-3)


def test_the_classifiers_own_learning_rate():
    model = MRNet(pooling="attention")
    optimizer = make_optimizer(model, config(lr=1e-4, head_lr=1e-3, optimizer="adamw"))
    assert isinstance(optimizer, torch.optim.AdamW)
    backbone, head = optimizer.param_groups
    assert (backbone["lr"], head["lr"]) == (1e-4, 1e-3)
    assert len(backbone["params"]) == 10 and len(head["params"]) == 2 + 6
    (one,) = make_optimizer(model, config()).param_groups
    assert len(one["params"]) == 18


def test_the_moving_average():
    model = torch.nn.Linear(1, 1, bias=False)
    average, values = make_average(model, 0.9), [3.0, 1.0, 4.0, 1.0, 5.0]
    wanted = values[0]
    for i, value in enumerate(values):
        model.weight.data.fill_(value)
        average.update_parameters(model)
        wanted = wanted if i == 0 else 0.9 * wanted + 0.1 * value
    assert average.module.weight.item() == pytest.approx(wanted)
    assert make_average(model, 0.0) is None


@pytest.mark.parametrize(
    "decay, exams, accumulate, words",
    [
        (0.999, 200, 1, "after 1600 steps 20% of"),  # 0.999 ** 1600 = exp(-1600 / 999.5) = 0.2017
        (0.999, 201, 2, "after 808 steps 45% of"),  # 101 steps an epoch, exp(-808 / 999.5) = 0.4455
        (0.999, 1000, 1, ""),  # 0.0003
        (0.99, 57, 1, "--average-weights 0.9 "),  # 456 steps: exp(-456 / 99.5) = 0.0102
        (0.99, 58, 1, ""),  # 464: 0.0094
        (0.9, 2, 1, "--average-weights 0 "),
        (0.0, 2, 1, ""),
    ],
)
def test_an_average_too_slow_for_its_steps_is_said(decay, exams, accumulate, words):
    asked = config(average_weights=decay, epochs=8, accumulate=accumulate)
    advice = average_advice(asked, exams)
    assert words in advice and bool(advice) == bool(words)
    if decay == 0.999 and advice:
        assert "--average-weights 0.99 " in advice


# --- end to end -----------------------------------------------------------------------------------


def stop_at_step(monkeypatch, number):
    """Send SIGTERM in a step of the optimizer; returns a list that grows with each step."""
    real, steps = train.training_step, []

    def step(*args):
        *_, is_last = args
        if is_last:
            steps.append(1)
            if len(steps) == number:
                signal.raise_signal(signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(train, "training_step", step)
    return steps


MORE = ("--augment", "strong", "--slices", "0.7", "--accumulate", "5", "--head-lr", "1e-3",
        "--average-weights", "0.9", "--clip", "1", "--optimizer", "adamw")  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        ("--lr-scheduler", "cosine", "--warmup", "0.1", "--pooling", "attention", *MORE),
        ("--lr-scheduler", "one-cycle", "--backbone", "efficientnet_b0", "--dropout", "0.2", *MORE),
    ],
    ids=["cosine", "one-cycle"],
)
@pytest.mark.whole
def test_a_resumed_run_goes_on_to_the_last_digit(work, monkeypatch, options):
    words = ("--task", "acl", "--plane", "axial", "--epochs", "2", *options)
    train_quickly(work, *words)
    model = load_model(work / "models" / "acl-axial.pt")[0].state_dict()
    steps = stop_at_step(monkeypatch, 5)  # the second of three steps of the second epoch
    done = run_script("train.py", *files(work), "--no-pretrained", "--epochs", "1", *words)
    assert done.returncode == 143
    fewer = train_quickly(work, *words, "--epochs", "3", "--resume", status=2)
    assert_one_line_error(fewer, "was trained with --epochs 2")
    done = train_quickly(work, *words, "--resume")
    assert "after epoch 1\n" in done.stdout and len(steps) == 5 + 3
    again = load_model(work / "models" / "acl-axial.pt")[0].state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.items())


@pytest.mark.whole
def test_several_findings_in_one_network(tmp_path):
    write_findings(tmp_path / "data")
    done = train_quickly(tmp_path, "--task", "all", "--plane", "axial", "--lr", "1e-4")
    assert "valid auc of each" in done.stdout and "3 exams without a label of some" in done.stdout
    for task in ("acl", "soft", "some"):
        model, metadata = load_model(tmp_path / "models" / f"{task}-axial.pt", task, "axial")
        assert model.classifier.weight.shape == (1, 256)
        assert metadata["metrics"]["valid"].keys() == {"loss", "auc"}
        exams = MRDataset(tmp_path / "data", task, "axial", train=False)
        assert exams.fingerprint() == metadata["data"]["valid"]
    again = train_quickly(tmp_path, "--task", "all", "--plane", "axial", "--lr", "1e-4", "--resume")
    assert "finished before" in again.stdout
    alone = ("--task", "acl", "--lr", "1e-4")
    for plane in PLANES[1:]:
        train_quickly(tmp_path, *alone, "--plane", plane)
    done = run_script("train_logistic_regression.py", "--task", "acl", *files(tmp_path))
    assert done.returncode == 0, done.stderr
    # A network of several findings that is not at its end may yet change each of its models.
    (tmp_path / "models" / "acl+some-axial.state").touch()
    done = run_script("train_logistic_regression.py", "--task", "acl", *files(tmp_path))
    assert_one_line_error(done, "acl-axial.pt", "is not trained to its end")


def test_the_models_of_several_findings_are_the_one_network(tmp_path, monkeypatch):
    write_findings(tmp_path / "data")
    seen = {}
    real = train.save_model

    def keep(path, model, metadata, finding=0):
        seen[path.stem] = model, finding
        real(path, model, metadata, finding)

    monkeypatch.setattr(train, "save_model", keep)
    monkeypatch.setattr(train, "report_best_models", lambda *args: None)
    leftover = tmp_path / "models" / ".acl+soft-axial.state.abcdefgh.tmp"  # of a killed run
    leftover.parent.mkdir()
    leftover.touch()
    train_quickly(tmp_path, "--task", "acl", "soft", "--plane", "axial")
    assert not leftover.exists()
    x = torch.randn(1, 3, 1, 64, 64)
    assert {name: row for name, (_, row) in seen.items()} == {"acl-axial": 0, "soft-axial": 1}
    for name, (model, row) in seen.items():
        saved = load_model(tmp_path / "models" / f"{name}.pt")[0]
        with torch.no_grad():
            torch.testing.assert_close(saved(x)[0, 0], model.cpu().eval()(x)[0, row])


def test_findings_of_one_epoch_are_reported_in_one_pass(tmp_path, monkeypatch):
    write_findings(tmp_path / "data")
    passes = []
    real = predictions.exam_features

    def count(model, exams, *args):
        passes.append(exams.ids)
        return real(model, exams, *args)

    monkeypatch.setattr(predictions, "exam_features", count)
    words = ("--plane", "axial", "--lr", "1e-4", "--select", "last", "--channels", "neighbours")
    done = train_quickly(tmp_path, "--task", "acl", "soft", *words)
    sets = [MRDataset(tmp_path / "data", task, "axial", train=False) for task in ("acl", "soft")]
    assert sum(map(len, passes)) == len({*sets[0].ids, *sets[1].ids})
    for exams in sets:
        model, metadata = load_model(tmp_path / "models" / f"{exams.tasks[0]}-axial.pt")
        exams.channels = "neighbours"
        logits = predict_exams(model, exams, torch.device("cpu"), "fp32")
        auc = metrics_of(exams.tasks, exams.labels, logits, logits)[exams.tasks[0]]["auc"]
        assert metadata["metrics"]["valid"]["auc"] == pytest.approx(auc)
        assert f"{exams.tasks[0]}, validation AUC {auc:.4f}" in done.stdout


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    """Three single planes, and networks that join them, one of which may lack planes; stacks."""
    work = tmp_path_factory.mktemp("joined")
    write_exams(work / "data")
    (work / "drop.toml").write_text("plane-dropout = 0.3\nshare-backbone = true\n")
    for plane in PLANES:
        train_quickly(work, "--task", "acl", "--plane", plane)
    train_quickly(work, "--task", "acl", "--plane", *PLANES)
    train_quickly(work, "--task", "acl", "--plane", *PLANES, "--recipe", work / "drop.toml")
    planes = (*PLANES, "+".join(PLANES))
    done = run_script("train_logistic_regression.py", *files(work), "--planes", *planes)
    assert done.returncode == 0, done.stdout + done.stderr
    words = ("--planes", "+".join(PLANES), "--recipes", "drop")
    done = run_script("train_logistic_regression.py", *files(work), *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return work


def predict(work, *words, recipes=("article",)):
    done = run_script("predict.py", *words, "--models-dir", work / "models", "--task", "acl",
                      "--precision", "fp32", "--recipes", *recipes)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return list(csv.DictReader(done.stdout.splitlines()))


@pytest.mark.whole
def test_joined_planes_are_predicted_and_explained(joined):
    written = joined / "models" / "acl-predictions.csv"
    with open(written, newline="") as file:
        wanted = {row["id"]: row for row in csv.DictReader(file) if row["split"] == "valid"}
    rows = predict(joined, joined / "data" / "valid")
    assert len(rows) == 8
    for row in rows:
        one = wanted[str(int(row["exam"]))]
        assert float(row["joint"]) == pytest.approx(float(one["axial+coronal+sagittal"]), abs=1e-6)
        assert float(row["stack"]) == pytest.approx(float(one["stack"]), abs=1e-6)
    out = joined / "report"
    done = run_script("explain.py", joined / "data/valid", "--exam", "12", "--task", "acl", "--out",
                      out, "--models-dir", joined / "models", "--precision", "fp32")  # fmt: skip
    assert done.returncode == 0, done.stderr
    data = finding_of(out / "0012-acl.html")
    titles = [plane["plane"] for plane in data["planes"]]
    assert titles == [*PLANES, *(f"{plane} of axial+coronal+sagittal" for plane in PLANES)]
    sums = [sum(plane["sums"]) for plane in data["planes"]]
    for mine, plane in zip(sums[:3], data["planes"][:3], strict=True):
        assert mine + plane["bias"] == pytest.approx(plane["logit"], abs=1e-4)
        assert plane["others"] is None
    joint = sum(sums[3:])
    for mine, plane in zip(sums[3:], data["planes"][3:], strict=True):
        assert joint + plane["bias"] == pytest.approx(plane["logit"], abs=1e-4)
        assert plane["others"] == pytest.approx(joint - mine, abs=1e-4)
    assert "alexnet, maximum over slices" in data["planes"][0]["of"]


@pytest.mark.whole
def test_a_plane_may_lack_where_training_dropped_planes(joined):
    folder = joined / "data" / "valid"
    files = [folder / plane / "0012.npy" for plane in ("axial", "sagittal")]
    (row,) = predict(joined, *files)
    assert row["joint"] == "" and row["decision"] and row["planes"] == "axial+sagittal"
    (row,) = predict(joined, *files, recipes=("drop",))
    assert row["joint"] and row["decision"] and row["planes"] == "axial+sagittal"
    stack = json.loads((joined / "models" / "acl-stack-drop.json").read_text())
    assert len(stack["combinations"]) == 7
    network, _ = load_model(joined / "models" / "acl-axial+coronal+sagittal-drop.pt")
    axial, coronal = (network.networks[plane].pretrained_model for plane in PLANES[:2])
    assert all(torch.equal(a, b) for a, b in
               zip(axial.parameters(), coronal.parameters(), strict=True))  # fmt: skip


def test_a_missing_plane_is_refused_or_allowed(work):
    (work / "data" / "train" / "coronal" / "0003.npy").unlink()
    words = ("--task", "acl", "--plane", "axial", "coronal")
    done = train_quickly(work, *words, status=2)
    assert_one_line_error(done, "exam 3: coronal is missing (found: axial)", "--plane-dropout")
    train_quickly(work, *words, "--plane-dropout", "0.2")


@pytest.mark.whole
def test_recipes_are_stacked_together(work):
    (work / "mean.toml").write_text('pooling = "mean"\nchannels = "neighbours"\n')
    (work / "squeeze.toml").write_text('backbone = "squeezenet1_1"\npooling = "attention"\n')
    for recipe, plane in itertools.product(("article", "mean", "squeeze"), PLANES):
        recipe = recipe if recipe == "article" else work / f"{recipe}.toml"
        train_quickly(work, "--task", "acl", "--plane", plane, "--recipe", recipe)
    recipes = ("article", "mean", "squeeze")
    done = run_script("train_logistic_regression.py", *files(work), "--recipes", *recipes)
    assert done.returncode == 0, done.stdout + done.stderr
    stack = json.loads((work / "models" / "acl-stack-article+mean+squeeze.json").read_text())
    assert len(stack["combinations"]["axial+coronal+sagittal"]["columns"]) == 9
    with open(work / "models" / "acl-article+mean+squeeze-predictions.csv", newline="") as file:
        wanted = {row["id"]: row["stack"] for row in csv.DictReader(file)}
    for row in predict(work, work / "data" / "valid", recipes=recipes):
        assert float(row["stack"]) == pytest.approx(float(wanted[str(int(row["exam"]))]), abs=1e-6)
    out = ("--exam", "13", "--task", "acl", "--out", work / "report", "--recipes", *recipes)
    done = run_script("explain.py", work / "data/valid", *out, "--models-dir", work / "models",
                      "--precision", "fp32")  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = run_script("predict.py", work / "data/valid", "--models-dir", work / "models",
                      "--recipes", "other")  # fmt: skip
    assert_one_line_error(done, "no saved models of recipe other", "--recipes")


def test_reproducing_with_a_recipe(tmp_path):
    (tmp_path / "quick.toml").write_text('pooling = "mean"\nbackbone = "vgg16"\n')
    words = ["--recipe", str(tmp_path / "quick.toml"), "--folds", "3", "--lr", "1"]
    assert reproduce.read_training(words) == (
        ["--folds", "3", "--recipes", "quick"], "quick",
        3, "auto", "vgg16",
    )  # fmt: skip
    assert reproduce.read_training([*words, "--backbone", "vgg11"])[-1] == "vgg11"
    article = ["--recipes", "article"], "article", 1, "auto", "alexnet"
    assert reproduce.read_training([]) == article
    assert reproduce.read_training(["--folds", "5", "--repeat", "3", "--seed", "7"])[2] == 15


def test_a_second_run_of_reproduce_in_one_folder_is_refused(tmp_path):
    write_exams(tmp_path / "data")
    models = tmp_path / "models"
    models.mkdir()
    with file_lock(models / ".reproduce.lock", "busy"):
        done = run_script("reproduce.py", *files(tmp_path)[:6])
    assert_one_line_error(done, models, "another reproduce.py runs there")
    assert [path.name for path in models.iterdir()] == [".reproduce.lock"]
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    "words",
    [("--folds", 10**12), ("--repeat", 10**6), ("--epochs", 10**30), ("--accumulate", 10**30)],
)
def test_numbers_without_bounds_are_refused(work, words):
    done = run_script("train.py", *files(work), "--task", "acl", "--plane", "axial", *words)
    assert done.returncode == 2 and any(
        text in done.stderr for text in ("below 2^31", "at most 1000")
    )


@pytest.mark.whole
def test_reproducing_on_a_set_of_one_plane(tmp_path):
    data = write_exams(tmp_path / "data")
    shutil.rmtree(data / "valid" / "axial")
    for split in ("train", "valid"):
        shutil.rmtree(data / split / "coronal")
    quick = ("--no-pretrained", "--epochs", "1", "--precision", "fp32")
    done = run_script("reproduce.py", *files(tmp_path)[:6], "--", *quick)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out   axial, coronal: no folder in both" in done.stdout
    assert [path.name for path in (tmp_path / "models").glob("*.pt")] == ["acl-sagittal.pt"]
    rows = json.loads((tmp_path / "models" / "results.json").read_text())["acl"]["valid"]
    assert [*rows][:2] == ["sagittal", "stack"]
    shutil.rmtree(data / "valid" / "sagittal")
    done = run_script("reproduce.py", *files(tmp_path)[:6], "--", *quick)
    assert_one_line_error(done, data, "no plane has a folder in train and in valid")


def random_options(rng):
    """A combination of train.py's options, sensible or not."""

    def maybe(option, *values):
        value = rng.choice(values)
        return [] if rng.random() < 0.6 else [option, *str(value).split()]

    words = ["--plane", *rng.choice([["axial"], ["coronal"], ["axial", "sagittal"]])]
    words += ["--task", *rng.choice([["acl"], ["acl", "some"], ["all"]])]
    for option, *values in (
        ("--backbone", "alexnet", "squeezenet1_1", "resnet18", "inception_v3"),
        ("--pooling", "max", "mean", "attention"), ("--channels", "grey", "neighbours"),
        ("--augment", "article", "anatomical", "strong", "none"), ("--slices", 0.5, 1.0),
        ("--lr-scheduler", "plateau", "step", "cosine", "one-cycle", "none"),
        ("--warmup", 0, 0, 0, 0.1),
        ("--head-lr", 1e-3), ("--optimizer", "adam", "adamw"), ("--average-weights", 0.9),
        ("--clip", 1.0), ("--accumulate", 3, 8), ("--dropout", 0.2), ("--plane-weight", 0, 0.5),
        ("--plane-dropout", 0, 0, 0, 0.3), ("--intensity", "raw"),
        ("--protocol", "article", "article", "held-out"),
        ("--folds", 2),
    ):  # fmt: skip
        words += maybe(option, *values)
    for switch in ("--share-backbone", "--no-class-weights", "--cuda-graphs"):
        words += [switch] if rng.random() < 0.1 else []
    return words


@pytest.mark.parametrize("count", [12, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.whole
def test_random_combinations_train_or_are_refused(tmp_path, count):
    root = write_findings(tmp_path / "data")
    for split in ("train", "valid"):
        for path in root.glob(f"{split}-*.csv"):  # few exams, so that an epoch is two steps
            rows = path.read_text().splitlines()
            path.write_text("\n".join(rows[:8]) + "\n")
    rng, outcomes = random.Random(count), {0: 0, 2: 0}
    for k in range(count):
        words = random_options(rng)
        done = run_script("train.py", *files(tmp_path), "--no-pretrained", "--epochs", "1",
                          "--models-dir", tmp_path / f"models{k}", *words)  # fmt: skip
        assert done.returncode in outcomes, (words, done.stderr)
        outcomes[done.returncode] += 1
        if done.returncode == 2:
            assert len(done.stderr.strip().splitlines()) == 1, (words, done.stderr)
    assert outcomes[0] and outcomes[2]


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_trains_resumes_predicts_and_explains(tmp_path, monkeypatch, backbone):
    write_exams(tmp_path / "data", size=96)
    words = ("--task", "acl", "--backbone", backbone)
    for plane in PLANES:
        train_quickly(tmp_path, *words, "--plane", plane)
    model = load_model(tmp_path / "models" / "acl-axial.pt")[0].state_dict()
    with monkeypatch.context() as patch:
        steps = stop_at_step(patch, 7)
        done = train_quickly(tmp_path, *words, "--plane", "axial", status=143)
    assert len(steps) == 7
    done = train_quickly(tmp_path, *words, "--plane", "axial", "--resume")
    assert "after epoch 0 and 7 steps" in done.stdout
    again = load_model(tmp_path / "models" / "acl-axial.pt")[0].state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.items())
    assert run_script("train_logistic_regression.py", *files(tmp_path)).returncode == 0
    assert all(row["decision"] for row in predict(tmp_path, tmp_path / "data" / "valid"))
    done = run_script("explain.py", tmp_path / "data/valid", "--exam", "12", "--task", "acl",
                      "--out", tmp_path / "report", "--models-dir", tmp_path / "models",
                      "--precision", "fp32")  # fmt: skip
    assert done.returncode == 0, done.stderr
    data = finding_of(tmp_path / "report" / "0012-acl.html")
    for plane in data["planes"]:
        total = sum(plane["sums"]) + plane["bias"]
        assert total == pytest.approx(plane["logit"], rel=1e-4, abs=1e-5)


def test_slices_too_small_for_a_backbone(work):
    words = ("--task", "acl", "--plane", "axial", "--backbone", "inception_v3")
    done = train_quickly(work, *words, status=2)
    assert_one_line_error(done, "64 x 64 px; inception_v3 needs at least 75 px")


def test_what_the_configuration_refuses(shared_exams):
    for more, fault in (
        ({"share_backbone": True}, "--share-backbone: needs several planes"),
        ({"plane_dropout": 0.1}, "--plane-dropout: needs several planes"),
        ({"freeze": 1}, "--freeze: not with --no-pretrained"),
        ({"warmup": 0.1}, "--warmup: not with --lr-scheduler plateau"),
    ):
        with pytest.raises(InputError, match=fault):
            config(**more).check()
    train_set, valid_set = load_exams(config(augment="strong", slices=0.5), shared_exams)
    assert train_set.slices == valid_set.slices == (0.3, 0.5)
    assert isinstance(train_set.transform, StrongAugmentation) and valid_set.transform is None
