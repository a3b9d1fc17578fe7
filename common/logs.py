"""What TensorBoard shows: the curves, pictures and hyperparameters of a training."""

import numpy as np

from common.metrics import roc_auc


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
        log_every: steps between two points of the curves within an epoch.
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
        """Slices as pictures: float 0..1 (s, 1, H, W), or uint8 (s, H, W, 3) as "NHWC"."""
        self.writer.add_images(title, slices, epoch, dataformats=dataformats)

    def add_steps(self, epoch, labels, logits, losses):
        """Running means within an epoch, from the steps' own logits.

        Args:
            labels, logits, losses: float32 (n,), in the order of the steps.
        """
        n = len(labels)
        for end in [*range(self.log_every, n, self.log_every), n]:
            step = (epoch - 1) * n + end
            self.within.add_scalar("within-epoch/train-loss", losses[:end].mean(), step)
            if len(set(labels[:end])) == 2:
                auc = roc_auc(labels[:end], logits[:end])
                self.within.add_scalar("within-epoch/train-auc", auc, step)
        self.within.flush()

    def add_epoch(self, epoch, metrics, lr, exams_per_second):
        """Points of one epoch.

        Args:
            metrics: {"train" or what the epoch is selected on: {"loss", "auc"}}.
        """
        for name in ("loss", "auc"):
            for split, values in metrics.items():
                self.writer.add_scalar(f"{name}/{split}", values[name], epoch)
        self.writer.add_scalar("learning-rate", lr, epoch)
        self.writer.add_scalar("exams-per-second", exams_per_second, epoch)
        self.writer.flush()

    def add_result(self, title, labels, probabilities, metadata, config):
        """Curves and numbers of the best model on the validation exams.

        Args:
            labels, probabilities: (n,).
            metadata: of the model, as `checkpoint.load_model` returns it.
            config: {name: value} of the training.
        """
        # With matplotlib, 25 MB that nothing needs while the memory is full.
        from common.figures import roc_figure

        epoch, valid = metadata["epoch"], metadata["metrics"]["valid"]
        self.writer.add_pr_curve("precision-recall", labels, probabilities, epoch)
        self.writer.add_figure("roc", roc_figure(labels, {title: probabilities}), epoch)
        best = {f"best/valid-{name}": valid[name] for name in ("auc", "loss")}
        self.writer.add_hparams(config, best | {"best/epoch": epoch}, run_name=".")

    def add_heat_maps(self, model, exams, epoch, device):
        """Heat maps of the first positive and the first negative exam.

        Args:
            model: MRNet on `device`.
            exams: MRDataset.
        """
        from common.figures import overlay

        for label, name in ((1, "positive"), (0, "negative")):
            i = int(np.flatnonzero(exams.labels == label)[0])
            maps, _ = model.heat_maps(exams.exam(i, None, device))
            slices = overlay(exams.volume(i).cpu().numpy(), maps)
            self.add_images(f"heat map of a {name} validation exam", slices, epoch, "NHWC")
