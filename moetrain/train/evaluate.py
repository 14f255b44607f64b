"""Loss on held-out text, per domain."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from moetrain.data.dataset import TokenData
from moetrain.data.loader import validation_batches
from moetrain.parallel.mesh import ParallelDims
from moetrain.train.engine import Engine


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats per token: over all held-out tokens, and per domain."""

    loss: float
    by_domain: dict[str, float]
    tokens: int


@torch.no_grad()
def evaluate(
    engine: Engine,
    data: TokenData,
    seq_len: int,
    batch_size: int,
    max_sequences: int,
    dims: ParallelDims,
    step: int,
    document_mask: bool = False,
) -> Evaluation:
    """Evaluate the engine's model on each domain's held-out text, at most ``max_sequences`` a domain (0: all).

    Collective: every rank calls it and gets the same result.
    """
    engine.model.eval()
    device = next(engine.model.parameters()).device
    sums = torch.zeros(len(data.domains), dtype=torch.float64)
    counts = torch.zeros(len(data.domains), dtype=torch.int64)
    for d, domain in enumerate(data.domains):
        for batch in validation_batches(
            data, domain, seq_len, batch_size, max_sequences, dims.data_rank, dims.data_size, document_mask
        ):
            sums[d] += engine.loss(batch, step).double().cpu()
            counts[d] += int((batch.targets_BS >= 0).sum())
    engine.model.train()
    sums, counts = sums.to(device), counts.to(device)
    dist.all_reduce(sums)
    dist.all_reduce(counts, group=dims.data_group)
    totals = torch.stack([sums.cpu(), counts.double().cpu()], dim=1)
    by_domain = {name: float(totals[d, 0] / totals[d, 1].clamp(min=1)) for d, name in enumerate(data.domains)}
    return Evaluation(float(totals[:, 0].sum() / totals[:, 1].sum().clamp(min=1)), by_domain, int(totals[:, 1].sum()))
