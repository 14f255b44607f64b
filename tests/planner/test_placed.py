"""Plans with ``placement=fssdp`` and ``dispatch=lsh``: rows against training's own routes, time against the simulator,
what is searched and emitted against what a run accepts, and wrong words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moetrain.cli import main
from moetrain.config import Config, load
from moetrain.config.check import check_mapping
from moetrain.moe.placement.plan import WINDOW, Topology, ep_homes, routes
from moetrain.planner.cluster import load_cluster
from moetrain.planner.loads import Load, zipf
from moetrain.planner.placed import fssdp_options, place, rows_sent
from moetrain.planner.plan_command import explain
from moetrain.planner.replay import System, replay
from moetrain.planner.replay_report import model_of
from moetrain.planner.replay_time import Clock
from moetrain.planner.search import Problem, search
from moetrain.planner.trace import Trace

DEFAULT = {
    "slots": 2, "budget": None, "node_size": 8, "reshard_every": 100,
    "rematerialise": False, "calibrate": False, "calibrate_rows": 0.0,
}  # fmt: skip
WORDS = ["plan", "model=tiny", "cluster=h100", "gpus=4", "global_batch=16", "seq=256"]


def test_rows_are_shared_as_training_shares_them() -> None:
    """``plan.routes``, for placements of all kinds; 120 rows of an expert on a rank, so that all divide."""
    rng = np.random.default_rng(0)
    topology = Topology(6, 3)
    for _ in range(5):
        share_E = rng.integers(0, 5, 12) * 120
        placement = tuple(
            tuple(sorted({home, *rng.choice(6, rng.integers(0, 6), replace=False).tolist()}))
            for home in ep_homes(12, 6)
        )
        sent = np.array(routes([share_E.tolist()] * 6, placement, topology)).sum(2)
        assert rows_sent(share_E * 6.0, placement, topology) == pytest.approx(sent)


def test_copies_follow_the_loads_that_were_known() -> None:
    """One expert of 8 has half of all rows, on 4 ranks with one slot: everywhere it costs its share, and the other
    seven share the rest (two on most ranks). In a trace the copies are of the line before: where another expert is hot
    then, they do not help."""
    hot, other = np.full(8, 0.5 / 7), np.full(8, 0.5 / 7)
    hot[0] = other[7] = 0.5
    options = tuple((DEFAULT | {"slots": 1}).items())
    still = place(Load("still", hot[None, None], steady=True), 4, 4, options)
    assert still.rows == pytest.approx(4 * (0.5 / 4 + 2 * 0.5 / 7))
    assert (still.near, still.far) == (3, 0), "three ranks get it"
    assert 2 <= still.held <= 3, "two at home, or one and the copy"
    same, moved = (place(Load("trace", np.stack([hot, x])[:, None]), 4, 4, options) for x in (hot, other))
    assert same.rows == pytest.approx(still.rows) and moved.rows > 4 * 0.5


def problem(world: int, *words: str, power: float = 1.2) -> Problem:
    cfg = load(
        ["model=qwen3-30b-a3b", "model.n_layers=4", "model.vocab_size=2048", "train.seq_len=4096",
         f"train.global_batch={world}", "train.micro_batch=1", "train.precision=float32", *words]
    )  # fmt: skip
    return Problem(cfg, load_cluster("h100"), world, load=zipf(cfg.model, power), precisions=(cfg.train.precision,))


def simulated(p: Problem, experts_s: float) -> float:
    """Seconds that copies spare a step, by the replay of ``moetrain simulate`` of the loads of ``p``, which stand
    still, with copies sent as training sends them. experts_s: what the experts of plain expert parallelism take."""
    model = model_of(p.cfg)
    assert p.load is not None
    policy = {"kind": "fssdp", **dict(fssdp_options(p.cfg, p.cluster.domain))}
    traces = []
    for share_LE in p.load.share_NLE:
        counts_LE = np.round(share_LE * model.tokens * model.top_k).astype(np.int64)
        counts = np.broadcast_to(counts_LE[None, :, None], (WINDOW + 1, len(counts_LE), p.world, counts_LE.shape[1]))
        traces.append(Trace(list(range(WINDOW + 1)), list(range(len(counts_LE))), counts))

    def figures(system: System, clock: Clock) -> tuple[float, float]:
        found = [replay(trace, model, system, clock) for trace in traces]
        return float(np.mean([f.step_s for f in found])), float(np.mean([f.experts_s for f in found]))

    efficiency = figures(System("ep"), Clock(p.cluster, p.world, "float32", 1.0))[1] / experts_s
    clock = Clock(p.cluster, p.world, "float32", efficiency)
    return figures(System("ep"), clock)[0] - figures(System("fssdp", policy, direct=True), clock)[0]


@pytest.mark.parametrize("world", [8, 16])
def test_copies_spare_what_the_simulator_says(world: int) -> None:
    """In a node and in two, under a steep law, in float32, where weights travel as wide as the simulator has them. It
    is told the rate of the experts, which the plan makes of more than products, from plain expert parallelism. Within
    10%: the plan takes 0.85 of the network, the simulator 0.8, and the plan adds half a tile for each expert."""
    p = problem(world)
    assert p.load is not None
    p = replace(p, load=Load("four draws", p.load.share_NLE[:4], steady=True))
    ep, fssdp = (explain(p, {"ep": world, "placement": placement}) for placement in ("ep", "fssdp"))
    assert fssdp.seconds < 0.8 * ep.seconds
    assert ep.seconds - fssdp.seconds == pytest.approx(simulated(p, ep.parts["experts"]), rel=0.1)


def test_search_weighs_copies_where_loads_are_uneven() -> None:
    """Steep: the best mapping has them, and explaining it gives the same time. Nearly even: none has. Balanced, or in
    another framework: they are not looked at."""
    p = problem(8, "train.precision=bf16")
    found = search(p, top=10)
    best = found.best[0]
    assert best.row["placement"] == "fssdp" and sum(best.parts.values()) == pytest.approx(best.seconds, rel=0.02)
    words = {name: best.row[name] for name in ("ep", "cp", "tp", "micro_batch", "recompute", "offload", "context")}
    one = explain(p, {**words, "dp_replicate": best.row["rep"], "placement": "fssdp"})
    assert one.seconds == pytest.approx(best.seconds, rel=1e-6) and one.total == pytest.approx(best.total)
    flat = search(problem(8, "train.precision=bf16", power=0.0), top=1)
    assert flat.best[0].row["placement"] == "ep"
    for other in (replace(p, load=None), replace(p, stack=replace(p.stack, name="megatron"))):
        assert search(other, top=1).looked_at < found.looked_at


def test_an_emitted_placement_is_what_train_accepts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its settings are those of the plan; those of the placement that lost are not in the preset."""
    asked = [*WORDS, "precision=bf16", "--config-dir", str(tmp_path), "--json"]
    sparse = ["experts/placement=fssdp", "experts.placement.slots=3", "zipf=1.5"]

    def emitted(name: str, *words: str) -> Config:
        assert main([*asked, "--emit", f"experiment={name}", *words]) == 0
        told = json.loads(capsys.readouterr().out)["plans"][0]
        cfg = load([f"experiment={name}", "device=cuda"], config_dirs=[tmp_path])
        assert check_mapping(cfg, 4).ep == told["mapping"]["ep"] and "placement" in told["mapping"]
        return cfg

    one = emitted("one", *sparse, "mapping=ep=4,placement=fssdp")
    assert one.experts.placement.slots == 3
    plain = emitted("plain", *sparse, "mapping=ep=4,placement=ep")
    assert not hasattr(plain.experts.placement, "slots")
    assert emitted("chosen", *sparse, "mapping=ep=4").experts.placement.slots == 3
    node = emitted("node", "zipf=1.5", "mapping=ep=4,placement=fssdp")
    assert node.experts.placement.node_size == 8


