"""Training state as DCP sees it: mappings of global names to tensors, sharded as they lie."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

# The nested form numbers the parameter groups from 0 on every pipeline stage, and stages would overwrite each other.
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def gather_state(model: nn.Module, optimizer: torch.optim.Optimizer, train: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds, or what one is to be loaded into; tensors are the live ones, nothing is copied.

    {"model": name -> parameter or persistent buffer,
     "optim": "state.<parameter>.<quantity>" -> tensor,
     "train": ``train``: numbers, text, small tensors and containers of these, equal on all ranks}

    Hyperparameters of the optimizer are not state: they come from the config. Fresh optimizers get their zero state.
    """
    fresh = not optimizer.state
    model_state = get_model_state_dict(model)
    flat = get_optimizer_state_dict(model, optimizer, options=FLAT)
    if fresh:
        # torch makes the state by a step with learning rate 0, and counts it.
        for state in optimizer.state.values():
            if "step" in state:
                state["step"].zero_()
        flat = get_optimizer_state_dict(model, optimizer, options=FLAT)
    optim_state = {key: value for key, value in flat.items() if key.startswith("state.")}
    decode(encode(train))  # a value that could not be read back is an error now, not at the next resume
    return {"model": model_state, "optim": optim_state, "train": train}


def apply_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Put a loaded ``state`` (of ``gather_state`` on this model and optimizer) in place; return its "train" part."""
    set_model_state_dict(model, state["model"])
    now = get_optimizer_state_dict(model, optimizer, options=FLAT)
    settings = {key: value for key, value in now.items() if not key.startswith("state.")}
    set_optimizer_state_dict(model, optimizer, {**state["optim"], **settings}, options=FLAT)
    train: dict[str, Any] = state["train"]
    return train


def to_cpu(state: dict[str, Any]) -> dict[str, Any]:
    """A copy in host memory that training cannot change: tensors of the nested mappings; "train" is serialised."""
    copy: dict[str, Any] = {}
    for key, value in state.items():
        if key == "train":
            copy[key] = encode(value)
        elif isinstance(value, dict):
            copy[key] = to_cpu(value)
        else:
            copy[key] = value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
    return copy


def encode(value: Any) -> bytes:
    """``value`` as bytes that ``decode`` reads."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def decode(data: bytes) -> Any:
    """The value of ``encode``; only plain data is accepted, never code."""
    return torch.load(io.BytesIO(data), weights_only=True)
