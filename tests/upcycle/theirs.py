"""Tiny models of transformers, before and after upcycling, in float64: the reference is their forward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moetrain.config.registry import UPCYCLERS
from moetrain.convert.export import export_hf
from moetrain.convert.open import open_weights
from moetrain.moe.options import as_options
from moetrain.upcycle.method import Context, Model, Upcycled
from tests.model.hf_models import float64_throughout, make, tokens

# a dense model with each activation
DENSE = {
    "swiglu": "llama",
    "geglu": "gemma",
    "reglu": "mistral-full-reglu",
    "gelu": "arcee-gelu-yarn",
    "relu2": "arcee",
}


def saved(name: str, folder: Path, seed: int = 0) -> Path:
    """transformers' random model ``name`` in float64, as it saves it."""
    make(name, torch.float64, seed).save_pretrained(folder)  # type: ignore[operator]
    return folder


def logits(folder: Path, ids: Tensor | None = None) -> Tensor:
    """What transformers computes of the model in ``folder``, float64 throughout."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, trust_remote_code=True)
    with torch.no_grad(), float64_throughout():  # made anew, for rotary tables in float64
        model = type(loaded)._from_config(loaded.config, dtype=torch.float64, attn_implementation="eager")
        model.load_state_dict(loaded.state_dict())
        model.set_experts_implementation("eager") if hasattr(model, "set_experts_implementation") else None
        return model(tokens() if ids is None else ids).logits


def read_parent(folder: Path) -> Model:
    """The model in ``folder``, to start from."""
    opened = open_weights(folder)
    return Model(opened.model, opened.source, str(folder))


def tensors_of(of: Upcycled | Model) -> dict[str, Tensor]:
    """All tensors, each made whole."""
    model = of.model if isinstance(of, Upcycled) else of
    return {name: model.read(name) for name in model.source.specs}


def apply(method: str, parents: Sequence[Path | Model], *, ids: Tensor | None = None, **options: Any) -> Upcycled:
    """The method called ``method``, with the options of its class, on saved models."""
    models = [parent if isinstance(parent, Model) else read_parent(parent) for parent in parents]
    context = Context(0) if ids is None else Context(0, lambda: [ids])
    entry = UPCYCLERS.get(method)
    return entry.build(as_options(UPCYCLERS, options, method), models, context)  # type: ignore[no-any-return]


def exported(made: Upcycled, out: Path) -> Path:
    """``made`` as a folder that transformers loads."""
    export_hf(made.model.cfg, made.model.source, out)
    return out


def assert_same(a: Tensor, b: Tensor) -> None:
    """Equal but for the rounding of float64."""
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
