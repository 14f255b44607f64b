"""A mixer over domains that have several sources."""

from __future__ import annotations

from typing import Any

import pytest

from moetrain.config import load
from moetrain.config.registry import MIXERS
from moetrain.data.dataset import TokenData
from moetrain.data.loader import Loader
from moetrain.data.sampler import Sampler
from moetrain.train.mixing import Mixing, draw_windows


def test_sources_keep_their_shares_within_a_domain(data: TokenData) -> None:
    """Also after a probe that leaves the domain without weight; a domain of weight 0 is not the mixer's."""
    domain_of = {"sea": "prose", "food": "prose", "code": "code"}
    grouped = TokenData.open(data.dir, domain_of=domain_of)
    sampler = Sampler(grouped, 0, {"sea": 0.3, "food": 0.1, "code": 0.6}, 16)
    loader = Loader(grouped, sampler, 8, 8, prefetch=0)
    cfg = load([])
    cfg.mixer = MIXERS.get("skill_it").options(probe_steps=2, every=5)
    nothing: Any = None
    mixing = Mixing(cfg, nothing, loader, nothing)
    losses = iter([(4.0, 4.0), (3.5, 3.8), (3.0, 3.6)])
    mixing._losses = lambda step: {"losses": dict(zip(["prose", "code"], next(losses), strict=True))}  # type: ignore[method-assign]
    for step in range(9):
        mixing.before_step(step, 20 - step)
        loader.step(step)
    phases = sampler.history.phases
    order = [max(p.weights, key=lambda name: p.weights[name]) for p in phases]
    assert [p.first_sample for p in phases] == [0, 16, 32] and order[0] == "sea" and order[1] == "code"
    assert phases[0].weights == pytest.approx({"sea": 0.75, "food": 0.25, "code": 0.0})
    assert phases[1].weights == pytest.approx({"sea": 0.0, "food": 0.0, "code": 1.0})
    assert phases[2].weights["sea"] == pytest.approx(3 * phases[2].weights["food"]) and phases[2].weights["food"] > 0
    assert {p.why for p in phases} == {"mixer skill_it"}


def test_drawn_windows_are_a_function_of_their_key(data: TokenData) -> None:
    """Shares to within a window, none twice, others for another key, and no more than a source has."""
    shares = {"sea": 0.25, "code": 0.75}
    drawn = draw_windows(data, shares, 40, 16, 1, "train")
    assert drawn == draw_windows(data, shares, 40, 16, 1, "train") != draw_windows(data, shares, 40, 16, 2, "train")
    assert len(set(drawn)) == 40 and abs(sum(source == "sea" for source, _ in drawn) - 10) <= 1
    assert all(start % 16 == 0 and start < len(data.tokens(source)) - 1 for source, start in drawn)
    every = draw_windows(data, {"sea": 1.0}, 10**6, 16, 1, "val")
    assert len(every) == len(set(every)) == -(-(len(data.tokens("sea", "val")) - 1) // 16)
