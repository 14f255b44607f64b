"""What ops ask of their tensors before compiled code gets them."""

from __future__ import annotations

import torch
from torch import Tensor


def check_counts(counts: list[int] | Tensor, e: int, R: int) -> None:
    """Raises ValueError unless counts are e integers; those of a list are 0 or more and sum to R."""
    if isinstance(counts, Tensor):
        if counts.shape != (e,) or counts.is_floating_point():
            raise ValueError(f"counts must be integers ({e},), not {counts.dtype} of shape {tuple(counts.shape)}")
    elif any(isinstance(count, float) for count in counts):
        raise ValueError("counts must be integers, not floats")
    elif len(counts) != e or any(count < 0 for count in counts) or sum(counts) != R:
        found = f"{len(counts)} that sum to {sum(counts)}"
        raise ValueError(f"counts must be {e} row numbers that sum to {R}, not {found}")


def check_one_device(op: str, *tensors: Tensor | None) -> None:
    """Raises ValueError where they are not all on one. Compiled code would read wherever their pointers lead."""
    first, *others = (tensor.device for tensor in tensors if tensor is not None)
    for device in others:
        if device != first:
            raise ValueError(f"{op}: tensors are on {first} and on {device}; bring them to one device")


def autocasts(device: torch.device) -> bool:
    """Whether torch.autocast is on. Then what an op makes of torch's operators runs without: it computes in the dtypes
    that it is given, as compiled code does."""
    return device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type)
