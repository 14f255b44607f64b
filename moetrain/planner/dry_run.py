"""``moetrain train ... dry_run=true``: memory and communication of every pipeline rank, from one process on a CPU.

The modules of each stage are built, made parallel and run on the meta device, as rank 0 of each group would; no memory
is taken and nothing is sent. Assumed: balanced routing (``planner.balanced``), fused attention and norms
(``planner.fused``), no torch.compile, and for ``device=auto`` a GPU. Not counted: the allocator's waste, buffers inside
a kernel (but of Triton's experts) or a collective library, and the CUDA context.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moetrain.config.check_placement import placement_kind
from moetrain.config.errors import ConfigError
from moetrain.config.schema import Config, ModelConfig
from moetrain.config.sizes import Sizes
from moetrain.model.attention import window_of
from moetrain.moe.balance import aux_names
from moetrain.moe.dispatch.deep_ep import DeepEPOptions
from moetrain.moe.layer import MoELayer
from moetrain.moe.routers import POSITIONS
from moetrain.optim import build_optimizer
from moetrain.parallel import tensor
from moetrain.parallel.apply import weight_dtype
from moetrain.parallel.freeze import frozen_sizes
from moetrain.parallel.mesh import ParallelDims
from moetrain.parallel.pipeline import Held
from moetrain.parallel.stages import Stage, all_stages
from moetrain.planner.balanced import Balancer
from moetrain.planner.groups import Meter, Traffic, dry_world
from moetrain.planner.order import actions, most_kept
from moetrain.planner.sharded import Gathers, Shards, local_of, reductions, shard_stage, whole_gradients
from moetrain.planner.stage_run import StageRun, compute_dtype, run_stage


@dataclass(frozen=True)
class RankFigures:
    """Of the ranks at one place of the pipeline; the first of each group, which never holds less than another.

    parameters: of the whole stages. Bytes on this rank: weights, gradients and optimizer (its shards); activations (the
    most at a time, of the micro-batches under way); working (beside them, while one of these is computed); gathered
    (weights that FSDP has whole at a time, in the compute dtype); unreduced (whole gradients that wait for the end of
    the step). host: those of them in host memory.
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
    working: int
    gathered: int
    unreduced: int
    host: int
    traffic: dict[str, Traffic]

    @property
    def total(self) -> int:
        """Bytes on the device at most: not all peaks need come at the same time."""
        state = self.weights + self.gradients + self.optimizer - self.host
        return state + self.activations + self.working + self.gathered + self.unreduced


def refuse(cfg: Config) -> None:
    """Raise ConfigError for what a dry run does not cover."""
    if cfg.parallel.engine != "torch":
        raise ConfigError(
            f"dry_run covers parallel.engine=torch, not {cfg.parallel.engine}, whose memory is not moetrain's; "
            "take out dry_run or set parallel.engine=torch"
        )
    if isinstance(cfg.dispatch, DeepEPOptions):
        raise ConfigError("dry_run does not cover dispatch=deep_ep, whose kernels need a GPU; use dispatch=two_step")
    if (kind := placement_kind(cfg)) != "ep":
        raise ConfigError(
            f"dry_run does not count the copies of experts.placement.kind={kind}, which follow the loads; "
            "use experts/placement=ep, and add what docs/placement.md says"
        )


def dry_run(cfg: Config, sizes: Sizes) -> list[RankFigures]:
    """The figures of every pipeline rank. Raises ConfigError for what cannot be covered."""
    refuse(cfg)
    cfg = copy.deepcopy(cfg)
    cfg.train.compile = False
    # A weight that two meshes split is gathered in two steps, which torch would rather have in one.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    with dry_world(sizes.world):
        dims = ParallelDims.build(sizes, "cpu")
        dry = _Dry(cfg, dims, Meter(dims), Balancer(cfg, sizes), "cpu" if cfg.device == "cpu" else "cuda")
        return [dry.figures(rank) for rank in range(sizes.pp)]


@dataclass(frozen=True)
class _Held:
    """A rank's stages under FSDP. parameters: of the whole stages. gradients: of weights that are trained. sent: by the
    optimizer's step and the sum of copies before it. loads: MoE layers' numbers of experts."""

    shards: list[Shards]
    parameters: int
    weights: int
    gradients: int
    state: int
    sent: dict[str, Traffic]
    loads: list[int]


