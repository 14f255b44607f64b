"""FP8 numbers as DeepSeek-V3 trains with them (arXiv 2412.19437, section 3.3): E4M3, and a float32 scale for each tile.

A tile's scale is its largest magnitude / 448, the largest E4M3 number, found anew each time; its numbers are x / scale,
rounded to nearest, ties to even. Activations have tiles of 1 x 128, weights of 128 x 128; the last may be shorter. A
tile of zeros stays one. One with a NaN or an infinity becomes zeros with an infinite scale: all of it reads as NaN, and
so does every sum that it enters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FP8 = torch.float8_e4m3fn
TILE = 128
LARGEST = 448.0
SMALLEST_SCALE = 2.0**-126  # the smallest normal float32: one below would have fewer digits


def quantize_rows(x: Tensor, tile: int = TILE, pow2: bool = False) -> tuple[Tensor, Tensor]:
    """(q, scales) of ``x`` (..., C) in tiles of ``tile`` along its last dimension: E4M3 (..., C), and float32
    (..., ceil(C / tile)).

    pow2: scales are rounded up to powers of two. Numbers that are quantised again along another dimension then lose
    nothing but what falls below E4M3's exponents; DeepSeek-V3 has such scales in what goes into the experts.

    Raises:
        ValueError: x is no half-precision or float32 tensor; the tile is empty.
    """
    _check(x, 1, tile)
    C = x.shape[-1]
    tiles = _tiles(x, -1, tile)
    scales = _scales(tiles.abs().amax(-1), pow2)
    return _numbers(tiles, scales[..., None]).flatten(-2)[..., :C].contiguous(), scales


def quantize_blocks(w: Tensor, block: int = TILE) -> tuple[Tensor, Tensor]:
    """(q, scales) of matrices ``w`` (..., A, B) in blocks of ``block`` x ``block``: E4M3 (..., A, B), and float32
    (..., ceil(A / block), ceil(B / block)). Those of the transposed matrices are the transposed ones.

    Raises:
        ValueError: w is no half-precision or float32 tensor of matrices; the block is empty.
    """
    _check(w, 2, block)
    A, B = w.shape[-2:]
    blocks = _tiles(_tiles(w, -1, block), -3, block)  # (..., A / block, block, B / block, block)
    scales = _scales(blocks.abs().amax((-3, -1)), pow2=False)
    q = _numbers(blocks, scales[..., :, None, :, None]).flatten(-2).flatten(-3, -2)
    return q[..., :A, :B].contiguous(), scales


def dequantize(q: Tensor, scales: Tensor, tile: int = TILE) -> Tensor:
    """What the numbers and scales of ``quantize_rows`` or ``quantize_blocks`` stand for, in float32.

    Raises:
        ValueError: the scales have the shape of neither.
    """
    columns = -(-q.shape[-1] // tile)
    if scales.shape == (*q.shape[:-1], columns):
        return q.float() * scales.repeat_interleave(tile, -1)[..., : q.shape[-1]]
    if q.dim() > 1 and scales.shape == (*q.shape[:-2], -(-q.shape[-2] // tile), columns):
        A, B = q.shape[-2:]
        return q.float() * scales.repeat_interleave(tile, -1).repeat_interleave(tile, -2)[..., :A, :B]
    raise ValueError(f"scales of shape {tuple(scales.shape)} fit no tiles of {tile} of numbers {tuple(q.shape)}")


def _check(x: Tensor, dims: int, tile: int) -> None:
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32) or x.dim() < dims:
        what = "a tensor" if dims == 1 else "matrices"
        raise ValueError(f"FP8 is made of {what} in half precision or float32, not of {x.dtype} {tuple(x.shape)}")
    if tile < 1:
        raise ValueError(f"a tile has 1 number or more on a side, not {tile}")


def _tiles(x: Tensor, dim: int, tile: int) -> Tensor:
    """x in float32 with dimension ``dim`` (negative), filled up with zeros, as two: tiles, and numbers of a tile."""
    size = x.shape[dim]
    n = -(-size // tile)
    return F.pad(x.float(), (0, 0) * (-dim - 1) + (0, n * tile - size)).unflatten(dim, (n, tile))


def _scales(amax: Tensor, pow2: bool) -> Tensor:
    scales = (torch.where(amax.isfinite(), amax, torch.inf) / LARGEST).clamp(min=SMALLEST_SCALE)
    if not pow2:
        return scales
    return ((scales.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)  # its exponent alone, rounded up


def _numbers(x: Tensor, scales: Tensor) -> Tensor:
    return torch.where(scales.isinf(), 0.0, x / scales).to(FP8)
