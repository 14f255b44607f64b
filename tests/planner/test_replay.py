"""The replay of routing: times against sums by hand, traces against what was written, words against their refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moetrain import cli, config
from moetrain.config.errors import ConfigError
from moetrain.moe.placement.plan import Topology, at_home, ep_homes, routes
from moetrain.planner.cluster import Cluster, load_cluster
from moetrain.planner.replay import STATE, Model, System, Work, replay, rows_sent
from moetrain.planner.replay_report import parse, simulate
from moetrain.planner.replay_time import LINKS, Clock
from moetrain.planner.trace import Trace, read_trace, synthetic

GB = 1e9
EVERYWHERE = (0, 1, 2, 3)


def cluster(**change: Any) -> Cluster:
    """Nodes of 2 GPUs, 100 GB/s inside, 10 GB/s for each GPU between; no latency to speak of."""
    numbers = {
        **{"node": 2, "domain": 2, "tflops": {"float32": 1, "bf16": 10}},
        **{"link_gb_s": 100, "network_gb_s": 10, "link_us": 0.01, "network_us": 0.01},
    }
    return dataclasses.replace(load_cluster("h100"), **(numbers | change))


def clock(ranks: int = 4, efficiency: float = 1.0, **change: Any) -> Clock:
    return Clock(cluster(**change), ranks, "float32", efficiency)


def close(value: float) -> Any:
    return pytest.approx(value, rel=1e-4, abs=1e-7)


def test_an_exchange_takes_as_long_as_its_busiest_card_or_link() -> None:
    """Rank 0 sends 1 GB to its neighbour, 2 and 3 GB to the other node; GPUs have a card each, or one for both."""
    sent = np.zeros((4, 4))
    sent[0] = [7 * GB, 1 * GB, 2 * GB, 3 * GB]
    own, shared = clock(), clock(cards=1)
    assert own.exchange(sent) == own.exchange(sent.T) == close(5 / 10 / LINKS)
    assert shared.exchange(sent) == close(5 / 20 / LINKS), "a card of both GPUs is as fast as two of one"
    sent[1, 2] = 5 * GB
    assert own.exchange(sent) == close(7 / 10 / LINKS), "rank 2 receives 7 GB"
    assert shared.exchange(sent) == close(10 / 20 / LINKS), "the first node sends 10 GB"
    sent[2, 3] = 100 * GB
    assert own.exchange(sent) == close(100 / 100 / LINKS)
    assert own.exchange(np.diag([9 * GB] * 4)) == 0, "what a rank keeps is free"


def test_a_broadcast_enters_each_node_once_and_direct_copies_all_leave_home() -> None:
    homes, placement = (0, 0, 3), (EVERYWHERE, (0, 1), (2, 3))
    t = clock()
    # Expert 0 crosses once, over both cards of its node; it and expert 1 go to rank 1, expert 2 from 3 to 2.
    assert t.broadcast(homes, placement, int(GB)) == close(1 / 20 / LINKS)
    assert t.direct(homes, placement, int(GB)) == close(2 / 10 / LINKS), "expert 0 leaves rank 0 twice for the network"
    assert t.broadcast(homes, at_home(homes), int(GB)) == t.direct(homes, at_home(homes), int(GB)) == 0


def test_rows_go_where_training_sends_them() -> None:
    """``plan.routes``, which training's dispatcher follows, for placements of all kinds; none is lost."""
    rng = np.random.default_rng(0)
    topology = Topology(6, 3)
    for _ in range(5):
        counts = rng.integers(0, 20, (6, 12))
        placement = tuple(
            tuple(sorted({home, *rng.choice(6, rng.integers(0, 5), replace=False).tolist()}))
            for home in ep_homes(12, 6)
        )
        sent = rows_sent(counts, placement, topology, 1.0)
        assert sent.tolist() == routes(counts.tolist(), placement, topology)
        assert (sent.sum(1) == counts).all()
        fewer = rows_sent(counts, placement, topology, 0.3)
        assert (fewer >= 0.3 * sent - 1e-6).all() and (fewer < 0.3 * sent + 1).all()


WORK = Work(row_bytes=1000, expert=10**6, width=4, dense_flops=5e9)
MODEL = Model([WORK, WORK], tokens=800, top_k=1, experts=8, dense=3 * 10**6, head_flops=1e9)


def even(steps: int = 7) -> Trace:
    return Trace(list(range(1, steps + 1)), [0, 1], np.full((steps, 2, 4, 8), 100))


def hot(share: float = 0.5, steps: int = 7) -> Trace:
    """Expert 5, at home on rank 2, has ``share`` of the rows; the others share the rest."""
    counts = np.full((steps, 2, 4, 8), round((1 - share) * 800 / 7))
    counts[..., 5] += 800 - counts.sum(-1)
    return Trace(list(range(1, steps + 1)), [0, 1], counts)


