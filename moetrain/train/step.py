"""Pieces of one optimizer step that concern the whole model: token counts, gradient norm, expert loads."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moetrain.config.errors import TrainError
from moetrain.config.schema import ModelConfig
from moetrain.moe.balance import Loads, end_of_step
from moetrain.parallel.mesh import ParallelDims
from moetrain.parallel.run import Inputs


def count_tokens(batches: list[Inputs], dims: ParallelDims) -> tuple[int, int]:
    """(targets, tokens) of the global batch. ``batches``: this data rank's, whole sequences."""
    counts = torch.tensor(
        [sum(int((b.targets_BN >= 0).sum()) for b in batches), sum(b.tokens_BN.numel() for b in batches)],
        device=batches[0].tokens_BN.device,
    )
    dist.all_reduce(counts, group=dims.data_group)
    targets, tokens = counts.tolist()
    return targets, tokens


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float, pipeline: dist.ProcessGroup) -> float:
    """Norm of the gradient of the whole model, over every mesh and the stages of the ``pipeline`` group; scales
    gradients down to ``max_norm`` (0: never)."""
    groups: dict[object, list[Tensor]] = defaultdict(list)
    for p in model.parameters():
        if p.grad is not None:
            key = (p.grad.device_mesh, p.grad.placements) if isinstance(p.grad, DTensor) else None
            groups[key].append(p.grad)
    square = torch.zeros(())
    for grads in groups.values():
        norm = nn.utils.get_total_norm(grads)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        square = square.to(norm) + norm**2
    dist.all_reduce(square, group=pipeline)
    total = square.sqrt()
    if max_norm > 0:
        scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
        local = [g.to_local() if isinstance(g, DTensor) else g for grads in groups.values() for g in grads]
        torch._foreach_mul_(local, scale)
    return float(total)


def all_loads(model: nn.Module, cfg: ModelConfig, dims: ParallelDims, step: int) -> Loads:
    """Close optimizer step ``step`` (see ``balance.end_of_step``): the loads of all layers, of every pipeline stage."""
    mine = end_of_step(model, dims.stage_group, step)
    if dims.sizes.pp == 1:
        return mine
    sizes = {f"layers.{i}.moe": cfg.layer_value("num_experts", i) for i in cfg.moe_layers()}
    device = next(model.parameters()).device
    parts = []
    for name, n in sizes.items():
        known = name in mine.counts
        counts = mine.counts[name] if known else torch.zeros(n, dtype=torch.int64, device=device)
        parts += [counts, counts.new_tensor([mine.dropped[name] if known else 0])]
    total = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=device)
    dist.all_reduce(total, group=dims.group("pp"))
    split = total.split([len(part) for part in parts])
    dropped = [int(d) for d in split[1::2]]
    return Loads(dict(zip(sizes, split[::2], strict=True)), dict(zip(sizes, dropped, strict=True)))


def bad_step(loss: float, grad_norm: float, step: int, global_batch: int, last_good: str) -> TrainError:
    """What to raise at step ``step`` (0-based) when a figure of the whole model is not finite: it says the step, its
    samples and the way back."""
    name, value = ("gradient norm", grad_norm) if math.isfinite(loss) else ("loss", loss)
    first = step * global_batch
    return TrainError(
        f"{name} is {value} at step {step + 1} (samples {first}..{first + global_batch - 1}); "
        f"the weights were not updated; last good checkpoint: {last_good}"
    )
