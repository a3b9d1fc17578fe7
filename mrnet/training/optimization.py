"""The optimizer, the learning-rate schedule and the moving average of the weights.

Sources: the article (Adam, plateau and step schedules); Loshchilov and Hutter, "Decoupled weight
decay regularization", ICLR 2019 (AdamW), and "SGDR", ICLR 2017 (cosine); Smith and Topin,
"Super-convergence", 2018 (one-cycle); Polyak and Juditsky 1992 (averaged weights).
"""

import math

import torch
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mrnet.errors import InputError

PLATEAU_PATIENCE, PLATEAU_FACTOR, PLATEAU_THRESHOLD = 3, 0.3, 1e-4  # the article's
STEP_EPOCHS, STEP_FACTOR = 3, 0.5  # the article's
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
SCHEDULERS = ("plateau", "step", "cosine", "one-cycle", "none")
MAX_INITIAL_WEIGHT = 0.01  # share of the first weights left in the average
ONE_CYCLE_WARMUP = 0.3  # of all steps, where --warmup is 0; torch's and fastai's


def freeze_convolutions(model, n):
    """Leave a network's first n convolutions, and what lies between them, out of its training.

    Backward ends where the frozen part does. First layers are general, edges and blobs, whatever a
    network was trained on (Yosinski et al., NeurIPS 2014).

    Args:
        model: MRNet, or MultiPlaneMRNet with a backbone for each plane or one for all.

    Raises:
        InputError: the backbone has not so many.
    """
    for name, part in model.named_modules():
        if name.rpartition(".")[2] == "pretrained_model":
            freeze_backbone(part, n, model.backbone)


def freeze_backbone(features, n, name):
    """The same of a backbone's convolutional part, and its name in BACKBONES."""
    convolutions = [one for one in features.modules() if isinstance(one, torch.nn.Conv2d)]
    if n > len(convolutions):
        raise InputError(f"--freeze {n}: {name} has {len(convolutions)} convolutions")
    first_trained = convolutions[n] if n < len(convolutions) else None
    for module in features.modules():
        if module is first_trained:
            return
        if first_trained in module.modules():
            continue  # a block's own parameters, such as ConvNeXt's layer_scale, come after it
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)


def make_optimizer(model, config):
    """Adam or AdamW; classifiers (and attention) with a learning rate of their own if asked for.

    Raises:
        InputError: --freeze asks for more convolutions than the backbone has.
    """
    freeze_convolutions(model, config.freeze)
    rates = {"backbone": config.lr, "head": config.head_lr or config.lr}
    parameters = {"backbone": [], "head": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        within = config.head_lr > 0 and "pretrained_model" not in name
        parameters["head" if within else "backbone"].append(parameter)
    device = next(model.parameters()).device
    groups = [
        # A CUDA graph reads the learning rate from a tensor.
        {"params": found, "lr": torch.tensor(rates[part], device=device)
         if config.cuda_graphs else rates[part]}
        for part, found in parameters.items() if found
    ]  # fmt: skip
    return OPTIMIZERS[config.optimizer](
        groups,
        lr=groups[0]["lr"],
        weight_decay=config.weight_decay,
        fused=True,
        capturable=config.cuda_graphs,
    )


def make_scheduler(config, optimizer, steps):
    """A learning-rate schedule.

    Args:
        steps: of the optimizer in one epoch.

    Returns:
        torch's scheduler: plateau and step (the article's) are stepped once an epoch, the others
        after every step of the optimizer.
    """
    if config.lr_scheduler == "plateau":
        return lr_scheduler.ReduceLROnPlateau(
            optimizer, patience=PLATEAU_PATIENCE, factor=PLATEAU_FACTOR, threshold=PLATEAU_THRESHOLD
        )
    if config.lr_scheduler == "step":
        return lr_scheduler.StepLR(optimizer, step_size=STEP_EPOCHS, gamma=STEP_FACTOR)
    total = steps * config.epochs
    if config.lr_scheduler == "one-cycle":
        return lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            total_steps=total,
            pct_start=config.warmup or ONE_CYCLE_WARMUP,
        )
    warmup, is_cosine = round(config.warmup * total), config.lr_scheduler == "cosine"
    if not (warmup or is_cosine):
        return lr_scheduler.ConstantLR(optimizer, factor=1.0)

    def factor(step):
        if step < warmup:
            return (step + 1) / warmup
        if not is_cosine:
            return 1.0
        return (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2

    return lr_scheduler.LambdaLR(optimizer, factor)


def steps_with_optimizer(scheduler):
    """Whether a schedule is stepped after every step of the optimizer, not after every epoch."""
    return isinstance(scheduler, lr_scheduler.LambdaLR | lr_scheduler.OneCycleLR)


class Average(AveragedModel):
    """The moving average of a model's weights: torch's, whose own update waits for a GPU."""

    @torch.no_grad()
    def update_parameters(self, model):
        """After a step of the optimizer; the first is copied."""
        mine, theirs = list(self.module.parameters()), list(model.parameters())
        if self.n_averaged == 0:  # a tensor on the CPU
            torch._foreach_copy_(mine, theirs)
        else:
            self.multi_avg_fn(mine, theirs, self.n_averaged)
        for ours, running in zip(self.module.buffers(), model.buffers(), strict=True):
            ours.copy_(running)  # statistics of batch normalisation
        self.n_averaged += 1


def make_average(model, decay):
    """The Average of a model's weights, or None for a decay of 0."""
    return Average(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None


def average_advice(config, exams):
    """A line on a moving average that is too slow for its few steps, or "".

    After n steps decay ** n of the average are still the weights of the first one, with a
    classifier that has learnt nothing (docs/improvements.md, "Few exams").

    Args:
        config: Config.
        exams: int, to train on.
    """
    steps = -(-exams // config.accumulate) * config.epochs
    initial_weight = config.average_weights**steps
    if initial_weight < MAX_INITIAL_WEIGHT:
        return ""
    faster = next((decay for decay in (0.99, 0.9) if decay**steps < MAX_INITIAL_WEIGHT), 0)
    return (
        f"average    after {steps} steps {initial_weight:.0%} of the averaged weights are "
        f"still those of the first; --average-weights {faster} forgets them"
    )
