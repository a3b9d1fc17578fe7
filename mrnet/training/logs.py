"""What TensorBoard shows: the curves, pictures and hyperparameters of a training."""

from datetime import datetime
from typing import NamedTuple

import numpy as np

from mrnet.evaluation.metrics import mean_of, roc_auc
from mrnet.layout.labels import is_positive


class Epoch(NamedTuple):
    """What one epoch of training gave."""

    number: int  # from 1
    lr: float
    steps: tuple  # labels, logits, weighted losses, float32 (n, tasks) each, in the steps' order
    metrics: dict  # {"train", and "valid" or "tune": {finding: {"loss", "auc"}}}
    exams_per_second: float  # of training
    seconds: float  # of training and evaluation
    saved: list  # findings whose network is: the AUC is the best so far, or the last is selected

    @property
    def record(self):
        """Plain values for the history of a training."""
        return {"epoch": self.number, "lr": self.lr, "seconds": self.seconds} | self.metrics

    def __str__(self):
        """A line of the table that `heads_of_epochs` begins: means over the findings."""
        train, selected = (mean_of(metrics) for metrics in self.metrics.values())
        line = (
            f"{self.number:5d}  {train['loss']:10.4f}  {train['auc']:9.4f}  "
            f"{selected['loss']:10.4f}  {selected['auc']:9.4f}  {self.lr:7.1e}  "
            f"{self.seconds:7.1f}  {self.exams_per_second:7.1f}"
        )
        findings = list(self.metrics.values())[1]
        if len(findings) > 1:
            aucs = (f"{task} {one['auc']:.3f}" for task, one in findings.items())
            line += "  " + ", ".join(aucs)
        if self.saved:
            line += "  saved" if len(findings) == 1 else f"  saved: {', '.join(self.saved)}"
        return line


def history_of(task, history):
    """One finding's part of a training's history, the record of each Epoch."""
    return [
        {name: v[task] if isinstance(v, dict) else v for name, v in one.items()} for one in history
    ]


def heads_of_epochs(selected_on, tasks):
    """The first line of a table of Epochs.

    Args:
        selected_on: "valid" or "tune".
        tasks: the findings.
    """
    aucs = f"  {selected_on} auc of each" if len(tasks) > 1 else ""
    return (
        f"\n{'epoch':>5}  {'train loss':>10}  {'train auc':>9}  {selected_on + ' loss':>10}  "
        f"{selected_on + ' auc':>9}  {'lr':>7}  {'seconds':>7}  {'exams/s':>7}{aucs}"
    )


def new_log_dir(folder):
    """Path of a new training's curves within a folder, by the time: str."""
    return str(folder / f"{datetime.now():%Y%m%d-%H%M%S}")


class NoWriter:
    """Stands in for TensorBoard's SummaryWriter where logs cannot be written."""

    def __getattr__(self, name):
        return lambda *args, **more: None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def open_writer(folder, purge_step=None):
    """TensorBoard's SummaryWriter; where it cannot write, a NoWriter, with a warning."""
    # Half a second to import, and predicting does not need it.
    from torch.utils.tensorboard import SummaryWriter

    try:
        return SummaryWriter(folder, purge_step=purge_step)
    except OSError as error:
        print(f"logs       NONE: {folder} cannot be written ({error.strerror}); continuing without")
        return NoWriter()


class TrainingLog:
    """The curves of one training, a context manager.

    Epochs and exams count steps differently, so each has a writer of its own.

    Args:
        folder: path of the logs.
        log_every: exams between two points of the curves within an epoch.
        done: (epochs, exams) that a resumed training has behind it, or None; purge_step then drops
            points that a killed run logged but did not checkpoint.
    """

    def __init__(self, folder, log_every, done=None):
        epochs, exams = (n + 1 for n in done) if done else (None, None)
        self.log_every = log_every
        self.writer = open_writer(folder, epochs)
        self.within = open_writer(f"{folder}/within-epoch", exams)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for writer in (self.writer, self.within):
            writer.__exit__(*error)

    def add_images(self, title, slices, epoch, dataformats="NCHW"):
        """Slices as pictures: float 0..1 (s, 1 or 3, H, W), or uint8 (s, H, W, 3) as "NHWC"."""
        self.writer.add_images(title, slices, epoch, dataformats=dataformats)

    def add_steps(self, epoch, labels, logits, losses):
        """Running means within an epoch, from the steps' own logits, of the exams whose label is
        known; of several findings their means.

        Args:
            labels, logits, losses: float32 (n, tasks), in the order of the steps.
        """
        n = len(labels)
        for end in [*range(self.log_every, n, self.log_every), n]:
            step = (epoch - 1) * n + end
            means, aucs = [], []
            for label, logit, loss in zip(
                *(x[:end].T for x in (labels, logits, losses)), strict=True
            ):
                known = ~np.isnan(label)
                if known.any():
                    means.append(loss[known].mean())
                if len(set(is_positive(label[known]))) == 2:
                    aucs.append(roc_auc(is_positive(label[known]), logit[known]))
            if means:
                self.within.add_scalar("within-epoch/train-loss", np.mean(means), step)
            if aucs:
                self.within.add_scalar("within-epoch/train-auc", np.mean(aucs), step)
        self.within.flush()

    def add_epoch(self, epoch):
        """Points of one Epoch: means over the findings, and each one's where they are several."""
        self.add_steps(epoch.number, *epoch.steps)
        for split, findings in epoch.metrics.items():
            for name, value in mean_of(findings).items():
                self.writer.add_scalar(f"{name}/{split}", value, epoch.number)
            for task, one in findings.items() if len(findings) > 1 else ():
                self.writer.add_scalar(f"auc-{split}/{task}", one["auc"], epoch.number)
        self.writer.add_scalar("learning-rate", epoch.lr, epoch.number)
        self.writer.add_scalar("exams-per-second", epoch.exams_per_second, epoch.number)
        self.writer.flush()

    def add_result(self, title, labels, probabilities, metadata, config):
        """Curves and numbers of the best model on the validation exams.

        Args:
            labels, probabilities: (n,).
            metadata: of the model, as `checkpoint.load_model` returns it.
            config: {name: value} of the training.
        """
        # With matplotlib, 25 MB that nothing needs while the memory is full.
        from mrnet.evaluation.figures import roc_figure

        epoch, valid = metadata["epoch"], metadata["metrics"]["valid"]
        self.writer.add_pr_curve("precision-recall", labels, probabilities, epoch)
        self.writer.add_figure("roc", roc_figure(labels, {title: probabilities}), epoch)
        best = {f"best/valid-{name}": valid[name] for name in ("auc", "loss")}
        self.writer.add_hparams(config, best | {"best/epoch": epoch}, run_name=".")

    def add_heat_maps(self, model, exams, epoch, device):
        """Heat maps of the first positive and the first negative exam.

        Args:
            model: MRNet or MultiPlaneMRNet on `device`.
            exams: MRDataset of one finding.
        """
        from mrnet.evaluation.figures import overlay

        for label, name in ((True, "positive"), (False, "negative")):
            i = int(np.flatnonzero(is_positive(exams.labels[:, 0]) == label)[0])
            maps, volume = model.heat_maps(exams.exam(i, device))[0], exams.volume(i)
            if not isinstance(volume, dict):
                maps, volume = {"": maps}, {"": volume}
            for plane, one in maps.items():
                slices = overlay(volume[plane].cpu().numpy(), one, model.backbone)
                title = f"heat map of a {name} validation exam {plane}".strip()
                self.add_images(title, slices, epoch, "NHWC")
