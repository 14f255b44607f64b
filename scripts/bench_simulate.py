"""The simulator beside Hecate's paper (arXiv 2502.02581): its four models on its two clusters of 32 GPUs.

Speed-up over expert parallelism, and memory over it, of fssdp and of fssdp with copies freed after forward, for loads
from even to steep. The paper says neither how uneven its loads are nor how many tokens a GPU has ("the largest batch
with which none runs out of memory"): here --tokens for each. Attention writes its scores, as Megatron-LM's did. The
paper's memory is that of weights, gradients and optimizer without embeddings (its parameter counts leave them out), and
its parameters on a GPU are 5.73 times those of expert parallelism: with GPT-MoE-S these are 14 copies in each layer.
Products reach 15% of the peak: with that about half of a step of expert parallelism is exposed communication, as
LSH-MoE (arXiv 2411.08446) measured on such clusters (45% on average).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bench_ranks import print_table
from bench_step import machine

# Table of the paper: width, layers, sequence. Top 2 of 64 experts (GShard), twice as wide inside as the model.
MODELS = {
    "GPT-MoE-S": (768, 12, 2048),
    "GPT-MoE-L": (1536, 12, 2048),
    "BERT-MoE": (1024, 12, 512),
    "BERT-MoE-Deep": (1024, 24, 512),
}
CLUSTERS = {"p3dn": "32 V100", "p4d": "32 A100"}
VOCAB = 50304
PAPER = {"p3dn": "1.34 to 1.78", "p4d": "1.26 to 1.70"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench.py simulate``."""
    parser.add_argument("--skews", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--tokens", type=int, default=16384, help="of a GPU and step")
    parser.add_argument("--slots", type=int, default=14, help="copies that a GPU has room for in each layer")
    parser.add_argument("--efficiency", type=float, default=0.15, help="share of the peak that matrix products reach")
    parser.add_argument("--steps", type=int, default=7, help="steps of the made-up loads, 5 of them to learn from")
    parser.add_argument("--trace", type=Path, help="loads of a run of 64 experts, in place of made-up ones")
    parser.add_argument("--systems", default="ep,fssdp,fssdp-rm", help="as of moetrain simulate")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Simulate all; prints a table and returns what goes into the JSON file."""
    if args.tokens % 2048 or args.tokens < 2048:
        raise SystemExit(f"bench: --tokens={args.tokens} must be a multiple of 2048, the longest sequence")
    skews = ["trace"] if args.trace else args.skews
    rows = [one(args, cluster, model, skew) for cluster in CLUSTERS for model in args.models for skew in skews]
    print_table(rows)
    return {"command": " ".join(sys.argv), "machine": machine(), "paper": PAPER, "rows": rows}


def one(args: argparse.Namespace, cluster: str, name: str, skew: float | str) -> dict[str, Any]:
    """One model on one cluster."""
    from moetrain.config import load
    from moetrain.planner.replay import STATE
    from moetrain.planner.replay_report import parse, simulate

    dim, layers, seq = MODELS[name]
    source = f"trace={args.trace}" if args.trace else f"skew={skew}"
    words = [
        *("ranks=32", f"cluster={cluster}", source, f"steps={args.steps}", f"slots={args.slots}"),
        *("attention=unfused", f"efficiency={args.efficiency}"),
        *(f"systems={args.systems}", f"model.dim={dim}", f"model.n_layers={layers}"),
        *(f"model.attention.n_heads={dim // 64}", f"model.attention.n_kv_heads={dim // 64}"),
        *("model.attention.head_dim=64", "model.attention.qk_norm=none", f"model.vocab_size={VOCAB}"),
        *("model.max_seq_len=2048", "model.moe.num_experts=64", "model.moe.top_k=2"),
        *(f"model.moe.expert_dim={2 * dim}", "model.moe.activation=gelu", f"train.seq_len={seq}"),
        *(f"train.micro_batch={args.tokens // seq}", f"train.global_batch={args.tokens // seq}"),
        "train.precision=bf16",
    ]
    asked, settings = parse(words)
    found = simulate(asked, load(settings))
    figures, tables = found.figures, 2 * VOCAB * dim * STATE
    ep = figures["ep"]

    def memory(system: str) -> float:
        return (figures[system].memory - tables) / (ep.memory - tables)

    row = {"cluster": CLUSTERS[cluster], "model": name, "skew": skew, "max/mean": found.trace.skew(),
           "t": found.budget, "ep ms": round(1e3 * ep.step_s), "ep exposed": ep.exposed_s / ep.step_s}  # fmt: skip
    row |= {system: ep.step_s / f.step_s for system, f in figures.items() if system != "ep"}
    return row | {"rows": ep.rows_s / figures["fssdp"].rows_s, "memory": memory("fssdp"), "-rm": memory("fssdp-rm")}
