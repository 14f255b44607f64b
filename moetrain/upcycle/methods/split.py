"""One dense layer cut into experts: at random (LLaMA-MoE, arXiv 2406.16554), by clusters of its keys (EMoE, arXiv
2310.10908), in order (FactorLLM, arXiv 2408.11855), or by what fires together (MoEfication, arXiv 2110.01786)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from moetrain.config.fields import STRICT, Positive
from moetrain.config.registry import UPCYCLERS
from moetrain.upcycle.cluster import balanced_clusters
from moetrain.upcycle.fit import Fits, Parts, check_text, fit_routers
from moetrain.upcycle.method import (
    Context,
    Model,
    Upcycled,
    assemble,
    check_dense,
    check_divides,
    check_top_k,
    dense_layer,
    keys_name,
    one_parent,
    scaled,
    with_experts,
)
from moetrain.upcycle.routers import RouterStart, new_router, scaled_rows
from moetrain.upcycle.watch import activity


@dataclass(config=STRICT)
class SplitOptions:
    """Splitting: the inner dimensions of a dense layer, dealt out to experts; the model does not grow."""

    num_experts: Positive = Field(default=8, description="experts of a layer; divides the dense width")
    top_k: Positive = Field(default=4, description="experts per token")
    layers: list[int] | None = Field(default=None, description="layers that get experts, as [1,3]; null: all")
    by: Literal["random", "order", "keys", "activity"] = Field(
        default="keys",
        description="who shares an expert: anyone, neighbours, similar keys, or what fires together on the text",
    )
    router: Literal["keys", "fit", "random", "zero"] = Field(
        default="keys",
        description="how routers start: mean key of an expert's dimensions (keys are rows of gate, or of up in a plain "
        "MLP), fitted on the text to what the dense layer does, random, or zero",
    )
    router_std: float | None = Field(
        default=None,
        ge=0,
        description="standard deviation of router weights; null: model.init_std; small: even weights",
    )
    scale: float | None = Field(
        default=None, gt=0, description="factor on an expert's output; null: top_k, so that each chosen counts once"
    )


@UPCYCLERS.register("split", SplitOptions)
def split(options: SplitOptions, parents: Sequence[Model], context: Context) -> Upcycled:
    """One dense model -> experts of width F / num_experts that are together the dense layer, each dimension in one.

    With all experts chosen and even weights they add up to the dense function; with fewer a part of it is missing.
    """
    parent = one_parent(parents, "split")
    check_dense(parent, "split")
    E, K, inner = options.num_experts, options.top_k, parent.cfg.dense_dim
    check_top_k(E, K)
    check_divides("num_experts", E, inner, f"the dense width {inner} of {parent.where}")
    cfg = with_experts(parent.cfg, E, K, inner // E, layers=options.layers)
    scale = K if options.scale is None else options.scale
    if options.by == "activity":
        context.ids()  # lack of text is to be said now
    if options.router == "fit":
        check_text(context)
    seen = cache(lambda: activity(parent, context))

    @cache
    def members(layer: int) -> Tensor:
        """Which dimensions each expert has, int64 (E, F/E)."""
        if options.by == "order":
            return torch.arange(inner).view(E, -1)
        generator = context.generator("split", layer)
        if options.by == "random":
            return torch.randperm(inner, generator=generator).view(E, -1).sort(1).values
        points = seen()[layer] if options.by == "activity" else parent.read(keys_name(parent, layer))
        return balanced_clusters(F.normalize(points.to(torch.float32)), E, generator)

    def parts(layer: int) -> Parts | None:
        nobody = torch.empty(0, dtype=torch.int64)
        return Parts(members(layer), nobody) if cfg.is_moe(layer) else None

    @cache
    def fits() -> Fits:
        return fit_routers(parent, context, parts, K)

    def router(layer: int) -> Tensor:
        if options.router == "fit":
            return scaled_rows(fits().rows[layer], options.router_std, parent, layer)
        if options.router != "keys":
            return new_router(RouterStart(options.router, options.router_std), E, parent, layer, context)
        rows = parent.read(keys_name(parent, layer)).to(torch.float64)[members(layer)].mean(1)
        return scaled_rows(rows, options.router_std, parent, layer)

    def expert(layer: int, e: int, part: int) -> Tensor:
        mine = dense_layer(parent, layer, part)[:, members(layer)[e]]
        return scaled(mine, scale) if part else mine

    exact = K == E and options.scale is None and (options.router == "zero" or options.router_std == 0)
    note = "the dense function" if exact else f"{K} of {E} parts of the dense layer, chosen for each token"
    figures = (lambda: fits().picked) if options.router == "fit" else dict
    return Upcycled(assemble(parent, cfg, router, expert), exact, note, figures=figures)
