"""How the ops beside the expert layer choose an implementation: by ``backend``, one of ``OP_BACKENDS``."""

from __future__ import annotations

from torch import Tensor

from moe_kernels.checks import check_one_device
from moe_kernels.gpu.available import triton_obstacle

OP_BACKENDS = ("auto", "torch", "triton")
# Ops whose Triton kernels were faster than torch's operators where both were timed on a GPU (docs/gpu-results.md); of
# sum_rows the kernel alone was timed, and reads at nearly the rate of the GPU's memory.
FASTER = {"linear_cross_entropy", "rope", "sum_rows"}


def takes_triton(op: str, backend: str, x: Tensor, *others: Tensor | None) -> bool:
    """Whether ``op`` runs its Triton kernels on ``x``: where they are asked for. "torch" is torch's own operators, or
    what is compiled for the CPU in their place. "auto" is "triton" on a GPU for the ops of ``FASTER``, else "torch".

    Raises:
        ValueError: the backend is unknown, or was forced and cannot run here; the other operands are not on x's device.
    """
    if backend not in OP_BACKENDS:
        raise ValueError(f"{op} has no backend {backend!r}; known: {', '.join(OP_BACKENDS)}")
    check_one_device(op, x, *others)
    if backend == "triton" and (reason := triton_obstacle(x.device, x.dtype)) is not None:
        raise ValueError(f"{op} cannot run on backend 'triton': {reason}; use 'auto' or 'torch'")
    faster = backend == "auto" and op in FASTER and x.device.type == "cuda"
    return backend == "triton" or (faster and triton_obstacle(x.device, x.dtype) is None)
