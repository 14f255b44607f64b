"""The dispatcher that the mapping asks for."""

from __future__ import annotations

from typing import Any

from pydantic.dataclasses import dataclass

from moetrain.comm import Group
from moetrain.config.fields import STRICT
from moetrain.config.registry import DISPATCHERS
from moetrain.moe.dispatch import Dispatcher
from moetrain.moe.dispatch.all_to_all import AllToAllDispatcher, AllToAllOptions
from moetrain.moe.dispatch.local import LocalDispatcher, LocalOptions


@dataclass(config=STRICT)
class AutoOptions:
    """local where every rank has all experts (parallel.ep = 1), else all_to_all."""


@DISPATCHERS.register("auto", AutoOptions)
def build_auto(options: AutoOptions, n_experts: int, group: Group, etp_group: Group) -> Dispatcher[Any]:
    """The local dispatcher without expert parallel ranks, else the all-to-all one."""
    if group is None or group.size() == 1:
        return LocalDispatcher(LocalOptions(), n_experts, group, etp_group)
    return AllToAllDispatcher(AllToAllOptions(), n_experts, group, etp_group)
