"""Experts in FP8 under mappings: each rounds its own tiles, and follows the exact loss of one process as closely."""

from __future__ import annotations

from pathlib import Path

import pytest
from moetrain_launch.fork import run_ranks

from moetrain.train import parity
from tests.distributed.toy_run import SOFTMAX, alone, load


@pytest.mark.parametrize(
    ("world", "mapping"),
    [
        (1, ["train.recompute=selective"]),
        (4, ["parallel.tp=2", "parallel.etp=2", "parallel.ep=2", "experts.overlap=true"]),
        (2, ["parallel.pp=2", "parallel.schedule=zbv_zero_bubble", "train.micro_batch=1", "train.precision=bf16"]),
    ],
    ids=["one process", "ep, etp, tp", "pp, bf16"],
)
def test_follows_exact_products(prepared: Path, world: int, mapping: list[str]) -> None:
    common = [*SOFTMAX, "train.precision=float32"]
    exact = alone(prepared, tuple(common))
    words = [*common, *mapping, "experts.fp8=true"]
    found = parity.differences(run_ranks(world, parity.curve, load(prepared, words), timeout=300), exact)
    assert 1e-6 < found.loss_rel < 0.005, found
