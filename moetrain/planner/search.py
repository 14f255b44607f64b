"""The best mapping of a model on a cluster: all legal ones are priced, and those that do not fit are left out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from moe_kernels.loss import CHUNK_LOGITS, CHUNK_LOGITS_GPU
from moe_kernels.loss_softmax import BLOCK_LOGITS, BLOCK_LOGITS_GPU

from moetrain.config.errors import ConfigError
from moetrain.config.schema import Config
from moetrain.optim.optimizers.muon import MuonOptions
from moetrain.planner.candidates import SCHEDULES, Mappings, Numbers, columns
from moetrain.planner.cluster import Cluster
from moetrain.planner.footprint import PARTS, footprint
from moetrain.planner.layer_time import Setting
from moetrain.planner.legal import legal_mappings
from moetrain.planner.loads import SENT, Load, probability
from moetrain.planner.memory import Run
from moetrain.planner.placed import FSSDP, Placed, Uneven, fssdp_options, place, uneven
from moetrain.planner.rates import FITTED, STACKS, Stack
from moetrain.planner.shape import ModelShape, shape_of
from moetrain.planner.step_time import SPLIT, Pricer
from moetrain.planner.timeline import simulate

# Of a GPU's memory, what its context, kernels' buffers and the allocator's gaps take: torch's caching allocator leaves
# 3 to 8% of what it holds unused in training (docs/plan.md).
SLACK = 0.92
REFINED = 40  # mappings whose pipelines are run event by event
EVENTS = 60_000  # the most events of one
CHUNK = 50_000


@dataclass(frozen=True)
class Problem:
    """What is planned. load: None for balanced routing. sent: share of the rows that dispatch=lsh sends."""

    cfg: Config
    cluster: Cluster
    world: int
    stack: Stack = STACKS["moetrain"]
    load: Load | None = None
    precisions: tuple[str, ...] = ("bf16", "fp8")
    sent: float = SENT

    @property
    def shape(self) -> ModelShape:
        """The model's."""
        return shape_of(self.cfg.model)

    def run(self) -> Run:
        """The common numbers, with balanced loads."""
        cfg = self.cfg
        narrow = {"bf16": 2, "float32": 4, "float64": 8}[cfg.train.precision]
        on_cpu = self.cluster.kind == "cpu"
        lean = on_cpu or cfg.experts.backend in ("cpu", "triton", "sonicmoe")
        lean = lean or (cfg.experts.backend == "auto" and narrow == 2)  # triton
        return Run(
            cfg.train.seq_len, cfg.train.global_batch, max(4, narrow), narrow,
            "muon" if isinstance(cfg.optim, MuonOptions) else "adamw", cfg.parallel.prefetch, 1.0, lean,
            rounds=not on_cpu and cfg.experts.backend != "cpu", sent=self.sent,
            chunk=CHUNK_LOGITS if on_cpu else CHUNK_LOGITS_GPU, block=BLOCK_LOGITS if on_cpu else BLOCK_LOGITS_GPU,
        )  # fmt: skip

    @property
    def places(self) -> bool:
        """Whether copies of experts are weighed: where loads are uneven, and moetrain trains."""
        return self.load is not None and self.stack.name == "moetrain"

    @property
    def placed(self) -> Placed:
        """The load under experts/placement=fssdp, for which every rank must have as many experts."""
        assert self.load is not None
        return place(self.load, self.world, self.cluster.domain, fssdp_options(self.cfg, self.cluster.domain))

    @property
    def capacity(self) -> float:
        """Bytes of a GPU that a run can fill."""
        return SLACK * self.cluster.memory_gib * 2**30

    @property
    def tokens(self) -> float:
        """Of a step."""
        return float(self.cfg.train.global_batch * self.cfg.train.seq_len)


@dataclass
class Plan:
    """One priced mapping. seconds: of a step. parts: seconds by SPLIT. memory: bytes of the fullest rank by PARTS, with
    host; by_stage: bytes on each pipeline rank. tokens: per second and GPU. out_of_memory: probability, of a load."""

    row: dict[str, Any]
    seconds: float
    parts: dict[str, float]
    hidden: float
    memory: dict[str, float]
    by_stage: list[float]
    tokens: float
    tflops: float
    utilisation: float
    out_of_memory: float | None = None
    simulated: bool = False

    @property
    def total(self) -> float:
        """Bytes of the fullest rank."""
        return max(self.by_stage)


