"""Sparse collectives over experts as atoms: SparseAllGather and SparseReduceScatter (Hecate, arXiv 2502.02581).

Every expert has a home rank. SparseAllGather brings the tensors of an expert from its home to all ranks that want it,
and SparseReduceScatter brings their sum from the ranks that have it to its home; each is the other's backward. What
stays on its rank is not sent, and every copy is sent once: no way that goes straight from home moves fewer bytes.

Rows of a tensor are experts, ascending. Several tensors, of several layers with homes and wishes of their own, go in
one exchange: an all-to-all with split sizes, which gloo and NCCL both have. All ranks of the group must call, and give
the same homes and wishes. Sums run in order of rank, so they are the same in every run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.collectives import Group


class Atoms(NamedTuple):
    """x: the rows of a layer's experts that this rank has, ascending; with those of all ranks there are E.

    homes: of each expert its home rank. wanted: of each expert the ranks that hold it, or shall; home may be missing.
    """

    x: Tensor
    homes: tuple[int, ...]
    wanted: tuple[tuple[int, ...], ...]


class PendingAtoms:
    """Exchanged atoms under way. ``wait`` must be called once, on every rank."""

    def __init__(self, wait: Callable[[], tuple[Tensor, ...]]) -> None:
        self._wait = wait

    def wait(self) -> tuple[Tensor, ...]:
        """The result, one tensor for each that was given, with gradient."""
        return self._wait()


def start_sparse_all_gather(atoms: Sequence[Atoms], group: Group) -> PendingAtoms:
    """``sparse_all_gather``, under way."""
    routes = [_route(a, group) for a in atoms]
    _check(atoms, [route.n_home for route in routes])
    exchange = _Exchange(routes, [a.x.shape[1:] for a in atoms], group)
    return _start([a.x for a in atoms], exchange, exchange.gather, exchange.reduce)


def sparse_all_gather(atoms: Sequence[Atoms], group: Group) -> tuple[Tensor, ...]:
    """Of each of ``atoms`` the rows of the experts that this rank is to hold, from the rows of those at home here.

    Backward is ``sparse_reduce_scatter``. Raises ValueError when rows do not fit the homes, or dtypes differ.
    """
    return start_sparse_all_gather(atoms, group).wait()


def start_sparse_reduce_scatter(atoms: Sequence[Atoms], group: Group) -> PendingAtoms:
    """``sparse_reduce_scatter``, under way."""
    routes = [_route(a, group) for a in atoms]
    _check(atoms, [route.n_held for route in routes])
    exchange = _Exchange(routes, [a.x.shape[1:] for a in atoms], group)
    return _start([a.x for a in atoms], exchange, exchange.reduce, exchange.gather)


def sparse_reduce_scatter(atoms: Sequence[Atoms], group: Group) -> tuple[Tensor, ...]:
    """Of each of ``atoms`` the rows of the experts at home here, summed over the ranks that hold them; zero where none
    does.

    Backward is ``sparse_all_gather``. Raises ValueError when rows do not fit what is held, or dtypes differ.
    """
    return start_sparse_reduce_scatter(atoms, group).wait()


@dataclass(frozen=True)
class _Route:
    """One rank's part of an exchange. Rows of the experts at home here, and of those held here, are each numbered from
    0. out: for each rank the home rows that it gets. back: for each rank the held rows that come from it. kept: the
    (home rows, held rows) that stay."""

    n_home: int
    n_held: int
    out: list[list[int]]
    back: list[list[int]]
    kept: tuple[list[int], list[int]]


def _route(atoms: Atoms, group: Group) -> _Route:
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    return _route_of(tuple(atoms.homes), tuple(atoms.wanted), rank, size)


@functools.lru_cache(maxsize=1024)
def _route_of(homes: tuple[int, ...], wanted: tuple[tuple[int, ...], ...], rank: int, size: int) -> _Route:
    out: list[list[int]] = [[] for _ in range(size)]
    back: list[list[int]] = [[] for _ in range(size)]
    kept: tuple[list[int], list[int]] = ([], [])
    n_home = n_held = 0
    for home, ranks in zip(homes, wanted, strict=True):
        if home == rank:
            for to in ranks:
                if to != rank:
                    out[to].append(n_home)
        if rank in ranks:
            if home == rank:
                kept[0].append(n_home)
                kept[1].append(n_held)
            else:
                back[home].append(n_held)
            n_held += 1
        n_home += home == rank
    return _Route(n_home, n_held, out, back, kept)


def _check(atoms: Sequence[Atoms], rows: list[int]) -> None:
    for i, (a, n) in enumerate(zip(atoms, rows, strict=True)):
        if len(a.x) != n:
            raise ValueError(f"tensor {i} has {len(a.x)} rows, but this rank has {n} of its experts")
        if a.x.dtype != atoms[0].x.dtype:
            raise ValueError(f"one exchange moves one dtype, but tensor {i} is {a.x.dtype} and 0 {atoms[0].x.dtype}")


# Brings the tensors once they have arrived.
_Landing = Callable[[], tuple[Tensor, ...]]


class _Exchange:
    """Both directions of one exchange, without gradients. landing: of the one under way."""

    def __init__(self, routes: list[_Route], shapes: list[torch.Size], group: Group) -> None:
        self.routes, self.shapes, self.group = routes, shapes, group
        self.landing: _Landing | None = None

    def land(self) -> tuple[Tensor, ...]:
        landing, self.landing = self.landing, None
        assert landing is not None
        return landing()

    def gather(self, xs: Sequence[Tensor]) -> _Landing:
        received = self._send(xs, [r.out for r in self.routes], [r.back for r in self.routes])

        def landing() -> tuple[Tensor, ...]:
            parts = received()
            held = [x.new_empty(r.n_held, *x.shape[1:]) for x, r in zip(xs, self.routes, strict=True)]
            for i, (x, r) in enumerate(zip(xs, self.routes, strict=True)):
                _put(held[i], r.kept[1], _take(x, r.kept[0]))
                for rows, part in zip(r.back, parts[i], strict=True):
                    _put(held[i], rows, part)
            return tuple(held)

        return landing

    def reduce(self, xs: Sequence[Tensor]) -> _Landing:
        received = self._send(xs, [r.back for r in self.routes], [r.out for r in self.routes])
        rank = 0 if self.group is None else self.group.rank()

        def landing() -> tuple[Tensor, ...]:
            parts = received()
            home = [x.new_zeros(r.n_home, *x.shape[1:]) for x, r in zip(xs, self.routes, strict=True)]
            for i, (x, r) in enumerate(zip(xs, self.routes, strict=True)):
                for source, (rows, part) in enumerate(zip(r.out, parts[i], strict=True)):
                    if source == rank:
                        rows, part = r.kept[0], _take(x, r.kept[1])
                    if rows:
                        home[i].index_add_(0, _index(tuple(rows), x.device), part)
            return tuple(home)

        return landing

    def _send(
        self, xs: Sequence[Tensor], out: list[list[list[int]]], back: list[list[list[int]]]
    ) -> Callable[[], list[list[Tensor]]]:
        """Send ``out[i][r]``, rows of xs[i], to each rank r; later [i][r]: what came, as ``back[i][r]`` says."""
        n = 1 if self.group is None else self.group.size()
        numel = [shape.numel() for shape in self.shapes]
        in_splits = [sum(len(o[r]) * k for o, k in zip(out, numel, strict=True)) for r in range(n)]
        out_splits = [sum(len(b[r]) * k for b, k in zip(back, numel, strict=True)) for r in range(n)]
        pieces = [_take(x, o[r]).reshape(-1) for r in range(n) for x, o in zip(xs, out, strict=True) if o[r]]
        sent = torch.cat(pieces) if pieces else xs[0].new_empty(0)
        got, work = sent.new_empty(sum(out_splits)), None
        if n > 1:
            work = dist.all_to_all_single(got, sent, out_splits, in_splits, group=self.group, async_op=True)

        def received() -> list[list[Tensor]]:
            nonlocal sent
            if work is not None:
                work.wait()
            del sent  # it must live until here
            sizes = [len(b[r]) * k for r in range(n) for b, k in zip(back, numel, strict=True)]
            flat = got.split(sizes)
            count = len(xs)
            return [
                [flat[r * count + i].view(-1, *shape) if back[i][r] else got.new_empty(0, *shape) for r in range(n)]
                for i, shape in enumerate(self.shapes)
            ]

        return received


def _start(xs: list[Tensor], exchange: _Exchange, there: Any, back: Any) -> PendingAtoms:
    token = _Start.apply(exchange, there, *xs)
    return PendingAtoms(lambda: _Wait.apply(token, exchange, back))


class _Start(torch.autograd.Function):
    """As in ``comm.pending``: its output is an empty tensor that ties the nodes together."""

    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, there: Any, *xs: Tensor) -> Tensor:
        ctx.exchange = exchange
        exchange.landing = there(xs)
        return xs[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, *ctx.exchange.land()


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, exchange: _Exchange, back: Any) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.back = exchange, back
        return exchange.land()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.exchange.landing = ctx.back(grads)
        return grads[0].new_empty(0), None, None


@functools.lru_cache(maxsize=4096)  # a copy to a GPU waits for it, and a layer would do so many times
def _index(rows: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(rows, device=device)


def _take(x: Tensor, rows: list[int]) -> Tensor:
    return x[:0] if not rows else x.index_select(0, _index(tuple(rows), x.device))


def _put(x: Tensor, rows: list[int], part: Tensor) -> None:
    if rows:
        x.index_copy_(0, _index(tuple(rows), x.device), part)
