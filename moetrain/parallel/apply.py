"""A built model becomes its parallel form. The one place where a model meets a mesh; the order matters."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moetrain.config.schema import Config, ModelConfig
from moetrain.model.block import Block
from moetrain.model.decoder import Decoder
from moetrain.model.init import init_rule
from moetrain.moe.dispatch import build_dispatcher
from moetrain.moe.experts import Experts
from moetrain.moe.layer import MoELayer
from moetrain.parallel.fsdp import shard
from moetrain.parallel.mesh import ParallelDims


def build_parallel(cfg: Config, dims: ParallelDims, device: torch.device) -> Decoder:
    """The model of ``cfg`` on ``device``, sharded by ``dims`` and initialised from ``cfg.seed``.

    Built on the meta device, so that no rank ever holds the whole model; the initial value of a weight depends on the
    seed and the weight's name alone, so every mapping starts from the same model.
    """
    dtype = torch.float64 if cfg.train.precision == "float64" else torch.float32
    with torch.device("meta"):
        model = Decoder(cfg.model, cfg.balance, cfg.experts).to(dtype)
    parallelize(model, cfg, dims)
    model.to_empty(device=device)
    initialize(model, cfg.model, cfg.seed)
    return model


def parallelize(model: Decoder, cfg: Config, dims: ParallelDims) -> None:
    """Make ``model`` (on the meta device) parallel in place."""
    # 1. Experts: each ep rank keeps its slice, and dispatchers learn their group. First, because all that follows must
    #    see the final shapes of the parameters.
    ep_mesh = dims.experts["ep"]
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            _split_experts(layer, cfg, ep_mesh)
            router: Any = layer.router
            router.group = dims.stage_group
    # 2. Recompute: wraps the computation that FSDP's hooks will surround.
    for block in model.layers.values():
        assert isinstance(block, Block)
        block.recompute = cfg.train.recompute
        # 3. Compile: attention and norms only; the routed part has data-dependent shapes.
        if cfg.train.compile:
            block.compile_dense()
    # 4. FSDP last: it takes the parameters over, whatever they have become.
    shard(model, dims.fsdp_mesh, dims.experts["edp"], cfg.train.precision, dims.sizes.reshards(cfg.parallel))


def _split_experts(layer: MoELayer, cfg: Config, ep_mesh: dist.DeviceMesh) -> None:
    experts = layer.experts
    assert isinstance(experts, Experts)
    n, rank = ep_mesh.size(), ep_mesh.get_local_rank()
    router: Any = layer.router
    layer.dispatcher = build_dispatcher(cfg.dispatch, router.n_experts, ep_mesh.get_group())
    for name, p in list(experts.named_parameters(recurse=False)):
        local = p.detach().chunk(n, dim=0)[rank]
        experts.register_parameter(name, nn.Parameter(DTensor.from_local(local, ep_mesh, [Shard(0)], run_check=False)))


@torch.no_grad()
def initialize(model: nn.Module, cfg: ModelConfig, seed: int) -> None:
    """Fill every parameter by its rule (``model.init``) and reset every buffer.

    A parameter's values come from a generator seeded by (seed, its name); an expert's by (seed, name, expert), so that
    a rank draws only the experts it holds.
    """
    for module in model.modules():
        reset = getattr(module, "reset_buffers", None)
        if reset is not None:
            reset()
    for fqn, p in model.named_parameters():
        kind, value = init_rule(fqn, cfg)
        local = p.to_local() if isinstance(p, DTensor) else p
        if kind == "constant":
            local.fill_(value)
            continue
        shape, offset = tuple(p.shape), (0,) * p.dim()
        local_shape = shape
        if isinstance(p, DTensor):
            local_shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
        box = tuple(slice(o, o + n) for o, n in zip(offset, local_shape, strict=True))
        if ".experts." in fqn:
            for i, e in enumerate(range(box[0].start, box[0].stop)):
                local[i].copy_(_normal(shape[1:], value, seed, f"{fqn}[{e}]")[box[1:]])
        elif local.numel():
            local.copy_(_normal(shape, value, seed, fqn)[box])


def _normal(shape: tuple[int, ...], std: float, seed: int, name: str) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)
