"""The weights that a rank computes one MoE layer with: its own experts' and copies of others', brought for the step."""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.comm import Group
from moetrain.comm.sparse import Atoms, PendingAtoms, start_sparse_all_gather
from moetrain.moe.experts import Experts
from moetrain.moe.placement.plan import Homes, at_home

Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


class Copies:
    """Of one layer. ``homes`` and ``placement`` are the plan in force; gradients of copies go home by autograd.

    after: the layer that comes next; its exchange starts when this layer's weights are there, so that it runs while
    this layer and the next one's attention compute. Its way back, the gradients', runs beside the same in backward.
    """

    def __init__(self, experts: Experts, homes: Homes, group: Group) -> None:
        self.experts, self.group = experts, group
        self.homes, self.placement = homes, at_home(homes)
        self.after: Copies | None = None
        self._pending: PendingAtoms | None = None
        self._weights: Weights | None = None

    def start(self) -> None:
        """Begin a forward pass: bring copies. Every rank of the group."""
        self._weights = self._pending = None
        if self.placement != at_home(self.homes):
            atoms = [Atoms(p, self.homes, self.placement) for p in self.experts.weights() if p is not None]
            self._pending = start_sparse_all_gather(atoms, self.group)

    def weights(self) -> Weights:
        """w13, w2, b13, b2 of the experts held here, ascending; the same again when the layer is recomputed."""
        if self._weights is not None:
            return self._weights
        own = self.experts.weights()
        if self._pending is not None:
            arrived = iter(self._pending.wait())
            own = tuple(None if p is None else next(arrived) for p in own)  # type: ignore[assignment]
            self._pending = None
        if self.after is not None:
            self.after.start()
        if torch.is_grad_enabled():
            self._weights = own
            self._free_after_backward(own)
        return own

    def _free_after_backward(self, weights: Weights) -> None:
        """Let go once a gradient has arrived: whatever was recomputed is by then."""

        def free(_: Tensor) -> None:
            self._weights = None

        for p in weights:
            if p is not None and p.requires_grad:
                p.register_hook(free)
                return
