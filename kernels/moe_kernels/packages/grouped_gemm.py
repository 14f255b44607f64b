"""The grouped product of MegaBlocks (arXiv 2211.15841; PyPI grouped_gemm), on CUTLASS."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from moe_kernels.grouped import mlp_of_products
from moe_kernels.operands import Operands, Setting
from moe_kernels.packages.common import obstacle_of, odd_size


def obstacle(s: Setting) -> str | None:
    """Why grouped_gemm cannot run."""
    name, get = "grouped_gemm", "pip install --no-build-isolation grouped_gemm"
    return odd_size(s, name) or obstacle_of(s, name, f"{name}.ops", get, (torch.bfloat16,))


def expert_mlp(o: Operands) -> Tensor:
    """``moe_kernels.expert_mlp`` through ``ops.gmm``. y_RD (R, D), or with row_TK out_TD.

    Batch sizes are int64, on the CPU. The weight gradient of an expert without rows is set to zero here: not every
    version of the package does.
    """
    gmm = importlib.import_module("grouped_gemm.ops").gmm
    sizes_e = torch.tensor(o.row_counts)
    empty = [expert for expert, n in enumerate(o.row_counts) if n == 0]

    def product(a: Tensor, w: Tensor) -> Tensor:
        w = w.contiguous().view_as(w)  # the hook must not stay on a parameter
        if empty and w.requires_grad:
            index = torch.tensor(empty, device=w.device)
            w.register_hook(lambda grad: grad.index_fill(0, index, 0))
        return gmm(a, w, sizes_e, trans_b=True)

    return mlp_of_products(o, product)
