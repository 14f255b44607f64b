"""One optimizer step: forward and backward of every micro-batch, one reduction, clip, update."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moetrain.config.errors import TrainError
from moetrain.data.loader import Batch
from moetrain.model.decoder import Decoder


def forward_backward(
    model: Decoder, batches: list[Batch], aux_coefs: list[float], step: int, group: dist.ProcessGroup
) -> tuple[float, dict[str, float], int]:
    """Gradients of the mean loss over the global batch, plus auxiliary terms, summed over ranks by FSDP.

    Everything is a sum over tokens, divided once: the loss by the number of targets in the global batch, the auxiliary
    terms by the number of its tokens. Returns (mean loss, mean auxiliary terms, tokens of the global batch).
    """
    device = next(model.parameters()).device
    wide = torch.float64 if device.type == "cpu" else torch.float32
    count = torch.tensor(
        [sum(int((b.targets_BS >= 0).sum()) for b in batches), sum(b.tokens_BS.numel() for b in batches)], device=device
    )
    dist.all_reduce(count, group=group)
    targets, tokens = (int(n) for n in count)
    sums = torch.zeros(1 + len(aux_coefs), dtype=wide, device=device)
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        model.set_requires_gradient_sync(last)  # type: ignore[operator]  # FSDP reduces once, after the last micro-batch
        loss, carry = model(batch.tokens_BS.to(device), batch.targets_BS.to(device), step=step)
        total = loss / targets
        for a, coef in enumerate(aux_coefs):
            total = total + coef * carry.aux_A[a] / tokens
        total.backward()
        sums[0] += loss.detach()
        sums[1:] += carry.aux_A.detach()
    dist.all_reduce(sums, group=group)
    values = sums.tolist()
    aux = {name: v / tokens for name, v in zip(model.aux_names, values[1:], strict=True)}
    return values[0] / targets, aux, tokens


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Norm of the gradient of the whole model, over every mesh; scales gradients down to ``max_norm`` (0: never)."""
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
    total = square.sqrt()
    if max_norm > 0:
        scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
        local = [g.to_local() if isinstance(g, DTensor) else g for grads in groups.values() for g in grads]
        torch._foreach_mul_(local, scale)
    return float(total)


def bad_step(loss: float, grad_norm: float, step: int, global_batch: int, last_good: str) -> TrainError:
    """What to raise at step ``step`` (0-based) when a figure of the whole model is not finite: it says the step, its
    samples and the way back."""
    name, value = ("gradient norm", grad_norm) if math.isfinite(loss) else ("loss", loss)
    first = step * global_batch
    return TrainError(
        f"{name} is {value} at step {step + 1} (samples {first}..{first + global_batch - 1}); "
        f"the weights were not updated; last good checkpoint: {last_good}"
    )
