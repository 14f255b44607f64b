"""Gradients cross the network once a step, however many micro-batches it has: collectives are counted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from moetrain_launch.fork import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from moetrain import config
from moetrain.config.check import check_mapping
from moetrain.train.trainer import Trainer
from tests.distributed.toy_run import SOFTMAX, load

ACCUMULATION = {1: "train.micro_batch=4", 4: "train.micro_batch=1"}


class Counting(TorchDispatchMode):
    """Counts collectives by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace in ("c10d", "_c10d_functional"):
            self.counts[op.name().split("::")[1].split(".")[0]] += 1
        return op(*args, **(kwargs or {}))


def collectives(cfg: config.Config) -> Counter[str]:
    """Of one step, after one that sets everything up."""
    trainer = Trainer(cfg, check_mapping(cfg, dist.get_world_size()), Path(cfg.run_dir))
    trainer.train_step()
    with Counting() as counting:
        trainer.train_step()
    return counting.counts


@pytest.mark.parametrize(
    "mapping", [["parallel.ep=1"], ["parallel.dp_replicate=2"], ["parallel.tp=2", "parallel.ep=2"]]
)
def test_reductions_do_not_grow_with_accumulation(prepared: Path, mapping: list[str]) -> None:
    """4 sequences per rank (8 with tp) as one micro-batch or as four."""
    by_count = {}
    for n, micro in ACCUMULATION.items():
        batch = [f"train.global_batch={8 if 'parallel.tp=2' not in mapping else 4}", micro]
        cfg = load(prepared, [*SOFTMAX, "balance.aux_loss.scope=step", *batch, *mapping])
        by_count[n] = run_ranks(2, collectives, cfg)[0]
    reductions = {n: {k: c for k, c in counts.items() if "reduce" in k} for n, counts in by_count.items()}
    assert reductions[1], "FSDP reduces"
    if "parallel.tp=2" not in mapping:  # within a layer, tp sums activations once per micro-batch
        assert reductions[1] == reductions[4]
    assert by_count[4]["allreduce_"] == by_count[1]["allreduce_"]
