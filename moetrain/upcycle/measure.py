"""Models at work on a little text: their loss, and which experts they use."""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.evaluate import opened
from moetrain.model.decoder import Decoder
from moetrain.upcycle.method import Model

BATCH = 4


def build(model: Model, dtype: torch.dtype = torch.float32) -> Decoder:
    """``model`` in memory, in evaluation mode."""
    return opened.build(model.cfg, model.source, dtype)


@torch.no_grad()
def loss(model: Model, ids_BS: Tensor) -> float:
    """Mean loss in nats per token of each row of ``ids_BS`` (int), its first token given; computed in float32."""
    decoder = build(model)
    total = 0.0
    for part in ids_BS.split(BATCH):
        targets = torch.cat((part[:, 1:], torch.full_like(part[:, :1], -100)), 1)
        total += float(decoder(part, targets)[0])
    return total / (ids_BS.numel() - len(ids_BS))
