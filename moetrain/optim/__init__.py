"""Optimizers and learning-rate schedules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moetrain.config.registry import OPTIMIZERS
from moetrain.optim.schedule import lr_factor

__all__ = ["build_optimizer", "lr_factor"]


def build_optimizer(options: Any, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that ``options`` (an entry's options dataclass: ``cfg.optim``) describes, over the trainable
    parameters of ``model``, in the form that they have now: make the model parallel first.

    Every parameter group holds its peak learning rate in ``lr``; the trainer multiplies it by ``lr_factor`` each step.
    Raises ConfigError when the options belong to no optimizer, or the model has nothing to train.
    """
    optimizer: torch.optim.Optimizer = OPTIMIZERS.entry_of(options).build(options, model)
    return optimizer
