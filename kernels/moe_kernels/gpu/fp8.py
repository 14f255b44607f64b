"""Experts' matrix products in FP8 in Triton, and what makes their operands: the recipe of ``moe_kernels.fp8_experts``.

Tensor cores take FP8 with the summed dimension contiguous. So weights are quantised once for each direction, in the
backward pass transposed; and what a weight's gradient sums over, rows of an expert, is written transposed tile by tile.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from moe_kernels import fp8
from moe_kernels.gpu.activation import act, act_slopes
from moe_kernels.gpu.tiles import INTERPRETED, columns, load_depth, rows_of_tile

# Numbers of a scale, and rows of a tile, in the interpreter too.
TILE = fp8.TILE
# Rows that a kernel of rows, columns that a kernel of tiles' columns takes at a time.
ROWS, COLUMNS = 32, 64
# Of ``activation_gradient_kernel``, whose values do not fit the registers of 4 warps.
GRADIENT_WARPS = 8

_WIDEN: tl.constexpr = tl.constexpr(INTERPRETED)
_LARGEST: tl.constexpr = tl.constexpr(fp8.LARGEST)
_SMALLEST_SCALE: tl.constexpr = tl.constexpr(fp8.SMALLEST_SCALE)


@triton.jit
def scale_of(amax, POW2: tl.constexpr):
    scale = tl.maximum(tl.div_rn(amax, _LARGEST), _SMALLEST_SCALE)
    if POW2:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def magnitude(x):
    """|x|; infinity where x is NaN."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def numbers(x, scale):
    """x / scale in E4M3; zeros where the scale is infinite."""
    x = tl.where(scale < float("inf"), tl.div_rn(x, scale), 0.0)
    if _WIDEN:  # the interpreter does not round to even, nor carry: round before
        bits = x.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, normal)  # 2^-6; 1.5 * 2^14 leaves steps of 2^-9
    return x.to(tl.float8e4nv)


@triton.jit
def quantize(x, axis: tl.constexpr, POW2: tl.constexpr):
    """(E4M3 numbers, scales) of a float32 tile whose ``axis`` runs along a scale's numbers."""
    scale = scale_of(tl.max(magnitude(x), axis), POW2)
    return numbers(x, tl.expand_dims(scale, axis)), scale


@triton.jit
def product(a, b):
    """a @ b of E4M3 tiles, in float32; exact in the interpreter, as in ``moe_kernels.fp8_experts``."""
    if _WIDEN:
        return tl.dot(a.to(tl.float32).to(tl.float64), b.to(tl.float32).to(tl.float64)).to(tl.float32)
    else:
        return tl.dot(a, b)


