"""The table of mappings that must all give the loss of one process: a line each, a column for each feature.

mappings.txt was drawn by a greedy search so that every two levels of any two columns meet in some line, on as few ranks
as that takes; ``test_parity.py`` checks that they do. What cannot meet is in ``EXCLUDED``, with the reason.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

Row = dict[str, str]

# column -> level -> settings. "-" is the level without the feature.
COLUMNS: dict[str, dict[str, list[str]]] = {
    "engine": {
        "torch": [],
        "zero1": ["parallel.engine=deepspeed", "parallel.zero=1"],
        "zero2": ["parallel.engine=deepspeed", "parallel.zero=2"],
        "zero3": ["parallel.engine=deepspeed", "parallel.zero=3"],
    },
    "pp": {
        "-": [],
        "gpipe": ["parallel.pp=2", "parallel.schedule=gpipe"],
        "1f1b": ["parallel.pp=2", "parallel.schedule=1f1b"],
        "interleaved": ["parallel.pp=2", "parallel.schedule=interleaved_1f1b"],
        "zb": ["parallel.pp=2", "parallel.schedule=interleaved_zero_bubble"],
        "zbv": ["parallel.pp=2", "parallel.schedule=zbv_zero_bubble"],
        "dualpipev": ["parallel.pp=2", "parallel.schedule=dualpipev"],
    },
    "dp": {
        "-": ["parallel.dp_shard=1"],
        "shard": ["parallel.dp_shard=2"],
        "replicate": ["parallel.dp_replicate=2", "parallel.dp_shard=1"],
        "hsdp": ["parallel.dp_replicate=2", "parallel.dp_shard=2"],
    },
    "cp": {
        "-": [],
        "gather": ["parallel.cp=2", "parallel.context=all_gather"],
        "ring": ["parallel.cp=2", "parallel.context=ring"],
        "heads": ["parallel.cp=2", "parallel.context=all_to_all"],
    },
    "tp": {"-": [], "2": ["parallel.tp=2"]},
    "ep": {"-": [], "2": ["parallel.ep=2"], "4": ["parallel.ep=4"]},
    "etp": {"-": [], "2": ["parallel.etp=2"]},
    "dispatch": {
        "auto": [],
        "gather": ["dispatch=all_gather"],
        "a2a": ["dispatch=all_to_all"],
        "two_step": ["dispatch=two_step", "dispatch.node_size=2"],
    },
    "overlap": {"-": [], "yes": ["experts.overlap=true"]},
    "offload": {"-": [], "optim": ["parallel.offload=optimizer"], "all": ["parallel.offload=all"]},
    "reshard": {
        "auto": [],
        "yes": ["parallel.reshard_after_forward=true", "parallel.prefetch=0"],
        "no": ["parallel.reshard_after_forward=false", "parallel.prefetch=2"],
    },
    "attention": {
        "gqa": ["model.attention.n_kv_heads=2"],
        "gqa1": ["model.attention.n_kv_heads=1"],  # fewer than tp: a copy on each rank
        "mla": [
            "model.attention.kind=mla",
            "model.attention.qk_norm=none",
            "model.attention.q_lora_rank=12",
            "model.attention.kv_lora_rank=12",
            "model.attention.qk_nope_head_dim=8",
            "model.attention.qk_rope_head_dim=4",
            "model.attention.v_head_dim=8",
            "model.rope.interleaved=true",
        ],
        # attention experts, with their own keys and values, and with the same ones
        "bam": ["model.attention.n_kv_heads=4", "model.attention.num_experts=2"],
        "bam1": [
            "model.attention.n_kv_heads=1",
            "model.attention.num_experts=2",
            "model.attention.shared_kv=true",
        ],
    },
    "block": {"-": [], "parallel": ["model.parallel_block=true"]},
    "shared": {"-": ["model.moe.shared_dim=0"], "yes": ["model.moe.shared_dim=16", "model.moe.shared_gate=true"]},
    "experts": {
        "coarse": [],
        "fine": ["model.moe.num_experts=16", "model.moe.top_k=4", "model.moe.expert_dim=8"],
    },
    "router": {
        "step": ["model/router=softmax_topk", "balance=[aux_loss,z_loss]", "balance.aux_loss.scope=step"],
        "sequence": ["model/router=softmax_topk", "balance=[aux_loss]", "balance.aux_loss.scope=sequence"],
        "bias": [
            "model/router=sigmoid_group",
            "model.router.n_groups=4",
            "model.router.topk_groups=2",
            "balance=[bias]",
            "balance.bias.rate=0.01",
        ],
    },
    "micro": {"1": [], "4": []},  # micro-batches of a step: see ``overrides``
    "documents": {
        "-": [],
        "yes": ["data.document_mask=true"],
        "packed": ["data.document_mask=true", "data.packing=best_fit"],
    },
    "recompute": {"-": [], "selective": ["train.recompute=selective"], "full": ["train.recompute=full"]},
    "tied": {"-": [], "yes": ["model.tie_embeddings=true"]},
    "optim": {"adamw": [], "muon": ["optim=muon"]},
    # copies on some ranks, homes that move every seven steps
    "placement": {
        "-": [],
        "fssdp": [
            "experts/placement=fssdp",
            "experts.placement.slots=1",
            "experts.placement.budget=3",
            "experts.placement.node_size=2",
            "experts.placement.reshard_every=7",
        ],
    },
}
MODEL = ("attention", "block", "shared", "experts", "router", "documents", "tied", "optim")

DEEPSPEED = "DeepSpeed's ZeRO does not do it, and moetrain refuses it"
FEW = "the schedule runs at least as many micro-batches as it has stages"
PLACED = "experts that move are whole, on the device, each with one owner, and not in a pipeline"
ZERO = ("zero1", "zero2", "zero3")

# pairs of (column, level) that cannot meet -> why. The config checks refuse them all.
EXCLUDED: dict[tuple[tuple[str, str], tuple[str, str]], str] = {
    **{(("engine", z), ("pp", s)): DEEPSPEED for z in ZERO for s in COLUMNS["pp"] if s != "-"},
    **{(("engine", z), ("cp", c)): DEEPSPEED for z in ZERO for c in COLUMNS["cp"] if c != "-"},
    **{(("engine", z), ("dp", d)): DEEPSPEED for z in ZERO for d in ("replicate", "hsdp")},
    **{(("engine", z), ("reshard", r)): DEEPSPEED for z in ZERO for r in ("yes", "no")},
    **{(("engine", z), (c, "2")): DEEPSPEED for z in ZERO for c in ("tp", "etp")},
    **{(("engine", z), ("optim", "muon")): DEEPSPEED for z in ZERO},
    **{(("engine", z), ("offload", "all")): DEEPSPEED for z in ("zero1", "zero2")},
    **{(("pp", s), ("micro", "1")): FEW for s in ("1f1b", "dualpipev")},
    **{(("engine", z), ("placement", "fssdp")): PLACED for z in ZERO},
    **{(("pp", s), ("placement", "fssdp")): PLACED for s in COLUMNS["pp"] if s != "-"},
    **{(("dispatch", d), ("placement", "fssdp")): PLACED for d in ("gather", "two_step")},
    (("etp", "2"), ("placement", "fssdp")): PLACED,
    (("offload", "all"), ("placement", "fssdp")): PLACED,
}
# a level that is another one and more: where it meets a level, the other has met it
INCLUDES = {("documents", "packed"): ("documents", "yes")}
# pairs that could meet on more data ranks than the table has
ELSEWHERE = {(("engine", z), ("ep", "4")): "test_deepspeed.py, zero 3 on 4 data ranks" for z in ZERO}
ELSEWHERE[("ep", "-"), ("placement", "fssdp")] = "test_placement.py: one rank alone has nothing to place"


def table() -> list[Row]:
    """The lines of mappings.txt."""
    lines = Path(__file__).with_suffix(".txt").read_text().splitlines()
    names = lines[0].split()
    assert names == list(COLUMNS)
    return [dict(zip(names, line.split(), strict=True)) for line in lines[1:]]


def data_ranks(row: Row) -> int:
    """Shares of the batch."""
    return {"-": 1, "shard": 2, "replicate": 2, "hsdp": 4}[row["dp"]]


def world(row: Row) -> int:
    """Ranks of a line."""
    return math.prod([data_ranks(row), *(2 for name in ("pp", "cp", "tp") if row[name] != "-")])


def overrides(row: Row) -> list[str]:
    """The settings of a line."""
    batch = global_batch(row)
    settings = itertools.chain.from_iterable(COLUMNS[name][row[name]] for name in row)
    return [
        *settings,
        *layers(row),
        batch,
        f"train.micro_batch={int(batch.split('=')[1]) // data_ranks(row) // int(row['micro'])}",
    ]


def model_of(row: Row) -> tuple[str, ...]:
    """The settings of a line that the one-process run has as well."""
    return (*itertools.chain.from_iterable(COLUMNS[name][row[name]] for name in MODEL), *layers(row), global_batch(row))


TWO_STAGES = ("interleaved", "zb", "zbv", "dualpipev")  # on a rank


def layers(row: Row) -> list[str]:
    """One dense layer and one MoE layer; for schedules with two stages on a rank, three of these."""
    return [f"model.n_layers={4 if row['pp'] in TWO_STAGES else 2}"]


def global_batch(row: Row) -> str:
    """Sequences of a step: enough for 4 micro-batches on each data rank."""
    return f"train.global_batch={max(8, 4 * data_ranks(row))}"


def name_of(row: Row) -> str:
    """What a line turns on, for the test's name."""
    first = {name: next(iter(levels)) for name, levels in COLUMNS.items()}
    return f"{world(row)} " + " ".join(f"{name}:{level}" for name, level in row.items() if level != first[name])


def pairs(row: Row) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """All pairs of levels that meet in a line."""
    return itertools.combinations([INCLUDES.get(level, level) for level in row.items()], 2)
