"""How the router of a new MoE layer starts, and the options that methods with new routers share."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from moetrain.config.fields import STRICT, Positive
from moetrain.upcycle.method import Context, Model, keys_name


@dataclass(config=STRICT)
class RouterStart:
    """Options of all methods that make routers."""

    router: Literal["random", "zero"] = Field(
        default="random", description="how routers start: random rows, or zero ones, which prefer no expert"
    )
    router_std: float | None = Field(default=None, ge=0, description="router=random: its std; null: model.init_std")


@dataclass(config=STRICT)
class CopyOptions(RouterStart):
    """Options of methods whose experts are copies of a dense layer."""

    num_experts: Positive = Field(default=8, description="experts of a layer")
    top_k: Positive = Field(default=2, description="experts per token")
    layers: list[int] | None = Field(default=None, description="layers that get experts, as [1,3]; null: all")


def new_router(start: RouterStart, rows: int, parent: Model, layer: int, context: Context, part: str = "moe") -> Tensor:
    """Router rows (rows, D) of a layer's ``part``, moe or attention, in the dtype of ``parent``."""
    router = torch.zeros(rows, parent.cfg.dim)
    if start.router == "random":
        std = parent.cfg.init_std if start.router_std is None else start.router_std
        router.normal_(0, std, generator=context.generator(f"layers.{layer}.{part}.router.weight"))
    return router.to(parent.source.specs[keys_name(parent, layer)].dtype)


def scaled_rows(rows_ED: Tensor, std: float | None, parent: Model, layer: int) -> Tensor:
    """Router rows with the standard deviation ``std`` (None: ``parent``'s init_std), in the dtype of ``parent``: what
    they choose does not change, and the smaller they are, the more even are the weights of the chosen. Rows of zeros,
    which a fit to tokens that all get every expert gives, stay zeros."""
    std = parent.cfg.init_std if std is None else std
    return (rows_ED * (std / rows_ED.std().clamp_min(1e-30))).to(parent.source.specs[keys_name(parent, layer)].dtype)
