"""Capacity: an expert takes a limited number of rows per rank and micro-batch, and the rest is dropped."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from moetrain.moe.permute import count


def capacity(n_assignments: int, n_experts: int, factor: float) -> int:
    """Rows an expert takes: its even share of assignments times ``factor``, rounded up (GShard, arXiv 2006.16668)."""
    # Rounded first, so that 1.1 * 10 is 11 and not 12.
    return math.ceil(round(n_assignments * factor / n_experts, 6))


def random_priority(n_assignments: int, step: int, layer: int, device: torch.device) -> Tensor:
    """A priority per assignment, float32 (A,), drawn from (step, layer) alone.

    So a rerun drops the same choices. All micro-batches and ranks of a step share the draw, position by position.
    """
    # Hashed, because torch's CPU generator uses the low 32 bits of a seed only.
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{step}/{layer}".encode()))
    return torch.rand(n_assignments, generator=generator, device=device)


def within_capacity(expert_A: Tensor, priority_A: Tensor | None, n_experts: int, limit: int) -> Tensor:
    """Which assignments stay: for each expert the ``limit`` of highest priority. Indices into expert_A, ascending.

    Equal priorities, and priority_A None, keep the earliest.
    """
    A = torch.arange(len(expert_A), device=expert_A.device)
    by_priority = A if priority_A is None else priority_A.argsort(descending=True, stable=True)
    order = by_priority.index_select(0, expert_A.index_select(0, by_priority).argsort(stable=True))
    counts_E = count(expert_A, n_experts)
    first_E = counts_E.cumsum(0) - counts_E
    place = A - first_E.repeat_interleave(counts_E, output_size=len(A))
    return order[place < limit].sort().values
