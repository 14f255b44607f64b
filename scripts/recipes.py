"""What the published recipes of Megatron-Bridge switch on, by release, model and GPU.

Read from its tags v0.2.0 (NeMo 25.11) to v0.6.0 (26.08), ``scripts/performance/configs`` and, from 26.08 on,
``src/megatron/bridge/perf_recipes``: dispatcher, overlap, scope of CUDA graphs, fused experts, attention in 8 bits and
what is computed again. Its tables of speeds do not say.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from moetrain.planner.rates import STACKS, Stack


class Recipe(NamedTuple):
    """models, gpus: by the start of a name. since, until: releases, the last not included. dispatch: "flex" (DeepEP or
    HybridEP) or "plain" (all-to-all). graphs: as in Stack. whole: the recipes of mid 2026 on Blackwell, with graphs of
    a whole iteration, overlap, one kernel for all experts and attention in 8 bits. again: share of a forward pass that
    is computed again; 0.08 is about what up-projections of MLA are, 0.03 norms and activations."""

    models: tuple[str, ...]
    gpus: tuple[str, ...]
    since: str = ""
    until: str = "99"
    narrow: bool | None = None
    dispatch: str = "flex"
    graphs: str = ""
    whole: bool = False
    again: float = 0.0


GRACE, HGX = ("gb200", "gb300"), ("b200", "b300")
DSV3, Q235, Q30, OSS, NEMOTRON = ("deepseek v3",), ("qwen3 235b",), ("qwen3 30b",), ("gpt oss",), ("nemotron",)
# The first that fits counts.
RECIPES = (
    Recipe((*DSV3, *Q235, *OSS, *Q30), GRACE, "26.06", narrow=True, whole=True),
    Recipe(Q30, ("b300",), "26.06", narrow=True, whole=True),
    Recipe(DSV3, ("b300",), "26.06", graphs="attention", again=0.08),
    Recipe(DSV3, ("gb300",), "26.02", narrow=True, again=0.08),
    Recipe(DSV3, ("gb300",), graphs="attention", again=0.03),
    Recipe(DSV3, ("gb200",), graphs="attention", again=0.08),
    Recipe(DSV3, HGX, again=0.08),
    Recipe(Q235, HGX, "26.06"),
    Recipe(Q235, HGX, "26.04", dispatch="plain"),
    Recipe(Q235, HGX, "26.02.01"),
    Recipe(Q235, HGX, dispatch="plain"),
    Recipe(Q235, GRACE, graphs="attention"),
    Recipe(Q30, ("b200",), "26.02.01", graphs="attention"),
    Recipe(Q30, ("b200",), dispatch="plain", graphs="router"),
    Recipe(Q30, (*GRACE, "b300"), graphs="router"),
    Recipe(Q30, ("h100",), narrow=True),
    Recipe(OSS, ("gb300",), graphs="attention"),
    Recipe(OSS, ("b300",), "26.04", graphs="attention"),
    Recipe(OSS, ("b300",), dispatch="plain", graphs="attention"),
    Recipe(OSS, ("b200",), "26.04", again=0.03),
    Recipe(OSS, ("b200", "h100"), dispatch="plain", again=0.03),
    Recipe(NEMOTRON, ("b200",), narrow=None, graphs="attention", again=0.03),
    Recipe(NEMOTRON, (*GRACE, "b300"), graphs="attention"),
)


def recipe(model: str, gpu: str, release: str, precision: str) -> tuple[Stack, float] | None:
    """(stack, share of forward that is computed again); None: no such recipe."""
    narrow = precision != "bf16"
    for r in RECIPES:
        fits = model.startswith(r.models) and gpu in r.gpus and r.since <= release < r.until
        if fits and r.narrow in (None, narrow):
            if r.whole:
                return STACKS["megatron-2026"], r.again
            return replace(STACKS["megatron"], once=r.dispatch == "flex", graphs=r.graphs), r.again
    return None
