"""A toy run on two tiny domains of text, which the distributed tests train under their mappings."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moetrain_launch.fork import run_ranks

from moetrain import config
from moetrain.data.toy import toy_data
from moetrain.train import parity
from moetrain.train.parity import Curve
from moetrain.train.trainer import Trainer

STEPS = 20
BASE = [
    "model.vocab_size=300",
    "model.dim=24",
    "model.n_layers=4",
    "model.attention.n_heads=4",
    "model.attention.n_kv_heads=2",
    "model.attention.head_dim=8",
    "model.attention.backend=math",
    "model.moe.num_experts=8",
    "model.moe.top_k=2",
    "model.moe.expert_dim=16",
    "model.moe.shared_dim=16",
    "model.moe.first_dense=1",
    "model.dense_dim=32",
    "model.init_std=0.1",
    f"train.steps={STEPS}",
    "train.seq_len=16",
    "train.global_batch=8",
    "train.eval_sequences=4",
    "log.tensorboard=false",
    "log.progress=false",
    "optim.lr=0.003",
    "schedule.warmup_steps=2",
]
SOFTMAX = ["model/router=softmax_topk", "balance=[aux_loss,z_loss]", "balance.aux_loss.scope=step"]
SIGMOID = [
    "model/router=sigmoid_group",
    "model.router.n_groups=4",
    "model.router.topk_groups=2",
    "balance=[bias]",
    "balance.bias.rate=0.01",
]


def load(folder: Path, overrides: list[str]) -> config.Config:
    """The toy run with ``overrides``, on the prepared text in ``folder``."""
    cfg = config.load([*BASE, f"run_dir={folder / 'run'}", *overrides])
    cfg.data = toy_data(folder, cfg.data)
    return cfg


def one_step(trainer: Trainer) -> dict[str, Any]:
    """Losses, gradient norm and loads of the next step."""
    row, loads = parity.one_step(trainer)
    return {**row, "loads": loads}


@functools.cache
def alone(folder: Path, overrides: tuple[str, ...]) -> Curve:
    """The curve of one process, with the oracles: made once for each choice of settings."""
    return run_ranks(1, parity.curve, parity.one_process(load(folder, list(overrides)), 1), timeout=300)[0]


def check_float32(mapped: Sequence[Curve], one: Curve, tolerance: float = 1e-5) -> None:
    """Everything within ``tolerance``, loads equal: to the end, or until a token changes its expert.

    In float32, rounding decides where two experts are as good as equal for a token; it then learns something else. Such
    a step may differ in the place of few tokens; what follows it is not compared, and three steps must come before it.
    """
    equal = [all(rank.loads[step] == loads for rank in mapped) for step, loads in enumerate(one.loads)]
    steps = equal.index(False) if False in equal else len(equal)
    if steps < len(equal):
        for rank in mapped:
            moved = [
                abs(a - b) for got, want in zip(rank.loads[steps], one.loads[steps], strict=True)
                for a, b in zip(got, want, strict=True)
            ]  # fmt: skip
            assert sum(moved) <= 8, f"loads differ at step {steps}: {moved}"
        assert steps >= 3, f"loads differ at step {steps}"
        mapped, one = [_first(rank, steps) for rank in mapped], _first(one, steps)
    found = parity.differences(mapped, one)
    assert found.within(tolerance), found


def curve_of(rows: Sequence[dict[str, Any]]) -> Curve:
    """The curve of what ``one_step`` gave."""
    figures = [{key: value for key, value in row.items() if key != "loads"} for row in rows]
    return Curve(figures, [row["loads"] for row in rows], 0.0, {})


def _first(curve: Curve, steps: int) -> Curve:
    return Curve(curve.rows[:steps], curve.loads[:steps], 0.0, {})
