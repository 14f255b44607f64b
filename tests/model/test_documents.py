"""Document masks: a document among others in a sequence is computed as if it were alone."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from moetrain.model.places import Places
from tests.model.test_decoder import TINY, build, ids, tiny

N = 24
LENGTHS = ((1, 7, 12, 4), (24,), (9, 15))


def documents() -> Tensor:
    """document_BN of the documents of ``LENGTHS``."""
    return torch.tensor([[i for i, length in enumerate(row) for _ in range(length)] for row in LENGTHS])


@pytest.mark.parametrize("backend", ["math", "sdpa"])
@pytest.mark.parametrize("name", TINY)
def test_a_document_is_computed_as_if_it_were_alone(name: str, backend: str) -> None:
    """Logits, losses and gradients, under a window of 5 tokens and sinks (tiny-gpt-oss) and in latent attention
    (tiny-deepseek)."""
    cfg = tiny(name)
    cfg.attention.backend = backend  # type: ignore[assignment]
    model, alone = build(cfg, {}), build(cfg, {})
    tokens = ids(cfg, len(LENGTHS), N)
    targets = tokens.roll(-1, 1)
    logits, _ = model(tokens, document_BN=documents())
    losses, _ = model(tokens, targets, document_BN=documents(), reduction="none")
    loss, _ = model(tokens, targets, document_BN=documents())
    loss.backward()
    for row, lengths in enumerate(LENGTHS):
        for part in torch.arange(N).split(lengths):
            one, its_targets = tokens[row : row + 1, part], targets[row : row + 1, part]
            torch.testing.assert_close(logits[row : row + 1, part], alone(one)[0], rtol=1e-12, atol=1e-12)
            each = alone(one, its_targets, reduction="none")[0]
            torch.testing.assert_close(losses[row : row + 1, part], each, rtol=1e-12, atol=1e-12)
            alone(one, its_targets)[0].backward()
    for (fqn, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert (p.grad - q.grad).norm() <= 1e-12 * q.grad.norm(), fqn


def test_masks_and_positions_of_random_documents_against_a_loop_over_pairs() -> None:
    rng = random.Random(0)
    for _ in range(50):
        n, batch = rng.randint(1, 12), rng.randint(1, 3)
        rows = [sorted(rng.randint(0, 4) for _ in range(n)) for _ in range(batch)]
        index = sorted(rng.sample(range(n), rng.randint(1, n)))
        window = rng.choice([None, rng.randint(1, n + 2)])
        places = Places(n, torch.tensor(index), torch.tensor(rows))
        mask = places.mask(window)
        assert mask is not None
        for b, row in enumerate(rows):
            assert places.position_in_document()[b].tolist() == [i - row.index(row[i]) for i in index]
            assert mask[b, 0].tolist() == [
                [j <= i and row[i] == row[j] and (window is None or i - j < window) for j in index] for i in index
            ]


@pytest.mark.parametrize("name", ["tiny", "tiny-gpt-oss"])
def test_documents_reach_compiled_blocks_without_breaks_or_recompilation(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph for each kind of layer, whatever the documents of a batch."""
    torch._dynamo.reset()
    cfg = tiny(name)
    cfg.n_layers = 4
    model, plain = build(cfg, {}), build(cfg, {})
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter, fullgraph=True))
    for block in model.layers.values():
        block.compile_dense()
    tokens = ids(cfg, len(LENGTHS), N)
    for shift in range(3):
        document_BN = documents().roll(shift, 0)
        loss, _ = model(tokens, tokens, document_BN=document_BN)
        torch.testing.assert_close(loss, plain(tokens, tokens, document_BN=document_BN)[0], rtol=1e-12, atol=0)
        loss.backward()
    assert counter.frame_count == len({block.window for block in model.layers.values()})


def test_documents_of_another_length_are_refused() -> None:
    cfg = tiny("tiny")
    with pytest.raises(ValueError, match="documents of 24 tokens for sequences of 16"):
        build(cfg, {})(ids(cfg), document_BN=documents())
