"""How layers are cut into pipeline stages: against every cut there is, and against the schedules' own placement."""

from __future__ import annotations

import itertools
import random

import pytest
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

from moetrain import config
from moetrain.config.check import Sizes, check_mapping
from moetrain.parallel.pipeline import SCHEDULES
from moetrain.parallel.stages import all_stages, layer_cost, split_by_cost


def dearest(costs: list[float], counts: list[int], first: float, last: float) -> float:
    ends = [0, *itertools.accumulate(counts)]
    groups = [sum(costs[a:b]) for a, b in itertools.pairwise(ends)]
    groups[0] += first
    groups[-1] += last
    return max(groups)


@pytest.mark.parametrize("seed", range(40))
def test_no_other_cut_has_a_cheaper_dearest_stage(seed: int) -> None:
    """All cuts of up to 9 layers into 1 to 5 stages, with a costly embedding or head now and then."""
    rng = random.Random(seed)
    costs = [rng.choice([1.0, 1.0, 4.0, rng.random()]) for _ in range(rng.randint(5, 9))]
    stages, first, last = rng.randint(1, 5), rng.choice([0.0, 2.0]), rng.choice([0.0, 3.0, 20.0])
    counts = split_by_cost(costs, stages, first, last)
    assert sum(counts) == len(costs) and len(counts) == stages and min(counts) >= 1
    cuts = itertools.combinations(range(1, len(costs)), stages - 1)
    all_counts = [[b - a for a, b in itertools.pairwise([0, *cut, len(costs)])] for cut in cuts]
    best = min(dearest(costs, c, first, last) for c in all_counts)
    assert dearest(costs, counts, first, last) == pytest.approx(best)


def test_too_few_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="3 layers cannot fill 4 stages"):
        split_by_cost([1.0] * 3, 4)


def test_a_large_head_takes_layers_from_the_last_stage() -> None:
    """DeepSeek-V3: 3 dense layers, 58 MoE layers, and a head as dear as some layers, on 16 stages."""
    overrides = ["model=deepseek-v3", "parallel.pp=16", "parallel.ep=8", "launch.ranks=128", "train.global_batch=4096"]
    cfg = config.load([*overrides, "train.micro_batch=1", "train.seq_len=4096"])
    stages = all_stages(cfg, check_mapping(cfg, 128))
    assert stages[0].layers.start == 0 and stages[-1].layers.stop == 61
    assert len(stages[-1].layers) < max(len(s.layers) for s in stages)
    dense, moe = layer_cost(cfg.model, 0, 4096), layer_cost(cfg.model, 3, 4096)
    # 37B active parameters, 2 FLOPs each, of which 61 layers have nearly all.
    assert 58 * moe + 3 * dense == pytest.approx(2 * 37e9, rel=0.35) and dense != moe


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stages_are_on_the_ranks_that_the_schedule_expects(schedule: str) -> None:
    """torch's schedules place stages by their own rule; a V has stage i and 2 pp - 1 - i on one rank."""
    pp, per_rank = 4, 1 if schedule in ("gpipe", "1f1b") else 2
    style = "v" if SCHEDULES[schedule].__name__ in ("ScheduleZBVZeroBubble", "ScheduleDualPipeV") else "loop"
    expected = generate_stage_to_rank_mapping(pp, pp * per_rank, style=style)
    sizes = Sizes(pp=pp, stages_per_rank=per_rank)
    assert {i: sizes.rank_of_stage(i, schedule) for i in range(pp * per_rank)} == expected
