"""Rotary position embedding in Triton: some heads of one token at a time, in float32, each number read once."""
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.gpu.operator import operator
from moe_kernels.gpu.tiles import cdiv, next_power_of_2

# Pairs that a program turns.
TILE = 1024


@triton.jit(do_not_specialize=["ROWS"])
def turn_kernel(
    x, cos, sin, out, ROWS,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HALF_POW2: tl.constexpr, REST_POW2: tl.constexpr,
    HEADS: tl.constexpr, IN_PAIRS: tl.constexpr, OUT_PAIRS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Of token n, whose row in the tables is n % ROWS. IN_PAIRS, OUT_PAIRS: the pairs are neighbours, not halves; they
    are read and written side by side, several at a time."""
    n = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    i = tl.arange(0, HALF_POW2)
    live = (heads < H)[:, None]
    mask = live & (i < HALF)[None, :]
    side = tl.arange(0, 2 * HALF_POW2)[None, :]
    both = live & (side < 2 * HALF)
    row = n * (H * D) + heads[:, None] * D
    table = (n % ROWS) * HALF + i
    c = tl.load(cos + table, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + table, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    if BACK:
        s = -s
    if IN_PAIRS:
        pairs = tl.load(x + row + side, mask=both, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(pairs, (HEADS, HALF_POW2, 2)))
    else:
        a = tl.load(x + row + i[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x + row + HALF + i[None, :], mask=mask, other=0.0).to(tl.float32)
    first, second = (a * c - b * s).to(out.dtype.element_ty), (b * c + a * s).to(out.dtype.element_ty)
    if OUT_PAIRS:
        tl.store(out + row + side, tl.interleave(first, second), mask=both)
    else:
        tl.store(out + row + i[None, :], first, mask=mask)
        tl.store(out + row + HALF + i[None, :], second, mask=mask)
    if REST_POW2 > 0:
        rest = 2 * HALF + tl.arange(0, REST_POW2)
        mask = live & (rest < D)[None, :]
        tl.store(out + row + rest[None, :], tl.load(x + row + rest[None, :], mask=mask), mask=mask)


def launch(H: int, D: int, half: int, interleaved: bool, back: bool) -> dict[str, int]:
    """The constants of the kernel for H heads of width D."""
    rest = D - 2 * half
    wide = next_power_of_2(half)
    sizes = {"H": H, "D": D, "HALF": half, "HALF_POW2": wide, "REST_POW2": next_power_of_2(rest) if rest else 0}
    sizes["HEADS"] = min(next_power_of_2(H), max(1, TILE // wide))
    return sizes | {"IN_PAIRS": interleaved and not back, "OUT_PAIRS": interleaved and back, "BACK": back}


@operator("rope")
def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> Tensor:
    """x (B, S, H, d) turned by the angles of cos and sin, or with ``back`` what ``rope`` made of one turned back."""
    B, S, H, D = x.shape
    out, half = torch.empty_like(x), cos.shape[-1]
    constants = launch(H, D, half, interleaved, back)
    if x.numel():
        grid = (B * S, cdiv(H, constants["HEADS"]))
        turn_kernel[grid](x, cos, sin, out, cos.numel() // half, **constants)
    return out


@turn.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> Tensor:
    return torch.empty_like(x)
