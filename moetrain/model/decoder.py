"""The decoder-only transformer: embedding, blocks, final norm, head."""

from __future__ import annotations

from typing import Literal

import torch
from moe_kernels import linear_cross_entropy
from torch import Tensor, nn

from moetrain.config.schema import ExpertsConfig, ModelConfig
from moetrain.model.attention import rotated_width
from moetrain.model.block import Block
from moetrain.model.norm import RMSNorm
from moetrain.model.rope import Rope
from moetrain.moe.balance import aux_names
from moetrain.moe.routing import Carry


class Decoder(nn.Module):
    """A language model built from its config; knows no mesh.

    Layers are keyed by their number in the whole model, so that the parts of a pipeline have distinct parameter names.
    ``head`` is absent when it shares the embedding's weight.
    """

    def __init__(self, cfg: ModelConfig, balance: dict, experts: ExpertsConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.aux_names: tuple[str, ...] = aux_names(balance)
        self.rope = Rope(cfg.rope, rotated_width(cfg))
        self.embed = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.layers = nn.ModuleDict({str(i): Block(cfg, i, balance, experts) for i in range(cfg.n_layers)})
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.head = None if cfg.tie_embeddings else nn.Linear(cfg.dim, cfg.vocab_size, bias=False)

    def forward(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor | None = None,
        *,
        positions_BS: Tensor | None = None,
        step: int = 0,
        reduction: Literal["sum", "none"] = "sum",
    ) -> tuple[Tensor, Carry]:
        """Logits (B, S, V), or with targets the cross-entropy in nats, and the carry with the auxiliary sums.

        tokens_BS: int. targets_BS: int, -100 where a position has no loss; the loss is summed over the others ("sum": a
        scalar) or given for each ("none": (B, S), 0 where there is no target) and never builds all logits at once.
        positions_BS: int; None: 0 to S-1. step: optimizer step, for scheduled numbers.
        """
        x = self.embed(tokens_BS)
        x, carry = self.forward_layers(x, self.first_carry(x), positions_BS=positions_BS, step=step)
        return self.output(x, targets_BS, reduction), carry

    def first_carry(self, x: Tensor) -> Carry:
        """The carry that enters the first block: no auxiliary loss yet. Its sums are float32 or wider."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return Carry(x.new_zeros(len(self.aux_names), dtype=dtype))

    def forward_layers(
        self, x_BSD: Tensor, carry: Carry, *, positions_BS: Tensor | None = None, step: int = 0
    ) -> tuple[Tensor, Carry]:
        """The blocks that this module holds, in order: (x_BSD, carry) -> (x_BSD, carry)."""
        positions = self.rope.positions(x_BSD, positions_BS)
        for block in self.layers.values():
            x_BSD, carry = block(x_BSD, carry, positions, step)
        return x_BSD, carry

    def output(self, x_BSD: Tensor, targets_BS: Tensor | None, reduction: Literal["sum", "none"] = "sum") -> Tensor:
        """Final norm and head: logits (B, S, V), or the loss of ``targets_BS`` as ``forward`` gives it."""
        h = self.norm(x_BSD)
        w_VD = self.embed.weight if self.head is None else self.head.weight
        if targets_BS is None:
            return nn.functional.linear(h, w_VD)
        loss = linear_cross_entropy(h.flatten(0, 1), w_VD, targets_BS.flatten(), reduction=reduction)
        return loss if reduction == "sum" else loss.view_as(targets_BS)
