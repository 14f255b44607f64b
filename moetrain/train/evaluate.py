"""Loss on held-out text, per domain."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from moetrain.data.dataset import TokenData
from moetrain.data.loader import validation_batches
from moetrain.model.decoder import Decoder
from moetrain.parallel.mesh import ParallelDims


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats per token: over all held-out tokens, and per domain."""

    loss: float
    by_domain: dict[str, float]
    tokens: int


@torch.no_grad()
def evaluate(
    model: Decoder, data: TokenData, seq_len: int, batch_size: int, max_sequences: int, dims: ParallelDims, step: int
) -> Evaluation:
    """Evaluate ``model`` on each domain's held-out text, at most ``max_sequences`` sequences a domain (0: all).

    Collective: every rank of the stage calls it and gets the same result.
    """
    model.eval()
    device = next(model.parameters()).device
    sums = torch.zeros(len(data.domains), 2, dtype=torch.float64)
    for d, domain in enumerate(data.domains):
        for batch in validation_batches(
            data, domain, seq_len, batch_size, max_sequences, dims.data_rank, dims.data_size
        ):
            loss, _ = model(batch.tokens_BS.to(device), batch.targets_BS.to(device), step=step)
            sums[d, 0] += loss.double().cpu()
            sums[d, 1] += int((batch.targets_BS >= 0).sum())
    model.train()
    sums = sums.to(device=device, dtype=torch.float64)
    dist.all_reduce(sums, group=dims.stage_group)
    totals = sums.cpu()
    by_domain = {name: float(totals[d, 0] / totals[d, 1].clamp(min=1)) for d, name in enumerate(data.domains)}
    return Evaluation(float(totals[:, 0].sum() / totals[:, 1].sum().clamp(min=1)), by_domain, int(totals[:, 1].sum()))
