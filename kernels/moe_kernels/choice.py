"""How the ops beside the expert layer choose an implementation: by ``backend``, one of ``OP_BACKENDS``."""

from __future__ import annotations

from torch import Tensor

from moe_kernels.gpu.available import triton_obstacle

OP_BACKENDS = ("auto", "torch", "triton")


def takes_triton(op: str, backend: str, x: Tensor) -> bool:
    """Whether ``op`` runs its Triton kernels on ``x``: where they are asked for. "torch" is torch's own operators, or
    what is compiled for the CPU in their place. So is "auto", as long as nobody has timed these kernels on a GPU.

    Raises:
        ValueError: the backend is unknown, or was forced and cannot run here.
    """
    if backend not in OP_BACKENDS:
        raise ValueError(f"{op} has no backend {backend!r}; known: {', '.join(OP_BACKENDS)}")
    if backend == "triton" and (reason := triton_obstacle(x.device, x.dtype)) is not None:
        raise ValueError(f"{op} cannot run on backend 'triton': {reason}; use 'auto' or 'torch'")
    return backend == "triton"
