"""Softmax and cross-entropy of a chunk of logits in torch's operators, of all classes or of a part of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Logits that the softmax works on at a time, so that its passes find them in the cache; a GPU needs more to be busy.
BLOCK_LOGITS = 2**20
BLOCK_LOGITS_GPU = 2**26


@dataclass(frozen=True)
class VocabularyPart:
    """The classes whose weights are here, when the others are elsewhere; everywhere are the same tokens and targets.

    first: the first class here. classes: V, their number everywhere. own_T: bool (T,), the tokens whose losses are
    reported here; every token is reported somewhere, once.
    gather: a tensor -> that of every part, stacked in a new first dimension, without autograd. Called equally often
    with equal shapes everywhere, in forward and in backward.
    """

    first: int
    classes: int
    own_T: Tensor
    gather: Callable[[Tensor], Tensor]


def _block(logits: Tensor) -> int:
    """Rows of ``logits`` (c, V) that the softmax works on at a time."""
    most = BLOCK_LOGITS_GPU if logits.device.type == "cuda" else BLOCK_LOGITS
    return max(1, most // logits.shape[1])


def scratch_for(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Where a block of ``logits`` (c, V) is computed in ``dtype``: logits itself, if they have it."""
    rows = min(len(logits), _block(logits))
    return logits if logits.dtype == dtype else logits.new_empty(rows, logits.shape[1], dtype=dtype)


def softmax_(logits: Tensor, targets: Tensor, above: Tensor | None, losses: Tensor, scratch: Tensor) -> None:
    """Write the losses (c, 1) of ``logits`` (c, V); replace the logits by the gradient of <above, losses>, if given.

    targets (c, 1). scratch: float32 or wider, with room for a block of rows, or the storage of logits itself.
    """
    block = _block(logits)
    for start in range(0, len(logits), block):
        rows = slice(start, start + block)
        part = logits[rows]
        x = part if part.dtype == scratch.dtype else scratch[: len(part)].copy_(part)
        x.sub_(x.amax(dim=1, keepdim=True))
        at_target = x.gather(1, targets[rows])
        total = x.exp_().sum(dim=1, keepdim=True)
        torch.sub(total.log(), at_target, out=losses[rows])
        if above is not None:
            x.mul_(above[rows] / total).scatter_add_(1, targets[rows], -above[rows])
            if x is not part:
                part.copy_(x)


def part_softmax_(
    logits: Tensor,
    targets: Tensor,
    above: Tensor | None,
    losses: Tensor,
    scratch: Tensor,
    gather: Callable[[Tensor], Tensor],
) -> None:
    """``softmax_`` where ``logits`` (c, v) are those of some classes; a target may be below 0 or above v - 1.

    The parts exchange, per token, their largest logit, the sum of exponentials beside it and the target's logit.
    """
    c, v = logits.shape
    block = _block(logits)
    blocks = [slice(start, start + block) for start in range(0, c, block)]
    is_here = (targets >= 0) & (targets < v)
    targets = targets.where(is_here, 0)
    largest, total, at_target = stats = losses.new_empty(3, c, 1)
    for rows in blocks:
        x = logits[rows].to(losses.dtype)
        torch.amax(x, dim=1, keepdim=True, out=largest[rows])
        torch.sum(torch.sub(x, largest[rows]).exp_(), dim=1, keepdim=True, out=total[rows])
        torch.gather(x, 1, targets[rows], out=at_target[rows])
    at_target.masked_fill_(~is_here, 0)  # it is elsewhere, and the sum over the parts finds it
    largest_P, total_P, at_target_P = gather(stats).unbind(1)
    largest = largest_P.amax(dim=0)
    total = (total_P * (largest_P - largest).exp()).sum(dim=0)
    torch.sub(total.log(), at_target_P.sum(dim=0) - largest, out=losses)
    if above is None:
        return
    above_here = above * is_here
    for rows in blocks:
        part = logits[rows]
        x = part if part.dtype == scratch.dtype else scratch[: len(part)].copy_(part)
        x.sub_(largest[rows]).exp_().mul_(above[rows] / total[rows])
        x.scatter_add_(1, targets[rows], -above_here[rows])
        if x is not part:
            part.copy_(x)
