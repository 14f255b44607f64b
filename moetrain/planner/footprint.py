"""What every pipeline rank holds under many mappings: the pieces of ``planner.memory`` put together stage by stage."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from moetrain.config.sizes import Sizes
from moetrain.parallel.stages import split_by_cost
from moetrain.planner import memory
from moetrain.planner.candidates import SCHEDULES, Mappings, Numbers
from moetrain.planner.copies import copies_bytes
from moetrain.planner.memory import Run
from moetrain.planner.shape import Matrix, ModelShape, layer_flops
from moetrain.planner.timeline import under_way

PARTS = ("weights", "gradients", "optimizer", "activations", "working", "gathered", "unreduced", "copies")


@dataclass(frozen=True)
class Held:
    """A stage of a pipeline: how many layers of each kind, and whether it has the embedding, and the norm and head."""

    index: int
    counts: tuple[int, ...]
    first: bool
    last: bool


@functools.lru_cache(maxsize=512)
def stages(shape: ModelShape, seq_len: int, total: int, layout: tuple[int, ...] | None = None) -> tuple[Held, ...]:
    """The stages of a pipeline of ``total``: as ``layout`` says, or split by cost as ``all_stages`` does."""
    flops = [layer_flops(kind, seq_len) for kind in shape.kinds]
    head = 2.0 * shape.dim * shape.vocab * (1 + shape.mtp) + shape.mtp * flops[shape.layers[-1]]
    counts = list(layout or split_by_cost([flops[k] for k in shape.layers], total, last=head))
    found, start = [], 0
    for i, n in enumerate(counts):
        kinds = Counter(shape.layers[start : start + n])
        found.append(Held(i, tuple(kinds[k] for k in range(len(shape.kinds))), i == 0, i == total - 1))
        start += n
    return tuple(found)


@dataclass(frozen=True)
class Footprint:
    """Bytes, an array (ranks of the pipeline, mappings) for each of PARTS and ``host``: of these, in host memory."""

    parts: dict[str, Numbers]
    host: Numbers

    @property
    def totals(self) -> Numbers:
        """Bytes on the device: not all peaks need come at the same time."""
        total: Numbers = sum(self.parts.values()) - self.host
        return total

    @property
    def total(self) -> Numbers:
        """Of the fullest rank."""
        most: Numbers = self.totals.max(axis=0)
        return most

    def of_fullest(self) -> dict[str, Numbers]:
        """Each part on the fullest rank."""
        rank, columns = self.totals.argmax(axis=0), np.arange(self.totals.shape[1])
        return {name: value[rank, columns] for name, value in self.parts.items()} | {"host": self.host[rank, columns]}


def footprint(
    shape: ModelShape, m: Mappings, run: Run, layout: tuple[int, ...] | None = None, only: tuple[int, ...] = ()
) -> Footprint:
    """Of mappings that share pp, vpp and schedule. only: pipeline ranks to look at; (): all."""
    pp, vpp, schedule = int(m.pp[0]), int(m.vpp[0]), SCHEDULES[int(m.schedule[0])]
    held = stages(shape, run.seq_len, pp * vpp, layout)
    sizes = Sizes(pp=pp, stages_per_rank=vpp)
    pieces = _Pieces(shape, m, run)
    columns: dict[str, list[Numbers]] = {name: [] for name in (*PARTS, "host")}
    for rank in only or range(pp):
        mine = [held[i] for i in sizes.stages_of_rank(rank, schedule)]
        for name, value in pieces.rank(mine, rank, schedule).items():
            columns[name].append(value)
    stacked = {name: np.stack(values) for name, values in columns.items()}
    return Footprint({name: stacked[name] for name in PARTS}, stacked["host"])


def _adam(tables: memory.Shards) -> memory.Shards:
    """Muon leaves tables to AdamW."""
    return replace(tables, vectors=tables.own, of_adam=tables.tensors)


class _Pieces:
    """The parts of one layer of each kind and of the ends, computed once."""

    def __init__(self, shape: ModelShape, m: Mappings, run: Run) -> None:
        self.shape, self.m, self.run = shape, m, run
        self.layers = [memory.layer_shards(kind, m) for kind in shape.kinds]
        self.kept = [memory.kept_bytes(kind, m, run, shape.dim) for kind in shape.kinds]
        table = Matrix(shape.vocab, shape.dim, 0)
        self.embed = _adam(memory.matrices((table,), m))
        self.head = _adam(memory.matrices((Matrix(shape.dim, 0), *(() if shape.tied else (table,))), m))
        # A last stage that is not the first has a tied table, too, of which the optimizer knows nothing.
        self.copy = self.embed if shape.tied and int(m.pp[0]) > 1 else None
        self.ends = memory.ends_bytes(shape, m, run)
        self.n = m.micro_batches(run.global_batch)
        # A stage on one rank, computed in the dtype of its weights: no FSDP
        self.own = (m.dp * m.rep * m.cp * m.tp == 1) & (run.narrow == run.wide) & (m.offload != 2)

    def rank(self, mine: list[Held], rank: int, schedule: str) -> dict[str, Numbers]:
        """PARTS and host of the rank that holds the stages ``mine``."""
        m, run, narrow = self.m, self.run, self.run.narrow
        reduced = max(4, narrow)
        found = {name: np.zeros(len(m)) for name in (*PARTS, "host")}
        root, block, whole = (np.zeros(len(m)) for _ in range(3))
        for stage in mine:
            units = [(shards, count) for k, count in enumerate(stage.counts) for shards in self.layers[k]]
            ends = [self.embed] * stage.first + [self.head] * stage.last
            for shards, count in [*units, *((e, 1) for e in ends)]:
                for name, size in zip(PARTS[:3], memory.state_bytes(run, shards), strict=True):
                    found[name] += count * size
                whole = whole + count * shards.gathered
            if stage.last and self.copy is not None:
                ends = [*ends, self.copy]
                found["weights"] += run.wide * self.copy.own
                found["gradients"] += run.wide * self.copy.own
                whole = whole + self.copy.gathered
            root = root + sum((e.gathered for e in ends), np.zeros(len(m)))
            if stage.last:
                found["working"] = np.maximum(found["working"], memory.head_bytes(self.shape, m, run))
            if stage.first:  # the table's gradient, once all else has gone
                table = self.shape.vocab / m.tp * self.shape.dim * narrow
                found["working"] = np.maximum(found["working"], table - self._kept(stage))
            for k, count in enumerate(stage.counts):
                if count:  # in backward, once what the head and the loss kept has gone
                    block = np.maximum(block, self.layers[k][0].gathered + self.layers[k][1].gathered)
                    found["working"] = np.maximum(found["working"], self.kept[k][1] - stage.last * self.ends[1])
        blocks = sum(sum(stage.counts) for stage in mine)
        ahead = np.minimum(blocks, 1 + run.prefetch) * block
        keeps = int(m.pp[0]) > 1
        found["gathered"] = narrow * np.where(keeps, whole, np.minimum(whole, root + ahead))
        waits = keeps | (self.n > 1)
        found["unreduced"] = reduced * np.where(waits, whole, np.maximum(root, block))
        for name in ("gathered", "unreduced"):
            found[name] = np.where(self.own, 0.0, found[name])
        found["activations"] = self._activations(mine, rank, schedule)
        found["copies"] = copies_bytes(self.shape, m, run)  # which no pipeline has
        if run.shards == "optimizer":  # 16-bit weights, 32-bit gradients; a 32-bit copy and two states, split
            numbers = whole + found["weights"] / run.wide * (whole == 0)
            found["weights"], found["gradients"], found["optimizer"] = 2 * numbers, 4 * numbers, 3 * found["weights"]
            found["gathered"] = found["unreduced"] = np.zeros(len(m))
        state = found["weights"] + found["gradients"] + found["optimizer"]
        found["host"] = np.select([m.offload == 1, m.offload == 2], [found["optimizer"], state], 0.0)
        return found

    def _activations(self, mine: list[Held], rank: int, schedule: str) -> Numbers:
        m = self.m
        pp, vpp = int(m.pp[0]), int(m.vpp[0])
        of_stage = [self._kept(stage) for stage in mine]
        most = np.zeros(len(m))
        for n in np.unique(self.n):
            here = self.n == n
            for moment in under_way(schedule, pp, vpp, int(n), rank) if pp > 1 else ((1,),):
                held = sum((a * b for a, b in zip(moment, of_stage, strict=True)), np.zeros(len(m)))
                most = np.where(here, np.maximum(most, held), most)
        return most

    def _kept(self, stage: Held) -> Numbers:
        """Bytes of one micro-batch."""
        x = self.m.tokens(self.run.seq_len) * self.shape.dim * self.run.narrow
        size = sum((count * self.kept[k][0] for k, count in enumerate(stage.counts)), np.zeros(len(self.m)))
        size = size + stage.first * self.ends[0] + stage.last * self.ends[1]
        kept: Numbers = size + (int(self.m.pp[0]) > 1 and not stage.last) * x
        return kept
