"""Many mappings at once, as columns of numbers, so that thousands are priced by one formula. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrain.config.check_placement import placement_kind
from moetrain.config.errors import ConfigError
from moetrain.config.registry import DISPATCHERS
from moetrain.config.schema import Config
from moetrain.config.sizes import Sizes, resolve_sizes

Numbers = NDArray[Any]

SCHEDULES = ("1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble", "dualpipev", "gpipe")
RECOMPUTE = ("none", "selective", "full")
OFFLOAD = ("none", "optimizer", "all")
DISPATCH = ("local", "all_to_all", "all_gather", "two_step", "lsh")  # lsh changes the function: it is never searched
PLACEMENT = ("ep", "fssdp")
PRECISION = ("float32", "bf16", "fp8", "fp4")  # fp8: products of the experts (moetrain), or of all matrices (a stack's)
CONTEXT = ("all_gather", "ring", "all_to_all")


@dataclass(frozen=True)
class Mappings:
    """Columns of equal length n. schedule, recompute, offload, dispatch, placement, precision, context: places in the
    tuples above. vpp: stages on a rank. dp: ranks that shard, rep: copies of the whole."""

    pp: Numbers
    vpp: Numbers
    rep: Numbers
    dp: Numbers
    cp: Numbers
    tp: Numbers
    edp: Numbers
    ep: Numbers
    etp: Numbers
    micro_batch: Numbers
    schedule: Numbers
    recompute: Numbers
    offload: Numbers
    dispatch: Numbers
    placement: Numbers
    precision: Numbers
    context: Numbers

    def __len__(self) -> int:
        return len(self.pp)

    @property
    def world(self) -> Numbers:
        """Ranks."""
        return self.pp * self.rep * self.dp * self.cp * self.tp

    @property
    def data(self) -> Numbers:
        """Shares of the global batch."""
        return self.rep * self.dp

    def tokens(self, seq_len: int) -> Numbers:
        """Tokens of one micro-batch on one rank, between blocks."""
        return self.micro_batch * seq_len / (self.cp * self.tp)

    def micro_batches(self, global_batch: int) -> Numbers:
        """Micro-batches of a step."""
        return np.maximum(1, global_batch // (self.micro_batch * self.data))

    def and_also(self, other: Mappings) -> Mappings:
        """These, then ``other``."""
        names = [f.name for f in dataclasses.fields(self)]
        return Mappings(**{name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in names})

    def take(self, where: Any) -> Mappings:
        """Those at the places, or with true, in ``where``; in int64, for bytes are made of their products."""
        columns = {f.name: getattr(self, f.name)[where] for f in dataclasses.fields(self)}
        return Mappings(**{name: column.astype(np.int64) for name, column in columns.items()})

    def row(self, i: int) -> dict[str, Any]:
        """One mapping, in words and numbers."""
        numbers: dict[str, Any] = {f.name: int(getattr(self, f.name)[i]) for f in dataclasses.fields(self)}
        for name, words in WORDS.items():
            numbers[name] = words[numbers[name]]
        return numbers

    def rows(self) -> Iterator[dict[str, Any]]:
        """All of them."""
        return (self.row(i) for i in range(len(self)))


WORDS: dict[str, tuple[str, ...]] = {
    "schedule": SCHEDULES,
    "recompute": RECOMPUTE,
    "offload": OFFLOAD,
    "dispatch": DISPATCH,
    "placement": PLACEMENT,
    "precision": PRECISION,
    "context": CONTEXT,
}


def columns(rows: Sequence[dict[str, Any]]) -> Mappings:
    """Mappings of ``rows`` like those of ``Mappings.row``; what is left out is 1, or the first word."""
    made: dict[str, Numbers] = {}
    for f in dataclasses.fields(Mappings):
        words = WORDS.get(f.name)
        default = words[0] if words else 1
        values = [row.get(f.name, default) for row in rows]
        made[f.name] = np.array([words.index(v) for v in values] if words else values, dtype=np.int64)
    return Mappings(**made)


def of_config(cfg: Config, world: int) -> Mappings:
    """The one mapping of ``cfg``."""
    sizes = resolve_sizes(cfg.parallel, world)
    return columns([row_of(cfg, sizes)])


def row_of(cfg: Config, sizes: Sizes) -> dict[str, Any]:
    """``cfg`` as a row. Raises ConfigError for a placement of experts that is not planned."""
    is_plain = isinstance(cfg.dispatch, dict)
    kind = cfg.dispatch.get("kind", "auto") if is_plain else DISPATCHERS.entry_of(cfg.dispatch).name
    auto = "local" if sizes.ep == 1 else "all_to_all"
    placement = "ep" if sizes.ep == 1 else placement_of(cfg)  # one rank has all
    kind = {"auto": auto, "deep_ep": "two_step"}.get(kind, kind)
    return {
        "pp": sizes.pp, "vpp": sizes.stages_per_rank, "rep": sizes.dp_replicate, "dp": sizes.dp_shard, "cp": sizes.cp,
        "tp": sizes.tp, "edp": sizes.edp, "ep": sizes.ep, "etp": sizes.etp, "micro_batch": cfg.train.micro_batch,
        "schedule": cfg.parallel.schedule, "recompute": cfg.train.recompute, "offload": cfg.parallel.offload,
        "dispatch": kind, "placement": placement, "precision": precision_of(cfg), "context": cfg.parallel.context,
    }  # fmt: skip


def placement_of(cfg: Config) -> str:
    """The placement of experts. Raises ConfigError for one that is not planned."""
    kind = placement_kind(cfg)
    if kind not in PLACEMENT:
        raise ConfigError(
            f"experts/placement={kind} cannot be planned: choose {' or '.join(PLACEMENT)}, or take it out; "
            "'moetrain simulate' compares all placements"
        )
    return kind


def precision_of(cfg: Config) -> str:
    """The precision of the experts' products."""
    if cfg.experts.fp8:
        return "fp8"
    return "bf16" if cfg.train.precision == "bf16" else "float32"
