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
import multiprocessing as mp
import os
import pickle
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_step import machine
from torch import Tensor, nn

F32 = 4
# dispatcher, ep, etp
MAPPINGS = [
    *(("all_to_all", ep, 1) for ep in (2, 4, 8)),
    *(("all_gather", ep, 1) for ep in (2, 4, 8)),
    *(("two_step", ep, 1) for ep in (2, 4, 8)),
    ("local", 1, 2),
    *((kind, 2, 2) for kind in ("all_to_all", "all_gather", "two_step")),
    *((kind, 4, 2) for kind in ("all_to_all", "all_gather", "two_step")),
]
ETP_DIM = {"w13": 2, "w2": 2}


@dataclass(frozen=True)
class Shape:
    """A MoE layer and its tokens per rank."""

    dim: int
    experts: int
    top_k: int
    expert_dim: int
    shared_dim: int
    tokens: int


BYTES = Shape(dim=256, experts=64, top_k=8, expert_dim=32, shared_dim=0, tokens=256)
STEP = Shape(dim=512, experts=8, top_k=2, expert_dim=1024, shared_dim=0, tokens=1024)
HIDDEN = Shape(dim=512, experts=8, top_k=2, expert_dim=512, shared_dim=512, tokens=1024)


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


# ---- ranks -----------------------------------------------------------------------------------------------------------


