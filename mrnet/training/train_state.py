"""What changes from epoch to epoch of a training, and when a run may resume it.

Its file lies beside the model, `<task>-<plane>.state`, until the training has ended.
"""

import math
import shlex

import torch

from mrnet.errors import InputError, is_out_of_memory
from mrnet.evaluation.metrics import mean_of
from mrnet.networks.saved import STATE_FORMAT, read_checkpoint, write_checkpoint
from mrnet.training.checkpoint import load_model
from mrnet.training.config import PLANNED, SELECTIONS
from mrnet.training.optimization import steps_with_optimizer


class TrainState:
    """Everything that changes from epoch to epoch: what a resumed training needs.

    Args:
        model, optimizer, scheduler: as at the start of the training.
        tasks: names of the findings.
        average: torch's AveragedModel of the model, or None.
        select: one of SELECTIONS.
    """

    PLAIN = ("epoch", "best_loss", "bad_epochs", "best_auc", "log_dir", "history")
    PARTS = ("model", "optimizer", "scheduler", "average")

    def __init__(self, model, optimizer, scheduler, tasks, average=None, select=SELECTIONS[0]):
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.average, self.select = average, select
        self.epoch = 0  # epochs done
        self.best_loss, self.bad_epochs = float("inf"), 0  # for early stopping
        self.best_auc = dict.fromkeys(tasks, -float("inf"))  # of the models that are saved
        self.log_dir = ""
        self.history = []  # of each epoch logs.Epoch.record

    @property
    def lr(self):
        """Learning rate of the next step, the backbone's."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def evaluated(self):
        """The network that is evaluated and saved: the moving average, if there is one."""
        return self.average.module if self.average else self.model

    def update(self, selected):
        """Step a schedule that counts epochs, and count epochs for early stopping.

        Args:
            selected: {finding: {"loss", "auc"}} on the exams that select the epoch.

        Returns:
            the findings whose AUC (or loss, where these exams have one class) is the best so far:
            each of them selects its own epoch. All of them where the last epoch is selected.
        """
        loss = mean_of(selected)["loss"]
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(loss)
        elif not steps_with_optimizer(self.scheduler):
            self.scheduler.step()
        if loss < self.best_loss:
            self.best_loss, self.bad_epochs = loss, 0
        else:
            self.bad_epochs += 1
        # Exams of one class have no AUC, whatever the epoch: their loss decides.
        score = {
            task: -one["loss"] if math.isnan(one["auc"]) else one["auc"]
            for task, one in selected.items()
        }
        best = [task for task in score if score[task] > self.best_auc[task]]
        self.best_auc |= {task: score[task] for task in best}
        return list(selected) if self.select == "last" else best

    def save(self, path, config, data):
        """Write the state.

        Args:
            config: dict, the arguments that change the result.
            data: dict, fingerprints of the exams.
        """
        training = {name: getattr(self, name) for name in self.PLAIN}
        parts = [name for name in self.PARTS if getattr(self, name) is not None]
        training |= {name: getattr(self, name).state_dict() for name in parts}
        content = {"format": STATE_FORMAT, "config": config, "data": data, "training": training}
        write_checkpoint(path, content)

    def restore(self, training):
        """Take over what `save` wrote as "training"."""
        for name in self.PLAIN:
            setattr(self, name, training[name])
        settings = [dict(group) for group in self.optimizer.param_groups]
        for name in self.PARTS:
            if getattr(self, name) is not None:
                getattr(self, name).load_state_dict(training[name])
        # The optimizer's state brings the settings of the machine that it ran on: keep this one's,
        # and the learning rate in the tensor that CUDA graphs read.
        for group, ours in zip(self.optimizer.param_groups, settings, strict=True):
            lr = float(group["lr"])
            group |= {name: ours[name] for name in ("fused", "capturable", "foreach")}
            group["lr"] = ours["lr"].fill_(lr) if torch.is_tensor(ours["lr"]) else lr


def check_same(path, config, data_sets, earlier, ignore=()):
    """Refuse to resume from `path` if it was made with other arguments or from other exams.

    CUDA graphs may differ: their use depends on the memory that is free, their result does not. So
    may the number of seeds, each of which has networks of its own.

    Args:
        config: dict, the arguments that change the result, as plain values.
        data_sets: {"train", "selection", "valid": MRDataset}.
        earlier: (config, fingerprints of the exams) that the file holds.
        ignore: names of arguments that may differ.

    Raises:
        InputError: with the arguments that the file was made with.
    """
    theirs, fingerprints = earlier
    ignore = {*ignore, "cuda_graphs", "repeat"}
    other = [name for name in config if name not in ignore and config[name] != theirs.get(name)]
    if other:
        values = {name.replace("_", "-"): shlex.quote(str(theirs.get(name))) for name in other}
        options = ", ".join(f"--{name} {value}" for name, value in values.items())
        raise InputError(
            f"{path}: was trained with {options}; resume with the same arguments, give another "
            "--models-dir, or leave out --resume to train it again"
        )
    if fingerprints.keys() != data_sets.keys() or not all(
        exams.fingerprint() == fingerprints[name] for name, exams in data_sets.items()
    ):
        raise InputError(
            f"{path}: was trained on other exams; give another --models-dir, or leave out --resume "
            "to train it again"
        )


def is_finished(path, config, data_sets):
    """Whether this very training ran to its end before: its model is at `path`.

    Raises:
        InputError: another training did, whose model must not be overwritten by resuming.
    """
    if not path.is_file():
        return False
    check_own(path, config, data_sets)
    return True


def check_own(path, config, data_sets, ignore=()):
    """Raise InputError where the model at `path` is not of this training; as `check_same`."""
    _, metadata = load_model(path)
    check_same(path, config, data_sets, (metadata["arguments"], metadata["data"]), ignore)


def restore_state(path, state, config, data_sets, models=()):
    """Put a TrainState where an interrupted training left it.

    Args:
        models: [(path, its data sets)] of the models that the training writes, one a finding.

    Returns:
        False where there is no file.

    Raises:
        InputError: the file is damaged, of other arguments or of other exams, or another training
            has written one of the models since.
    """
    if not path.is_file():
        return False
    content = read_checkpoint(path, expected=STATE_FORMAT)
    try:
        # A resumed training may have more epochs than before, if its schedule is not planned for
        # their number.
        earlier = content["config"], content["data"]
        is_planned = config["lr_scheduler"] in PLANNED or config["warmup"] > 0
        ignore = [] if is_planned else ["epochs"]
        check_same(path, config, data_sets, earlier, ignore)
        state.restore(content["training"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"{path}: incomplete training state; delete it and train again") from None
    for model, exams in models:
        # The first epoch writes all of them; until then they may be of an earlier training.
        if state.epoch and model.is_file():
            check_own(model, config, exams, ["epochs"])
    return True
