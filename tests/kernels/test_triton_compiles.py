"""Every Triton kernel, in every configuration that tuning may choose, compiles for Hopper and Ampere without a GPU.

Held to: no register spills, shared memory within the chip's, and tensor-core instructions in the products, HGMMA on
Hopper and HMMA on Ampere; on Hopper shared memory for all stages of the pipeline, too. Compiled code is kept in
triton's cache, so a second run is quick.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("kernels that run in the interpreter are not compiled", allow_module_level=True)

from moe_kernels.gpu import products, sums, tiles  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Shared memory of a block, in bytes, and the product's instruction.
CHIPS = {90: (227 * 1024, "HGMMA"), 80: (163 * 1024, "HMMA")}
# An expert layer of the shape that SonicMoE calls 7B: 128 experts of width 256, in a model of width 1536.
E, F, D = 128, 256, 1536
PLACED = {"expert": "*i32", "row": "*i32", "start": "*i32", "rows_class": "i32"}
LAYER = {"E": E, "F": F, "D": D, "ACT": "swiglu", "GATED": True, "TILE": 128, "PRECISION": "ieee"}
BF16, I64, FP32 = "*bf16", "*i64", "*fp32"
WEIGHTS = {"E": E, "TILE": 128, "PRECISION": "ieee"}
UP = {"x": BF16, "index": I64, "w13": BF16, "s": FP32, "h": BF16, "a": BF16, **PLACED}
DOWN = {
    "dy": BF16,
    "index": I64,
    "w2": BF16,
    "s": FP32,
    "h": BF16,
    "a": BF16,
    "dh": BF16,
    "ds": FP32,
    "R": "i32",
} | PLACED
ROWS = {"a": BF16, "w": BF16, "out": BF16, **PLACED}
EXACT = {"PRECISION": "ieee"}
GRADIENT = {"left": BF16, "right": BF16, "out": BF16, "start": "*i32", "rows_class": "i32"}
# Shapes of what Hopper's copy engine reads, by reader: (of rows, of columns), in names of constants.
READERS = {"w_reader": ("COLS", "DEPTH"), "a_reader": ("TILE", "DEPTH")}
STACKED = {"w_reader": ("PARTS", "COLS", "DEPTH")}
TURNED = {"w_reader": ("DEPTH", "COLS"), "a_reader": ("TILE", "DEPTH")}
# Kernel, types of its pointers and numbers, its constants.
PRODUCTS: dict[str, tuple[Any, dict[str, str], dict[str, Any]]] = {
    "up": (products.up_projection, UP, LAYER),
    "up, gpt_oss": (products.up_projection, UP | {"b13": BF16}, LAYER | {"ACT": "gpt_oss"}),
    "up, relu2": (products.up_projection, UP, LAYER | {"ACT": "relu2", "GATED": False}),
    "down": (products.rows_times_weights, ROWS, WEIGHTS | {"N": D, "K": F, "W_N": F, "W_K": 1}),
    "input gradient": (products.rows_times_weights, ROWS, WEIGHTS | {"N": D, "K": 2 * F, "W_N": 1, "W_K": D}),
    "down gradient": (products.down_gradient, DOWN, LAYER),
    "down gradient, swiglu_clamped": (products.down_gradient, DOWN, LAYER | {"ACT": "swiglu_clamped"}),
    "down gradient, gpt_oss": (products.down_gradient, DOWN, LAYER | {"ACT": "gpt_oss"}),
    "w13 gradient": (products.weight_gradient, GRADIENT | {"right_index": I64}, EXACT | {"E": E, "M": 2 * F, "N": D}),
    "w13 gradient in float32": (
        products.weight_gradient,
        GRADIENT | {"right_index": I64, "out": FP32},
        EXACT | {"E": E, "M": 2 * F, "N": D},
    ),
    "w2 gradient": (products.weight_gradient, GRADIENT | {"left_index": I64}, EXACT | {"E": E, "M": D, "N": F}),
}
SUM = {"COLS": sums.TOKEN_COLUMNS}
OTHERS: dict[str, tuple[Any, dict[str, str], dict[str, Any]]] = {
    "place": (
        tiles._place,
        {"counts": I64, "expert_out": "*i32", "row_out": "*i32", "start_out": "*i32"}
        | {"R": "i32", "n_tiles": "i32", "E": "i32"},
        {"E_POW2": 1024, "TILE": 128},
    ),
    "sum of a token's rows": (
        sums.gather_sum_kernel,
        {"rows": BF16, "order": I64, "out": BF16},
        SUM | {"D": D, "K": 8},
    ),
    "sum of listed rows": (
        sums.gather_sum_kernel,
        {"rows": BF16, "order": I64, "start": I64, "out": BF16},
        SUM | {"D": D, "K": 0},
    ),
    "sum of an expert's rows": (
        sums.expert_sum_kernel,
        {"rows": BF16, "index": I64, "s": FP32, "out": BF16, "start": "*i32"},
        {"C": D, "ROWS": sums.ROWS, "COLS": sums.COLUMNS},
    ),
    "products of rows": (
        sums.row_product_kernel,
        {"rows": BF16, "index": I64, "vectors": BF16, "out": FP32, "expert": "*i32", "row": "*i32", "start": "*i32"},
        {"E": E, "D": D, "TILE": 128, "COLS": 64},
    ),
}


def compiled(
    kernel: Any,
    capability: int,
    types: dict[str, str],
    constants: dict[str, Any],
    warps: int = 4,
    stages: int = 3,
    divisible: str = "",
) -> Any:
    """The kernel for a chip. Arguments without type or value are None; pointers are multiples of 16, and ``divisible``
    if it is specialised."""
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    values = {name: constants.get(name) for name in names if name not in types}
    special = {parameter.name for parameter in kernel.params if not parameter.do_not_specialize} & {divisible}
    aligned = [i for i, name in enumerate(names) if types.get(name, "").startswith("*") or name in special]
    attrs: Any = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, values, attrs)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def dump(binary: Any, folder: Path, what: str) -> str:
    """What cuobjdump tells of it."""
    file = folder / "kernel.cubin"
    file.write_bytes(binary.asm["cubin"])
    command = [str(TOOLS / "cuobjdump"), what, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def usage_of(binary: Any, folder: Path) -> dict[str, int]:
    """Registers (REG), and bytes of spills (STACK, LOCAL)."""
    found = re.findall(r"(REG|STACK|LOCAL):(\d+)", dump(binary, folder, "--dump-resource-usage"))
    return {name: int(value) for name, value in found}


def instructions(binary: Any, folder: Path) -> str:
    return dump(binary, folder, "-sass")


# Kernel, chip, whether the copy engine reads; kernels that take no reader are the same either way.
READ = [
    (name, capability, read)
    for name, (kernel, *_) in PRODUCTS.items()
    for capability, read in ((90, True), (90, False), (80, False))
    if not read or "w_reader" in kernel.fn.arg_names
]


@pytest.mark.parametrize(("name", "capability", "read"), READ)
def test_products(name: str, capability: int, read: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, types, constants = PRODUCTS[name]
    memory, instruction = CHIPS[capability]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: divmod(capability, 10))
    turned = kernel is products.down_gradient or constants.get("W_N") == 1
    given = {"w_reader": read or None} if "w_reader" in kernel.fn.arg_names else {}
    for config in kernel.early_config_prune([], {"first": torch.empty(0, dtype=torch.bfloat16)}, **given):
        sizes = constants | config.kwargs
        parts = 2 if kernel is products.up_projection and sizes["GATED"] else 1  # gate and up
        shapes = (STACKED if kernel is products.up_projection else TURNED if turned else READERS) if read else {}
        readers = {
            reader: f"tensordesc<bf16[{', '.join(str({**sizes, 'DEPTH': 64, 'PARTS': parts}[n]) for n in shape)}]>"
            for reader, shape in shapes.items()
            if reader in kernel.fn.arg_names
        }
        binary = compiled(kernel.fn, capability, types | readers, sizes, config.num_warps, config.num_stages)
        usage, code = usage_of(binary, tmp_path), instructions(binary, tmp_path)
        assert usage["STACK"] == usage["LOCAL"] == 0, f"{config} spills: {usage}"
        assert binary.metadata.shared <= memory, f"{config} needs {binary.metadata.shared} bytes of shared memory"
        assert instruction in code, f"{config} makes its products without tensor cores"
        assert ("UTMALDG" in code) == bool(readers), f"{config}: is the copy engine used?"
        if capability == 90:
            numbers = 64 * (sizes.get("TILE", sizes.get("ROWS")) + sizes["COLS"] * parts)
            # Where the assembler cannot see that the accumulators are left alone, it waits at each instruction.
            assert 2 * code.count("WARPGROUP.ARRIVE") <= code.count("HGMMA"), f"{config}: products wait for each other"
            assert binary.metadata.shared >= 2 * numbers * config.num_stages, f"{config}: not all stages are used"


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_fit_blackwell_without_hbm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute capability 12 has a copy engine, but shared memory as Ada. Tuning leaves what does not fit."""
    kernel, types, constants = PRODUCTS[name]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (12, 0))
    given = {"w_reader": True} if "w_reader" in kernel.fn.arg_names else {}
    configs = kernel.early_config_prune([], {"first": torch.empty(0, dtype=torch.bfloat16)}, **given)
    made = (compiled(kernel.fn, 120, types, constants | c.kwargs, c.num_warps, c.num_stages) for c in configs)
    assert any(binary.metadata.shared <= 99 * 1024 for binary in made)


@pytest.mark.parametrize("capability", CHIPS)
@pytest.mark.parametrize("name", ["up", "down", "input gradient", "down gradient", "w13 gradient", "w2 gradient"])
def test_exact_products_of_float32(name: str, capability: int, tmp_path: Path) -> None:
    kernel, types, constants = PRODUCTS[name]
    types = {argument: FP32 if kind == BF16 else kind for argument, kind in types.items()}
    (config,) = kernel.early_config_prune([], {"first": torch.empty(0)})
    binary = compiled(kernel.fn, capability, types, constants | config.kwargs, config.num_warps, config.num_stages)
    usage = usage_of(binary, tmp_path)
    assert usage["STACK"] == usage["LOCAL"] == 0, f"spills: {usage}"


@pytest.mark.parametrize("capability", CHIPS)
@pytest.mark.parametrize("name", OTHERS)
def test_other_kernels(name: str, capability: int, tmp_path: Path) -> None:
    kernel, types, constants = OTHERS[name]
    usage = usage_of(compiled(kernel, capability, types, constants), tmp_path)
    assert usage["STACK"] == usage["LOCAL"] == 0, f"spills: {usage}"
