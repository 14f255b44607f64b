"""A stand-in for the ``deep_ep`` package on gloo: the part of its Buffer that the dispatcher drives, and its rules.

Written from the docstrings of DeepEP 1.2's ``buffer.py``. Asserts what the real one would refuse.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

topk_idx_t = torch.int64


class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 8 * hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0


class EventOverlap:
    """Results are there only after the wait."""

    def __init__(self, late: list[tuple[Tensor, Tensor]] | None) -> None:
        self.late = late

    def current_stream_wait(self) -> None:
        assert self.late is not None, "valid only with async_finish"
        for out, value in self.late:
            out.copy_(value)


class Buffer:
    """handle: for each rank, which of this rank's tokens go there; and how many came from each."""

    made = 0
    calls: list[str] = []  # noqa: RUF012

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0) -> None:
        assert num_nvl_bytes > 0
        type(self).made += 1
        self.group, self.n, self.rank = group, group.size(), group.rank()

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8, 16), f"Unsupported number of EP ranks: {num_ranks}"
        return Config()

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        return Config()

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> tuple[Any, ...]:
        assert topk_idx.dtype == topk_idx_t and topk_idx.is_contiguous()
        self.n_local = num_experts // self.n
        owner_TK = torch.where(topk_idx >= 0, topk_idx // self.n_local, -1)
        is_in_rank = torch.stack([(owner_TK == r).any(1) for r in range(self.n)], dim=1)
        per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts).int()
        return is_in_rank.sum(0).int(), None, per_expert, is_in_rank, EventOverlap(None)

    def dispatch(
        self,
        x: Tensor,
        handle: Any = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        async_finish: bool = False,
    ) -> tuple[Any, ...]:
        self.calls.append("dispatch by handle" if handle is not None else "dispatch")
        assert x.dim() == 2 and x.is_contiguous()
        if handle is not None:
            assert topk_idx is None and topk_weights is None, "not with a handle"
            recv_x, event = self._late(self._there(x, handle), async_finish)
            return recv_x, None, None, None, None, event
        assert is_token_in_rank is not None and num_tokens_per_rank is not None and num_tokens_per_expert is not None
        assert topk_idx is not None and topk_weights is not None and topk_weights.shape == topk_idx.shape
        assert torch.equal(num_tokens_per_rank, is_token_in_rank.sum(0).int())
        came = torch.empty(self.n, dtype=torch.int32)
        dist.all_to_all_single(came, num_tokens_per_rank, [1] * self.n, [1] * self.n, group=self.group)
        handle = (is_token_in_rank, came.tolist())
        # -1 for experts of other ranks, and local numbers for this rank's; weights of the others are zeros.
        ids = self._there(topk_idx, handle) - self.rank * self.n_local
        here = (ids >= 0) & (ids < self.n_local)
        weights = torch.where(here, self._there(topk_weights, handle), 0)
        ids = torch.where(here, ids, -1)
        per_expert = torch.bincount(ids[here], minlength=self.n_local).tolist()
        return self._there(x, handle), ids, weights, per_expert, handle, EventOverlap(None)

    def combine(
        self, x: Tensor, handle: Any, topk_weights: Tensor | None = None, async_finish: bool = False
    ) -> tuple[Any, ...]:
        self.calls.append("combine")
        assert x.dim() == 2 and x.is_contiguous() and len(x) == sum(handle[1])
        weights = None
        if topk_weights is not None:
            assert topk_weights.is_contiguous() and len(topk_weights) == len(x)
            weights = self._back(topk_weights, handle)
        out, event = self._late(self._back(x, handle), async_finish)
        return out, weights, event

    def _there(self, x: Tensor, handle: Any) -> Tensor:
        is_in_rank, came = handle
        parts = [x[is_in_rank[:, r]] for r in range(self.n)]
        out = x.new_empty(sum(came), *x.shape[1:])
        dist.all_to_all_single(out, torch.cat(parts), came, [len(p) for p in parts], group=self.group)
        return out

    def _back(self, x: Tensor, handle: Any) -> Tensor:
        is_in_rank, came = handle
        went = is_in_rank.sum(0).tolist()
        parts = x.new_empty(sum(went), *x.shape[1:])
        dist.all_to_all_single(parts, x, went, came, group=self.group)
        out = x.new_zeros(len(is_in_rank), *x.shape[1:])
        for r, part in enumerate(parts.split(went)):
            out[is_in_rank[:, r]] += part
        return out

    def _late(self, value: Tensor, async_finish: bool) -> tuple[Tensor, EventOverlap]:
        if not async_finish:
            return value, EventOverlap(None)
        out = torch.full_like(value, float("nan"))
        return out, EventOverlap([(out, value)])
