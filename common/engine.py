"""One training step, one epoch, predictions: shared by training, stacking, predicting, timing."""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import expit

from common.cli import progress
from common.devices import autocast
from dataloader import Augmentation, preprocess


def training_step(model, optimizer, volume, label, weight, precision):
    """Forward, class-weighted binary cross-entropy, backward, update, for one exam.

    Args:
        volume: float32 (s, 1, H, W), preprocessed; label, weight: float32 (1,).

    Returns:
        logit (1,) and weighted loss (), on the device: nothing here waits for it.
    """
    optimizer.zero_grad(set_to_none=True)
    with autocast(volume.device, precision):
        logit = model(volume[None])[0]  # (s, 1, H, W) -> (1, s, 1, H, W) -> (1, 1) -> (1,)
    del volume  # backward, where memory peaks, does not need it
    loss = F.binary_cross_entropy_with_logits(logit, label, weight)
    loss.backward()
    optimizer.step()
    return logit.detach(), loss.detach()


class TrainingStep:
    """`training_step` for exams of a data set, augmented and preprocessed on `device`."""

    def __init__(self, model, optimizer, device, precision):
        self.model, self.optimizer = model, optimizer
        self.device, self.precision = device, precision

    def __call__(self, exams, i, pose, label, weight):
        """One step on exam i: logit (1,) and loss ().

        Args:
            exams: MRDataset.
            pose: float32 (4,) for its Augmentation; None leaves the draw to its transform.
            label, weight: float32 (1,), on the device.
        """
        return self.on_volume(exams, exams.volume(i), pose, label, weight)

    def on_volume(self, exams, volume, pose, label, weight):
        """The same on a volume uint8 (s, H, W) that is at hand."""
        transform = exams.transform if pose is None else partial(exams.transform, pose=pose)
        # The preprocessed volume gets no name here, so that training_step can free it.
        return training_step(
            self.model,
            self.optimizer,
            preprocess(volume.to(self.device, non_blocking=True), exams.intensity, transform),
            label,
            weight,
            self.precision,
        )


def random_states(device):
    """States of torch's generators, to resume within an epoch: the CPU's, and the device's own."""
    states = {"random": torch.get_rng_state()}
    if device.type == "cuda":  # dropout draws there
        states["device_random"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states, device):
    """Set torch's generators to what `random_states` returned."""
    torch.set_rng_state(states["random"])
    if "device_random" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["device_random"], device)


def train_epoch(step, exams, what="train", partial_epoch=None, stop_requested=()):
    """One pass over all exams in random order, one exam per step.

    Random numbers come from torch's default generator: seed it before each epoch and the epoch is
    the same wherever training was resumed.

    Args:
        step: TrainingStep, or GraphedSteps for volumes cached on a CUDA device.
        exams: MRDataset with an Augmentation, another transform or none; a graph can only hold the
            first and the last of these.
        what: title of the progress bar.
        partial_epoch: what an interrupted epoch left, to resume it: {"logits", "losses"}, float32
            (k,), and what `random_states` returned.
        stop_requested: filled from outside to stop after the current step.

    Returns:
        order int (n,), and logits and weighted losses float32 (n,), in the order of the steps; only
        those of the first steps if a stop was requested.
    """
    is_augmentation = isinstance(exams.transform, Augmentation)
    if not isinstance(step, TrainingStep) and not (exams.transform is None or is_augmentation):
        raise ValueError(f"a CUDA graph cannot hold a {type(exams.transform).__name__}")
    step.model.train()
    n, device = len(exams), step.device
    order = torch.randperm(n).tolist()
    poses = [None] * n
    if is_augmentation:  # all draws cross to the device at once
        poses = exams.transform.draw(n).to(device)
    labels = torch.from_numpy(exams.labels[order]).to(device)
    weights = torch.from_numpy(exams.weights[order]).to(device)
    logits, losses = torch.empty(n, device=device), torch.empty(n, device=device)
    begin = 0
    if partial_epoch is not None:
        begin = len(partial_epoch["logits"])
        logits[:begin], losses[:begin] = partial_epoch["logits"], partial_epoch["losses"]
        restore_random_states(partial_epoch, device)
    end = begin
    for end, i in enumerate(progress(order[begin:], what), start=begin + 1):
        k = end - 1
        logit, loss = step(exams, i, poses[k], labels[k : k + 1], weights[k : k + 1])
        logits[k : k + 1], losses[k] = logit, loss
        if stop_requested:
            break
    return np.array(order), logits[:end].cpu().numpy(), losses[:end].cpu().numpy()


@torch.inference_mode()
def predict(model, exams, device, precision, what="predict"):
    """Logits of all exams, in their order, without augmentation: float32 (n,)."""
    model.eval()
    logits = torch.empty(len(exams), device=device)
    for i in progress(range(len(exams)), what):
        with autocast(device, precision):
            logits[i] = model(exams.exam(i, None, device)[None])[0, 0]
    return logits.cpu().numpy()


@torch.inference_mode()
def predict_volume(networks, volume, device, precision):
    """Logits of one plane of one exam: list of float, one for each of its networks.

    Args:
        networks: list of (MRNet, intensity), as in `stacking.TaskModels`.
        volume: uint8 array (s, H, W).
    """
    logits, stored = [], torch.from_numpy(volume).to(device)
    for model, intensity in networks:
        with autocast(device, precision):
            logits.append(model(preprocess(stored, intensity)[None]).item())
    return logits


def exam_losses(labels, weights, logits):
    """Class-weighted binary cross-entropy of each exam: three float32 (n,) -> float32 (n,)."""
    logits, labels, weights = (torch.from_numpy(x) for x in (logits, labels, weights))
    return F.binary_cross_entropy_with_logits(logits, labels, weights, reduction="none").numpy()


def sigmoid(logits):
    """Probabilities of logits, float64."""
    return expit(np.asarray(logits, np.float64))
