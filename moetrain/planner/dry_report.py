"""What a dry run says: two tables for people, and one line of JSON for scripts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from moetrain.config.schema import Config
from moetrain.config.sizes import Sizes
from moetrain.planner.dry_run import RankFigures
from moetrain.planner.mapping import KINDS as GROUPS

MEMORY = ("weights", "gradients", "optimizer", "activations", "working", "gathered", "unreduced", "host", "total")
NOTES = (
    "weights, gradients, optimizer: own shards. activations: kept for backward, of all micro-batches under way. "
    "working: beside them, at the worst moment of one micro-batch. gathered: whole weights that FSDP holds at a time. "
    "unreduced: whole gradients that wait for the end of the step. host: what of these is in host memory. total: the "
    "rest, at most.",
    "Assumed: balanced routing, fused attention; first ranks of groups. Not counted: allocator, kernels' buffers.",
)


def as_json(cfg: Config, sizes: Sizes, figures: Sequence[RankFigures]) -> str:
    """All numbers on one line; bytes."""
    rows = []
    for f in figures:
        row: dict[str, Any] = {"pp_rank": f.pp_rank, "stages": f.stages, "layers": f.layers, "parameters": f.parameters}
        row |= {name: getattr(f, name) for name in MEMORY}
        row["collectives"] = {
            name: {kind: {"calls": sent.calls[kind], "bytes": sent.sent[kind]} for kind in sent.calls}
            for name, sent in f.traffic.items()
        }
        rows.append(row)
    whole = {
        "model": cfg.model.name,
        "world": sizes.world,
        "parameters": sum(f.parameters for f in figures),
        "micro_batches": sizes.micro_batches(cfg),
        "ranks": rows,
    }
    return json.dumps(whole)


def as_tables(cfg: Config, sizes: Sizes, figures: Sequence[RankFigures]) -> RenderableType:
    """Memory and communication per rank of each pipeline rank."""
    parameters = sum(f.parameters for f in figures)
    micro_batches = sizes.micro_batches(cfg)
    title = (
        f"{cfg.model.name}: {parameters:,} parameters on {sizes.world} rank{'s' * (sizes.world > 1)}, {micro_batches} "
        f"micro-batch{'es' * (micro_batches > 1)} a step; GiB per rank"
    )
    memory = Table(title=title, title_justify="left")
    for name in ("pp", "stages", "layers", "parameters", *MEMORY):
        memory.add_column(name, justify="right", no_wrap=True)
    for f in figures:
        numbers = [_gib(getattr(f, name)) for name in MEMORY]
        memory.add_row(str(f.pp_rank), _ranges(f.stages), _ranges(f.layers), f"{f.parameters:,}", *numbers)
    sent = Table(title="bytes that a rank sends per step, by group", title_justify="left")
    for name, justify in (("group", "left"), ("size", "right"), ("collective", "left")):
        sent.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name in ("pp", "calls", "sent"):
        sent.add_column(name, justify="right", no_wrap=True)
    for group, kind, pp_ranks, calls, size in _traffic(figures):
        sent.add_row(group, str(_size(group, sizes)), kind, _ranges(pp_ranks), f"{calls:,}", _bytes(size))
    return Group(memory, sent, *NOTES)


def _traffic(figures: Sequence[RankFigures]) -> list[tuple[str, str, list[int], int, int]]:
    """(group, kind, pipeline ranks, calls, bytes), with ranks that send the same taken together."""
    rows: dict[tuple[str, str, int, int], list[int]] = {}
    for f in figures:
        for group, sent in f.traffic.items():
            for kind, calls in sent.calls.items():
                rows.setdefault((group, kind, calls, sent.sent[kind]), []).append(f.pp_rank)
    order = sorted(rows.items(), key=lambda item: (item[0][0], item[0][1], item[1]))
    return [(group, kind, ranks, calls, size) for (group, kind, calls, size), ranks in order]


def _size(group: str, sizes: Sizes) -> int:
    if group == "world":
        return sizes.world
    along = {"data": ("dp_replicate", "dp_shard"), "sequence": ("cp", "tp")}.get(group) or GROUPS[group][0]
    size = 1
    for name in along:
        size *= getattr(sizes, name)
    return size


def _gib(n: int) -> str:
    """Bytes in GiB; of less than a tenth, two digits."""
    gib = n / 2**30
    return "0" if n == 0 else f"{gib:.2f}" if gib >= 0.1 else f"{gib:.2g}"


def _bytes(n: int) -> str:
    """Bytes as people write them: 710.28 GB, 223.59 kB, 24 B."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n} B"


def _ranges(numbers: Sequence[int]) -> str:
    """0-3, 5."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
