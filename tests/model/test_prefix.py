"""Prefix masks through whole models: what transformers' classes compute under the same mask, pair by pair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moetrain.convert.family import family_named
from moetrain.convert.load import load_hf
from tests.model.hf_models import MODELS, float64_throughout, make, tokens
from tests.model.test_decoder import TINY, build, ids, tiny
from tests.model.test_transformers_parity import build as build_like
from tests.model.test_transformers_parity import relative

N = 17
MIXED = ("gpt_oss", "qwen2-some-windows")
LENGTHS = (9, 1, 17)  # of the prefix of each sequence


def prefixes(lengths: tuple[int, ...], seq_len: int = N) -> Tensor:
    """prefix_BN: bool (B, N)."""
    return torch.arange(seq_len) < torch.tensor(lengths)[:, None]


def explicit(window: int | None) -> Tensor:
    """What transformers adds to scores, (B, 1, N, N): 0 where a query sees a key, hugely negative elsewhere."""
    added = torch.full((len(LENGTHS), 1, N, N), torch.finfo(torch.float64).min, dtype=torch.float64)
    for b, length in enumerate(LENGTHS):
        for query in range(N):
            for key in range(N):
                if (key <= query or key < length) and (window is None or abs(query - key) < window):
                    added[b, 0, query, key] = 0
    return added


@pytest.mark.parametrize("backend", ["math", "sdpa"])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in MIXED])
def test_transformers_computes_the_same_under_the_mask(name: str, backend: str) -> None:
    """Logits and the gradient of the embedding in float64: grouped-query and latent attention, biases, clipping, a
    sliding window. Models that mix masks by layer are covered by the next test."""
    inputs = tokens(len(LENGTHS), N)
    with float64_throughout():
        theirs = make(name, torch.float64)
        window = getattr(theirs.config, "sliding_window", None) or None  # some say 0
        their_logits = theirs(inputs, attention_mask=explicit(window)).logits
        their_logits.square().sum().backward()
    cfg = family_named(MODELS[name][0]).from_hf_config(theirs.config.to_dict())
    cfg.attention.backend = backend  # type: ignore[assignment]
    ours = build_like(cfg, torch.float64, "loop")
    load_hf(ours, theirs.state_dict())
    logits, _ = ours(inputs, prefix_BN=prefixes(LENGTHS))
    logits.square().sum().backward()
    assert relative(logits, their_logits) < 1e-9
    assert relative(logits, ours(inputs)[0]) > 1e-3  # the prefix made a difference
    assert ours.embed is not None and ours.embed.weight.grad is not None
    assert relative(ours.embed.weight.grad, theirs.get_input_embeddings().weight.grad) < 1e-9


@pytest.mark.parametrize("backend", ["math", "sdpa"])
@pytest.mark.parametrize("name", TINY)
def test_nothing_after_the_prefix_is_seen_from_before_it(name: str, backend: str) -> None:
    """Which outputs change when one token does, in every kind of model: all of the prefix for a token of it, only later
    ones for a token after it. Nearer than the window of tiny-gpt-oss, which is 5 tokens either way."""
    cfg = tiny(name)
    cfg.n_layers, length, seq_len = 2, 9, N
    cfg.attention.backend = backend  # type: ignore[assignment]
    model, prefix = build(cfg, {}), prefixes((9,))
    text = ids(cfg, 1, seq_len)
    before, _ = model(text, prefix_BN=prefix)
    for changed in range(seq_len):
        other = text.clone()
        other[0, changed] = (other[0, changed] + 1) % cfg.vocab_size
        differs = ((model(other, prefix_BN=prefix)[0] - before).abs().amax(-1)[0] > 1e-9).tolist()  # more than rounding
        if changed >= length:
            assert not any(differs[:changed])
        else:
            near = [i for i in range(length) if abs(i - changed) < 5]
            assert all(differs[i] for i in near)
