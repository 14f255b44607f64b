"""FlexMoRE (arXiv 2602.08818): experts that differ from a base by matrices of low rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from moetrain.config.fields import STRICT, Positive
from moetrain.config.registry import UPCYCLERS
from moetrain.upcycle.method import (
    Context,
    Model,
    Upcycled,
    assemble,
    check_dense,
    check_same,
    dense_layer,
    several_parents,
    with_experts,
)
from moetrain.upcycle.routers import RouterStart, new_router


@dataclass(config=STRICT)
class FlexmoreOptions(RouterStart):
    """FlexMoRE: a base and parents trained on from it, whose differences are cut to a low rank."""

    rank: Positive = Field(default=64, description="rank that is kept of each matrix's difference from the base")
    top_k: Positive = Field(default=2, description="experts per token")
    layers: list[int] | None = Field(default=None, description="layers that get experts, as [1,3]; null: all")


@UPCYCLERS.register("flexmore", FlexmoreOptions)
def flexmore(options: FlexmoreOptions, parents: Sequence[Model], context: Context) -> Upcycled:
    """A base (first in from=) and its branches -> expert 0 is the base's MLP, expert e the base's plus the best
    approximation of rank ``rank`` (SVD) of what parent e differs from it, for each matrix. All else is the
    base's, as in FlexOlmo (arXiv 2507.07024), where branches train nothing but their experts.

    The experts are written as whole matrices, for that is what model classes have; the rank is in their values.
    """
    several_parents(parents, "flexmore")
    for parent in parents:
        check_dense(parent, "flexmore")
    check_same(parents)
    base, N = parents[0], len(parents)
    cfg = with_experts(base.cfg, N, options.top_k, base.cfg.dense_dim, layers=options.layers)

    def expert(layer: int, e: int, part: int) -> Tensor:
        mine = dense_layer(base, layer, part)
        return mine if e == 0 else _near(mine, dense_layer(parents[e], layer, part), options.rank)

    model = assemble(
        base,
        cfg,
        router=lambda layer: new_router(options, N, base, layer, context),
        expert=expert,
    )
    return Upcycled(
        model, False, f"the base's function in expert 0, and differences of rank {options.rank} in the others"
    )


def _near(base: Tensor, other: Tensor, rank: int) -> Tensor:
    """``base`` plus the part of rank ``rank`` of ``other - base`` ((..., m, n))."""
    if rank >= min(base.shape[-2:]):
        return other
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    U, S, Vh = torch.linalg.svd(other.to(wide) - base.to(wide), full_matrices=False)
    difference = (U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]
    return (base.to(wide) + difference).to(base.dtype)