@triton.jit(do_not_specialize=["R"])
def quantize_rows_kernel(x, q, scale, R, C: tl.constexpr, POW2: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """``moe_kernels.quantize_rows`` of x (R, C)."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    c = block * TILE + tl.arange(0, TILE)
    at, mask = r[:, None] * C + c[None, :], (r < R)[:, None] & (c < C)[None, :]
    q_tile, scale_tile = quantize(tl.load(x + at, mask=mask, other=0.0).to(tl.float32), 1, POW2)
    tl.store(q + at, q_tile, mask=mask)
    tl.store(scale + r * tl.cdiv(C, TILE) + block, scale_tile, mask=r < R)


@triton.jit
def quantize_blocks_kernel(
    w, q, scale, A: tl.constexpr, B: tl.constexpr, TRANSPOSED: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """``moe_kernels.quantize_blocks`` of matrices w (A, B), or of their transposes (B, A)."""
    A_BLOCKS: tl.constexpr = (A + TILE - 1) // TILE
    B_BLOCKS: tl.constexpr = (B + TILE - 1) // TILE
    matrix = tl.program_id(1).to(tl.int64)
    i, j = tl.program_id(0) // B_BLOCKS, tl.program_id(0) % B_BLOCKS
    a, b = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    mask = (a < A)[:, None] & (b < B)[None, :]
    x = tl.load(w + matrix * (A * B) + (a[:, None] * B + b[None, :]), mask=mask, other=0.0).to(tl.float32)
    block_scale = scale_of(tl.max(tl.max(magnitude(x), 1), 0), False)
    to, number = a[:, None] * B + b[None, :], i * B_BLOCKS + j
    if TRANSPOSED:
        to, number = b[None, :] * A + a[:, None], j * A_BLOCKS + i
    tl.store(q + matrix * (A * B) + to, numbers(x, block_scale), mask=mask)
    tl.store(scale + matrix * (A_BLOCKS * B_BLOCKS) + number, block_scale)


@triton.jit
def quantize_columns_kernel(
    rows, row_scale, index, q, scale, expert, row, start,
    E: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each tile of rows[index] (R, C), with row_scale in FP8, quantised along its rows and transposed: q (tiles, C,
    TILE), scale (tiles, C). Rows that a tile does not have are zeros."""
    tile = tl.program_id(0).to(tl.int64)
    e, first, step, live = rows_of_tile(expert, row, start, tile, TILE)
    if e == E:
        return
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    source = first + step if index is None else tl.load(index + first + step)
    mask = live[:, None] & (c < C)[None, :]
    x = tl.load(rows + source[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
    if row_scale is not None:
        x *= tl.load(row_scale + source * tl.cdiv(C, TILE) + tl.program_id(1) * COLUMNS // TILE)[:, None]
    q_tile, scale_tile = quantize(x, 0, False)
    to = c[None, :] * TILE + tl.arange(0, TILE)[:, None]
    tl.store(q + tile * (C * TILE) + to, q_tile, mask=(c < C)[None, :])
    tl.store(scale + tile * C + c, scale_tile, mask=c < C)


@triton.jit(do_not_specialize=["R"])
def activation_kernel(
    h, s, q, scale, R,
    F: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """s * act(h), rounded to h's dtype, as ``moe_kernels.quantize_rows`` has it."""
    n_F: tl.constexpr = 2 * F if GATED else F
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    f = block * TILE + tl.arange(0, TILE)
    at, mask = r[:, None] * n_F + f[None, :], (r < R)[:, None] & (f < F)[None, :]
    up = tl.load(h + (n_F - F) + at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(h + at, mask=mask, other=0.0).to(tl.float32) if GATED else up
    value = act(gate, up, ACT, GATED)
    if s is not None:
        value *= tl.load(s + r, mask=r < R, other=0.0).to(tl.float32)[:, None]
    value = tl.where(mask, value.to(h.dtype.element_ty).to(tl.float32), 0.0)
    q_tile, scale_tile = quantize(value, 1, False)
    tl.store(q + r[:, None] * F + f[None, :], q_tile, mask=mask)
    tl.store(scale + r * tl.cdiv(F, TILE) + block, scale_tile, mask=r < R)


@triton.jit(do_not_specialize=["R"])
def activation_gradient_kernel(
    h, da, s, a, dh, q, scale, ds, R,
    F: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """From da (R, F), the gradient of a = s * act(h): a once more; dh, and each of its parts as
    ``moe_kernels.quantize_rows`` has it, q (R, n F) and scale (R, n ceil(F / TILE)); and ds (ceil(F / TILE), R), whose
    columns sum to the gradient of s."""
    n_F: tl.constexpr = 2 * F if GATED else F
    BLOCKS: tl.constexpr = (F + TILE - 1) // TILE
    n_BLOCKS: tl.constexpr = 2 * BLOCKS if GATED else BLOCKS
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    f = block * TILE + tl.arange(0, TILE)
    at, mask = r[:, None] * n_F + f[None, :], (r < R)[:, None] & (f < F)[None, :]
    up = tl.load(h + (n_F - F) + at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(h + at, mask=mask, other=0.0).to(tl.float32) if GATED else up
    above = tl.load(da + r[:, None] * F + f[None, :], mask=mask, other=0.0).to(tl.float32)
    value = act(gate, up, ACT, GATED)
    if s is not None:
        tl.store(ds + block.to(tl.int64) * R + r, tl.sum(tl.where(mask, above * value, 0.0), 1), mask=r < R)
        weight = tl.load(s + r, mask=r < R, other=0.0).to(tl.float32)[:, None]
        value *= weight
        above *= weight
    tl.store(a + r[:, None] * F + f[None, :], value.to(a.dtype.element_ty), mask=mask)
    dgate, dup = act_slopes(gate, up, ACT, GATED)
    _store_gradient(above * dup, dh + (n_F - F), q + (n_F - F), at, scale + r * n_BLOCKS + n_BLOCKS - BLOCKS + block,
                    mask, r < R)  # fmt: skip
    if GATED:
        _store_gradient(above * dgate, dh, q, at, scale + r * n_BLOCKS + block, mask, r < R)


@triton.jit
def _store_gradient(x, dh, q, at, scale, mask, live):
    x = x.to(dh.dtype.element_ty)
    tl.store(dh + at, x, mask=mask)
    q_tile, scale_tile = quantize(tl.where(mask, x.to(tl.float32), 0.0), 1, False)
    tl.store(q + at, q_tile, mask=mask)
    tl.store(scale, scale_tile, mask=live)


@triton.jit
def fp8_rows_times_weights(
    a, a_scale, index, w, w_scale, bias, s, out, expert, row, start,
    E: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, SUMMED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Rows times the ``PARTS`` matrices (N, K) of their experts, along K: out (R, PARTS N) = a[index] W^T, side by
    side, plus s * bias; or SUMMED: out (R, N), the sum over parts of a's parts (R, PARTS K) times W^T."""
    BLOCKS: tl.constexpr = (N + TILE - 1) // TILE
    K_TILES: tl.constexpr = (K + TILE - 1) // TILE
    SIDES: tl.constexpr = 1 if SUMMED else PARTS
    DEPTHS: tl.constexpr = PARTS if SUMMED else 1
    e, first, step, live = rows_of_tile(expert, row, start, tl.program_id(0) // (SIDES * BLOCKS), TILE)
    side, block = tl.program_id(0) // BLOCKS % SIDES, tl.program_id(0) % BLOCKS
    n, real = columns(block, N, TILE)
    to = out + first * (SIDES * N) + side * N + (step[:, None] * (SIDES * N) + n[None, :])
    mask = live[:, None] & real[None, :]
    if e == E:
        tl.store(to, tl.zeros((TILE, TILE), out.dtype.element_ty), mask=mask)
        return
    source = first + step if index is None else tl.load(index + first + step)
    depth = tl.arange(0, TILE)
    a_off = source[:, None] * (DEPTHS * K) + depth[None, :]
    a_scales = a_scale + source * (DEPTHS * K_TILES)
    w_off = n[None, :] * K + depth[:, None]
    w += (e * PARTS + side) * (N * K)
    w_scale += (e * PARTS + side) * (BLOCKS * K_TILES) + block * K_TILES
    sums = tl.zeros((TILE, TILE), tl.float32)
    for i in range(0, DEPTHS * K_TILES):
        part, tile = i // K_TILES, i % K_TILES
        k = tile * TILE
        a_tile = load_depth(a + part * K + k + a_off, k, K, TILE, 1)
        w_tile = load_depth(w + part * (N * K) + k + w_off, k, K, TILE, 0)
        scale = tl.load(a_scales + i) * tl.load(w_scale + part * (BLOCKS * K_TILES) + tile)
        sums += product(a_tile, w_tile) * scale[:, None]
    if bias is not None:
        b = tl.load(bias + (e * SIDES + side) * N + n).to(tl.float32)[None, :]
        sums += b if s is None else b * tl.load(s + first + step).to(tl.float32)[:, None]
    tl.store(to, sums.to(out.dtype.element_ty), mask=mask)


@triton.jit
def fp8_weight_gradient(
    left, left_scale, right, right_scale, out, start,
    E_POW2: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """out_eMN: of each expert, the sum over its tiles of left (M, TILE) times right (N, TILE), along the rows."""
    BLOCKS: tl.constexpr = (N + TILE - 1) // TILE
    e = tl.program_id(1)
    m, m_real = columns(tl.program_id(0) // BLOCKS, M, TILE)
    n, n_real = columns(tl.program_id(0) % BLOCKS, N, TILE)
    ids = tl.arange(0, E_POW2)
    rows_E = tl.load(start + ids + 1, mask=ids <= e, other=0) - tl.load(start + ids, mask=ids <= e, other=0)
    tiles_E = (rows_E + TILE - 1) // TILE
    first = tl.sum(tl.where(ids < e, tiles_E, 0)).to(tl.int64)
    depth = tl.arange(0, TILE)
    l_tile, l_scale = left + first * (M * TILE) + (m[:, None] * TILE + depth[None, :]), left_scale + first * M + m
    r_tile, r_scale = right + first * (N * TILE) + (n[None, :] * TILE + depth[:, None]), right_scale + first * N + n
    sums = tl.zeros((TILE, TILE), tl.float32)
    for _ in range(0, tl.sum(tl.where(ids == e, tiles_E, 0))):
        sums += product(tl.load(l_tile), tl.load(r_tile)) * (tl.load(l_scale)[:, None] * tl.load(r_scale)[None, :])
        l_tile, r_tile, l_scale, r_scale = l_tile + M * TILE, r_tile + N * TILE, l_scale + M, r_scale + N
    to = out + e.to(tl.int64) * (M * N) + (m[:, None] * N + n[None, :])
    tl.store(to, sums.to(out.dtype.element_ty), mask=m_real[:, None] & n_real[None, :])
