"""Seconds of one layer and micro-batch, part by part, for many mappings at once.

A layer is its products (a roofline each: the matrix units, or memory, and a kernel's start), attention, what goes
through memory between them, and its collectives. What overlaps: dispatch and combine with computation where the stack
does that; the host's starting of operations with all of it.

Constants and what stacks do: ``planner.rates``. Letters: as in ``planner.memory``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moetrain.planner import links
from moetrain.planner.candidates import DISPATCH, PRECISION, RECOMPUTE, Mappings, Numbers
from moetrain.planner.cluster import Cluster
from moetrain.planner.copies import copies_seconds
from moetrain.planner.links import Group, Sent
from moetrain.planner.memory import Run
from moetrain.planner.placed import LSH
from moetrain.planner.rates import Constants, Stack
from moetrain.planner.replay import LSH_PASSES
from moetrain.planner.shape import LayerShape, Matrix, ModelShape, mean_seen

TILE = 128  # rows of a grouped product's tile
# Operations that the host starts for a layer, forward and backward; and for each local expert where each is a kernel.
STARTS = {"attention": 100, "mlp": 50, "router": 80, "experts": 120}
STARTS_EACH = 6
STREAMS = 4  # on which kernels of single experts run
# Which of them a stack's graphs replay.
REPLAYED = {"": (), "router": ("router",), "attention": ("attention", "mlp", "router"), "all": tuple(STARTS)}


@dataclass(frozen=True)
class Setting:
    """What is common to all mappings. skew: rows of the fullest rank over the mean, one number or one for each mapping;
    travel: the same of rows that travel, None: as skew. recompute_extra: share of forward that is computed again
    whatever the mapping says (a published run's own choice)."""

    shape: ModelShape
    run: Run
    cluster: Cluster
    stack: Stack
    c: Constants
    skew: Any = 1.0
    recompute_extra: float = 0.0
    layout: tuple[int, ...] | None = None
    travel: Any = None


@dataclass(frozen=True)
class LayerTime:
    """Of one layer and micro-batch, forward and backward. parts: seconds by the first names of
    ``step_time.SPLIT``, exposed. hidden:
    seconds of communication behind computation."""

    parts: dict[str, Numbers]
    hidden: Numbers
    total: Numbers


class LayerPricer:
    """Prices layers in one setting."""

    def __init__(self, setting: Setting) -> None:
        if setting.cluster.kind == "cpu":  # nothing overlaps
            setting = replace(setting, c=replace(setting.c, bulk=1.0, hidden=0.0, reduce=0.0))
        self.s = setting

    def product(self, rows: Numbers, p: Matrix, m: Mappings, narrow: Numbers) -> Numbers:
        """Seconds of rows (rows, in) x (in, out), where tp splits one of the two; forward."""
        outputs = p.outputs / (m.tp if p.split == 0 else 1)
        inputs = p.inputs / (m.tp if p.split == 1 else 1)
        flops = 2.0 * rows * outputs * inputs
        moved = (rows * (inputs + outputs) + inputs * outputs) * self.s.run.narrow
        return np.maximum(flops / self.rate(narrow), moved / self.memory) + self.s.c.start

    @property
    def memory(self) -> float:
        """Bytes per second."""
        return self.s.cluster.memory_gb_s * 1e9 * self.s.c.memory

    def rate(self, narrow: Numbers) -> Numbers:
        """FLOPs per second of a large product, by the place of its precision in PRECISION."""
        c, peak = self.s.c, self.s.cluster.lasting
        eight = peak("fp8") * c.product_16 * c.product_8  # published runs in NVFP4 are no faster than in MXFP8
        found: Numbers = np.choose(narrow, (peak("float32") * c.product_16, peak("bf16") * c.product_16, eight, eight))
        return found

    def layer(self, kind: LayerShape, m: Mappings) -> LayerTime:
        """Of one layer; its parts in seconds."""
        s, c = self.s, self.s.c
        D, e, T = s.shape.dim, float(s.run.narrow), m.tokens(s.run.seq_len)
        N = T * m.tp
        experts_in = m.precision
        dense_in = m.precision if s.stack.narrow_all else np.minimum(m.precision, 1)
        passes = c.fused_passes if s.stack.fused else c.passes
        zero = np.zeros(len(m))
        att = sum((self.product(N if p.split is not None else T, p, m, dense_in) for p in kind.attention), zero)
        core = 2.0 * kind.heads / m.tp * (kind.qk + kind.v) * mean_seen(s.run.seq_len, kind.window) * N
        peak = s.cluster.lasting("bf16" if s.run.narrow == 2 else "float32")
        core_forward, core_backward = self._core(kind, core, dense_in)
        scan = kind.scan * N / m.tp / (0.1 * peak)
        if kind.sinks and not s.stack.fused_sinks:  # scores are written and read again: 4 times forward, 6 backward
            scores = m.micro_batch * kind.heads / m.tp * s.run.seq_len**2 / m.cp * e
            core_forward, core_backward = (
                core_forward + 4 * scores / self.memory,
                core_backward + 6 * scores / self.memory,
            )
        own = (
            10 * T * D * e
            + 10 * N * kind.scan_width / m.tp * e
            + 4 * N * (kind.heads + 2 * kind.kv_heads) / m.tp * kind.qk * e
            + 8 * sum(kind.ranks) * T
        )
        quantise = self._quantised(kind.attention, N, T, m, dense_in)
        att_memory = passes * (own + quantise) / self.memory
        dense = sum((self.product(N, p, m, dense_in) for p in kind.mlp), zero)
        inner = N * kind.mlp_inner / m.tp * e * (kind.mlp_parts + 1) if kind.mlp else zero
        dense_memory = passes * (inner + self._quantised(kind.mlp, N, T, m, dense_in)) / self.memory
        parts = {
            "attention": 3 * att + core_forward + core_backward + 3 * scan + 3 * att_memory,
            "dense": 3 * (dense + dense_memory),
        }
        forward = att + core_forward + scan + att_memory + dense + dense_memory
        again = forward
        parts["tensor"] = self._tensor(kind, N * D * e, m)
        moe_forward, hidden = zero, zero
        inside = dense + dense_memory
        if kind.experts is not None:
            found, moe_forward = self._experts(kind, T, m, experts_in, passes)
            parts |= found
            inside = inside + found["_inside"]
            del parts["_inside"]
        # Recomputed: the whole forward pass with its collectives, or the inside of MLPs and experts.
        is_full, is_selective = m.recompute == RECOMPUTE.index("full"), m.recompute == RECOMPUTE.index("selective")
        sent = parts.get("dispatch", zero) / 2 + parts.get("combine", zero) / 2 + parts["tensor"] / 3
        whole = again + moe_forward + sent
        extra = np.select([is_full, is_selective], [whole, inside], 0.0) + s.recompute_extra * (again + moe_forward)
        compute = sum((v for k, v in parts.items() if k not in ("dispatch", "combine", "tensor")), zero) + extra
        if s.stack.overlap:
            exchange = parts.get("dispatch", zero) + parts.get("combine", zero)
            hidden = np.minimum(c.hidden * exchange, 0.9 * compute)
            left = np.where(exchange > 0, 1 - hidden / np.maximum(exchange, 1e-12), 1.0)
            for name in ("dispatch", "combine"):
                if name in parts:
                    parts[name] = parts[name] * left
        parts["attention"] = parts["attention"] + extra * 0.5
        name = "experts" if kind.experts is not None else "dense"
        parts[name] = parts[name] + extra * 0.5
        if kind.experts is not None:
            parts["copies"], behind = copies_seconds(kind.experts, m, forward, s.run, s.cluster, c)
            hidden = hidden + behind
        device = sum(parts.values(), zero)
        host = self.host(kind, m)
        # A GPU computes while the host starts what comes next; a CPU does one after the other.
        total = device + host if s.cluster.kind == "cpu" else (device**4 + host**4) ** 0.25
        parts["host"] = total - device
        return LayerTime(parts, hidden, total)

    def _core(self, kind: LayerShape, flops: Numbers, narrow: Numbers) -> tuple[Numbers, Numbers]:
        """Seconds of attention's own products (forward, backward), or of the exponentials of its scores, which run
        beside them: one for each score, forward and again backward."""
        s, share = self.s, self.s.c.attention
        peak = np.full(len(flops), s.cluster.lasting("bf16" if s.run.narrow == 2 else "float32"))
        if s.stack.attention_8:
            peak = np.where(narrow >= PRECISION.index("fp8"), s.cluster.lasting("fp8"), peak)
        scores = flops / (2.0 * max(1, kind.qk + kind.v))
        exponentials = scores / (s.cluster.exponentials * 1e12) if s.cluster.exponentials else 0.0 * scores
        products = flops / peak
        return np.maximum(products, exponentials) / share, np.maximum(2.5 * products / 0.7, exponentials) / share

    def host(self, kind: LayerShape, m: Mappings) -> Numbers:
        """Seconds in which the host starts a layer's operations."""
        s = self.s
        there = {"attention": bool(kind.attention), "mlp": bool(kind.mlp), "router": bool(kind.experts),
                 "experts": bool(kind.experts)}  # fmt: skip
        replayed = REPLAYED[s.stack.graphs]
        count = np.full(
            len(m), float(sum(STARTS[name] for name, is_there in there.items() if is_there and name not in replayed))
        )
        if kind.experts and s.stack.loops:
            count = count + STARTS_EACH * np.maximum(1.0, kind.experts.count / m.ep)
        each = s.c.host if s.cluster.launch_us is None else s.cluster.launch_us * 1e-6
        return count * each

    def _quantised(self, parts: tuple[Matrix, ...], N: Numbers, T: Numbers, m: Mappings, narrow: Numbers) -> Numbers:
        """Bytes that turning a product's operands into 8 bits or fewer moves: read in 16 bits, written twice."""
        rows = [
            (N if p.split is not None else T)
            * (p.inputs / (m.tp if p.split == 1 else 1) + p.outputs / (m.tp if p.split == 0 else 1))
            / 2
            for p in parts
            if p.inputs
        ]
        return np.where(narrow >= PRECISION.index("fp8"), 4.0 * self.s.c.quantise * sum(rows, np.zeros(len(m))), 0.0)

    def _tensor(self, kind: LayerShape, size: Numbers, m: Mappings) -> Numbers:
        """All-gathers and reduce-scatters of tp and what cp exchanges, forward and backward, as far as nothing hides
        them."""
        s, group = self.s, Group(m.tp, np.ones(len(m)))
        pairs = (1 if kind.attention else 0) + (1 if kind.mlp else 0)
        width = size if kind.ranks == (0, 0) else 0.5 * size
        times = 3 * pairs  # gathered and scattered, again backward, where the gathered input is gathered once more
        tensor = np.where(m.tp > 1, times * 2 / 1.5 * links.ring(width, group, s.cluster, s.c), 0.0)
        keys = 2 * m.tokens(s.run.seq_len) * m.tp * m.cp * (2 * kind.kv_heads / m.tp) * kind.qk
        context = np.where(m.cp > 1, 3 * links.ring(keys, Group(m.cp, m.tp), s.cluster, s.c), 0.0)
        return s.c.bulk * (tensor + context)

    def _experts(
        self, kind: LayerShape, T: Numbers, m: Mappings, narrow: Numbers, passes: float
    ) -> tuple[dict[str, Numbers], Numbers]:
        """(parts of the routed experts forward and backward, seconds of their computation forward)."""
        s, c, x = self.s, self.s.c, kind.experts
        assert x is not None
        e, zero = float(s.run.narrow), np.zeros(len(m))
        taken = 1.0 if x.capacity is None else min(1.0, x.capacity)
        skew = 1.0 if x.capacity is not None else s.skew
        share = taken * np.where(m.dispatch == LSH, s.run.sent, 1.0)
        rows = T * x.top_k * share * m.etp * skew
        local = np.maximum(1.0, x.count / m.ep)
        # Balanced rows fill tiles alike; uneven ones leave half a tile of each expert empty.
        even = np.ceil(rows / local / TILE - 1e-9) * TILE * local
        tiled = np.where(np.asarray(skew) == 1.0, even, rows + local * TILE / 2)
        F = x.inner / m.etp
        flops = 2.0 * tiled * x.dim * F * (x.parts + 1)
        weights = local * x.dim * F * (x.parts + 1) * e
        grouped = np.maximum(flops / (self.rate(narrow) * c.grouped), weights / self.memory)
        grouped = grouped + 2 * c.start * (np.maximum(1.0, local / STREAMS) if s.stack.loops else 1.0)
        moved = rows * e * (4 * x.dim + (x.parts + 1) * F * x.kept / 4)
        moved = moved + np.where(
            narrow >= 2, rows * 4.0 * c.quantise * (x.dim + F * (x.parts + 1) / 2 + x.dim / 2), 0.0
        )
        between = passes * moved / self.memory
        router = sum((self.product(T, p, m, np.minimum(narrow, 1)) for p in kind.router if p.inputs), zero)
        router = router + passes * 24.0 * T * x.count / self.memory + 6 * c.start
        hashing = np.where(m.dispatch == LSH, LSH_PASSES * T * x.top_k * taken * x.dim * e / self.memory, 0.0)
        group = Group(m.ep, m.etp)
        cost = [links.DISPATCH_COST["two_step" if s.stack.once and name == "all_to_all" else name] for name in DISPATCH]
        travel = skew if s.travel is None or x.capacity is not None else s.travel
        whole = m.dispatch == DISPATCH.index("all_gather")  # of which the loads are no matter
        sent = Sent(np.where(whole, T, T * share * travel), x.top_k, x.dim * e, group)
        one_way = np.select([m.dispatch == i for i in range(len(cost))], [f(sent, s.cluster, c) for f in cost], zero)
        at_home = m.dispatch == DISPATCH.index("local")  # whose tokens etp ranks gather, each once
        gathered = np.where(at_home, T * m.etp, rows)
        split = links.ring(gathered * x.dim * e, Group(m.etp, np.ones(len(m))), s.cluster, c)
        one_way = one_way + split
        inside = grouped + between * 0.5
        parts = {
            "router": 3 * router + hashing,
            "dispatch": 2 * one_way,
            "experts": 3 * (grouped + between),
            "combine": 2 * one_way,
            "_inside": inside,
        }
        return parts, grouped + between + router

    def head(self, m: Mappings) -> Numbers:
        """Seconds of the final norm, the head and the loss for one micro-batch, forward and backward."""
        s = self.s
        N = m.tokens(s.run.seq_len) * m.tp
        logits = Matrix(s.shape.vocab, s.shape.dim, 0)
        moved = 6 * 4.0 * N * s.shape.vocab / m.tp / self.memory
        return (3 * self.product(N, logits, m, np.minimum(m.precision, 1)) + moved) * (1 + s.shape.mtp)
