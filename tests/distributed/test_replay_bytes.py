"""The simulator's bytes are those that a training run moves over gloo, from the trace which that run recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from moetrain_launch.fork import run_ranks

from moetrain import config
from moetrain.config.check import resolve_sizes
from moetrain.planner.cluster import load_cluster
from moetrain.planner.replay import System, replay
from moetrain.planner.replay_report import model_of
from moetrain.planner.replay_time import Clock
from moetrain.planner.trace import read_trace
from moetrain.train.trainer import Trainer
from tests.distributed.moe_ranks import Sent, watching
from tests.distributed.toy_run import load

WORLD, STEPS, D = 4, 7, 24
RUN = [
    f"train.steps={STEPS}", "train.micro_batch=2", "parallel.ep=4", "train.trace=true", "checkpoint.at_end=false",
    "model.router.kind=topk",
]  # fmt: skip


def work(cfg: config.Config) -> list[Sent]:
    """A run; what this rank sent in its training steps, evaluation left out."""
    run_dir = Path(cfg.run_dir)
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    trainer = Trainer(cfg, resolve_sizes(cfg.parallel, dist.get_world_size()), run_dir)
    train_step, found = trainer.train_step, []

    def watched() -> dict[str, Any]:
        with watching() as sent:
            figures = train_step()
        found.extend(sent)
        return figures

    trainer.train_step = watched  # type: ignore[method-assign]
    trainer.fit()
    return found


def trained(folder: Path, name: str, *words: str) -> tuple[config.Config, list[list[Sent]]]:
    cfg = load(folder, [*RUN, f"run_dir={folder / name}", *words])
    return cfg, run_ranks(WORLD, work, cfg, timeout=200)


def moved(sent: list[list[Sent]]) -> int:
    """Bytes of rows and weights to other ranks."""
    return sum(
        n for rank, of_rank in enumerate(sent) for s in of_rank if s.dtype != "int64"
        for to, n in s.bytes_to.items() if to != rank
    )  # fmt: skip


@pytest.mark.parametrize(
    "policy",
    [
        {"kind": "ep"},
        {"kind": "fssdp", "slots": 2, "budget": 3, "node_size": 2, "reshard_every": 3},
        {"kind": "fssdp", "slots": 3, "budget": 1, "node_size": 2, "calibrate": True, "rematerialise": True},
        {"kind": "static", "copies": 2, "node_size": 2},
        {"kind": "shadow", "slots": 2, "cost_rows": 5.0},
        {"kind": "migrate", "every": 2},
    ],
    ids=lambda policy: policy["kind"] + ("-rm" if "rematerialise" in policy else ""),
)
def test_bytes_are_those_of_a_run(prepared: Path, policy: dict[str, Any]) -> None:
    """7 steps of 4 ranks. AdamW's two moments move with an expert that changes its home, in float32: 12 bytes of a
    weight with it; the simulator counts 16, as a step may leave a gradient or a master copy behind."""
    words = [f"experts.placement.{key}={value}" for key, value in policy.items()]
    cfg, sent = trained(prepared, "bytes-" + "-".join(map(str, policy.values())), *words)
    trace = read_trace(Path(cfg.run_dir))
    assert trace.steps == list(range(1, STEPS + 1)) and trace.layers == [1, 2, 3]
    loads = [json.loads(line)["counts"] for line in (Path(cfg.run_dir) / "loads.jsonl").read_text().splitlines()]
    summed = trace.counts_SLRE.sum(2)
    assert [[step[f"layers.{i}.moe"] for i in trace.layers] for step in loads] == summed.tolist()
    model = model_of(cfg)
    clock = Clock(load_cluster("h100"), WORLD, "float32", 0.5)
    f = replay(trace, model, System("x", policy), clock, warm_up=0)
    counted = f.rows_bytes + f.copies_bytes + f.moved_bytes * 12 / 16
    assert round(STEPS * counted) == moved(sent)
    if policy["kind"] in ("fssdp", "static"):
        assert f.copies_bytes > 0
    if policy.get("reshard_every") or policy["kind"] == "migrate":
        assert f.moved_bytes > 0


def test_what_lsh_logs_is_what_travels(prepared: Path) -> None:
    """Rows sent, the own rank's included: there and back, and their gradients, as ``lsh_sent_share`` says."""
    cfg, sent = trained(prepared, "bytes-lsh", "dispatch=lsh", "dispatch.hashes=2", "log.every=1")
    rows = [s.bytes_to for of_rank in sent for s in of_rank if s.dtype != "int64"]
    total = sum(sum(to.values()) for to in rows) / (4 * D * 4)
    lines = [json.loads(line) for line in (Path(cfg.run_dir) / "metrics.jsonl").read_text().splitlines()]
    assigned = 8 * 16 * 2  # of a layer and step
    logged = sum(share * assigned for line in lines for share in line["lsh_sent_share_by_layer"])
    assert total == pytest.approx(logged, rel=1e-9) and 0 < logged < len(lines) * 3 * assigned
    for line in lines:
        assert line["lsh_sent_share"] == pytest.approx(sum(line["lsh_sent_share_by_layer"]) / 3)
        assert all(0 < error < 1 for error in line["lsh_error_by_layer"])
