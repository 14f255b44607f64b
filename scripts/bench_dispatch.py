"""What dispatchers move, and what it costs: bytes against the least that would do, step times, time hidden.

bytes: of one MoE layer's step (forward and backward, float32), counted at the collective calls: everything that leaves
a rank, summed over ranks, with the integers that plan it. "least" is what the dispatcher's own algorithm needs,
computed from the routing alone: no padding, nothing twice. "floor" is what any dispatcher would need that sends a token
at most once to another rank, and one sum back. "crossing" is the part between nodes of --node-size ranks.

step: forward and backward of a layer on two gloo processes of one thread each, in turns: ep=2 against ep=1 (each has
all experts and its own tokens; with and without the sum of the experts' gradients that data parallelism then needs) and
against deepspeed.moe.layer.MoE with ep_size=2, the same weights and tokens. DeepSpeed pads every expert to the fullest
one without dropping, or drops tokens to a capacity factor of 1.

hidden: time that ranks stand still for the outputs' way back and their gradients', with and without the shared experts
computed meanwhile. On a CPU transport and computation share the cores.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from bench_bytes import bytes_table
from bench_overlap import hidden_table
from bench_ranks import Shape, build_layer, on_ranks, print_table, step, tokens_of
from bench_step import machine
from torch import Tensor, nn

STEP = Shape(dim=512, experts=8, top_k=2, expert_dim=1024, shared_dim=0, tokens=1024)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench.py dispatch``."""
    parser.add_argument("--parts", nargs="+", choices=["bytes", "step", "hidden"], default=["bytes", "step", "hidden"])
    parser.add_argument("--node-size", type=int, default=2, help="expert parallel ranks of one node")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each contestant")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run the parts; prints tables and returns what goes into the JSON file."""
    for name in ("node_size", "rounds"):
        if getattr(args, name) < 1:
            raise SystemExit(f"bench: --{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    result: dict[str, Any] = {"command": " ".join(sys.argv), "machine": machine()}
    parts = {"bytes": bytes_table, "step": step_table, "hidden": hidden_table}
    for name in args.parts:
        result[name] = parts[name](args)
    return result


def step_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Step times of two processes, in turns."""
    s = STEP
    print(f"\nforward and backward on 2 processes: dim {s.dim}, {s.experts} experts of {s.expert_dim}, top {s.top_k}, "
          f"{s.tokens} tokens each, float32")  # fmt: skip
    with_deepspeed = importlib.util.find_spec("deepspeed") is not None
    if not with_deepspeed:
        print("  deepspeed is not installed: left out")
    seconds, errors = on_ranks(2, race, s, args.rounds, with_deepspeed)[0]
    ours = statistics.median(seconds["moetrain ep=2"])
    rows = []
    for name, times in seconds.items():
        median = statistics.median(times)
        rows.append({"layer": name, "seconds": median, "fastest": min(times), "to ep=2": median / ours,
                     "error": errors[name]})  # fmt: skip
    print_table(rows)
    return rows


def race(s: Shape, rounds: int, with_deepspeed: bool) -> tuple[dict[str, list[float]], dict[str, str]]:
    """(seconds of each contestant's steps, the slower rank's; largest difference of its output from ep=1's)."""
    x = tokens_of(s, dist.get_rank())
    ep1, ep2 = build_layer(s, "local", 1, 1), build_layer(s, "all_to_all", 2, 1)
    contestants: dict[str, Callable[[], Tensor]] = {
        "moetrain ep=2": lambda: step(ep2, x),
        "moetrain ep=1": lambda: step(ep1, x),
        "moetrain ep=1, experts' gradients summed": lambda: step_and_reduce(ep1, x),
    }
    if with_deepspeed:
        padded, dropping = deepspeed_layers(s, ep2)
        contestants["DeepSpeed MoE ep=2, padded"] = lambda: deepspeed_step(padded, x)
        contestants["DeepSpeed MoE ep=2, drops"] = lambda: deepspeed_step(dropping, x)
    want = step(ep1, x)
    errors = {}
    for name, contestant in contestants.items():
        error = (contestant() - want).abs().max() / want.abs().max()
        dist.all_reduce(error, dist.ReduceOp.MAX)
        errors[name] = f"{error:.1e}"
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds + 2):
        for name, contestant in contestants.items():
            dist.barrier()
            start = time.perf_counter()
            contestant()
            slower = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(slower, dist.ReduceOp.MAX)
            if i >= 2:
                seconds[name].append(float(slower))
    return seconds, errors


def step_and_reduce(layer: Any, x: Tensor) -> Tensor:
    """A step of ep=1 with what data parallelism adds."""
    out = step(layer, x)
    for p in layer.experts.parameters():
        dist.all_reduce(p.grad)
    return out


class SwiGLU(nn.Module):
    """One expert, for DeepSpeed."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.w13 = nn.Linear(dim, 2 * inner, bias=False)
        self.w2 = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(nn.functional.silu(gate) * up)


def deepspeed_layers(s: Shape, ours: Any) -> tuple[Any, Any]:
    """DeepSpeed's MoE with the weights of ``ours``: one that pads and drops nothing, one that drops."""
    import logging

    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(None):
        import deepspeed
        from deepspeed.moe.layer import MoE

        # Its compiled shared-memory all-reduce has no part in this layer, and takes minutes to build.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", verbose=False)
        layers = []
        for drop in (False, True):
            layer = MoE(s.dim, SwiGLU(s.dim, s.expert_dim), s.experts, ep_size=2, k=s.top_k, capacity_factor=1.0,
                        drop_tokens=drop, use_rts=False, top2_2nd_expert_sampling=False)  # fmt: skip
            layer.set_deepspeed_parallelism()
            with torch.no_grad():
                layer.deepspeed_moe.gate.wg.weight.copy_(ours.router.weight)
                for i, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
                    expert.w13.weight.copy_(ours.experts.w13[i].flatten(0, 1))
                    expert.w2.weight.copy_(ours.experts.w2[i])
            layers.append(layer)
    return layers[0], layers[1]


def deepspeed_step(layer: Any, x: Tensor) -> Tensor:
    """As ``step``."""
    layer.zero_grad(set_to_none=True)
    out, _, _ = layer(x.detach().requires_grad_())
    out.backward(torch.ones_like(out))
    return out.detach()
