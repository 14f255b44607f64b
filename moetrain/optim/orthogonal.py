"""Orthogonalised matrices: the Newton-Schulz iteration, and how it is shared out when matrices are sharded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
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
    return ways * max(1, BATCH_ELEMENTS // max(1, even_share(p) * ways))


def even_share(p: Tensor) -> int:
    """Elements of ``p`` that a rank would hold if all held equally many: the same number on all ranks, which must take
    as many parameters at a time as the others, also where shards are uneven or ranks own unequal numbers of experts."""
    if not isinstance(p, DTensor):
        return p.numel()
    return -(-p.numel() // math.prod(p.device_mesh.size(i) for i, s in enumerate(p.placements) if not s.is_replicate()))


def orthogonalize(xs: Sequence[Tensor], like: Tensor, compute: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """``compute`` of matrices, or batches of matrices (.., A, B), of which this rank holds the shards ``xs``.

    xs: the local shards of tensors that all have ``like``'s shape and sharding. compute: (.., A, B) -> (.., A, B), on
    each matrix by itself; it is only given whole matrices. Returns the local shards of the results. Ranks that split
    matrices among them (FSDP's) trade shards of all for whole ones of their share, one exchange there and one back, so
    they divide the work. Ranks that split the batch (expert parallelism's) send nothing. Collective over like's mesh.
    """
    split = _split_matrices(like)
    if not split:
        return list(compute(torch.stack(list(xs))).unbind())
    assert isinstance(like, DTensor)
    if len(split) == 1 and type(like.placements[split[0]]) is Shard:
        return _share_out(torch.stack(list(xs)), like, split[0], compute)
    whole = [Replicate() if i in split else p for i, p in enumerate(like.placements)]
    return [_gather(x, like, whole, compute) for x in xs]


def _share_out(x: Tensor, like: DTensor, mesh_dim: int, compute: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """x (N, *local shape): N shards of matrices that mesh dimension ``mesh_dim`` alone splits."""
    mesh = like.device_mesh
    n, me, group = mesh.size(mesh_dim), mesh.get_local_rank(mesh_dim), mesh.get_group(mesh_dim)
    dim = like.placements[mesh_dim].dim  # type: ignore[attr-defined]
    shares, widths = _chunks(x.shape[0], n), _chunks(like.shape[dim], n)

    def shape(count: int, width: int) -> torch.Size:
        sizes = [count, *x.shape[1:]]
        sizes[dim + 1] = width
        return torch.Size(sizes)

    pieces = _exchange(x.split(shares), [shape(shares[me], width) for width in widths], group)
    done = compute(torch.cat(pieces, dim + 1))
    back = _exchange(done.split(widths, dim + 1), [shape(count, widths[me]) for count in shares], group)
    return list(torch.cat(back).unbind())


def _exchange(pieces: Sequence[Tensor], shapes: list[torch.Size], group: dist.ProcessGroup) -> list[Tensor]:
    """Send ``pieces[r]`` to rank r of ``group``; what each rank sent here, of these ``shapes``."""
    sent = torch.cat([piece.reshape(-1) for piece in pieces])
    sizes = [shape.numel() for shape in shapes]
    received = sent.new_empty(sum(sizes))
    dist.all_to_all_single(received, sent, sizes, [piece.numel() for piece in pieces], group=group)
    return [part.view(shape) for part, shape in zip(received.split(sizes), shapes, strict=True)]


def _gather(x: Tensor, like: DTensor, whole: list[Placement], compute: Callable[[Tensor], Tensor]) -> Tensor:
    """The general way, for matrices split more than once: every rank gathers and computes all that it has a part of."""
    sharded = _from_local(x, like, like.placements)
    done = compute(sharded.redistribute(placements=whole).to_local())
    # Offloaded shards are not on the mesh's device, where DTensor.from_local takes them
    return _from_local(done, like, whole).redistribute(placements=like.placements).to_local().to(x.device)


def _chunks(size: int, n: int) -> list[int]:
    """Sizes of the n parts of torch.chunk, which DTensor splits by; the last may be smaller, or empty."""
    full = -(-size // n)
    return [max(0, min(full, size - i * full)) for i in range(n)]


def _split_matrices(x: Tensor) -> list[int]:
    """Mesh dimensions that split ``x`` (.., A, B) within its matrices."""
    if not isinstance(x, DTensor):
        return []
    dims = (x.dim() - 2, x.dim() - 1)
    return [i for i, p in enumerate(x.placements) if getattr(p, "dim", None) in dims and x.device_mesh.size(i) > 1]


def _from_local(local: Tensor, like: DTensor, placements: Sequence[Placement]) -> DTensor:
    mesh, shape, stride = like.device_mesh, like.shape, like.stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
