"""``moetrain simulate``: a trace, a model and a cluster in, a table of the systems out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetrain.config.errors import ConfigError
from moetrain.config.presets import nearest
from moetrain.config.schema import Config
from moetrain.model.count import count_parameters, flops_per_token
from moetrain.moe.placement.plan import overlap_degree
from moetrain.planner.cluster import load_cluster
from moetrain.planner.replay import Figures, Model, System, Work, dense_seconds, replay
from moetrain.planner.replay_time import Clock
from moetrain.planner.trace import Trace, read_trace, synthetic

if TYPE_CHECKING:
    from rich.table import Table

HELP = """usage: moetrain simulate cluster=NAME ranks=N [word=value ...] [key=value ...] [--json]

Replay the routing of a run, or a made-up one, over a described cluster: step time, exposed communication, bytes and
memory of expert parallelism (ep), sparse sharding (fssdp, with fssdp-rm freeing copies after forward), dispatch=lsh,
and others. Settings are those of 'moetrain train': the model, train.seq_len, train.micro_batch, train.precision.

  cluster=NAME     a cluster that ships with moetrain, or the path of a .yaml file
  ranks=N          GPUs, all in one expert parallel group
  trace=PATH       run directory of a run with train.trace=true; without: made up by the next three
  skew=1.0         how uneven made-up loads are; 0: even
  steps=20         steps that are made up, or the last ones of the trace
  seed=0           of what is made up
  slots=8          copies of experts that a rank has room for in each layer
  sent=0.2         share of rows that dispatch=lsh sends (lsh_sent_share of a run's metrics)
  attention=flash  how attention runs: flash, or unfused, which writes and reads its scores
  efficiency=0.4   share of the peak that matrix products reach
  copies=broadcast how copies travel: broadcast (NCCL's, pipelined) or direct (from home to each rank, as training does)
  systems=a,b      only these"""

SYSTEMS = ("ep", "fssdp", "fssdp-rm", "lsh", "shadow", "static", "migrate")
# Times that unfused attention writes or reads its scores, forward: product, softmax, dropout, product.
SCORES = 6
WIDTHS = {"float32": 4, "float64": 8, "bf16": 2}


@dataclass(frozen=True)
class Asked:
    """The words of the command; see HELP. systems: in the order of SYSTEMS."""

    cluster: str
    ranks: int
    trace: str | None = None
    skew: float = 1.0
    steps: int = 20
    seed: int = 0
    slots: int = 8
    sent: float = 0.2
    attention: str = "flash"
    efficiency: float = 0.4
    copies: str = "broadcast"
    systems: tuple[str, ...] = SYSTEMS


# word -> (least, most)
RANGES: dict[str, tuple[float, float]] = {
    "ranks": (1, 4096),
    "skew": (0, 10),
    "steps": (1, 10000),
    "seed": (0, 2**31),
    "slots": (0, 4096),
    "sent": (0.001, 1),
    "efficiency": (0.01, 1),
}
CHOICES = {"copies": ("broadcast", "direct"), "attention": ("flash", "unfused")}
WHOLE = ("ranks", "steps", "seed", "slots")


def parse(words: Sequence[str]) -> tuple[Asked, list[str]]:
    """The words of the command, and what is left: settings. Raises ConfigError for a value that cannot be."""
    given: dict[str, Any] = {}
    settings = []
    for word in words:
        name, equals, value = word.partition("=")
        if name not in Asked.__dataclass_fields__ or not equals:
            settings.append(word)
        elif name in given:
            raise ConfigError(f"{name}= is there twice")
        elif name in RANGES:
            given[name] = _number(name, value)
        elif name == "systems":
            given[name] = _systems(value)
        elif name in CHOICES and value not in CHOICES[name]:
            raise ConfigError(f"{name} takes {' or '.join(CHOICES[name])}; got '{value}'")
        else:
            given[name] = value
    for name in ("cluster", "ranks"):
        if name not in given:
            raise ConfigError(f"simulate needs {name}=; see 'moetrain simulate --help'")
    return Asked(**given), settings


def _number(name: str, text: str) -> float | int:
    least, most = RANGES[name]
    kind = int if name in WHOLE else float
    try:
        value = kind(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        what = "a whole number" if name in WHOLE else "a number"
        raise ConfigError(f"{name} takes {what} from {least:g} to {most:g}; got '{text}'")
    return value


def _systems(text: str) -> tuple[str, ...]:
    asked = text.split(",")
    for name in asked:
        if name not in SYSTEMS:
            raise ConfigError(f"systems: there is no '{name}'; {nearest(name, list(SYSTEMS))}")
    return tuple(name for name in SYSTEMS if name in asked)


@dataclass(frozen=True)
class Replayed:
    """trace: what was replayed. budget: experts that travel unseen behind the dense part of a layer."""

    asked: Asked
    model: Model
    trace: Trace
    budget: int
    figures: dict[str, Figures]


def simulate(asked: Asked, cfg: Config) -> Replayed:
    """Replay all that is asked. Raises ConfigError where model, trace and ranks do not fit."""
    cluster = load_cluster(asked.cluster)
    model = model_of(cfg, asked.attention == "unfused")
    if model.experts % asked.ranks:
        raise ConfigError(
            f"model.moe.num_experts={model.experts} experts cannot be split evenly over ranks={asked.ranks}; "
            "make ranks a divisor of num_experts"
        )
    trace = trace_of(asked, model)
    precision = "bf16" if cfg.train.precision == "bf16" else "float32"
    clock = Clock(cluster, asked.ranks, precision, asked.efficiency)
    first = model.layers[0]
    budget = overlap_degree(dense_seconds(first, clock), clock.domain_rate, first.expert_bytes)
    figures = {
        system.name: replay(trace, model, system, clock)
        for system in systems(asked, model, clock, budget)
        if system.name in asked.systems
    }
    return Replayed(asked, model, trace, budget, figures)


def systems(asked: Asked, model: Model, clock: Clock, budget: int) -> list[System]:
    """All systems. What has no slot, or no budget, is plain expert parallelism.

    shadow is FasterMoE's: its copies are waited for, and a shadow must save the busiest rank more rows than could be
    computed in the time that it takes.
    """
    first, ranks, direct = model.layers[0], asked.ranks, asked.copies == "direct"
    node = min(clock.cluster.domain, ranks)
    slots = asked.slots if budget else 0
    sparse = {"kind": "fssdp", "slots": slots, "budget": max(budget, 1), "node_size": node}
    everywhere = (tuple(range(ranks)),)
    one = (clock.direct if direct else clock.broadcast)((0,), everywhere, first.expert_bytes)
    row_s = clock.compute(6.0 * first.expert) + 4 * first.row_bytes / clock.domain_rate
    shadow = {"kind": "shadow", "slots": asked.slots, "cost_rows": 2 * one / row_s}
    return [
        System("ep"),
        System("fssdp", sparse, direct=direct),
        System("fssdp-rm", sparse | {"rematerialise": True}, direct=direct),
        System("lsh", sent=asked.sent),
        System("shadow", shadow, hidden=False, direct=direct),
        System("static", {"kind": "static", "copies": min(2, ranks), "node_size": node}, direct=direct),
        System("migrate", {"kind": "migrate", "every": 50}),
    ]


def trace_of(asked: Asked, model: Model) -> Trace:
    """The trace to replay, on ``asked.ranks`` ranks with the rows of ``model``. Raises ConfigError where a recorded one
    is of other layers or experts."""
    L, E, rows = len(model.layers), model.experts, model.tokens * model.top_k
    if asked.trace is None:
        return synthetic(asked.steps, L, asked.ranks, E, rows, asked.skew, asked.seed)
    found = read_trace(Path(asked.trace))
    shape = found.counts_SLRE.shape
    if shape[3] != E:
        raise ConfigError(
            f"trace={asked.trace} is of {shape[3]} experts, the model has {E}; set model.moe.num_experts={shape[3]}, "
            "or record another trace"
        )
    if shape[1] < L:
        raise ConfigError(f"trace={asked.trace} has {shape[1]} MoE layers, the model {L}; set model.n_layers")
    n = asked.steps
    return Trace(found.steps[-n:], found.layers[:L], found.counts_SLRE[-n:, :L]).scaled(asked.ranks, rows)


def model_of(cfg: Config, unfused: bool = False) -> Model:
    """What a replay needs to know of ``cfg``. unfused: attention writes its scores. Raises ConfigError for a model
    without MoE layers, or with unequal ones."""
    m, t = cfg.model, cfg.train
    layers = m.moe_layers()
    if not layers:
        raise ConfigError("the model has no MoE layer, so there is nothing to simulate; choose another model=NAME")
    kinds = {tuple(m.layer_value(name, i) for name in ("num_experts", "top_k", "expert_dim")) for i in layers}
    if len(kinds) > 1:
        raise ConfigError(
            "simulate takes models whose MoE layers are alike, not model.moe.num_experts, top_k or expert_dim of each "
            "layer's own"
        )
    ((experts, top_k, _),) = kinds
    counts, tokens, width = count_parameters(m), t.micro_batch * t.seq_len, WIDTHS[t.precision]
    expert = (counts.total - counts.active) // (len(layers) * (experts - top_k)) if experts > top_k else 0
    if not expert:
        raise ConfigError(f"model.moe.top_k={top_k} of num_experts={experts}: every token goes to all experts")
    head = 2.0 * m.vocab_size * m.dim * tokens
    dense = flops_per_token(m, t.seq_len) / 3 * tokens - head - 2.0 * expert * top_k * tokens * len(layers)
    scores = SCORES * tokens * t.seq_len * m.attention.n_heads * width * m.n_layers if unfused else 0.0
    work = Work(m.dim * width, expert, width, dense / len(layers), scores / len(layers))
    other = counts.total - expert * experts * len(layers)
    return Model([work] * len(layers), tokens, top_k, experts, other, head)


def rows(found: Replayed) -> list[dict[str, Any]]:
    """One row for each system; ``speed-up`` and ``memory`` against ep, where that was asked for too."""
    ep = found.figures.get("ep")
    table = []
    for name, f in found.figures.items():
        table.append(
            {"system": name, "step_ms": 1e3 * f.step_s, "exposed_ms": 1e3 * f.exposed_s, "rows_ms": 1e3 * f.rows_s,
             "copies_ms": 1e3 * f.copies_s, "experts_ms": 1e3 * f.experts_s, "rows_gb": f.rows_bytes / 1e9,
             "copies_gb": (f.copies_bytes + f.moved_bytes) / 1e9, "memory_gib": f.memory / 2**30,
             "speed_up": ep.step_s / f.step_s if ep else None, "memory_over_ep": f.memory / ep.memory if ep else None}
        )  # fmt: skip
    return table


def heading(found: Replayed) -> str:
    """What was replayed, in one line."""
    a, m = found.asked, found.model
    source = f"trace {a.trace}" if a.trace else f"made-up loads, skew {a.skew:g}"
    return (
        f"{a.ranks} ranks of {a.cluster}, {len(m.layers)} MoE layers of {m.experts} experts, top {m.top_k}, {m.tokens} "
        f"tokens a rank; {source}, {len(found.trace.steps)} steps, fullest expert {found.trace.skew():.2f} x the mean; "
        f"{found.budget} experts travel unseen behind a layer's dense part"
    )


def as_table(found: Replayed) -> Table:
    """For people."""
    from rich.table import Table

    table = Table(box=None)
    for i, row in enumerate(rows(found)):
        if i == 0:
            for name in row:
                table.add_column(name, justify="left" if name == "system" else "right", no_wrap=True)
        table.add_row(*("" if v is None else v if isinstance(v, str) else f"{v:.3g}" for v in row.values()))
    return table


def as_json(found: Replayed) -> dict[str, Any]:
    """For programs."""
    return {"asked": asdict(found.asked), "skew": found.trace.skew(), "budget": found.budget, "systems": rows(found)}
