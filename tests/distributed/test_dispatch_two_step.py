"""Two-step all-to-all: the same numbers, and each token crosses between nodes once per node, its sum once back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moetrain import config
from moetrain.config.errors import ConfigError
from tests.distributed.moe_ranks import D, Sent, Spread, compare, owners

SIZES = {2: [9, 4], 4: [5, 9, 0, 8], 8: [3, 0, 9, 1, 0, 5, 4, 2]}
# ep, etp, node_size
MAPPINGS = [(4, 1, 1), (4, 1, 2), (4, 1, 4), (8, 1, 2), (8, 1, 4), (2, 1, 8), (4, 2, 2), (2, 2, 1)]


def spread(ep: int, etp: int, node_size: int, recompute: str = "none") -> Spread:
    return Spread({"kind": "two_step", "node_size": node_size}, ep, etp, recompute)


@pytest.mark.parametrize(("ep", "etp", "node_size"), MAPPINGS)
def test_two_step_equals_one_process(ep: int, etp: int, node_size: int) -> None:
    compare(spread(ep, etp, node_size), "biases" if etp > 1 else "dropless", SIZES[ep * etp])


@pytest.mark.parametrize("case", ["hot expert", "drops"])
@pytest.mark.parametrize("sizes", [[9, 0, 16, 5], [0, 20, 1, 0]], ids=str)
def test_uneven_loads_and_dropped_tokens(case: str, sizes: list[int]) -> None:
    compare(spread(4, 1, 2), case, sizes)


def crossings(sent: list[Sent], rank: int, node_size: int) -> int:
    """Rows that a rank sent to other nodes."""
    elsewhere = [s.bytes_to for s in sent if s.dtype == "float64"]
    return sum(n for to in elsewhere for r, n in to.items() if r // node_size != rank // node_size)


def between_ranks(sent: list[Sent], rank: int) -> int:
    return sum(n for s in sent if s.dtype == "float64" for r, n in s.bytes_to.items() if r != rank)


@pytest.mark.parametrize(("ep", "node_size"), [(4, 2), (8, 2), (8, 4)])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_each_token_crosses_once_to_each_node(ep: int, node_size: int, recompute: str) -> None:
    sizes = SIZES[ep]
    owner = owners("dropless", sizes, ep)
    homes = torch.arange(ep).repeat_interleave(torch.tensor(sizes))
    rank_TK = torch.cat(owner)
    pairs, assignments = remote(rank_TK // node_size, homes // node_size)
    sent = compare(spread(ep, 1, node_size, recompute), "dropless", sizes)
    crossed = sum(crossings(of_rank, rank, node_size) for rank, of_rank in enumerate(sent))
    # D numbers of 8 bytes there, back, and their gradients; the assignments' weights there, and their gradients.
    there, back = pairs * D * 8, pairs * D * 8
    weights = assignments * 8
    again = 2 if recompute == "full" else 1
    assert crossed == again * (there + back + weights) + (there + back + weights)
    assert pairs < assignments, "some token has two experts on one other node"
    # Inside the node too: once to each rank that has experts of it, from the rank where it arrived.
    arrived = homes % node_size + (rank_TK // node_size * node_size).T
    spread_pairs, spread_assignments = remote(rank_TK, arrived.T)
    inside = spread_pairs * 2 * D * 8 + spread_assignments * 8
    total = sum(between_ranks(of_rank, rank) for rank, of_rank in enumerate(sent))
    assert total - crossed == (again + 1) * inside
    for of_rank in sent:
        assert sum(s.dtype == "int64" for s in of_rank) == 4, "counts and lists once per hop, also with recomputation"


def remote(to_TK: Tensor, home: Tensor) -> tuple[int, int]:
    """(pairs of token and place other than its home, assignments there). home: (T,) or (T, K)."""
    away_TK = to_TK != home.reshape(len(to_TK), -1)
    pairs = {(t, int(to_TK[t, k])) for t, k in away_TK.nonzero().tolist()}
    return len(pairs), int(away_TK.sum())


def test_nodes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError) as error:
        config.load(["dispatch=two_step", "dispatch.node_size=3", "parallel.ep=8"])
    assert str(error.value) == (
        "dispatch.node_size=3 must divide parallel.ep=8, so that every node has as many ranks; "
        "nearest legal: dispatch.node_size=2 or dispatch.node_size=4"
    )