def on_ranks(world: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """``fn(*args)`` on each of ``world`` gloo ranks; results in rank order."""
    context = mp.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        ranks = [
            context.Process(target=run_rank, args=(folder, rank, world, there, fn, args))
            for rank, (_, there) in enumerate(pipes)
        ]
        for process in ranks:
            process.start()
        for _, there in pipes:
            there.close()
        try:
            answers = [pickle.loads(here.recv_bytes()) for here, _ in pipes]
        except EOFError:
            raise SystemExit(f"bench: a rank of {fn.__name__} died; its error is above") from None
        finally:
            for process in ranks:
                process.join(5)
                process.kill()
    return answers


def run_rank(folder: str, rank: int, world: int, there: Any, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Body of one rank."""
    code = 1
    try:
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_SIZE=str(world))
        store = dist.FileStore(str(Path(folder) / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        there.send_bytes(pickle.dumps(fn(*args)))
        dist.barrier()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def build_layer(shape: Shape, kind: str, ep: int, etp: int, node_size: int = 1) -> Any:
    """A layer of ``shape``, the same weights on every rank, of which this rank keeps its part."""
    from torch.distributed.device_mesh import init_device_mesh

    from moetrain.config.schema import ExpertsConfig, ModelConfig, MoEConfig
    from moetrain.moe.build import build_moe_layer
    from moetrain.moe.dispatch import build_dispatcher

    moe = MoEConfig(
        num_experts=shape.experts, top_k=shape.top_k, expert_dim=shape.expert_dim, shared_dim=shape.shared_dim
    )
    cfg = ModelConfig(dim=shape.dim, moe=moe, router={"kind": "topk"})
    layer: Any = build_moe_layer(cfg, 0, {}, ExpertsConfig())
    generator = torch.Generator().manual_seed(0)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.02, generator=generator)
    options = {"kind": kind} | ({"node_size": node_size} if kind == "two_step" else {})
    mesh = init_device_mesh("cpu", (dist.get_world_size() // ep // etp, ep, etp), mesh_dim_names=("edp", "ep", "etp"))
    layer.dispatcher = build_dispatcher(options, shape.experts, mesh.get_group("ep"), mesh.get_group("etp"))
    for name, p in list(layer.experts.named_parameters()):
        part = p.detach().chunk(ep)[mesh.get_local_rank("ep")].chunk(etp, ETP_DIM[name])[mesh.get_local_rank("etp")]
        setattr(layer.experts, name, nn.Parameter(part.clone()))
    return layer


def tokens_of(shape: Shape, rank: int) -> Tensor:
    """x_TD of a rank."""
    return torch.randn(shape.tokens, shape.dim, generator=torch.Generator().manual_seed(100 + rank))


def step(layer: Any, x: Tensor) -> Tensor:
    """Forward and backward; gradients start anew. The output."""
    from moetrain.moe.routing import Carry, TokenContext

    layer.zero_grad(set_to_none=True)
    out, _ = layer(x.detach().requires_grad_(), Carry(x.new_zeros(0)), TokenContext(seq_len=len(x)))
    out.backward(torch.ones_like(out))
    return out.detach()


def print_table(rows: list[dict[str, Any]]) -> None:
    """Rows for people."""
    text = [list(rows[0]), *([f"{v:.3f}" if isinstance(v, float) else str(v) for v in r.values()] for r in rows)]
    widths = [max(len(line[i]) for line in text) for i in range(len(text[0]))]
    for line in text:
        print("  " + "  ".join(word.rjust(width) for word, width in zip(line, widths, strict=True)), flush=True)


# ---- bytes -----------------------------------------------------------------------------------------------------------


def bytes_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Bytes of every dispatcher and mapping, beside what they need."""
    s = BYTES
    print(f"\nbytes of one step: dim {s.dim}, {s.experts} experts, top {s.top_k}, {s.tokens} tokens on each rank; MB")
    rows = []
    for kind, ep, etp in MAPPINGS:
        answers = on_ranks(ep * etp, count_bytes, s, kind, ep, etp, args.node_size)
        ids = [ids for _, _, ids in answers]
        moved, crossing = (sum(answer[i] for answer in answers) for i in (0, 1))
        node = min(args.node_size, ep)
        least, floor = least_bytes(s, kind, ids, ep, etp, node), floor_bytes(s, ids, ep, etp)
        crossing_floor = pairs_apart(ids, ep, etp, node) * 4 * F32 * s.dim
        rows.append(
            {"dispatch": kind, "ep": ep, "etp": etp, "moved": moved / 1e6, "least": least / 1e6,
             "moved/least": moved / least, "moved/floor": moved / floor, "crossing": crossing / 1e6,
             "crossing floor": crossing_floor / 1e6}
        )  # fmt: skip
    print_table(rows)
    return rows


def count_bytes(s: Shape, kind: str, ep: int, etp: int, node_size: int) -> tuple[int, int, Tensor]:
    """(bytes that this rank sends in a step, those of them to other nodes, experts of its tokens (T, K))."""
    layer, rank = build_layer(s, kind, ep, etp, node_size), dist.get_rank()
    x = tokens_of(s, rank)
    with counting(etp, node_size) as total:
        step(layer, x)
    return total[0], total[1], (x @ layer.router.weight.T).topk(s.top_k).indices


@contextlib.contextmanager
def counting(etp: int, node_size: int) -> Iterator[list[int]]:
    """[bytes to other ranks, bytes to other nodes]: every collective of a dispatcher is an all-to-all."""
    total, me, original = [0, 0], dist.get_rank(), dist.all_to_all_single

    def counted(out: Tensor, x: Tensor, out_splits: Any, in_splits: Any, *, group: Any, **more: Any) -> Any:
        row = (x[:1] if len(x) else out[:1]).numel() * x.element_size()
        for peer, n in zip(dist.get_process_group_ranks(group), in_splits, strict=True):
            total[0] += n * row * (peer != me)
            total[1] += n * row * (peer // etp // node_size != me // etp // node_size)
        return original(out, x, out_splits, in_splits, group=group, **more)

    dist.all_to_all_single = counted
    try:
        yield total
    finally:
        dist.all_to_all_single = original


def unique_pairs(*columns: Tensor) -> int:
    """Number of different rows of these columns."""
    return len(torch.unique(torch.stack(columns, dim=1), dim=0))


def flat(s: Shape, ids: list[Tensor], ep: int, etp: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of all assignments: their token (numbered over ranks), its ep and etp rank, and the ep rank of the expert."""
    token_A = torch.arange(len(ids) * s.tokens).repeat_interleave(s.top_k)
    rank_A = token_A // s.tokens
    return token_A, rank_A // etp, rank_A % etp, torch.cat(ids).flatten() // (s.experts // ep)


def least_bytes(s: Shape, kind: str, ids: list[Tensor], ep: int, etp: int, node: int) -> int:
    """Bytes that the algorithm needs: rows there and back, their gradients; weights where they travel, theirs."""
    row, weight, tokens = 4 * F32 * s.dim, 2 * F32, len(ids) * s.tokens
    token_A, home_A, _, owner_A = flat(s, ids, ep, etp)
    A = len(token_A)
    if kind == "all_to_all":
        return int((owner_A != home_A).sum()) * row + A * (etp - 1) * row
    if kind in ("all_gather", "local"):
        # All tokens reach every ep rank, and then the etp ranks beside it; the weights there are those in use.
        etp_part = (tokens * ep * row + A * weight) * (etp - 1)
        return (tokens * row + A * weight) * (ep - 1) + etp_part
    here_A = owner_A // node * node + home_A % node  # where a token arrives on the node of its expert
    total = 0
    for start_A, to_A in ((home_A, here_A), (here_A, owner_A)):
        moves = start_A != to_A
        total += unique_pairs(token_A[moves], to_A[moves]) * row + int(moves.sum()) * weight
    return total + (unique_pairs(token_A, owner_A) * row + A * weight) * (etp - 1)


def floor_bytes(s: Shape, ids: list[Tensor], ep: int, etp: int) -> int:
    """Each token once to every other rank that has a part of one of its experts, and one sum back, with gradients."""
    token_A, home_A, _, owner_A = flat(s, ids, ep, etp)
    away = owner_A != home_A
    ranks = unique_pairs(token_A[away], owner_A[away]) * etp + unique_pairs(token_A[~away]) * (etp - 1)
    return ranks * 4 * F32 * s.dim


def pairs_apart(ids: list[Tensor], ep: int, etp: int, node: int) -> int:
    """Pairs of a token and a node other than its own that has an expert of it."""
    token_A, home_A, _, owner_A = flat(BYTES, ids, ep, etp)
    apart = owner_A // node != home_A // node
    return unique_pairs(token_A[apart], owner_A[apart] // node) if apart.any() else 0


# ---- step time -------------------------------------------------------------------------------------------------------


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


# ---- hidden time -----------------------------------------------------------------------------------------------------


def hidden_table(args: argparse.Namespace) -> dict[str, Any]:
    """How much of the wait for the outputs and their gradients goes away."""
    s = HIDDEN
    print(f"\noverlap, ep=2 on 2 processes: dim {s.dim}, {s.experts} experts of {s.expert_dim}, shared experts of "
          f"{s.shared_dim}, {s.tokens} tokens each, float32; milliseconds")  # fmt: skip
    answers = on_ranks(2, overlap_times, s, args.rounds)
    rows = []
    for i, overlap in enumerate(("off", "on")):
        waits, steps = zip(*(answer[i] for answer in answers), strict=True)
        outputs, all_of_them, whole = (
            statistics.mean(w[0] for w in waits),
            statistics.mean(sum(w) for w in waits),
            statistics.mean(steps),
        )
        rows.append({"overlap": overlap, "wait for outputs and their gradients": 1e3 * outputs,
                     "wait for all rows": 1e3 * all_of_them, "step": 1e3 * whole})  # fmt: skip
    print_table(rows)
    off, on = rows
    waits = ("wait for outputs and their gradients", "wait for all rows")
    hidden = off[waits[0]] - on[waits[0]]
    shares = {key.replace("wait for", "hidden share of the wait for"): hidden / off[key] for key in waits}
    for key, share in shares.items():
        print(f"  {key}: {share:.0%}")
    return {"rows": rows, **shares}


def overlap_times(s: Shape, rounds: int) -> list[tuple[tuple[float, float], float]]:
    """With overlap off and on: ((median wait for outputs and their gradients, for rows and theirs), median step), s."""
    layer, x = build_layer(s, "all_to_all", 2, 1), tokens_of(s, dist.get_rank())
    results: list[list[tuple[float, float, float]]] = [[], []]
    for i in range(rounds + 2):
        for overlap in (False, True):
            layer.dispatcher.overlap = overlap
            dist.barrier()
            with waiting() as waits:
                start = time.perf_counter()
                step(layer, x)
                seconds = time.perf_counter() - start
            # In order: counts, rows, outputs, the outputs' gradients, the rows' gradients.
            _, rows, outputs, output_grads, row_grads = waits
            if i >= 2:
                results[overlap].append((outputs + output_grads, rows + row_grads, seconds))
    medians = [[statistics.median(column) for column in zip(*result, strict=True)] for result in results]
    return [((m[0], m[1]), m[2]) for m in medians]


class Timed:
    """A collective's work; adds the time that is spent waiting for it to ``waits[i]``."""

    def __init__(self, work: Any, waits: list[float], i: int) -> None:
        self.work, self.waits, self.i = work, waits, i

    def wait(self) -> None:
        """Wait, and take the time."""
        start = time.perf_counter()
        self.work.wait()
        self.waits[self.i] += time.perf_counter() - start


@contextlib.contextmanager
def waiting() -> Iterator[list[float]]:
    """Seconds that this rank stands still for each all-to-all, in order of departure."""
    waits: list[float] = []
    original = dist.all_to_all_single

    def timed(*args: Any, **more: Any) -> Timed:
        start = time.perf_counter()
        work = original(*args, **more)
        waits.append(time.perf_counter() - start)
        return Timed(work, waits, len(waits) - 1)

    dist.all_to_all_single = timed
    try:
        yield waits
    finally:
        dist.all_to_all_single = original
