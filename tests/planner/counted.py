"""Bytes that a real step really sends, counted where the collectives are called."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import schedules
from torch.distributed.tensor import DTensor

import moetrain.comm.even
from moetrain.config import Config
from moetrain.config.check import resolve_sizes
from moetrain.data.loader import Batch
from moetrain.parallel.apply import build_stage, initialize, parallelize, spread
from moetrain.parallel.mesh import ParallelDims
from moetrain.parallel.run import Inputs, local_inputs
from moetrain.parallel.stages import Stage, all_stages
from moetrain.planner.stage_run import Live
from moetrain.train.engine import TorchEngine

# (ranks of the group, kind) -> [calls, bytes sent]
Counts = dict[tuple[tuple[int, ...], str], list[int]]
ALL = {
    "all_to_all": ("all_to_all_single",),
    "all_gather": ("all_gather_into_tensor", "all_gather_single"),
    "reduce_scatter": ("reduce_scatter_tensor", "reduce_scatter_single"),
    "all_reduce": ("all_reduce",),
    "send": ("send",),
}


def sent(kind: str, n: int, me: int, args: tuple[Any, ...], more: dict[str, Any]) -> tuple[int, float]:
    """(calls, bytes that leave this rank)."""
    if kind == "all_to_all":
        x, splits = args[1], args[3] if len(args) > 3 else None
        own = splits[me] if splits else len(x) // n
        return 1, x.nbytes - own * (x.nbytes // max(len(x), 1))
    if kind == "send" and isinstance(args[0], list):  # of a pipeline's schedule
        tensors = [op.tensor for op in args[0] if op.op is dist.isend]
        return len(tensors), sum(x.nbytes for x in tensors)
    if kind in ("all_gather", "reduce_scatter"):
        out, x = (value for value in (*args, *more.values()) if isinstance(value, torch.Tensor))
        return 1, (out if kind == "all_gather" else x).nbytes * (n - 1) / n
    return 1, args[0].nbytes * (2 * (n - 1) / n if kind == "all_reduce" else 1)


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """What this rank sends in the meantime; groups of one rank left out."""
    counts: Counts = {}
    inside = [False]

    def wrapped(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            if inside[0]:
                return original(*args, **more)
            inside[0] = True
            try:
                group = more.get("group")
                if kind == "send" and isinstance(args[0], list):
                    if not args[0]:
                        return original(*args, **more)
                    group = args[0][0].group
                ranks = tuple(dist.get_process_group_ranks(group))
                if len(ranks) > 1:
                    calls, size = sent(kind, len(ranks), ranks.index(dist.get_rank()), args, more)
                    total = counts.setdefault((ranks, kind), [0, 0])
                    total[0] += calls
                    total[1] += round(size)
                return original(*args, **more)
            finally:
                inside[0] = False

        return call

    with contextlib.ExitStack() as stack:
        for kind, names in ALL.items():
            for name in names:
                if hasattr(dist, name):
                    replace(stack, dist, name, wrapped(kind, getattr(dist, name)))
        for name in ("all_gather", "reduce_scatter"):
            even: Any = moetrain.comm.even
            replace(stack, even, f"_{name}", wrapped(name, getattr(even, f"_{name}")))
        replace(stack, schedules, "_batch_p2p", wrapped("send", schedules._batch_p2p))
        yield counts


def replace(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def real_step(cfg: Config, names: list[str]) -> dict[str, Any]:
    """One step of a real engine on this rank: what it sent, the ranks of groups by name, and what it holds."""
    dims = ParallelDims.build(resolve_sizes(cfg.parallel, dist.get_world_size()), "cpu")
    engine = TorchEngine(cfg, dims, torch.device("cpu"))
    t = cfg.train
    batches = []
    for _ in range(dims.sizes.micro_batches(cfg)):
        tokens = torch.randint(cfg.model.vocab_size, (t.micro_batch, t.seq_len + 1))
        documents = torch.zeros(t.micro_batch, t.seq_len, dtype=torch.int64) if cfg.data.document_mask else None
        domain_B = torch.zeros(t.micro_batch, dtype=torch.int64)
        ids = list(range(t.micro_batch))
        batches.append(Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), ids, domain_B, documents))
    engine.train_step(batches, 0, 1.0)  # in the first, stages of a pipeline also agree on how they will talk
    with counting() as counts:
        engine.train_step(batches, 1, 1.0)
    weights = {p for part in getattr(engine.runner, "parts", [engine.model]) for p in part.parameters()}
    return {
        "counts": counts,
        "ranks": {name: ranks_of(dims, name) for name in names},
        "weights": size_of(weights),
        "gradients": size_of(p for p in weights if p.requires_grad),
        "optimizer": size_of(
            v for s in engine.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)
        ),
    }


def ranks_of(dims: ParallelDims, name: str) -> tuple[int, ...]:
    special = {"stage": dims.stage_group, "data": dims.data_group, "sequence": dims.sequence_group}
    if name == "world":
        return tuple(range(dist.get_world_size()))
    group = special[name] if name in special else dims.weights[name].get_group() if name == "fsdp" else dims.group(name)
    return tuple(dist.get_process_group_ranks(group))


def size_of(tensors: Any) -> int:
    return sum((t.to_local() if hasattr(t, "to_local") else t).nbytes for t in tensors)


def by_ranks(traffic: dict[str, Any], ranks: dict[str, tuple[int, ...]]) -> Counts:
    """Predicted traffic, with groups of the same ranks taken together, as a real run cannot tell them apart."""
    calls: Counter[tuple[tuple[int, ...], str]] = Counter()
    size: Counter[tuple[tuple[int, ...], str]] = Counter()
    for name, of_group in traffic.items():
        for kind, n in of_group.calls.items():
            calls[ranks[name], kind] += n
            size[ranks[name], kind] += of_group.sent[kind]
    return {key: [calls[key], size[key]] for key in calls if len(key[0]) > 1}


def real_kept(cfg: Config) -> list[tuple[int, int]]:
    """Of one real micro-batch, forward and backward, for every stage: (bytes that autograd keeps under FSDP, bytes of
    all tensors at the worst moment without it); parameters and their gradients left out."""
    dims = ParallelDims.build(resolve_sizes(cfg.parallel, dist.get_world_size()), "cpu")
    stages = all_stages(cfg, dims.sizes)
    return [(_micro_batch(cfg, dims, stage, True)[0], _micro_batch(cfg, dims, stage, False)[1]) for stage in stages]


def _micro_batch(cfg: Config, dims: ParallelDims, stage: Stage, fsdp: bool) -> tuple[int, int]:
    part = build_stage(cfg, stage)
    (parallelize if fsdp else spread)(part, cfg, dims)
    part.to_empty(device="cpu")
    initialize(part, cfg.model, cfg.seed)
    t = cfg.train
    tokens = torch.randint(cfg.model.vocab_size, (t.micro_batch, t.seq_len))
    documents = torch.zeros(t.micro_batch, t.seq_len, dtype=torch.int64) if cfg.data.document_mask else None
    mine, arguments = local_inputs(part, Inputs(tokens, tokens, documents))
    inputs: list[torch.Tensor] = [mine]
    if not stage.first:
        dtype = torch.bfloat16 if t.precision == "bf16" else torch.float32
        shape = (t.micro_batch, mine.shape[1] // dims.sizes.tp, cfg.model.dim)
        inputs = [torch.randn(shape, dtype=dtype, requires_grad=True), torch.zeros(len(part.aux_names))]
        inputs = inputs[: 1 + bool(part.aux_names)]
    storages: dict[int, Any] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        def storage(y: torch.Tensor) -> Any:
            return (y.to_local() if isinstance(y, DTensor) else y).untyped_storage()

        # Now, for FSDP swaps parameters.
        if storage(x).data_ptr() not in {storage(p).data_ptr() for p in (*part.parameters(), *part.buffers())}:
            storages[storage(x).data_ptr()] = storage(x)
        return x

    if not fsdp:
        for p in part.parameters():
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    live = Live(part)
    with live, torch.autograd.set_multithreading_enabled(False):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            outputs = part(*inputs, **arguments)
        if dims.sizes.pp > 1:  # a pipeline keeps both
            for x in (*inputs, *outputs):
                pack(x)
        kept = sum(s.nbytes() for s in storages.values())
        storages.clear()
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    return kept, live.most
