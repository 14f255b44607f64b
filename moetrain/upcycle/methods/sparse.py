"""Sparse upcycling (arXiv 2212.05055): every expert starts as a copy of the dense layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
class SparseOptions(CopyOptions):
    """Sparse upcycling: copies of a dense layer, optionally with noise."""

    noise: float = Field(default=0.0, ge=0, description="standard deviation of noise on the copies; 0: none")
    noise_share: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5, description="noise > 0: share of the weights that get it"
    )


@UPCYCLERS.register("sparse", SparseOptions)
def sparse(options: SparseOptions, parents: Sequence[Model], context: Context) -> Upcycled:
    """One dense model -> copies of its MLPs. The chosen experts' weights sum to 1, so any choice gives the dense
    function. Noise, a normal number on ``noise_share`` of the weights, tells the copies apart at the price of that."""
    parent = one_parent(parents, "sparse")
    check_dense(parent, "sparse")
    cfg = with_experts(parent.cfg, options.num_experts, options.top_k, parent.cfg.dense_dim, layers=options.layers)

    def copies(of: Model, start: SparseOptions) -> Model:
        return assemble(
            of,
            cfg,
            router=lambda layer: new_router(start, start.num_experts, of, layer, context),
            expert=lambda layer, e, part: _noisy(dense_layer(of, layer, part), start, context, layer, e, part),
        )

    exact = options.noise == 0
    note = "the dense function" if exact else "near the dense function: the copies have noise"
    plain = replace(options, router="zero", noise=0.0)
    return Upcycled(copies(parent, options), exact, note, moments=lambda of: copies(of, plain))


def _noisy(dense: Tensor, options: SparseOptions, context: Context, *what: object) -> Tensor:
    if options.noise == 0:
        return dense
    generator = context.generator("noise", *what)
    noise = torch.randn(dense.shape, generator=generator) * options.noise
    chosen = torch.rand(dense.shape, generator=generator) < options.noise_share
    return dense + (noise * chosen).to(dense.dtype)
