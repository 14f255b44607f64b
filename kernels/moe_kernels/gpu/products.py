"""The matrix products of an expert layer in Triton, after SonicMoE (arXiv 2512.14080, section 4).

Inputs are gathered while they are loaded, sums are float32, and what follows a product is done on its tile: so neither
gathered rows nor an activation's gradient are ever written. Nothing is added up by atomics. Sizes are compiled in;
those that are no multiple of a tile, or of 16 bytes, work too, slower. What is not gathered is read by Hopper's copy
engine where a reader (``tiles.matrix_reader``) is given.
"""
# mypy: allow-untyped-defs

import functools
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from moe_kernels.gpu.activation import act, act_slopes
from moe_kernels.gpu.tiles import COLUMNS, columns, config, load_depth, product, rows_of_tile, tile_at, tuned

_COLUMNS: tl.constexpr = tl.constexpr(COLUMNS)
# PER_SM: so many programs for each multiprocessor compute one block after the other, and the next one's operands are
# read while this one's results are written; 0: there is a program for each block.
_blocks = functools.partial(config, PER_SM=0)


@tuned(
    key=["F", "D"],
    hopper=[
        _blocks(128, 8, 4, PER_SM=1),
        _blocks(128, 8, 3, PER_SM=1),
        _blocks(64, 4, 3, PER_SM=2),
        _blocks(128, 8, 4),
    ],
    plain=[_blocks(64, 8, 3), _blocks(64, 8, 4)],
    float32=_blocks(64, 8, 2, DEPTH_BYTES=64),
)
@triton.jit(do_not_specialize=["rows_class"])
def up_projection(
    x, index, w13, w_reader, b13, s, h, a, expert, row, start, rows_class,
    E: tl.constexpr, F: tl.constexpr, D: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr, COLS: tl.constexpr, DEPTH_BYTES: tl.constexpr, PER_SM: tl.constexpr,
):  # fmt: skip
    """h_RnF = x[index] W13^T + b13 and a_RF = s * act(h)."""
    BLOCKS: tl.constexpr = (F + COLS - 1) // COLS
    PARTS: tl.constexpr = 2 if GATED else 1
    n_F: tl.constexpr = PARTS * F
    UP: tl.constexpr = n_F - F  # where the part that is called up begins
    DEPTH: tl.constexpr = DEPTH_BYTES * 8 // x.dtype.element_ty.primitive_bitwidth
    STEPS: tl.constexpr = (D + DEPTH - 1) // DEPTH
    step, depth = tl.arange(0, TILE), tl.arange(0, DEPTH)
    tiles = tl.load(start + E + 2)
    i, apart = tl.program_id(0), tl.num_programs(0)
    e, first, end = tile_at(expert, row, start, i // BLOCKS, tiles)
    ahead = _sources(index, first + step, end)
    sums = tl.zeros((TILE, PARTS * COLS), tl.float32)
    k = 0
    for _ in range(0, tl.cdiv(tl.maximum(tiles * BLOCKS - i, 0), apart) * STEPS):
        # One loop over blocks and their depths, that the reads of the next block be under way at the end of this one;
        # row numbers are read one turn ahead: waited for, they would take a stage of the tiles' pipeline. Gate and up
        # are columns of one product: of two, each instruction for the tensor cores would wait for the one before.
        source, done = ahead, k + DEPTH >= D
        next_i = tl.where(done, i + apart, i)
        next_e, next_first, next_end = tile_at(expert, row, start, next_i // BLOCKS, tiles)
        ahead = _sources(index, next_first + step, next_end)
        block = i % BLOCKS
        x_tile = load_depth(x + source[:, None] * D + (k + depth)[None, :], k, D, DEPTH, 1)
        if w_reader is None:
            part, c = tl.arange(0, PARTS * COLS) // COLS, block * COLS + tl.arange(0, PARTS * COLS) % COLS
            w_off = (part * F + tl.where(c < F, c, 0))[None, :] * D + depth[:, None]
            w_tile = load_depth(w13 + e.to(tl.int64) * (n_F * D) + k + w_off, k, D, DEPTH, 0)
        else:
            w_tile = tl.reshape(w_reader.load([e * PARTS, block * COLS, k]), (PARTS * COLS, DEPTH)).T
        sums = product(x_tile, w_tile, sums, PRECISION)
        k += DEPTH
        if done:
            if GATED:
                gate, up = _halves(sums, TILE, 2 * COLS)
            else:
                gate, up = sums, sums
            n, real = columns(block, F, COLS)
            live = first + step < end
            mask = live[:, None] & real[None, :]
            base = first.to(tl.int64)
            to = step[:, None] * n_F + n[None, :]
            if b13 is not None:
                bias = b13 + e.to(tl.int64) * n_F + n
                up += tl.load(bias + UP).to(tl.float32)[None, :]
                if GATED:
                    gate += tl.load(bias).to(tl.float32)[None, :]
            # The activation is that of the rounded h, which backward will see.
            rounded_up, rounded_gate = up.to(h.dtype.element_ty), gate.to(h.dtype.element_ty)
            tl.store(h + base * n_F + UP + to, rounded_up, mask=mask)
            if GATED:
                tl.store(h + base * n_F + to, rounded_gate, mask=mask)
            value = act(rounded_gate.to(tl.float32), rounded_up.to(tl.float32), ACT, GATED)
            if s is not None:
                value *= tl.load(s + base + step, mask=live, other=0.0).to(tl.float32)[:, None]
            tl.store(a + base * F + step[:, None] * F + n[None, :], value.to(a.dtype.element_ty), mask=mask)
            sums = tl.zeros((TILE, PARTS * COLS), tl.float32)
            k = 0
        i, e, first, end = next_i, next_e, next_first, next_end


@triton.jit
def _sources(index, r, end):
    """What rows ``r`` of an expert are copies of, or they themselves; 0 for those from ``end`` on."""
    if index is None:
        return tl.where(r < end, r, 0).to(tl.int64)
    else:
        return tl.load(index + r, mask=r < end, other=0)


@tuned(
    key=["N", "K"],
    hopper=[
        _blocks(256, 8, 4, PER_SM=1),
        _blocks(256, 8, 3, PER_SM=1),
        _blocks(128, 4, 3, PER_SM=2),
        _blocks(256, 8, 3),
    ],
    plain=[_blocks(128, 8, 3), _blocks(128, 8, 4)],
    float32=_blocks(64, 8, 2, DEPTH_BYTES=64),
)
@triton.jit(do_not_specialize=["rows_class"])
def rows_times_weights(
    a, a_reader, w, w_reader, bias, s, out, expert, row, start, rows_class,
    E: tl.constexpr, N: tl.constexpr, K: tl.constexpr, W_N: tl.constexpr, W_K: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr, COLS: tl.constexpr, DEPTH_BYTES: tl.constexpr, PER_SM: tl.constexpr,
):  # fmt: skip
    """out_RN = a_RK W^T + s * bias; of an expert's matrix, entry (n, k) is n * W_N + k * W_K from its first. Zeros in
    rows without expert. Both readers are given, or none."""
    BLOCKS: tl.constexpr = tl.cdiv(N, COLS)
    DEPTH: tl.constexpr = DEPTH_BYTES * 8 // a.dtype.element_ty.primitive_bitwidth
    depth = tl.arange(0, DEPTH)
    end = tl.load(start + E + 3) * BLOCKS
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
    hopper=[_blocks(256, 8, 3, PER_SM=1), _blocks(128, 8, 4, PER_SM=1), _blocks(256, 8, 3)],
    plain=[_blocks(64, 8, 3), _blocks(64, 8, 4)],
    float32=_blocks(64, 8, 2, DEPTH_BYTES=64),
)
@triton.jit(do_not_specialize=["rows_class", "R"])
def down_gradient(
    dy, index, w2, w_reader, s, h, a, dh, ds, expert, row, start, rows_class, R,
    E: tl.constexpr, F: tl.constexpr, D: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr, COLS: tl.constexpr, DEPTH_BYTES: tl.constexpr, PER_SM: tl.constexpr,
):  # fmt: skip
    """From da = dy[index] W2: dh_RnF; a_RF = s * act(h) once more, for W2's gradient; and where s is given, ds, whose
    entries (i, r), one for each ``COLUMNS`` columns, sum to <da_r, act(h_r)>. Rows without expert are left as they are.
    """
    BLOCKS: tl.constexpr = (F + COLS - 1) // COLS
    n_F: tl.constexpr = 2 * F if GATED else F
    DEPTH: tl.constexpr = DEPTH_BYTES * 8 // dy.dtype.element_ty.primitive_bitwidth
    STEPS: tl.constexpr = (D + DEPTH - 1) // DEPTH
    step, depth = tl.arange(0, TILE), tl.arange(0, DEPTH)
    tiles = tl.load(start + E + 2)
    i, apart = tl.program_id(0), tl.num_programs(0)
    e, first, end = tile_at(expert, row, start, i // BLOCKS, tiles)
    ahead = _sources(index, first + step, end)
    da = tl.zeros((TILE, COLS), tl.float32)
    k = 0
    for _ in range(0, tl.cdiv(tl.maximum(tiles * BLOCKS - i, 0), apart) * STEPS):  # as in ``up_projection``
        source, done = ahead, k + DEPTH >= D
        next_i = tl.where(done, i + apart, i)
        next_e, next_first, next_end = tile_at(expert, row, start, next_i // BLOCKS, tiles)
        ahead = _sources(index, next_first + step, next_end)
        block = i % BLOCKS
        dy_tile = load_depth(dy + source[:, None] * D + (k + depth)[None, :], k, D, DEPTH, 1)
        if w_reader is None:
            n, _real = columns(block, F, COLS)
            w_off = n[None, :] + depth[:, None] * F
            w_tile = load_depth(w2 + e.to(tl.int64) * (D * F) + k * F + w_off, k, D, DEPTH, 0)
        else:
            w_tile = w_reader.load([e * D + k, block * COLS])
        da = product(dy_tile, w_tile, da, PRECISION)
        k += DEPTH
        if done:
            live = first + step < end
            at, base = tl.where(live, step, 0), first.to(tl.int64)
            weight = tl.full((TILE,), 1.0, tl.float32) if s is None else tl.load(s + base + at).to(tl.float32)
            own_h, own_a, own_dh = h + base * n_F, a + base * F, dh + base * n_F
            own_ds = None if s is None else ds + base
            column = block * COLS
            _down_columns(da, weight, own_h, own_a, own_dh, own_ds, at, live, column, R, F, ACT, GATED, TILE, COLS)
            da = tl.zeros((TILE, COLS), tl.float32)
            k = 0
        i, e, first, end = next_i, next_e, next_first, next_end


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A tile's left and right columns."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLS // 2)), (0, 2, 1)))


@triton.jit
def _down_columns(
    da, weight, h, a, dh, ds, step, live, column, R,
    F: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, TILE: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """``_down_part``, at most 32 columns at a time: the values of a whole tile at once do not fit the registers. Every
    ``COLUMNS`` columns' share goes to its own slot of ds, so that sums do not depend on what tuning chose."""
    HALF: tl.constexpr = COLS // 2
    if COLS > _COLUMNS:
        left, right = _halves(da, TILE, COLS)
        _down_columns(left, weight, h, a, dh, ds, step, live, column, R, F, ACT, GATED, TILE, HALF)
        _down_columns(right, weight, h, a, dh, ds, step, live, column + HALF, R, F, ACT, GATED, TILE, HALF)
    else:
        if COLS > 32:
            left, right = _halves(da, TILE, COLS)
            share = _down_part(left, weight, h, a, dh, step, live, column, F, ACT, GATED, HALF)
            share += _down_part(right, weight, h, a, dh, step, live, column + HALF, F, ACT, GATED, HALF)
        else:
            share = _down_part(da, weight, h, a, dh, step, live, column, F, ACT, GATED, COLS)
        if ds is not None:
            slot = (column // _COLUMNS).to(tl.int64)
            tl.store(ds + slot * R + step, share, mask=live & (slot < tl.cdiv(F, _COLUMNS)))


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


@tuned(
    key=["M", "N"],
    hopper=[
        _blocks(128, 4, 3, PER_SM=2, ROWS=128),
        _blocks(256, 8, 3, PER_SM=1, ROWS=128),
        _blocks(256, 8, 4, PER_SM=1, ROWS=128),
        _blocks(128, 4, 3, ROWS=128),
    ],
    plain=[_blocks(128, 8, 3, ROWS=128), _blocks(128, 4, 4, ROWS=64)],
    float32=_blocks(64, 8, 2, DEPTH_BYTES=64, ROWS=64),
)
@triton.jit(do_not_specialize=["rows_class"])
def weight_gradient(
    left, left_index, right, right_index, out, start, rows_class,
    E: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
    COLS: tl.constexpr, DEPTH_BYTES: tl.constexpr, PER_SM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out_eMN: of each expert, the sum over its rows r of left[left_index[r]] (M,) times right[right_index[r]] (N,)."""
    BLOCKS: tl.constexpr = (N + COLS - 1) // COLS
    EACH: tl.constexpr = (M + ROWS - 1) // ROWS * BLOCKS  # blocks of an expert
    DEPTH: tl.constexpr = DEPTH_BYTES * 8 // left.dtype.element_ty.primitive_bitwidth
    depth = tl.arange(0, DEPTH)
    i, apart = tl.program_id(0), tl.num_programs(0)
    turns = 0
    for j in range(i, E * EACH, apart):
        rows = tl.load(start + j // EACH + 1) - tl.load(start + j // EACH)
        turns += tl.maximum(tl.cdiv(rows, DEPTH), 1)  # an expert without rows: zeros
    first, end = tl.load(start + i // EACH), tl.load(start + i // EACH + 1)
    l_next, r_next = _sources(left_index, first + depth, end), _sources(right_index, first + depth, end)
    sums = tl.zeros((ROWS, COLS), tl.float32)
    for _ in range(0, turns):  # as in ``up_projection``
        r = first + depth
        live, done = r < end, first + DEPTH >= end
        next_i = tl.where(done, i + apart, i)
        e = tl.minimum(next_i, E * EACH - 1) // EACH
        next_first, next_end = tl.where(done, tl.load(start + e), first + DEPTH), tl.load(start + e + 1)
        l_row, r_row = l_next, r_next
        l_next = _sources(left_index, next_first + depth, next_end)
        r_next = _sources(right_index, next_first + depth, next_end)
        m, m_real = columns(i % EACH // BLOCKS, M, ROWS)
        n, _ = columns(i % BLOCKS, N, COLS)
        l_tile = tl.load(left + l_row[None, :] * M + m[:, None], mask=live[None, :], other=0.0)
        r_tile = tl.load(right + r_row[:, None] * N + n[None, :], mask=live[:, None], other=0.0)
        sums = product(l_tile, r_tile, sums, PRECISION)
        if done:
            to = out + (i // EACH).to(tl.int64) * (M * N) + m[:, None] * N
            _store_columns(to, sums, m_real, i % BLOCKS * COLS, N, ROWS, COLS)
            sums = tl.zeros((ROWS, COLS), tl.float32)
        i, first, end = next_i, next_first, next_end


@triton.jit
def _store_columns(to, tile, m_real, column, N: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Store a tile at ``to``, its rows, from ``column`` on: by 64 columns, since what passes from one thread to another
    on the way takes shared memory."""
    if COLS <= 64:
        n = column + tl.arange(0, COLS)
        mask = m_real[:, None] & (n < N)[None, :]
        tl.store(to + n[None, :], tile.to(to.dtype.element_ty), mask=mask)
    else:
        left, right = _halves(tile, ROWS, COLS)
        HALF: tl.constexpr = COLS // 2
        _store_columns(to, left, m_real, column, N, ROWS, HALF)
        _store_columns(to, right, m_real, column + HALF, N, ROWS, HALF)


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


up_projection.fn.add_pre_run_hook(
    _set_blocks(w_reader=lambda kwargs, depth: [2 if kwargs["GATED"] else 1, kwargs["COLS"], depth])
)
down_gradient.fn.add_pre_run_hook(_set_blocks(w_reader=lambda kwargs, depth: [depth, kwargs["COLS"]]))
rows_times_weights.fn.add_pre_run_hook(
    _set_blocks(a_reader=lambda kwargs, depth: [kwargs["TILE"], depth], w_reader=_matrix_block)
)
