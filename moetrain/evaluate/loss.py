"""Loss of one model in memory on held-out text, per domain."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moetrain.config.errors import ConfigError
from moetrain.data.dataset import TokenData
from moetrain.data.loader import validation_batches
from moetrain.evaluate.opened import InMemory

BATCH = 4


@dataclass(frozen=True)
class Loss:
    """Summed loss in nats over ``tokens`` predicted tokens."""

    total: float = 0.0
    tokens: int = 0

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.total / max(self.tokens, 1)

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.total + other.total, self.tokens + other.tokens)


@torch.no_grad()
def loss_by_domain(
    model: InMemory, data: TokenData, seq_len: int, sequences: int, document_mask: bool = False
) -> dict[str, Loss]:
    """Domain -> loss on its held-out text, in windows of ``seq_len`` tokens, at most ``sequences`` a source (0: all).

    The same windows as a run's own evaluation. Raises ConfigError for data of another tokenizer.
    """
    theirs = data.tokenizer().get_vocab(with_added_tokens=True)
    if theirs != model.tokenizer.tokenizer.get_vocab(with_added_tokens=True):
        raise ConfigError(f"'{data.dir}' was prepared with another tokenizer than the model's; prepare it with its own")
    found = {domain: Loss() for domain in data.domains}
    for source in data.sources:
        domain = data.domain_of[source]
        for batch in validation_batches(data, source, seq_len, BATCH, sequences, document_mask=document_mask):
            targets = batch.targets_BS.to(model.device)
            total, _ = model.decoder(
                batch.tokens_BS.to(model.device), targets, document_BN=batch.document_BS, prefix_BN=batch.prefix_BS
            )
            found[domain] += Loss(float(total), int((targets >= 0).sum()))
    return found
