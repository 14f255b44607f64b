"""A built model becomes its parallel form. The one place where a model meets a mesh; the order matters."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moetrain.config.schema import Config, ModelConfig
from moetrain.config.sizes import Sizes
from moetrain.model.block import Block
from moetrain.model.decoder import Decoder
from moetrain.model.init import init_rule
from moetrain.moe.dispatch import Dispatcher, build_dispatcher
from moetrain.moe.experts import Experts
from moetrain.moe.layer import MoELayer
from moetrain.parallel import context, tensor
from moetrain.parallel.freeze import freeze
from moetrain.parallel.fsdp import shard
from moetrain.parallel.mesh import ParallelDims
from moetrain.parallel.pipeline import Pipeline, StagePart
from moetrain.parallel.run import OneStage, Runner
from moetrain.parallel.stages import Stage, all_stages

# Which dimension of each expert parameter (E, ...) expert tensor parallelism splits: the inner width F; and of the
# output's bias (E, D), which every rank adds for its stretch of the partial outputs, the width D.
INNER = {"w13": 2, "w2": 2, "b13": 2, "b2": 1}
# The part of a tensor that a rank holds.
Box: TypeAlias = tuple[slice, ...]
# Most threads that draw initial values: more would draw faster than one thread delivers, and each may hold a matrix.
DRAWERS = 16


def build_parallel(cfg: Config, dims: ParallelDims, device: torch.device) -> Runner:
    """The model of ``cfg`` on ``device``, spread by ``dims``, initialised from ``cfg.seed`` and ready to run.

    Built on the meta device, so that no rank ever holds the whole model; the initial value of a weight depends on the
    seed and the weight's name alone, so every mapping starts from the same model.
    """
    parts = build_parts(cfg, dims)
    for part in parts:
        _allocate(part, device, cfg.parallel.offload == "all")
        initialize(part, cfg.model, cfg.seed)
    if dims.sizes.pp == 1:
        return OneStage(parts[0], device)
    mine = stages_here(cfg, dims)
    return Pipeline(parts, mine, cfg, dims, device)  # type: ignore[arg-type]


def _allocate(part: Decoder, device: torch.device, offload: bool) -> None:
    """Give ``part`` memory. Offloaded parameters must be in host memory, or FSDP refuses them; buffers never are."""
    part.to_empty(device="cpu" if offload else device)
    for module in part.modules() if offload else ():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def stages_here(cfg: Config, dims: ParallelDims) -> list[Stage]:
    """The pipeline stages of this rank, in ascending order."""
    mine = dims.sizes.stages_of_rank(dims.rank("pp"), cfg.parallel.schedule)
    stages = all_stages(cfg, dims.sizes)
    return [stages[i] for i in mine]


def build_parts(cfg: Config, dims: ParallelDims) -> list[Decoder]:
    """This rank's part of the model on the meta device, made parallel: the whole decoder, or its pipeline stages."""
    parts: list[Decoder]
    if dims.sizes.pp == 1:
        with torch.device("meta"):
            parts = [Decoder(cfg.model, cfg.balance, cfg.experts).to(weight_dtype(cfg))]
    else:
        parts = [build_stage(cfg, stage) for stage in stages_here(cfg, dims)]
    for part in parts:
        parallelize(part, cfg, dims)
    return parts


def build_stage(cfg: Config, stage: Stage) -> StagePart:
    """The whole of ``stage``, on the meta device, not parallel yet."""
    with torch.device("meta"):
        part = StagePart(cfg.model, cfg.balance, cfg.experts, stage.layers, stage.first, stage.last)
        return part.to(weight_dtype(cfg))


def weight_dtype(cfg: Config) -> torch.dtype:
    """In which weights are kept."""
    return torch.float64 if cfg.train.precision == "float64" else torch.float32


def parallelize(model: Decoder, cfg: Config, dims: ParallelDims) -> None:
    """Make ``model`` (on the meta device) parallel in place."""
    spread(model, cfg, dims)
    if on_its_own(cfg, dims.sizes):
        return
    # 7. FSDP last: it takes the parameters over, whatever they have become.
    options = cfg.parallel
    shard(
        model, dims.fsdp_mesh, dims.experts["edp"], cfg.train.precision,
        reshard=dims.sizes.reshards(options), prefetch=options.prefetch, offload=options.offload == "all",
    )  # fmt: skip


def on_its_own(cfg: Config, sizes: Sizes) -> bool:
    """Whether a rank holds its stage alone and computes with the weights as they are: there is nothing to gather, to
    round or to reduce, so parameters stay plain tensors, and FSDP, which would copy them all the same, is left out."""
    return sizes.world == sizes.pp and cfg.train.precision != "bf16" and cfg.parallel.offload != "all"


