"""What a placement of experts demands of the mapping. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

from moetrain.config.advice import Broken
from moetrain.config.registry import DISPATCHERS, PLACEMENTS, Registry
from moetrain.config.schema import Config
from moetrain.config.sizes import Sizes, divisors

PLAIN = {"experts.placement.kind": ["ep"]}


def placement_kind(cfg: Config) -> str:
    """The kind of ``cfg.experts.placement``."""
    return _kind(PLACEMENTS, cfg.experts.placement)


def placement(cfg: Config, sizes: Sizes) -> Iterator[Broken]:
    """Experts that move are whole, and one rank owns each."""
    if not isinstance(cfg.experts.placement, dict) and not is_dataclass(cfg.experts.placement):
        return  # no options at all, which is refused when the registries are read
    kind, p = placement_kind(cfg), cfg.parallel
    if kind == "ep":
        return
    what = f"experts.placement.kind={kind}"
    if p.engine == "deepspeed":
        yield Broken(f"{what} is for parallel.engine=torch", {"parallel.engine": ["torch"], **PLAIN})
    if sizes.pp > 1:
        yield Broken(f"{what} does not run in a pipeline, parallel.pp={sizes.pp}", {"parallel.pp": [1], **PLAIN})
    if sizes.etp > 1:
        yield Broken(f"{what} moves whole experts, not parallel.etp={sizes.etp}", {"parallel.etp": [1], **PLAIN})
    if sizes.edp > 1:
        yield Broken(
            f"{what} gives each expert to one rank, but parallel.ep={sizes.ep} shards it over edp={sizes.edp} ranks "
            "(world / pp / ep / etp)",
            {"parallel.ep": divisors(sizes.world), **PLAIN},
        )
    if p.offload == "all":
        yield Broken(
            f"{what} keeps weights on the device, not parallel.offload=all",
            {"parallel.offload": ["none", "optimizer"], **PLAIN},
        )
    dispatch = _kind(DISPATCHERS, cfg.dispatch)
    if sizes.ep > 1 and dispatch not in ("auto", "all_to_all"):
        yield Broken(
            f"{what} sends rows by all-to-all, not by dispatch.kind={dispatch}",
            {"dispatch.kind": ["auto", "all_to_all"], **PLAIN},
        )
    copies = _setting(cfg.experts.placement, "copies")
    if kind == "static" and sizes.ep > 1 and copies > sizes.ep:
        yield Broken(
            f"experts.placement.copies={copies} is more than parallel.ep={sizes.ep} ranks: a rank holds an expert once",
            {"experts.placement.copies": range(1, sizes.ep + 1)},
        )


def _kind(kinds: Registry, options: Any) -> str:
    # before the registries are read, a choice is still a mapping
    return str(options.get("kind")) if isinstance(options, dict) else kinds.entry_of(options).name


def _setting(options: Any, name: str) -> Any:
    return options.get(name, 2) if isinstance(options, dict) else getattr(options, name, 0)
