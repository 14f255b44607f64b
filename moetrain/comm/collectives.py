"""Collectives whose ranks hold different numbers of rows, with autograd. The group is always an argument.

All-to-all with split sizes is the one uneven collective that every backend has, so the others are written with it.
Zero rows are legal anywhere; every rank of the group must call, also one that holds none. Backward is the transposed
collective, so it must be reached on every rank of the group too. The output of integers carries no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_to_all(x: Tensor, out_splits: list[int], in_splits: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send ``in_splits[r]`` consecutive rows of x to each rank r and receive ``out_splits[r]`` rows from it.

    x (sum(in_splits), ...) -> (sum(out_splits), ...), in order of source rank. Backward sends the rows back.
    Raises ValueError when the splits do not add up to the rows of x.
    """
    if len(x) != sum(in_splits):
        raise ValueError(f"all_to_all got {len(x)} rows to send but splits for {sum(in_splits)}")
    return x if group.size() == 1 else _AllToAll.apply(x, out_splits, in_splits, group)


def all_gather_v(x: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """The rows of every rank, in rank order, on every rank: x (sizes[own rank], ...) -> (sum(sizes), ...).

    Backward is ``reduce_scatter_v``. Raises ValueError when x does not have ``sizes[own rank]`` rows.
    """
    n, own = group.size(), [sizes[group.rank()]]
    copies = x.unsqueeze(0).expand(n, *x.shape).flatten(0, 1)
    return all_to_all(copies, sizes, own * n, group)


def reduce_scatter_v(x: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """Sum x over the ranks and keep this rank's rows: x (sum(sizes), ...) -> (sizes[own rank], ...).

    The sum runs in rank order, so it is the same in every run. Backward is ``all_gather_v``. Raises ValueError when x
    does not have ``sum(sizes)`` rows.
    """
    n, own = group.size(), sizes[group.rank()]
    parts = all_to_all(x, [own] * n, sizes, group)
    return parts.unflatten(0, (n, own)).sum(0)


def all_gather_ints(values: list[int], group: dist.ProcessGroup, device: torch.device) -> list[list[int]]:
    """The integers of every rank, in rank order. Each rank gives equally many. Waits for the device."""
    own = torch.tensor(values, device=device)
    everyone = own.new_empty(group.size() * len(values))
    dist.all_gather_into_tensor(everyone, own, group=group)
    return everyone.view(group.size(), -1).tolist()


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, out_splits: list[int], in_splits: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.back = (in_splits, out_splits, group)
        return _exchange(x, out_splits, in_splits, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grads[0], *ctx.back), None, None, None


def _exchange(x: Tensor, out_splits: list[int], in_splits: list[int], group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(sum(out_splits), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), out_splits, in_splits, group=group)
    return out
