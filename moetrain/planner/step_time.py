"""Seconds of a training step, part by part, for many mappings at once.

Layers (``planner.layer_time``) add up to a pipeline's stages, which follow ``timeline.bound``, or event by event
``timeline.simulate``. What overlaps: the reduction of gradients and gathers of weights with a micro-batch's
computation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from moetrain.config.sizes import Sizes
from moetrain.planner import links
from moetrain.planner.candidates import SCHEDULES, Mappings, Numbers
from moetrain.planner.copies import moved_seconds
from moetrain.planner.footprint import Held, stages
from moetrain.planner.layer_time import LayerPricer, LayerTime
from moetrain.planner.links import Group
from moetrain.planner.timeline import bound

# What a step's time is split into.
SPLIT = ("attention", "dense", "router", "dispatch", "experts", "combine", "copies", "tensor", "head", "host", "bubble",
         "send", "reduction", "optimizer")  # fmt: skip


@dataclass(frozen=True)
class StepTime:
    """seconds: of a step. parts: by SPLIT, of the slowest rank; they add up to it. hidden: of communication."""

    seconds: Numbers
    parts: dict[str, Numbers]
    hidden: Numbers
    forward: list[Numbers] = field(default_factory=list)  # of each stage and micro-batch
    backward: list[Numbers] = field(default_factory=list)
    send: Numbers = field(default_factory=lambda: np.zeros(0))
    tail: Numbers = field(default_factory=lambda: np.zeros(0))


class Pricer(LayerPricer):
    """Prices steps in one setting."""

    def step(self, m: Mappings) -> StepTime:
        """Of mappings that share pp, vpp and schedule."""
        s = self.s
        pp, vpp, schedule = int(m.pp[0]), int(m.vpp[0]), SCHEDULES[int(m.schedule[0])]
        layers = [self.layer(kind, m) for kind in s.shape.kinds]
        held = stages(s.shape, s.run.seq_len, pp * vpp, s.layout)
        sizes = Sizes(pp=pp, stages_per_rank=vpp)
        head, zero, n = self.head(m), np.zeros(len(m)), m.micro_batches(s.run.global_batch)

        def seconds(stage: Held) -> Numbers:
            total = sum((count * layers[k].total for k, count in enumerate(stage.counts)), zero)
            if stage.last:
                last = layers[s.shape.layers[-1]].total
                total = total + head + s.shape.mtp * last
            return total

        of_stage = [seconds(stage) for stage in held]
        mine = [[held[i] for i in sizes.stages_of_rank(rank, schedule)] for rank in range(pp)]
        of_rank = [sum((of_stage[stage.index] for stage in own), zero) for own in mine]
        slowest, total = np.maximum.reduce(of_rank), sum(of_rank, zero)
        whole = bound(schedule, m.pp, m.vpp, n, slowest, total)
        size = m.tokens(s.run.seq_len) * s.shape.dim * s.run.narrow
        far = Group(m.pp, m.world // np.maximum(1, m.pp))
        slow = far.inside(s.cluster.domain) < m.pp
        send = size / np.where(slow, s.cluster.network_gb_s * s.c.network, s.cluster.link_gb_s * s.c.plain) / 1e9
        passing = np.where(m.pp > 1, 2 * (m.pp - 1 + 0.1 * n * m.vpp) * send, 0.0)
        reduction, hidden_reduction = self._data(m, slowest, n, layers, mine, pp)
        optimizer = self._optimizer(m, mine[0])
        at = of_rank[int(np.argmax([r.mean() for r in of_rank]))]
        own = mine[int(np.argmax([r.mean() for r in of_rank]))]
        parts = dict.fromkeys(SPLIT, zero)
        hidden = hidden_reduction
        for stage in own:
            for k, count in enumerate(stage.counts):
                for name, value in layers[k].parts.items():
                    parts[name] = parts[name] + n * count * value
                hidden = hidden + n * count * layers[k].hidden
            if stage.last:
                parts["head"] = parts["head"] + n * (of_stage[stage.index] - sum(
                    (count * layers[k].total for k, count in enumerate(stage.counts)), zero
                ))  # fmt: skip
        parts["bubble"] = whole - n * at
        moved = moved_seconds(s.shape, m, s.run, s.cluster, s.c)
        parts["copies"] = parts["copies"] + moved
        parts["send"], parts["reduction"], parts["optimizer"] = passing, reduction, optimizer
        return StepTime(
            whole + passing + reduction + optimizer + moved, parts, hidden,
            [t / 3 for t in of_stage], [2 * t / 3 for t in of_stage], send, passing + reduction + optimizer + moved,
        )  # fmt: skip

    def _data(
        self, m: Mappings, one: Numbers, n: Numbers, layers: list[LayerTime], mine: list[list[Held]], pp: int
    ) -> tuple[Numbers, Numbers]:
        """(exposed, hidden) seconds of gathering weights and reducing gradients. one: of a micro-batch."""
        s, kinds = self.s, self.s.shape.kinds
        fsdp, edp = Group(m.dp * m.cp, m.tp), Group(m.edp, m.ep * m.etp)
        gather, reduce, copies = (np.zeros(len(m)) for _ in range(3))
        fullest = max(mine, key=lambda own: sum(sum(stage.counts) for stage in own))
        counts = [sum(stage.counts[k] for stage in fullest) for k in range(len(kinds))]
        ends = s.shape.vocab * s.shape.dim * (2 if pp == 1 and not s.shape.tied else 1) / m.tp
        dense = ends + sum(
            (
                c * sum(p.numel / (m.tp if p.split is not None else 1) for p in k.dense)
                for c, k in zip(counts, kinds, strict=True)
            ),
            np.zeros(len(m)),
        )
        experts = sum((c * k.experts.numel for c, k in zip(counts, kinds, strict=True) if k.experts), 0) / (
            m.ep * m.etp
        )
        for numel, group, calls in ((dense, fsdp, sum(counts) + 1), (experts, edp, sum(counts))):
            gather = gather + links.ring(numel * s.run.narrow, group, s.cluster, s.c, calls)
            reduce = reduce + links.ring(numel * s.stack.gradients, group, s.cluster, s.c, calls)
        copies = 2 * links.ring(
            dense / np.maximum(1, m.dp * m.cp) * 4.0, Group(m.rep, m.dp * m.cp * m.tp), s.cluster, s.c
        )
        if s.stack.shards == "optimizer":
            work = gather + reduce + copies
            covered = np.minimum(s.c.reduce * one, 0.95 * work)
            return work - covered, covered
        # FSDP: in a pipeline weights are gathered once a step, without one for both passes of each micro-batch.
        first, each = (gather, 0 * gather) if pp > 1 else (0 * gather, 2 * gather)
        if s.stack.reduce_each:
            each, reduce = each + reduce, 0 * reduce
        first_covered, covered = (np.minimum(s.c.reduce * one, 0.95 * work) for work in (first, each))
        last = reduce + copies
        last_covered = np.where((n > 1) | (pp > 1), 0.0, np.minimum(0.5 * s.c.reduce * one, 0.95 * last))
        hidden = n * covered + first_covered + last_covered
        return n * each + first + last - hidden, hidden

    def _optimizer(self, m: Mappings, own: list[Held]) -> Numbers:
        """AdamW reads weight, gradient and two states and writes three: 28 bytes of a float32 parameter."""
        s, numbers = self.s, np.zeros(len(m))
        for stage in own:
            for k, count in enumerate(stage.counts):
                kind = s.shape.kinds[k]
                split = sum(p.numel / (m.tp if p.split is not None else 1) for p in kind.dense) / (m.dp * m.cp)
                experts = kind.experts.numel / (m.ep * m.etp * m.edp) if kind.experts else 0.0
                numbers = numbers + count * (split + experts)
            numbers = numbers + (stage.first + stage.last) * s.shape.vocab * s.shape.dim / (m.tp * m.dp * m.cp)
        # Offloaded state comes and goes; offloaded weights come for every gather, and the CPU updates them.
        host = s.cluster.host_gb_s * 1e9
        gathers = np.where(m.pp > 1, 1, 2 * m.micro_batches(s.run.global_batch))
        here, there = 28.0 * numbers / self.memory, (28.0 + 4.0 + 4.0 * gathers) * numbers / host
        return np.select([m.offload == 1, m.offload == 2], [here + 16.0 * numbers / host, there], here)
