"""What the packages share: whether one is there and has a GPU that it runs on; experts and weights row by row."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from moe_kernels.operands import Operands, Setting


def obstacle_of(
    s: Setting, name: str, module: str, get: str, dtypes: tuple[torch.dtype, ...], least: tuple[int, int] = (8, 0)
) -> str | None:
    """Why the package ``name`` cannot run: no NVIDIA GPU of compute capability ``least``, a dtype that it does not
    take, or its ``module`` cannot be imported (``get``: how to install it). None where nothing of this holds."""
    if s.device.type != "cuda" or torch.version.hip is not None:
        return f"{name} needs an NVIDIA GPU"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(s.device) < least:
        return f"{name} needs a GPU of compute capability {least[0]}.{least[1]} or later"
    if s.dtype not in dtypes:
        return f"{name} does not take {str(s.dtype).removeprefix('torch.')}"
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module.split(".")[0]:
            return f"{name} is not installed ({get})"
        return f"{name} cannot be imported: {error}"
    except Exception as error:  # of a package made for another torch, anything
        return f"{name} cannot be imported: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None


def odd_size(s: Setting, name: str) -> str | None:
    """Why kernels that load 16 bytes of half-precision rows at a time cannot run, or None where they can."""
    for dimension, size in (("D", s.dim), ("F", s.expert_dim)):
        if size % 8:
            return f"{name} needs {dimension} to be a multiple of 8, and {dimension} is {size}"
    return None


def expert_of_row(o: Operands) -> Tensor:
    """expert_R: int64 (R,), ascending."""
    counts_e = torch.tensor(o.row_counts, device=o.x_ND.device)
    experts = torch.arange(len(counts_e), device=counts_e.device)
    return experts.repeat_interleave(counts_e, output_size=sum(o.row_counts))


def weight_of_row(o: Operands) -> Tensor:
    """weight_R, ones where there are no weights."""
    if o.weight_R is not None:
        return o.weight_R
    return o.x_ND.new_ones(len(o.x_ND if o.index_R is None else o.index_R))
