"""Process groups of a world that is not there: one process stands for one rank, and every collective is only counted.

Tensors are on the meta device, so there is nothing to move. Bytes are those that the rank sends, with the algorithms
that are optimal in bytes (rings): all-gather and reduce-scatter (n-1)/n of the whole tensor, all-reduce twice that,
all-to-all and send what goes to other ranks.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.parallel.mesh import ParallelDims

BACKEND = "moetrain_dry"


class Traffic:
    """Collectives of one rank. calls, sent: by kind, their number and the bytes that leave the rank."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()

    def add(self, kind: str, sent: float, calls: int = 1) -> None:
        """``calls`` collectives that send ``sent`` bytes between them."""
        self.calls[kind] += calls
        self.sent[kind] += round(sent)

    def merge(self, other: Traffic, times: int = 1) -> None:
        """Add ``other``, ``times`` over."""
        for kind, calls in other.calls.items():
            self.add(kind, other.sent[kind] * times, calls * times)


class DryGroup(dist.ProcessGroup):
    """A group that counts. What it "receives" on the meta device is as good as anything."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self.place, self.members = rank, size
        self.traffic = Traffic()

    def size(self) -> int:
        """Ranks."""
        return self.members

    def rank(self) -> int:
        """This rank's place."""
        return self.place

    def getBackendName(self) -> str:
        """The name that torch knows it by."""
        return BACKEND

    @property
    def pg_name(self) -> str:
        """The name that torch gave it."""
        return dist.distributed_c10d._world.pg_names[self]

    @property
    def group_name(self) -> str:  # type: ignore[override]
        """The name that torch gave it."""
        return self.pg_name

    def all_to_all_single(self, out: Tensor, x: Tensor, out_splits: Any, in_splits: Any, opts: Any = None) -> Any:
        """Rows in ``in_splits`` (equal parts: [])."""
        self.traffic.add("all_to_all", _leaving(x, in_splits, self.place, self.members))
        return _Done()

    def all_gather_single(self, out: Tensor, x: Tensor, opts: Any = None) -> Any:
        """x of every rank."""
        self.traffic.add("all_gather", (self.members - 1) * x.nbytes)
        return _Done()

    def reduce_scatter_single(self, out: Tensor, x: Tensor, opts: Any = None) -> Any:
        """x summed, a part for every rank."""
        self.traffic.add("reduce_scatter", (self.members - 1) * x.nbytes / self.members)
        return _Done()

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> Any:  # type: ignore[override]
        """Every tensor summed."""
        for x in tensors:
            self.traffic.add("all_reduce", 2 * (self.members - 1) * x.nbytes / self.members)
        return _Done()

    # Their names before torch 2.13.
    alltoall_base = all_to_all_single  # type: ignore[assignment]
    _allgather_base = all_gather_single  # type: ignore[assignment]
    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]


class MirrorGroup(DryGroup):
    """A group whose other ranks all send what this one sends, which exchanges (small CPU tensors) for real."""

    def all_to_all_single(self, out: Tensor, x: Tensor, out_splits: Any, in_splits: Any, opts: Any = None) -> Any:
        """This rank's share, from every rank."""
        super().all_to_all_single(out, x, out_splits, in_splits)
        pieces = x.split(list(in_splits)) if in_splits else x.chunk(self.members)
        out.copy_(torch.cat([pieces[self.place]] * self.members))
        return _Done()

    alltoall_base = all_to_all_single  # type: ignore[assignment]


class SeatedGroup(DryGroup):
    """One of ``size`` ranks that are threads of this process and really exchange (small CPU tensors)."""

    def __init__(self, rank: int, size: int, table: Table) -> None:
        super().__init__(rank, size)
        self.table = table

    def all_to_all_single(self, out: Tensor, x: Tensor, out_splits: Any, in_splits: Any, opts: Any = None) -> Any:
        """What every other rank has for this one."""
        super().all_to_all_single(out, x, out_splits, in_splits)
        pieces = x.split(list(in_splits)) if in_splits else x.chunk(self.members)
        out.copy_(torch.cat(self.table.trade(self.place, pieces)))
        return _Done()

    alltoall_base = all_to_all_single  # type: ignore[assignment]


class Table:
    """Where the threads of a seated group meet."""

    def __init__(self, size: int) -> None:
        self.pieces: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=300)  # seconds: who waits for a thread that failed, fails

    def trade(self, place: int, pieces: Any) -> list[Tensor]:
        """Give ``pieces[r]`` to each rank r; what each gave to ``place``."""
        self.pieces[place] = pieces
        self.barrier.wait()
        got = [theirs[place] for theirs in self.pieces]
        self.barrier.wait()
        return got


class _Done(dist.Work):
    """A collective that has ended."""

    def wait(self, *_: Any, **__: Any) -> bool:
        return True


def _leaving(x: Tensor, splits: Sequence[int], place: int, size: int) -> int:
    row = x.nbytes // max(len(x), 1)
    own = splits[place] if splits else len(x) // size
    return (len(x) - own) * row


class Meter:
    """The groups of ``dims`` by name, and what they send. One name may stand for groups of several meshes."""

    def __init__(self, dims: ParallelDims) -> None:
        named: list[tuple[str, Any]] = [
            ("data", dims.data_group),
            ("sequence", dims.sequence_group),
            ("stage", dims.stage_group),
            ("world", dist.group.WORLD),
        ]
        for mesh in (dims.dense, dims.weights, dims.experts):
            named += [(name, mesh[name].get_group()) for name in mesh.mesh_dim_names or ()]
        self.groups = named

    @contextmanager
    def measure(self) -> Iterator[dict[str, Traffic]]:
        """What is sent in the meantime, by name of the group."""
        found = {name: Traffic() for name, _ in self.groups}
        for name, group in self.groups:
            group.traffic = found[name]
        yield found
        for _, group in self.groups:
            group.traffic = Traffic()


@contextmanager
def dry_world(size: int) -> Iterator[None]:
    """A default process group in which this process is rank 0 of ``size``; no other process exists."""
    from torch.distributed.tensor import debug
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if BACKEND.upper() not in dist.Backend.backend_type_map and BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(
            BACKEND, lambda store, rank, size, timeout: DryGroup(rank, size), devices=["cpu", "cuda"]
        )
    dist.init_process_group(BACKEND, store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        # DTensor remembers meshes, which are equal to those of the next world of this size but for their groups.
        getattr(debug, "_clear_sharding_prop_cache", lambda: None)()
