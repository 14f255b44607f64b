"""Collectives whose ranks hold equally much, with autograd. The group is always an argument.

Backward is the transposed collective, so it must be reached on every rank of the group. Every rank's loss is a share of
the whole: the gradient of a value that several ranks use is the sum of theirs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed both and warns of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(x: Tensor, group: dist.ProcessGroup, dim: int = 0) -> Tensor:
    """Every rank's x, of one shape, joined along ``dim`` in rank order. Backward is ``reduce_scatter``."""
    return x if group.size() == 1 else _AllGather.apply(x, group, dim)


def all_gather_packed(xs: tuple[Tensor, ...], group: dist.ProcessGroup, dim: int = 0) -> tuple[Tensor, ...]:
    """``all_gather`` of several tensors of one dtype in one collective."""
    if len(xs) == 1 or group.size() == 1:
        return tuple(all_gather(x, group, dim) for x in xs)
    packed = all_gather(torch.cat([x.flatten() for x in xs]).unsqueeze(0), group)  # a row for every rank
    parts = packed.split([x.numel() for x in xs], dim=1)
    return tuple(_join(part.unflatten(1, x.shape), dim) for part, x in zip(parts, xs, strict=True))


def reduce_scatter(x: Tensor, group: dist.ProcessGroup, dim: int = 0) -> Tensor:
    """Sum x over the ranks; cut ``dim`` in as many equal stretches as there are ranks and keep this rank's.

    Backward is ``all_gather``. Raises ValueError when the size of ``dim`` does not divide.
    """
    if x.shape[dim] % group.size():
        raise ValueError(f"reduce_scatter cannot cut {x.shape[dim]} (dimension {dim}) in {group.size()} equal parts")
    return x if group.size() == 1 else _ReduceScatter.apply(x, group, dim)


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of x over the ranks, on every rank. Backward is the same sum of gradients."""
    return x if group.size() == 1 else _AllReduce.apply(x, group)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _gather(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _scatter(grads[0], ctx.group, ctx.dim), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _scatter(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grads[0], ctx.group, ctx.dim), None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum(grads[0], ctx.group), None


def _gather(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    parts = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    _all_gather(parts, x.contiguous(), group=group)
    return _join(parts.unflatten(0, (group.size(), -1)), dim)


def _scatter(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    parts = x.unflatten(dim, (group.size(), -1)).movedim(dim, 0).contiguous()
    own = x.new_empty(parts.shape[1:])
    _reduce_scatter(own, parts.flatten(0, 1), group=group)
    return own


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _join(parts: Tensor, dim: int) -> Tensor:
    """The tensors parts[0], parts[1], ... joined along ``dim``."""
    return parts.movedim(0, dim).flatten(dim, dim + 1)
