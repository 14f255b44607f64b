"""What the Triton kernels share: tiles of rows and their experts, made on the device, and how kernels are tuned.

Rows are grouped by expert, and a tile is up to ``TILE`` consecutive rows of one expert. The number of tiles depends on
the counts, which stay on the device; so grids are as large as the worst case needs, and programs of tiles that do not
exist do nothing. Rows past the sum of the counts form the group of an expert e, one past the last, of zero outputs.
"""
# mypy: allow-untyped-defs

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = triton.knobs.runtime.interpret
# Rows of a tile, as SonicMoE's (arXiv 2512.14080); in the interpreter so few that small tests have many tiles.
TILE = 16 if INTERPRETED else 128
# The fewest columns that a program computes; partial sums over columns have a slot for each so many.
COLUMNS = 16 if INTERPRETED else 64

_WIDEN: tl.constexpr = tl.constexpr(INTERPRETED)

# triton's own take several microseconds a call, 7% of what Python does for a layer's launches.
cdiv = functools.lru_cache(triton.cdiv)
next_power_of_2 = functools.lru_cache(triton.next_power_of_2)


def tuned(key: list[str], hopper: list[triton.Config], plain: list[triton.Config], float32: triton.Config):
    """Let triton time the chip's configurations once per ``key`` and class of rows per expert (``rows_class_of``), and
    keep the choice on disk: in triton's cache, beside the compiled kernels (TRITON_CACHE_DIR, or ~/.triton/cache).

    hopper: those of ``is_hopper``, where a kernel that takes a reader (``matrix_reader``) gets it; else plain ones.
    float32: the one for a first argument in float32. Exact products are unrolled without tensor cores: small ones only.
    """

    def of_this_call(_: object, args: dict[str, Any], **options: Any) -> list[triton.Config]:
        if next(iter(args.values())).dtype == torch.float32:
            return [float32]
        return hopper if is_hopper() and options.get("w_reader", True) is not None else plain

    return triton.autotune(
        configs=[config(COLUMNS, 4, 2, ROWS=TILE, DEPTH_BYTES=64, PER_SM=1)]
        if INTERPRETED
        else [*hopper, *plain, float32],
        key=[*key, "rows_class"],
        prune_configs_by={"early_config_prune": of_this_call},
        cache_results=True,
    )


def config(cols: int, warps: int, stages: int, **more: int) -> triton.Config:
    """A program that computes ``cols`` columns, and reads 128 bytes of the summed dimension at a time unless told."""
    return triton.Config({"COLS": cols, "DEPTH_BYTES": 128, **more}, num_warps=warps, num_stages=stages)


# The classes of rows that this process has tuned kernels for.
_classes: set[int] = set()


