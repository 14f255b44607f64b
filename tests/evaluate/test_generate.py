"""Text from a model with a cache: what the model says without one, and what transformers says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import TopPLogitsWarper

from moetrain.convert.open import open_weights
from moetrain.evaluate.generate import draw, nucleus, tokens_after
from moetrain.evaluate.opened import build as build_from
from moetrain.model.cache import Cache
from tests.model.hf_models import make, tokens
from tests.model.test_decoder import TINY, build, ids, tiny


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("steps", [[7, *[1] * 9], [1] * 16, [3, 6, 1, 6]])
def test_bit_by_bit_the_logits_are_those_of_the_whole(name: str, steps: list[int]) -> None:
    """Grouped and latent attention, sinks, and a window of 5 that the text outgrows; chunks longer than the window."""
    cfg = tiny(name)
    model = build(cfg, {}).eval()
    text = ids(cfg)
    whole, _ = model(text)
    with Cache(model) as cache:
        parts = torch.cat([cache.read(part) for part in text.split(steps, dim=1)], dim=1)
    torch.testing.assert_close(parts, whole, rtol=1e-11, atol=1e-11)
    assert torch.equal(model(text)[0], whole), "the model is as it was"


def test_a_window_bounds_what_is_kept() -> None:
    model = build(tiny("tiny-gpt-oss"), {}).eval()
    with Cache(model) as cache:
        for part in ids(model.cfg).split(1, dim=1):
            cache.read(part)
        kept = [block.attention.core.k_BPGd.shape[1] for block in model.layers.values()]  # type: ignore[union-attr]
    assert kept == [4, 16]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (0.9, 0.7)])
def test_the_text_is_that_without_a_cache(name: str, temperature: float, top_p: float) -> None:
    model = build(tiny(name), {}).eval()
    prompt = ids(model.cfg, 1, 6)
    found = list(tokens_after(model, prompt[0].tolist(), 12, temperature, top_p, torch.Generator().manual_seed(3)))
    generator, text = torch.Generator().manual_seed(3), prompt
    for _ in range(12):
        text = torch.cat([text, draw(model(text)[0][0, -1], temperature, top_p, generator)[None]], dim=1)
    assert found == text[0, 6:].tolist() and len(set(found)) > 1


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "mistral"])
def test_greedy_text_is_transformers(name: str, tmp_path: Path) -> None:
    theirs = make(name).eval()
    theirs.save_pretrained(tmp_path)
    opened = open_weights(tmp_path)
    ours = build_from(opened.model, opened.source, torch.float32)
    prompt = tokens(1, 9)
    config = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **config)[0, 9:].tolist()  # type: ignore[operator]
    assert list(tokens_after(ours, prompt[0].tolist(), 10, 0, 1, torch.Generator())) == wanted


def test_the_nucleus_is_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    for top_p in (1e-6, 0.3, 0.7, 0.95, 1.0):
        logits = 3 * torch.randn(50, generator=generator, dtype=torch.float64)
        p = nucleus(logits.softmax(-1), top_p)
        kept = TopPLogitsWarper(top_p)(None, logits[None])[0].isfinite() if top_p < 1 else torch.ones(50).bool()  # type: ignore[arg-type]
        assert torch.equal(p > 0, kept)
        torch.testing.assert_close(p[kept], logits.softmax(-1)[kept])


def test_it_ends_before_the_token_that_ends_documents() -> None:
    model = build(tiny("tiny"), {}).eval()
    text = list(tokens_after(model, [1, 2, 3], 8, 0, 1, torch.Generator()))
    ended = list(tokens_after(model, [1, 2, 3], 8, 0, 1, torch.Generator(), eos_id=text[3]))
    assert ended == text[: text.index(text[3])]
