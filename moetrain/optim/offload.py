"""Optimizer state in host memory: it is on the device only while its parameters are updated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain.optim.orthogonal import even_share

# Parameters that are updated at a time, in bytes of even shards: bounds the state that is on the device.
CHUNK_BYTES = 2**28


def keep_state_on_host(optimizer: torch.optim.Optimizer) -> None:
    """Change ``optimizer``'s ``step`` in place: it goes through the parameters chunk by chunk, brings a chunk's state
    to the device, updates, and puts the state back into (pinned) host memory. What it computes does not change.

    On a GPU this costs two transfers of the state per step and saves its memory; on a CPU nothing moves.
    """
    step, whole = optimizer.step, [list(group["params"]) for group in optimizer.param_groups]

    def step_by_chunks(closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        try:
            for number, parameters in enumerate(whole):
                for group in optimizer.param_groups:
                    group["params"] = []
                for chunk in _chunks(parameters):
                    optimizer.param_groups[number]["params"] = chunk
                    _move(optimizer, chunk, to_host=False)
                    step()
                    _move(optimizer, chunk, to_host=True)
        finally:
            for group, parameters in zip(optimizer.param_groups, whole, strict=True):
                group["params"] = parameters
        return loss

    optimizer.step = step_by_chunks  # type: ignore[method-assign, assignment]
    # torch takes state that is loaded to the parameters' device, all of it.
    optimizer.register_load_state_dict_post_hook(lambda o: _move(o, list(o.state), to_host=True))


def _chunks(parameters: list[Tensor]) -> list[list[Tensor]]:
    chunks: list[list[Tensor]] = [[]]
    size = 0
    for p in parameters:
        own = even_share(p) * p.element_size()
        if chunks[-1] and size + own > CHUNK_BYTES:
            chunks.append([])
            size = 0
        chunks[-1].append(p)
        size += own
    return [chunk for chunk in chunks if chunk]


def _move(optimizer: torch.optim.Optimizer, parameters: list[Tensor], to_host: bool) -> None:
    for p in parameters:
        device = torch.device("cpu") if to_host else _local(p).device
        for name, value in optimizer.state.get(p, {}).items():
            # The step count stays where the optimizer put it.
            if isinstance(value, Tensor) and value.dim() and _local(value).device != device:
                optimizer.state[p][name] = _moved(value, device)


def _moved(value: Tensor, device: torch.device) -> Tensor:
    local = _local(value).to(device)
    local = local.pin_memory() if device.type == "cpu" and torch.cuda.is_available() else local
    if not isinstance(value, DTensor):
        return local
    # Not by DTensor.from_local, which takes every part to the device of its mesh
    return DTensor(local, value._spec, requires_grad=False)


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t
