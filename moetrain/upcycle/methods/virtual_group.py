"""Virtual-group initialisation (arXiv 2410.07524): fine-grained experts, slices of copies of the dense layer.

Dynamic-DINO's decomposition with its router initialisation (arXiv 2507.17436) is the same start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from moetrain.config.errors import ConfigError
from moetrain.config.fields import STRICT, Positive
from moetrain.config.registry import UPCYCLERS
from moetrain.upcycle.method import (
    Context,
    Model,
    Upcycled,
    assemble,
    check_dense,
    check_divides,
    check_top_k,
    dense_layer,
    one_parent,
    scaled,
    with_experts,
)
from moetrain.upcycle.routers import RouterStart, new_router

# An MLP with one of these is exactly c^3 times itself when each of its matrices is c times itself.
HOMOGENEOUS = ("reglu", "relu2")


@dataclass(config=STRICT)
class VirtualGroupOptions(RouterStart):
    """Virtual groups: copies of a dense layer, each cut into fine experts that a token gets together."""

    num_experts: Positive = Field(default=32, description="experts of a layer: copies x granularity")
    granularity: Positive = Field(default=4, description="experts that a copy is cut into; divides the dense width")
    top_k: Positive = Field(default=8, description="experts per token; best a multiple of granularity")
    layers: list[int] | None = Field(default=None, description="layers that get experts, as [1,3]; null: all")
    order: Literal["topk_then_softmax", "softmax_then_topk"] = Field(
        default="topk_then_softmax",
        description="routing weights: softmax over the chosen experts, or over all of them (the paper's choice)",
    )
    scale: float | None = Field(
        default=None, gt=0, description="factor on an expert's output; null: what makes up for the small weights"
    )
    scale_in: Literal["down", "all"] = Field(
        default="down",
        description="where the factor goes: the down projection, or its cube root in each matrix (the paper's; of two "
        "matrices with activation gelu the square root)",
    )


@UPCYCLERS.register("virtual_group", VirtualGroupOptions)
def virtual_group(options: VirtualGroupOptions, parents: Sequence[Model], context: Context) -> Upcycled:
    """One dense model -> copies * G experts, of which number e is slice e mod G of the dense layer.

    The G slices of a copy have the same router row, so a token gets them together and they add up to the dense layer.
    Routing weights of top_k experts are about 1/top_k (softmax over the chosen) or 1/num_experts (over all); the
    factor s = G or copies * G^2 / top_k makes the sum of slices as large as the dense output was.
    """
    parent = one_parent(parents, "virtual_group")
    check_dense(parent, "virtual_group")
    E, G, K, inner = options.num_experts, options.granularity, options.top_k, parent.cfg.dense_dim
    check_top_k(E, K)
    check_divides("granularity", G, inner, f"the dense width {inner} of {parent.where}")
    check_divides("granularity", G, E, f"num_experts={E}")
    if options.router == "zero" and E > G:
        raise ConfigError("method=virtual_group needs router=random: rows of zeros do not tell the groups apart")
    chosen_first = options.order == "topk_then_softmax"
    cfg = with_experts(parent.cfg, E, K, inner // G, layers=options.layers, renormalize=chosen_first)
    formula = G if chosen_first else E * G / K
    scale = formula if options.scale is None else options.scale
    activation = parent.cfg.activation
    # gated activations and squared ReLU grow with the square of their matrices, GELU with the first power
    factors = (1.0, scale) if options.scale_in == "down" else (scale ** (1 / 2 if activation == "gelu" else 1 / 3),) * 2

    def router(layer: int) -> Tensor:
        return new_router(options, E // G, parent, layer, context).repeat_interleave(G, 0)

    def expert(layer: int, e: int, part: int) -> Tensor:
        return scaled(dense_layer(parent, layer, part).chunk(G, 1)[e % G], factors[part])

    whole_groups = K % G == 0 and (chosen_first or K == E or E == G)
    outside = options.scale_in == "down" or scale == 1 or activation in HOMOGENEOUS
    exact = whole_groups and options.scale is None and outside
    return Upcycled(assemble(parent, cfg, router, expert), exact, _note(options, exact, outside))


def _note(options: VirtualGroupOptions, exact: bool, outside: bool) -> str:
    if exact:
        return "the dense function"
    if options.top_k % options.granularity:
        return "only part of the dense function: top_k is no multiple of granularity, so groups are cut"
    if not outside:
        return "near the dense function: factors inside the activation are not the same as outside"
    if options.scale is not None:
        return "the dense function but for the size of what its MLPs add, as scale= has it"
    return "the dense function but for the routing weights, which are right on average"
