"""Where experts live and who computes them: pure functions of loads, slots, budget and topology. No ranks, no tensors.

Every expert of a layer has one home rank, which owns its weights, gradients and optimizer state. A placement says, for
one step, which ranks hold a copy of its weights; its home is always among them. Trainer and simulator share this file,
so that both plan the same; all ranks give it the same numbers and get the same answer.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Of each expert of a layer: its home rank.
Homes = tuple[int, ...]
# Of each expert of a layer: the ranks that hold its weights, ascending.
Placement = tuple[tuple[int, ...], ...]
# Of each expert of a layer: how many rows it gets, or is thought to get.
Loads = Sequence[float]

# Steps whose mean load predicts the next one (Hecate, arXiv 2502.02581).
WINDOW = 5


@dataclass(frozen=True)
class Topology:
    """``ranks`` on nodes of ``node_size`` consecutive ones, which share fast links; the last node may have fewer."""

    ranks: int
    node_size: int

    @property
    def nodes(self) -> int:
        """How many nodes there are."""
        return -(-self.ranks // self.node_size)

    def node_of(self, rank: int) -> int:
        """The node of ``rank``."""
        return rank // self.node_size


def ep_homes(n_experts: int, ranks: int) -> Homes:
    """Plain expert parallelism: rank r of n is home to experts [r*E/n, (r+1)*E/n)."""
    return tuple(e * ranks // n_experts for e in range(n_experts))


def at_home(homes: Homes) -> Placement:
    """No copies."""
    return tuple((home,) for home in homes)


def held(placement: Placement, rank: int) -> list[int]:
    """The experts whose weights ``rank`` holds, ascending: the order of its slots."""
    return [e for e, ranks in enumerate(placement) if rank in ranks]


def slots(placement: Placement, ranks: int) -> tuple[dict[tuple[int, int], int], list[int]]:
    """((expert, rank) -> its slot on the rank, numbered from 0, slots of each rank)."""
    found: dict[tuple[int, int], int] = {}
    used = [0] * ranks
    for e, on in enumerate(placement):
        for rank in on:
            found[e, rank] = used[rank]
            used[rank] += 1
    return found, used


def moves(homes: Homes, placement: Placement) -> int:
    """Experts' weights that travel to make ``placement``, each copy once; as many gradients travel back."""
    return sum(rank != home for home, ranks in zip(homes, placement, strict=True) for rank in ranks)


def predict(history: Sequence[Loads], n_experts: int) -> list[float]:
    """Loads of the next step: the mean of the last ``WINDOW`` ones; all zero where nothing is known."""
    recent = history[-WINDOW:]
    return [sum(loads[e] for loads in recent) / len(recent) for e in range(n_experts)] if recent else [0.0] * n_experts


