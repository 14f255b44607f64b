"""Offload where host and device are two: on a GPU, that is. Here the meta device stands for one of them."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from moetrain_launch.fork import run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from moetrain import config
from moetrain.config.check import check_mapping
from moetrain.model.decoder import Decoder
from moetrain.moe.dispatch.lsh import LshDispatcher, LshOptions
from moetrain.moe.layer import MoELayer
from moetrain.optim import offload
from moetrain.optim.offload import _moved, keep_state_on_host
from moetrain.parallel.apply import build_parallel
from moetrain.parallel.mesh import ParallelDims
from moetrain.train.metrics import compression_metrics
from moetrain.train.routing import RoutingWatch
from moetrain.train.step import all_loads
from tests.distributed.toy_run import BASE


def devices_of(where: str) -> tuple[set[str], set[str]]:
    cfg = config.load([*BASE, "run_dir=none", "balance=[aux_loss]", f"parallel.offload={where}"])
    dims = ParallelDims.build(check_mapping(cfg, 1), "cpu")
    model = build_parallel(cfg, dims, torch.device("meta")).model
    return {p.device.type for p in model.parameters()}, {b.device.type for b in model.buffers()}


@pytest.mark.parametrize(("where", "parameters"), [("all", "cpu"), ("none", "meta")])
def test_parameters_begin_where_fsdp_looks_for_them(where: str, parameters: str) -> None:
    """FSDP refuses offloaded parameters that are on the device, at their first use."""
    assert run_ranks(1, devices_of, where) == [({parameters}, {"meta"})]


def figures() -> tuple[Any, ...]:
    cfg = config.load([*BASE, "run_dir=none", "dispatch=lsh"])
    model = Decoder(cfg.model, cfg.balance, cfg.experts)
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(p.to("meta")))
    world = dist.group.WORLD
    assert world is not None
    for i, layer in enumerate(m for m in model.modules() if isinstance(m, MoELayer)):
        layer.dispatcher = LshDispatcher(LshOptions(), 8, world, None)
        layer.dispatcher.tally = {i + 1: torch.tensor([8.0, 4.0, 1.0, 4.0], dtype=torch.float64)}
        layer.router.counts_E += 1  # type: ignore[operator]
    dims: Any = SimpleNamespace(
        sizes=SimpleNamespace(pp=2), dense=SimpleNamespace(device_type="cpu"), stage_group=world, group=lambda _: world
    )
    data: Any = SimpleNamespace(domains=["a"], sources=["a"])
    watch = RoutingWatch(model, cfg.model, data, dims, cfg.train.seq_len)
    counts = [loads.tolist() for loads in all_loads(model, cfg.model, dims, 0).counts.values()]
    return counts, watch.counts_LGE.device.type, compression_metrics(model, cfg)


def test_what_is_counted_stays_on_the_device() -> None:
    """Loads, routing and compression, whose counts are no parameters: the other device has these."""
    [(counts, watched, compression)] = run_ranks(1, figures)
    assert counts == [[1] * 8] * 3
    assert watched == "cpu"
    assert compression["lsh_sent_share"] == 0.5 and compression["lsh_error_by_layer"] == [0.5] * 3


def moved() -> tuple[str, tuple[Any, ...], list[float]]:
    host = DTensor.from_local(torch.arange(4.0), DeviceMesh("cpu", [0]), [Shard(0)], run_check=False)
    gpu = dataclasses.replace(host._spec, mesh=DeviceMesh("cuda", [0], _init_backend=False))
    state = _moved(DTensor(host.to_local(), gpu, requires_grad=False), torch.device("cpu"))
    assert isinstance(state, DTensor)
    return state.device_mesh.device_type, state.placements, state.to_local().tolist()


def test_optimizer_state_stays_in_host_memory_also_on_a_mesh_of_gpus() -> None:
    """Where there is no GPU, a way through it is an error."""
    assert run_ranks(1, moved) == [("cuda", (Shard(0),), [0.0, 1.0, 2.0, 3.0])]


def test_state_that_is_loaded_goes_to_host_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch takes it to the device of its parameter."""
    p = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([p])
    keep_state_on_host(optimizer)
    p.grad = torch.ones(4)
    optimizer.step()
    moves: list[tuple[list[int], bool]] = []
    monkeypatch.setattr(offload, "_move", lambda _, ps, to_host: moves.append(([id(p) for p in ps], to_host)))
    optimizer.load_state_dict(optimizer.state_dict())
    assert moves == [([id(p)], True)]