@dataclass
class Found:
    """best: ascending by time. looked_at, fit: mappings. frontier: (bytes, tokens per second and GPU) of those that no
    other beats in both. nearest: where none fits, the one that lacks least."""

    best: list[Plan]
    looked_at: int
    fit: int
    frontier: list[tuple[float, float]] = field(default_factory=list)
    nearest: Plan | None = None


def check_problem(p: Problem) -> None:
    """Raise ConfigError for what no mapping can mend."""
    t = p.cfg.train
    if p.world > p.tokens:
        raise ConfigError(
            f"gpus={p.world} is more than the {p.tokens:.0f} tokens of a step (global_batch={t.global_batch} x "
            f"seq={t.seq_len}); plan for fewer GPUs or a larger global_batch"
        )


def search(p: Problem, top: int = 10) -> Found:
    """The best ``top`` mappings. Raises ConfigError where no mapping is legal."""
    check_problem(p)
    m = legal_mappings(p.cfg, p.cluster, p.world, p.precisions, p.places)
    if not len(m):
        raise ConfigError(
            f"no mapping of {p.cfg.model.name} on gpus={p.world} is legal with global_batch={p.cfg.train.global_batch} "
            f"and seq={p.cfg.train.seq_len}: their sizes do not divide; try a global_batch that {p.world} divides"
        )
    seconds, memory = evaluate(p, m)
    fits = memory <= p.capacity
    if not fits.any():
        i = int(memory.argmin())
        return Found([], len(m), 0, [], priced(p, m.take([i])))
    kept = np.flatnonzero(fits)
    order = kept[np.argsort(seconds[kept], kind="stable")]
    candidates = [refined(p, priced(p, m.take([i]))) for i in order[:REFINED]]
    candidates.sort(key=lambda plan: plan.seconds)
    return Found(candidates[:top], len(m), len(kept), _frontier(p, seconds[kept], memory[kept]))


def evaluate(p: Problem, m: Mappings) -> tuple[Numbers, Numbers]:
    """(seconds of a step, bytes of the fullest rank) of each mapping."""
    seconds, memory = np.zeros(len(m)), np.zeros(len(m))
    keys = (m.pp * 1000 + m.vpp) * 100 + m.schedule
    for key in np.unique(keys):
        of_key = np.flatnonzero(keys == key)
        for start in range(0, len(of_key), CHUNK):
            places = of_key[start : start + CHUNK]
            part = m.take(places)
            memory[places] = footprint(p.shape, part, _uneven(p, part)[0]).total
            memory[places] += np.where(_host_full(p, part), np.inf, 0.0)
            able = places[memory[places] <= p.capacity]
            seconds[places] = np.inf
            if len(able):
                seconds[able] = Pricer(_setting(p, m.take(able))).step(m.take(able)).seconds
    return seconds, memory


def _host_full(p: Problem, m: Mappings) -> Any:
    """Whether what is offloaded exceeds host memory; the first pipeline rank stands for all."""
    if not (m.offload > 0).any():
        return np.zeros(len(m), dtype=bool)
    host = footprint(p.shape, m, p.run(), only=(0,)).host[0]
    return host * p.cluster.node > 0.9 * p.cluster.host_gib * 2**30


def _uneven(p: Problem, m: Mappings) -> tuple[Run, Uneven]:
    """(the common numbers with what the load makes of each mapping, how uneven it is)."""
    placed = p.placed if (m.placement == FSSDP).any() else None
    found = uneven(m, p.load, placed)
    return replace(p.run(), skew=found.held, placed=placed), found


def _setting(p: Problem, m: Mappings) -> Setting:
    run, found = _uneven(p, m)
    return Setting(p.shape, run, p.cluster, p.stack, FITTED, found.rows, travel=found.travel)


def priced(p: Problem, m: Mappings) -> Plan:
    """One mapping in full."""
    step = Pricer(_setting(p, m)).step(m)
    run, _ = _uneven(p, m)
    held = footprint(p.shape, m, run)
    seconds = float(step.seconds[0])
    plan = Plan(
        row=m.row(0),
        seconds=seconds,
        parts={name: float(step.parts[name][0]) for name in SPLIT},
        hidden=float(step.hidden[0]),
        memory={name: float(value[0]) for name, value in held.of_fullest().items()},
        by_stage=[float(x) for x in held.totals[:, 0]],
        tokens=0.0, tflops=0.0, utilisation=0.0,
    )  # fmt: skip
    if p.load is not None:
        even, more = (float(footprint(p.shape, m, replace(run, skew=s)).total[0]) for s in (1.0, 2.0))
        fullest_N = p.load.fullest(int(m.ep[0])) if run.placed is None else run.placed.fullest_N
        plan.out_of_memory = probability(fullest_N, even, more - even, p.capacity)
    return _rated(p, plan)