class _Dry:
    """A dry run under way. Stages that are alike are run and built once."""

    def __init__(self, cfg: Config, dims: ParallelDims, meter: Meter, balancer: Balancer, device: str) -> None:
        self.cfg, self.dims, self.meter, self.balancer, self.device = cfg, dims, meter, balancer, device
        self.stages = all_stages(cfg, dims.sizes)
        self.frozen = frozen_sizes(cfg, dims.sizes)
        self.runs: dict[Any, StageRun] = {}
        self.held: dict[Any, _Held] = {}

    def figures(self, rank: int) -> RankFigures:
        """Of pipeline rank ``rank``."""
        cfg, sizes = self.cfg, self.dims.sizes
        mine = [self.stages[i] for i in sizes.stages_of_rank(rank, cfg.parallel.schedule)]
        runs = {stage.index: self._run(stage) for stage in mine}
        held = self._hold(mine)
        units = [unit for shards in held.shards for unit in shards.units]
        order = actions(cfg, sizes, rank)
        gathers = Gathers(cfg, sizes, {stage.index: s for stage, s in zip(mine, held.shards, strict=True)})
        gathers.run(order)
        n = sizes.micro_batches(cfg)
        traffic: dict[str, Traffic] = {}
        within = [(run.traffic, n) for run in runs.values()]
        at_end = [
            gathers.traffic(),
            reductions(cfg, sizes, units),
            held.sent,
            end_of_step(cfg, sizes, held.loads, self.device),
        ]
        for found, times in (*within, ({"pp": passed(cfg, sizes, rank, mine, n)}, 1), *((t, 1) for t in at_end)):
            for name, sent in found.items():
                traffic.setdefault(name, Traffic()).merge(sent, times)
        return RankFigures(
            pp_rank=rank,
            stages=[stage.index for stage in mine],
            layers=[layer for stage in mine for layer in stage.layers],
            parameters=held.parameters,
            weights=held.weights,
            gradients=held.gradients,
            optimizer=held.state,
            activations=most_kept(order, {i: run.kept for i, run in runs.items()}),
            working=max(run.working for run in runs.values()),
            gathered=gathers.most,
            unreduced=whole_gradients(sizes, n, units),
            host={"none": 0, "optimizer": held.state, "all": held.weights + held.gradients + held.state}[
                cfg.parallel.offload
            ],
            traffic={name: sent for name, sent in traffic.items() if sent.calls},
        )

    def _kind(self, stage: Stage) -> Any:
        return kind_of(self.cfg.model, stage, self.frozen)

    def _run(self, stage: Stage) -> StageRun:
        key = self._kind(stage)
        if key not in self.runs:
            self.runs[key] = run_stage(self.cfg, self.dims, self.meter, stage, self.balancer, self.device)
        return self.runs[key]

    def _hold(self, mine: list[Stage]) -> _Held:
        key = tuple(self._kind(stage) for stage in mine)
        if key not in self.held:
            shards = [shard_stage(self.cfg, self.dims, stage) for stage in mine]
            model = Held([s.part for s in shards])
            # Those of the parts: the last stage's copy of a tied table is no parameter to the optimizer.
            weights = {p for s in shards for p in s.part.parameters()}
            state, sent = _update(self.cfg, self.dims, self.meter, model)
            self.held[key] = _Held(
                shards,
                parameters=sum(p.numel() for p in model.parameters()),
                weights=sum(local_of(w).nbytes for w in weights),
                gradients=sum(local_of(w).nbytes for w in weights if w.requires_grad),
                state=sum(local_of(v).nbytes for v in state),
                sent=sent,
                loads=[reported(layer.router) for layer in model.modules() if isinstance(layer, MoELayer)],
            )
        return self.held[key]


def kind_of(model: ModelConfig, stage: Stage, frozen: Iterable[str]) -> Any:
    """Equal for stages that differ in their names only. frozen: parameters that are not trained."""
    per_layer = [value for value in vars(model.moe).values() if isinstance(value, list)]
    layers = [(window_of(model, i), model.is_moe(i), *(value[i] for value in per_layer)) for i in stage.layers]
    parts = [name.split(".", 2) for name in frozen if name.startswith("layers.")]
    held = [{rest for _, layer, rest in parts if int(layer) == i} for i in stage.layers]
    return stage.first, stage.last, tuple(layers), tuple(map(frozenset, held))


def passed(cfg: Config, sizes: Sizes, rank: int, mine: list[Stage], n: int) -> Traffic:
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


def _update(cfg: Config, dims: ParallelDims, meter: Meter, model: nn.Module) -> tuple[list[Tensor], dict[str, Traffic]]:
    """(the optimizer's state, what its step and the sum of copies before it send): by running both."""
    for p in model.parameters():
        p.grad = torch.empty_like(p) if p.requires_grad else None
    optimizer = build_optimizer(cfg.optim, model)
    with meter.measure() as traffic:
        if dims.sizes.tp > 1:
            tensor.sum_copies(tensor.copies(model), dims.group("tp"))
        optimizer.step()
    return [v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)], traffic


def reported(router: Any) -> int:
    """Numbers that a MoE layer sums over ranks at the end of a step, but for that of all dropped choices."""
    return router.n_experts + (POSITIONS if router.capacity_factor is not None else 0)


def end_of_step(cfg: Config, sizes: Sizes, loads: list[int], device: str) -> dict[str, Traffic]:
    """The small all-reduces of ``train.step``: token counts, loss and norm, and the loads of all experts (int64; one
    number more for each layer, of the dropped; over stages their positions too). loads: of the MoE layers here."""
    wide = 8 if device == "cpu" else 4  # bytes of a sum; see ``parallel.run.sum_dtype``
    everywhere = [cfg.model.layer_value("num_experts", i) for i in cfg.model.moe_layers()]
    tensors = [
        ("data", sizes.data, 16),
        ("world", sizes.world, wide * (1 + len(aux_names(cfg.balance)))),
        ("world", sizes.world, wide),
        ("stage", sizes.world // sizes.pp, sum(8 * (n + 1) for n in loads)),
        ("pp", sizes.pp, sum(8 * (n + 1 + POSITIONS) for n in everywhere)),
    ]
    found: dict[str, Traffic] = {}
    for name, ranks, size in tensors:
        if ranks > 1 and size:
            found.setdefault(name, Traffic()).add("all_reduce", 2 * size * (ranks - 1) / ranks)
    return found
