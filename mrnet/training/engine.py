"""One training step, one epoch, predictions: shared by training, stacking, predicting, timing."""

import numpy as np
import torch
import torch.nn.functional as F

from mrnet.runtime.cli import progress
from mrnet.runtime.devices import autocast


class TrainingStep:
    """One step of the optimizer on one exam or several, augmented and preprocessed on `device`.

    Args:
        precision: "fp32" or "bf16".
        clip: largest norm of the gradient; 0 for any.
        plane_weight: of the mean auxiliary loss of the planes, for a MultiPlaneMRNet.
        after: functions to call after each step: a schedule's, the moving average's.
    """

    def __init__(self, model, optimizer, precision, clip=0.0, plane_weight=0.0, after=()):
        self.model, self.optimizer = model, optimizer
        self.device = next(model.parameters()).device
        self.precision, self.clip, self.plane_weight = precision, clip, plane_weight
        self.after = after

    FREES_GRADIENTS = True  # between steps

    def __call__(self, exams, rows, views, targets, weights):
        """Forward, class-weighted binary cross-entropy, backward, update.

        The losses are summed and divided by the number of exams, not by their weights: as one batch
        under torch's mean reduction, and with one exam the article's step.

        Args:
            exams: MRDataset.
            rows: list of n int, the exams of this step.
            views: n Views, as `exams.draw` returns them.
            targets, weights: float32 (n, tasks), on the device.

        Returns:
            logits and weighted losses, float32 (n, tasks) on the device: nothing here waits for it.
        """
        logits, losses = torch.zeros_like(targets), torch.zeros_like(targets)
        for k in range(len(rows)):
            row = slice(k, k + 1)
            logits[row], losses[row] = self.backward(
                exams, exams.volume(rows[k]), views[k], targets[row], weights[row], len(rows)
            )
        self.update()
        for function in self.after:
            function()
        return logits, losses

    def backward(self, exams, volume, view, target, weight, exams_in_step):
        """Forward and backward for one exam; gradients are added up.

        Args:
            volume: as `exams.volume` returns it.
            target, weight: float32 (1, tasks).

        Returns:
            logits and weighted losses (1, tasks).
        """
        exam, planes = exams.prepare(volume, self.device, view), None
        with autocast(self.device, self.precision):
            if self.plane_weight:
                logit = self.model.all_logits(exam)  # (1 + planes, tasks)
                logit, planes = logit[:1], logit[1:]
            else:
                logit = self.model(exam)  # (1, tasks)
        del exam  # backward, where memory peaks, does not need it
        losses = weighted_losses(logit, target, weight)
        loss = losses.mean()
        if planes is not None:
            each = weighted_losses(planes, target.expand_as(planes), weight.expand_as(planes))
            loss = loss + self.plane_weight * each.mean()
        (loss / exams_in_step if exams_in_step > 1 else loss).backward()
        return logit.detach(), losses.detach()

    def update(self):
        """Step the optimizer by the gradients that were added up, and start them anew."""
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.FREES_GRADIENTS)


def weighted_losses(logits, targets, weights):
    """Class-weighted binary cross-entropy, element by element."""
    return F.binary_cross_entropy_with_logits(logits, targets, weights, reduction="none")


def train_epoch(step, exams, what="train", stop_requested=(), accumulate=1):
    """One pass over all exams in random order.

    Random numbers come from torch's default generator: seed it before each epoch and the epoch is
    the same wherever training was resumed.

    Args:
        step: TrainingStep.
        exams: MRDataset.
        what: title of the progress bar.
        stop_requested: list that is filled from outside to stop after the current step.
        accumulate: exams in a step; the last step has what is left.

    Returns:
        order int (n,), and logits and weighted losses float32 (n, tasks), in the order of the
        steps; only those of the first steps if a stop was requested.
    """
    step.model.train()
    n, device = len(exams), step.device
    order = torch.randperm(n).tolist()
    views = exams.draw(order, device)
    targets = torch.from_numpy(exams.targets[order]).to(device)
    weights = torch.from_numpy(exams.weights[order]).to(device)
    logits, losses = torch.empty_like(targets), torch.empty_like(targets)
    end = 0
    for k in progress(range(0, n, accumulate), what):
        end = min(k + accumulate, n)
        group = slice(k, end)
        logits[group], losses[group] = step(
            exams, order[group], views[group], targets[group], weights[group]
        )
        if stop_requested:
            break
    return np.array(order), logits[:end].cpu().numpy(), losses[:end].cpu().numpy()


@torch.inference_mode()
def predict(model, exams, device, precision, what="predict"):
    """Logits of all exams, whole and as they are, in their order: float32 (n, tasks)."""
    model.eval()
    logits = torch.zeros(exams.labels.shape, device=device)
    for i in progress(range(len(exams)), what):
        with autocast(device, precision):
            logits[i] = model(exams.exam(i, device))[0]
    return logits.cpu().numpy()


@torch.inference_mode()
def exam_features(model, exams, device, precision, what="predict"):
    """What the classifier of a network is given of each exam: list of float32 (1, channels)."""
    model.eval()
    found = []
    for i in progress(range(len(exams)), what):
        with autocast(device, precision):
            found.append(model.exam_features(exams.exam(i, device)))
    return found


def exam_losses(targets, weights, logits):
    """`weighted_losses` of arrays: three float32 (n, tasks) -> float32 (n, tasks)."""
    return weighted_losses(*(torch.from_numpy(x) for x in (logits, targets, weights))).numpy()
