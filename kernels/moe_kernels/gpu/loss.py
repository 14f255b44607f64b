"""Softmax and cross-entropy of a chunk of logits in Triton: a program for each row, which reads it twice.

The first pass keeps a running maximum and the sum of exponentials beside it (online softmax, arXiv 1805.02867); the
second writes the gradient where the logits were.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.gpu.operator import operator
from moe_kernels.gpu.tiles import next_power_of_2

# Numbers that a program holds of a row at a time.
BLOCK = 4096


@triton.jit  # knowing whether 16 divides V: else every number is read by itself
def softmax_kernel(logits, targets, above, losses, V, BLOCK: tl.constexpr):
    """losses = log sum exp(logits) - the target's logit; with ``above``, logits become above * (softmax - target)."""
    row = tl.program_id(0)
    at = logits + row.to(tl.int64) * V
    target = tl.load(targets + row)
    at_target = tl.load(at + target).to(tl.float32)
    c = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, V, BLOCK):
        x = tl.load(at + first + c, mask=first + c < V, other=float("-inf")).to(tl.float32)
        higher = tl.where((x > top) | (x != x), x, top)
        # A lane that has seen nothing but -inf has no sum yet, and its -inf - -inf is not a number.
        total = tl.where(top == float("-inf"), 0.0, total * tl.exp(top - higher))
        total += tl.where(x == float("-inf"), 0.0, tl.exp(x - higher))
        top = higher
    # The rows whose largest is no number: as the formula has it, all is NaN.
    largest = tl.max(top, 0)
    largest = tl.where(tl.sum((top != top).to(tl.int32), 0) > 0, float("nan"), largest)
    sums = tl.sum(tl.where(top == float("-inf"), 0.0, total * tl.exp(top - largest)), 0)
    sums = tl.where(largest == float("-inf"), float("nan"), sums)
    tl.store(losses + row, tl.log(sums) - (at_target - largest))
    if above is not None:
        scale = tl.load(above + row)
        for first in range(0, V, BLOCK):
            mask = first + c < V
            x = tl.load(at + first + c, mask=mask, other=float("-inf")).to(tl.float32)
            p = tl.exp(x - largest) * (scale / sums) - tl.where(first + c == target, scale, 0.0)
            tl.store(at + first + c, p.to(logits.dtype.element_ty), mask=mask)


def launch(V: int) -> dict[str, int]:
    """The constants of the kernel for rows of V logits, and its warps."""
    block = min(BLOCK, next_power_of_2(V))
    return {"BLOCK": block, "num_warps": max(1, min(8, block // 256))}


@operator("loss_softmax", mutates=("logits", "losses"))
def softmax_(logits: Tensor, targets: Tensor, above: Tensor | None, losses: Tensor) -> None:
    """``moe_kernels.loss_softmax.softmax_``: logits (c, V); targets, above (or None) and losses (c, 1), contiguous."""
    c, V = logits.shape
    if c:
        softmax_kernel[(c,)](logits, targets, above, losses, V, **launch(V))


@softmax_.register_fake
def _(logits: Tensor, targets: Tensor, above: Tensor | None, losses: Tensor) -> None:
    return None
