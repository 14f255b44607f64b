"""Loss on held-out text, per domain and source."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.data.dataset import TokenData
from moetrain.data.loader import Split, validation_batches
from moetrain.parallel.mesh import ParallelDims
from moetrain.train.engine import Engine
from moetrain.train.routing import RoutingWatch


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats per token: over all held-out tokens, per domain, and per source."""

    loss: float
    by_domain: dict[str, float]
    tokens: int
    by_source: dict[str, float] = field(default_factory=dict)

    def metrics(self) -> dict[str, Any]:
        """The losses by the names that they have in a run's files; those of sources where a domain has several."""
        found = {"val_loss": self.loss, "val_loss_by_domain": self.by_domain}
        return found | ({"val_loss_by_source": self.by_source} if self.by_source != self.by_domain else {})


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
    split: Split = "val",
    watch: RoutingWatch | None = None,
) -> Evaluation:
    """Evaluate the engine's model on each source's held-out text, at most ``max_sequences`` a source (0: all), or on
    its training text (``split``). watch: told of every batch ahead of its forward pass.

    Collective: every rank calls it and gets the same result.
    """
    engine.model.eval()
    device = next(engine.model.parameters()).device
    sums = torch.zeros(len(data.sources), dtype=torch.float64)
    counts = torch.zeros(len(data.sources), dtype=torch.int64)
    for s, source in enumerate(data.sources):
        for batch in validation_batches(
            data, source, seq_len, batch_size, max_sequences, dims.data_rank, dims.data_size, document_mask, split
        ):
            if watch is not None:
                watch.begin(s, batch)
            sums[s] += engine.loss(batch, step).double().cpu()
            counts[s] += int((batch.targets_BS >= 0).sum())
    engine.model.train()
    sums, counts = sums.to(device), counts.to(device)
    dist.all_reduce(sums)
    dist.all_reduce(counts, group=dims.data_group)
    totals = torch.stack([sums.cpu(), counts.double().cpu()], dim=1)
    of_domain = {d: [s for s, n in enumerate(data.sources) if data.domain_of[n] == d] for d in data.domains}
    return Evaluation(
        _mean(totals),
        {name: _mean(totals[rows]) for name, rows in of_domain.items()},
        int(totals[:, 1].sum()),
        {name: _mean(totals[s : s + 1]) for s, name in enumerate(data.sources)},
    )


def _mean(totals: Tensor) -> float:
    """Sum of losses over sum of tokens; totals: (sources, 2)."""
    return float(totals[:, 0].sum() / totals[:, 1].sum().clamp(min=1))
