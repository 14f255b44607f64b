"""How fast things go: the few constants of the time model, and what a software stack does with a machine.

``FITTED`` comes from ``scripts/fit_planner.py``, on published runs; the rest are published measurements of single
operations, named beside each.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Constants:
    """Shares are of what the cluster's file says; seconds are seconds."""

    product_16: float = 0.95  # of the best that was measured (Cluster.sustained), that a large 16-bit product reaches
    product_8: float = 0.95  # the same share in 8 bits, and in 4, over that in 16: units wait longer for operands
    grouped: float = 0.9  # of a dense product's rate, that a grouped one reaches
    attention: float = 0.8  # of the same, that fused attention reaches forward; backward 0.7 of that
    start: float = 12e-6  # until one product is under way and after it has ended: a kernel's ramp, its last wave
    passes: float = 2.0  # times that what lies between the products goes through memory, over the least possible
    fused_passes: float = 1.2  # the same where a stack fuses it (quantisation and activation into the products)
    quantise: float = 1.0  # the same of what 8-bit products need beside: 16 bits read, rows and columns written
    host: float = 20e-6  # host's time to start an operation (``step_time`` counts them) where no graph replays it
    bulk: float = 0.5  # share of tensor parallel collectives that no product hides
    hidden: float = 0.7  # share of dispatch and combine that a stack which overlaps them hides
    reduce: float = 0.5  # share of a micro-batch's time that hides the reduction of gradients and gathers of weights
    natural: float = 1.3  # rows of the fullest rank over the mean where nothing forces balance (with balance losses)
    # Not fitted. DeepEP, README and arXiv 2603.07685 (table of HybridEP): dispatch and combine reach these shares of
    # the links, NCCL's all-to-all 0.8 of them.
    link: float = 0.74
    network: float = 0.85
    plain: float = 0.8
    # SonicMoE, arXiv 2512.14080: kernels bound by memory reach 85% of its bandwidth.
    memory: float = 0.85


@dataclass(frozen=True)
class Stack:
    """What a training framework does. once: a token crosses to a rank or machine once (DeepEP, HybridEP), not for each
    of its experts. overlap: dispatch and combine run beside computation. fused: see Constants.fused_passes. graphs:
    which of a layer's operations captured CUDA graphs start: "", "router" (with what comes before dispatch),
    "attention" (both) or "all". loops: each expert's product is a kernel of its own. attention_8: attention in 8 bits
    where products are. shards: what data parallel ranks split: "all" with gathers for each micro-batch, in a pipeline
    once a step (FSDP), or "optimizer" with gathers once a step. narrow_all: 8 bits in all matrices, not the experts'
    alone. gradients: bytes of a gradient on its way. reduce_each: gradients are reduced after each micro-batch, not
    at the end of the step. fused_sinks: attention with sinks has a fused kernel, else its scores go through memory.
    """

    name: str
    once: bool = False
    overlap: bool = False
    fused: bool = False
    graphs: str = ""
    loops: bool = False
    attention_8: bool = False
    shards: str = "all"
    narrow_all: bool = True
    gradients: int = 4
    reduce_each: bool = False
    fused_sinks: bool = True


STACKS = {
    stack.name: stack
    for stack in (
        Stack("moetrain", narrow_all=False),
        Stack("megatron-2024", loops=True, shards="optimizer", fused_sinks=False),
        Stack("megatron", once=True, loops=True, shards="optimizer", fused_sinks=False),
        Stack("megatron-graphs", once=True, graphs="attention", loops=True, shards="optimizer", fused_sinks=False),
        Stack(
            "megatron-overlap",
            once=True,
            overlap=True,
            graphs="router",
            loops=True,
            shards="optimizer",
            fused_sinks=False,
        ),
        Stack("megatron-2026", once=True, overlap=True, fused=True, graphs="all", attention_8=True, shards="optimizer"),
        Stack("automodel", once=True, loops=True, reduce_each=True),
        Stack("megascale", once=True, overlap=True, shards="optimizer"),
        Stack("fsdp", loops=True, reduce_each=True),
    )
}

# By scripts/fit_planner.py; the defaults of Constants are where the fit starts, and what its prior holds to.
FITTED = Constants(
    product_16=1.0,
    product_8=0.9735,
    grouped=0.9458,
    attention=0.869,
    start=1.309e-05,
    passes=1.832,
    fused_passes=1.557,
    quantise=1.008,
    host=2.634e-05,
    bulk=0.523,
    hidden=0.8111,
    reduce=0.4442,
    natural=1.65,
)
