"""Dense layers on CPU through the compiled products of the experts, as one expert that has all rows.

oneDNN's kernel on packed tiles keeps its rate in float32 where torch's own product (MKL) does not: on AMD processors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.native.experts import rows_times_weights, weight_gradient
from moe_kernels.native.library import call, native_obstacle, widens_halves

# Products with fewer multiplications are left to torch: tiles do not pay, and each of their sizes is generated code.
SMALL = 2**22
SMALL_WIDENED = 2**14  # of bfloat16, where torch's own are slow


def takes_native(x: Tensor, w: Tensor, rows: int) -> bool:
    """Whether the compiled products take ``rows`` rows of x's kind times the matrix w."""
    small = min(SMALL, SMALL_WIDENED) if x.dtype == torch.bfloat16 else SMALL
    return (
        x.device.type == "cpu"
        and w.device == x.device
        and x.dtype == w.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and rows * w.numel() >= small
        and not torch.compiler.is_compiling()
        and native_obstacle(x.dtype) is None
        and (rows * w.numel() >= SMALL or widens_halves())
    )


def times_transposed(x_TK: Tensor, w_NK: Tensor, bias_N: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x w^T (+ bias), (T, N)."""
    bias = None if bias_N is None else bias_N.unsqueeze(0)
    return rows_times_weights(x_TK, None, w_NK.unsqueeze(0), _all_rows(x_TK), True, bias, out=out)


def times(x_TN: Tensor, w_NK: Tensor, out: Tensor | None = None) -> Tensor:
    """x w, (T, K)."""
    return rows_times_weights(x_TN, None, w_NK.unsqueeze(0), _all_rows(x_TN), False, out=out)


def transposed_times(y_TN: Tensor, x_TK: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """y^T x into ``out`` (N, K), which may be wider than x; ``add``: to it, then float32."""
    weight_gradient(y_TN, None, x_TK, None, _all_rows(x_TK), out.unsqueeze(0), add)
    return out


def softmax_(logits: Tensor, targets: Tensor, above: Tensor | None, losses: Tensor) -> None:
    """``moe_kernels.loss._softmax_``, all contiguous; above and losses float32."""
    call(
        "loss_softmax", int(logits.dtype == torch.bfloat16), logits, targets, above, losses, *logits.shape,
        torch.get_num_threads(),
    )  # fmt: skip


def _all_rows(x: Tensor) -> Tensor:
    return torch.tensor([len(x)])
