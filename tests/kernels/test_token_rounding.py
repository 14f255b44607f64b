"""Token rounding keeps what the paper (arXiv 2512.14080, token rounding) promises of each way to round."""

from __future__ import annotations

import pytest
import torch
from moe_kernels import ROUNDINGS, round_tokens
from torch import Tensor

T, E, K, TILE = 100, 12, 3, 8


def routing(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A softmax router that prefers low experts: (scores_TE, ids_TK, weights_TK, normalised over the K)."""
    g = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(T, E, generator=g, dtype=torch.float64) - torch.arange(E) / 3
    scores_TE = logits_TE.softmax(-1)
    weights_TK, ids_TK = scores_TE.topk(K)
    return scores_TE, ids_TK, weights_TK / weights_TK.sum(-1, keepdim=True)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_counts_become_the_multiple_below_or_above(rounding: str) -> None:
    """And an expert keeps its chosen tokens from the best on; others come only when all the chosen are in."""
    for seed in range(5):
        scores_TE, ids_TK, weights_TK = routing(seed)
        g = torch.Generator().manual_seed(seed)
        token_A, expert_A, weight_A = round_tokens(scores_TE, ids_TK, weights_TK, TILE, rounding, g)
        assert torch.equal((token_A * E + expert_A).unique(), token_A * E + expert_A), "each once, in order"
        for e in range(E):
            chosen = {int(t): float(weights_TK[t, k]) for t, k in (ids_TK == e).nonzero()}
            kept = dict(zip(token_A[expert_A == e].tolist(), weight_A[expert_A == e].tolist(), strict=True))
            floor = len(chosen) // TILE * TILE
            ceil = min(-(-len(chosen) // TILE) * TILE, T // TILE * TILE)
            assert len(kept) in {"up": {ceil}, "down": {floor}}.get(rounding, {floor, ceil})
            if rounding == "nearest":
                assert abs(len(kept) - len(chosen)) <= TILE // 2
            best = sorted(chosen, key=lambda t: -chosen[t])
            rest = sorted(set(range(T)) - set(chosen), key=lambda t: -scores_TE[t, e])
            want = (best + rest)[: len(kept)]
            assert set(kept) == set(want)
            assert all(kept[t] == chosen.get(t, float(scores_TE[t, e])) for t in kept)


def test_balanced_keeps_the_total() -> None:
    """The total over all experts, and over the first few, is off by half a tile at most."""
    for seed in range(20):
        scores_TE, ids_TK, weights_TK = routing(seed)
        _, expert_A, _ = round_tokens(scores_TE, ids_TK, weights_TK, TILE, "balanced")
        off_E = torch.bincount(expert_A, minlength=E) - torch.bincount(ids_TK.flatten(), minlength=E)
        assert off_E.cumsum(0).abs().max() <= TILE / 2


@pytest.mark.parametrize("rounding", ["random", "score"])
def test_chance_is_as_said(rounding: str) -> None:
    """One expert of 8 + 2 tokens, each of score 1/2, and others of score 1/4: up by counts 2 of 8 times, by scores
    (2 / 2) / (2 / 2 + 6 / 4) = 2 of 5 times."""
    scores_TE = torch.full((40, 2), 0.25)
    scores_TE[:10, 0] = 0.5
    scores_TE[10:, 1] = 0.5
    ids_TK = scores_TE.argmax(1, keepdim=True)
    g = torch.Generator().manual_seed(0)
    ups = 0
    for _ in range(2000):
        _, expert_A, _ = round_tokens(scores_TE, ids_TK, scores_TE.gather(1, ids_TK), 8, rounding, g)
        ups += int((expert_A == 0).sum() == 16)
    want = {"random": 0.25, "score": 0.4}[rounding]
    assert abs(ups / 2000 - want) < 4 * (want * (1 - want) / 2000) ** 0.5


def test_gradients_reach_scores_and_weights() -> None:
    scores_TE, ids_TK, weights_TK = (t.requires_grad_() if t.is_floating_point() else t for t in routing(1))
    token_A, expert_A, weight_A = round_tokens(scores_TE, ids_TK, weights_TK.detach().requires_grad_(), TILE, "up")
    weight_A.sum().backward()
    added_TE = torch.zeros(T, E).index_put((token_A, expert_A), torch.ones(len(token_A))).scatter(1, ids_TK, 0.0)
    assert scores_TE.grad is not None and torch.equal(scores_TE.grad, added_TE.double())


def test_bad_settings() -> None:
    for tile, rounding in ((0, "up"), (8, "ceil")):
        with pytest.raises(ValueError, match="rounding is one of nearest, random"):
            round_tokens(*routing(0), tile, rounding)
