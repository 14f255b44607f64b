"""Zero-bubble schedules compute the gradients of matrices in a step of their own, and change nothing else by that.

That they give the loss of one process is shown by ``test_parity.py``, for all of them.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from moetrain_launch.fork import run_ranks

from moetrain.config import Config
from moetrain.model.block import Block
from moetrain.parallel.pipeline import LateStage
from moetrain.train import parity
from tests.distributed.toy_run import load

LAYERS, MICRO_BATCHES, STEPS = 4, 4, 2
PIPELINE = ["parallel.pp=2", "train.micro_batch=2", f"model.n_layers={LAYERS}"]
ZBV = "parallel.schedule=zbv_zero_bubble"


def curve_and_counts(cfg: Config) -> tuple[parity.Curve, tuple[int, int]]:
    """(the curve, (how often a block ran to be trained, how many gradients came late)) of one rank."""
    ran, late = 0, 0
    run, run_late = Block._run, LateStage._run

    def counted(self: Block, *args: Any) -> Any:
        nonlocal ran
        ran += torch.is_grad_enabled()
        return run(self, *args)

    def counted_late(self: LateStage, left: list[Any]) -> None:
        nonlocal late
        late += len(left)
        run_late(self, left)

    Block._run, LateStage._run = counted, counted_late  # type: ignore[method-assign]  # a rank is a fork
    return parity.curve(cfg), (ran, late)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_all_matrices_come_late_and_blocks_run_once_more_where_they_are_recomputed(
    prepared: Path, recompute: str
) -> None:
    """Four matrices of attention, three of a dense MLP or a shared expert, and two of all experts."""
    cfg = load(prepared, [*PIPELINE, ZBV, f"train.recompute={recompute}", f"train.steps={STEPS}"])
    ranks = [counts for _, counts in run_ranks(2, curve_and_counts, cfg, timeout=300)]
    times = STEPS * MICRO_BATCHES
    assert sum(ran for ran, _ in ranks) == times * LAYERS * (2 if recompute == "full" else 1)
    first_last, middle = (4 + 3) + (4 + 3 + 2), 2 * (4 + 3 + 2)  # the first layer is dense; a V of four stages
    assert [late for _, late in ranks] == [times * first_last, times * middle]


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_the_bits_are_those_of_the_same_stages_without_it(prepared: Path, precision: str) -> None:
    """So gradients of micro-batches are added up in float32 here, too, and in the same order."""
    words = [*PIPELINE, f"train.precision={precision}", "train.steps=6"]
    one, other = (
        run_ranks(2, parity.curve, load(prepared, [*words, f"parallel.schedule={schedule}"]), timeout=300)
        for schedule in ("interleaved_1f1b", "interleaved_zero_bubble")
    )
    assert one[0].rows == other[0].rows
    assert one[0].loads == other[0].loads


def compiled(cfg: Config) -> tuple[parity.Curve, tuple[int, int]]:
    """(the curve, ``counts``) of one rank whose compiled parts run as they are: generating code takes half a minute."""
    torch.compile = functools.partial(torch.compile, backend="eager")
    return curve_and_counts(cfg)


def test_compiled_attention_computes_all_at_once(prepared: Path) -> None:
    """What is not compiled still leaves its matrices."""
    words = [*PIPELINE, ZBV, "train.compile=true", "train.precision=float64", f"train.steps={STEPS}"]
    cfg = load(prepared, words)
    ranks = run_ranks(2, compiled, cfg, timeout=300)
    [one] = run_ranks(1, parity.curve, parity.one_process(cfg, 2), timeout=300)
    differences = parity.differences([curve for curve, _ in ranks], one)
    assert differences.within(1e-9), differences
    times = STEPS * MICRO_BATCHES
    assert [late for _, (_, late) in ranks] == [times * (3 + 3 + 2), times * 2 * (3 + 2)]
