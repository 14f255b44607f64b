"""Pruning by usage: the experts that a text uses most stay, the others go."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from moetrain.config.fields import STRICT, Positive
from moetrain.config.registry import UPCYCLERS
from moetrain.upcycle.method import Context, Model, Upcycled, one_parent
from moetrain.upcycle.resize import check_fewer, check_resizable, experts_of, resized, with_entries
from moetrain.upcycle.watch import usage


@dataclass(config=STRICT)
class PruneOptions:
    """Pruning: the most used experts of each layer stay as they are, with their router rows."""

    num_experts: Positive = Field(default=4, description="experts of a layer that stay")
    top_k: Positive | None = Field(default=None, description="experts per token; null: as before")


@UPCYCLERS.register("prune", PruneOptions)
def prune(options: PruneOptions, parents: Sequence[Model], context: Context) -> Upcycled:
    """A model with experts -> the same with those of each layer that the calibration text chooses most often.

    Where routing weights are divided by their sum, a token whose experts all stay gets what it got before.
    """
    parent = one_parent(parents, "prune")
    check_resizable(parent, "prune")
    check_fewer(parent, options.num_experts)
    cfg = resized(parent.cfg, options.num_experts, options.top_k)
    context.ids()  # lack of text is to be said now
    used = cache(lambda: usage(parent, context, "nothing"))

    @cache
    def kept(layer: int) -> Tensor:
        return used()[layer].counts_E.argsort(descending=True, stable=True)[: options.num_experts].sort().values

    model = with_entries(parent, cfg, lambda layer, name, e: parent.entry(name, int(kept(layer)[e])))
    exact = options.num_experts == experts_of(parent.cfg) and options.top_k is None
    note = "the parent's function" if exact else "the parent's function for tokens whose experts all stay"
    return Upcycled(model, exact, note)
