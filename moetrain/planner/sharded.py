"""FSDP's part of a stage: local shards, what it gathers and how often, and what its gradients cost.

FSDP gathers a unit (experts, a block, the root with what is in no block) when it runs and it is not whole, and frees it
after forward if ``reshard_after_forward``, after backward if there is no pipeline. A pipeline keeps what was gathered
to the end of the step (or to the unit's next forward), and reduces gradients then; until then they are whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from moetrain.config.schema import Config
from moetrain.config.sizes import Sizes
from moetrain.moe.experts import Experts
from moetrain.parallel.apply import build_stage, on_its_own, parallelize
from moetrain.parallel.fsdp import left_alone
from moetrain.parallel.mesh import ParallelDims
from moetrain.parallel.pipeline import StagePart
from moetrain.parallel.stages import Stage
from moetrain.planner.groups import Traffic
from moetrain.planner.order import Action
from moetrain.planner.stage_run import compute_dtype


@dataclass(frozen=True)
class Unit:
    """What FSDP gathers at once. mesh: "fsdp" or "edp", of ``ranks`` ranks. block: its place among the stage's blocks;
    None: the root.

    shard: bytes that this rank gives to a gather. whole: of the gathered weights, padding included. gradient: of its
    whole gradients while they wait to be reduced.
    """

    mesh: str
    ranks: int
    block: int | None
    shard: int
    whole: int
    gradient: int


@dataclass(frozen=True)
class Shards:
    """A stage under FSDP, on the meta device."""

    part: StagePart
    units: list[Unit]


def shard_stage(cfg: Config, dims: ParallelDims, stage: Stage) -> Shards:
    """Build ``stage`` as a run does."""
    part = build_stage(cfg, stage)
    parallelize(part, cfg, dims)
    if on_its_own(cfg, dims.sizes):
        return Shards(part, [])
    fsdp, edp = dims.sizes.dp_shard * dims.sizes.cp, dims.sizes.edp
    # Innermost first: a parameter belongs to the smallest unit that has it.
    taken: set[nn.Parameter] = left_alone(part, edp, cfg.parallel.offload == "all")
    units = []
    for i, block in enumerate(part.layers.values()):
        for module in reversed(list(block.modules())):
            if isinstance(module, FSDPModule):
                ranks = ("edp", edp) if isinstance(module, Experts) else ("fsdp", fsdp)
                units.append(_unit(cfg, module, *ranks, i, taken))
    units.append(_unit(cfg, part, "fsdp", fsdp, None, taken))
    return Shards(part, [unit for unit in units if unit.whole])


def _unit(cfg: Config, module: nn.Module, mesh: str, ranks: int, block: int | None, taken: set[nn.Parameter]) -> Unit:
    own = {p for p in module.parameters() if p not in taken}
    taken |= own
    # This rank is the first of its group, and the first shard is never smaller than another: what it lacks is padding.
    numel = sum(local_of(p).numel() for p in own)
    trained = sum(local_of(p).numel() for p in own if p.requires_grad)
    dtype = compute_dtype(cfg)
    reduced = torch.promote_types(dtype, torch.float32)
    return Unit(
        mesh, ranks, block, numel * dtype.itemsize, numel * ranks * dtype.itemsize, trained * ranks * reduced.itemsize
    )


def local_of(t: Tensor) -> Tensor:
    """What this rank holds of ``t``."""
    return t.to_local() if isinstance(t, DTensor) else t


class Gathers:
    """Which units are whole while a rank goes through its actions. most: bytes of whole weights at the peak."""

    def __init__(self, cfg: Config, sizes: Sizes, stages: dict[int, Shards]) -> None:
        self.reshard, self.ahead = sizes.reshards(cfg.parallel), cfg.parallel.prefetch
        self.piped = sizes.pp > 1
        self.stages = stages
        self.whole: set[tuple[int, int]] = set()  # (stage, number of the unit)
        self.count: Counter[tuple[int, int]] = Counter()
        self.most = 0

    def run(self, order: Sequence[Action]) -> None:
        """Go through ``order``."""
        for action in order:
            blocks = range(len(self.stages[action.stage].part.layers))
            if action.kind == "gather":
                self._gather(action.stage, [*blocks, None])
            elif action.kind == "free":
                self._free(action.stage, [*blocks, None])
            elif action.kind == "forward":
                self._gather(action.stage, [None])
                for i in blocks:
                    self._gather(action.stage, list(blocks[i : i + 1 + self.ahead]))
                    self._free(action.stage, [i] if self.reshard else [])
            elif action.kind in ("backward", "backward_input"):
                self._gather(action.stage, [None])
                for i in reversed(blocks[_first_differentiated(self.stages[action.stage].part) :]):
                    self._gather(action.stage, list(blocks[max(0, i - self.ahead) : i + 1]))
                    self._free(action.stage, [] if self.piped else [i])
                self._free(action.stage, [] if self.piped else [*blocks, None])

    def traffic(self) -> dict[str, Traffic]:
        """All-gathers of weights, by mesh."""
        found = {"fsdp": Traffic(), "edp": Traffic()}
        for (stage, number), times in self.count.items():
            unit = self.stages[stage].units[number]
            if unit.ranks > 1:
                found[unit.mesh].add("all_gather", (unit.ranks - 1) * unit.shard * times, times)
        return found

    def _of(self, stage: int, blocks: Sequence[int | None]) -> list[tuple[int, int]]:
        return [(stage, n) for n, unit in enumerate(self.stages[stage].units) if unit.block in blocks]

    def _gather(self, stage: int, blocks: Sequence[int | None]) -> None:
        for key in self._of(stage, blocks):
            if key not in self.whole:
                self.whole.add(key)
                self.count[key] += 1
        self.most = max(self.most, sum(self.stages[s].units[n].whole for s, n in self.whole))

    def _free(self, stage: int, blocks: Sequence[int | None]) -> None:
        self.whole.difference_update(self._of(stage, blocks))


def _first_differentiated(part: StagePart) -> int:
    """The place of the first block that backward comes to: frozen ones that no gradient passes are left out."""
    if not part.first or (part.embed is not None and part.embed.weight.requires_grad):
        return 0
    trained = [any(p.requires_grad for p in block.parameters()) for block in part.layers.values()]
    return trained.index(True) if True in trained else len(trained)


def reductions(cfg: Config, sizes: Sizes, units: Sequence[Unit]) -> dict[str, Traffic]:
    """What reducing the gradients of ``units`` sends, once per step, by mesh."""
    found = {name: Traffic() for name in ("fsdp", "edp", "dp_replicate")}
    replicas = sizes.dp_replicate
    for unit in (unit for unit in units if unit.gradient):
        if unit.ranks > 1:
            found[unit.mesh].add("reduce_scatter", unit.gradient * (unit.ranks - 1) / unit.ranks)
        if unit.mesh == "fsdp" and replicas > 1:
            found["dp_replicate"].add("all_reduce", 2 * unit.gradient / unit.ranks * (replicas - 1) / replicas)
    return found


def whole_gradients(sizes: Sizes, micro_batches: int, units: Sequence[Unit]) -> int:
    """Bytes of gradients that are whole at a time: all of them where they wait for the end of the step, which is
    wherever there are several micro-batches or a pipeline; else those of the largest block (or the root)."""
    if sizes.pp > 1 or micro_batches > 1:
        return sum(unit.gradient for unit in units)
    sums: Counter[int | None] = Counter()
    for unit in units:
        sums[unit.block] += unit.gradient
    return max(sums.values(), default=0)
