"""Placements of experts against plain expert parallelism: step time, bytes and the busiest rank, at equal loss.

Whole training steps of a small model on gloo processes of one thread each, float32, all placements in turns in one run.
balanced: the router is left alone. hot: a selection bias makes every token choose expert 0 first. The loss after the
last step is that of plain ep up to rounding, or the benchmark stops.

rows: of the busiest rank in a step, as a multiple of the mean (of the last step, all layers). MB: what leaves a rank in
a step, summed over ranks, counted at the collective calls: rows and their gradients, and weights of copies and theirs.
Times mean something only while every rank has a core of its own: with more ranks than cores they are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from bench_ranks import on_ranks, print_table
from bench_step import machine
from torch import Tensor

PLACEMENTS: dict[str, list[str]] = {
    "ep": [],
    "fssdp": ["experts/placement=fssdp", "experts.placement.reshard_every=4"],
    "fssdp, homes stay": ["experts/placement=fssdp", "experts.placement.reshard_every=0"],
    "fssdp, copies freed": [
        "experts/placement=fssdp",
        "experts.placement.reshard_every=4",
        "experts.placement.rematerialise=true",
    ],
    "shadow": ["experts/placement=shadow"],
    "static": ["experts/placement=static"],
    "migrate": ["experts/placement=migrate", "experts.placement.every=4"],
}
BASE = [
    "model.vocab_size=512", "model.dim=128", "model.n_layers=3", "model.dense_dim=256", "model.moe.first_dense=1",
    "model.moe.num_experts=8", "model.moe.top_k=2", "model.attention.n_heads=4",
    "model.attention.n_kv_heads=4", "model.attention.head_dim=32", "model/router=sigmoid_group", "balance=[bias]",
    "balance.bias.rate=0.0", "model.router.n_groups=1", "model.router.topk_groups=1", "train.seq_len=256",
    "train.precision=float32", "log.tensorboard=false", "log.progress=false",
]  # fmt: skip
WARM_UP = 4  # the first step is planned without loads, and homes change after the fourth
LOSS_TOLERANCE = 1e-4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench.py placement``."""
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4], help="gloo processes, each a run of its own")
    parser.add_argument("--rounds", type=int, default=6, help="timed steps of each placement")
    parser.add_argument("--expert-dim", type=int, default=512, help="width of an expert: its weights, and work per row")
    parser.add_argument("--batch", type=int, default=16, help="sequences of 256 tokens in a step: rows, and their work")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run and print; returns what goes into the JSON file."""
    if min(args.rounds, args.expert_dim) < 1 or any(n not in (2, 4, 8) for n in args.ranks):
        raise SystemExit("bench: --rounds and --expert-dim must be at least 1, and --ranks 2, 4 or 8")
    if args.batch < 1 or any(args.batch % n for n in args.ranks):
        raise SystemExit(f"bench: --batch={args.batch} must be a multiple of --ranks")
    rows = []
    for ranks in args.ranks:
        for load in ("balanced", "hot"):
            rows += table(ranks, load, args)
    print_table(rows)
    return {"command": " ".join(sys.argv), "machine": machine(), "placement": rows}


def table(ranks: int, load: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one world and one kind of load."""
    from moetrain.config import load as load_config
    from moetrain.data.prepare import prepare
    from moetrain.data.toy import toy_data
    from moetrain.train import trainer  # noqa: F401 - once, before ranks are forked

    with tempfile.TemporaryDirectory() as folder:
        cfgs = []
        for settings in PLACEMENTS.values():
            cfg = load_config([
                *BASE, *settings, f"parallel.ep={ranks}", f"train.global_batch={args.batch}",
                f"train.micro_batch={args.batch // ranks}", f"model.moe.expert_dim={args.expert_dim}",
                f"train.steps={WARM_UP + args.rounds}", f"run_dir={folder}/run",
            ])  # fmt: skip
            cfg.data = toy_data(Path(folder), cfg.data)
            cfgs.append(cfg)
        prepare(cfgs[0].data)
        answers = on_ranks(ranks, contest, cfgs, load == "hot", args.rounds)
    rows = []
    for i, name in enumerate(PLACEMENTS):
        figures = [answer[i] for answer in answers]
        base = [answer[0] for answer in answers]
        if abs(figures[0]["loss"] - base[0]["loss"]) > LOSS_TOLERANCE:
            raise SystemExit(f"bench: the loss of {name} is {figures[0]['loss']}, that of ep {base[0]['loss']}")
        computed = [f["rows"] for f in figures]
        timed = ranks <= (os.cpu_count() or 1)
        ms = 1e3 * statistics.median(max(times) for times in zip(*(f["times"] for f in figures), strict=True))
        ep_ms = 1e3 * statistics.median(max(times) for times in zip(*(f["times"] for f in base), strict=True))
        rows.append({
            "ranks": ranks, "load": load, "placement": name, "loss": round(figures[0]["loss"], 5),
            "busiest": max(computed) * ranks / sum(computed),
            "rows_MB": sum(f["rows_bytes"] for f in figures) / 1e6,
            "weights_MB": sum(f["weights_bytes"] for f in figures) / 1e6,
            "step_ms": ms if timed else "-", "against_ep": ep_ms / ms if timed else "-",
        })  # fmt: skip
    return rows


