"""Routers decide which experts a token goes to, and with what weight. One file per kind.

A new kind is one new file here, with a subclass of Router, and one preset in configs/model/router/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetrain.config.registry import ROUTERS
from moetrain.config.schema import ModelConfig
from moetrain.moe.balance import BalanceMethod, Decision, build_balance
from moetrain.moe.capacity import capacity, random_priority, within_capacity
from moetrain.moe.options import as_options
from moetrain.moe.permute import count
from moetrain.moe.routing import Carry, Routing, TokenContext

# Equal parts of a sequence by which drops are counted
POSITIONS = 8


class Router(nn.Module):
    """Base of all routers: what follows once the experts are chosen. Counting, auxiliary terms, dropping.

    balance: the layer's balance methods by name, in the order of Carry.aux_A.
    counts_E, dropped: int64, the choices of each expert and the dropped choices in this step so far, on this rank.
    dropped_P: the same dropped choices by eighths of the sequence.
    watch: called outside training with (probs_TE, ids_TK) of every forward pass; see ``train.routing``.
    group: ranks that share a micro-batch, sequence_group: ranks that each hold a part of the same sequences; None
        where this rank has it all. The model's parallel form sets them.

    Choices are made, counted and dropped once per token; a recomputed block takes them from the memo. Outside training
    nothing is counted or dropped, and no term is added.
    """

    counts_E: Tensor
    dropped: Tensor
    dropped_P: Tensor

    def __init__(self, cfg: ModelConfig, layer: int, balance: nn.ModuleDict) -> None:
        super().__init__()
        self.layer = layer
        self.n_experts: int = cfg.layer_value("num_experts", layer)
        self.top_k: int = cfg.layer_value("top_k", layer)
        self.capacity_factor: float | None = cfg.layer_value("capacity_factor", layer)
        self.drop_policy = cfg.moe.drop_policy
        self.balance = balance
        self.group: dist.ProcessGroup | None = None
        self.sequence_group: dist.ProcessGroup | None = None
        self.own_index: Callable[[int], Tensor] | None = None
        self.register_buffer("counts_E", torch.zeros(self.n_experts, dtype=torch.int64), persistent=False)
        self.register_buffer("dropped", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("dropped_P", torch.zeros(POSITIONS, dtype=torch.int64), persistent=False)
        self._parts_of: dict[tuple[int, torch.device], Tensor] = {}
        self.watch: Callable[[Tensor, Tensor], None] | None = None

    def methods(self) -> list[BalanceMethod]:
        """The balance methods, in order."""
        return list(self.balance.values())  # type: ignore[arg-type]

    def selection_bias(self) -> Tensor | None:
        """What is added to the scores where experts are chosen: the sum of the balance methods' biases, (E,)."""
        biases = [b for method in self.methods() if (b := method.selection_bias()) is not None]
        return torch.stack(biases).sum(0) if len(biases) > 1 else next(iter(biases), None)

    def finish(
        self,
        logits_TE: Tensor,
        probs: Callable[[], Tensor],
        ids_TK: Tensor,
        weights_TK: Tensor,
        carry: Carry,
        context: TokenContext,
        counts_E: Tensor | None = None,
    ) -> tuple[Routing, Carry]:
        """The routing of chosen experts, and the carry with this layer's auxiliary terms added.

        logits_TE, probs: see Decision. ids_TK must come from the memo. weights_TK: with gradient. counts_E: how often
        each expert is in ids_TK, int64, if that is known.
        """
        routing = Routing(
            self.n_experts, len(ids_TK), context.memo, ids_TK, weights_TK,
            layer=self.layer, step=context.step, training=context.training,
        )  # fmt: skip
        if not context.training:
            if self.watch is not None:
                self.watch(probs(), ids_TK)
            return routing, carry
        counts_E = context.memo.once("router.counts", lambda: self._count(ids_TK, counts_E))
        decision = Decision(logits_TE, probs, ids_TK, counts_E, context, self.group, self.sequence_group)
        terms = [method.term(decision) for method in self.methods() if method.has_term]
        if terms:
            carry = carry._replace(aux_A=carry.aux_A + torch.stack(terms).to(carry.aux_A.dtype))
        if self.capacity_factor is not None:
            routing = self._drop(routing, context)
        return routing, carry

    def reset_buffers(self) -> None:
        """Start counting anew (each step, and after the module was moved off the meta device)."""
        self.counts_E.zero_()
        self.dropped.zero_()
        self.dropped_P.zero_()

    def _count(self, ids_TK: Tensor, counts_E: Tensor | None) -> Tensor:
        counts_E = count(ids_TK, self.n_experts) if counts_E is None else counts_E
        self.counts_E += counts_E
        return counts_E

    def _drop(self, routing: Routing, context: TokenContext) -> Routing:
        """The list form of ``routing``, with at most ``capacity`` rows per expert. Weights stay as they are."""
        token_A, expert_A, weight_A = routing.assignments()
        kept_A = context.memo.once("router.kept", lambda: self._keep(token_A, expert_A, weight_A.detach(), context))
        return replace(
            routing,
            ids_TK=None,
            weights_TK=None,
            token_A=token_A.index_select(0, kept_A),
            expert_A=expert_A.index_select(0, kept_A),
            weight_A=weight_A.index_select(0, kept_A),
        )

    def _keep(self, token_A: Tensor, expert_A: Tensor, weight_A: Tensor, context: TokenContext) -> Tensor:
        assert self.capacity_factor is not None
        limit = capacity(len(expert_A), self.n_experts, self.capacity_factor)
        priority_A = {
            "score": lambda: weight_A,
            "position": lambda: None,
            "random": lambda: random_priority(len(expert_A), context.step, self.layer, expert_A.device),
        }[self.drop_policy]()
        kept_A = within_capacity(expert_A, priority_A, self.n_experts, limit)
        self.dropped += len(expert_A) - len(kept_A)
        part_A = self._parts(context.seq_len, token_A.device).index_select(0, token_A % context.seq_len)
        self.dropped_P += count(part_A, POSITIONS) - count(part_A.index_select(0, kept_A), POSITIONS)
        return kept_A

    def _parts(self, seq_len: int, device: torch.device) -> Tensor:
        """The eighth of the sequence, int64 (S,), in which each of ``seq_len`` tokens stands that are here of it."""
        if (seq_len, device) not in self._parts_of:
            whole = seq_len if self.sequence_group is None else seq_len * self.sequence_group.size()
            index_S = torch.arange(seq_len) if self.own_index is None else self.own_index(whole)
            self._parts_of[seq_len, device] = (index_S * POSITIONS // whole).to(device)
        return self._parts_of[seq_len, device]


def build_router(cfg: ModelConfig, layer: int, balance: Mapping[str, Any]) -> Router:
    """The router of decoder layer ``layer`` (0-based). balance: name -> options of the balance methods.

    Parameters are not initialised. Raises ConfigError for an unknown kind or setting.
    """
    options = as_options(ROUTERS, cfg.router)
    methods = build_balance(balance, cfg.layer_value("num_experts", layer))
    return ROUTERS.entry_of(options).build(options, cfg, layer, methods)
