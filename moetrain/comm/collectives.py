"""Collectives whose ranks hold different numbers of rows, with autograd. The group is always an argument.

A group of None is this rank alone: nothing moves. All-to-all with split sizes is the one uneven collective that every
backend has, so the others are written with it. Zero rows are legal anywhere; every rank of the group must call, also
one that holds none. Backward is the transposed collective, so it must be reached on every rank of the group too. The
output of integers carries no gradient. ``start_...`` begins a collective and returns at once (``comm.pending``).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.pending import Flight, Pending, done, start

Group = dist.ProcessGroup | None


def start_all_to_all(x: Tensor, out_splits: list[int], in_splits: list[int], group: Group) -> Pending:
    """``all_to_all``, under way."""
    if len(x) != sum(in_splits):
        raise ValueError(f"all_to_all got {len(x)} rows to send but splits for {sum(in_splits)}")
    if group is None or group.size() == 1:
        return done(x)
    return start(x, lambda x: _send(x, out_splits, in_splits, group), lambda g: _send(g, in_splits, out_splits, group))


def all_to_all(x: Tensor, out_splits: list[int], in_splits: list[int], group: Group) -> Tensor:
    """Send ``in_splits[r]`` consecutive rows of x to each rank r and receive ``out_splits[r]`` rows from it.

    x (sum(in_splits), ...) -> (sum(out_splits), ...), in order of source rank. Backward sends the rows back.
    Raises ValueError when the splits do not add up to the rows of x.
    """
    return start_all_to_all(x, out_splits, in_splits, group).wait()


def all_gather_v(x: Tensor, sizes: list[int], group: Group) -> Tensor:
    """The rows of every rank, in rank order, on every rank: x (sizes[own rank], ...) -> (sum(sizes), ...).

    Backward is ``reduce_scatter_v``. Raises ValueError when x does not have ``sizes[own rank]`` rows.
    """
    if group is None:
        return all_to_all(x, sizes, sizes, group)
    n, own = group.size(), [sizes[group.rank()]]
    copies = x.unsqueeze(0).expand(n, *x.shape).flatten(0, 1)
    return all_to_all(copies, sizes, own * n, group)


def start_reduce_scatter_v(x: Tensor, sizes: list[int], group: Group) -> Pending:
    """``reduce_scatter_v``, under way."""
    if group is None:
        return start_all_to_all(x, sizes, sizes, group)
    n, own = group.size(), sizes[group.rank()]
    parts = start_all_to_all(x, [own] * n, sizes, group)
    return parts.then(lambda parts: parts.unflatten(0, (n, own)).sum(0))


def reduce_scatter_v(x: Tensor, sizes: list[int], group: Group) -> Tensor:
    """Sum x over the ranks and keep this rank's rows: x (sum(sizes), ...) -> (sizes[own rank], ...).

    The sum runs in rank order, so it is the same in every run. Backward is ``all_gather_v``. Raises ValueError when x
    does not have ``sum(sizes)`` rows.
    """
    return start_reduce_scatter_v(x, sizes, group).wait()


def all_gather_ints(values: list[int], group: Group, device: torch.device) -> list[list[int]]:
    """The integers of every rank, in rank order. Each rank gives equally many. Waits for the device."""
    if group is None:
        return [values]
    return all_gather_v(torch.tensor([values], device=device), [1] * group.size(), group).tolist()


def _send(x: Tensor, out_splits: list[int], in_splits: list[int], group: dist.ProcessGroup) -> Flight:
    out, x = x.new_empty(sum(out_splits), *x.shape[1:]), x.contiguous()
    work = dist.all_to_all_single(out, x, out_splits, in_splits, group=group, async_op=True)
    return Flight(out, work.wait, x)
