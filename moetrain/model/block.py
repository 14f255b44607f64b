"""One decoder block: attention and an MLP or MoE layer, each with a norm and beside the residual stream."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moetrain.config.schema import ExpertsConfig, ModelConfig
from moetrain.model.attention import build_attention, window_of
from moetrain.model.attention.kernels import attend, chooses
from moetrain.model.norm import RMSNorm
from moetrain.model.places import Places
from moetrain.moe.build import build_moe_layer
from moetrain.moe.mlp import MLP
from moetrain.moe.routing import Carry, Memo, TokenContext

Recompute = Literal["none", "selective", "full"]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Dense layers have ``mlp``, MoE layers ``moe``; the other is None.

    With ``norm_place=post`` x + norm(attention(x)) and x + norm(mlp(x)): OLMo 2 (arXiv 2501.00656, section 3.1).
    With ``parallel_block`` x + attention(norm(x)) + mlp(norm(x)), each with a norm of its own: GPT-NeoX (arXiv
    2204.06745, section 2.1). PaLM's single norm (arXiv 2204.02311) is the case of two equal ones.
    What is added to x may have a factor (``residual_multiplier``: Granite).

    ``recompute`` says what backward computes again: nothing, the inner activations of experts and MLPs ("selective": no
    row is dispatched again; tensor parallelism gathers an MLP's tokens again), or the whole block. Routing is never
    decided twice: the memo outlives the first pass.
    """

    def __init__(self, cfg: ModelConfig, layer: int, balance: dict, experts: ExpertsConfig) -> None:
        super().__init__()
        self.layer = layer
        self.window = window_of(cfg, layer)
        self.post_norm = cfg.norm_place == "post"
        self.parallel = cfg.parallel_block
        self.multiplier = cfg.residual_multiplier
        self.attention_norm = RMSNorm(cfg.dim, cfg.norm_eps, cfg.norm_offset)
        self.attention = build_attention(cfg)
        self.mlp_norm = RMSNorm(cfg.dim, cfg.norm_eps, cfg.norm_offset)
        is_moe = cfg.is_moe(layer)
        self.mlp = None if is_moe else MLP(cfg.dim, cfg.dense_dim, cfg.activation)
        self.moe = build_moe_layer(cfg, layer, balance, experts) if is_moe else None
        self.recompute = "none"

    @property
    def recompute(self) -> Recompute:
        """What backward computes again."""
        return self._recompute

    @recompute.setter
    def recompute(self, value: Recompute) -> None:
        self._recompute = value
        for part in (self.moe.experts, self.moe.shared) if self.moe is not None else ():
            if part is not None:
                part.recompute = value == "selective"  # type: ignore[assignment]

    def forward(self, x_BSD: Tensor, carry: Carry, places: Places, step: int) -> tuple[Tensor, Carry]:
        """(x_BSD, carry) -> (x_BSD, carry). step: optimizer step, for scheduled numbers and seeded noise."""
        context = TokenContext(x_BSD.shape[1], step, self.training, Memo())
        if self._recompute == "full" and torch.is_grad_enabled():
            return checkpoint(self._run, x_BSD, carry, places, context, use_reentrant=False, preserve_rng_state=False)
        return self._run(x_BSD, carry, places, context)

    def _run(self, x: Tensor, carry: Carry, places: Places, context: TokenContext) -> tuple[Tensor, Carry]:
        x, h = self.attend(x, places)
        if self.moe is not None:
            out_TD, carry = self.moe(h.flatten(0, 1), carry, context)
            return self._add(x, out_TD.view_as(x), self.mlp_norm), carry
        assert self.mlp is not None
        if self._recompute == "selective" and torch.is_grad_enabled():
            out = checkpoint(self.mlp, h, use_reentrant=False, preserve_rng_state=False)
        else:
            out = self.mlp(h)
        return self._add(x, out, self.mlp_norm), carry

    def attend(self, x: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """x_BSD -> (x + attention, the MLP's input): all of the block that has fixed shapes."""
        out = self.attention(self._input(x, self.attention_norm), places, self.window)
        y = self._add(x, out, self.attention_norm)
        return y, self._input(x if self.parallel else y, self.mlp_norm)

    def _input(self, x: Tensor, norm: RMSNorm) -> Tensor:
        return x if self.post_norm else norm(x)

    def _add(self, x: Tensor, out: Tensor, norm: RMSNorm) -> Tensor:
        out = norm(out) if self.post_norm else out
        return x + (out if self.multiplier == 1 else out * self.multiplier)

    def compile_dense(self) -> None:
        """torch.compile ``attend`` in place; the routed part has shapes that depend on the data."""
        compiled = torch.compile(self.attend)

        def attend_compiled(x: Tensor, places: Places) -> tuple[Tensor, Tensor]:
            attention: Any = self.attention
            asks = chooses(attention.backend, x.device, places, self.window, compiled=True)
            if attention.core is attend and not asks:
                places.mask(self.window)  # made here once for all blocks: compiled code must not change ``places``
            return compiled(x, places)

        self.attend = attend_compiled  # type: ignore[method-assign]
