"""AdamW (arXiv 1711.05101): torch's own, fused."""

from __future__ import annotations

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from moetrain.config.fields import STRICT
from moetrain.config.registry import OPTIMIZERS
from moetrain.optim.groups import decay_groups, trainable


@dataclass(config=STRICT)
class AdamWOptions:
    """Options of AdamW."""

    lr: float = Field(default=1e-3, gt=0, description="peak learning rate")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the gradient's running mean")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="decay of the squared gradient's running mean")
    eps: float = Field(default=1e-8, ge=0, description="added to the root of the squared gradient's mean")
    weight_decay: float = Field(default=0.1, ge=0, description="decay of matrices per step, times the learning rate")
    decay_embedding: bool = Field(default=True, description="whether the embedding decays too")


def fused(model: nn.Module) -> bool:
    """Whether torch's fused kernels can update every parameter of ``model``: they exist for CPU and CUDA."""
    return all(p.device.type in ("cpu", "cuda") for p in model.parameters())


@OPTIMIZERS.register("adamw", AdamWOptions)
def build_adamw(options: AdamWOptions, model: nn.Module) -> torch.optim.AdamW:
    """AdamW over ``model``'s trainable parameters, plain or DTensors of any mix of meshes."""
    groups = decay_groups(trainable(model), options.weight_decay, options.decay_embedding)
    betas = (options.beta1, options.beta2)
    return torch.optim.AdamW(groups, lr=options.lr, betas=betas, eps=options.eps, fused=fused(model))
