"""train.py's functions one by one: arguments, schedules, an epoch, an evaluation, a whole run."""

import csv
import shutil
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_one_line_error, run_script, write_exams
from sklearn.metrics import log_loss, roc_auc_score

import train
from dataloader import Augmentation, MRDataset
from model import MRNet
from mrnet.errors import RunError
from mrnet.networks.saved import read_checkpoint
from mrnet.training.checkpoint import load_model, lock
from mrnet.training.config import Config
from mrnet.training.datasets import load_exams
from mrnet.training.logs import TrainingLog
from mrnet.training.splits import plan_splits

CPU = torch.device("cpu")


def config(**more):
    return Config(**{"task": "acl", "plane": "axial", "pretrained": False} | more)


def parse(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["train.py", "--task", "acl", "--plane", "axial", *args])
    return train.parse_arguments()


@pytest.fixture
def split(shared_exams):
    sets = (MRDataset(shared_exams, "acl", "axial", train=t) for t in (True, False))
    return plan_splits(*sets, "article", 1, range(1))[0]


def test_the_default_recipe_is_the_articles(monkeypatch):
    args = vars(parse(monkeypatch))
    article = {
        "task": ["acl"], "plane": ["axial"], "recipe": "article", "intensity": "standardized",
        "channels": "grey", "augment": "article", "slices": 1.0, "backbone": "alexnet",
        "pretrained": True, "freeze": 0, "pooling": "max", "dropout": 0.0, "share_backbone": False,
        "plane_weight": 0.5, "plane_dropout": 0.0, "class_weights": True, "accumulate": 1,
        "optimizer": "adam", "lr": 1e-5, "head_lr": 0.0, "weight_decay": 0.1, "clip": 0.0,
        "average_weights": 0.0, "lr_scheduler": "plateau", "warmup": 0.0, "epochs": 50,
        "patience": 5, "select": "auc", "seed": 0, "protocol": "article", "folds": 1,
        "repeat": 1, "networks": None,
        "device": "auto", "precision": "auto", "cuda_graphs": None,
    }  # fmt: skip
    files = {"data_dir": Path("data"), "models_dir": Path("models"), "logs_dir": Path("logs"),
             "log_every": 100, "resume": False, "cache": "auto"}  # fmt: skip
    assert args == article | files


def test_every_argument_is_taken(monkeypatch):
    words = ("--data-dir d --intensity raw --channels neighbours --augment strong --slices 0.5 "
             "--backbone vgg11 --no-pretrained --freeze 3 --pooling mean --dropout 0.25 "
             "--share-backbone --plane-weight 0.1 --plane-dropout 0.3 --no-class-weights "
             "--accumulate 4 --optimizer adamw --lr 0.5 --head-lr 0.6 --weight-decay 0 --clip 1 "
             "--average-weights 0.9 --lr-scheduler cosine --warmup 0.1 --epochs 3 --patience 2 "
             "--select last --seed 7 --protocol held-out --folds 4 --repeat 2 --networks 2 8 "
             "--device cpu --precision fp32 --cache disk --cuda-graphs --models-dir m --logs-dir "
             "l --log-every 9 --resume")  # fmt: skip
    args = vars(parse(monkeypatch, *words.split()))
    assert args == {
        "task": ["acl"], "plane": ["axial"], "recipe": "article", "data_dir": Path("d"),
        "intensity": "raw", "channels": "neighbours", "augment": "strong", "slices": 0.5,
        "backbone": "vgg11", "pretrained": False, "freeze": 3, "pooling": "mean", "dropout": 0.25,
        "share_backbone": True, "plane_weight": 0.1, "plane_dropout": 0.3, "class_weights": False,
        "accumulate": 4, "optimizer": "adamw", "lr": 0.5, "head_lr": 0.6, "weight_decay": 0.0,
        "clip": 1.0, "average_weights": 0.9, "lr_scheduler": "cosine", "warmup": 0.1, "epochs": 3,
        "patience": 2, "select": "last", "seed": 7, "protocol": "held-out", "folds": 4,
        "repeat": 2, "networks": [2, 8],
        "device": "cpu", "precision": "fp32", "cache": "disk", "cuda_graphs": True,
        "models_dir": Path("m"), "logs_dir": Path("l"), "log_every": 9, "resume": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    "words, fault",
    [
        ("--epochs 0", "'0' is not a whole number of at least 1"),
        ("--lr -1", "'-1' is not a number above 0"),
        ("--lr nan", "'nan' is not a number above 0"),
        ("--lr 0", "'0' is not a number above 0"),
        ("--lr inf", "'inf' is not a number above 0"),
        ("--weight-decay -1", "'-1' is not a number of at least 0"),
        ("--dropout 1", "'1' is not a number from 0 to below 1"),
        ("--seed -1", "'-1' is not a whole number from 0 to below 2^31"),
        ("--patience 0", "at least 1"),
        ("--folds x", "'x' is not a whole number"),
        ("--repeat 0", "at least 1"),
        ("--log-every 0", "at least 1"),
        ("--lr-scheduler cos", "invalid choice"),
        ("--protocol mine", "invalid choice"),
        ("--intensity other", "invalid choice"),
        ("--cache here", "invalid choice"),
        ("--plane oblique", "invalid choice"),
        ("--backbone lenet", "invalid choice"),
        ("--slices 0", "'0' is not a number above 0 and at most 1"),
        ("--accumulate 0", "at least 1"),
    ],
)
def test_arguments_that_are_refused(monkeypatch, capsys, words, fault):
    with pytest.raises(SystemExit) as stop:
        parse(monkeypatch, *words.split())
    assert stop.value.code == 2 and fault in capsys.readouterr().err