def rows_class_of(rows: int) -> int:
    """The power of two near the rows of an expert for which kernels are tuned: the nearest of those that were met
    before, in layers of any width, unless all are 16 times smaller or more. So kernels are tuned at the first call, by
    all ranks at once: one that did so in the middle of training, where its rows have changed, would let the others
    wait for seconds, and fail in a CUDA graph's capture."""
    wanted = next_power_of_2(max(1, rows))
    near = [known for known in _classes if wanted < 16 * known]
    if near:
        return min(near, key=lambda known: max(known, wanted) // min(known, wanted))
    _classes.add(wanted)
    return wanted


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return 3 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def is_hopper(device: torch.device | None = None) -> bool:
    """Whether a GPU (None: the current one) has a copy engine, and as much shared memory for a block as Hopper. Those
    of compute capability 12, Blackwell's without HBM, have 99 KiB, less than Hopper's configurations take."""
    return 9 <= torch.cuda.get_device_capability(device)[0] < 12


def has_copy_engine(device: torch.device) -> bool:
    return INTERPRETED or (device.type == "cuda" and is_hopper(device))


def matrix_reader(matrix: Tensor, depth: int) -> TensorDescriptor | None:
    """How Hopper's copy engine (TMA) reads tiles of a row-major matrix, of the stacked matrices of all experts, or of
    matrices (n, rows, columns) several at a time; None where it cannot. depth: the size of the dimension that is summed
    over. A tile's must divide it, since behind it comes the next expert's matrix. How large tiles are, a kernel's hook
    says before each launch.
    """
    multiple = 16 // matrix.element_size()
    fits = depth % (128 // matrix.element_size()) == 0 and matrix.shape[-1] % multiple == 0
    if matrix.dtype == torch.float32 or not fits or matrix.data_ptr() % 16 or matrix.numel() == 0:
        return None
    if not has_copy_engine(matrix.device):
        return None
    smallest = [*[1] * (matrix.ndim - 1), multiple]
    reader = TensorDescriptor(matrix, [*matrix.shape], [*matrix.stride()], smallest)
    reader.dtype = matrix.dtype  # dtypes are what triton's tuning tells arguments by: those read otherwise tune apart
    return reader


class Tiles(NamedTuple):
    """expert, row: each tile's expert and first row. start: (e + 4,) the first row of each expert, then the number of
    rows that have one, then R, then the number of tiles of rows that have one, then of all. int32, on the device.
    rows_class: ``rows_class_of``, for tuning.
    """

    expert: Tensor
    row: Tensor
    start: Tensor
    rows_class: int

    @property
    def experts(self) -> int:
        return len(self.start) - 4


@triton.jit(do_not_specialize=["R", "n_tiles"])
def _place(counts, expert_out, row_out, start_out, R, n_tiles, E, E_POW2: tl.constexpr, TILE: tl.constexpr):
    """Program i writes the tiles of expert i; the last one those of the rows without expert, and all surplus ones."""
    i = tl.program_id(0)
    ids = tl.arange(0, E_POW2)
    n_E = tl.maximum(tl.load(counts + ids, mask=ids < E, other=0), 0).to(tl.int32)
    tiles_E = (n_E + TILE - 1) // TILE
    first_row = tl.minimum(tl.sum(tl.where(ids < i, n_E, 0)), R)
    tile = tl.sum(tl.where(ids < i, tiles_E, 0))
    end = tl.minimum(tile + tl.sum(tl.where(ids == i, tiles_E, 0)), n_tiles)
    tl.store(start_out + i, first_row)
    if i == E:
        end = n_tiles
        tl.store(start_out + E + 1, R)
        tl.store(start_out + E + 2, tl.minimum(tile, n_tiles))
        tl.store(start_out + E + 3, tl.minimum(tile + (R - first_row + TILE - 1) // TILE, n_tiles))
    for t in range(tile, end, 128):
        steps = t + tl.arange(0, 128)
        rows = first_row + (steps - tile) * TILE
        tl.store(expert_out + steps, tl.where(rows < R, i, E), mask=steps < end)  # counts of more than R rows: none
        tl.store(row_out + steps, rows, mask=steps < end)


def place(counts_e: Tensor, R: int, tile: int = TILE) -> Tiles:
    """The tiles, of ``tile`` rows, of R rows, of which expert i has ``counts_e[i]``: integers on the device, that sum
    to R or less."""
    e = len(counts_e)
    n_tiles = R // tile + e + 1
    expert, row = (counts_e.new_empty(n_tiles, dtype=torch.int32) for _ in range(2))
    start = counts_e.new_empty(e + 4, dtype=torch.int32)
    _place[(e + 1,)](counts_e.contiguous(), expert, row, start, R, n_tiles, e, next_power_of_2(e), tile)
    return Tiles(expert, row, start, rows_class_of(R // e))


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b; the interpreter's products of bf16 are wrong, so there they are made in float32."""
    if _WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rows_of_tile(expert, row, start, tile, TILE: tl.constexpr):
    """(expert, first row, distances of the rows from it, which rows exist) of a tile. One that does not has distance 0.

    A tensor of rows is addressed as the first row's, a number of 64 bits, and offsets within the tile of 32 bits:
    offsets of 64 bits would take most registers.
    """
    e, first = tl.load(expert + tile).to(tl.int64), tl.load(row + tile)
    step = tl.arange(0, TILE)
    live = first + step < tl.load(start + e + 1)
    return e, first.to(tl.int64), tl.where(live, step, 0), live


@triton.jit
def tile_at(expert, row, start, tile, tiles):
    """(expert, first row, the row after the expert's last) of a tile of ``tiles``; any, past them."""
    tile = tl.where(tile < tiles, tile, 0)
    e = tl.load(expert + tile)
    return e, tl.load(row + tile), tl.load(start + e + 1)


@triton.jit
def columns(block, N: tl.constexpr, COLS: tl.constexpr):
    """(column numbers, which of them exist) of a block; those that do not are 0."""
    n = block * COLS + tl.arange(0, COLS)
    if N % COLS != 0:
        return tl.where(n < N, n, 0), n < N
    return n, n < N


@triton.jit
def load_depth(pointers, k, K: tl.constexpr, DEPTH: tl.constexpr, axis: tl.constexpr):
    """A tile of an operand whose ``axis`` runs along the summed dimension, from k on; zeros from K on."""
    if K % DEPTH == 0:
        return tl.load(pointers)
    return tl.load(pointers, mask=tl.expand_dims(k + tl.arange(0, DEPTH) < K, 1 - axis), other=0.0)
