"""The model as DeepSpeed's ZeRO takes it: whole dense parameters on every rank, this rank's experts, marked as such.

DeepSpeed knows experts only by its own classes and by attributes of their parameters. These are private hooks of one
version, which pyproject.toml pins; ``tests/distributed/test_deepspeed.py`` would see another's differences.
"""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from moetrain.config.schema import Config
from moetrain.model.decoder import Decoder
from moetrain.moe.dispatch import build_dispatcher
from moetrain.moe.experts import Experts
from moetrain.moe.layer import MoELayer
from moetrain.parallel.apply import initialize
from moetrain.parallel.mesh import ParallelDims


def import_deepspeed(device: torch.device) -> Any:
    """The package ``deepspeed``, set up for ``device`` and on top of the process group that there is."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # read at import
    if device.type == "cuda":  # it takes the one for the other; where Slurm shows a task its GPU alone, they differ
        os.environ["LOCAL_RANK"] = str(device.index)
    import deepspeed
    from deepspeed import ops

    # It tells of every group that it makes, and warns of any optimizer that is not its own.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    # On CPU it would compile an all-reduce through shared memory for minutes; gloo does as well.
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    return deepspeed


def build_zero(cfg: Config, dims: ParallelDims, device: torch.device) -> Decoder:
    """The model of ``cfg`` on ``device``, with the initial weights that every mapping has; experts split over ep.

    Parameters are plain tensors: whole ones, and of experts those that this rank owns.
    """
    with torch.device("meta"):
        model = Decoder(cfg.model, cfg.balance, cfg.experts)
    mesh = dims.experts["ep"]
    layers = [m for m in model.modules() if isinstance(m, MoELayer)]
    for layer in layers:
        _split(layer, cfg, mesh)
        router: Any = layer.router
        router.group = dims.stage_group
    for block in model.layers.values():
        block.recompute = cfg.train.recompute  # type: ignore[assignment]
    model.to_empty(device=device)
    initialize(model, cfg.model, cfg.seed)
    for layer in layers:
        assert isinstance(layer.experts, Experts)
        for name, p in list(layer.experts.named_parameters(recurse=False)):
            assert isinstance(p, DTensor)
            layer.experts.register_parameter(name, nn.Parameter(p.to_local()))
        if mesh.size() > 1:
            _mark(layer.experts, layer.router.n_experts, mesh)  # type: ignore[arg-type]
    return model


def is_expert(p: nn.Parameter) -> bool:
    """Whether ``p`` is a part of the experts, which only the ranks of this rank's edp group have."""
    return getattr(p, "allreduce", True) is False


def share_gathers(model: nn.Module) -> None:
    """ZeRO 3: whoever gathers a MoE layer for its backward pass gathers its router too.

    ZeRO gathers a module's parameters when the gradient of its output arrives, and finds output tensors in tuples only;
    a router's decision is no tuple.
    """
    from deepspeed.runtime.zero import register_external_parameter

    for layer in model.modules():
        if isinstance(layer, MoELayer):
            for p in layer.router.parameters():
                register_external_parameter(layer, p)


def _split(layer: MoELayer, cfg: Config, mesh: DeviceMesh) -> None:
    """Keep this ep rank's slice of the experts (on the meta device); DTensors, so that ``initialize`` knows which."""
    router: Any = layer.router
    layer.dispatcher = build_dispatcher(cfg.dispatch, router.n_experts, mesh.get_group())
    layer.dispatcher.overlap = cfg.experts.overlap
    for name, p in list(layer.experts.named_parameters(recurse=False)):
        local = p.detach().chunk(mesh.size(), dim=0)[mesh.get_local_rank()]
        own = nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], run_check=False))
        layer.experts.register_parameter(name, own)


def _mark(experts: Experts, n_experts: int, mesh: DeviceMesh) -> None:
    """Tell DeepSpeed that ``experts`` are split over the ranks of ``mesh``: what its AutoEP does to its own layers.

    Its other mark, the class MoE, is refused by ZeRO 3; attributes alone make it treat them as replicas, in silence.
    """
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.utils import groups

    ep, name = mesh.size(), f"ep_size_{mesh.size()}"

    def set_deepspeed_parallelism(self: Any, data_before_experts: bool = False, **_: Any) -> None:
        if name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(ep, use_data_before_expert_parallel_=data_before_experts)
        theirs = torch.distributed.get_process_group_ranks(groups._get_expert_parallel_group(name))
        ours = torch.distributed.get_process_group_ranks(mesh.get_group())
        if theirs != ours:
            raise RuntimeError(f"DeepSpeed's expert ranks {theirs} are not moetrain's {ours}")

    body = {"set_deepspeed_parallelism": set_deepspeed_parallelism}
    experts.__class__ = type("ZeroExperts", (Experts, AutoEPMoELayer), body)
    marks = {"ep_size": ep, "num_experts": n_experts, "num_local_experts": n_experts // ep}
    for key, value in {**marks, "expert_group_name": name, "ep_group_name": name}.items():
        setattr(experts, key, value)
    for p in experts.parameters():
        p.allreduce = False  # type: ignore[attr-defined]
        p.group_name = name  # type: ignore[attr-defined]
        p.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
        p.ds_zero_partition_group_name = name  # type: ignore[attr-defined]
