"""Capacity: who stays is what loops over tokens and experts say, for each drop policy."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.moe.capacity import capacity, random_priority, within_capacity
from moetrain.moe.routing import Routing, TokenContext
from tests.moe.toys import config, empty_carry, make_layer, make_router, tokens

T = 40


@given(st.integers(0, 5000), st.integers(1, 300), st.integers(1, 400))
def test_capacity_is_the_exact_ceiling(assignments: int, experts: int, percent: int) -> None:
    """Also where the float product is a hair above a whole number (1.1 * 10)."""
    exact = math.ceil(Fraction(percent, 100) * assignments / experts)
    assert capacity(assignments, experts, percent / 100) == exact


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 60), st.integers(1, 6), st.integers(0, 12), st.booleans(), st.randoms(use_true_random=False))
def test_kept_assignments_equal_brute_force(A: int, E: int, limit: int, prioritised: bool, random: st.random) -> None:  # type: ignore[name-defined]
    experts = [random.randrange(E) for _ in range(A)]
    priorities = [random.choice([0.1, 0.2, 0.3]) if prioritised else 0.0 for _ in range(A)]
    expected = []
    for e in range(E):
        mine = [a for a in range(A) if experts[a] == e]
        expected += sorted(mine, key=lambda a: (-priorities[a], a))[:limit]
    priority_A = torch.tensor(priorities) if prioritised else None
    kept = within_capacity(torch.tensor(experts, dtype=torch.int64), priority_A, E, limit)
    assert kept.tolist() == sorted(expected)


def drop(policy: str, step: int = 0, factor: float = 0.8) -> tuple[Routing, Routing, int]:
    """(dense routing, routing with drops, dropped count) of the same tokens."""
    x = tokens(T)
    full = make_router(config())
    limited = make_router(config(capacity_factor=factor, drop_policy=policy))
    context = TokenContext(seq_len=T, step=step)
    routing = limited(x, empty_carry(), context)[0]
    return full(x, empty_carry(), TokenContext(seq_len=T, step=step))[0], routing, int(limited.dropped)


@pytest.mark.parametrize("policy", ["score", "position"])
def test_router_drops_by_policy_and_leaves_weights_alone(policy: str) -> None:
    dense, routing, dropped = drop(policy)
    assert dense.ids_TK is not None and dense.weights_TK is not None
    limit = math.ceil(T * 2 / 8 * 0.8)
    expected = []
    for e in range(8):
        mine = [(t, k) for t in range(T) for k in range(2) if dense.ids_TK[t, k] == e]
        if policy == "score":
            mine.sort(key=lambda tk: -dense.weights_TK[tk].item())
        expected += [(t, e, dense.weights_TK[t, k].item()) for t, k in mine[:limit]]
    token_A, expert_A, weight_A = routing.assignments()
    got = list(zip(token_A.tolist(), expert_A.tolist(), weight_A.tolist(), strict=True))
    assert sorted(got) == sorted(expected)
    assert token_A.tolist() == sorted(token_A.tolist())
    assert dropped == 2 * T - len(got) > 0


def test_random_drops_depend_on_step_and_layer_alone() -> None:
    kept = [drop("random", step)[1] for step in (3, 3, 4)]
    expert_counts = torch.bincount(kept[0].expert_A, minlength=8)
    assert expert_counts.max() == math.ceil(T * 2 / 8 * 0.8)
    assert torch.equal(kept[0].token_A, kept[1].token_A) and torch.equal(kept[0].expert_A, kept[1].expert_A)
    assert not torch.equal(kept[0].token_A, kept[2].token_A)
    cpu = torch.device("cpu")
    assert not torch.equal(random_priority(50, 3, 0, cpu), random_priority(50, 3, 1, cpu))


def test_random_drops_are_fair() -> None:
    """Over many steps every position of a full expert survives about equally often."""
    expert_A = torch.zeros(20, dtype=torch.int64)
    survived = torch.zeros(20)
    for step in range(500):
        survived[within_capacity(expert_A, random_priority(20, step, 0, expert_A.device), 1, 10)] += 1
    # Binomial(500, 1/2): five standard deviations are 56.
    assert (survived - 250).abs().max() < 56


def test_outside_training_nothing_is_dropped() -> None:
    router = make_router(config(capacity_factor=0.1))
    routing, _ = router(tokens(T), empty_carry(), TokenContext(seq_len=T, training=False))
    assert routing.ids_TK is not None and routing.token_A is None


def test_a_layer_with_drops_is_the_dropless_layer_less_the_dropped_rows() -> None:
    cfg = config(capacity_factor=0.4, drop_policy="score")
    layer, x = make_layer(cfg), tokens(T)
    out, _ = layer(x, empty_carry(), TokenContext(seq_len=T))
    routing, _ = layer.router(x, empty_carry(), TokenContext(seq_len=T))
    w13, w2 = layer.experts.w13, layer.experts.w2
    expected = torch.zeros_like(x)
    for t, e, w in zip(*(v.tolist() for v in routing.assignments()), strict=True):
        h = torch.nn.functional.silu(w13[e, 0] @ x[t]) * (w13[e, 1] @ x[t])
        expected[t] += w * (w2[e] @ h)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert (expected.abs().sum(1) == 0).any(), "some token lost all its experts, and gets zero"