def overlap_degree(seconds: float, bytes_per_s: float, expert_bytes: int) -> int:
    """Experts that can travel behind ``seconds`` of other work, at the rate of a rank's slowest link."""
    return int(seconds * bytes_per_s // expert_bytes)


def fssdp(homes: Homes, loads: Loads, slots: int, budget: int, topology: Topology) -> Placement:
    """Sparse materialisation (Hecate, algorithm 1).

    slots: free places for copies on each rank. budget: experts that may leave home, the most loaded ones (the paper's
    overlap degree t). Where slots suffice, all ranks hold all of these; else each gets its share of all slots by its
    load, over the nodes first and over ranks second. Experts without load stay at home.

    The paper leaves open how shares are rounded: here to the largest remainder, ties to the lower expert; the copy at
    home takes no slot.
    """
    budget = min(budget, len(homes))
    hot = [e for e in _by_load(loads) if loads[e] > 0][:budget]
    if budget <= slots:
        everywhere = tuple(range(topology.ranks))
        return tuple(everywhere if e in hot else (home,) for e, home in enumerate(homes))
    copies = _shares([loads[e] for e in hot], topology.ranks * slots, topology.ranks - 1)
    return _spread(homes, dict(zip(hot, copies, strict=True)), slots, topology)


def calibrate(
    homes: Homes,
    placement: Placement,
    counts_RE: Sequence[Sequence[int]],
    slots: int,
    cost: float,
    topology: Topology,
) -> Placement:
    """``placement`` with more copies, now that the rows of each rank for each expert are known (Hecate's calibration).

    The most loaded experts go, one after the other, to every rank that lacks them and has one of its ``slots`` left, as
    long as each spares the busiest rank more than ``cost`` rows: what a rank could compute while a copy travels.
    """
    used = [0] * topology.ranks
    for home, ranks in zip(homes, placement, strict=True):
        for rank in ranks:
            used[rank] += rank != home
    loads = [sum(counts[e] for counts in counts_RE) for e in range(len(homes))]
    now = max(rows_of(counts_RE, placement, topology))
    for e in _by_load(loads):
        new = {rank for rank in range(topology.ranks) if used[rank] < slots and rank not in placement[e]}
        if not new or not loads[e]:
            break
        tried = tuple(tuple(sorted({*ranks, *new})) if i == e else ranks for i, ranks in enumerate(placement))
        then = max(rows_of(counts_RE, tried, topology))
        if now - then <= cost:
            break
        placement, now = tried, then
        for rank in new:
            used[rank] += 1
    return placement


def shadow(homes: Homes, loads: Loads, slots: int, cost: float, topology: Topology) -> Placement:
    """Dynamic shadowing (after FasterMoE, PPoPP 2022): hot experts go to every rank, one after the other,
    while that pays.

    slots: shadows at most. cost: what a shadow costs (weights out, gradients back), in rows that a rank could compute
    in this time. A shadow's rows are computed where their tokens are, which are taken to be spread evenly. The paper
    decides by the loads of the step at hand; here they are predicted.
    """
    shadows: list[int] = []

    def busiest(shadows: Sequence[int]) -> float:
        rows = [0.0] * topology.ranks
        for e, home in enumerate(homes):
            rows[home] += 0 if e in shadows else loads[e]
        return max(rows) + sum(loads[e] for e in shadows) / topology.ranks + cost * len(shadows)

    best = (busiest(()), 0)
    for e in [e for e in _by_load(loads) if loads[e] > 0][:slots]:
        shadows.append(e)
        best = min(best, (busiest(shadows), len(shadows)))
    chosen, everywhere = shadows[: best[1]], tuple(range(topology.ranks))
    return tuple(everywhere if e in chosen else (home,) for e, home in enumerate(homes))


@functools.lru_cache(maxsize=1024)  # asked for every layer after every step, with the same answer
def static(homes: Homes, copies: int, topology: Topology) -> Placement:
    """Every expert on ``copies`` ranks, its home one of them, whatever the loads: on as many nodes as there are.

    Raises ValueError where there are fewer ranks.
    """
    if copies > topology.ranks:
        raise ValueError(f"{copies} copies of an expert need as many ranks, not {topology.ranks}")
    extra = dict.fromkeys(range(len(homes)), copies - 1)
    return _spread(homes, extra, len(homes), topology)


def migrate(homes: Homes, loads: Loads, topology: Topology) -> Homes:
    """Homes that even out the ranks' loads (after SmartMoE's placements, ATC 2023); ranks keep their number of experts.

    The busiest rank swaps an expert for a lighter one of another rank, each time the swap that leaves the lower maximum
    of the two, until none lowers its load. The experts that move are few.
    """
    new, rows = list(homes), [0.0] * topology.ranks
    for home, load in zip(homes, loads, strict=True):
        rows[home] += load
    for _ in range(len(homes)):
        top = max(range(topology.ranks), key=lambda rank: (rows[rank], -rank))
        best = (rows[top], -1, -1)
        for mine, other in itertools.product([e for e, home in enumerate(new) if home == top], range(len(new))):
            gain = loads[mine] - loads[other]
            if new[other] != top and gain > 0:
                best = min(best, (max(rows[top] - gain, rows[new[other]] + gain), mine, other))
        if best[1] < 0:
            break
        _, mine, other = best
        gain = loads[mine] - loads[other]
        rows[top] -= gain
        rows[new[other]] += gain
        new[mine], new[other] = new[other], new[mine]
    return tuple(new)


def heterogeneous_homes(loads_LE: Sequence[Loads], budget: int, topology: Topology) -> list[Homes]:
    """Heterogeneous sharding (Hecate, algorithm 2): homes of all layers at once.

    A rank owns as many experts as any other over all layers, but 0 to E of one layer. The ``budget`` most loaded
    experts of a layer will have copies anyway, so the others decide: layer by layer, the one with the hottest of them
    first, each goes to the least loaded node and rank that has a place left. Experts with copies fill what is left.

    Load is counted layer by layer, since ranks wait for each other in each; ties go to whoever has fewer places left
    (the paper's), then to the lower rank. Raises ValueError where the experts do not divide evenly.
    """
    total = sum(len(loads) for loads in loads_LE)
    if total % topology.ranks:
        raise ValueError(f"{total} experts of all layers do not divide evenly over {topology.ranks} ranks")
    free = [total // topology.ranks] * topology.ranks
    hot = [set(_by_load(loads)[:budget]) for loads in loads_LE]
    cold = [[e for e in _by_load(loads) if e not in h] for loads, h in zip(loads_LE, hot, strict=True)]
    order = sorted(range(len(cold)), key=lambda i: (-max((loads_LE[i][e] for e in cold[i]), default=0.0), i))
    homes = [[-1] * len(loads) for loads in loads_LE]
    for i in order:
        rows = [0.0] * topology.ranks
        for e in cold[i]:
            rank = _least_loaded(rows, free, topology)
            homes[i][e] = rank
            rows[rank] += loads_LE[i][e]
            free[rank] -= 1
    for i in order:
        for e in sorted(hot[i]):
            rank = max(range(topology.ranks), key=lambda r: (free[r], -r))
            homes[i][e] = rank
            free[rank] -= 1
    return [tuple(layer) for layer in homes]


def serving(placement: Placement, source: int, topology: Topology) -> Placement:
    """Of each expert: the ranks that may serve the tokens of rank ``source``, which it spreads over them evenly:
    itself, else those of its node, else all that hold the expert."""
    found = []
    for ranks in placement:
        near = tuple(rank for rank in ranks if topology.node_of(rank) == topology.node_of(source))
        found.append((source,) if source in ranks else near or ranks)
    return tuple(found)


def server(ranks: tuple[int, ...], source: int, row: int) -> int:
    """Which of ``ranks`` serves row ``row`` (numbered from 0, in order of token) of an expert's rows on ``source``."""
    return ranks[(source + row) % len(ranks)]


def routes(counts_RE: Sequence[Sequence[int]], placement: Placement, topology: Topology) -> list[list[list[int]]]:
    """Rows that each rank sends to each rank for each expert, [source][rank][expert], with the rows of each expert that
    each rank's tokens have, ``counts_RE``. What stays on its rank is counted too."""
    sent = [[[0] * len(placement) for _ in range(topology.ranks)] for _ in range(topology.ranks)]
    for source, rank, e, rows in _served(counts_RE, placement, topology):
        sent[source][rank][e] += rows
    return sent


def rows_of(counts_RE: Sequence[Sequence[int]], placement: Placement, topology: Topology) -> list[int]:
    """Rows that each rank computes, by ``routes``."""
    computed = [0] * topology.ranks
    for _, rank, _, rows in _served(counts_RE, placement, topology):
        computed[rank] += rows
    return computed


def _served(
    counts_RE: Sequence[Sequence[int]], placement: Placement, topology: Topology
) -> Iterator[tuple[int, int, int, int]]:
    """(source, rank, expert, rows) of all that ``routes`` sends."""
    for source, counts in enumerate(counts_RE):
        for e, ranks in enumerate(serving(placement, source, topology)):
            whole, rest = divmod(counts[e], len(ranks))
            for i in range(len(ranks)):
                yield source, server(ranks, source, i), e, whole + (i < rest)


def _by_load(loads: Loads) -> list[int]:
    """Experts, the most loaded first."""
    return sorted(range(len(loads)), key=lambda e: (-loads[e], e))


def _shares(loads: Sequence[float], total: int, most: int) -> list[int]:
    """``total`` divided in proportion to ``loads``, each part at most ``most``; what that cuts off goes to the next."""
    parts = [0] * len(loads)
    while (left := min(total, most * len(loads)) - sum(parts)) > 0:
        open_ = [i for i, n in enumerate(parts) if n < most]
        weight = sum(loads[i] for i in open_)
        exact = {i: left * loads[i] / weight for i in open_}
        whole = {i: min(int(exact[i]), most - parts[i]) for i in open_}
        spare = left - sum(int(x) for x in exact.values())
        for i in sorted(open_, key=lambda i: (int(exact[i]) - exact[i], i)):
            if spare > 0 and whole[i] < most - parts[i]:
                whole[i] += 1
                spare -= 1
        for i, n in whole.items():
            parts[i] += n
    return parts


def _spread(homes: Homes, copies: dict[int, int], slots: int, topology: Topology) -> Placement:
    """``copies[e]`` copies of expert e besides the one at home, in order of ``copies``, as far as slots allow: each to
    a node with the fewest copies of it, of these to that with the most free slots, there to the rank with the most."""
    free = [slots] * topology.ranks
    placed = [{home} for home in homes]
    for e, n in copies.items():
        for _ in range(n):
            ranks = [rank for rank in range(topology.ranks) if free[rank] and rank not in placed[e]]
            if not ranks:
                break
            node_free, node_has = [0] * topology.nodes, [0] * topology.nodes
            for rank in range(topology.ranks):
                node_free[topology.node_of(rank)] += free[rank]
            for rank in placed[e]:
                node_has[topology.node_of(rank)] += 1
            # The next rank after home comes first where all else is equal: experts of one home differ by their number.
            turn = {rank: (rank - homes[e] - 1 - e) % topology.ranks for rank in ranks}
            best = min(
                ranks,
                key=lambda r: (node_has[topology.node_of(r)], -node_free[topology.node_of(r)], -free[r], turn[r]),
            )
            placed[e].add(best)
            free[best] -= 1
    return tuple(tuple(sorted(ranks)) for ranks in placed)


def _least_loaded(rows: Sequence[float], free: Sequence[int], topology: Topology) -> int:
    """The least loaded rank of the least loaded node, of those with a place left."""
    node_rows, node_free = [0.0] * topology.nodes, [0] * topology.nodes
    for rank in range(topology.ranks):
        node_rows[topology.node_of(rank)] += rows[rank]
        node_free[topology.node_of(rank)] += free[rank]
    nodes = [n for n in range(topology.nodes) if node_free[n]]
    node = min(nodes, key=lambda n: (node_rows[n], node_free[n], n))
    ranks = [rank for rank in range(topology.ranks) if topology.node_of(rank) == node and free[rank]]
    return min(ranks, key=lambda rank: (rows[rank], free[rank], rank))
