"""Expert parallelism through DeepEP's kernels (NVLink inside a node, RDMA between nodes), where they are installed.

Written against the public API of ``deep_ep.Buffer``, versions 1.x: get_dispatch_layout, dispatch and combine, with the
handle of a dispatch reused for its backward and for recomputation. Not run on a GPU by this project: the tests drive
it with a stand-in for the package that moves the same tensors with gloo.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass as plain_dataclass
from typing import Any

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from moetrain.comm import Flight, Group, Pending, all_gather_ints, start
from moetrain.config.errors import ConfigError
from moetrain.config.fields import STRICT
from moetrain.config.registry import DISPATCHERS
from moetrain.config.schema import Config
from moetrain.moe.dispatch import Dispatcher, Payload, Plan, held
from moetrain.moe.dispatch.held import Held
from moetrain.moe.permute import count
from moetrain.moe.routing import Routing, Rows

ELSE = "use dispatch=all_to_all"


@dataclass(config=STRICT)
class DeepEPOptions:
    """DeepEP's kernels (CUDA and the deep_ep package): each token goes once to every rank that has its experts."""

    def check(self, cfg: Config) -> None:
        """Raise ConfigError where the rows would not be bfloat16, which is all that the kernels move."""
        if cfg.train.precision != "bf16":
            raise ConfigError(
                f"dispatch=deep_ep moves bfloat16 rows only, but train.precision={cfg.train.precision}; "
                f"{ELSE} or train.precision=bf16"
            )


@plain_dataclass(frozen=True)
class Arrived:
    """What the first dispatch of a routing brought. N tokens came.

    handle: DeepEP's own. weight_NK: without gradient. place_B: the N x K places that are in use, in order of token.
    held: the tokens with their assignments.
    """

    handle: Any
    weight_NK: Tensor
    place_B: Tensor
    held: Held


@plain_dataclass(frozen=True)
class DeepEPLayout:
    """ids_TK: experts of each token, -1 where it has fewer than K. place_A: each assignment's place in it, flattened.

    arrived: one entry, once the first dispatch has been made: DeepEP exchanges counts and rows in one call.
    """

    ids_TK: Tensor
    place_A: Tensor
    arrived: list[Arrived]


