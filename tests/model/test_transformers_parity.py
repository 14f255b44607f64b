"""The decoder computes what transformers' classes compute: logits, every gradient, and which experts a token goes to.

Reference: transformers' own eager code, weights copied from it, for each published model family at tiny random size.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.config.schema import ExpertsConfig, ModelConfig
from moetrain.convert.family import family_named
from moetrain.convert.load import load_hf
from moetrain.model.decoder import Decoder
from moetrain.moe.layer import MoELayer
from tests.model.hf_models import MODELS, float64_throughout, make, tokens

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}


def build(cfg: ModelConfig, dtype: torch.dtype, backend: str = "auto") -> Decoder:
    balance = {"bias": {}} if family_named(cfg.family).zeros else {}
    return Decoder(cfg, balance, ExpertsConfig(backend=backend)).to(dtype)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item()


def choices(routers: list[nn.Module], ids_of: Callable[[tuple], Tensor]) -> list[Tensor]:
    """The expert ids that ``routers`` choose, sorted; filled by the next forward pass."""
    found: list[Tensor] = []
    for router in routers:
        router.register_forward_hook(lambda module, args, out: found.append(ids_of(out).sort(dim=-1).values))
    return found


def routers_of_theirs(model: nn.Module) -> list[nn.Module]:
    return [
        m
        for name, m in model.named_modules()
        if name.endswith((".mlp.gate", ".mlp.router", ".block_sparse_moe.router"))
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", MODELS)
def test_same_logits_gradients_and_choices(name: str, dtype: torch.dtype) -> None:
    ids = tokens()
    targets = ids.roll(-1, dims=1)
    with float64_throughout() if dtype == torch.float64 else contextlib.nullcontext():
        theirs = make(name, dtype)
        their_ids = choices(routers_of_theirs(theirs), lambda out: out[2])
        their_logits = theirs(ids).logits
        F.cross_entropy(their_logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    cfg = family_named(MODELS[name][0]).from_hf_config(theirs.config.to_dict())

    for backend, experts in (("math", "loop"), ("sdpa", "auto")):
        cfg.attention.backend = backend
        ours = build(cfg, dtype, experts)
        load_hf(ours, theirs.state_dict())
        our_ids = choices([m.router for m in ours.modules() if isinstance(m, MoELayer)], lambda out: out[0].ids_TK)
        logits, _ = ours(ids)
        loss, _ = ours(ids, targets)
        loss.backward()

        assert relative(logits, their_logits) < TOLERANCE[dtype]
        assert len(their_ids) == len(cfg.moe_layers())
        for mine, reference in zip(our_ids, their_ids, strict=False):
            assert torch.equal(mine, reference)
        # gradients have the names and shapes of weights, so they can be converted as weights are
        gradients = copy.deepcopy(ours)
        load_hf(gradients, gradients_of(theirs))
        for (fqn, p), reference in zip(ours.named_parameters(), gradients.parameters(), strict=True):
            assert p.grad is not None, fqn
            assert relative(p.grad, reference) < TOLERANCE[dtype], (fqn, backend)


def test_gemma_rounds_in_bfloat16_what_theirs_rounds() -> None:
    """The factor on the embeddings is rounded, 1 + w is not: the same bits."""
    theirs = make("gemma", torch.bfloat16)
    ours = build(family_named("gemma").from_hf_config(theirs.config.to_dict()), torch.bfloat16)
    load_hf(ours, theirs.state_dict())
    x = theirs.model.embed_tokens(tokens())
    assert torch.equal(ours.embedded(tokens()), x)
    assert torch.equal(ours.norm(x), theirs.model.norm(x))


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """For each tensor of the state: its gradient, or zeros for one that has none (a bias for choosing experts)."""
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    persistent = set(model.state_dict())
    return grads | {name: torch.zeros_like(b) for name, b in model.named_buffers() if name in persistent}
