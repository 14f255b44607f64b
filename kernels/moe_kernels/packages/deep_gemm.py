"""DeepGEMM's grouped products in bfloat16 (github.com/deepseek-ai/DeepGEMM), for Hopper and Blackwell. Rows of each
expert are padded to a multiple of its tile, in copies of all operands; weight gradients are float32 inside."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels.grouped import mlp_of_products
from moe_kernels.operands import Operands, Setting
from moe_kernels.packages.common import expert_of_row, obstacle_of, odd_size

GET = "clone github.com/deepseek-ai/DeepGEMM and run its install.sh"
KNOWN = ((2, 1), (2, 8))  # later ones number rows otherwise (prefix sums alone)


def obstacle(s: Setting) -> str | None:
    """Why DeepGEMM cannot run."""
    found = odd_size(s, "deep_gemm") or obstacle_of(s, "deep_gemm", "deep_gemm", GET, (torch.bfloat16,), (9, 0))
    if found is None:
        version = importlib.import_module("deep_gemm").__version__
        if not KNOWN[0] <= tuple(int(n) for n in version.split("+")[0].split(".")[:2]) <= KNOWN[1]:
            return f"deep_gemm is {version}, and 2.1 to 2.8 are known ({GET})"
    return found


class _Layout(NamedTuple):
    """ks: rows of each expert, padded; ks_e the same on the device, int32. place_R: where each row goes among the P of
    them. expert_P: int32, -1 for padding."""

    ks: list[int]
    ks_e: Tensor
    place_R: Tensor
    expert_P: Tensor

    def padded(self, rows: Tensor) -> Tensor:
        """rows (R, X) at their places, zeros elsewhere: (P, X)."""
        return rows.new_zeros(len(self.expert_P), rows.shape[1]).index_copy_(0, self.place_R, rows)


def _layout(o: Operands, tile: int) -> _Layout:
    expert_R, counts = expert_of_row(o), torch.tensor(o.row_counts)
    padded = -(-counts // tile) * tile
    shift_e = (padded.cumsum(0) - padded - (counts.cumsum(0) - counts)).to(expert_R.device)
    place_R = torch.arange(len(expert_R), device=expert_R.device) + shift_e[expert_R]
    ks = padded.tolist()
    expert_P = torch.full((sum(ks),), -1, dtype=torch.int32, device=expert_R.device)
    expert_P[place_R] = expert_R.int()
    return _Layout(ks, padded.int().to(expert_R.device), place_R, expert_P)


class _Product(torch.autograd.Function):
    """a_RX, w_eYX -> (R, Y)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, w: Tensor, layout: _Layout) -> Tensor:
        a_PX, y_PY = layout.padded(a), a.new_empty(len(layout.expert_P), w.shape[1])
        importlib.import_module("deep_gemm").m_grouped_bf16_gemm_nt_contiguous(a_PX, w, y_PY, layout.expert_P)
        ctx.save_for_backward(a, w)
        ctx.layout = layout
        return y_PY[layout.place_R]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        package, (a, w), layout = importlib.import_module("deep_gemm"), ctx.saved_tensors, ctx.layout
        dy_PY, da, dw = layout.padded(grads[0]), None, None
        if ctx.needs_input_grad[0]:
            da_PX = a.new_empty(len(dy_PY), a.shape[1])
            package.m_grouped_bf16_gemm_nn_contiguous(dy_PY, w, da_PX, layout.expert_P)
            da = da_PX[layout.place_R]
        if ctx.needs_input_grad[1]:
            sums = torch.zeros(w.shape, dtype=torch.float32, device=w.device)  # which the product is added to
            package.k_grouped_bf16_gemm_tn_contiguous(dy_PY, layout.padded(a), sums, layout.ks, layout.ks_e, sums)
            dw = sums.to(w.dtype)
        return da, dw, None


def expert_mlp(o: Operands) -> Tensor:
    """``moe_kernels.expert_mlp`` through ``m_grouped_bf16_gemm_*`` and ``k_grouped_bf16_gemm_tn_contiguous``.
    y_RD (R, D), or with row_TK out_TD."""
    layout = _layout(o, importlib.import_module("deep_gemm").get_mk_alignment_for_contiguous_layout())
    return mlp_of_products(o, lambda a, w: _Product.apply(a, w.contiguous(), layout))