def refined(p: Problem, plan: Plan) -> Plan:
    """``plan`` with its pipeline run event by event, where it has one that is not too long for that."""
    row = plan.row
    n = p.cfg.train.global_batch // (row["micro_batch"] * row["dp"] * row["rep"])
    if row["pp"] == 1 or 3 * row["pp"] * row["vpp"] * n > EVENTS:
        return plan
    m = columns([row])
    step = Pricer(_setting(p, m)).step(m)
    forward, backward = ([float(x[0]) for x in times] for times in (step.forward, step.backward))
    line = simulate(row["schedule"], row["pp"], row["vpp"], n, forward, backward, float(step.send[0]))
    outside = plan.parts["reduction"] + plan.parts["optimizer"]
    computed = sum(v for k, v in plan.parts.items() if k not in ("bubble", "send", "reduction", "optimizer"))
    parts = plan.parts | {"bubble": max(0.0, line.seconds - computed), "send": 0.0}
    return _rated(p, replace(plan, seconds=line.seconds + outside, parts=parts, simulated=True))


def _rated(p: Problem, plan: Plan) -> Plan:
    plan.tokens = p.tokens / plan.seconds / p.world
    flops = plan.tokens * p.shape.flops_per_token(p.cfg.train.seq_len)
    peak = p.cluster.peak("bf16" if p.cfg.train.precision == "bf16" else "float32")
    plan.tflops, plan.utilisation = flops / 1e12, flops / peak
    return plan


def _frontier(p: Problem, seconds: Numbers, memory: Numbers) -> list[tuple[float, float]]:
    order = np.argsort(memory, kind="stable")
    found, best = [], np.inf
    for i in order:
        if seconds[i] < best:
            best = float(seconds[i])
            found.append((float(memory[i]), p.tokens / best / p.world))
    return found


def why_slower(best: Plan, other: Plan) -> str:
    """What costs ``other`` most over ``best``, as shares of the best one's step."""
    differences = sorted(
        ((name, (other.parts[name] - best.parts[name]) / best.seconds) for name in SPLIT), key=lambda x: -x[1]
    )
    worse = [f"{name} +{share:.1%}" for name, share in differences[:2] if share > 0.001]
    if not worse:
        return "as fast" if other.total >= best.total else "as fast, and smaller"
    return ", ".join(worse)


def gpus_that_fit(p: Problem, most: int = 64) -> int | None:
    """The fewest GPUs, of the world doubled and doubled again, on which some mapping fits."""
    times = 2
    while times <= most and p.world * times <= p.tokens:
        larger = replace(p, world=p.world * times)
        m = legal_mappings(p.cfg, p.cluster, larger.world, p.precisions)
        if len(m):
            keep = m.take(np.unique(np.linspace(0, len(m) - 1, 20_000).astype(int)))
            if (evaluate(larger, keep)[1] <= p.capacity).any():
                return larger.world
        times *= 2
    return None


def description(row: dict[str, Any]) -> str:
    """A mapping in a line, as ``mapping=`` takes it."""
    names = {"pp": "pp", "vpp": "vpp", "rep": "dp_replicate", "cp": "cp", "tp": "tp", "ep": "ep", "etp": "etp"}
    sizes = [f"{short}={row[name]}" for name, short in names.items() if row[name] != 1]
    words = [f"micro_batch={row['micro_batch']}"]
    words += [f"context={row['context']}"] if row["cp"] > 1 else []
    words += [f"schedule={row['schedule']}"] if row["pp"] > 1 and row["schedule"] != SCHEDULES[0] else []
    words += [f"recompute={row['recompute']}"] if row["recompute"] != "none" else []
    words += [f"offload={row['offload']}"] if row["offload"] != "none" else []
    words += [f"dispatch={row['dispatch']}"] if row["dispatch"] not in ("local", "all_to_all") else []
    words += [f"placement={row['placement']}"] if row["placement"] != "ep" else []
    words += [f"precision={row['precision']}"]
    return ",".join([*sizes, *words])


__all__ = ["PARTS", "SPLIT", "Found", "Plan", "Problem", "check_problem", "description", "search"]
