"""Expert computation as modules: parameters here, the mathematics in ``moe_kernels``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from moe_kernels import ACTIVATIONS, absmean, expert_mlp, ternary
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moetrain.config.schema import ModelConfig
from moetrain.moe.linear import Linear, local_part
from moetrain.moe.mlp import MLP
from moetrain.moe.routing import Rows

# w13, w2, b13, b2 of some experts.
Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


class Experts(nn.Module):
    """The MLPs of E routed experts, or of this rank's e of them once the model is made parallel.

    w13 (e, n, F, D): the gate's weights, then up's (n = 2); up's alone with a plain activation (n = 1). w2 (e, D, F).
    b13 (e, n, F), b2 (e, D): only with ``bias``.
    Parameters may be DTensors, of which the local part is used; they are not initialised here.
    backend: the kernels (``moe_kernels``). fp8: their products are made in FP8. recompute: backward computes the inner
    activations again. ternary: matrices are rounded to a scale times -1, 0 or 1 where they are used
    (``moe_kernels.ternary``); what is trained is not.

    Where F is split over the ranks of ``split_group``, outputs are parts of a sum over them. Each rank then holds the
    entries of b2 that ``output_slice`` tells, and adds them alone, so that no gradient is spread over ranks. None: all
    is here.

    placed: calls ``mlp`` with the weights of the experts to compute with, where they are not just the parameters
    (``moe.placement.copies``); a rank may then have none at all.
    """

    def __init__(self, cfg: ModelConfig, layer: int, backend: str = "auto", fp8: bool = False) -> None:
        super().__init__()
        E, F_, D = cfg.layer_value("num_experts", layer), cfg.layer_value("expert_dim", layer), cfg.dim
        n = ACTIVATIONS[cfg.moe.activation].matrices
        self.w13 = nn.Parameter(torch.empty(E, n, F_, D))
        self.w2 = nn.Parameter(torch.empty(E, D, F_))
        self.b13 = nn.Parameter(torch.empty(E, n, F_)) if cfg.moe.bias else None
        self.b2 = nn.Parameter(torch.empty(E, D)) if cfg.moe.bias else None
        self.activation, self.ternary = cfg.moe.activation, cfg.moe.ternary
        self.backend, self.fp8 = backend, fp8
        self.recompute = False
        self.split_group: dist.ProcessGroup | None = None
        self.output_slice: slice | None = None
        self.placed: Callable[[Rows, Callable[..., Tensor]], Tensor] | None = None

    def forward(self, rows: Rows) -> Tensor:
        """y_RD (R, D): the output of each row's expert, times the row's weight if any; summed as ``rows`` says."""
        if self.placed is not None:
            return self.placed(rows, self.mlp)
        return self.mlp(rows, *self.weights())

    def mlp(
        self, rows: Rows, w13: Tensor, w2: Tensor, b13: Tensor | None, b2: Tensor | None, recompute: bool | None = None
    ) -> Tensor:
        """``forward`` with the weights of the experts whose rows these are. recompute: None: as the module says."""
        if not len(w13):  # no expert, so no row; autograd must still reach all
            return rows.x_ND + sum(p.sum() for p in (w13, w2, b13, b2) if p is not None)
        if b2 is not None and self.output_slice is not None:
            b2 = F.pad(b2, (self.output_slice.start, rows.x_ND.shape[1] - self.output_slice.stop))
        recompute = self.recompute if recompute is None else recompute
        # Each tensor by itself, for only then does autograd know (and a dry run count) that checkpointing keeps it.
        return _maybe_checkpoint(
            recompute, self._run, rows.x_ND, rows.counts, rows.index_R, rows.weight_R, rows.row_NK, w13, w2, b13, b2
        )

    def weights(self) -> Weights:
        """w13, w2, b13, b2: what this rank holds of them."""
        return tuple(local_part(p) for p in (self.w13, self.w2, self.b13, self.b2))  # type: ignore[return-value]

    def _run(
        self,
        x_ND: Tensor,
        counts: list[int] | Tensor,
        index_R: Tensor | None,
        weight_R: Tensor | None,
        row_NK: Tensor | None,
        w13: Tensor,
        w2: Tensor,
        b13: Tensor | None,
        b2: Tensor | None,
    ) -> Tensor:
        if self.ternary:
            w13, w2 = self._ternary(w13), self._ternary(w2)
        return expert_mlp(
            x_ND, counts, w13, w2, index_R=index_R, weight_R=weight_R, row_TK=row_NK, b13=b13, b2=b2,
            activation=self.activation, backend=self.backend, fp8=self.fp8,
        )  # fmt: skip

    def _ternary(self, w: Tensor) -> Tensor:
        """``w`` rounded by the scale of the whole matrices, of which all ranks of ``split_group`` hold equal parts."""
        scale = absmean(w)
        if self.split_group is not None:
            dist.all_reduce(scale, group=self.split_group)
            scale /= self.split_group.size()
        return ternary(w, scale)


class SharedExperts(MLP):
    """An MLP that every token passes, as wide as all shared experts together, with the activation of dense ones.

    gate: D -> 1 or None; its sigmoid scales the output (Qwen2-MoE, arXiv 2407.10671). recompute: as in Experts.
    """

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__(cfg.dim, cfg.layer_value("shared_dim", layer), cfg.activation)
        self.gate = Linear(cfg.dim, 1, bias=False) if cfg.moe.shared_gate else None
        self.recompute = False

    def forward(self, x_TD: Tensor) -> Tensor:
        """x_TD (T, D) -> (T, D)."""
        return _maybe_checkpoint(self.recompute, self._run, x_TD)

    def _run(self, x_TD: Tensor) -> Tensor:
        out_TD = super().forward(x_TD)
        return out_TD if self.gate is None else self.gate(x_TD).sigmoid() * out_TD


def _maybe_checkpoint(recompute: bool, fn: Callable[..., Tensor], *args: object) -> Tensor:
    if recompute and torch.is_grad_enabled():
        return checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=False)
    return fn(*args)
