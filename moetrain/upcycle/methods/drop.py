"""Drop-Upcycling (arXiv 2502.19261): copies of the dense layer, in each of which some inner dimensions start anew."""

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
class DropOptions(CopyOptions):
    """Drop-Upcycling: copies of a dense layer, each partly re-initialised."""

    ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.5, description="share of an expert's inner dimensions that start anew"
    )


@UPCYCLERS.register("drop", DropOptions)
def drop(options: DropOptions, parents: Sequence[Model], context: Context) -> Upcycled:
    """One dense model -> copies of its MLPs; each expert has a random set of inner dimensions of its own, whose rows of
    gate and up and columns of down are drawn from a normal with the mean and the deviation of what they replace.

    One set holds for all matrices, as in the paper; the authors' released code draws three.
    """
    parent = one_parent(parents, "drop")
    check_dense(parent, "drop")
    E, inner = options.num_experts, parent.cfg.dense_dim
    cfg = with_experts(parent.cfg, E, options.top_k, inner, layers=options.layers)

    def expert(layer: int, e: int, part: int) -> Tensor:
        order = torch.randperm(inner, generator=context.generator("drop", layer, e))
        index = order[: round(options.ratio * inner)]
        mine = dense_layer(parent, layer, part).clone()
        matrices = {"down": mine.T} if part else dict(zip(("gate", "up")[-len(mine) :], mine, strict=True))
        for name, matrix in matrices.items():
            matrix[index] = _alike(matrix[index], context, layer, e, name)
        return mine

    model = assemble(parent, cfg, lambda layer: new_router(options, E, parent, layer, context), expert)
    exact = round(options.ratio * inner) == 0
    note = "the dense function" if exact else f"{1 - options.ratio:.0%} of the dense layer in each expert"
    return Upcycled(model, exact, note)


def _alike(replaced: Tensor, context: Context, *what: object) -> Tensor:
    """Normal numbers with the mean and the standard deviation of ``replaced``."""
    if replaced.numel() == 0:
        return replaced
    std, mean = torch.std_mean(replaced.to(torch.float64), correction=0)
    noise = torch.randn(replaced.shape, generator=context.generator("drop", *what))
    return (noise * std + mean).to(replaced.dtype)
