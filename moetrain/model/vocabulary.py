"""What touches the vocabulary: the embedding's table and the head, with the loss. One object, so that both can be split
over ranks (``parallel.tensor``) without the decoder knowing."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from moe_kernels import linear, linear_cross_entropy
from torch import Tensor


class Vocabulary:
    """All of the vocabulary on this rank."""

    def embed(self, tokens_BS: Tensor, w_VD: Tensor) -> Tensor:
        """x_BSD, the rows of the table ``w_VD`` for ``tokens_BS``."""
        return F.embedding(tokens_BS, w_VD)

    def logits(self, h_BSD: Tensor, w_VD: Tensor) -> Tensor:
        """(B, S, V)."""
        return linear(h_BSD, w_VD)

    def loss(self, h_BSD: Tensor, w_VD: Tensor, targets_BS: Tensor, reduction: Literal["sum", "none"]) -> Tensor:
        """Cross-entropy in nats: this rank's share of the sum (a scalar), or of each position ("none": the shape of
        h without D, 0 where there is no target). Over the ranks, shares add up to the whole."""
        loss = linear_cross_entropy(h_BSD.flatten(0, 1), w_VD, targets_BS.flatten(), reduction=reduction)
        return loss if reduction == "sum" else loss.view_as(targets_BS)
