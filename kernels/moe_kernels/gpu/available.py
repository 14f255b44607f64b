"""Whether the Triton kernels can run, told without importing triton."""

from __future__ import annotations

import importlib.util
import os

import torch

from moe_kernels.uncompiled import constant

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@constant
def triton_obstacle(device: torch.device, dtype: torch.dtype, fp8: bool = False) -> str | None:
    """Why the Triton kernels (fp8: those in FP8) cannot run on ``device`` in ``dtype``, or None where they can.

    On the CPU they run in Triton's interpreter, for tests, where TRITON_INTERPRET=1 was set before they were imported.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in DTYPES:
        return f"the Triton kernels do not take {str(dtype).removeprefix('torch.')}"
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else "the Triton kernels need a GPU, and this is the CPU"
    if device.type == "cuda" and torch.version.hip is not None:
        return "the Triton kernels need an NVIDIA GPU"
    least = (9, 0) if fp8 else (8, 0)
    if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < least:
        what = "FP8 needs" if fp8 else "the Triton kernels need"
        return f"{what} a GPU of compute capability {least[0]}.{least[1]} or later"
    if device.type not in ("cuda", "meta"):  # on meta: its shapes, for a dry run
        return f"the Triton kernels do not run on {device.type}"
    return None
