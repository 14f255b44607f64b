"""Pieces of one optimizer step that concern the whole model: token counts, gradient norm, expert loads."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moetrain.config.errors import TrainError
from moetrain.config.schema import ModelConfig
from moetrain.data.loader import Batch
from moetrain.moe.balance import Loads, end_of_step
from moetrain.moe.layer import MoELayer
from moetrain.moe.routers import POSITIONS
from moetrain.parallel.mesh import ParallelDims
from moetrain.parallel.run import Inputs, sum_dtype

PART = 2**14  # numbers of a gradient whose squares are added up on CPU at a time


@dataclass(frozen=True)
class StepFigures:
    """Of one optimizer step, of the whole model and the global batch. loss: mean over targets, in nats. aux: mean
    auxiliary terms by name. tokens, targets: how many; padding is a token that is no target. grad_norm: before
    clipping. loads: of the experts of every layer."""

    loss: float
    aux: dict[str, float]
    tokens: int
    targets: int
    grad_norm: float
    loads: Loads


# (loss, gradient norm) -> whether to update the weights; the same on all ranks.
Accept: TypeAlias = Callable[[float, float], bool]


def both_finite(loss: float, grad_norm: float) -> bool:
    """The least that an update needs."""
    return math.isfinite(loss) and math.isfinite(grad_norm)


def inputs_of(batch: Batch, device: torch.device) -> Inputs:
    """``batch`` on ``device``. Copies from page-locked memory to a GPU go on while this thread does."""
    parts = (batch.tokens_BS, batch.targets_BS, batch.document_BS, batch.prefix_BS)
    return Inputs(*(None if part is None else part.to(device, non_blocking=True) for part in parts))  # type: ignore[arg-type]


def count_tokens(batches: list[Inputs], dims: ParallelDims) -> tuple[int, int]:
    """(targets, tokens) of the global batch. ``batches``: this data rank's, whole sequences. One wait."""
    mine = torch.stack([(b.targets_BN >= 0).sum() for b in batches]).sum()
    counts = torch.stack([mine, torch.full_like(mine, sum(b.tokens_BN.numel() for b in batches))])
    dist.all_reduce(counts, group=dims.data_group)
    targets, tokens = counts.tolist()
    return targets, tokens


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float, ranks: int) -> float:
    """Norm of the gradient of the whole model, over every mesh and all stages of a pipeline; scales gradients down to
    ``max_norm`` (0: never).

    ranks: those that hold the same layers between them. One all-reduce over the world: a rank adds the squares of its
    shards, each divided by the number of ranks that have the same one.
    """
    shares: dict[int, list[Tensor]] = defaultdict(list)  # number of copies -> gradients
    for grad, copies in local_gradients(model, ranks).values():
        shares[copies].append(grad)
    device = next(model.parameters()).device
    square = torch.zeros((), dtype=sum_dtype(device), device=device)
    for copies, grads in shares.items():
        square += norms_of_parts([g for g in grads if g.numel()] or [square]).to(square).square().sum() / copies
    dist.all_reduce(square)
    total = square.sqrt()
    if max_norm > 0:
        scale = float((max_norm / (total + 1e-6)).clamp(max=1.0))
        if scale != 1.0:
            torch._foreach_mul_([g for grads in shares.values() for g in grads], scale)
    return float(total)


def norms_of_parts(tensors: list[Tensor]) -> Tensor:
    """Norms (n,) of the parts that ``tensors``, of one dtype and device, are cut into.

    On CPU torch takes the norm of a whole tensor in one thread and, in float32, in one sum: it is 0.02% too small for
    eight million numbers. So it gets rows, cut in the same way for any number of threads.
    """
    if tensors[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(tensors))
    parts = []
    for flat in [t.reshape(-1) for t in tensors]:
        even = len(flat) // PART * PART
        parts += [flat[:even].view(-1, PART), flat[None, even:]]
    return torch.cat([torch.linalg.vector_norm(part, dim=1) for part in parts])


def local_gradients(model: nn.Module, ranks: int) -> dict[str, tuple[Tensor, int]]:
    """Parameter -> (this rank's shard of its gradient, how many of the ``ranks`` that hold the same layers between them
    have the same shard). Parameters without a gradient are left out."""
    found = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            local = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            found[name] = (local, ranks // _parts(p.grad))
    return found


@dataclass(frozen=True)
class Gradient:
    """A gradient of the whole model: this rank's shards, as ``local_gradients`` has them."""

    shards: dict[str, tuple[Tensor, int]]

    def share(self, other: Gradient) -> float:
        """This rank's share of the inner product with ``other``; over all ranks of the world shares add up. A shard
        that several ranks have counts once."""
        total = 0.0
        for name in [name for name in self.shards if name in other.shards]:
            (mine, copies), (theirs, _) = self.shards[name], other.shards[name]
            total += float(torch.linalg.vecdot(mine.flatten(), theirs.flatten()).double()) / copies
        return total


def _parts(grad: Tensor) -> int:
    """Over how many ranks a gradient is split."""
    if not isinstance(grad, DTensor):
        return 1
    return math.prod(grad.device_mesh.size(i) for i, p in enumerate(grad.placements) if not p.is_replicate())


def all_loads(model: nn.Module, cfg: ModelConfig, dims: ParallelDims, step: int) -> Loads:
    """Close optimizer step ``step`` (see ``balance.end_of_step``): the loads of all layers, of every pipeline stage."""
    mine = end_of_step(model, dims.stage_group, step)
    if dims.sizes.pp == 1:
        return mine
    sizes = {f"layers.{i}.moe": cfg.layer_value("num_experts", i) for i in cfg.moe_layers()}
    device = dims.dense.device_type  # offloaded parameters are elsewhere
    parts = []
    for name, n in sizes.items():
        none = torch.zeros(max(n, POSITIONS), dtype=torch.int64, device=device)  # of other stages' layers
        counts = mine.counts.get(name, none[:n])
        parts += [counts, counts.new_tensor([mine.dropped.get(name, 0)]), mine.dropped_P.get(name, none[:POSITIONS])]
    total = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=device)
    dist.all_reduce(total, group=dims.group("pp"))
    split = total.split([len(part) for part in parts])
    dropped = torch.cat(split[1::3]).tolist() if parts else []
    limited = [f"layers.{i}.moe" for i in cfg.moe_layers() if cfg.layer_value("capacity_factor", i) is not None]
    dropped_P = {name: part for name, part in zip(sizes, split[2::3], strict=True) if name in limited}
    loads = dict(zip(sizes, split[::3], strict=True))
    return Loads(loads, dict(zip(sizes, dropped, strict=True)), dropped_P, mine.mine)


def forget_loads(model: nn.Module) -> Loads:
    """Close a step that changes nothing: balance methods do not learn from it, and counting starts anew."""
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            router: Any = layer.router
            router.reset_buffers()
    return Loads({}, {})


def bad_step(why: str, step: int, samples: list[int], in_a_row: int, last_good: str) -> TrainError:
    """What to raise at step ``step`` (0-based) when a run must stop for it: it says the step, its samples and the way
    back. in_a_row: bad steps up to this one."""
    before = f", after {in_a_row - 1} bad batches in a row" if in_a_row > 1 else ""
    return TrainError(
        f"{why} at step {step + 1} (samples {min(samples)}..{max(samples)}){before}; "
        f"the weights were not updated; last good checkpoint: {last_good}"
    )
