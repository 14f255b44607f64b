"""In which order a pipeline rank runs its micro-batches: torch's own schedules, read without running them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

from torch import nn

from moetrain.config.schema import Config
from moetrain.config.sizes import Sizes
from moetrain.parallel.pipeline import SCHEDULES

Kind = Literal["forward", "backward", "backward_input", "backward_weight", "gather", "free"]
# torch's letters.
KINDS: dict[str, Kind] = {
    "F": "forward",
    "B": "backward",
    "I": "backward_input",
    "W": "backward_weight",
    "UNSHARD": "gather",
    "RESHARD": "free",
}


@dataclass(frozen=True)
class Action:
    """Of one stage. gather, free: the weights of the whole stage; the others concern one micro-batch."""

    kind: Kind
    stage: int


def actions(cfg: Config, sizes: Sizes, pp_rank: int) -> list[Action]:
    """All that ``pp_rank`` does in a step, in order."""
    n, schedule = sizes.micro_batches(cfg), cfg.parallel.schedule
    forward, backward = Action("forward", pp_rank), Action("backward", pp_rank)
    if sizes.pp == 1:
        return [forward, backward] * n
    if schedule == "gpipe":
        return [forward] * n + [backward] * n
    if schedule == "1f1b":
        ahead = min(n, sizes.pp - pp_rank)
        return [forward] * ahead + [backward, forward] * (n - ahead) + [backward] * ahead
    return _of_torch(cfg, sizes, pp_rank)


def _of_torch(cfg: Config, sizes: Sizes, pp_rank: int) -> list[Action]:
    """The actions of a schedule with several stages on a rank."""
    names = sizes.stages_of_rank(pp_rank, cfg.parallel.schedule)
    stages = [
        SimpleNamespace(
            stage_index=i, num_stages=sizes.stages, group_size=sizes.pp, group_rank=pp_rank, submod=nn.Identity(),
            is_last=i == sizes.stages - 1,
        )
        for i in names
    ]  # fmt: skip
    schedule = SCHEDULES[cfg.parallel.schedule](stages, sizes.micro_batches(cfg), loss_fn=None, scale_grads=False)
    found = []
    for action in schedule.pipeline_order_with_comms[pp_rank]:
        for one in action.sub_actions or (action,):
            kind = KINDS.get(one.computation_type.value)
            if kind is not None:
                found.append(Action(kind, one.stage_index))
    return found


def most_kept(order: list[Action], kept: dict[int, int]) -> int:
    """The most that the micro-batches under way keep, where one of stage s keeps ``kept[s]`` from its forward until its
    backward (with that of the weights) is done."""
    now = most = 0
    for action in order:
        if action.kind == "forward":
            now += kept[action.stage]
            most = max(most, now)
        elif action.kind in ("backward", "backward_weight"):
            now -= kept[action.stage]
    return most
