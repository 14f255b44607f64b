"""Every mapping of a model on so many ranks that ``config.check_mapping`` allows, as columns.

Not all that is legal is listed: tp and etp stay inside a domain of fast links; gpipe, which holds more than 1f1b and is
no faster, is left out; copies of the whole (dp_replicate) are tried as one per domain only; dispatch=lsh is left out,
since it changes what the model computes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import fields

import numpy as np

from moetrain.config.schema import Config
from moetrain.config.sizes import divisors
from moetrain.planner.candidates import (
    CONTEXT,
    DISPATCH,
    OFFLOAD,
    PLACEMENT,
    PRECISION,
    RECOMPUTE,
    SCHEDULES,
    Mappings,
    Numbers,
)
from moetrain.planner.cluster import Cluster

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
VIRTUAL = (2, 3, 4, 6, 8)
WIDEST_CP = 64
NAMES = ("pp", "vpp", "schedule", "rep", "dp", "cp", "tp", "edp", "ep", "etp", "micro_batch", "context")


def legal_mappings(
    cfg: Config, cluster: Cluster, world: int, precisions: tuple[str, ...], fssdp: bool = False
) -> Mappings:
    """All of them; none: no column has an entry. fssdp: also with copies of hot experts, where that is legal."""
    grids = np.fromiter(itertools.chain.from_iterable(_grids(cfg, cluster, world)), np.int32).reshape(-1, len(NAMES))
    grid = dict(zip(NAMES, grids.T, strict=True))
    offload = range(len(OFFLOAD)) if cluster.kind == "gpu" else [0]
    narrow = [PRECISION.index(p) for p in precisions]
    found = []
    for name in DISPATCH[: DISPATCH.index("lsh")]:  # before all combinations are written down, of which most do not fit
        fits = grids[_dispatches(name, bool(cfg.model.moe_layers()), cluster, grid["ep"], grid["etp"])]
        choices = np.array(list(itertools.product(range(len(RECOMPUTE)), offload, narrow)), dtype=np.int8)
        n, k = len(fits), len(choices)
        columns = {name: np.repeat(column, k) for name, column in zip(NAMES, fits.T, strict=True)}
        chosen = zip(("recompute", "offload", "precision"), choices.T, strict=True)
        columns |= {name: np.tile(column, n) for name, column in chosen}
        columns |= {name: columns[name].astype(np.int8) for name in ("schedule", "context")}
        dispatch = np.full(n * k, DISPATCH.index(name), dtype=np.int8)
        found.append(Mappings(**columns, dispatch=dispatch, placement=np.zeros(n * k, dtype=np.int8)))
    m = functools.reduce(Mappings.and_also, found)
    return m.and_also(_placed(cfg, m)) if fssdp else m


def _dispatches(name: str, moe: bool, cluster: Cluster, ep: Numbers, etp: Numbers) -> Numbers:
    """Where the dispatcher ``name`` is of use."""
    there: Numbers = (ep > 1) & moe
    if name == "local":
        return ~there
    if name == "two_step":
        whole_domains = (cluster.domain % etp == 0) & (ep % np.maximum(1, cluster.domain // etp) == 0)
        return there & (ep * etp > cluster.domain) & whole_domains
    return there


def _placed(cfg: Config, m: Mappings) -> Mappings:
    """Those of ``m`` that ``check_placement`` lets have copies of experts, with them."""
    whole = (m.pp == 1) & (m.etp == 1) & (m.edp == 1) & (m.ep > 1)
    sends = (m.offload != OFFLOAD.index("all")) & (m.dispatch == DISPATCH.index("all_to_all"))
    legal = whole & sends & (cfg.parallel.engine == "torch")
    columns = {field.name: getattr(m, field.name)[legal] for field in fields(m)}
    return Mappings(**columns | {"placement": np.full(legal.sum(), PLACEMENT.index("fssdp"), dtype=np.int8)})


def _grids(cfg: Config, cluster: Cluster, world: int) -> Iterator[tuple[int, ...]]:
    """(pp, vpp, schedule, rep, dp, cp, tp, edp, ep, etp, micro_batch, context)."""
    t = cfg.train
    for pp in divisors(world):
        for schedule, vpp in _schedules(pp, cfg.model.n_layers):
            stage = world // pp
            experts = list(_expert_grids(cfg, cluster, stage))
            for tp, cp in itertools.product(divisors(stage), repeat=2):
                if stage % (tp * cp) or not _splits(cfg, cluster, tp, cp):
                    continue
                data = stage // (tp * cp)
                if t.global_batch % data:
                    continue
                batches = [b for b in MICRO_BATCHES if t.global_batch % (b * data) == 0]
                for b in batches:
                    n = t.global_batch // (b * data)
                    if not _fills(SCHEDULES[schedule], pp, vpp, n):
                        continue
                    for rep in _copies(cluster, data, tp * cp):
                        for edp, ep, etp in experts:
                            yield pp, vpp, schedule, rep, data // rep, cp, tp, edp, ep, etp, b, _context(cfg, cp, tp)


def _schedules(pp: int, layers: int) -> Iterator[tuple[int, int]]:
    if pp == 1:
        yield 0, 1
        return
    if pp <= layers:
        yield 0, 1
    for vpp in VIRTUAL:
        if pp * vpp <= layers:
            yield SCHEDULES.index("interleaved_1f1b"), vpp
            if vpp <= 4:
                yield SCHEDULES.index("interleaved_zero_bubble"), vpp
    if 2 * pp <= layers:
        yield SCHEDULES.index("zbv_zero_bubble"), 2
        yield SCHEDULES.index("dualpipev"), 2


def _fills(schedule: str, pp: int, vpp: int, n: int) -> bool:
    """``check_mapping.micro_batches``; interleaved schedules of fewer micro-batches than ranks are of no use."""
    if pp == 1:
        return True
    if schedule in ("1f1b", "dualpipev"):
        return n >= pp * vpp
    if schedule.startswith("interleaved"):
        return n >= pp and n % max(1, n // pp) == 0
    return n >= 1


def _splits(cfg: Config, cluster: Cluster, tp: int, cp: int) -> bool:
    """What tp and cp must divide, as ``check_mapping`` has it."""
    a, model, seq = cfg.model.attention, cfg.model, cfg.train.seq_len
    kv = a.n_kv_heads if a.kind == "gqa" else a.n_heads
    shared = {model.layer_value("shared_dim", i) for i in model.moe_layers()}
    widths = [model.vocab_size, *shared, *([model.dense_dim] if len(model.moe_layers()) < model.n_layers else [])]
    heads = a.n_heads % tp == 0 and (kv % tp == 0 or tp % kv == 0)
    whole = cp == 1 or (cp <= WIDEST_CP and seq % (2 * cp) == 0)
    return tp <= cluster.domain and heads and whole and (seq // cp) % tp == 0 and all(w % tp == 0 for w in widths)


def _context(cfg: Config, cp: int, tp: int) -> int:
    """Trading heads sends least; where they do not divide, keys go around."""
    heads = cfg.model.attention.n_heads
    return CONTEXT.index(
        "all_to_all" if cp > 1 and (heads // tp) % cp == 0 else "ring" if cp > 1 else cfg.parallel.context
    )


def _copies(cluster: Cluster, data: int, inner: int) -> list[int]:
    """dp_replicate: one copy, or one in each domain."""
    inside = max(1, cluster.domain // inner)
    return [1] if data <= inside or data % inside else [1, data // inside]


def _expert_grids(cfg: Config, cluster: Cluster, stage: int) -> Iterator[tuple[int, int, int]]:
    """(edp, ep, etp)."""
    model = cfg.model
    layers = model.moe_layers()
    if not layers:
        yield stage, 1, 1
        return
    counts = {model.layer_value("num_experts", i) for i in layers}
    inner = {model.layer_value("expert_dim", i) for i in layers}
    for ep in divisors(stage):
        if any(count % ep for count in counts):
            continue
        for etp in divisors(stage // ep):
            if etp > cluster.domain or any(w % etp for w in inner) or (model.moe.bias and model.dim % etp):
                continue
            edp = stage // (ep * etp)
            if all(_shards(model.dim, w, edp, etp, model.moe.bias) for w in inner):
                yield edp, ep, etp


def _shards(dim: int, width: int, edp: int, etp: int, bias: bool) -> bool:
    """``check_mapping.expert_shards``."""
    choices = [[dim, width // etp]]
    choices += [[2, width // etp], [dim // etp]] if bias else []
    return all(any(size % edp == 0 for size in sizes) for sizes in choices)
