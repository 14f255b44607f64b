"""The decoder-only transformer: embedding, blocks, final norm, head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from moetrain.config.schema import ExpertsConfig, ModelConfig
from moetrain.model.attention import rotated_width
from moetrain.model.block import Block
from moetrain.model.norm import RMSNorm
from moetrain.model.places import Places
from moetrain.model.rope import Rope
from moetrain.model.vocabulary import Vocabulary
from moetrain.moe.balance import aux_names
from moetrain.moe.linear import Linear, local_part
from moetrain.moe.routing import Carry

Reduction = Literal["sum", "none"]


class Decoder(nn.Module):
    """A language model built from its config, or a part of one; knows no mesh.

    Layers are keyed by their number in the whole model, so that the parts of a pipeline have distinct parameter names.
    ``head`` is absent when it shares the embedding's weight.

    layers: numbers of those that this part holds; None: all. first, last: whether it has the embedding, and the final
    norm with the head (a shared table is then in both).
    vocabulary: how the embedding's table and the head are used; index_of: sequence length N -> where this rank's tokens
    stand in it (int64 (S,)), None: all tokens are here, in order. The model's parallel form sets both.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        balance: dict,
        experts: ExpertsConfig,
        layers: Sequence[int] | None = None,
        first: bool = True,
        last: bool = True,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.first, self.last = first, last
        self.aux_names: tuple[str, ...] = aux_names(balance)
        self.rope = Rope(cfg.rope, rotated_width(cfg))
        self.vocabulary = Vocabulary()
        self.index_of: Callable[[int], Tensor] | None = None
        has_table = first or (last and cfg.tie_embeddings)
        self.embed = _table(cfg.vocab_size, cfg.dim) if has_table else None
        held = range(cfg.n_layers) if layers is None else layers
        self.layers = nn.ModuleDict({str(i): Block(cfg, i, balance, experts) for i in held})
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps, cfg.norm_offset) if last else None
        self.head = Linear(cfg.dim, cfg.vocab_size, bias=False) if last and not cfg.tie_embeddings else None

    def forward(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor | None = None,
        *,
        positions_BS: Tensor | None = None,
        document_BN: Tensor | None = None,
        prefix_BN: Tensor | None = None,
        seq_len: int | None = None,
        step: int = 0,
        reduction: Reduction = "sum",
    ) -> tuple[Tensor, Carry]:
        """Logits (B, S, V), or with targets the cross-entropy in nats, and the carry with the auxiliary sums.

        tokens_BS: int. targets_BS: int, -100 where a position has no loss; the loss is summed over the others ("sum": a
        scalar) or given for each ("none": (B, S), 0 where there is no target) and never builds all logits at once.
        positions_BS: int; None: 0 to S-1. document_BN, prefix_BN: see ``Places``. seq_len: N; None: S.
        step: optimizer step, for scheduled numbers.
        """
        x = self.embedded(tokens_BS)
        places = self.places(x, seq_len or tokens_BS.shape[1], document_BN, positions_BS, prefix_BN)
        x, carry = self.forward_layers(x, self.first_carry(x), places, step)
        return self.output(x, targets_BS, reduction), carry

    def embedded(self, tokens_BS: Tensor) -> Tensor:
        """x_BSD, the input of the first block."""
        assert self.embed is not None
        x_BSD = self.vocabulary.embed(tokens_BS, _weight(self.embed))
        if self.cfg.embedding_multiplier == 1:
            return x_BSD
        # Gemma rounds the factor to the dtype of the embeddings: 55.43 to 55.5 in bfloat16.
        return x_BSD * torch.tensor(self.cfg.embedding_multiplier, dtype=x_BSD.dtype, device="cpu").item()

    def places(
        self,
        like: Tensor,
        seq_len: int,
        document_BN: Tensor | None = None,
        positions_BS: Tensor | None = None,
        prefix_BN: Tensor | None = None,
    ) -> Places:
        """Where the tokens of a forward pass over sequences of ``seq_len`` (N) tokens stand; see ``Rope.places``."""
        index_S = None if self.index_of is None else self.index_of(seq_len)
        return self.rope.places(
            seq_len,
            like,
            index_S=index_S,
            document_BN=document_BN,
            positions_BS=positions_BS,
            prefix_BN=prefix_BN,
        )

    def first_carry(self, x: Tensor) -> Carry:
        """The carry that enters the first block: no auxiliary loss yet. Its sums are float32 or wider."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return Carry(x.new_zeros(len(self.aux_names), dtype=dtype))

    def forward_layers(self, x_BSD: Tensor, carry: Carry, places: Places, step: int = 0) -> tuple[Tensor, Carry]:
        """The blocks that this module holds, in order: (x_BSD, carry) -> (x_BSD, carry)."""
        for block in self.layers.values():
            x_BSD, carry = block(x_BSD, carry, places, step)
        return x_BSD, carry

    def output(self, x_BSD: Tensor, targets_BS: Tensor | None, reduction: Reduction = "sum") -> Tensor:
        """Final norm and head: logits (B, S, V), or the loss of ``targets_BS`` as ``forward`` gives it."""
        assert self.norm is not None
        table = self.embed if self.head is None else self.head
        assert table is not None
        h, w_VD = self.norm(x_BSD), _weight(table)
        if self.cfg.logits_divisor != 1:
            h = h / self.cfg.logits_divisor
        if targets_BS is None:
            return self.vocabulary.logits(h, w_VD)
        return self.vocabulary.loss(h, w_VD, targets_BS, reduction)


def _table(rows: int, width: int) -> nn.Embedding:
    """Not initialised here. (nn.Embedding's own first values make torch import its compiler on the meta device.)"""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


def _weight(table: nn.Embedding | nn.Linear) -> Tensor:
    weight = local_part(table.weight)
    assert weight is not None
    return weight
