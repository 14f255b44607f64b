"""What a plan says that copies of experts hold is what ranks hold: weights to the byte, the worst moment by counting
all tensors that there are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from moetrain_launch.fork import run_ranks

from moetrain.config import Config
from moetrain.config.check import resolve_sizes
from moetrain.moe.placement.plan import ep_homes
from moetrain.parallel.apply import build_stage, initialize, parallelize, spread
from moetrain.parallel.mesh import ParallelDims
from moetrain.parallel.placement import build_placement
from moetrain.parallel.run import Inputs, local_inputs
from moetrain.parallel.stages import all_stages
from moetrain.planner.candidates import columns, row_of
from moetrain.planner.cluster import load_cluster
from moetrain.planner.copies import copies_bytes
from moetrain.planner.loads import Load
from moetrain.planner.search import Problem
from moetrain.planner.stage_run import Live
from tests.distributed.toy_run import load

WORLD, LAYERS = 4, 3
# Experts that outweigh activations: 16 tokens on a rank, experts of 147 kB.
TOY = [
    "model/router=forced", "model.moe.expert_dim=512", "parallel.ep=4", "train.micro_batch=1", "device=cpu",
    "train.global_batch=4",
]  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """Of one rank. held: bytes of weights side by side at the end of a forward pass. most: bytes of all tensors that
    there are at the worst moment of a micro-batch, without parameters."""

    held: int
    most: int


def run(cfg: Config, share_LE: list[list[float]], fsdp: bool) -> Seen:
    """One micro-batch under ``cfg``, with homes and copies for the loads ``share_LE``. Gradients go as they come."""
    dims = ParallelDims.build(resolve_sizes(cfg.parallel, dist.get_world_size()), "cpu")
    (stage,) = all_stages(cfg, dims.sizes)
    part = build_stage(cfg, stage)
    (parallelize if fsdp else spread)(part, cfg, dims)
    part.to_empty(device="cpu")
    initialize(part, cfg.model, cfg.seed)
    placement = build_placement(cfg, part, dims)
    if placement is not None:
        homes = placement.policy.rehome(0, [ep_homes(8, WORLD)] * LAYERS, share_LE)
        placement.move(dict(zip(placement.layers, homes, strict=True)), torch.optim.SGD(part.parameters()))
        placement.history = {name: [loads] for name, loads in zip(placement.layers, share_LE, strict=True)}  # type: ignore[misc]
        placement.plan()
    tokens = torch.randint(cfg.model.vocab_size, (1, cfg.train.seq_len))
    mine, arguments = local_inputs(part, Inputs(tokens, tokens, None))
    for p in part.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    live = Live(part)
    held = 0
    with live, torch.autograd.set_multithreading_enabled(False):
        outputs: Any = part(mine, **arguments)
        for copies in placement.copies.values() if placement is not None else ():
            held += sum(w.nbytes for w in copies._weights or () if w is not None)
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    return Seen(held, live.most)


SPREAD = "experts.placement.slots=1 experts.placement.budget=3 experts.placement.node_size=2"


@pytest.mark.parametrize(
    "words",
    ["", SPREAD, "experts.placement.reshard_every=0 train.recompute=full", "train.precision=bf16"],
    ids=["default", "spread", "plain homes", "bf16"],
)
def test_copies_hold_what_is_planned(tmp_path: Path, words: str) -> None:
    """4 ranks, three layers with other hot experts each. Weights of all layers on the fullest rank: to the byte (bf16
    computes in 16 bits, but float32 travels). The worst moment is in backward, and what it takes over that of plain
    expert parallelism no more than planned, and not much less: the plan takes all activations to be there still."""
    share_LE = np.random.default_rng(1).dirichlet(np.full(8, 0.5), LAYERS)
    narrow = "bf16" in words  # which needs FSDP
    cfg = load(tmp_path, [*TOY, "experts/placement=fssdp", *words.split()])
    plain = load(tmp_path, [*TOY, *(w for w in words.split() if w.startswith("train."))])
    p = Problem(cfg, load_cluster("h100"), WORLD, load=Load("made up", share_LE[None], steady=True))
    ranks = run_ranks(WORLD, run, cfg, share_LE.tolist(), narrow, timeout=200)
    expert = 4 * 3 * 24 * 512
    assert max(rank.held for rank in ranks) == p.placed.held * expert
    if narrow:
        return
    run_of_plan = replace(p.run(), placed=p.placed)
    m = columns([row_of(cfg, resolve_sizes(cfg.parallel, WORLD))])
    planned = float(copies_bytes(p.shape, m, run_of_plan)[0])
    assert planned == (p.placed.held + p.placed.passing) * expert
    without = run_ranks(WORLD, run, plain, share_LE.tolist(), narrow, timeout=200)
    own = 8 // WORLD * expert  # gradients of a layer, which the worst moment without copies has, too
    more = max(a.most - b.most for a, b in zip(ranks, without, strict=True)) + own
    assert 0.8 * planned < more <= planned