def spread(model: Decoder, cfg: Config, dims: ParallelDims) -> None:
    """All that makes ``model`` parallel before FSDP: each rank has its part of the computation."""
    sizes = dims.sizes
    # 1. Tensor parallelism, because all that follows must see the final shapes of the parameters.
    if sizes.tp > 1:
        tensor.split(model, dims.weights["tp"])
    # 2. Context parallelism: attention's core; no parameters.
    if sizes.cp > 1:
        context.split(model, dims.group("cp"), cfg.parallel.context)
    # 3. Experts: each ep rank keeps its slice, and dispatchers learn their groups. Layers with equally many experts
    #    share a dispatcher.
    dispatchers: dict[int, Dispatcher[Any]] = {}
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            _split_experts(layer, cfg, dims, dispatchers)
            router: Any = layer.router
            router.group = dims.stage_group
            if sizes.cp * sizes.tp > 1:
                router.sequence_group, router.own_index = dims.sequence_group, dims.own_index
    # 4. Recompute: wraps the computation that FSDP's hooks will surround.
    for block in model.layers.values():
        assert isinstance(block, Block)
        block.recompute = cfg.train.recompute
        # 5. Compile: attention and norms only; the routed part has data-dependent shapes.
        if cfg.train.compile:
            block.compile_dense()
    # 6. Freeze: once parameters are what they will be, and before FSDP, which asks each whether it is trained.
    freeze(model, cfg.train.freeze)


def _split_experts(layer: MoELayer, cfg: Config, dims: ParallelDims, dispatchers: dict[int, Dispatcher[Any]]) -> None:
    experts = layer.experts
    assert isinstance(experts, Experts)
    router: Any = layer.router
    etp, n_experts = dims.sizes.etp, router.n_experts
    if n_experts not in dispatchers:
        dispatchers[n_experts] = build_dispatcher(cfg.dispatch, n_experts, dims.group("ep"), dims.group("etp"))
        dispatchers[n_experts].overlap = cfg.experts.overlap
    layer.dispatcher = dispatchers[n_experts]
    if etp > 1:
        width = cfg.model.dim // etp
        experts.split_group = dims.group("etp")
        experts.output_slice = slice(dims.rank("etp") * width, (dims.rank("etp") + 1) * width)
    if on_its_own(cfg, dims.sizes):
        return  # where FSDP makes DTensors of the others, these must be some too: one optimizer takes them all
    mesh = dims.experts["ep", "etp"] if etp > 1 else dims.experts["ep"]
    for name, p in list(experts.named_parameters(recurse=False)):
        placements: list[Placement] = [Shard(0), Shard(INNER[name])] if etp > 1 else [Shard(0)]
        local = p.detach()
        for i, placement in enumerate(placements):
            local = local.chunk(mesh.size(i), dim=placement.dim)[mesh.get_local_rank(i)]  # type: ignore[attr-defined]
        local = local.contiguous()
        new = DTensor.from_local(local, mesh, placements, run_check=False, shape=p.shape, stride=p.stride())
        experts.register_parameter(name, nn.Parameter(new))


@torch.no_grad()
def initialize(model: nn.Module, cfg: ModelConfig, seed: int) -> None:
    """Fill every parameter by its rule (``model.init``) and reset every buffer.

    A parameter's values come from a generator seeded by (seed, its name); an expert's by (seed, name, expert), so that
    a rank draws only the experts it holds. Drawn by some threads, with room for a drawing of each and one more.
    """
    for module in model.modules():
        reset = getattr(module, "reset_buffers", None)
        if reset is not None:
            reset()
    threads = min(torch.get_num_threads(), DRAWERS)
    free = [torch.empty(0) for _ in range(threads + 1)]  # fresh memory for each drawing takes as long as drawing
    waiting: deque[tuple[Tensor, Box, Future[Tensor]]] = deque()

    def deliver() -> None:
        to, box, drawing = waiting.popleft()
        drawn = drawing.result()
        to.copy_(drawn[box])
        free.append(drawn)

    with ThreadPoolExecutor(threads) as pool:
        for fqn, p in model.named_parameters():
            kind, value = init_rule(fqn, cfg)
            if kind == "constant":
                (p.to_local() if isinstance(p, DTensor) else p).fill_(value)
                continue
            for to, box, shape, name in _drawings(fqn, p):
                waiting.append((to, box, pool.submit(_normal, free.pop(), shape, value, seed, name)))
                if not free:
                    deliver()
        while waiting:
            deliver()


def _drawings(fqn: str, p: Tensor) -> Iterator[tuple[Tensor, Box, tuple[int, ...], str]]:
    """What is drawn for a parameter: (where it goes, the part of it that goes there, its shape, its name)."""
    local, shape, box = p, tuple(p.shape), tuple(slice(0, n) for n in p.shape)
    if isinstance(p, DTensor):
        local = p.to_local()
        local_shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
        box = tuple(slice(o, o + n) for o, n in zip(offset, local_shape, strict=True))
    if ".experts." in fqn:
        for i, e in enumerate(range(box[0].start, box[0].stop)):
            yield local[i], box[1:], shape[1:], f"{fqn}[{e}]"
    elif local.numel():
        yield local, box, shape, fqn


def _normal(out: Tensor, shape: tuple[int, ...], std: float, seed: int, name: str) -> Tensor:
    """``out``, with ``shape`` and the values of ``name``."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return out.resize_(shape).normal_(0.0, std, generator=generator)