def test_lsh_is_priced_by_the_rows_that_it_sends() -> None:
    """A quarter of the rows: a quarter of the exchanges but for their latency, and more work to find what is alike."""
    p = replace(problem(8), load=None)
    plain, all_, few = (
        explain(replace(p, sent=sent), {"ep": 8, "dispatch": kind})
        for sent, kind in ((1.0, "all_to_all"), (1.0, "lsh"), (0.25, "lsh"))
    )
    assert all_.parts["dispatch"] == plain.parts["dispatch"] and all_.parts["router"] > plain.parts["router"]
    latency = 4 * 2 * 4 * p.cluster.link_us * 1e-6  # layers, ways forward and backward
    assert few.parts["dispatch"] - latency == pytest.approx((plain.parts["dispatch"] - latency) / 4, rel=0.01)
    assert few.parts["experts"] < 0.4 * plain.parts["experts"]
    assert few.memory["activations"] < plain.memory["activations"]


EP = "mapping=ep=4,placement=fssdp"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (EP, "with balanced loads none is hot"),
        ("experts/placement=fssdp", "with balanced loads none is hot"),
        ("zipf=1 mapping=ep=4,placement=shadow", "placement takes ep, fssdp"),
        ("zipf=1 mapping=ep=4,placement=", "placement takes ep, fssdp"),
        ("zipf=1 experts/placement=shadow", "cannot be planned"),
        ("zipf=1 experts/placement=fsdp", "fssdp"),
        ("zipf=1 mapping=ep=2,placement=fssdp", "edp=2"),
        ("zipf=1 mapping=ep=2,etp=2,placement=fssdp", "parallel.etp=2"),
        ("zipf=1 mapping=pp=2,ep=2,placement=fssdp", "parallel.pp=2"),
        (f"zipf=1 {EP},offload=all", "parallel.offload=all"),
        (f"zipf=1 {EP},dispatch=two_step", "dispatch.kind=two_step"),
        (f"zipf=1 {EP},dispatch=lsh", "dispatch.kind=lsh"),
        (f"zipf=1 {EP} parallel.engine=deepspeed", "parallel.engine=torch"),
        (f"zipf=1 {EP} stack=megatron", "not that of stack=megatron"),
        ("zipf=1 gpus=1 mapping=placement=fssdp", "one rank has all experts"),
        ("zipf=1 experts/placement=fssdp experts.placement.slots=0", "slots=0 leaves no place"),
        ("zipf=1 experts/placement=fssdp experts.placement.calibrate=true", "calibrate=true"),
        ("zipf=1 experts.placement.slots=2", "slots"),
        ("dispatch=lsh", "no choice of a search"),
        ("mapping=ep=4,dispatch=lsh sent=0", "above 0"),
        ("mapping=ep=4,dispatch=lsh sent=1.5", "up to 1"),
        ("mapping=ep=4,dispatch=all_to_all sent=0.3", "give it with mapping=...,dispatch=lsh"),
        ("sent=0.3", "give it with mapping=...,dispatch=lsh"),
        ("mapping=ep=4 dispatch=lsh dispatch.hashes=8", "give sent="),
    ],
)
def test_wrong_words_are_one_line(words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = {word.partition("=")[0] for word in words.split()}
    assert main([*(word for word in WORDS if word.partition("=")[0] not in given), *words.split()]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_a_trace_of_other_experts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = {"step": 1, "counts": {f"layers.{i}.moe": [5] * 16 for i in range(4)}}
    (tmp_path / "loads.jsonl").write_text(json.dumps(line) + "\n")
    assert main([*WORDS, f"trace={tmp_path}", EP]) == 2
    error = capsys.readouterr().err
    assert "16 experts for 8" in error and error.count("\n") == 1
