"""Balance methods keep the experts evenly loaded. One file per method; a layer may use several.

A method may add a term to the loss, add a bias to the scores by which experts are chosen, and learn from the loads of
each finished step. Terms are plain values that ride in the carry, so their strength does not depend on the mapping, the
number of micro-batches or recomputation. A new method is one new file here and one preset in configs/balance/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
import torch.distributed as dist
from annotated_types import Ge, MinLen
from torch import Tensor, nn

from moetrain.config.fields import value_at
from moetrain.config.registry import BALANCE
from moetrain.moe.layer import MoELayer
from moetrain.moe.options import as_options
from moetrain.moe.routing import TokenContext

NonNegative = Annotated[float, Ge(0)]
# A coefficient or rate: a schema.Scheduled that is never negative.
Strength = NonNegative | Annotated[dict[int, NonNegative], MinLen(1)]


@dataclass(frozen=True)
class Decision:
    """What a router decided about T tokens, as balance methods see it.

    logits_TE: router logits, with gradient. probs: makes probs_TE, the scores normalised to sum to 1 over all experts,
        with gradient; a function, because not every method needs it.
    ids_TK, counts_E: the chosen experts, and how often each was chosen, before any dropping.
    group: ranks that share the micro-batch; None: it is all here. sequence_group: ranks that each hold a part of the
        same sequences; None: whole sequences here.
    """

    logits_TE: Tensor
    probs: Callable[[], Tensor]
    ids_TK: Tensor
    counts_E: Tensor
    context: TokenContext
    group: dist.ProcessGroup | None = None
    sequence_group: dist.ProcessGroup | None = None


class BalanceMethod(nn.Module):
    """Base of all methods; one instance per MoE layer. Built as ``Method(options, n_experts)``.

    has_term: whether ``term`` adds to the loss; the options then have a ``coef``, its coefficient.
    """

    has_term: ClassVar[bool] = False

    def term(self, decision: Decision) -> Tensor:
        """Scalar with gradient: a sum over this rank's tokens, which the trainer divides by the global token count."""
        raise NotImplementedError

    def selection_bias(self) -> Tensor | None:
        """bias_E, added to the scores for choosing experts only; None: no bias."""
        return None

    def after_step(self, counts_E: Tensor, step: int) -> None:
        """Learn from ``counts_E`` (int64), the loads of the whole global batch of optimizer step ``step`` (0-based)."""

    def reset_buffers(self) -> None:
        """Fill the buffers with their values at step 0 (after the module was moved off the meta device)."""


def aux_names(balance: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the methods of ``balance`` (name -> options) that add a term to the loss: the order of Carry.aux_A."""
    return tuple(name for name in balance if BALANCE.get(name).build.has_term)


def aux_coefs(balance: Mapping[str, Any], step: int) -> list[float]:
    """Coefficient of each of ``aux_names(balance)`` at optimizer step ``step`` (0-based)."""
    return [value_at(as_options(BALANCE, balance[name], name).coef, step) for name in aux_names(balance)]


def build_balance(balance: Mapping[str, Any], n_experts: int) -> nn.ModuleDict:
    """The methods of ``balance`` (name -> options) for one layer."""
    methods = {}
    for name, options in balance.items():
        options = as_options(BALANCE, options, name)
        methods[name] = BALANCE.get(name).build(options, n_experts)
    return nn.ModuleDict(methods)


@dataclass(frozen=True)
class Loads:
    """Loads of one optimizer step over the global batch, by name of the MoE layer in the model, in order.

    counts: how many times each expert was chosen, int64 (E,). dropped: how many of those choices capacity dropped.
    dropped_P: the dropped ones by parts of the sequence, int64 (P,), of layers with a capacity.
    mine: as counts, of this rank's tokens, for the layers that it has.
    """

    counts: dict[str, Tensor]
    dropped: dict[str, int]
    dropped_P: dict[str, Tensor] = field(default_factory=dict)
    mine: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def end_of_step(model: nn.Module, group: dist.ProcessGroup | None, step: int) -> Loads:
    """Close optimizer step ``step``: sum the loads over ``group``, let balance methods learn, start counting anew.

    group: the ranks that hold parts of the global batch for these layers; None: this one holds it all. One all-reduce
    of integers for all layers. Every rank gets the same loads.
    """
    routers: dict[str, Any] = {
        name: layer.router for name, layer in model.named_modules() if isinstance(layer, MoELayer)
    }
    if not routers:
        return Loads({}, {})
    mine = {name: router.counts_E.clone() for name, router in routers.items()}
    parts = [part for router in routers.values() for part in (router.counts_E, router.dropped.view(1))]
    limited = {name: router.dropped_P for name, router in routers.items() if router.capacity_factor is not None}
    parts += limited.values()
    total = torch.cat(parts)
    if group is not None:
        dist.all_reduce(total, group=group)
    split = total.split([len(part) for part in parts])
    dropped_P = dict(zip(limited, split[2 * len(routers) :], strict=True))
    split = split[: 2 * len(routers)]
    counts = dict(zip(routers, split[::2], strict=True))
    dropped = dict(zip(routers, torch.cat(split[1::2]).tolist(), strict=True))
    for name, router in routers.items():
        for method in router.balance.values():
            method.after_step(counts[name], step)
        router.reset_buffers()
    return Loads(counts, dropped, dropped_P, mine)
