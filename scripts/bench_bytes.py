"""Bytes that dispatchers move, against the least that would do: ``bench.py dispatch --parts bytes``."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from bench_ranks import Shape, build_layer, on_ranks, print_table, step, tokens_of
from torch import Tensor

F32 = 4
# dispatcher, ep, etp
MAPPINGS = [
    *(("all_to_all", ep, 1) for ep in (2, 4, 8)),
    *(("all_gather", ep, 1) for ep in (2, 4, 8)),
    *(("two_step", ep, 1) for ep in (2, 4, 8)),
    ("local", 1, 2),
    *((kind, 2, 2) for kind in ("all_to_all", "all_gather", "two_step")),
    *((kind, 4, 2) for kind in ("all_to_all", "all_gather", "two_step")),
]
BYTES = Shape(dim=256, experts=64, top_k=8, expert_dim=32, shared_dim=0, tokens=256)


def bytes_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Bytes of every dispatcher and mapping, beside what they need."""
    s = BYTES
    print(f"\nbytes of one step: dim {s.dim}, {s.experts} experts, top {s.top_k}, {s.tokens} tokens on each rank; MB")
    rows = []
    for kind, ep, etp in MAPPINGS:
        answers = on_ranks(ep * etp, count_bytes, s, kind, ep, etp, args.node_size)
        ids = [ids for _, _, ids in answers]
        moved, crossing = (sum(answer[i] for answer in answers) for i in (0, 1))
        node = min(args.node_size, ep)
        least, floor = least_bytes(s, kind, ids, ep, etp, node), floor_bytes(s, ids, ep, etp)
        crossing_floor = pairs_apart(ids, ep, etp, node) * 4 * F32 * s.dim
        rows.append(
            {"dispatch": kind, "ep": ep, "etp": etp, "moved": moved / 1e6, "least": least / 1e6,
             "moved/least": moved / least, "moved/floor": moved / floor, "crossing": crossing / 1e6,
             "crossing floor": crossing_floor / 1e6}
        )  # fmt: skip
    print_table(rows)
    return rows


def count_bytes(s: Shape, kind: str, ep: int, etp: int, node_size: int) -> tuple[int, int, Tensor]:
    """(bytes that this rank sends in a step, those of them to other nodes, experts of its tokens (T, K))."""
    layer, rank = build_layer(s, kind, ep, etp, node_size), dist.get_rank()
    x = tokens_of(s, rank)
    with counting(etp, node_size) as total:
        step(layer, x)
    return total[0], total[1], (x @ layer.router.weight.T).topk(s.top_k).indices


@contextlib.contextmanager
def counting(etp: int, node_size: int) -> Iterator[list[int]]:
    """[bytes to other ranks, bytes to other nodes]: every collective of a dispatcher is an all-to-all."""
    total, me, original = [0, 0], dist.get_rank(), dist.all_to_all_single

    def counted(out: Tensor, x: Tensor, out_splits: Any, in_splits: Any, *, group: Any, **more: Any) -> Any:
        row = (x[:1] if len(x) else out[:1]).numel() * x.element_size()
        for peer, n in zip(dist.get_process_group_ranks(group), in_splits, strict=True):
            total[0] += n * row * (peer != me)
            total[1] += n * row * (peer // etp // node_size != me // etp // node_size)
        return original(out, x, out_splits, in_splits, group=group, **more)

    dist.all_to_all_single = counted
    try:
        yield total
    finally:
        dist.all_to_all_single = original


def unique_pairs(*columns: Tensor) -> int:
    """Number of different rows of these columns."""
    return len(torch.unique(torch.stack(columns, dim=1), dim=0))


def flat(s: Shape, ids: list[Tensor], ep: int, etp: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of all assignments: their token (numbered over ranks), its ep and etp rank, and the ep rank of the expert."""
    token_A = torch.arange(len(ids) * s.tokens).repeat_interleave(s.top_k)
    rank_A = token_A // s.tokens
    return token_A, rank_A // etp, rank_A % etp, torch.cat(ids).flatten() // (s.experts // ep)


def least_bytes(s: Shape, kind: str, ids: list[Tensor], ep: int, etp: int, node: int) -> int:
    """Bytes that the algorithm needs: rows there and back, their gradients; weights where they travel, theirs."""
    row, weight, tokens = 4 * F32 * s.dim, 2 * F32, len(ids) * s.tokens
    token_A, home_A, _, owner_A = flat(s, ids, ep, etp)
    A = len(token_A)
    if kind == "all_to_all":
        return int((owner_A != home_A).sum()) * row + A * (etp - 1) * row
    if kind in ("all_gather", "local"):
        # All tokens reach every ep rank, and then the etp ranks beside it; the weights there are those in use.
        etp_part = (tokens * ep * row + A * weight) * (etp - 1)
        return (tokens * row + A * weight) * (ep - 1) + etp_part
    here_A = owner_A // node * node + home_A % node  # where a token arrives on the node of its expert
    total = 0
    for start_A, to_A in ((home_A, here_A), (here_A, owner_A)):
        moves = start_A != to_A
        total += unique_pairs(token_A[moves], to_A[moves]) * row + int(moves.sum()) * weight
    return total + (unique_pairs(token_A, owner_A) * row + A * weight) * (etp - 1)


def floor_bytes(s: Shape, ids: list[Tensor], ep: int, etp: int) -> int:
    """Each token once to every other rank that has a part of one of its experts, and one sum back, with gradients."""
    token_A, home_A, _, owner_A = flat(s, ids, ep, etp)
    away = owner_A != home_A
    ranks = unique_pairs(token_A[away], owner_A[away]) * etp + unique_pairs(token_A[~away]) * (etp - 1)
    return ranks * 4 * F32 * s.dim


def pairs_apart(ids: list[Tensor], ep: int, etp: int, node: int) -> int:
    """Pairs of a token and a node other than its own that has an expert of it."""
    token_A, home_A, _, owner_A = flat(BYTES, ids, ep, etp)
    apart = owner_A // node != home_A // node
    return unique_pairs(token_A[apart], owner_A[apart] // node) if apart.any() else 0
