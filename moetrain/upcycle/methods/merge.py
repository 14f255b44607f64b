"""Merging experts: MC-SMoE (arXiv 2310.01334), by usage and with aligned neurons; Sub-MoE (arXiv 2506.23266), in the
subspace that a group shares."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from moetrain.config.errors import ConfigError
from moetrain.config.registry import UPCYCLERS
from moetrain.config.schema import STRICT, Positive
from moetrain.mixture.extra import need
from moetrain.upcycle.method import Context, Model, Upcycled, moe_names, one_parent
from moetrain.upcycle.resize import check_resizable, experts_of, resized, with_changed
from moetrain.upcycle.watch import usage

# The dimension of an expert's tensors that counts its neurons
NEURONS = {"experts.w13": 1, "experts.w2": 1, "experts.b13": 1}


@dataclass(config=STRICT)
class MergeOptions:
    """Merging: groups of experts become one each, a mean weighted by how often the text uses them."""

    num_experts: Positive = Field(default=4, description="experts of a layer that are left")
    top_k: Positive | None = Field(default=None, description="experts per token; null: as before")
    alike: Literal["logits", "outputs"] = Field(
        default="logits",
        description="experts group by cosine of router logits (MC-SMoE) or of outputs (Sub-MoE) on the text",
    )
    align: bool = Field(
        default=True, description="reorder the neurons of each expert to match those of its group's core first"
    )
    rank: Positive | None = Field(
        default=None,
        description="keep this many directions of a group's joint SVD, for each matrix (Sub-MoE); null: all",
    )


@UPCYCLERS.register("merge", MergeOptions)
def merge(options: MergeOptions, parents: Sequence[Model], context: Context) -> Upcycled:
    """A model with experts -> fewer. The most used of each layer are cores; every other expert joins the core that it
    is most like. A group becomes the mean of its members, weighted by usage; so do its router rows.

    Experts are the same function in any order of their neurons, so the order that agrees best with the core's
    (Hungarian method) comes before the mean. What is merged is exact only where members of a group are one function
    and a token does not choose two of them; the rest shows in the loss.
    """
    parent = one_parent(parents, "merge")
    check_resizable(parent, "merge")
    E = experts_of(parent.cfg)
    if options.num_experts > E:
        raise ConfigError(f"num_experts={options.num_experts}: {parent.where} has only {E}; grow it with method=grow")
    if options.align:
        need("scipy.optimize", "upcycle")
    cfg = resized(parent.cfg, options.num_experts, options.top_k)
    used = cache(lambda: usage(parent, context, options.alike))

    @cache
    def groups(layer: int) -> list[list[int]]:
        return _groups(used()[layer].counts_E, used()[layer].alike_EE, options.num_experts)

    @cache
    def order(layer: int) -> Tensor:
        _, w13, w2 = moe_names(layer)
        return _aligned(groups(layer), parent.tensors[w13], parent.tensors[w2])

    def change(layer: int, part: str, t: Tensor) -> Tensor:
        wide = t.to(torch.float64)
        if options.align and part in NEURONS:
            dim = NEURONS[part] + 1
            shape = [len(wide), *(-1 if i == dim else 1 for i in range(1, wide.dim()))]
            wide = wide.take_along_dim(order(layer).view(shape), dim)
        share_E = used()[layer].counts_E + 1  # an expert that the text never used still is one
        rank = options.rank if part in ("experts.w13", "experts.w2") else None
        merged = [_mean(wide[members], share_E[members], rank) for members in groups(layer)]
        return torch.stack(merged).to(t.dtype)

    exact = options.num_experts == E and options.top_k is None and options.rank is None
    note = "the parent's function" if exact else "the parent's function where merged experts are one function"
    return Upcycled(with_changed(parent, cfg, change), exact, note)


def _groups(counts_E: Tensor, alike_EE: Tensor, number: int) -> list[list[int]]:
    """Members of each group, its core first; groups in the order of their cores' numbers."""
    cores = counts_E.argsort(descending=True, stable=True)[:number].sort().values
    nearest_E = alike_EE[:, cores].argmax(1)
    groups = [[int(core)] for core in cores]
    for e, nearest in enumerate(nearest_E.tolist()):
        if e not in cores:
            groups[nearest].append(e)
    return groups


def _aligned(groups: list[list[int]], w13: Tensor, w2: Tensor) -> Tensor:
    """The order (E, F) of each expert's neurons that has the largest sum of products with its core's weights."""
    assign = need("scipy.optimize", "upcycle").linear_sum_assignment
    E, _, inner, _ = w13.shape
    order = torch.arange(inner).repeat(E, 1)
    for core, *others in groups:
        for e in others:
            fit = torch.einsum("pfd,pgd->fg", w13[core].double(), w13[e].double())
            fit += w2[core].double().T @ w2[e].double()
            order[e] = torch.from_numpy(assign(fit.numpy(), maximize=True)[1])
    return order


def _mean(members: Tensor, share: Tensor, rank: int | None) -> Tensor:
    """Mean of ``members`` (n, ...), weighted by ``share`` (n). rank: of matrices (n, ..., a, b), what of it lies in the
    best subspace of that many dimensions for the columns of all members: W_i = U S V_i, and V_i alone is averaged."""
    weight = share / share.sum()
    mean = torch.tensordot(weight.to(members.dtype), members, dims=1)
    if rank is None or rank >= mean.shape[-2]:
        return mean
    joint = members.movedim(0, -2).flatten(-2)  # (..., a, n b)
    U = torch.linalg.svd(joint, full_matrices=False).U[..., :rank]
    return U @ (U.mT @ mean)
