"""Ternary experts under mappings: the loss of one process at 1e-9 in float64, also where ranks split an expert."""

from __future__ import annotations

from pathlib import Path

import pytest
from moetrain_launch.fork import run_ranks

from moetrain.train import parity
from tests.distributed.toy_run import SOFTMAX, alone, load

CASES: list[tuple[int, list[str]]] = [
    (2, ["parallel.ep=2"]),
    (2, ["train.micro_batch=2", "train.recompute=selective"]),
    (4, ["parallel.tp=2", "parallel.etp=2", "parallel.ep=2", "experts.overlap=true"]),
    (4, ["parallel.pp=2", "parallel.schedule=zbv_zero_bubble", "parallel.etp=2", "train.micro_batch=1"]),
]


@pytest.mark.parametrize(("world", "mapping"), CASES)
def test_the_same_loss(prepared: Path, world: int, mapping: list[str]) -> None:
    common = [*SOFTMAX, "model.moe.ternary=true", "train.precision=float64", "train.freeze=[layers.*.moe.shared.*]"]
    one = alone(prepared, tuple(common))
    assert one.rows[-1]["loss"] < one.rows[0]["loss"]
    found = parity.differences(run_ranks(world, parity.curve, load(prepared, [*common, *mapping]), timeout=300), one)
    assert found.within(1e-9), found
