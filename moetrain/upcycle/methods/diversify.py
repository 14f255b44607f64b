"""EvoMoE's first phase (arXiv 2112.14397): one trained expert becomes many, each with other weights masked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from moetrain.config.fields import STRICT
from moetrain.config.registry import UPCYCLERS
from moetrain.upcycle.method import (
    Context,
    Model,
    Upcycled,
    assemble,
    check_dense,
    dense_layer,
    one_parent,
    with_experts,
)
from moetrain.upcycle.routers import CopyOptions, new_router


@dataclass(config=STRICT)
class DiversifyOptions(CopyOptions):
    """EvoMoE's diversify phase: copies of a dense layer, each with random weights set to zero."""

    mask: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.1, description="share of an expert's weights set to 0")


@UPCYCLERS.register("diversify", DiversifyOptions)
def diversify(options: DiversifyOptions, parents: Sequence[Model], context: Context) -> Upcycled:
    """One dense model (EvoMoE's single shared expert) -> copies of its MLPs, each with a random mask of its own."""
    parent = one_parent(parents, "diversify")
    check_dense(parent, "diversify")
    E = options.num_experts
    cfg = with_experts(parent.cfg, E, options.top_k, parent.cfg.dense_dim, layers=options.layers)

    def masked(layer: int, e: int, part: int) -> Tensor:
        dense = dense_layer(parent, layer, part)
        return dense * (torch.rand(dense.shape, generator=context.generator("mask", layer, e, part)) >= options.mask)

    model = assemble(
        parent,
        cfg,
        router=lambda layer: new_router(options, E, parent, layer, context),
        expert=masked,
    )
    exact = options.mask == 0
    return Upcycled(model, exact, "the dense function" if exact else f"{1 - options.mask:.0%} of the dense weights")
