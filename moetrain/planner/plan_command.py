"""``moetrain plan``: search, or explain one mapping; calibrate and check are beside it."""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from moetrain.config.check import check_mapping
from moetrain.config.errors import ConfigError
from moetrain.config.schema import Config
from moetrain.moe.dispatch.lsh import LshOptions
from moetrain.planner import plan_report
from moetrain.planner.candidates import columns, placement_of, row_of
from moetrain.planner.cluster import Cluster, load_cluster
from moetrain.planner.loads import SENT, Load, read_trace, zipf
from moetrain.planner.placed import fssdp_options
from moetrain.planner.plan_emit import check_emit, emit
from moetrain.planner.plan_picture import check_picture, draw
from moetrain.planner.plan_words import Asked, parse
from moetrain.planner.rates import STACKS
from moetrain.planner.search import (
    Found,
    Plan,
    Problem,
    check_problem,
    description,
    gpus_that_fit,
    priced,
    refined,
    search,
)

TOKENS = 4_194_304  # of a step, where global_batch is not given
# Settings that a search decides -> their names in mapping=
SEARCHED = {f"parallel.{name}": name for name in ("pp", "dp_replicate", "cp", "tp", "ep", "etp", "schedule", "offload",
            "context")} | {"parallel.stages_per_rank": "vpp", "train.recompute": "recompute"}  # fmt: skip
Loader = Callable[..., Config]


