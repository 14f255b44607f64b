"""Every mapping gives the same loss: 20 steps against the one-process run of the same config.

float64: per-step loss, auxiliary losses and gradient norm within 1e-9 relative, expert loads exactly equal, and the
held-out loss after them within 1e-9. float32: within 1e-5. The one-process run has one micro-batch and the oracle
experts (backend loop).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_ranks
from tests.distributed.toy_run import SEQUENCE, SIGMOID, SOFTMAX, load, train

# name, world, overrides of the mapping
MAPPINGS: list[tuple[str, int, list[str]]] = [
    ("accumulate 4", 1, ["train.micro_batch=2"]),
    ("recompute full", 1, ["train.recompute=full", "train.micro_batch=4"]),
    ("dp 2", 2, ["train.micro_batch=2"]),
    ("ep 2", 2, ["parallel.ep=2", "train.micro_batch=4"]),
    ("ep 2, all-gather dispatch, accumulate 2", 2, ["parallel.ep=2", "dispatch=all_gather", "train.micro_batch=2"]),
    ("ep 2, selective recompute", 2, ["parallel.ep=2", "train.recompute=selective", "train.micro_batch=4"]),
    ("ep 2, full recompute, accumulate 4", 2, ["parallel.ep=2", "train.recompute=full", "train.micro_batch=1"]),
    ("edp 2 x ep 2", 4, ["parallel.ep=2", "train.micro_batch=1"]),
    ("ep 4, no reshard", 4, ["parallel.ep=4", "parallel.reshard_after_forward=false", "train.micro_batch=2"]),
    ("hsdp 2 x 2, ep 2", 4, ["parallel.dp_replicate=2", "parallel.ep=2", "train.micro_batch=2"]),
    ("hsdp 2 x 2, ep 4", 4, ["parallel.dp_replicate=2", "parallel.ep=4", "train.micro_batch=1"]),
]


@pytest.fixture(scope="module")
def reference(prepared: Path) -> Callable[[tuple[str, ...]], dict[str, Any]]:
    """The one-process run of a config, made once."""

    @functools.cache
    def make(common: tuple[str, ...]) -> dict[str, Any]:
        cfg = load(prepared, [*common, "experts.backend=loop", "train.micro_batch=8"])
        return run_ranks(1, train, cfg, prepared)[0]

    return make


Case = tuple[str, int, list[str]]
Reference = Callable[[tuple[str, ...]], dict[str, Any]]


def compare(prepared: Path, reference: Reference, common: list[str], case: Case, tolerance: float) -> None:
    name, world, overrides = case
    want_all = reference(tuple(common))
    for result in run_ranks(world, train, load(prepared, [*common, *overrides]), prepared, timeout=120):
        for step, (got, want) in enumerate(zip(result["rows"], want_all["rows"], strict=True)):
            assert got["loads"] == want["loads"], f"{name}: loads differ at step {step}"
            for key in want.keys() - {"loads"}:
                assert got[key] == pytest.approx(want[key], rel=tolerance), f"{name}: {key} at step {step}"
        assert result["val_loss"] == pytest.approx(want_all["val_loss"], rel=tolerance)


def ids(cases: list[Case]) -> list[str]:
    return [name for name, _, _ in cases]


@pytest.mark.parametrize("router", [SOFTMAX, SIGMOID], ids=["softmax, step loss", "sigmoid, bias"])
@pytest.mark.parametrize("case", MAPPINGS, ids=ids(MAPPINGS))
def test_float64(prepared: Path, reference: Reference, case: Case, router: list[str]) -> None:
    compare(prepared, reference, [*router, "train.precision=float64"], case, 1e-9)


@pytest.mark.parametrize("case", MAPPINGS[3:9:2], ids=ids(MAPPINGS[3:9:2]))
def test_sequence_loss_and_muon(prepared: Path, reference: Reference, case: Case) -> None:
    compare(prepared, reference, [*SEQUENCE, "train.precision=float64", "optim=muon"], case, 1e-9)


@pytest.mark.parametrize("case", MAPPINGS[::3], ids=ids(MAPPINGS[::3]))
def test_float32(prepared: Path, reference: Reference, case: Case) -> None:
    compare(prepared, reference, [*SOFTMAX, "train.precision=float32"], case, 1e-5)
