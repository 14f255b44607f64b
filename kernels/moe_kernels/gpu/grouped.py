"""The grouped product's three passes in Triton; each is an operator of its own to torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.gpu.experts import run_rows_times_weights, run_weight_gradient
from moe_kernels.gpu.operator import operator
from moe_kernels.gpu.tiles import place
from moe_kernels.product import Passes


@operator("grouped_mm")
def _forward(x_RK: Tensor, w_eNK: Tensor, counts_e: Tensor) -> Tensor:
    _, N, K = w_eNK.shape
    return run_rows_times_weights(x_RK, w_eNK, place(counts_e, len(x_RK)), N, (K, 1))


@_forward.register_fake
def _(x_RK: Tensor, w_eNK: Tensor, counts_e: Tensor) -> Tensor:
    return x_RK.new_empty(len(x_RK), w_eNK.shape[1])


@operator("grouped_mm_input")
def _input(dy_RN: Tensor, w_eNK: Tensor, counts_e: Tensor) -> Tensor:
    K = w_eNK.shape[2]
    return run_rows_times_weights(dy_RN, w_eNK, place(counts_e, len(dy_RN)), K, (1, K))


@_input.register_fake
def _(dy_RN: Tensor, w_eNK: Tensor, counts_e: Tensor) -> Tensor:
    return dy_RN.new_empty(len(dy_RN), w_eNK.shape[2])


@operator("grouped_mm_weights")
def _weights(dy_RN: Tensor, x_RK: Tensor, counts_e: Tensor, w_eNK: Tensor) -> Tensor:
    tiles = place(counts_e, len(x_RK))
    return run_weight_gradient(dy_RN, None, x_RK, None, tiles.start, tiles.rows_class, torch.empty_like(w_eNK))


@_weights.register_fake
def _(dy_RN: Tensor, x_RK: Tensor, counts_e: Tensor, w_eNK: Tensor) -> Tensor:
    return torch.empty_like(w_eNK)


TRITON = Passes(_forward, _input, _weights)
