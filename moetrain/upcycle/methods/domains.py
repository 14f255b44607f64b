"""One dense layer cut by domains of text (Read-ME, arXiv 2410.19123): an expert is what its domain uses most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Annotated

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from moetrain.config.errors import ConfigError
from moetrain.config.fields import STRICT, Positive
from moetrain.config.registry import UPCYCLERS
from moetrain.upcycle.fit import Fits, Parts, check_text, fit_routers
from moetrain.upcycle.method import (
    Context,
    Model,
    Upcycled,
    assemble,
    check_dense,
    check_top_k,
    dense_layer,
    ffn_names,
    one_parent,
    with_experts,
)
from moetrain.upcycle.routers import scaled_rows
from moetrain.upcycle.watch import mean_activity

# Widths are multiples of it: kernels want rows of 16 bytes, and a shared width that can be split over a few ranks.
MULTIPLE = 8


@dataclass(config=STRICT)
class DomainsOptions:
    """Domains: an expert for each file of text=FILE,FILE,...; what all of them use is shared."""

    keep: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5, description="share of the inner dimensions that a domain keeps, those of the largest activation"
    )
    top_k: Positive = Field(default=1, description="experts per token")
    layers: list[int] | None = Field(default=None, description="layers that get experts, as [1,3]; null: all")
    router_std: float | None = Field(
        default=None, ge=0, description="standard deviation of the fitted router weights; null: model.init_std"
    )


@UPCYCLERS.register("domains", DomainsOptions)
def domains(options: DomainsOptions, parents: Sequence[Model], context: Context) -> Upcycled:
    """One dense model -> for each domain what it uses most of the dense layer, less what all domains use, which is a
    shared expert. A token of the first domain that gets its expert has the dense layer without what its domain hardly
    uses. How wide experts are follows from the text, so the parent is watched at once.

    Routers are fitted, as those of ``split``. (Read-ME has one small network that tells the expert of all layers from
    the tokens' ids; here each layer has a linear router of its own.)
    """
    parent = one_parent(parents, "domains")
    check_dense(parent, "domains")
    texts, inner = len(context.texts()), parent.cfg.dense_dim
    if texts < 2:
        raise ConfigError("method=domains takes a file for each domain, as text=FILE,FILE; two or more")
    check_text(context)
    check_top_k(texts, options.top_k)
    kept = max(2 * MULTIPLE, round(options.keep * inner / MULTIPLE) * MULTIPLE)
    if kept > inner:
        raise ConfigError(f"keep={options.keep}: a dense width of {inner} in {parent.where} is too narrow to be cut")
    cut = {layer: _cut(mean_TF, kept) for layer, mean_TF in mean_activity(parent, context).items()}
    cfg = with_experts(parent.cfg, texts, options.top_k, kept, layers=options.layers)
    cut = {layer: parts for layer, parts in cut.items() if layer in cfg.moe_layers()}

    def widths(of: str) -> list[int]:
        return [getattr(cut[i], of).shape[-1] if i in cut else 0 for i in range(cfg.n_layers)]

    cfg = replace(cfg, moe=replace(cfg.moe, expert_dim=widths("members_EF"), shared_dim=widths("shared_F")))

    @cache
    def fits() -> Fits:
        return fit_routers(parent, context, cut.get, options.top_k)

    model = assemble(
        parent,
        cfg,
        router=lambda layer: scaled_rows(fits().rows[layer], options.router_std, parent, layer),
        expert=lambda layer, e, part: dense_layer(parent, layer, part)[:, cut[layer].members_EF[e]],
        shared=lambda layer, part: _part(parent, layer, part, cut[layer].shared_F),
    )
    shared = sum(widths("shared_F")) / (len(cut) * inner)
    note = f"of the dense layer {100 * kept / inner:.0f}% for each token, {100 * shared:.0f}% for all"
    return Upcycled(model, False, note, figures=lambda: fits().picked)


def _cut(mean_TF: Tensor, kept: int) -> Parts:
    """Who has which dimension, by the mean magnitudes of each text.

    All domains keep as many, so all experts of a layer are equally wide. Of the dimensions that all keep, those that
    are used most are shared, as many as make a multiple of MULTIPLE; each expert has the few others.
    """
    order_TF = mean_TF.argsort(dim=1, descending=True, stable=True)[:, :kept]
    masks_TF = torch.zeros(mean_TF.shape, dtype=torch.bool).scatter_(1, order_TF, True)
    common = torch.nonzero(masks_TF.all(0)).flatten()
    n = min(len(common), kept - MULTIPLE) // MULTIPLE * MULTIPLE
    used = mean_TF.mean(0)[common].argsort(descending=True, stable=True)
    shared = common[used[:n]].sort().values
    masks_TF[:, shared] = False
    return Parts(torch.stack([torch.nonzero(mask).flatten() for mask in masks_TF]), shared)


def _part(parent: Model, layer: int, part: int, mine: Tensor) -> Tensor:
    """Dimensions ``mine`` of the dense layer's matrix number ``part`` of ``ffn_names``; the last, down, is (D, F)."""
    names = ffn_names(parent, layer)
    whole = parent.read(names[part])
    return whole[:, mine] if part == len(names) - 1 else whole[mine]
