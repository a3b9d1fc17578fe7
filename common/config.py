"""The arguments of train.py that change its result; the defaults are the article's recipe."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """One training's arguments; a resumed training must agree on all of them.

    Values are the article's ("How to train an MRI classifier with PyTorch") unless a comment names
    another source.
    """

    task: str
    plane: str
    intensity: str = "standardized"  # Stanford's released loader; the article's is "raw"
    augment: bool = True
    epochs: int = 50  # at most
    lr: float = 1e-5
    weight_decay: float = 0.1  # L2 inside Adam
    lr_scheduler: str = "plateau"
    patience: int = 5  # epochs without a better loss before training stops
    dropout: float = 0.0  # the article's text mentions one, its code has none
    class_weights: bool = True
    pretrained: bool = True
    seed: int = 0
    protocol: str = "article"
    folds: int = 1
    repeat: int = 1  # seeds
    precision: str = "fp32"  # or "bf16"
    device: str = "cpu"  # or "cuda"
    cuda_graphs: bool = False