@DISPATCHERS.register("deep_ep", DeepEPOptions)
class DeepEPDispatcher(Dispatcher[DeepEPLayout]):
    """The experts apply the weights, which travel with the tokens; DeepEP's combine is a plain sum.

    One communication buffer is made at the first dispatch, so layers should share their dispatcher.
    """

    def __init__(self, options: DeepEPOptions, n_experts: int, group: Group, etp_group: Group) -> None:
        if group is None:
            raise ValueError("the deep_ep dispatcher needs the process group of the expert parallel ranks")
        missing = obstacle()
        if missing is not None:
            raise ConfigError(f"deep_ep needs {missing}; {ELSE}")
        super().__init__(n_experts, group, etp_group)
        import deep_ep

        self.library = deep_ep
        kind, n = deep_ep.Buffer, group.size()
        try:
            self._configs = kind.get_dispatch_config(n), kind.get_combine_config(n)
        except AssertionError as error:  # it knows settings for some numbers of ranks, 1 not among them
            raise ConfigError(f"deep_ep cannot serve parallel.ep={n}: {error}; {ELSE}") from None
        self.n_local = n_experts // n
        self._buffer: Any = None

    def layout(self, routing: Routing) -> DeepEPLayout:
        token_A, expert_A, _ = routing.assignments()
        counts_T = count(token_A, routing.n_tokens)
        K = self._width(routing, counts_T)
        start_T = counts_T.cumsum(0) - counts_T
        nth_A = torch.arange(len(token_A), device=token_A.device) - start_T.index_select(0, token_A)
        place_A = token_A * K + nth_A
        ids_TK = expert_A.new_full((routing.n_tokens * K,), -1).index_copy(0, place_A, expert_A).view(-1, K)
        return DeepEPLayout(ids_TK.to(getattr(self.library, "topk_idx_t", torch.int64)), place_A, [])

    def dispatch_preprocess(self, x_TD: Tensor, plan: Plan[DeepEPLayout]) -> Payload:
        layout = plan.layout
        weight_A = plan.weight_A.to(torch.promote_types(plan.weight_A.dtype, torch.float32))
        weight_TK = weight_A.new_zeros(layout.ids_TK.numel()).index_copy(0, layout.place_A, weight_A)
        return x_TD, weight_TK.view(layout.ids_TK.shape)

    def dispatch_communicate(self, payload: Payload, plan: Plan[DeepEPLayout]) -> Payload:
        x_TD, weight_TK = payload
        x_ND, weight_NK = _Dispatch.apply(x_TD, weight_TK, self, plan.layout)
        arrived = plan.layout.arrived[0]
        weight_B = weight_NK.reshape(-1).index_select(0, arrived.place_B)
        return held.gather(x_ND, weight_B, arrived.held, self.etp_group)

    def dispatch_postprocess(self, payload: Payload, plan: Plan[DeepEPLayout]) -> Rows:
        x_ND, weight_B = payload
        return held.rows(x_ND, weight_B, plan.layout.arrived[0].held)

    def combine_preprocess(self, y_RD: Tensor, plan: Plan[DeepEPLayout]) -> Tensor:
        return held.sum_per_token(y_RD, plan.layout.arrived[0].held)

    def combine_communicate(self, y_ND: Tensor, plan: Plan[DeepEPLayout]) -> Pending:
        arrived = plan.layout.arrived[0]
        y_ND = held.start_scatter(y_ND, arrived.held, self.etp_group).wait()
        return start(
            y_ND,
            there=lambda y: self._sum_back(y, arrived.handle),
            back=lambda g: self._send_again(g, arrived.handle),
        )

    def combine_postprocess(self, y_TD: Tensor, plan: Plan[DeepEPLayout]) -> Tensor:
        return y_TD

    def buffer(self, x: Tensor) -> Any:
        """The communication buffer, large enough for rows like those of x. Collective when it is made."""
        if self._buffer is None:
            assert self.group is not None
            n, row = self.group.size(), x.shape[1] * max(x.element_size(), 2)
            nvl = max(config.get_nvl_buffer_size_hint(row, n) for config in self._configs)
            rdma = max(config.get_rdma_buffer_size_hint(row, n) for config in self._configs)
            self._buffer = self.library.Buffer(self.group, nvl, rdma)
        return self._buffer

    def first_dispatch(self, x_TD: Tensor, weight_TK: Tensor, layout: DeepEPLayout) -> Tensor:
        """x_ND; fills ``layout.arrived``."""
        buffer = self.buffer(x_TD)
        per_rank, per_rdma_rank, per_expert, is_in_rank, _ = buffer.get_dispatch_layout(layout.ids_TK, self.n_experts)
        x_ND, ids_NK, weight_NK, _, handle, _ = buffer.dispatch(
            x_TD.contiguous(),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=layout.ids_TK,
            topk_weights=weight_TK,
        )
        # Experts that are elsewhere are -1.
        place_B = (ids_NK.reshape(-1) >= 0).nonzero().squeeze(1)
        expert_B = ids_NK.reshape(-1).index_select(0, place_B).to(torch.int64)
        own = held.hold(place_B // ids_NK.shape[1], expert_B, len(x_ND), self.n_local, self.etp_group)
        layout.arrived.append(Arrived(handle, weight_NK, place_B, own))
        return x_ND

    def _width(self, routing: Routing, counts_T: Tensor) -> int:
        """K, which must be the same on all ranks. A list of assignments does not tell it."""
        if routing.ids_TK is not None:
            return routing.ids_TK.shape[1]
        own = int(counts_T.max()) if routing.n_tokens else 0
        return max(1, *(k for [k] in all_gather_ints([own], self.group, counts_T.device)))

    def _sum_back(self, y_ND: Tensor, handle: Any) -> Flight:
        y_ND = y_ND.contiguous()
        y_TD, _, event = self.buffer(y_ND).combine(y_ND, handle, async_finish=True)
        return Flight(y_TD, event.current_stream_wait, y_ND)

    def _send_again(self, g_TD: Tensor, handle: Any) -> Flight:
        g_TD = g_TD.contiguous()
        g_ND, _, _, _, _, event = self.buffer(g_TD).dispatch(g_TD, handle=handle, async_finish=True)
        return Flight(g_ND, event.current_stream_wait, g_TD)


class _Dispatch(torch.autograd.Function):
    """(x_TD, weight_TK) -> (x_ND, weight_NK). Recomputation sends the rows alone, by the handle of the first time."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_TK: Tensor, dispatcher: DeepEPDispatcher, layout: DeepEPLayout
    ) -> tuple[Tensor, Tensor]:
        if layout.arrived:
            x_ND = dispatcher.buffer(x_TD).dispatch(x_TD.contiguous(), handle=layout.arrived[0].handle)[0]
        else:
            x_ND = dispatcher.first_dispatch(x_TD, weight_TK, layout)
        ctx.dispatcher, ctx.handle = dispatcher, layout.arrived[0].handle
        return x_ND, layout.arrived[0].weight_NK.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        g_ND, g_NK = (g.contiguous() for g in grads)
        g_TD, g_TK, _ = ctx.dispatcher.buffer(g_ND).combine(g_ND, ctx.handle, topk_weights=g_NK)
        return g_TD, g_TK, None, None


def obstacle() -> str | None:
    """What this machine lacks for DeepEP; None: nothing."""
    if importlib.util.find_spec("deep_ep") is None:
        return "the DeepEP package (deep_ep), which is not installed"
    return None if torch.cuda.is_available() else "CUDA, and this machine has none"
