"""The grouped product of NVIDIA's Transformer Engine (PyPI transformer-engine), on cuBLAS, in several streams."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from moe_kernels.grouped import mlp_of_products
from moe_kernels.operands import Operands, Setting
from moe_kernels.packages.common import obstacle_of

MODULE = "transformer_engine.pytorch"


def obstacle(s: Setting) -> str | None:
    """Why Transformer Engine cannot run."""
    get, dtypes = "pip install transformer-engine[pytorch]", (torch.bfloat16, torch.float16, torch.float32)
    return obstacle_of(s, "transformer_engine", MODULE, get, dtypes)


@functools.lru_cache
def _module(kind: Any, e: int, inner: int, outer: int, dtype: torch.dtype) -> torch.nn.Module:
    """A GroupedLinear without memory: its weights are handed in at each call."""
    return kind(e, inner, outer, bias=False, params_dtype=dtype, device="meta")


def expert_mlp(o: Operands) -> Tensor:
    """``moe_kernels.expert_mlp`` through ``GroupedLinear``. y_RD (R, D), or with row_TK out_TD."""
    kind, counts = importlib.import_module(MODULE).GroupedLinear, o.row_counts

    def product(a: Tensor, w: Tensor) -> Tensor:
        e, outer, inner = w.shape
        matrices = {f"weight{expert}": matrix for expert, matrix in enumerate(w.unbind(0))}
        return torch.func.functional_call(_module(kind, e, inner, outer, w.dtype), matrices, (a, counts))

    return mlp_of_products(o, product)