def test_plain_expert_parallelism_on_even_loads_is_a_sum_by_hand() -> None:
    f = replay(even(), MODEL, System("ep"), clock(efficiency=0.5))
    # A layer: each rank keeps 200 of its 800 rows, sends 200 to its neighbour and 400 to the other node.
    assert f.rows_bytes == 2 * 4 * (4 * 600 * 1000)
    assert f.rows_s == close(2 * 4 * 400 * 1000 / (10 * GB * LINKS))
    assert f.experts_s == close(2 * 3 * 2 * 800 * 1e6 / 0.5e12)
    assert f.dense_s == close(3 * (2 * 5e9 + 1e9) / 0.5e12)
    assert f.copies_bytes == f.copies_s == f.moved_s == 0 and f.exposed_s == f.rows_s
    assert f.memory == STATE * (3e6 + 2 * 2 * 1e6), "dense part, and two experts of each layer"


def test_a_copy_everywhere_spares_the_hot_rank_and_costs_what_it_weighs() -> None:
    t = clock()
    ep, one = (replay(hot(), MODEL, s, t) for s in (
        System("ep"), System("fssdp", {"kind": "fssdp", "slots": 1, "budget": 1, "node_size": 2, "reshard_every": 0})
    ))  # fmt: skip
    cold = 800 - 401  # rows of a rank for the other seven experts
    assert ep.experts_s == close(2 * 3 * 2 * 4 * (401 + 57) * 1e6 / 1e12), "rank 2 has all rows of expert 5"
    assert one.experts_s == close(2 * 3 * 2 * (401 + 2 * 4 * 57) * 1e6 / 1e12), "its own, and those of two cold experts"
    assert one.rows_bytes == 2 * 4 * 1000 * (4 * cold - 57 * 7), "what is at home on its own rank stays: 57 rows each"
    assert one.copies_bytes == 2 * 2 * 3 * WORK.expert_bytes, "weights to three ranks, gradients back"
    assert one.memory - ep.memory == 3 * WORK.expert_bytes, "a copy in each layer, the gradient of one layer's"
    assert one.exposed_copies_s == 0 and one.copies_s > 0, "behind the dense part"


def test_freed_copies_take_less_memory_and_travel_once_more() -> None:
    policy = {"kind": "fssdp", "slots": 2, "budget": 2, "node_size": 2, "reshard_every": 0}
    kept, freed = (
        replay(hot(), MODEL, System("x", policy | {"rematerialise": frees}), clock()) for frees in (False, True)
    )
    assert freed.copies_bytes == 1.5 * kept.copies_bytes
    copy = WORK.expert_bytes
    ep = replay(hot(), MODEL, System("ep"), clock())
    most = (kept.memory - ep.memory) / copy
    assert most == 6 and (freed.memory - ep.memory) / copy == 4, "2 layers x 2 copies, or 1 x 2; 2 gradients"


def test_copies_that_do_not_fit_behind_dense_work_are_exposed() -> None:
    policy = {"kind": "fssdp", "slots": 1, "budget": 1, "node_size": 2, "reshard_every": 0}
    slow = dataclasses.replace(MODEL, layers=[dataclasses.replace(WORK, dense_flops=0.0)] * 2)
    f = replay(hot(), slow, System("x", policy), clock())
    assert f.exposed_copies_s == f.copies_s == close(2 * 2 * WORK.expert_bytes / (20 * GB * LINKS))


def test_copies_by_the_real_loads_are_waited_for() -> None:
    """Nothing is known in the first step, so nothing is planned; calibration brings the hot expert, and is exposed."""
    policy = {"kind": "fssdp", "slots": 1, "budget": 1, "node_size": 2, "reshard_every": 0}
    first = hot(steps=1)
    blind, seen = (replay(first, MODEL, System("x", policy | {"calibrate": on}), clock()) for on in (False, True))
    assert blind.copies_bytes == 0 and seen.copies_bytes == 2 * 2 * 3 * WORK.expert_bytes
    assert seen.experts_s < blind.experts_s
    assert seen.exposed_copies_s == close(2 * WORK.expert_bytes / (20 * GB * LINKS))


def test_compression_scales_rows_and_work() -> None:
    ep, lsh = (replay(even(), MODEL, s, clock()) for s in (System("ep"), System("lsh", sent=0.2)))
    assert lsh.rows_bytes == 0.2 * ep.rows_bytes
    assert lsh.experts_s == close(0.2 * ep.experts_s)
    assert lsh.dense_s > ep.dense_s, "hashing reads the rows"


def test_homes_move_once_and_the_cost_is_spread() -> None:
    """Two hot experts of one rank: migration parts them. 16 bytes of each weight travel, once in 50 steps."""
    counts = np.full((9, 2, 4, 8), 50)
    counts[..., 2:4] = 250
    trace = Trace(list(range(1, 10)), [0, 1], counts)
    ep, migrate = (replay(trace, MODEL, s, clock()) for s in (
        System("ep"), System("migrate", {"kind": "migrate", "every": 50})
    ))  # fmt: skip
    assert migrate.experts_s == close(ep.experts_s * (250 + 50) / (250 + 250))
    assert migrate.moved_bytes == close(2 * 2 * WORK.expert * STATE / 50), "in each layer two experts swap places"


