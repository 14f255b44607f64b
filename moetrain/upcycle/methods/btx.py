"""Branch-Train-MiX (arXiv 2403.07816): dense models of several domains become the experts of one."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from pydantic.dataclasses import dataclass

from moetrain.config.fields import STRICT, Positive
from moetrain.config.registry import UPCYCLERS
from moetrain.upcycle.method import (
    Context,
    Model,
    Upcycled,
    assemble,
    averaged,
    check_dense,
    check_same,
    dense_layer,
    several_parents,
    with_experts,
)
from moetrain.upcycle.routers import RouterStart, new_router


@dataclass(config=STRICT)
class BtxOptions(RouterStart):
    """Branch-Train-MiX: an expert of each dense parent, everything else averaged."""

    top_k: Positive = Field(default=2, description="experts per token")
    layers: list[int] | None = Field(default=None, description="layers that get experts, as [1,3]; null: all")


@UPCYCLERS.register("btx", BtxOptions)
def btx(options: BtxOptions, parents: Sequence[Model], context: Context) -> Upcycled:
    """N dense models that were trained on from one -> expert e is the MLP of parent e; all other tensors are means.

    The parents must be branches of one model: means of models that never met mean nothing.
    """
    several_parents(parents, "btx")
    for parent in parents:
        check_dense(parent, "btx")
    check_same(parents)
    N = len(parents)
    cfg = with_experts(parents[0].cfg, N, options.top_k, parents[0].cfg.dense_dim, layers=options.layers)

    model = assemble(
        averaged(parents),
        cfg,
        router=lambda layer: new_router(options, N, parents[0], layer, context),
        expert=lambda layer, e, part: dense_layer(parents[e], layer, part),
    )
    return Upcycled(model, False, "each parent's MLPs as experts, and the mean of all else: no parent's function")
