"""The weights of a model that is split over ranks and stages, whole on rank 0, for an export and for comparisons."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain.checkpoint.weights import Spec
from moetrain.comm.ranks import Ranks
from moetrain.convert.source import InOrder
from moetrain.parallel.mesh import ParallelDims
from moetrain.train.engine import Engine

STRETCH = 2**28  # bytes of a weight that each rank of a stage holds at a time, for it to be gathered


def whole_weights(engine: Engine, dims: ParallelDims) -> InOrder:
    """``engine.weights()`` of all stages, gathered on the CPU of rank 0 one at a time; the other ranks take part, at
    rank 0's pace. Collective, and so is every step through what it gives."""
    pipeline = Ranks(dims.group("pp"))
    mine = engine.weights()
    stages = pipeline.gather({name: Spec.of(value) for name, value in mine.items()})
    keeps = Ranks(dims.stage_group).is_first

    def gathered() -> Iterator[tuple[str, Tensor]]:
        for stage, names in enumerate(stages):
            for name in names:
                # Nobody runs ahead: what then waits for rank 0, which may write for hours, would give up.
                dist.all_reduce(torch.zeros(()))
                whole = gather_whole(mine[name], keeps) if pipeline.rank == stage else None
                yield name, pipeline.bring(whole, stage) if keeps else torch.empty(0)

    return InOrder({name: spec for names in stages for name, spec in names.items()}, gathered())


@torch.no_grad()
def gather_whole(value: Tensor, keeps: bool) -> Tensor:
    """``value`` on the CPU where this rank ``keeps`` it; else nothing, but every rank of a DTensor's mesh takes part.

    Gathered in stretches along one dimension: a layer's experts whole are more than a GPU has room for.
    """
    if not isinstance(value, DTensor):
        return value.detach().cpu() if keeps else torch.empty(0)
    local, shape = value.to_local(), list(value.shape)
    parts = [prod(value.device_mesh.size(i) for i, p in enumerate(value.placements) if getattr(p, "dim", None) == dim)
             for dim in range(value.ndim)]  # fmt: skip
    # Each rank has as many rows of it as the others, so that a stretch of theirs is a smaller tensor, split alike.
    even = [dim for dim, n in enumerate(shape) if n and n % parts[dim] == 0]
    if value.nbytes <= STRETCH or not even:
        whole = value.full_tensor()
        return whole.detach().cpu() if keeps else torch.empty(0)
    dim = max(even, key=lambda d: shape[d] // parts[d])
    rows = shape[dim] // parts[dim]
    step = max(1, STRETCH * rows // value.nbytes)
    result = torch.empty(shape, dtype=value.dtype) if keeps else torch.empty(0)
    for start in range(0, rows, step):
        stretch = local.narrow(dim, start, min(step, rows - start)).contiguous()
        size = torch.Size([*shape[:dim], stretch.shape[dim] * parts[dim], *shape[dim + 1 :]])
        stride = torch.empty(size, device="meta").stride()
        part = DTensor.from_local(
            stretch, value.device_mesh, value.placements, run_check=False, shape=size, stride=stride
        ).full_tensor()
        if keeps:
            here = result.unflatten(dim, (parts[dim], rows)).narrow(dim + 1, start, stretch.shape[dim])
            here.copy_(part.unflatten(dim, (parts[dim], stretch.shape[dim])))
    return result
