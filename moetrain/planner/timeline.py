"""A pipeline's step event by event: what each rank does, in torch's own order, starts when it can.

A forward pass of a stage needs that of the stage before and the time that its output travels; a backward pass needs
that of the stage after, and the stage's own forward. A rank does one thing at a time.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
from torch import nn

from moetrain.config.sizes import Sizes
from moetrain.parallel.pipeline import SCHEDULES
from moetrain.planner.candidates import Numbers
from moetrain.planner.order import KINDS, Action

# A schedule repeats itself once it is under way, so its start shows how much is held at most.
ROUNDS = 4


@functools.lru_cache(maxsize=512)
def orders(schedule: str, pp: int, vpp: int, n: int) -> tuple[tuple[Action, ...], ...]:
    """What every pipeline rank does in a step of ``n`` micro-batches, as ``order.actions`` has it for one."""
    forward, backward = (lambda r: Action("forward", r)), (lambda r: Action("backward", r))
    if pp == 1:
        return (tuple(Action(kind, 0) for _ in range(n) for kind in ("forward", "backward")),)  # type: ignore[arg-type]
    if schedule == "gpipe":
        return tuple((*[forward(r)] * n, *[backward(r)] * n) for r in range(pp))
    if schedule == "1f1b":
        ahead = [min(n, pp - r) for r in range(pp)]
        return tuple(
            (*[forward(r)] * a, *[backward(r), forward(r)] * (n - a), *[backward(r)] * a) for r, a in enumerate(ahead)
        )
    return _of_torch(schedule, pp, vpp, n)


def _of_torch(schedule: str, pp: int, vpp: int, n: int) -> tuple[tuple[Action, ...], ...]:
    sizes = Sizes(pp=pp, stages_per_rank=vpp)
    stages = [
        SimpleNamespace(
            stage_index=i, num_stages=sizes.stages, group_size=pp, group_rank=0, submod=nn.Identity(),
            is_last=i == sizes.stages - 1,
        )
        for i in sizes.stages_of_rank(0, schedule)
    ]  # fmt: skip
    plan = SCHEDULES[schedule](stages, n, loss_fn=None, scale_grads=False)
    found = []
    for rank in range(pp):
        mine = []
        for action in plan.pipeline_order_with_comms[rank]:
            for one in action.sub_actions or (action,):
                kind = KINDS.get(one.computation_type.value)
                if kind in ("forward", "backward", "backward_input", "backward_weight"):
                    mine.append(Action(kind, one.stage_index))
        found.append(tuple(mine))
    return tuple(found)


def shortened(schedule: str, pp: int, n: int) -> int:
    """A number of micro-batches, at most ``n``, after which a rank of the pipeline holds no more than before."""
    return min(n, ROUNDS * pp) if schedule != "gpipe" else n


@functools.lru_cache(maxsize=4096)
def under_way(schedule: str, pp: int, vpp: int, n: int, rank: int) -> tuple[tuple[int, ...], ...]:
    """Micro-batches that the stages of ``rank`` hold, in order of stage, at every moment that none other outdoes."""
    mine = Sizes(pp=pp, stages_per_rank=vpp).stages_of_rank(rank, schedule) if pp > 1 else [0]
    now: Counter[int] = Counter()
    moments = set()
    for action in orders(schedule, pp, vpp, shortened(schedule, pp, n))[rank]:
        if action.kind == "forward":
            now[action.stage] += 1
            moments.add(tuple(now[stage] for stage in mine))
        elif action.kind in ("backward", "backward_weight"):
            now[action.stage] -= 1
    outdone = {a for a in moments for b in moments if a != b and all(x <= y for x, y in zip(a, b, strict=True))}
    return tuple(sorted(moments - outdone))


@dataclass(frozen=True)
class Timeline:
    """seconds: until the last rank is done. busy: seconds that each rank computes."""

    seconds: float
    busy: list[float]

    @property
    def bubble(self) -> float:
        """Share of the ranks' time in which they wait."""
        return 1.0 - sum(self.busy) / (len(self.busy) * self.seconds)


