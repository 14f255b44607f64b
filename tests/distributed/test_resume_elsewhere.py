"""A checkpoint saved under one mapping goes on under another, as if nothing had happened: float64, 1e-9."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from moetrain_launch.fork import run_ranks

from moetrain import config
from moetrain.config.check import resolve_sizes
from moetrain.train.trainer import Trainer
from tests.distributed.toy_run import SIGMOID, SOFTMAX, load, one_step

HALF = 3
ONE: tuple[int, list[str]] = (1, ["train.micro_batch=8"])
EP = (2, ["parallel.ep=2", "train.micro_batch=2"])
PIPELINE = (4, ["parallel.pp=2", "parallel.ep=2", "parallel.schedule=zbv_zero_bubble", "train.micro_batch=1"])
ALL = (8, ["parallel.pp=2", "parallel.tp=2", "parallel.ep=2", "parallel.etp=2", "train.micro_batch=1"])
HSDP = (4, ["parallel.ep=4", "parallel.dp_replicate=2", "train.micro_batch=1"])
# saved under the first, continued under the others
JOURNEYS = [(EP, [ONE, ALL, HSDP]), (ALL, [PIPELINE, ONE]), (PIPELINE, [ALL, EP])]


def build(cfg: config.Config) -> Trainer:
    return Trainer(cfg, resolve_sizes(cfg.parallel, dist.get_world_size()), Path(cfg.run_dir))


def go_on(trainer: Trainer) -> list[dict[str, Any]]:
    return [one_step(trainer) for _ in range(HALF)]


def save_half_way(cfg: config.Config) -> list[dict[str, Any]]:
    """Three steps, a checkpoint, and the three steps that must follow it."""
    trainer = build(cfg)
    go_on(trainer)
    progress = {"step": trainer.step, "tokens": trainer.tokens, "seconds": 0.0}
    trainer.checkpointer.save(trainer.step, trainer.engine.state(progress))
    trainer.checkpointer.wait()
    return go_on(trainer)


def resume(cfg: config.Config) -> list[dict[str, Any]]:
    trainer = build(cfg)
    trainer.resume()
    assert trainer.step == HALF
    return go_on(trainer)


@pytest.mark.parametrize(
    "choice",
    [[*SOFTMAX, "optim=muon", "model.tie_embeddings=true"], SIGMOID],
    ids=["softmax, loads of the step before, muon, tied", "sigmoid, bias, adamw"],
)
@pytest.mark.parametrize("journey", JOURNEYS, ids=["from ep 2", "from pp, tp, ep, etp", "from a zero-bubble pipeline"])
def test_resume_under_another_mapping(
    prepared: Path,
    choice: list[str],
    journey: tuple[tuple[int, list[str]], list[tuple[int, list[str]]]],
) -> None:
    """World sizes 1 to 8, other pp, stages, tp, ep, etp, dp. Biases, loads and optimizer states come along."""
    common = [*choice, "train.precision=float64", "model.n_layers=4"]
    (saved_on, saved), elsewhere = journey
    expected = run_ranks(saved_on, save_half_way, load(prepared, [*common, *saved]), timeout=300)[0]
    for world, mapping in elsewhere:
        for rows in run_ranks(world, resume, load(prepared, [*common, *mapping]), timeout=300):
            for got, want in zip(rows, expected, strict=True):
                assert got.pop("loads") == want["loads"], mapping
                assert got == pytest.approx({k: v for k, v in want.items() if k != "loads"}, rel=1e-9), mapping
    shutil.rmtree(prepared / "run")
