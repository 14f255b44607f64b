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

from moetrain.config.fields import STRICT, Positive
from moetrain.config.registry import UPCYCLERS
from moetrain.mixture.extra import need
from moetrain.upcycle.method import Context, Model, Upcycled, moe_names, one_parent
from moetrain.upcycle.resize import check_fewer, check_resizable, experts_of, resized, with_entries
from moetrain.upcycle.watch import usage

# The dimension of an expert's tensors that counts its neurons
NEURONS = {"w13": 1, "w2": 1, "b13": 1}


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
    check_fewer(parent, options.num_experts)
    if options.align:
        need("scipy.optimize", "upcycle")
    cfg = resized(parent.cfg, options.num_experts, options.top_k)
    context.ids()  # lack of text is to be said now
    used = cache(lambda: usage(parent, context, options.alike))

    @cache
    def groups(layer: int) -> list[list[int]]:
        return _groups(used()[layer].counts_E, used()[layer].alike_EE, options.num_experts)

    @cache
    def order(layer: int) -> dict[int, Tensor]:
        return _aligned(groups(layer), parent, layer) if options.align else {}

    def entry(layer: int, name: str, group: int) -> Tensor:
        part, members = name.rpartition(".")[2], groups(layer)[group]
        entries = [parent.entry(name, e) for e in members]
        if part in NEURONS:
            entries = [
                t.index_select(NEURONS[part], order(layer)[e]) if e in order(layer) else t
                for e, t in zip(members, entries, strict=True)
            ]
        share = used()[layer].counts_E[members] + 1  # an expert that the text never used still is one
        rank = options.rank if part in ("w13", "w2") else None
        return _mean(torch.stack(entries).to(torch.float64), share, rank).to(entries[0].dtype)

    exact = options.num_experts == experts_of(parent.cfg) and options.top_k is None and options.rank is None
    note = "the parent's function" if exact else "the parent's function where merged experts are one function"
    return Upcycled(with_entries(parent, cfg, entry), exact, note)


def _groups(counts_E: Tensor, alike_EE: Tensor, number: int) -> list[list[int]]:
    """Members of each group, its core first; groups in the order of their cores' numbers."""
    cores = counts_E.argsort(descending=True, stable=True)[:number].sort().values
    nearest_E = alike_EE[:, cores].argmax(1)
    groups = [[int(core)] for core in cores]
    for e, nearest in enumerate(nearest_E.tolist()):
        if e not in cores:
            groups[nearest].append(e)
    return groups


def _aligned(groups: list[list[int]], parent: Model, layer: int) -> dict[int, Tensor]:
    """For each expert that is no core, the order (F,) of its neurons with the largest sum of products of weights with
    its core's."""
    assign = need("scipy.optimize", "upcycle").linear_sum_assignment
    order = {}
    for core, *others in groups:
        for e in others:
            fit = _neurons(parent, layer, core) @ _neurons(parent, layer, e).T
            order[e] = torch.from_numpy(assign(fit.numpy(), maximize=True)[1])
    return order


def _neurons(parent: Model, layer: int, e: int) -> Tensor:
    """All weights of each neuron of an expert, (F, (n + 1) D)."""
    _, w13, w2 = moe_names(layer)
    return torch.cat((*parent.entry(w13, e), parent.entry(w2, e).T), 1).to(torch.float64)


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