def test_task_and_plane_are_required(monkeypatch, capsys):
    for argv in (["train.py", "--task", "acl"], ["train.py", "--plane", "axial"]):
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit):
            train.parse_arguments()
        assert "required" in capsys.readouterr().err


def test_the_state_at_the_start(split):
    state = train.start_state(config(lr=3e-4, weight_decay=0.2, dropout=0.4), split)
    (group,) = state.optimizer.param_groups
    assert isinstance(state.optimizer, torch.optim.Adam)
    assert (group["lr"], group["weight_decay"], group["fused"]) == (3e-4, 0.2, True)
    assert len(group["params"]) == len(list(state.model.parameters())) == 12
    assert group["capturable"] is False and state.model.dropout.p == 0.4 and state.epoch == 0
    assert isinstance(state.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
    same = train.start_state(config(lr_scheduler="step"), split).model.classifier.weight
    assert torch.equal(state.model.classifier.weight, same)
    split.seed = 1
    other = train.start_state(config(), split).model.classifier.weight
    assert not torch.equal(state.model.classifier.weight, other)


def test_imagenet_features_are_the_default(split, monkeypatch):
    features = MRNet().pretrained_model.state_dict()
    monkeypatch.setattr(train, "imagenet_features", lambda backbone: features)
    state = train.start_state(config(pretrained=True), split)
    for name, value in state.model.pretrained_model.state_dict().items():
        assert torch.equal(value, features[name])


def test_fetching_features_does_not_change_the_initial_classifier(split, monkeypatch):
    features = MRNet().pretrained_model.state_dict()

    def fetched(backbone):
        torch.rand(7)  # as a whole network of torchvision draws its weights
        return features

    found = []
    for source in (lambda backbone: features, fetched):
        monkeypatch.setattr(train, "imagenet_features", source)
        found.append(train.start_state(config(pretrained=True), split).model.classifier.weight)
    assert torch.equal(*found)


def step_of(state):
    return partial(train.training_step, state.model, state.optimizer, config())


def test_one_epoch_of_training(split):
    state = train.start_state(config(lr=1e-4), split)
    torch.manual_seed(5)
    order = torch.randperm(12).numpy()
    torch.manual_seed(5)
    (labels, logits, losses), metrics = train.train_model(
        state, step_of(state), split.train_set, config(), "epoch"
    )
    np.testing.assert_array_equal(labels, split.train_set.labels[order])
    metrics, labels, logits = metrics["acl"], labels[:, 0], logits[:, 0]
    assert metrics["loss"] == pytest.approx(losses.mean())
    assert metrics["auc"] == pytest.approx(roc_auc_score(labels, logits))
    p, weights = 1 / (1 + np.exp(-logits.astype(float))), np.where(labels == 1, 2, 1)
    assert metrics["loss"] == pytest.approx(
        log_loss(labels, p, sample_weight=weights) * weights.mean(), rel=1e-5
    )
    assert state.epoch == 1


def test_an_epoch_that_is_stopped_has_no_metrics_and_does_not_count(split):
    state, stop = train.start_state(config(lr=1e-4), split), []

    def stopping(*args):
        stop.append(2)
        return step_of(state)(*args)

    results, metrics = train.train_model(state, stopping, split.train_set, config(), "epoch", stop)
    assert metrics is None and [len(one) for one in results] == [1, 1, 1] and state.epoch == 0


def test_a_loss_that_is_not_finite_names_epoch_and_exam(split):
    state = train.start_state(config(), split)
    with torch.no_grad():
        state.model.classifier.bias.fill_(torch.nan)
    state.epoch = 4
    torch.manual_seed(5)
    first = split.train_set.paths[torch.randperm(12)[0]]
    torch.manual_seed(5)
    with pytest.raises(RunError, match=rf"became nan in epoch 5 at {first}; .*--lr.*are kept"):
        train.train_model(state, step_of(state), split.train_set, config(), "epoch")


def test_evaluation(split):
    state = train.start_state(config(), split)
    metrics, logits = train.evaluate_model(state.model, split.valid_set, config())
    labels, logits, metrics = split.valid_set.labels[:, 0], logits[:, 0], metrics["acl"]
    assert len(logits) == 8 and not state.model.training
    assert metrics["auc"] == pytest.approx(roc_auc_score(labels, logits))
    p, weights = 1 / (1 + np.exp(-logits.astype(float))), np.where(labels == 1, 2, 1)
    assert metrics["loss"] == pytest.approx(
        log_loss(labels, p, sample_weight=weights) * weights.mean(), rel=1e-5
    )
    with torch.no_grad():
        state.model.classifier.bias.fill_(torch.inf)
    path = split.valid_set.paths[0]
    with pytest.raises(RunError, match=f"the logit of {path} is inf: .*lower --lr.*are kept"):
        train.evaluate_model(state.model, split.valid_set, config())


def test_exams_as_the_arguments_ask_for(shared_exams, capsys):
    for exams in load_exams(config(), shared_exams):
        assert (exams.tasks, exams.plane, exams.intensity) == (("acl",), "axial", "standardized")
        assert exams.class_weights == {"acl": (1.0, 2.0)}
        assert isinstance(exams.transform, Augmentation) == (exams.split == "train")
        assert exams.channels == "grey" and exams.slices == (1.0, 1.0)
    said = capsys.readouterr().out
    assert "train      12 exams, 4 positive, 2 to 4 slices" in said
    assert "valid      8 exams, 3 positive" in said and "WARNING" not in said
    assert "RANDOM" in said and "class weights  negative 1, positive 2.000" in said
    plain = config(augment="none", class_weights=False, intensity="raw", pretrained=True)
    for exams in load_exams(plain, shared_exams):
        assert exams.transform is None and exams.intensity == "raw"
        assert exams.class_weights == {"acl": (1.0, 1.0)} and set(exams.weights[:, 0]) == {1}
    assert "RANDOM" not in capsys.readouterr().out


def test_the_augmented_exam_that_is_logged(split):
    split.train_set.transform = Augmentation()
    for intensity in ("standardized", "raw"):
        split.train_set.intensity = intensity
        slices = train.augmented_exam(config(intensity=intensity), split)
        assert slices.shape[1:] == (1, 64, 64) and slices.min() >= 0 and 0.4 < slices.max() <= 1
        assert torch.equal(slices, train.augmented_exam(config(intensity=intensity), split))
    split.train_set.transform = None
    stored = np.load(split.train_set.paths[0])
    slices = train.augmented_exam(config(intensity="raw"), split)
    np.testing.assert_allclose(slices[:, 0], stored / 255, atol=1e-6)


def read_events(folder):
    """{tag: [(step, value), ...]} of the scalars that were logged under a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars = {}
    for path in sorted({file.parent for file in Path(folder).rglob("events*")}):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0, "images": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            scalars[tag] = [(e.step, e.value) for e in events.Scalars(tag)]
    return scalars


def test_a_whole_run(tmp_path):
    exams = write_exams(tmp_path / "data")
    done = run_script(
        "train.py", "--task", "acl", "--plane", "axial", "--data-dir", exams, "--models-dir",
        tmp_path / "models", "--logs-dir", tmp_path / "logs", "--precision", "fp32", "--seed", "3",
        "--no-pretrained", "--epochs", "3", "--lr", "1e-3", "--log-every", "5",
        "--lr-scheduler", "step", "--patience", "9", "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    path = tmp_path / "models" / "acl-axial.pt"
    model, metadata = load_model(path)
    rows = [line.split() for line in done.stdout.splitlines() if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert [row[5] for row in rows] == ["1.0e-03"] * 3
    aucs = [float(row[4]) for row in rows]
    best = int(np.argmax(aucs)) + 1
    assert metadata["epoch"] == best and rows[best - 1][-1] == "saved" and rows[0][-1] == "saved"
    marked = [row[-1] == "saved" for row in rows]
    assert marked == [auc > max([-1, *aucs[:i]]) for i, auc in enumerate(aucs)]
    train_loss, train_auc, loss, auc = map(float, rows[best - 1][1:5])
    assert metadata["metrics"]["train"]["loss"] == pytest.approx(train_loss, abs=1e-4)
    assert metadata["metrics"]["train"]["auc"] == pytest.approx(train_auc, abs=1e-4)
    assert metadata["metrics"]["valid"]["loss"] == pytest.approx(loss, abs=1e-4)
    assert metadata["metrics"]["valid"]["auc"] == pytest.approx(auc, abs=1e-4)
    assert f"validation AUC {auc:.4f} [" in done.stdout and f", epoch {best} (optim" in done.stdout
    assert f"model  {path}" in done.stdout and not list((tmp_path / "models").glob("*.state"))

    valid = MRDataset(exams, "acl", "axial", train=False)
    again, logits = train.evaluate_model(model, valid, config())
    assert again["acl"]["auc"] == pytest.approx(auc, abs=1e-4)
    wanted = {"task": "acl", "plane": "axial", "intensity": "standardized", "pretrained": False,
              "precision": "fp32", "seed": 3, "fold": 0, "out_of_fold": [], "tuning": [],
              "protocol": "article", "class_weights": [1.0, 2.0], "dataset": None,
              "data_dir": str(exams)}  # fmt: skip
    assert wanted.items() <= metadata.items()
    assert metadata["arguments"] == asdict(
        config(seed=3, epochs=3, lr=1e-3, lr_scheduler="step", patience=9)
    )
    assert metadata["data"]["valid"] == metadata["data"]["selection"] == valid.fingerprint()
    assert {"git", "versions"} <= set(metadata)

    (folder,) = (tmp_path / "logs" / "acl" / "axial").iterdir()
    assert f"logs   {folder}" in done.stdout
    scalars = read_events(folder)
    assert [step for step, _ in scalars["loss/train"]] == [1, 2, 3]
    assert [value for _, value in scalars["auc/valid"]] == pytest.approx(aucs, abs=1e-4)
    assert [step for step, _ in scalars["within-epoch/train-loss"]] == [
        5, 10, 12, 17, 22, 24, 29, 34, 36,
    ]  # fmt: skip
    ends = [scalars["within-epoch/train-loss"][i][1] for i in (2, 5, 8)]
    assert ends == pytest.approx([float(row[1]) for row in rows], abs=1e-4)
    assert [v for _, v in scalars["learning-rate"]] == pytest.approx([1e-3] * 3)
    assert all(value > 0 for _, value in scalars["exams-per-second"])
    assert scalars["best/epoch"][0][1] == best


def test_unknown_labels_do_not_count_in_the_curves(tmp_path):
    """The loss of a finding that an exam has no label of is 0."""
    unknown = np.nan
    labels = np.array([[1, 0], [0, unknown], [unknown, 1], [1, 0]], np.float32)
    losses = np.array([[0.5, 0.25], [1.5, 0], [0, 0.75], [1, 0.5]], np.float32)
    with TrainingLog(tmp_path, log_every=2) as log:
        log.add_steps(1, labels, np.zeros_like(losses), losses)
    points = read_events(tmp_path)["within-epoch/train-loss"]
    assert points == [(2, (1.0 + 0.25) / 2), (4, (1.0 + 0.5) / 2)]


def test_folds_and_their_csv(tmp_path):
    exams = write_exams(tmp_path / "data")
    done = run_script(
        "train.py", "--task", "acl", "--plane", "axial", "--data-dir", exams, "--models-dir",
        tmp_path / "models", "--logs-dir", tmp_path / "logs", "--precision", "fp32",
        "--no-pretrained", "--epochs", "1", "--folds", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "-- network 1 of 2: seed 0, fold 1" in done.stdout
    assert "-- network 2 of 2: seed 0, fold 2" in done.stdout
    with open(tmp_path / "models" / "acl-axial-folds2-seed0.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for fold in (1, 2):
        content = read_checkpoint(tmp_path / "models" / f"acl-axial-fold{fold}of2.pt")
        mine = [row["id"] for row in rows if row["fold"] == str(fold)]
        assert content["metadata"]["out_of_fold"] == mine and len(mine) == 6
        assert (tmp_path / "logs" / "acl" / f"axial-fold{fold}of2").is_dir()


def trained_on(exams, folder, *more):
    """train.py on the CPU; one epoch, if `more` does not say otherwise."""
    return run_script(
        "train.py", "--task", "acl", "--plane", "axial", "--data-dir", exams, "--models-dir",
        folder / "models", "--logs-dir", folder / "logs", "--device", "cpu", "--precision", "fp32",
        "--no-pretrained", "--epochs", "1", *more,
    )  # fmt: skip


@pytest.mark.whole
def test_settings_reach_the_step_and_the_average_is_evaluated_and_saved(
    shared_exams, tmp_path, monkeypatch
):
    """Two epochs of three steps: 12 exams, 5 in a step."""
    steps, rates, average = [], [], {}

    def step(model, optimizer, config, *args):
        steps.append((config.clip, config.plane_weight))
        rate = optimizer.param_groups[0]["lr"]
        found = real(model, optimizer, config, *args)
        if args[-1]:  # the last exam of a step
            rates.append(rate)
            for name, now in model.named_parameters():
                before = average.get(name, now.detach())  # the first is copied
                average[name] = 0.6 * before + 0.4 * now.detach()
        return found

    real = train.training_step
    monkeypatch.setattr(train, "training_step", step)
    done = trained_on(
        shared_exams, tmp_path, "--plane", "axial", "coronal", "--epochs", "2", "--lr", "1e-4",
        "--lr-scheduler", "cosine", "--accumulate", "5", "--clip", "0.7", "--plane-weight", "0.3",
        "--average-weights", "0.6", "--select", "last",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert steps == [(0.7, 0.3)] * 24
    cosine = 1e-4 * (1 + np.cos(np.pi * np.arange(6) / 6)) / 2
    np.testing.assert_allclose(rates, cosine, rtol=1e-9)
    model, metadata = load_model(tmp_path / "models" / "acl-axial+coronal.pt")
    history = metadata["history"]
    assert [one["lr"] for one in history] == pytest.approx([1e-4, 0.5e-4])
    saved = dict(model.named_parameters())
    assert saved.keys() == average.keys()
    for name, wanted in average.items():
        torch.testing.assert_close(saved[name].detach(), wanted, atol=1e-7, rtol=1e-5)
    assert history[1]["valid"]["loss"] == pytest.approx(metadata["metrics"]["valid"]["loss"])


def test_training_stops_after_epochs_without_a_better_loss(tmp_path):
    exams = write_exams(tmp_path / "data", train=30)
    more = ("--protocol", "held-out", "--epochs", "9", "--patience", "2", "--lr", "1e-30")
    # With that rate no loss ever changes.
    done = trained_on(exams, tmp_path, "--cache", "disk", *more)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert rows[0][8:] == ["saved"] and rows[1][8:] == rows[2][8:] == []
    assert "stopped: tune loss has not improved for 2 epochs" in done.stdout
    assert "the epoch was selected on other exams" in done.stdout
    metadata = load_model(tmp_path / "models" / "acl-axial.pt")[1]
    assert f"commit     {metadata['git']}\n" in done.stdout and "cache      disk" in done.stdout
    metrics = metadata["metrics"]
    assert set(metrics) == {"train", "tune", "valid"}
    assert f"validation AUC {metrics['valid']['auc']:.4f} [" in done.stdout
    head = "epoch train loss train auc tune loss tune auc lr seconds exams/s"
    assert head in [" ".join(line.split()) for line in done.stdout.splitlines()]
    (folder,) = (tmp_path / "logs" / "acl" / "axial").iterdir()
    speeds = [value for _, value in read_events(folder)["exams-per-second"]]
    for row, speed in zip(rows, speeds, strict=True):  # seconds are of the evaluation, too
        assert speed == pytest.approx(float(row[7]), abs=0.1)
        assert speed * (float(row[6]) + 0.05) > 27  # exams


def test_heat_maps_are_titled_by_the_label_of_their_exam(shared_exams, tmp_path):
    model, shown = MRNet().eval(), {}
    torch.nn.init.zeros_(model.classifier.weight)  # no heat, so the slices as they are
    with TrainingLog(tmp_path, log_every=5) as log:
        log.add_images = lambda title, slices, *_: shown.update({title: slices})
        log.add_heat_maps(model, MRDataset(shared_exams, "acl", "axial", train=False), 1, CPU)
    assert len(shown) == 2
    for name, exam in (("positive", "0012"), ("negative", "0013")):
        stored = np.load(shared_exams / "valid" / "axial" / f"{exam}.npy")
        slices = shown[f"heat map of a {name} validation exam"]
        np.testing.assert_array_equal(slices, np.stack([stored] * 3, axis=-1))


def test_cuda_graphs_need_cuda(shared_exams, tmp_path):
    done = trained_on(shared_exams, tmp_path, "--cuda-graphs", "--cache", "device")
    assert_one_line_error(done, "--cuda-graphs: needs --device cuda")


@pytest.mark.parametrize("suffix, more", [("", ()), ("-fold1of2", ("--folds", "2"))])
def test_a_model_that_another_run_trains_is_left_alone(shared_exams, tmp_path, suffix, more):
    path = tmp_path / "models" / f"acl-axial{suffix}.pt"
    path.parent.mkdir()
    with lock(path):
        done = trained_on(shared_exams, tmp_path, *more)
    assert_one_line_error(done, path, "another run", "--models-dir")
    assert not path.exists()


def test_what_an_interrupted_training_leaves_and_how_it_goes_on(
    shared_exams, tmp_path, monkeypatch
):
    path = tmp_path / "models" / "acl-axial.pt"
    constant = ("--lr", "1e-30")  # the first epoch stays the best
    calls, real = [], train.evaluate_model

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:  # while the second epoch is evaluated
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate_model", interrupted)
        assert trained_on(shared_exams, tmp_path, *constant, "--epochs", "2").returncode == 130
    assert path.with_suffix(".state").is_file()
    assert load_model(path)[1]["arguments"]["epochs"] == 2
    more = (*constant, "--epochs", "3", "--resume")
    done = trained_on(shared_exams, tmp_path, *more)
    assert f"resumed {path.with_suffix('.state')} after epoch 1\n" in done.stdout, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == ["2", "3"]
    metadata = load_model(path)[1]
    assert metadata["epoch"] == 1 and metadata["arguments"]["epochs"] == 3
    assert not path.with_suffix(".state").exists()
    assert f"finished before: {path}" in trained_on(shared_exams, tmp_path, *more).stdout


def test_a_resumed_training_does_not_sign_the_model_of_another(exams, tmp_path, monkeypatch):
    """A network of two findings was interrupted, and one of the first finding alone was trained
    since: its state has another name, its model has not."""
    for half in ("train", "valid"):
        shutil.copy(exams / f"{half}-acl.csv", exams / f"{half}-cyst.csv")
    path, real, calls = tmp_path / "models" / "acl-axial.pt", train.evaluate_model, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:  # while the second epoch is evaluated
            raise KeyboardInterrupt
        return real(*args)

    both = ("--task", "acl", "cyst", "--epochs", "2")
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate_model", interrupted)
        assert trained_on(exams, tmp_path, *both).returncode == 130
    assert trained_on(exams, tmp_path, "--seed", "7", "--epochs", "1").returncode == 0
    others = path.read_bytes()
    done = trained_on(exams, tmp_path, *both, "--resume")
    assert_one_line_error(done, path, "--task acl, --seed 7")
    assert path.read_bytes() == others


def test_cuda_graphs_get_their_settings(split, monkeypatch):
    wanted = config(cuda_graphs=True, lr=3e-4, epochs=1)
    state = train.start_state(wanted, split)
    (group,) = state.optimizer.param_groups
    assert group["capturable"] is True and torch.is_tensor(group["lr"])
    assert state.lr == pytest.approx(3e-4)
    asked = []

    def graphs(step, model, config):
        asked.append(config)
        return step

    monkeypatch.setattr(train, "as_graphs", graphs)
    state = train.start_state(config(), split)
    assert len(list(train.train_epochs(wanted, split, state, []))) == 1 and asked == [wanted]
