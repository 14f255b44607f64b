"""Experts through torch's grouped matrix product: one call for the rows of all experts, where torch has a kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.activation import activate
from moe_kernels.operands import Operands
from moe_kernels.reference import loop_expert_mlp


def grouped_mm_obstacle(
    device: torch.device, dtype: torch.dtype, dim: int, expert_dim: int, names: tuple[str, str] = ("D", "F")
) -> str | None:
    """Why torch's grouped product cannot run these experts, or None where it can.

    Row strides must be multiples of 16 bytes; the CPU kernel takes float32, bfloat16 and float16, CUDA's bfloat16.
    """
    if not hasattr(F, "grouped_mm") and not hasattr(torch, "_grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm"
    half = (torch.bfloat16,)
    takes = {"cpu": (torch.float32, *half, torch.float16), "cuda": half, "meta": half}.get(device.type, ())
    if dtype not in takes:
        return f"torch's grouped_mm does not take {str(dtype).removeprefix('torch.')} on {device.type}"
    multiple = 16 // dtype.itemsize
    for name, size in zip(names, (dim, expert_dim), strict=True):
        if size % multiple:
            return f"torch's grouped_mm needs {name} to be a multiple of {multiple} in this dtype, and {name} is {size}"
    return None


def grouped_expert_mlp(o: Operands) -> Tensor:
    """``moe_kernels.expert_mlp`` through ``torch.nn.functional.grouped_mm``. y_RD (R, D), or with row_TK out_TD."""
    o = o._replace(counts=torch.as_tensor(o.counts, device=o.x_ND.device))
    offsets_e = o.counts.cumsum(0).to(torch.int32)  # type: ignore[union-attr]
    return mlp_of_products(o, lambda a, w: torch_grouped_mm(a, w, offsets_e))


def torch_grouped_mm(x_RK: Tensor, w_eNK: Tensor, offsets_e: Tensor) -> Tensor:
    """torch's own: y_RN, each expert's rows times its matrix, transposed. offsets_e: int32, where each expert ends."""
    product = F.grouped_mm if hasattr(F, "grouped_mm") else torch._grouped_mm
    return product(x_RK, w_eNK.transpose(-2, -1), offs=offsets_e)


def mlp_of_products(o: Operands, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``moe_kernels.expert_mlp`` through a differentiable grouped product. y_RD (R, D), or with row_TK out_TD.

    product(a_RX, w_eYX) -> (R, Y): each expert's rows of a times its matrix, transposed. There is at least one row, and
    rows are contiguous.
    """
    rows_RD = o.rows().contiguous()
    if len(rows_RD) == 0:  # torch's backward refuses operands without rows
        return loop_expert_mlp(o)
    counts_e = torch.as_tensor(o.counts, device=rows_RD.device)
    h = product(rows_RD, o.w13.flatten(1, 2))
    if o.b13 is not None:
        h = h + _per_row(o.b13.flatten(1, 2), counts_e, len(rows_RD))
    a_RF = activate(h.chunk(o.w13.shape[1], dim=-1), o.activation)
    y_RD = product(a_RF.contiguous(), o.w2)
    if y_RD.requires_grad:
        # grouped_mm's backward refuses expanded gradients, such as that of y.sum().
        y_RD.register_hook(Tensor.contiguous)
    if o.b2 is not None:
        y_RD = y_RD + _per_row(o.b2, counts_e, len(rows_RD))
    return o.weighted(y_RD)


def _per_row(bias: Tensor, counts_e: Tensor, rows: int) -> Tensor:
    return bias.repeat_interleave(counts_e, dim=0, output_size=rows)
