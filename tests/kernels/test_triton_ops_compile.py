"""The kernels of the ops beside the expert layer compile for Hopper and Ampere, spill nothing, and fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("kernels that run in the interpreter are not compiled", allow_module_level=True)

from moe_kernels.gpu import norm  # noqa: E402

from tests.kernels.test_triton_compiles import BF16, CHIPS, FP32, compiled, machine_code  # noqa: E402

NORM = {"x": BF16, "weight": BF16, "rstd": FP32, "N": "i32", "offset": "fp32"}
NORM_FORWARD = NORM | {"y": BF16, "eps": "fp32"}
NORM_BACKWARD = NORM | {"g": BF16, "dx": BF16, "parts": FP32, "EACH": "i32"}
# Kernel, types of its pointers and numbers, its constants and warps.
KERNELS: dict[str, tuple[Any, dict[str, str], dict[str, Any]]] = {
    **{f"norm of {D}": (norm.rms_norm_forward_kernel, NORM_FORWARD, norm.launch(D)) for D in (64, 1536, 8192)},
    **{
        f"norm's gradient of {D}": (norm.rms_norm_backward_kernel, NORM_BACKWARD, norm.launch(D))
        for D in (64, 1536, 8192)
    },
}


@pytest.mark.parametrize("capability", CHIPS)
@pytest.mark.parametrize("name", KERNELS)
def test_compiles(name: str, capability: int, tmp_path: Path) -> None:
    kernel, types, constants = KERNELS[name]
    binary = compiled(kernel, capability, types, constants, constants.get("num_warps", 4))
    usage, _ = machine_code(binary, tmp_path)
    assert usage["STACK"] == usage["LOCAL"] == 0, f"spills: {usage}"
    assert binary.metadata.shared <= CHIPS[capability][0]
