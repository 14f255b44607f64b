"""The plans of where experts live: what they promise on any loads, and the cases that the papers name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.config.registry import PLACEMENTS
from moetrain.moe.placement import build_policy
from moetrain.moe.placement.plan import (
    Placement,
    Topology,
    calibrate,
    ep_homes,
    fssdp,
    held,
    heterogeneous_homes,
    migrate,
    moves,
    overlap_degree,
    predict,
    routes,
    rows_of,
    serving,
    shadow,
    static,
)

FOUR = Topology(4, 2)  # two nodes of two
RANKS = st.integers(1, 9)
LOADS = st.lists(st.integers(0, 1000), min_size=1, max_size=24)


def busiest(loads: list[int], placement: Placement, topology: Topology) -> int:
    """Rows of the busiest rank, with every rank's tokens alike."""
    return max(rows_of([loads] * topology.ranks, placement, topology))


@settings(max_examples=150, deadline=None)
@given(RANKS, st.integers(1, 4), LOADS, st.integers(0, 5), st.integers(0, 8), st.randoms(use_true_random=False))
def test_copies_fit_the_slots_and_the_budget_and_no_rank_gets_busier(
    ranks: int, node_size: int, loads: list[int], slots: int, budget: int, draw: object
) -> None:
    """Home always holds its expert; a slot takes one copy; no more experts leave than the budget; idle ones stay."""
    topology = Topology(ranks, node_size)
    homes = tuple(draw.randrange(ranks) for _ in loads)  # type: ignore[attr-defined]
    for placement in (fssdp(homes, loads, slots, budget, topology), shadow(homes, loads, slots, 0.0, topology)):
        assert all(home in on and list(on) == sorted(set(on)) for home, on in zip(homes, placement, strict=True))
        for rank in range(ranks):
            assert sum(homes[e] != rank for e in held(placement, rank)) <= slots
        copied = [e for e, on in enumerate(placement) if len(on) > 1]
        assert all(loads[e] for e in copied)
        assert len(copied) <= max(budget, slots)
    true = [[draw.randrange(50) for _ in loads] for _ in range(ranks)]  # type: ignore[attr-defined]
    more = calibrate(homes, placement, true, slots, 0.0, topology)
    assert all(set(a) <= set(b) for a, b in zip(placement, more, strict=True))
    assert max(rows_of(true, more, topology)) <= max(rows_of(true, placement, topology))
    assert all(sum(homes[e] != rank for e in held(more, rank)) <= slots for rank in range(ranks))


@settings(max_examples=100, deadline=None)
@given(RANKS, st.integers(1, 4), st.lists(st.lists(st.integers(0, 99), min_size=9, max_size=9), min_size=1, max_size=4),
       st.integers(0, 9))  # fmt: skip
