"""One micro-batch through one pipeline stage on the meta device, forward and backward: what it keeps and what it sends.

The modules are those of a run, made parallel but for FSDP, which changes neither; weights are in the dtype in which a
run computes with them. Nothing is estimated: what autograd saves is looked at, and so is every collective.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from moe_kernels import PACKAGES, choose_backend
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moetrain.config.errors import ConfigError
from moetrain.config.schema import Config
from moetrain.moe.experts import Experts
from moetrain.parallel.apply import build_stage, spread, weight_dtype
from moetrain.parallel.fsdp import left_alone
from moetrain.parallel.mesh import ParallelDims
from moetrain.parallel.pipeline import StagePart
from moetrain.parallel.stages import Stage
from moetrain.planner.balanced import Balancer
from moetrain.planner.fused import fused_kernels, scratch
from moetrain.planner.groups import Meter, Traffic


@dataclass(frozen=True)
class StageRun:
    """Of one micro-batch. kept: bytes of activations that live from its forward to its backward. working: bytes beside
    these at the worst moment, as of a block that is computed again; gradients of parameters left out. traffic: by
    group, forward and backward."""

    kept: int
    working: int
    traffic: dict[str, Traffic]


def compute_dtype(cfg: Config) -> torch.dtype:
    """The dtype of activations."""
    return torch.bfloat16 if cfg.train.precision == "bf16" else weight_dtype(cfg)


def run_stage(cfg: Config, dims: ParallelDims, meter: Meter, stage: Stage, balancer: Balancer, device: str) -> StageRun:
    """Run ``stage`` as it would run on ``device`` ("cuda" or "cpu")."""
    part = build_stage(cfg, stage)
    spread(part, cfg, dims)
    _in_compute_dtype(part, cfg, dims)
    for experts in part.modules():
        if isinstance(experts, Experts):
            experts.backend = _kernels(cfg, device, experts)
    kept, live = _Kept(part), Live(part)
    for p in (p for p in part.parameters() if p.requires_grad):
        p.register_post_accumulate_grad_hook(_forget)
    with (
        meter.measure() as traffic,
        fused_kernels(device),
        torch.autograd.set_multithreading_enabled(False),
        live,
    ):
        balancer.install(part, lambda name, planned: traffic[name].merge(planned))
        inputs, arguments = _inputs(cfg, dims, stage, part)
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda x: x):
            outputs = part(*inputs, **arguments)
        if dims.sizes.pp > 1:  # a pipeline holds on to both
            for x in (*inputs, *outputs):
                kept.pack(x)
        size = kept.bytes()
        kept.seen.clear()
        ends = [x for x in outputs if x.requires_grad]  # a first stage of dense layers adds nothing to the carry
        torch.autograd.backward(ends, [torch.empty_like(x) for x in ends])
    return StageRun(size, max(0, live.most - size), traffic)


def _forget(p: Tensor) -> None:
    """Of a parameter whose gradient has come: in a run it is FSDP's now."""
    p.grad = None


class Live(TorchDispatchMode):
    """While active, keeps count of the bytes of all tensors that there are, but parameters and buffers of ``part``.
    most: at the worst moment."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.known = _owned(part)
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, Tensor):
                self._see(_storage(x))
        self.most = max(self.most, self.now + scratch(func.name(), args))
        return made

    def _see(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            weakref.finalize(storage, self._gone, key, size)
            self.now += size
            self.most = max(self.most, self.now)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def _kernels(cfg: Config, device: str, experts: Experts) -> str:
    """The expert kernels of a run, which have shapes without data; those of a package do not, and grouped_mm's stand
    for them, as auto's do where the fastest are asked for. Raises ConfigError where there are none."""
    (_, _, inner, dim), asked, dtype = experts.w13.shape, cfg.experts.backend, compute_dtype(cfg)
    asked = "auto" if asked == "fastest" else asked
    try:
        biased, fp8 = experts.b13 is not None, cfg.experts.fp8
        name, _ = choose_backend(asked, device, dtype, dim, inner, experts.activation, biased, fp8)
        return choose_backend("grouped_mm" if name in PACKAGES else name, "meta", dtype, dim, inner, fp8=fp8)[0]
    except ValueError as error:
        raise ConfigError(f"experts.backend={cfg.experts.backend}, in a dry run for device {device}: {error}") from None


def _in_compute_dtype(part: StagePart, cfg: Config, dims: ParallelDims) -> None:
    """What FSDP's mixed precision makes of the parameters, but those that it leaves alone."""
    alone = left_alone(part, dims.sizes.edp, cfg.parallel.offload == "all")
    dtype = compute_dtype(cfg)
    for module in part.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p not in alone and p.dtype != dtype:
                module.register_parameter(name, nn.Parameter(p.detach().to(dtype), p.requires_grad))


def _inputs(cfg: Config, dims: ParallelDims, stage: Stage, part: StagePart) -> tuple[list[Tensor], dict[str, Any]]:
    """What a pipeline gives to the stage."""
    t, s = cfg.train, dims.sizes
    B, S = t.micro_batch, t.seq_len // s.cp

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device="meta")

    def received(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

    arguments: dict[str, Any] = {"seq_len": t.seq_len, "targets_BS": integers(B, S) if stage.last else None}
    if cfg.data.document_mask:
        arguments["document_BN"] = integers(B, t.seq_len)
    if stage.first:
        return [integers(B, S)], arguments
    dtype = compute_dtype(cfg)
    inputs = [received(B, S // s.tp, cfg.model.dim, dtype=dtype)]
    if part.aux_names:
        inputs.append(received(len(part.aux_names), dtype=torch.promote_types(dtype, torch.float32)))
    return inputs, arguments


class _Kept:
    """The memory that saved tensors hold on to, each piece once; parameters' and buffers' left out."""

    def __init__(self, part: StagePart) -> None:
        self.owned = _owned(part)
        self.seen: dict[int, Any] = {}

    def pack(self, x: Tensor) -> Tensor:
        storage = _storage(x)
        if storage._cdata not in self.owned:
            self.seen[storage._cdata] = storage  # held, so that no other gets its address
        return x

    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.seen.values())


def _owned(part: nn.Module) -> set[int]:
    return {_storage(x)._cdata for x in (*part.parameters(), *part.buffers())}


def _storage(x: Tensor) -> Any:
    return (x.to_local() if isinstance(x, DTensor) else x).untyped_storage()
