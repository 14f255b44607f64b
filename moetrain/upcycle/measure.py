"""Models at work on a little text: their loss, and which experts they use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moetrain.config.schema import ExpertsConfig
from moetrain.convert.source import fill
from moetrain.convert.tensors import SELECTION_BIAS
from moetrain.model.decoder import Decoder
from moetrain.upcycle.method import Model

BATCH = 4


@torch.no_grad()
def build(model: Model, dtype: torch.dtype = torch.float32) -> Decoder:
    """``model`` in memory, in evaluation mode."""
    has_bias = any(name.endswith(SELECTION_BIAS) for name in model.source.specs)
    balance: dict[str, Any] = {"bias": {}} if has_bias else {}
    with torch.device("meta"):
        decoder = Decoder(model.cfg, balance, ExpertsConfig()).to(dtype)
    decoder = decoder.to_empty(device="cpu").eval()
    fill(decoder.state_dict(), model.source)
    return decoder


@torch.no_grad()
def loss(model: Model, ids_BS: Tensor) -> float:
    """Mean loss in nats per token of each row of ``ids_BS`` (int), its first token given; computed in float32."""
    decoder = build(model)
    total = 0.0
    for part in ids_BS.split(BATCH):
        targets = torch.cat((part[:, 1:], torch.full_like(part[:, :1], -100)), 1)
        total += float(decoder(part, targets)[0])
    return total / (ids_BS.numel() - len(ids_BS))
