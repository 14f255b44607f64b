"""Orthogonalised matrices: the Newton-Schulz iteration, and how it is shared out when matrices are sharded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPS = 1e-7
# Elements that one batch may hold: bounds the iteration's temporaries (about four times as much) on any model.
BATCH_ELEMENTS = 2**27


def newton_schulz(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Each matrix of ``x`` (.., A, B) with singular values s replaced by about 1 (0.7 to 1.2); computed in ``dtype``.

    Five steps of the quintic of Muon (https://kellerjordan.github.io/posts/muon/, the same as in torch.optim.Muon):
    s / (norm of all s) goes through p(s) = 3.4445 s - 4.7750 s^3 + 2.0315 s^5, five times.
    """
    a, b, c = COEFFICIENTS
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    flat_MAB, out_MAB = x.reshape(-1, *x.shape[-2:]), out.view(-1, *x.shape[-2:])
    at_once = max(1, BATCH_ELEMENTS // max(1, math.prod(x.shape[-2:])))
    for part_MAB, into_MAB in zip(flat_MAB.split(at_once), out_MAB.split(at_once), strict=True):
        y = part_MAB.to(dtype)
        if y.shape[-2] > y.shape[-1]:
            y = y.mT
        y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
        for _ in range(STEPS):
            gram = y @ y.mT
            y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
        into_MAB.copy_(y.mT if part_MAB.shape[-2] > part_MAB.shape[-1] else y)
    return out


def at_once(p: Tensor) -> int:
    """How many parameters like ``p`` to orthogonalise together: enough for all ranks, within BATCH_ELEMENTS."""
    if not isinstance(p, DTensor):
        return max(1, BATCH_ELEMENTS // max(1, p.numel()))
    ways = math.prod(p.device_mesh.size(i) for i in _split_matrices(p))
    return ways * max(1, BATCH_ELEMENTS // max(1, p.to_local().numel() * ways))


def orthogonalize(xs: Sequence[Tensor], compute: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """``compute`` of every tensor of ``xs``, each a matrix or a batch of matrices (.., A, B); returns the local shards.

    xs: equal in shape, dtype and, where they are DTensors, mesh and placements. compute: (.., A, B) -> (.., A, B), on
    each matrix by itself; it is only given whole matrices. Ranks that split matrices among them (FSDP's) trade shards
    of all of them for whole ones of their share, one exchange there and one back, so they divide the work.
    Ranks that split the batch (expert parallelism's) communicate nothing. Collective over the meshes.
    """
    first = xs[0]
    if not isinstance(first, DTensor):
        return list(compute(torch.stack(list(xs))).unbind())
    shards = [x.to_local() for x in xs if isinstance(x, DTensor)]
    split = _split_matrices(first)
    if not split:
        return list(compute(torch.stack(shards)).unbind())
    if len(split) > 1 or type(first.placements[split[0]]) is not Shard:
        return [_gather_one(x, compute) for x in xs if isinstance(x, DTensor)]
    stacked = [Shard(p.dim + 1) if isinstance(p, Shard) else p for p in first.placements]
    shared_out = [Shard(0) if i in split else p for i, p in enumerate(stacked)]
    shape = torch.Size((len(xs), *first.shape))
    mine = _from_local(torch.stack(shards), first, stacked, shape).redistribute(placements=shared_out).to_local()
    done = _from_local(compute(mine), first, shared_out, shape)
    return list(done.redistribute(placements=stacked).to_local().unbind())


def _split_matrices(x: DTensor) -> list[int]:
    """Mesh dimensions that split ``x`` (.., A, B) within its matrices."""
    dims = (x.dim() - 2, x.dim() - 1)
    return [i for i, p in enumerate(x.placements) if getattr(p, "dim", None) in dims and x.device_mesh.size(i) > 1]


def _gather_one(x: DTensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """The general way, for matrices split more than once: every rank gathers, and computes, all that it shares in."""
    split = _split_matrices(x)
    whole = [Replicate() if i in split else p for i, p in enumerate(x.placements)]
    done = compute(x.redistribute(placements=whole).to_local())
    return _from_local(done, x, whole, x.shape).redistribute(placements=x.placements).to_local()


def _from_local(local: Tensor, like: DTensor, placements: Sequence[Placement], shape: torch.Size) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, like.device_mesh, placements, run_check=False, shape=shape, stride=stride)
