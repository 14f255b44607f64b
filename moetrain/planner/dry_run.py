"""``moetrain train ... dry_run=true``: memory and communication of every pipeline rank, from one process on a CPU.

The modules of each stage are built, made parallel and run on the meta device, as rank 0 of each group would; no memory
is taken and nothing is sent. Assumed: balanced routing (``planner.balanced``), fused attention (``planner.attention``),
and for ``device=auto`` a GPU. Not counted: the allocator's waste, buffers inside a kernel or a collective library, and
the CUDA context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moetrain.config.errors import ConfigError
from moetrain.config.schema import Config
from moetrain.config.sizes import Sizes
from moetrain.moe.balance import aux_names
from moetrain.moe.layer import MoELayer
from moetrain.optim import build_optimizer
from moetrain.parallel import tensor
from moetrain.parallel.apply import weight_dtype
from moetrain.parallel.mesh import ParallelDims
from moetrain.parallel.pipeline import Held
from moetrain.parallel.stages import Stage, all_stages
from moetrain.planner.balanced import Balancer
from moetrain.planner.groups import Meter, Traffic, dry_world
from moetrain.planner.order import actions, most_kept
from moetrain.planner.sharded import Gathers, local_of, reductions, shard_stage, whole_gradients
from moetrain.planner.stage_run import StageRun, compute_dtype, run_stage


@dataclass(frozen=True)
class RankFigures:
    """Of the ranks at one place of the pipeline; the first of each group, which never holds less than another.

    parameters: of the whole stages. Bytes on this rank: weights, gradients and optimizer (its shards); activations (the
    most at a time, of the micro-batches under way); gathered (weights that FSDP has whole at a time, in the compute
    dtype); unreduced (whole gradients that wait for the end of the step). host: those of them in host memory.
    traffic: group -> kind -> (calls, bytes sent) per step.
    """

    pp_rank: int
    stages: list[int]
    layers: list[int]
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int
    unreduced: int
    host: int
    traffic: dict[str, Traffic]

    @property
    def total(self) -> int:
        """Bytes on the device at most: not all peaks need come at the same time."""
        parts = self.weights, self.gradients, self.optimizer, self.activations, self.gathered, self.unreduced
        return sum(parts) - self.host


def refuse(cfg: Config) -> None:
    """Raise ConfigError for what a dry run does not cover."""
    if cfg.parallel.engine != "torch":
        raise ConfigError(
            f"dry_run covers parallel.engine=torch, not {cfg.parallel.engine}, whose memory is not moetrain's; "
            "take out dry_run or set parallel.engine=torch"
        )
    kind = cfg.dispatch.get("kind") if isinstance(cfg.dispatch, dict) else getattr(cfg.dispatch, "kind", None)
    if kind == "deep_ep":
        raise ConfigError("dry_run does not cover dispatch=deep_ep, whose kernels need a GPU; use dispatch=two_step")


def dry_run(cfg: Config, sizes: Sizes) -> list[RankFigures]:
    """The figures of every pipeline rank. Raises ConfigError for what cannot be covered."""
    refuse(cfg)
    device = "cpu" if cfg.device == "cpu" else "cuda"
    with dry_world(sizes.world):
        dims = ParallelDims.build(sizes, "cpu")
        balancer, meter = Balancer(cfg, sizes), Meter(dims)
        stages = all_stages(cfg, sizes)
        found = []
        for rank in range(sizes.pp):
            mine = [stages[i] for i in sizes.stages_of_rank(rank, cfg.parallel.schedule)]
            runs = {stage.index: run_stage(cfg, dims, meter, stage, balancer, device) for stage in mine}
            found.append(_rank(cfg, dims, meter, rank, mine, runs, device))
        return found


def _rank(
    cfg: Config, dims: ParallelDims, meter: Meter, rank: int, mine: list[Stage], runs: dict[int, StageRun], device: str
) -> RankFigures:
    sizes = dims.sizes
    shards = {stage.index: shard_stage(cfg, dims, stage) for stage in mine}
    held = Held([s.part for s in shards.values()])
    units = [unit for s in shards.values() for unit in s.units]
    order = actions(cfg, sizes, rank)
    gathers = Gathers(cfg, sizes, shards)
    gathers.run(order)
    weights = _bytes(list(held.parameters()))
    traffic: dict[str, Traffic] = {}

    def add(name: str, more: Traffic, times: int = 1) -> None:
        traffic.setdefault(name, Traffic()).merge(more, times)

    n = sizes.micro_batches(cfg)
    for run in runs.values():
        for name, sent in run.traffic.items():
            add(name, sent, n)
    for found in (gathers.traffic(), reductions(cfg, sizes, units)):
        for name, sent in found.items():
            add(name, sent)
    add("pp", _passed(cfg, sizes, rank, mine, n))
    state, at_update = _update(cfg, dims, meter, held)
    for found in (at_update, _end_of_step(cfg, sizes, held, device)):
        for name, sent in found.items():
            add(name, sent)
    offload = cfg.parallel.offload
    host = {"none": 0, "optimizer": state, "all": 2 * weights + state}[offload]
    return RankFigures(
        pp_rank=rank,
        stages=[stage.index for stage in mine],
        layers=[layer for stage in mine for layer in stage.layers],
        parameters=sum(p.numel() for p in held.parameters()),
        weights=weights,
        gradients=weights,
        optimizer=state,
        activations=most_kept(order, {i: run.kept for i, run in runs.items()}),
        gathered=gathers.most,
        unreduced=whole_gradients(sizes, n, units),
        host=host,
        traffic={name: sent for name, sent in traffic.items() if sent.calls},
    )


def _passed(cfg: Config, sizes: Sizes, rank: int, mine: list[Stage], n: int) -> Traffic:
    """What a pipeline rank sends to others: outputs of its stages, gradients of their inputs, and a tied table."""
    t, dtype = cfg.train, compute_dtype(cfg)
    terms = len(aux_names(cfg.balance))
    one = t.micro_batch * t.seq_len // (sizes.cp * sizes.tp) * cfg.model.dim * dtype.itemsize
    one += terms * torch.promote_types(dtype, torch.float32).itemsize
    sent = Traffic()
    for stage in mine:
        for other in (stage.index + 1, stage.index - 1):
            if 0 <= other < stage.total and sizes.rank_of_stage(other, cfg.parallel.schedule) != rank:
                sent.add("send", n * one, n * (2 if terms else 1))
    first, last = (sizes.rank_of_stage(i, cfg.parallel.schedule) for i in (0, sizes.stages - 1))
    if cfg.model.tie_embeddings and first != last and rank in (first, last):
        # The gradient goes to the first stage, the new weights to the last one; FSDP and tp keep shards of both.
        rows = -(-cfg.model.vocab_size // sizes.tp)
        sent.add("send", -(-rows // (sizes.dp_shard * sizes.cp)) * cfg.model.dim * weight_dtype(cfg).itemsize)
    return sent


def _update(cfg: Config, dims: ParallelDims, meter: Meter, held: nn.Module) -> tuple[int, dict[str, Traffic]]:
    """(bytes of the optimizer's state, what its step and the sum of copies before it send): by running both."""
    for p in held.parameters():
        p.grad = torch.empty_like(p)
    optimizer = build_optimizer(cfg.optim, held)
    with meter.measure() as traffic:
        if dims.sizes.tp > 1:
            tensor.sum_copies(tensor.copies(held), dims.group("tp"))
        optimizer.step()
    state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
    return _bytes(state), traffic


def _end_of_step(cfg: Config, sizes: Sizes, held: nn.Module, device: str) -> dict[str, Traffic]:
    """The small all-reduces of ``train.step``: token counts, loss and norm, and the loads of all experts."""
    wide = 8 if device == "cpu" else 4  # bytes of a sum; see ``parallel.run.sum_dtype``
    loads = {i: 8 * (cfg.model.layer_value("num_experts", i) + 1) for i in cfg.model.moe_layers()}
    own = [8 * (layer.router.n_experts + 1) for layer in held.modules() if isinstance(layer, MoELayer)]  # type: ignore[operator, union-attr]
    tensors = [
        ("data", sizes.data, 16),
        ("world", sizes.world, wide * (1 + len(aux_names(cfg.balance)))),
        ("world", sizes.world, wide),
        ("stage", sizes.world // sizes.pp, sum(own)),
        ("pp", sizes.pp, sum(loads.values())),
    ]
    found: dict[str, Traffic] = {}
    for name, ranks, size in tensors:
        if ranks > 1 and size:
            found.setdefault(name, Traffic()).add("all_reduce", 2 * size * (ranks - 1) / ranks)
    return found


def _bytes(tensors: list[Any]) -> int:
    return sum(local_of(t).nbytes for t in tensors)
