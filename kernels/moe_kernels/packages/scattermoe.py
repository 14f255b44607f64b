"""ScatterMoE (arXiv 2403.08245; github.com/shawntan/scattermoe): Triton kernels that gather and scatter while they
multiply. Its backward makes grouped copies of x and of the output's gradient."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import Tensor

from moe_kernels.activation import activate
from moe_kernels.operands import Operands, Setting
from moe_kernels.packages.common import expert_of_row, obstacle_of, weight_of_row
from moe_kernels.reference import loop_expert_mlp

MODULE = "scattermoe.parallel_experts"
GET = "pip install git+https://github.com/shawntan/scattermoe"


def obstacle(s: Setting) -> str | None:
    """Why scattermoe cannot run. In float32 it may multiply in TF32, which other paths do only when told to."""
    found = obstacle_of(s, "scattermoe", MODULE, GET, (torch.bfloat16, torch.float16))
    if found is None and "padded_block_idxs" in inspect.signature(_linear()).parameters:
        return f"scattermoe is too old: its parallel_linear wants padded blocks ({GET})"
    return found


def _linear() -> Any:
    return importlib.import_module(MODULE).parallel_linear


def expert_mlp(o: Operands) -> Tensor:
    """``moe_kernels.expert_mlp`` through ``parallel_linear``. y_RD (R, D), or with row_TK out_TD.

    It numbers assignments by token: t K + k. ``sorted_scattered_idxs`` are those numbers in order of expert.
    """
    expert_R, linear = expert_of_row(o), _linear()
    if len(expert_R) == 0:
        return loop_expert_mlp(o)
    steps_R = torch.arange(len(expert_R), device=expert_R.device)
    offsets_e = torch.tensor(o.row_counts).cumsum(0).to(expert_R.device)
    w13, w2 = o.w13.flatten(1, 2).transpose(1, 2), o.w2.transpose(1, 2)  # (e, in, out)
    b13 = {} if o.b13 is None else {"expert_biases": o.b13.flatten(1, 2)}
    b2 = {} if o.b2 is None else {"expert_biases": o.b2}
    if o.row_TK is None:
        places = (expert_R, steps_R, offsets_e)
        h = linear(o.rows().contiguous(), w13, 1, *places, **b13, grouped_in=True, grouped_out=True)
        a_RF = activate(h.chunk(o.w13.shape[1], dim=-1), o.activation)
        return o.weighted(_contiguous_grad(linear(a_RF, w2, 1, *places, **b2, grouped_in=True, grouped_out=True)))
    scattered_R = torch.empty_like(steps_R).scatter_(0, o.row_TK.flatten(), steps_R)
    places = (expert_R, scattered_R, offsets_e)
    h = linear(o.x_ND.contiguous(), w13, o.row_TK.shape[1], *places, **b13, grouped_out=True)
    a_RF = activate(h.chunk(o.w13.shape[1], dim=-1), o.activation)
    gates_TK = weight_of_row(o)[o.row_TK].to(a_RF.dtype)
    return _contiguous_grad(linear(a_RF, w2, 1, *places, **b2, gates=gates_TK, grouped_in=True))


def _contiguous_grad(y: Tensor) -> Tensor:
    if y.requires_grad:
        y.register_hook(Tensor.contiguous)
    return y