def test_heterogeneous_homes_give_every_rank_as_many_experts(
    ranks: int, node_size: int, loads: list[list[int]], budget: int
) -> None:
    if 9 * len(loads) % ranks:
        with pytest.raises(ValueError, match="do not divide evenly"):
            heterogeneous_homes(loads, budget, Topology(ranks, node_size))
        return
    homes = heterogeneous_homes(loads, budget, Topology(ranks, node_size))
    owned = [sum(layer.count(rank) for layer in homes) for rank in range(ranks)]
    assert owned == [9 * len(loads) // ranks] * ranks


@settings(max_examples=100, deadline=None)
@given(RANKS, st.integers(1, 4), st.lists(st.integers(0, 99), min_size=12, max_size=12))
def test_migration_swaps_experts_and_never_makes_the_busiest_rank_busier(
    ranks: int, node_size: int, loads: list[int]
) -> None:
    homes, topology = ep_homes(12, ranks), Topology(ranks, node_size)
    new = migrate(homes, loads, topology)
    assert sorted(new) == sorted(homes)
    rows = [[sum(x for x, h in zip(loads, hs, strict=True) if h == r) for r in range(ranks)] for hs in (homes, new)]
    assert max(rows[1]) <= max(rows[0])


def test_migration_looks_at_swaps_of_the_busiest_rank_alone() -> None:
    """All pairs of experts for each swap held up 58 layers of 256 experts on 64 ranks for many seconds."""

    class Counted(list[float]):
        looks = 0

        def __getitem__(self, i: Any) -> Any:
            self.looks += 1
            return super().__getitem__(i)

    homes, loads = ep_homes(64, 16), Counted(17 * e % 101 for e in range(64))
    new = migrate(homes, loads, Topology(16, 8))
    swaps = sum(a != b for a, b in zip(homes, new, strict=True))  # at least: an expert may swap twice
    assert swaps
    assert loads.looks <= 2 * (swaps + 1) * (4 * 64 + 1)


def test_algorithm_1_by_hand() -> None:
    """Two slots for two hot experts: both everywhere. One slot for two of loads 6 and 2: four slots, three and one."""
    homes, loads = (0, 1, 2, 3), [6.0, 1.0, 2.0, 1.0]
    assert fssdp(homes, loads, 2, 2, FOUR) == ((0, 1, 2, 3), (1,), (0, 1, 2, 3), (3,))
    assert fssdp(homes, loads, 1, 2, FOUR) == ((0, 1, 2, 3), (1,), (0, 2), (3,))
    # The first copy goes to the other node.
    assert fssdp((0,), [5.0], 1, 1, Topology(4, 2)) == ((0, 1, 2, 3),)
    assert static((0, 0), 2, FOUR)[0][1] >= 2
    assert fssdp(homes, [0.0] * 4, 2, 2, FOUR) == ((0,), (1,), (2,), (3,)), "loads all zero: plain ep"


def test_one_hot_expert_is_the_worst_for_ep_and_the_best_for_copies() -> None:
    """512 rows of one expert from four ranks: on its home alone, or a quarter on each."""
    homes, loads = ep_homes(8, 4), [128, 0, 0, 0, 0, 0, 0, 0]
    placement = fssdp(homes, loads, 1, 1, FOUR)
    assert busiest(loads, ((0,), *((h,) for h in homes[1:])), FOUR) == 512
    assert busiest(loads, placement, FOUR) == 128
    assert moves(homes, placement) == 3


def test_a_shadow_must_spare_more_rows_than_it_costs() -> None:
    """Expert 0 has 400 of 700 rows. A shadow leaves 100 of them on each rank, and 100 of others: 200 instead of 400."""
    homes, loads = (0, 1, 2, 3), [400.0, 100.0, 100.0, 100.0]
    assert shadow(homes, loads, 2, 199.0, FOUR)[0] == (0, 1, 2, 3)
    assert shadow(homes, loads, 2, 201.0, FOUR)[0] == (0,)


def test_a_row_is_served_here_else_in_the_node_else_anywhere_evenly() -> None:
    placement: Placement = ((0, 3), (2,), (0, 1), (2, 3))
    assert serving(placement, 0, FOUR) == ((0,), (2,), (0,), (2, 3))
    assert serving(placement, 2, FOUR) == ((3,), (2,), (0, 1), (2,))
    sent = routes([[0, 0, 0, 5], [0] * 4, [0, 0, 5, 0], [0] * 4], placement, FOUR)
    assert [sent[0][r][3] for r in range(4)] == [0, 0, 3, 2]
    assert [sent[2][r][2] for r in range(4)] == [3, 2, 0, 0]


def test_loads_are_predicted_by_the_mean_of_the_last_five_steps() -> None:
    assert predict([], 2) == [0.0, 0.0]
    assert predict([[100, 0], [1, 5], [2, 5], [3, 5], [4, 5], [5, 5]], 2) == [3.0, 5.0]
    assert overlap_degree(0.01, 1e9, 3_000_000) == 3


def test_static_copies_need_as_many_ranks() -> None:
    with pytest.raises(ValueError, match="5 copies of an expert need as many ranks, not 4"):
        static((0, 1), 5, FOUR)


@pytest.mark.parametrize("kind", ["ep", "fssdp", "migrate", "shadow", "static"])
def test_every_policy_is_pure_and_keeps_experts_at_home_without_loads(kind: str) -> None:
    """Asked twice it says the same; a simulator needs no more than this."""
    assert kind in PLACEMENTS.names()
    policy = build_policy({"kind": kind}, 4)
    homes = ep_homes(8, 4)
    assert policy.place(homes, [8.0, 1, 1, 1, 1, 1, 1, 1]) == policy.place(homes, [8.0, 1, 1, 1, 1, 1, 1, 1])
    assert policy.rehome(100, [homes], [[0.0] * 8]) == [homes]
    if kind != "static":
        assert policy.place(homes, [0.0] * 8) == tuple((h,) for h in homes)
