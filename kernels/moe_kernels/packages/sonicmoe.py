"""SonicMoE's own kernels (arXiv 2512.14080; PyPI sonic-moe), for Hopper and Blackwell. Backward keeps what the paths
"cpu" and "triton" keep."""

from __future__ import annotations

import importlib
import inspect

import torch
from torch import Tensor

from moe_kernels.operands import Operands, Setting
from moe_kernels.packages.common import expert_of_row, obstacle_of, odd_size, weight_of_row
from moe_kernels.reference import loop_expert_mlp

ACTIVATIONS = ("swiglu", "geglu")


def obstacle(s: Setting) -> str | None:
    """Why sonicmoe cannot run. Known from version 0.1.2 on, which takes weights as they are here: gate, then up."""
    if s.activation not in ACTIVATIONS:
        return f"sonicmoe has {' and '.join(ACTIVATIONS)}, not {s.activation}"
    get, dtypes = "pip install sonic-moe, on Python 3.12 or later", (torch.bfloat16, torch.float16)
    found = odd_size(s, "sonicmoe") or obstacle_of(s, "sonicmoe", "sonicmoe", get, dtypes, (9, 0))
    if found is None:
        call = importlib.import_module("sonicmoe").moe_general_routing_inputs
        if "concat_layout" not in inspect.signature(call).parameters:
            return "sonicmoe is older than 0.1.2 (pip install -U sonic-moe)"
    return found


def expert_mlp(o: Operands) -> Tensor:
    """``moe_kernels.expert_mlp`` through ``moe_general_routing_inputs``. y_RD (R, D), or with row_TK out_TD.

    It takes assignments in order of token, and sums each token's. Without row_TK every row is a token of its own. It
    has both biases or none: zeros stand for a missing one.
    """
    expert_R, weight_R = expert_of_row(o), weight_of_row(o)
    if len(expert_R) == 0:
        return loop_expert_mlp(o)
    if o.row_TK is None:
        x, expert_A, weight_A = o.rows(), expert_R, weight_R
        token_A = torch.arange(len(x), device=x.device)
    else:
        x, row_A = o.x_ND, o.row_TK.flatten()
        expert_A, weight_A = expert_R[row_A], weight_R[row_A]
        token_A = torch.arange(len(x), device=x.device).repeat_interleave(o.row_TK.shape[1])
    b13, b2 = o.b13, o.b2
    if b13 is not None or b2 is not None:
        b13 = o.w13.new_zeros(o.w13.shape[:3]) if b13 is None else b13
        b2 = o.w2.new_zeros(o.w2.shape[:2]) if b2 is None else b2
    activation = importlib.import_module("sonicmoe.enums").ActivationType(o.activation)
    out, _ = importlib.import_module("sonicmoe").moe_general_routing_inputs(
        x.contiguous(),
        weight_A,
        token_A.int(),
        expert_A.int(),
        o.w13.flatten(1, 2).contiguous().permute(1, 2, 0),  # (2 F, D, e) over memory of (e, 2 F, D)
        None if b13 is None else b13.flatten(1, 2),
        o.w2.contiguous().permute(1, 2, 0),  # (D, F, e)
        b2,
        len(o.w13),
        torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0,
        activation,
        is_inference_mode_enabled=False,
        concat_layout=True,
    )
    if out.requires_grad:
        out.register_hook(Tensor.contiguous)
    return out
