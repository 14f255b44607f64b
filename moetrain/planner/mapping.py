"""Which rank is where in both grids, and what each group of ranks is for. No torch: it answers at once."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from moetrain.config.sizes import DENSE_GRID, EXPERT_GRID, Sizes

# Of larger worlds and lists, the terminal shows this many ranks and groups.
MOST_RANKS, MOST_GROUPS, MOST_IN_GROUP = 32, 4, 8

# Kind of group -> the sizes along which its ranks differ, and what it does.
KINDS: dict[str, tuple[tuple[str, ...], str]] = {
    "pp": (("pp",), "pass activations and their gradients from stage to stage; add up gradient norms"),
    "dp_replicate": (("dp_replicate",), "sum the gradients of whole copies of the sharded dense parameters (HSDP)"),
    "fsdp": (
        ("dp_shard", "cp"),
        "shard dense parameters, gradients and optimizer state: all-gather weights, reduce-scatter gradients",
    ),
    "cp": (("cp",), "share out the tokens of a sequence: attention exchanges keys and values, or heads"),
    "tp": (
        ("tp",),
        "split attention, dense MLPs, shared experts and vocabulary: all-gather and reduce-scatter activations",
    ),
    "edp": (("edp",), "shard each expert's parameters: all-gather weights, reduce-scatter gradients"),
    "ep": (("ep",), "share out the experts: all-to-all brings tokens to their experts and back"),
    "etp": (("etp",), "split each expert: all-gather its tokens, reduce-scatter its outputs"),
    "stage": (("edp", "ep", "etp"), "all ranks with the same layers: sum losses, expert loads and balance"),
}


@dataclass(frozen=True)
class GroupKind:
    """All groups of one kind. size: ranks in each. ranks: those of each group, in order. nodes: that a group spans."""

    name: str
    purpose: str
    size: int
    ranks: list[list[int]]
    nodes: int


def grid_of(name: str) -> tuple[str, ...]:
    """The grid that has a dimension called ``name``."""
    return DENSE_GRID if name in DENSE_GRID else EXPERT_GRID


def place(rank: int, sizes: Sizes, grid: Sequence[str]) -> dict[str, int]:
    """The coordinates of ``rank`` along the dimensions of ``grid``, which are ordered slowest first."""
    coordinates = {}
    for name in reversed(grid):
        rank, coordinates[name] = divmod(rank, getattr(sizes, name))
    return {name: coordinates[name] for name in grid}


def groups(sizes: Sizes, node: int) -> list[GroupKind]:
    """The groups of ranks of a mapping; ``node``: ranks of a machine, which are numbered one machine after another."""
    return [_kind(name, sizes, node) for name in KINDS]


def _kind(name: str, sizes: Sizes, node: int) -> GroupKind:
    along, purpose = KINDS[name]
    grid = grid_of(along[0])
    strides, stride = {}, 1
    for dimension in reversed(grid):
        strides[dimension] = stride
        stride *= getattr(sizes, dimension)

    def offsets(names: Sequence[str]) -> Iterator[int]:
        steps = [range(0, getattr(sizes, n) * strides[n], strides[n]) for n in names]
        return (sum(step) for step in itertools.product(*steps))

    members = list(offsets(along))
    others = [dimension for dimension in grid if dimension not in along]
    ranks = [[start + member for member in members] for start in offsets(others)]
    nodes = max(len({rank // node for rank in group}) for group in ranks)
    return GroupKind(name, purpose, len(members), ranks, nodes)


def as_json(sizes: Sizes, node: int, schedule: str, refused: str) -> dict[str, Any]:
    """All of a mapping. refused: why the model or the batch does not go with it, "" where they do."""
    return {
        "world": sizes.world,
        "node": node,
        "sizes": dataclasses.asdict(sizes),
        "stages_of_pp_rank": [sizes.stages_of_rank(rank, schedule) for rank in range(sizes.pp)],
        "ranks": [
            {"rank": rank, **place(rank, sizes, DENSE_GRID), **place(rank, sizes, EXPERT_GRID)}
            for rank in range(sizes.world)
        ],
        "groups": {
            kind.name: {"for": kind.purpose, "size": kind.size, "nodes": kind.nodes, "ranks": kind.ranks}
            for kind in groups(sizes, node)
        },
        "refused": refused or None,
    }


def as_tables(sizes: Sizes, node: int, schedule: str) -> RenderableType:
    """A mapping for the terminal; large worlds shortened."""
    where = Table(title=f"world {sizes.world}: attention grid | experts' grid", title_justify="left")
    for name in ("rank", "node", *DENSE_GRID, "|", *EXPERT_GRID, "stages"):
        where.add_column(name, justify="right")
    for row in _shortened(list(range(sizes.world)), MOST_RANKS):
        if row is None:
            where.add_row(*["..."] * 2)
            continue
        dense, experts = place(row, sizes, DENSE_GRID), place(row, sizes, EXPERT_GRID)
        stages = ", ".join(map(str, sizes.stages_of_rank(dense["pp"], schedule)))
        where.add_row(*map(str, [row, row // node, *dense.values(), "|", *experts.values(), stages]))
    what = Table(title=f"groups; a node has {node} ranks", title_justify="left")
    what.add_column("group", no_wrap=True)
    for name in ("size", "links"):
        what.add_column(name, justify="right", no_wrap=True)
    what.add_column("what its ranks do together")
    what.add_column("ranks")
    for kind in groups(sizes, node):
        along = " x ".join(KINDS[kind.name][0])
        name = kind.name if along == kind.name else f"{kind.name} = {along}"
        if kind.size == 1:
            what.add_row(name, "1", "-", kind.purpose, "-")
            continue
        links = "in the node" if kind.nodes == 1 else f"over {kind.nodes} nodes"
        lists = ["..." if g is None else _ranks(g) for g in _shortened(kind.ranks, MOST_GROUPS)]
        what.add_row(name, str(kind.size), links, kind.purpose, " ".join(lists))
    return Group(where, what)


def _ranks(group: Sequence[int]) -> str:
    return f"({' '.join('...' if rank is None else str(rank) for rank in _shortened(group, MOST_IN_GROUP))})"


def _shortened(items: Sequence[Any], most: int) -> list[Any]:
    """``items``, or the first of them, None for what is left out, and the last."""
    return list(items) if len(items) <= most else [*items[: most - 2], None, items[-1]]
