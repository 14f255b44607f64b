"""Growing a model by experts that do not speak yet, after MoExtend (arXiv 2408.03511)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from moetrain.config.errors import ConfigError
from moetrain.config.fields import STRICT, NonNegative, Positive
from moetrain.config.registry import UPCYCLERS
from moetrain.convert.tensors import SELECTION_BIAS
from moetrain.upcycle.method import Context, Model, Upcycled, one_parent
from moetrain.upcycle.resize import check_resizable, experts_of, resized, with_entries
from moetrain.upcycle.watch import usage

# Scores are at most 1; a little more keeps rounding out of it.
ASLEEP = 1.001


@dataclass(config=STRICT)
class GrowOptions:
    """Growing: new experts that start as copies of much used ones, and that routers do not choose at first."""

    add: Positive = Field(default=1, description="new experts of a layer")
    copy_of: list[NonNegative] | None = Field(
        default=None, description="experts that the new ones copy, as [3,5]; null: the most used on the text"
    )


@UPCYCLERS.register("grow", GrowOptions)
def grow(options: GrowOptions, parents: Sequence[Model], context: Context) -> Upcycled:
    """A model with experts -> the same with ``add`` more in each layer.

    A router with a selection bias keeps them asleep: their bias is lower than the lowest by more than scores can make
    up for, and balancing by that bias wakes them. With sigmoid scores (DeepSeek-V3) nothing changes until then. A
    softmax over all experts has one more to share with. There, new experts get the mean of all router rows: their logit
    is the mean of all logits, less than the best, so that normalised top-1 routing does not change; for larger k a
    token changes only where its k-th best logit is below the mean.
    """
    parent = one_parent(parents, "grow")
    router = check_resizable(parent, "grow")
    E = experts_of(parent.cfg)
    asked = options.copy_of
    if asked is not None and (len(asked) != options.add or max(asked, default=0) >= E):
        raise ConfigError(f"copy_of={asked} must name add={options.add} of the experts 0 to {E - 1} of {parent.where}")
    cfg = resized(parent.cfg, E + options.add, None)
    if asked is None:
        context.ids()  # lack of text is to be said now
    used = cache(lambda: usage(parent, context, "nothing"))
    has_bias = any(name.endswith(SELECTION_BIAS) for name in parent.source.specs)
    asleep = has_bias and router.score == "sigmoid"

    @cache
    def source(layer: int) -> Tensor:
        if asked is not None:
            return torch.tensor(asked)
        most = used()[layer].counts_E.argsort(descending=True, stable=True)
        return most[torch.arange(options.add) % E]

    def entry(layer: int, name: str, e: int) -> Tensor:
        if e < E:
            return parent.entry(name, e)
        if name.endswith(SELECTION_BIAS):
            return parent.read(name).min() - ASLEEP
        if ".router." in name and not asleep:
            return parent.read(name).mean(0)
        return parent.entry(name, int(source(layer)[e - E]))

    normalised = router.renormalize or router.order == "topk_then_score" or router.score == "sigmoid"
    top_1 = cfg.layer_value("top_k", cfg.moe_layers()[0]) == 1
    exact = asleep or (normalised and top_1 and not has_bias)
    note = "the parent's function" if exact else "the parent's function where new experts are not among the best"
    return Upcycled(with_entries(parent, cfg, entry), exact, note)