def problem(asked: Asked, load: Loader, config_dirs: Sequence[str]) -> Problem:
    """What ``asked`` asks. load: ``config.load``. Raises ConfigError."""
    cluster = load_cluster(asked.cluster)
    given = {word.lstrip("+").partition("=")[0] for word in asked.others}
    refuse_decided(asked, given)
    seq = asked.seq or 4096
    batch = asked.global_batch or max(1, TOKENS // seq)
    words = list(asked.others)
    if asked.seq or "train.seq_len" not in given:
        words.append(f"train.seq_len={seq}")
    if asked.global_batch or "train.global_batch" not in given:
        words.append(f"train.global_batch={batch}")
    if "train.precision" not in given:
        words.append(f"train.precision={'bf16' if cluster.kind == 'gpu' else 'float32'}")
    cfg = load([*words, "train.micro_batch=1"], config_dirs=config_dirs)
    p = Problem(
        cfg, cluster, asked.gpus, STACKS[asked.stack], _load(asked, cfg), _precisions(asked, cfg, cluster),
        _sent(asked, cfg),
    )  # fmt: skip
    check_placed(p, placement_of(cfg))
    return p


def refuse_decided(asked: Asked, given: Collection[str]) -> None:
    """Raise ConfigError for settings in ``given`` that would not count: a search decides them, or a word of the plan
    says the same."""
    decided = SEARCHED if asked.mapping is None else {}
    for name, word in ({"train.micro_batch": "micro_batch"} | decided).items():
        if name in given:
            why = "is searched" if asked.mapping is None else "is a word of mapping="
            raise ConfigError(f"{name} {why}; take it out, or explain one mapping with it: mapping={word}=...")
    for word, name in (("seq", "train.seq_len"), ("global_batch", "train.global_batch")):
        if getattr(asked, word) and name in given:
            raise ConfigError(f"{word}= and {name} say the same; give one of them")


def refuse_no_fp8(cluster: Cluster) -> None:
    """Raise ConfigError where GPUs have no units for FP8."""
    if cluster.kind == "gpu" and "fp8" not in cluster.tflops:
        raise ConfigError(f"precision=fp8: GPUs of {cluster.name} have no FP8 (no fp8 in its tflops); take it out")


def _precisions(asked: Asked, cfg: Config, cluster: Any) -> tuple[str, ...]:
    base = "bf16" if cfg.train.precision == "bf16" else "float32"
    if asked.precision == "fp8" and base != "bf16":
        raise ConfigError("precision=fp8 is of the experts' products beside train.precision=bf16; set that too")
    if asked.precision is not None and asked.precision not in (base, "fp8"):
        raise ConfigError(f"precision={asked.precision} contradicts train.precision={cfg.train.precision}")
    if asked.precision == "fp8":
        refuse_no_fp8(cluster)
    if asked.precision is not None:
        return (asked.precision,)
    return ("bf16", "fp8") if base == "bf16" and "fp8" in cluster.tflops else (base,)


def _load(asked: Asked, cfg: Config) -> Load | None:
    if (asked.trace or asked.zipf is not None) and not cfg.model.moe_layers():
        raise ConfigError(f"model {cfg.model.name} has no MoE layer, so there are no loads; take out trace= and zipf=")
    if asked.trace is not None:
        return read_trace(asked.trace, cfg.model)
    return None if asked.zipf is None else zipf(cfg.model, asked.zipf)


def _sent(asked: Asked, cfg: Config) -> float:
    """What dispatch=lsh sends. Raises ConfigError where it would be searched, or nothing says how much it sends."""
    options = cfg.dispatch if isinstance(cfg.dispatch, LshOptions) else None
    word = None if asked.mapping is None else asked.mapping.get("dispatch", "lsh" if options else None)
    if options is not None and asked.mapping is None:
        raise ConfigError(
            "dispatch=lsh changes what the model computes, so it is no choice of a search; take it out, or price one "
            "mapping with it: mapping=...,dispatch=lsh"
        )
    if asked.sent is not None and word != "lsh":
        raise ConfigError("sent= says what dispatch=lsh sends; give it with mapping=...,dispatch=lsh")
    if asked.sent is None and options is not None and word == "lsh" and options != LshOptions():
        raise ConfigError(
            f"dispatch=lsh is known to send {SENT} of the rows with its preset alone; give sent=, the lsh_sent_share "
            "of a run's metrics with these settings"
        )
    return SENT if asked.sent is None else asked.sent


def run(
    words: Sequence[str], load: Loader, config_dirs: Sequence[str], console: Console, as_json: bool,
    plot: Path | None, emitted: str | None,
) -> None:  # fmt: skip
    """Plan what ``words`` ask and print it."""
    asked = parse(words)
    file = None if emitted is None else check_emit(emitted, config_dirs, asked.others)
    if plot is not None:
        check_picture(plot)
    p = problem(asked, load, config_dirs)
    if asked.mapping is not None:
        plan = explain(p, asked.mapping)
        found = Found([plan], 1, int(plan.total <= p.capacity))
    else:
        found = search(p, asked.top)
    if not found.best:
        raise ConfigError(_too_large(p, found.nearest))
    if as_json:
        print(json.dumps(plan_report.as_json(p, found, asked.tokens)))
    else:
        if asked.mapping is None:
            console.print(plan_report.best_table(p, found, asked.tokens))
        console.print(plan_report.plan_tables(p, found.best[0]))
        over = found.best[0].total - p.capacity
        if over > 0:
            console.print(f"This mapping does not fit: it lacks {over / 2**30:.1f} GiB on its fullest rank.")
    if plot is not None and found.frontier:
        draw(plot, p, found)
    if file is not None:
        emit(file, p, found.best[0], asked.others, asked.tokens)
        if not as_json:
            where = f" --config-dir {shlex.quote(config_dirs[0])}" if config_dirs else ""
            console.print(f"wrote {file}; {_command(p, where, file.stem)}", soft_wrap=True)


def _command(p: Problem, where: str, name: str) -> str:
    """What starts the preset ``name``, which counts all ranks: on several machines they are so many on each."""
    nodes, rest = divmod(p.world, p.cluster.node)
    if nodes < 2 or rest:
        return f"moetrain train{where} experiment={name}"
    return f"moetrain launch{where} experiment={name} launch.nodes={nodes} launch.ranks={p.cluster.node}"


def explain(p: Problem, mapping: dict[str, Any]) -> Plan:
    """The one mapping that ``mapping`` says; what it leaves out is 1, or as the config has it. Raises ConfigError where
    'moetrain train' would refuse it."""
    check_problem(p)
    cfg = copy.deepcopy(p.cfg)
    sizes = {"pp", "dp_replicate", "cp", "tp", "ep", "etp"}
    for name, value in mapping.items():
        if name in sizes or name in ("schedule", "offload", "context"):
            setattr(cfg.parallel, name, value)
        elif name == "vpp":
            cfg.parallel.stages_per_rank = value
        elif name in ("micro_batch", "recompute"):
            setattr(cfg.train, name, value)
        elif name == "dispatch":
            cfg.dispatch = {"kind": value}
        elif name == "placement" and value != placement_of(cfg):
            node = {"node_size": p.cluster.domain} if value == "fssdp" else {}
            cfg.experts.placement = {"kind": value, **node}
    if cfg.parallel.pp > 1 and mapping.get("vpp", 1) > 1 and "schedule" not in mapping:
        cfg.parallel.schedule = "interleaved_1f1b"
    found = row_of(cfg, check_mapping(cfg, p.world))
    found |= {name: mapping[name] for name in ("precision", "dispatch") if name in mapping}
    if found["precision"] == "fp8":
        refuse_no_fp8(p.cluster)
    if mapping.get("placement", found["placement"]) != found["placement"]:
        raise ConfigError(f"placement={mapping['placement']}: one rank has all experts, so there is nothing to place")
    check_placed(p, found["placement"])
    return refined(replace(p, cfg=cfg), priced(replace(p, cfg=cfg), columns([found])))


def check_placed(p: Problem, placement: str) -> None:
    """Raise ConfigError where copies of experts have nothing to follow, or settings that cannot be planned."""
    if placement == "ep":
        return
    fssdp_options(p.cfg, p.cluster.domain)
    if p.load is None:
        raise ConfigError(
            f"placement={placement} makes copies of hot experts, and with balanced loads none is hot; "
            "give zipf=S or trace=RUN_DIR"
        )
    if not p.places:
        raise ConfigError(
            f"placement={placement} is moetrain's, not that of stack={p.stack.name}; take one of them out"
        )


def _too_large(p: Problem, nearest: Plan | None) -> str:
    """Why nothing fits, and what would."""
    assert nearest is not None
    over = (nearest.total - p.capacity) / 2**30
    more = gpus_that_fit(p)
    state = sum(nearest.memory[name] for name in ("weights", "gradients", "optimizer")) / 2**30
    ways = [f"gpus={more}"] if more is not None else []
    ways += [f"GPUs of {nearest.total / p.capacity * p.cluster.memory_gib:.0f} GiB", "a shorter seq or a smaller model"]
    return (
        f"{p.cfg.model.name} fits under no mapping on gpus={p.world} of {p.cluster.name}: the smallest needs "
        f"{nearest.total / 2**30:.1f} GiB of {p.capacity / 2**30:.1f}, {over:.1f} too many (weights, gradients and "
        f"optimizer {state:.1f}; {description(nearest.row)}); what would: {', or '.join(ways)}"
    )