def simulate(
    schedule: str, pp: int, vpp: int, n: int, forward: Sequence[float], backward: Sequence[float], send: float = 0.0
) -> Timeline:
    """A step of ``n`` micro-batches. forward, backward: seconds of each stage and micro-batch; send: from stage to
    stage on another rank. Where the gradients of weights come apart, they take half of backward."""
    plans = orders(schedule, pp, vpp, n)
    last = pp * vpp - 1
    done: dict[tuple[str, int, int], float] = {}
    place, seen = [0] * pp, [Counter[tuple[str, int]]() for _ in range(pp)]
    clock, busy = [0.0] * pp, [0.0] * pp
    cost = {"forward": forward, "backward": backward}
    sizes = Sizes(pp=pp, stages_per_rank=vpp)
    holder = [sizes.rank_of_stage(i, schedule) for i in range(last + 1)]
    waiting = set(range(pp))
    while waiting:
        moved = False
        for rank in list(waiting):
            plan = plans[rank]
            while place[rank] < len(plan):
                action = plan[place[rank]]
                stage = action.stage
                number = seen[rank][action.kind, stage]
                ready = _ready(action.kind, stage, number, last, done, holder, send)
                if ready is None:
                    break
                seconds = cost["forward"][stage] if action.kind == "forward" else backward[stage]
                seconds *= 0.5 if action.kind in ("backward_input", "backward_weight") else 1.0
                clock[rank] = max(clock[rank], ready) + seconds
                busy[rank] += seconds
                name = {"forward": "F", "backward_weight": "W"}.get(action.kind, "B")
                done[name, stage, number] = clock[rank]
                seen[rank][action.kind, stage] += 1
                if action.kind in ("backward", "backward_input"):  # either counts for the other's number
                    other = "backward_input" if action.kind == "backward" else "backward"
                    seen[rank][other, stage] += 1
                    if action.kind == "backward":
                        seen[rank]["backward_weight", stage] += 1
                place[rank] += 1
                moved = True
            if place[rank] == len(plan):
                waiting.discard(rank)
        if not moved:
            raise RuntimeError(f"the schedule {schedule} of {pp} x {vpp} stages and {n} micro-batches stands still")
    return Timeline(max(clock), busy)


def _ready(
    kind: str,
    stage: int,
    number: int,
    last: int,
    done: dict[tuple[str, int, int], float],
    holder: list[int],
    send: float,
) -> float | None:
    """When the inputs of an action are there; None: that is not known yet."""
    if kind == "backward_weight":
        return done.get(("B", stage, number))
    if kind == "forward":
        if stage == 0:
            return 0.0
        before = done.get(("F", stage - 1, number))
        return None if before is None else before + (send if holder[stage - 1] != holder[stage] else 0.0)
    own = done.get(("F", stage, number))
    if own is None or stage == last:
        return own
    after = done.get(("B", stage + 1, number))
    return None if after is None else max(own, after + (send if holder[stage + 1] != holder[stage] else 0.0))


def bound(
    schedule: str, pp: Numbers, vpp: Numbers, n: Numbers, slowest: Numbers, total: Numbers, share: float = 1 / 3
) -> Numbers:
    """About the seconds of a step, for many mappings at once, where ``simulate`` would take long.

    slowest: seconds of the slowest rank for one micro-batch, forward and backward; total: of all ranks together.
    1F1B: the slowest rank's n micro-batches, and before and after them one pass through the others (arXiv 2104.04473,
    section 2.2); v virtual stages shorten that by v; zero-bubble schedules leave a third of it (arXiv 2401.10241).
    """
    fill = (total - slowest) / vpp
    factor = {"1f1b": 1.0, "gpipe": 1.0, "interleaved_1f1b": 1.0}.get(schedule, share)
    return np.where(pp > 1, n * slowest + factor * fill, n * slowest)
