"""The weights that a rank computes one MoE layer with: its own experts' and copies of others', brought for the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from moetrain.comm import Group
from moetrain.comm.sparse import Atoms, PendingAtoms, start_sparse_all_gather
from moetrain.moe.experts import Experts, Weights
from moetrain.moe.placement.plan import Homes, Placement, at_home, held
from moetrain.moe.routing import Rows


class Copies:
    """Of one layer. ``homes`` and ``placement`` are the plan in force; gradients of copies go home by autograd.

    after, before: the layers next to it. The exchange of the next one starts when this one's weights are there, so that
    it runs while this layer and the next one's attention compute; its way back, the gradients', runs beside the same in
    backward.
    frees: copies are freed after forward, and brought again in backward, a layer ahead (the paper's
    re-materialisation). recompute: that of the block.
    """

    def __init__(self, experts: Experts, homes: Homes, group: Group, frees: bool, recompute: str) -> None:
        self.experts, self.group = experts, group
        self.frees, self.recompute = frees, recompute
        self.homes, self.placement = homes, at_home(homes)
        self.after: Copies | None = None
        self.before: Copies | None = None
        self._now = self.placement  # of this pass, with what ``add`` added
        self._fresh = False  # this pass has not used the weights yet
        self._pending: PendingAtoms | None = None
        self._added: tuple[Placement, PendingAtoms] | None = None
        self._weights: Weights | None = None

    def start(self) -> None:
        """Begin a forward pass: bring copies. Every rank of the group."""
        self._fresh, self._now = True, self.placement
        self._weights, self._added = None, None
        self._pending = self._bring(self.placement) if self._travels(self.placement) else None

    def add(self, placement: Placement) -> None:
        """More copies for this pass alone: bring what ``placement`` has beyond the plan. Every rank of the group."""
        pairs = zip(placement, self._now, strict=True)
        more = tuple(tuple(r for r in new if r not in old) for new, old in pairs)
        self._added, self._now = (more, self._bring(more)), placement

    def compute(self, rows: Rows, mlp: Callable[..., Tensor]) -> Tensor:
        """``mlp(rows, w13, w2, b13, b2)`` with the weights of the experts held here, ascending."""
        grad = torch.is_grad_enabled()
        first, travels = self._fresh, self._travels(self._now)
        weights = self._take()
        if grad and first:
            self._free_after_backward(weights[0])
        if not (grad and self.frees and travels):
            self._weights = weights if grad else None
            return mlp(rows, *weights)
        if self.recompute == "full":  # what is kept for backward is dropped, and comes again with the block
            self._weights = None if first else weights
            return mlp(rows, *weights)
        if self.recompute == "selective":
            self._weights = weights
            y_RD = checkpoint(
                lambda rows: mlp(rows, *self._take(), recompute=False),
                rows, use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
        else:
            with saved_tensors_hooks(*self._by_name(weights)):
                y_RD = mlp(rows, *weights)
        self._weights = None
        out: Tensor = _BringAgain.apply(y_RD, self)
        return out

    def again(self) -> None:
        """Have the weights here once more, in backward, and start with those of the layer before."""
        if self._weights is None:
            self._weights = self._land_again()
            if self.before is not None and self.before.frees and self.before._travels(self.before._now):
                self.before._pending = self.before._bring_again()

    def _take(self) -> Weights:
        if not self._fresh:
            self.again()
            assert self._weights is not None
            return self._weights
        self._fresh = False
        weights = self.experts.weights()
        if self._pending is not None:
            weights = self._filled(self._pending)
            self._pending = None
        if self._added is not None:
            more, pending = self._added
            weights = self._merged(weights, self._filled(pending), more)
            self._added = None
        if self.after is not None:
            self.after.start()
        return weights

    def _travels(self, placement: Placement) -> bool:
        return placement != at_home(self.homes)

    def _bring(self, placement: Placement) -> PendingAtoms:
        atoms = [Atoms(p, self.homes, placement) for p in self.experts.weights() if p is not None]
        return start_sparse_all_gather(atoms, self.group)

    @torch.no_grad()
    def _bring_again(self) -> PendingAtoms:
        return self._bring(self._now)

    def _land_again(self) -> Weights:
        """Leaves that want a gradient where the weights do, so that what is recomputed keeps the same for backward."""
        pending, self._pending = self._pending or self._bring_again(), None
        with torch.no_grad():
            landed = self._filled(pending)
        pairs = zip(landed, self.experts.weights(), strict=True)
        return tuple(x if x is None or p is None else x.requires_grad_(p.requires_grad) for x, p in pairs)  # type: ignore[return-value]

    def _filled(self, pending: PendingAtoms) -> Weights:
        arrived = iter(pending.wait())
        return tuple(None if p is None else next(arrived) for p in self.experts.weights())  # type: ignore[return-value]

    def _merged(self, weights: Weights, added: Weights, more: Placement) -> Weights:
        """Both in ascending order of expert."""
        rank = 0 if self.group is None else self.group.rank()
        extra = held(more, rank)
        if not extra:  # their gradients still have to set out from here
            parts = zip(weights, added, strict=True)
            return tuple(None if w is None or a is None else w + a.sum() for w, a in parts)  # type: ignore[return-value]
        mine = held(self._now, rank)
        planned = [e for e in mine if e not in extra]
        order = [([*planned, *extra]).index(e) for e in mine]

        def joined(w: Tensor, a: Tensor) -> Tensor:
            # Not by an index, which autograd would keep: a recomputed block makes none.
            rows = [*w.unbind(), *a.unbind()]
            return torch.stack([rows[i] for i in order])

        parts = zip(weights, added, strict=True)
        return tuple(None if w is None or a is None else joined(w, a) for w, a in parts)  # type: ignore[return-value]

    def _free_after_backward(self, w13: Tensor) -> None:
        """Let go once the gradient of the innermost matrix has arrived: nothing needs weights after that."""

        def free(_: Tensor) -> None:
            self._weights = None

        if w13.requires_grad and not w13.is_leaf:  # a leaf would keep the hooks of all passes
            w13.register_hook(free)

    def _by_name(self, weights: Weights) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
        """Hooks that keep, instead of a view of the weights, its place in them."""
        places = {p.untyped_storage().data_ptr(): i for i, p in enumerate(weights) if p is not None and p.numel()}

        def pack(x: Tensor) -> Any:
            i = places.get(x.untyped_storage().data_ptr()) if x.numel() else None
            return x if i is None else (i, x.shape, x.stride(), x.storage_offset())

        def unpack(kept: Any) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            i, shape, stride, offset = kept
            self.again()
            assert self._weights is not None
            whole = self._weights[i]
            assert whole is not None
            return whole.detach().as_strided(shape, stride, offset)

        return pack, unpack


class _BringAgain(torch.autograd.Function):
    """Passes y on; in backward, before the experts', brings their weights again. Reached on every rank."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return y_RD.view_as(y_RD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.copies.again()
        return grads[0], None