def contest(cfgs: list[Any], hot: bool, rounds: int) -> list[dict[str, Any]]:
    """On a rank: all placements step by step, in turns."""
    from moetrain.config.check import resolve_sizes
    from moetrain.moe.layer import MoELayer
    from moetrain.train import runtime
    from moetrain.train.trainer import Trainer

    runtime.quiet()
    trainers = []
    for cfg in cfgs:
        trainer = Trainer(cfg, resolve_sizes(cfg.parallel, dist.get_world_size()), Path(cfg.run_dir))
        for layer in trainer.engine.model.modules():
            if hot and isinstance(layer, MoELayer):
                layer.router.balance["bias"].bias_E[0] = 10.0  # type: ignore[union-attr,index]
        trainers.append(trainer)
    found: list[dict[str, Any]] = [{"times": []} for _ in trainers]
    for step in range(WARM_UP + rounds):
        for trainer, figures in zip(trainers, found, strict=True):
            dist.barrier()
            began = time.perf_counter()
            with counting(trainer) as sent:
                figures["loss"] = trainer.train_step()["loss"]
            if step >= WARM_UP:
                figures["times"].append(time.perf_counter() - began)
            figures |= sent
    return found


@contextlib.contextmanager
def counting(trainer: Any) -> Iterator[dict[str, int]]:
    """Bytes that leave this rank, of rows and of weights, and the rows that its experts compute."""
    original, sent = dist.all_to_all_single, {"rows_bytes": 0, "weights_bytes": 0, "rows": 0}

    def count(out: Tensor, x: Tensor, out_splits: list[int], in_splits: list[int], *, group: Any, **kw: Any) -> Any:
        row = (x[:1] if len(x) else out[:1]).numel() * x.element_size()
        away = (sum(in_splits) - in_splits[group.rank()]) * row
        # Weights travel flat, rows as rows; integers that plan them count as rows.
        flat = x.dim() == 1 and x.is_floating_point()
        sent["weights_bytes" if flat else "rows_bytes"] += away
        return original(out, x, out_splits, in_splits, group=group, **kw)

    def rows(_: Any, args: Any) -> None:
        sent["rows"] += sum(args[0].counts)

    layers = [m for m in trainer.engine.model.modules() if type(m).__name__ == "Experts"]
    hooks = [layer.register_forward_pre_hook(rows) for layer in layers]
    dist.all_to_all_single = count
    try:
        yield sent
    finally:
        dist.all_to_all_single = original
        for hook in hooks:
            hook.remove()
