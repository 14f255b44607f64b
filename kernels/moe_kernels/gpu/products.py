"""The matrix products of an expert layer in Triton, after SonicMoE (arXiv 2512.14080, section 4).

Inputs are gathered while they are loaded, sums are float32, and what follows a product is done on its tile: so neither
gathered rows nor an activation's gradient are ever written. Nothing is added up by atomics. Sizes are compiled in;
those that are no multiple of a tile, or of 16 bytes, work too, slower. What is not gathered is read by Hopper's copy
engine where a reader (``tiles.matrix_reader``) is given.
"""
# mypy: allow-untyped-defs

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from moe_kernels.gpu.activation import act, act_slopes
from moe_kernels.gpu.tiles import COLUMNS, columns, config, load_depth, product, rows_of_tile, tuned

_COLUMNS: tl.constexpr = tl.constexpr(COLUMNS)


@tuned(
    key=["F", "D"],
    hopper=[config(128, 8, 4), config(128, 8, 3), config(64, 4, 3)],
    plain=[config(64, 8, 3), config(64, 8, 4)],
    float32=config(64, 8, 2, DEPTH_BYTES=64),
)
@triton.jit(do_not_specialize=["rows_class"])
def up_projection(
    x, index, w13, w_reader, b13, s, h, a, expert, row, start, rows_class,
    E: tl.constexpr, F: tl.constexpr, D: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr, COLS: tl.constexpr, DEPTH_BYTES: tl.constexpr,
):  # fmt: skip
    """h_RnF = x[index] W13^T + b13 and a_RF = s * act(h)."""
    BLOCKS: tl.constexpr = tl.cdiv(F, COLS)
    n_F: tl.constexpr = 2 * F if GATED else F
    UP: tl.constexpr = n_F - F  # where the part that is called up begins
    DEPTH: tl.constexpr = DEPTH_BYTES * 8 // x.dtype.element_ty.primitive_bitwidth
    e, first, step, live = rows_of_tile(expert, row, start, tl.program_id(0) // BLOCKS, TILE)
    if e == E:
        return
    block = tl.program_id(0) % BLOCKS
    n, real = columns(block, F, COLS)
    source = first + step if index is None else tl.load(index + first + step)
    depth = tl.arange(0, DEPTH)
    x_off = source[:, None] * D + depth[None, :]
    w_off = n[None, :] * D + depth[:, None]
    w, w_row = w13 + e * (n_F * D), (e * n_F).to(tl.int32) + block * COLS
    up = tl.zeros((TILE, COLS), tl.float32)
    gate = up
    for k in range(0, D, DEPTH):
        x_tile = load_depth(x + k + x_off, k, D, DEPTH, 1)
        up = product(x_tile, _tile(w + UP * D, w_off, w_reader, w_row + UP, k, D, DEPTH), up, PRECISION)
        if GATED:
            gate = product(x_tile, _tile(w, w_off, w_reader, w_row, k, D, DEPTH), gate, PRECISION)

    mask = live[:, None] & real[None, :]
    to = step[:, None] * n_F + n[None, :]
    if b13 is not None:
        up += tl.load(b13 + e * n_F + UP + n).to(tl.float32)[None, :]
        if GATED:
            gate += tl.load(b13 + e * n_F + n).to(tl.float32)[None, :]
    # The activation is that of the rounded h, which backward will see.
    up = up.to(h.dtype.element_ty)
    tl.store(h + first * n_F + UP + to, up, mask=mask)
    if GATED:
        gate = gate.to(h.dtype.element_ty)
        tl.store(h + first * n_F + to, gate, mask=mask)
    value = act(gate.to(tl.float32), up.to(tl.float32), ACT, GATED)
    if s is not None:
        value *= tl.load(s + first + step).to(tl.float32)[:, None]
    tl.store(a + first * F + step[:, None] * F + n[None, :], value.to(a.dtype.element_ty), mask=mask)


@triton.jit
def _tile(w, w_off, w_reader, w_row, k, D: tl.constexpr, DEPTH: tl.constexpr):
    """(DEPTH, columns) of W13^T from k on."""
    if w_reader is None:
        return load_depth(w + k + w_off, k, D, DEPTH, 0)
    else:
        return w_reader.load([w_row, k]).T


@tuned(
    key=["N", "K"],
    hopper=[
        config(256, 8, 4, PER_SM=1),
        config(256, 8, 3, PER_SM=1),
        config(128, 4, 3, PER_SM=2),
        config(256, 8, 3, PER_SM=0),
    ],
    plain=[config(128, 8, 3, PER_SM=0), config(128, 8, 4, PER_SM=0)],
    float32=config(64, 8, 2, DEPTH_BYTES=64, PER_SM=0),
)
@triton.jit(do_not_specialize=["rows_class"])
def rows_times_weights(
    a, a_reader, w, w_reader, bias, s, out, expert, row, start, rows_class,
    E: tl.constexpr, N: tl.constexpr, K: tl.constexpr, W_N: tl.constexpr, W_K: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr, COLS: tl.constexpr, DEPTH_BYTES: tl.constexpr, PER_SM: tl.constexpr,
):  # fmt: skip
    """out_RN = a_RK W^T + s * bias; of an expert's matrix, entry (n, k) is n * W_N + k * W_K from its first. Zeros in
    rows without expert. Both readers are given, or none.

    PER_SM: so many programs for each multiprocessor compute one block after the other, and the next one's operands are
    read while this one's results are written; 0: there is a program for each block.
    """
    BLOCKS: tl.constexpr = tl.cdiv(N, COLS)
    DEPTH: tl.constexpr = DEPTH_BYTES * 8 // a.dtype.element_ty.primitive_bitwidth
    depth = tl.arange(0, DEPTH)
    end = tl.load(start + E + 2) * BLOCKS
    for i in tl.range(tl.program_id(0), end, tl.num_programs(0), flatten=PER_SM > 0):
        e, first, step, live = rows_of_tile(expert, row, start, i // BLOCKS, TILE)
        real_expert = e < E
        e = tl.minimum(e, E - 1)
        block = i % BLOCKS
        n, real = columns(block, N, COLS)
        a_off = step[:, None] * K + depth[None, :]
        w_off = n[None, :] * W_N + depth[:, None] * W_K
        sums = tl.zeros((TILE, COLS), tl.float32)
        for k in range(0, K, DEPTH):
            if w_reader is None:
                a_tile = load_depth(a + first * K + k + a_off, k, K, DEPTH, 1)
                w_tile = load_depth(w + e * (N * K) + k * W_K + w_off, k, K, DEPTH, 0)
            else:
                a_tile = a_reader.load([first.to(tl.int32), k])
                if W_K == 1:
                    w_tile = w_reader.load([(e * N).to(tl.int32) + block * COLS, k]).T
                else:
                    w_tile = w_reader.load([(e * K).to(tl.int32) + k, block * COLS])
            sums = product(a_tile, w_tile, sums, PRECISION)
        if bias is not None:
            b = tl.load(bias + e * N + n).to(tl.float32)[None, :]
            sums += b if s is None else b * tl.load(s + first + step).to(tl.float32)[:, None]
        sums = tl.where(real_expert, sums, 0.0)
        to = out + first * N + (step[:, None] * N + n[None, :])
        tl.store(to, sums.to(out.dtype.element_ty), mask=live[:, None] & real[None, :])


@tuned(
    key=["F", "D"],
    hopper=[config(256, 8, 4), config(256, 8, 3), config(128, 8, 4)],
    plain=[config(64, 8, 3), config(64, 8, 4)],
    float32=config(64, 8, 2, DEPTH_BYTES=64),
)
@triton.jit(do_not_specialize=["rows_class", "R"])
def down_gradient(
    dy, index, w2, w_reader, s, h, a, dh, ds, expert, row, start, rows_class, R,
    E: tl.constexpr, F: tl.constexpr, D: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr, COLS: tl.constexpr, DEPTH_BYTES: tl.constexpr,
):  # fmt: skip
    """From da = dy[index] W2: dh_RnF; a_RF = s * act(h) once more, for W2's gradient; and where s is given, ds, whose
    entries (i, r), one for each ``COLUMNS`` columns, sum to <da_r, act(h_r)>."""
    BLOCKS: tl.constexpr = tl.cdiv(F, COLS)
    n_F: tl.constexpr = 2 * F if GATED else F
    DEPTH: tl.constexpr = DEPTH_BYTES * 8 // dy.dtype.element_ty.primitive_bitwidth
    block = tl.program_id(0) % BLOCKS
    e, first, step, live = rows_of_tile(expert, row, start, tl.program_id(0) // BLOCKS, TILE)
    if e == E:
        if s is not None:
            _store_parts(tl.zeros((TILE,), tl.float32), ds, block, first + step, live, R, F, COLS)
        return
    n, _ = columns(block, F, COLS)
    source = first + step if index is None else tl.load(index + first + step)
    depth = tl.arange(0, DEPTH)
    dy_off = source[:, None] * D + depth[None, :]
    w_off = n[None, :] + depth[:, None] * F
    da = tl.zeros((TILE, COLS), tl.float32)
    for k in range(0, D, DEPTH):
        dy_tile = load_depth(dy + k + dy_off, k, D, DEPTH, 1)
        if w_reader is None:
            w_tile = load_depth(w2 + e * (D * F) + k * F + w_off, k, D, DEPTH, 0)
        else:
            w_tile = w_reader.load([(e * D).to(tl.int32) + k, block * COLS])
        da = product(dy_tile, w_tile, da, PRECISION)

    # A few columns at a time: the values of the whole tile at once do not fit the registers.
    weight = tl.full((TILE,), 1.0, tl.float32) if s is None else tl.load(s + first + step).to(tl.float32)
    h, dh, a = h + first * n_F, dh + first * n_F, a + first * F
    left, right = _halves(da, TILE, COLS)
    HALF: tl.constexpr = COLS // 2
    share = _down_half(left, weight, h, a, dh, step, live, block * COLS, F, ACT, GATED, TILE, HALF)
    share += _down_half(right, weight, h, a, dh, step, live, block * COLS + HALF, F, ACT, GATED, TILE, HALF)
    if s is not None:
        _store_parts(share, ds, block, first + step, live, R, F, COLS)


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A tile's left and right columns."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLS // 2)), (0, 2, 1)))


@triton.jit
def _down_half(
    da, weight, h, a, dh, step, live, column,
    F: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, TILE: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """``_down_part`` of at most 32 columns at a time, of 128 columns or fewer."""
    if COLS <= 64:
        return _down_quarter(da, weight, h, a, dh, step, live, column, F, ACT, GATED, TILE, COLS)
    else:
        left, right = _halves(da, TILE, COLS)
        HALF: tl.constexpr = COLS // 2
        share = _down_quarter(left, weight, h, a, dh, step, live, column, F, ACT, GATED, TILE, HALF)
        return share + _down_quarter(right, weight, h, a, dh, step, live, column + HALF, F, ACT, GATED, TILE, HALF)


@triton.jit
def _down_quarter(
    da, weight, h, a, dh, step, live, column,
    F: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, TILE: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """``_down_part`` of at most 32 columns at a time, of 64 columns or fewer."""
    if COLS <= 32:
        return _down_part(da, weight, h, a, dh, step, live, column, F, ACT, GATED, COLS)
    else:
        left, right = _halves(da, TILE, COLS)
        HALF: tl.constexpr = COLS // 2
        share = _down_part(left, weight, h, a, dh, step, live, column, F, ACT, GATED, HALF)
        return share + _down_part(right, weight, h, a, dh, step, live, column + HALF, F, ACT, GATED, HALF)


@triton.jit
def _down_part(
    da, weight, h, a, dh, step, live, column,
    F: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Write a and dh of ``COLS`` columns from ``column`` on; their <da, act(h)> of each row."""
    n_F: tl.constexpr = 2 * F if GATED else F
    n = column + tl.arange(0, COLS)
    mask = live[:, None] & (n < F)[None, :]
    at = step[:, None] * n_F + n[None, :]
    up = tl.load(h + (n_F - F) + at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(h + at, mask=mask, other=0.0).to(tl.float32) if GATED else up
    value = act(gate, up, ACT, GATED)
    share = tl.sum(tl.where((n < F)[None, :], da * value, 0.0), 1)
    tl.store(a + (step[:, None] * F + n[None, :]), (value * weight[:, None]).to(a.dtype.element_ty), mask=mask)
    da *= weight[:, None]
    dgate, dup = act_slopes(gate, up, ACT, GATED)
    tl.store(dh + (n_F - F) + at, (da * dup).to(dh.dtype.element_ty), mask=mask)
    if GATED:
        tl.store(dh + at, (da * dgate).to(dh.dtype.element_ty), mask=mask)
    return share


@triton.jit
def _store_parts(share, ds, block, rows, live, R, F: tl.constexpr, COLS: tl.constexpr):
    """Write a block's share to its first slot of ds, and zeros to its others."""
    for i in tl.static_range(COLS // _COLUMNS):
        slot = block * (COLS // _COLUMNS) + i
        mask = live & (slot < tl.cdiv(F, _COLUMNS))
        tl.store(ds + slot.to(tl.int64) * R + rows, share if i == 0 else tl.zeros_like(share), mask=mask)


@tuned(
    key=["M", "N"],
    hopper=[config(128, 4, 3, ROWS=128), config(256, 8, 3, ROWS=128), config(256, 8, 4, ROWS=128)],
    plain=[config(128, 8, 3, ROWS=128), config(128, 4, 4, ROWS=64)],
    float32=config(64, 8, 2, DEPTH_BYTES=64, ROWS=64),
)
@triton.jit(do_not_specialize=["rows_class"])
def weight_gradient(
    left, left_index, right, right_index, out, start, rows_class,
    M: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr, COLS: tl.constexpr, DEPTH_BYTES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out_eMN: of each expert, the sum over its rows r of left[left_index[r]] (M,) times right[right_index[r]] (N,)."""
    BLOCKS: tl.constexpr = tl.cdiv(N, COLS)
    DEPTH: tl.constexpr = DEPTH_BYTES * 8 // left.dtype.element_ty.primitive_bitwidth
    e = tl.program_id(1)
    m, m_real = columns(tl.program_id(0) // BLOCKS, M, ROWS)
    n, n_real = columns(tl.program_id(0) % BLOCKS, N, COLS)
    begin, end = tl.load(start + e), tl.load(start + e + 1)
    sums = tl.zeros((ROWS, COLS), tl.float32)
    r = (begin + tl.arange(0, DEPTH)).to(tl.int64)
    l_next, r_next = _numbers(left_index, r, end), _numbers(right_index, r, end)
    for first in range(begin, end, DEPTH):
        r = (first + tl.arange(0, DEPTH)).to(tl.int64)
        live = r < end
        # Row numbers are read one turn ahead: waited for, they would take a stage of the tiles' pipeline.
        l_row, r_row = r if left_index is None else l_next, r if right_index is None else r_next
        l_next, r_next = _numbers(left_index, r + DEPTH, end), _numbers(right_index, r + DEPTH, end)
        l_tile = tl.load(left + l_row[None, :] * M + m[:, None], mask=live[None, :], other=0.0)
        r_tile = tl.load(right + r_row[:, None] * N + n[None, :], mask=live[:, None], other=0.0)
        sums = product(l_tile, r_tile, sums, PRECISION)
    to = out + e.to(tl.int64) * (M * N) + (m[:, None] * N + n[None, :])
    tl.store(to, sums.to(out.dtype.element_ty), mask=m_real[:, None] & n_real[None, :])


@triton.jit
def _numbers(index, r, end):
    return r if index is None else tl.load(index + r, mask=r < end, other=0)


def _set_blocks(**shapes: Any) -> Callable[..., None]:
    """Before a launch: the tile that each reader reads, from the configuration."""

    def hook(*args: Any, **kwargs: Any) -> None:
        depth = kwargs["DEPTH_BYTES"] // 2
        for name, shape in shapes.items():
            if kwargs[name] is not None:
                kwargs[name].block_shape = shape(kwargs, depth)

    return hook


def _matrix_block(kwargs: dict[str, Any], depth: int) -> list[int]:
    return [kwargs["COLS"], depth] if kwargs["W_K"] == 1 else [depth, kwargs["COLS"]]


up_projection.fn.add_pre_run_hook(_set_blocks(w_reader=lambda kwargs, depth: [kwargs["COLS"], depth]))
down_gradient.fn.add_pre_run_hook(_set_blocks(w_reader=lambda kwargs, depth: [depth, kwargs["COLS"]]))
rows_times_weights.fn.add_pre_run_hook(
    _set_blocks(a_reader=lambda kwargs, depth: [kwargs["TILE"], depth], w_reader=_matrix_block)
)
