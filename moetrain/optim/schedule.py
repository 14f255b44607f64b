"""Learning rate over steps, as a share of the peak."""

from __future__ import annotations

import math

from moetrain.config.schema import ScheduleConfig


def lr_factor(cfg: ScheduleConfig, step: int, total_steps: int) -> float:
    """Share of the peak learning rate, in [0, 1], that optimizer step ``step`` (0-based) of ``total_steps`` uses.

    With n = step + 1 counted from 0 at the start: n / warmup_steps during the warm-up, then from 1 at the end of the
    warm-up to ``final_ratio`` at n = decay_steps (null: total_steps), and ``final_ratio`` from there on. So no step has
    rate 0 unless ``final_ratio`` is, and the last one has the final rate. These are the curves of Megatron-Core's
    OptimizerParamScheduler at ``num_steps`` = n.

    cosine: half a period (SGDR, arXiv 1608.03983). linear: a straight line. constant: no decay; ``final_ratio`` is not
    used. wsd: constant, then a straight line over the last ``decay_fraction`` of all steps (MiniCPM, arXiv 2404.06395).
    """
    n = step + 1
    if n <= cfg.warmup_steps:
        return n / cfg.warmup_steps
    if cfg.kind == "constant":
        return 1.0
    end = total_steps if cfg.decay_steps is None else cfg.decay_steps
    start = cfg.warmup_steps
    if cfg.kind == "wsd":
        start = max(start, end - round(cfg.decay_fraction * end))
    if n >= end:
        return cfg.final_ratio
    if n <= start:
        return 1.0
    progress = (n - start) / (end - start)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if cfg.kind == "cosine" else 1 - progress
    return cfg.final_ratio + (1 - cfg.final_ratio) * left
