"""MoTE (arXiv 2506.14435): the dense layer stays as a shared expert, beside experts with ternary weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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
    dense_layer,
    ffn_names,
    one_parent,
    scaled,
    with_experts,
)
from moetrain.upcycle.routers import CopyOptions, new_router

FROZEN = "train.freeze=[layers.*.moe.shared.*]"


@dataclass(config=STRICT)
class MoteOptions(CopyOptions):
    """MoTE: ternary experts beside the dense layer, which stays as a shared expert."""

    num_experts: Positive = Field(default=4, description="ternary experts of a layer")
    top_k: Positive = Field(default=1, description="ternary experts per token")
    scale: float = Field(default=1.0, ge=0, description="factor on a ternary expert's output; 0: the dense function")


@UPCYCLERS.register("mote", MoteOptions)
def mote(options: MoteOptions, parents: Sequence[Model], context: Context) -> Upcycled:
    """One dense model -> its MLPs as shared experts, and copies of them that compute with ternary weights.

    Routing weights are a softmax over all experts, not divided by the sum of the chosen: for one expert per token that
    would be 1, and the router would learn nothing. The factor goes into the down projections, whose ternary scale it
    is; from 0 they still learn, for what they get gradients from is not 0.
    """
    parent = one_parent(parents, "mote")
    check_dense(parent, "mote")
    o, inner = options, parent.cfg.dense_dim
    cfg = with_experts(parent.cfg, o.num_experts, o.top_k, inner, layers=o.layers, renormalize=False)
    cfg = replace(cfg, moe=replace(cfg.moe, shared_dim=inner, ternary=True))

    def expert(layer: int, e: int, part: int) -> Tensor:
        copy = dense_layer(parent, layer, part)
        return scaled(copy, o.scale) if part else copy

    model = assemble(
        parent,
        cfg,
        router=lambda layer: new_router(o, o.num_experts, parent, layer, context),
        expert=expert,
        shared=lambda layer, part: parent.read(ffn_names(parent, layer)[part]),
    )
    note = "the dense function" + ("" if o.scale == 0 else " and what the ternary experts add to it")
    return Upcycled(model, o.scale == 0, note, settings=FROZEN)
