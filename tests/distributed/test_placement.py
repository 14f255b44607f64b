"""Every placement of experts trains as plain expert parallelism does: against one process, float64, 1e-9.

From loads that are balanced to one expert that every token wants (a selection bias that the test sets). The model has
two MoE layers, so that exchanges of one run beside the other's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from moetrain_launch.fork import run_ranks

from moetrain.config import Config
from moetrain.config.check import resolve_sizes
from moetrain.moe.layer import MoELayer
from moetrain.train import parity
from moetrain.train.engine import whole_weights
from moetrain.train.trainer import Trainer
from tests.distributed.toy_run import SIGMOID, load, one_step

STEPS = 5
HALF = 3
SMALL = [*SIGMOID, "model.n_layers=3", "train.precision=float64", f"train.steps={STEPS}", "optim.lr=0.01"]
FSSDP = ["experts/placement=fssdp", "experts.placement.node_size=2"]
# Homes change after the second and the fourth step.
MOVING = [*FSSDP, "experts.placement.slots=1", "experts.placement.budget=4", "experts.placement.reshard_every=2"]
FREES = [*MOVING, "experts.placement.rematerialise=true"]
CALIBRATES = [*FSSDP, "experts.placement.slots=2", "experts.placement.budget=1", "experts.placement.calibrate=true"]


def build(cfg: Config, hot: bool) -> Trainer:
    """A trainer; hot: every token chooses expert 0 first."""
    trainer = Trainer(cfg, resolve_sizes(cfg.parallel, dist.get_world_size()), Path(cfg.run_dir))
    for layer in trainer.engine.model.modules():
        if isinstance(layer, MoELayer) and hot:
            router: Any = layer.router
            router.balance["bias"].bias_E[0] = 10.0
    return trainer


def curves(cfgs: list[Config], hot: bool) -> list[parity.Curve]:
    """Of each config, on this rank."""
    found = []
    for cfg in cfgs:
        trainer = build(cfg, hot)
        rows = [one_step(trainer) for _ in range(STEPS)]
        loads = [row.pop("loads") for row in rows]
        weights = dict(whole_weights(trainer.engine, trainer.dims))
        found.append(parity.Curve(rows, loads, trainer.evaluate().loss, weights))
    return found


def differ(prepared: Path, world: int, hot: bool, variants: list[list[str]], model: list[str]) -> list[parity.Curve]:
    """Assert that all ``variants`` give the curve of one process; the curves of rank 0."""
    micro = 8 // world // 2 or 1  # of a step; two where there can be
    common = [*SMALL, *model]
    cfgs = [load(prepared, [*common, f"parallel.ep={world}", f"train.micro_batch={micro}", *v]) for v in variants]
    [[one]] = run_ranks(1, curves, [parity.one_process(cfgs[0], world)], hot, timeout=300)
    ranks = run_ranks(world, curves, cfgs, hot, timeout=300)
    for i, variant in enumerate(variants):
        found = parity.differences([rank[i] for rank in ranks], one)
        assert found.within(1e-9), f"{variant}: {found}"
    return ranks[0]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("hot", [False, True], ids=["balanced", "one hot expert"])
def test_fssdp_equals_one_process(prepared: Path, world: int, hot: bool) -> None:
    """Copies on all ranks or on some, homes that move, copies freed after forward, copies added by the real loads."""
    variants = [FSSDP, MOVING, FREES, [*FREES, "train.recompute=selective"], [*FREES, "train.recompute=full"],
                CALIBRATES, [*MOVING, "train.recompute=full", "experts.overlap=true"]]  # fmt: skip
    curve = differ(prepared, world, hot, variants, [])[0]
    top = max(max(layer) for layer in curve.loads[0])
    assert (top == 8 * 16) == hot, "a hot expert has a row of every token"


def test_fssdp_on_eight_ranks_of_which_some_own_no_expert_of_a_layer(prepared: Path) -> None:
    differ(prepared, 8, True, [MOVING], ["optim=muon", "model.moe.bias=true"])


def test_related_policies_equal_one_process(prepared: Path) -> None:
    """Shadows, static copies and migration, beside tensor and context parallel ranks, whose tokens differ as well."""
    variants = [
        ["experts/placement=shadow", "parallel.tp=2"],
        ["experts/placement=static", "experts.placement.copies=3", "parallel.cp=2"],
        ["experts/placement=migrate", "experts.placement.every=2", "train.micro_batch=2"],
    ]
    differ(prepared, 4, True, variants, [])
