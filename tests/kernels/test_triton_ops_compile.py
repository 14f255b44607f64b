"""The kernels of the ops beside the expert layer compile for Hopper and Ampere, spill nothing, and fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("kernels that run in the interpreter are not compiled", allow_module_level=True)

from moe_kernels.gpu import loss, norm, permute, rotary, router, sums  # noqa: E402

from tests.kernels.test_triton_compiles import BF16, CHIPS, FP32, I64, compiled, instructions, usage_of  # noqa: E402

NORM = {"x": BF16, "weight": BF16, "rstd": FP32, "N": "i32", "offset": "fp32"}
NORM_FORWARD = NORM | {"y": BF16, "eps": "fp32"}
NORM_BACKWARD = NORM | {"g": BF16, "dx": BF16, "parts": FP32, "EACH": "i32"}
CHOICE = {"logits": FP32, "bias": FP32, "weights": FP32, "ids": I64, "counts": "*i32"}
CHOICE |= {"T": "i32", "EACH": "i32", "scale": "fp32"}
CHOICE_BACKWARD = {"logits": FP32, "ids": I64, "dweights": FP32, "dscores": FP32, "dlogits": FP32}
CHOICE_BACKWARD |= {"T": "i32", "scale": "fp32"}
# E, k, groups, top_groups, whether a group counts as its best two, softmax, renormalize
ROUTERS: dict[str, tuple[int, int, int, int, bool, bool, bool]] = {
    "Qwen3": (128, 8, 1, 1, True, True, True),
    "DeepSeek-V3": (256, 8, 8, 4, True, False, True),
    "DeepSeek-V2": (160, 6, 8, 3, False, True, False),
    "the widest": (1024, 16, 1, 1, True, True, True),
}
# Kernel, types of its pointers and numbers, its constants and warps.
KERNELS: dict[str, tuple[Any, dict[str, str], dict[str, Any]]] = {}
for D in (64, 1536, 8192):
    KERNELS[f"norm of {D}"] = norm.rms_norm_forward_kernel, NORM_FORWARD, norm.launch(D)
    KERNELS[f"norm of {D}, backward"] = norm.rms_norm_backward_kernel, NORM_BACKWARD, norm.launch(D)
for name, sizes in ROUTERS.items():
    E, k, *_, softmax, renormalize = sizes
    types = CHOICE | ({"scores": FP32} if name == "the widest" else {})
    KERNELS[f"router of {name}"] = router.router_topk_kernel, types, router.launch(*sizes)
    constants = router.launch_backward(E, k, softmax, renormalize)
    KERNELS[f"router of {name}, backward"] = router.router_topk_backward_kernel, CHOICE_BACKWARD, constants
LOSS = {"logits": BF16, "targets": I64, "above": FP32, "losses": FP32, "V": "i32"}
for V in (37, 151936):
    KERNELS[f"softmax of {V}"] = loss.softmax_kernel, LOSS, loss.launch(V)
TURN = {"x": BF16, "cos": BF16, "sin": BF16, "out": BF16, "ROWS": "i32"}
for interleaved, back in ((False, False), (True, False), (True, True)):
    for H, D, half in ((32, 128, 64), (3, 80, 20)):
        what = f"rope of {H} heads of {D}, interleaved={interleaved}, back={back}"
        KERNELS[what] = rotary.turn_kernel, TURN, rotary.launch(H, D, half, interleaved, back)
COPY = {"x": BF16, "assignment": I64, "out": BF16, "R": "i32"}
COPY_SIZES = {"D": 1536, "K": 8, "ROWS": permute.ROWS, "COLS": permute.COLUMNS}
SUM_SIZES = {"D": 1536, "K": 8, "COLS": sums.TOKEN_COLUMNS}
KERNELS |= {
    "copies of rows": (permute.copy_rows_kernel, COPY, COPY_SIZES),
    "weighted sum, backward": (
        permute.copy_rows_kernel, COPY | {"weights": FP32, "y": BF16, "dots": FP32}, COPY_SIZES,
    ),
    "weighted sum": (
        sums.gather_sum_kernel, {"rows": BF16, "order": I64, "weights": FP32, "out": BF16}, SUM_SIZES,
    ),
}  # fmt: skip


@pytest.mark.parametrize("capability", CHIPS)
@pytest.mark.parametrize("name", KERNELS)
def test_compiles(name: str, capability: int, tmp_path: Path) -> None:
    kernel, types, constants = KERNELS[name]
    binary = compiled(kernel, capability, types, constants, constants.get("num_warps", 4))
    usage = usage_of(binary, tmp_path)
    assert usage["STACK"] == usage["LOCAL"] == 0, f"spills: {usage}"
    assert binary.metadata.shared <= CHIPS[capability][0]


def test_the_loss_reads_sixteen_bytes_at_a_time(tmp_path: Path) -> None:
    """Of a vocabulary that 16 divides."""
    kernel, types, constants = KERNELS["softmax of 151936"]
    binary = compiled(kernel, 90, types, constants, constants["num_warps"], divisible="V")
    usage, code = usage_of(binary, tmp_path), instructions(binary, tmp_path)
    assert usage["STACK"] == usage["LOCAL"] == 0, f"spills: {usage}"
    assert "LDG.E.128" in code and "STG.E.128" in code and "STG.E.U16" not in code


def test_rope_reads_and_writes_neighbours_together(tmp_path: Path) -> None:
    for interleaved, back in ((False, False), (True, False), (True, True)):
        kernel, types, constants = KERNELS[f"rope of 32 heads of 128, interleaved={interleaved}, back={back}"]
        code = instructions(compiled(kernel, 90, types, constants), tmp_path)
        assert "LDG.E.128" in code and "STG.E.128" in code and not re.search(r"(LDG|STG)\.E\.U16", code)


def test_what_no_program_holds_is_refused() -> None:
    with pytest.raises(ValueError, match="takes rows up to 8192 wide, not 9000; use 'auto' or 'torch'"):
        norm.launch(9000)
    for E, k, groups in ((4096, 8, 1), (64, 17, 1), (1300, 4, 10)):
        with pytest.raises(ValueError, match=f"not k={k} of {groups} groups of {E // groups}; use 'auto' or 'torch'"):
            router.launch(E, k, groups, min(2, groups), True, True, True)
