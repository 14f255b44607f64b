"""Running a parallel model on micro-batches: one interface, whether this rank holds all layers or stages of a pipeline.

Everything that comes out is a share: over all ranks of the world, shares add up to the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from moetrain.model.decoder import Decoder
from moetrain.moe.routing import Carry
from moetrain.parallel import context


class Inputs(NamedTuple):
    """One micro-batch of whole sequences (N tokens), as the loader gives it to every rank that works on it.

    tokens_BN, targets_BN: int64. document_BN, prefix_BN: see ``Places``.
    """

    tokens_BN: Tensor
    targets_BN: Tensor
    document_BN: Tensor | None = None
    prefix_BN: Tensor | None = None


@dataclass(frozen=True)
class LossScale:
    """What turns sums over tokens into the loss: divided by the ``targets`` of the global batch, auxiliary terms by its
    ``tokens``, each times its coefficient."""

    targets: int
    tokens: int
    coefs: list[float]

    def total(self, loss: Tensor, aux_A: Tensor | None) -> Tensor:
        """The share of the loss whose gradient is taken."""
        total = loss / max(self.targets, 1)
        for a, coef in enumerate(self.coefs):
            assert aux_A is not None
            total = total + coef * aux_A[a] / self.tokens
        return total


class Runner(Protocol):
    """A model made parallel, ready to run. ``model``: what this rank holds of it, under global names."""

    @property
    def model(self) -> nn.Module:
        """What this rank holds."""
        ...

    def forward_backward(self, batches: list[Inputs], scale: LossScale, step: int) -> Tensor:
        """Gradients of the scaled loss, added up over ``batches`` and reduced once. Returns this rank's share of the
        sums [loss, auxiliary terms ...] over tokens."""
        ...

    def loss(self, batch: Inputs, step: int) -> Tensor:
        """This rank's share of the summed loss, a scalar; no gradient."""
        ...

    def logits(self, tokens_BN: Tensor) -> Tensor | None:
        """Logits of the positions that this rank's sequence share has, (B, S, V); None where it has no last stage."""
        ...

    def gradients_in_place(self) -> None:
        """Called once backward is done: bring gradients of shared weights to where they are updated."""
        ...

    def weights_updated(self) -> None:
        """Called once the weights have changed: bring shared weights to all places that use them."""
        ...


def local_inputs(part: Decoder, batch: Inputs) -> tuple[Tensor, dict[str, Any]]:
    """(this rank's tokens, keyword arguments) of ``batch`` for ``part``, cut as context parallelism cuts sequences."""
    tokens, targets, seq_len = batch.tokens_BN, batch.targets_BN, batch.tokens_BN.shape[1]
    if part.index_of is not None:
        index_S = part.index_of(seq_len)
        tokens, targets = context.cut(tokens, index_S), context.cut(targets, index_S)
    arguments: dict[str, Any] = {"targets_BS": targets, "seq_len": seq_len}
    if batch.document_BN is not None:
        arguments["document_BN"] = batch.document_BN
    if batch.prefix_BN is not None:
        arguments["prefix_BN"] = batch.prefix_BN
    return tokens, arguments


class OneStage:
    """All layers on this rank."""

    def __init__(self, model: Decoder, device: torch.device) -> None:
        self.model = model
        self.device = device

    def forward_backward(self, batches: list[Inputs], scale: LossScale, step: int) -> Tensor:
        sums = torch.zeros(1 + len(scale.coefs), dtype=sum_dtype(self.device), device=self.device)
        for i, batch in enumerate(batches):
            if isinstance(self.model, FSDPModule):  # which reduces once, after the last micro-batch
                self.model.set_requires_gradient_sync(i == len(batches) - 1)
            loss, carry = self._run(batch, step)
            scale.total(loss, carry.aux_A).backward()
            sums[0] += loss.detach()
            sums[1:] += carry.aux_A.detach()
        return sums

    @torch.no_grad()
    def loss(self, batch: Inputs, step: int) -> Tensor:
        return self._run(batch, step)[0]

    @torch.no_grad()
    def logits(self, tokens_BN: Tensor) -> Tensor | None:
        tokens, arguments = local_inputs(self.model, Inputs(tokens_BN, tokens_BN))
        return self.model(tokens, None, seq_len=arguments["seq_len"])[0]

    def gradients_in_place(self) -> None:
        return

    def weights_updated(self) -> None:
        return

    def _run(self, batch: Inputs, step: int) -> tuple[Tensor, Carry]:
        tokens, arguments = local_inputs(self.model, batch)
        return self.model(tokens, step=step, **arguments)


def sum_dtype(device: torch.device) -> torch.dtype:
    """The type in which losses are added up over micro-batches and ranks."""
    return torch.float64 if device.type == "cpu" else torch.float32
