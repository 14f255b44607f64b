"""Learning-rate schedules against torch's own schedulers and Megatron-Core's formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from moetrain.config.schema import ScheduleConfig
from moetrain.optim import lr_factor

WARMUP, TOTAL = 7, 40


def factors(cfg: ScheduleConfig, total: int = TOTAL) -> list[float]:
    return [lr_factor(cfg, step, total) for step in range(total)]


def torch_factors(decay: type, **options: float) -> list[float]:
    """torch's schedulers chained; its epoch n is the rate after n steps, so our step n - 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup = LinearLR(optimizer, start_factor=1 / WARMUP, total_iters=WARMUP - 1)  # 1/W at epoch 0, 1 at epoch W - 1
    # CosineAnnealingLR is 1 at its epoch 0, which is our n = WARMUP
    scheduler = SequentialLR(optimizer, [warmup, decay(optimizer, **options)], milestones=[WARMUP - 1])
    rates = []
    for _ in range(TOTAL):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_cosine_and_linear_are_torchs() -> None:
    span = TOTAL - WARMUP
    cosine = ScheduleConfig(kind="cosine", warmup_steps=WARMUP, final_ratio=0.1)
    assert factors(cosine) == pytest.approx(torch_factors(CosineAnnealingLR, T_max=span, eta_min=0.1), rel=1e-9)
    linear = ScheduleConfig(kind="linear", warmup_steps=WARMUP, final_ratio=0.1)
    expected = torch_factors(LinearLR, start_factor=1.0, end_factor=0.1, total_iters=span)
    assert factors(linear) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("decay_steps", [None, 30, 5])
@pytest.mark.parametrize("warmup", [0, WARMUP])
def test_megatron_formulas(kind: str, decay_steps: int | None, warmup: int) -> None:
    """megatron/core/optimizer_param_scheduler.py, get_lr, at num_steps = step + 1 with max_lr 1 and min_lr 0.2."""
    end = decay_steps or TOTAL
    anneal = round(0.25 * end)

    def megatron(n: int) -> float:
        if warmup > 0 and n <= warmup:
            return n / warmup
        if kind == "constant":
            return 1.0
        if n > end:
            return 0.2
        ratio = (n - warmup) / (end - warmup) if end > warmup else 1.0
        if kind == "linear":
            coeff = 1.0 - ratio
        elif kind == "cosine":
            coeff = 0.5 * (math.cos(math.pi * ratio) + 1.0)
        else:
            start = end - anneal
            coeff = 1.0 if n <= start else 1.0 - (n - start) / anneal
        return 0.2 + coeff * 0.8

    cfg = ScheduleConfig(kind=kind, warmup_steps=warmup, final_ratio=0.2, decay_fraction=0.25, decay_steps=decay_steps)
    assert factors(cfg) == pytest.approx([megatron(step + 1) for step in range(TOTAL)], rel=1e-12)


def test_ends_and_bounds() -> None:
    """Whatever the lengths: factors lie in [0, 1], never rise after the warm-up, and end at the final ratio."""
    for kind in ("cosine", "linear", "wsd"):
        for warmup in (0, 1, 5, 12, 50):
            for fraction in (0.0, 0.5, 1.0):
                cfg = ScheduleConfig(kind=kind, warmup_steps=warmup, final_ratio=0.1, decay_fraction=fraction)
                got = factors(cfg, 12)
                assert all(0 <= f <= 1 for f in got)
                assert got[warmup:] == sorted(got[warmup:], reverse=True)
                if warmup < 12:
                    assert got[-1] == pytest.approx(0.1)
                    assert lr_factor(cfg, 1000, 12) == pytest.approx(0.1)