def test_synthetic_loads_are_as_uneven_as_asked_and_drift_slowly() -> None:
    flat, steep = (synthetic(12, 2, 4, 16, 5000, skew) for skew in (0.0, 1.5))
    assert (flat.counts_SLRE.sum(-1) == 5000).all() and (steep.counts_SLRE.sum(-1) == 5000).all()
    assert flat.skew() < 1.1 and steep.skew() > 4
    loads = steep.counts_SLRE.sum(2).reshape(12, -1).astype(float)

    def likeness(a: int, b: int) -> float:
        return float(np.corrcoef(loads[a], loads[b])[0, 1])

    assert likeness(5, 6) > 0.9 and likeness(5, 6) > likeness(0, 11)


def test_a_trace_is_scaled_to_other_ranks_and_rows() -> None:
    trace = synthetic(3, 2, 2, 5, 40, 1.0)
    assert (trace.scaled(2, 40).counts_SLRE == trace.counts_SLRE).all(), "where all fits nothing changes"
    wide = trace.scaled(6, 100).counts_SLRE
    assert wide.shape == (3, 2, 6, 5) and (wide.sum(-1) == 100).all()
    assert (wide[:, :, 1] == wide[:, :, 3]).all()
    assert (abs(wide[:, :, :2] / 100 - trace.counts_SLRE / 40) < 0.01).all()


def test_pieces_of_a_trace_are_read_as_one_and_bad_ones_are_named(tmp_path: Path) -> None:
    whole = synthetic(6, 2, 2, 5, 40, 1.0)
    for a, b in ((0, 3), (3, 6), (2, 5)):  # the last was written by a run that then went back to step 2
        Trace(whole.steps[a:b], [0, 1], whole.counts_SLRE[a:b]).save(tmp_path / "trace" / f"step-{b}.npz")
    found = read_trace(tmp_path)
    assert found.steps == whole.steps and (found.counts_SLRE == whole.counts_SLRE).all()
    assert (read_trace(tmp_path / "trace" / "step-3.npz").counts_SLRE == whole.counts_SLRE[:3]).all()
    (tmp_path / "trace" / "step-7.npz").write_text("not a zip")
    with pytest.raises(ConfigError, match=r"step-7\.npz cannot be read"):
        read_trace(tmp_path)
    Trace([9], [0], whole.counts_SLRE[:1, :1]).save(tmp_path / "trace" / "step-7.npz")
    with pytest.raises(ConfigError, match="does not fit the other pieces"):
        read_trace(tmp_path)
    with pytest.raises(ConfigError, match=r"train\.trace=true"):
        read_trace(tmp_path / "elsewhere")


MODEL_WORDS = ["model.n_layers=2", "model.moe.num_experts=16", "train.seq_len=64"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["ranks=4"], "needs cluster="),
        (["cluster=h100"], "needs ranks="),
        (["cluster=h10", "ranks=4"], "did you mean 'h100'"),
        (["cluster=h100", "ranks=0"], "ranks takes a whole number"),
        (["cluster=h100", "ranks=3"], "cannot be split evenly over ranks=3"),
        (["cluster=h100", "ranks=4", "skew=nan"], "skew takes a number"),
        (["cluster=h100", "ranks=4", "skew=-1"], "skew takes a number"),
        (["cluster=h100", "ranks=4", "sent=0"], "sent takes a number"),
        (["cluster=h100", "ranks=4", "slots=2.5"], "slots takes a whole number"),
        (["cluster=h100", "ranks=4", "copies=ring"], "copies takes broadcast or direct"),
        (["cluster=h100", "ranks=4", "systems=ep,fsdp"], "did you mean 'fssdp'"),
        (["cluster=h100", "ranks=4", "ranks=8"], "ranks= is there twice"),
        (["cluster=h100", "ranks=4", "trace=no/such"], "holds no trace"),
        (["cluster=h100", "ranks=4", "model.moe.num_experts=0"], "no MoE layer"),
        (["cluster=h100", "ranks=4", "model.moe.num_experts=[16,8]"], "alike"),
        (["cluster=h100", "ranks=4", "model.moe.top_k=16"], "every token goes to all experts"),
        (["cluster=h100", "ranks=4", "rank=8"], "rank"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        asked, settings = parse(words)
        simulate(asked, config.load([*MODEL_WORDS, *settings]))
    assert "\n" not in str(error.value)


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["simulate", "cluster=h100", "ranks=16", "steps=7", *MODEL_WORDS]
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "16 ranks of h100, 2 MoE layers of 16 experts" in lines[0]
    head = next(i for i, line in enumerate(lines) if line.split()[0] == "system")
    names = [line.split()[0] for line in lines[head + 1 :]]
    assert names == ["ep", "fssdp", "fssdp-rm", "lsh", "shadow", "static", "migrate"]
