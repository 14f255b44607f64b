"""Every FP8 kernel compiles for Hopper without a GPU: no spills, and QGMMA, its FP8 tensor-core instruction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("kernels that run in the interpreter are not compiled", allow_module_level=True)

from moe_kernels.gpu import fp8  # noqa: E402

from tests.kernels.test_triton_compiles import (  # noqa: E402
    BF16,
    CHIPS,
    FP32,
    I64,
    PLACED,
    D,
    E,
    F,
    compiled,
    instructions,
    usage_of,
)

FP8 = "*fp8e4nv"
TILES = {name: PLACED[name] for name in ("expert", "row", "start")}
ROWS_BY = {"ROWS": fp8.ROWS, "TILE": fp8.TILE}
ROWS = {"a": FP8, "a_scale": FP32, "w": FP8, "w_scale": FP32, "out": BF16, **TILES}
GRADIENT = {"left": FP8, "left_scale": FP32, "right": FP8, "right_scale": FP32, "out": BF16, "start": "*i32"}
ACT = {"F": F, "ACT": "swiglu", "GATED": True, **ROWS_BY}
OUT = {"q": FP8, "scale": FP32}
ACT_GRADIENT = {"h": BF16, "da": BF16, "s": FP32, "a": BF16, "dh": BF16, "ds": FP32, "R": "i32", **OUT}
WARPS = {fp8.quantize_blocks_kernel: 8, fp8.activation_gradient_kernel: fp8.GRADIENT_WARPS}
Kernel = tuple[Any, dict[str, str], dict[str, Any]]


def product(N: int, K: int, PARTS: int, SUMMED: bool) -> dict[str, Any]:
    return {"E": E, "N": N, "K": K, "PARTS": PARTS, "SUMMED": SUMMED, "TILE": fp8.TILE}


# Kernel, types of its pointers and numbers, its constants; D = 1536 and F = 256 are whole tiles, 1504 and 240 are not.
PRODUCTS: dict[str, Kernel] = {
    "up": (fp8.fp8_rows_times_weights, ROWS | {"index": I64}, product(F, D, 2, False)),
    "up, bias, odd": (fp8.fp8_rows_times_weights, ROWS | {"index": I64, "bias": BF16}, product(240, 1504, 2, False)),
    "down": (fp8.fp8_rows_times_weights, ROWS, product(D, F, 1, False)),
    "down, bias": (fp8.fp8_rows_times_weights, ROWS | {"bias": BF16, "s": FP32}, product(D, F, 1, False)),
    "down gradient": (fp8.fp8_rows_times_weights, ROWS | {"index": I64}, product(F, D, 1, False)),
    "input gradient": (fp8.fp8_rows_times_weights, ROWS, product(D, F, 2, True)),
    "input gradient, odd": (fp8.fp8_rows_times_weights, ROWS, product(1504, 240, 2, True)),
    "w13 gradient": (fp8.fp8_weight_gradient, GRADIENT, {"E_POW2": E, "M": 2 * F, "N": D, "TILE": fp8.TILE}),
    "w2 gradient": (fp8.fp8_weight_gradient, GRADIENT, {"E_POW2": E, "M": D, "N": F, "TILE": fp8.TILE}),
}
OTHERS: dict[str, Kernel] = {
    "rows": (fp8.quantize_rows_kernel, {"x": BF16, "R": "i32", **OUT}, {"C": D, "POW2": True, **ROWS_BY}),
    "blocks": (fp8.quantize_blocks_kernel, {"w": BF16, **OUT}, {"A": F, "B": D, "TRANSPOSED": False, "TILE": fp8.TILE}),
    "transposed": (
        fp8.quantize_blocks_kernel,
        {"w": BF16, **OUT},
        {"A": F, "B": D, "TRANSPOSED": True, "TILE": fp8.TILE},
    ),
    "columns": (
        fp8.quantize_columns_kernel,
        {"rows": BF16, **OUT, **TILES},
        {"E": E, "C": D, "TILE": fp8.TILE, "COLUMNS": fp8.COLUMNS},
    ),
    "columns of gathered numbers": (
        fp8.quantize_columns_kernel,
        {"rows": FP8, "row_scale": FP32, "index": I64, **OUT, **TILES},
        {"E": E, "C": D, "TILE": fp8.TILE, "COLUMNS": fp8.COLUMNS},
    ),
    "activation": (fp8.activation_kernel, {"h": BF16, "s": FP32, "R": "i32", **OUT}, ACT),
    "activation gradient": (fp8.activation_gradient_kernel, ACT_GRADIENT, ACT),
    "activation gradient, swiglu_clamped": (
        fp8.activation_gradient_kernel,
        ACT_GRADIENT,
        ACT | {"F": 1024, "ACT": "swiglu_clamped"},
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str, tmp_path: Path) -> None:
    kernel, types, constants = PRODUCTS[name]
    binary = compiled(kernel, 90, types, constants, warps=8, stages=3)
    usage, code = usage_of(binary, tmp_path), instructions(binary, tmp_path)
    assert usage["STACK"] == usage["LOCAL"] == 0, f"spills: {usage}"
    assert binary.metadata.shared <= CHIPS[90][0], f"{binary.metadata.shared} bytes of shared memory"
    assert "QGMMA" in code


@pytest.mark.parametrize("rows", [BF16, FP32])
@pytest.mark.parametrize("name", OTHERS)
def test_other_kernels(name: str, rows: str, tmp_path: Path) -> None:
    kernel, types, constants = OTHERS[name]
    types = {argument: rows if kind == BF16 else kind for argument, kind in types.items()}
    usage = usage_of(compiled(kernel, 90, types, constants, WARPS.get(kernel, 4)), tmp_path)
    assert usage["STACK"] == usage["LOCAL"] == 0, f"spills: {usage}"
