"""Best-fit packing: against a search over all windows, token by token, and through the model in float64."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from moetrain.config import load
from moetrain.config.errors import ConfigError, DataError
from moetrain.data.asked import ask
from moetrain.data.dataset import TokenData
from moetrain.data.loader import Loader
from moetrain.data.packing import BestFit, pack, padding
from moetrain.data.position import position, restore
from moetrain.data.prepare import prepare
from moetrain.data.sampler import Cut, Sampler
from tests.data.conftest import config, write_corpus
from tests.model.test_decoder import TINY, build, tiny

S = 32
IGNORE = -100


def by_search(lengths: list[int], seq_len: int) -> list[int]:
    """Targets in each window, sorted, where every piece looks at all windows: best fit decreasing as it is defined."""
    sizes = [min(seq_len, n - 1 - at) for n in lengths for at in range(0, n - 1, seq_len)]
    left: list[int] = []
    for size in sorted(sizes, reverse=True):
        room = [r for r in left if r >= size]
        if room:
            left[left.index(min(room))] -= size
        else:
            left.append(seq_len - size)
    return sorted(seq_len - r for r in left)


def test_each_document_goes_to_the_fullest_window_that_has_room() -> None:
    rng = random.Random(0)
    for _ in range(80):
        seq_len, longest = rng.randint(2, 40), rng.randint(2, 120)
        lengths = [rng.randint(1, longest) for _ in range(rng.randint(1, 150))]
        packed = BestFit(np.array(lengths), seq_len)
        fills = sorted(sum(n - 1 for _, n in packed.pieces(k)) for k in range(len(packed)))
        assert fills == by_search(lengths, seq_len)
        assert packed.mean_tokens * len(packed) == pytest.approx(sum(lengths) - len(lengths))


@pytest.mark.parametrize("block", [1 << 20, 7])
def test_every_token_but_a_documents_first_is_a_target_once_and_no_short_document_is_cut(block: int) -> None:
    rng = random.Random(1)
    some = [rng.choice([1, 2, rng.randint(2, 30), rng.randint(30, 100)]) for _ in range(100)]
    lengths = [1] * 7 + some + [1] * 14 + some
    packed = BestFit(np.array(lengths, dtype=np.int32), S, block)
    pieces = [piece for k in range(len(packed)) for piece in packed.pieces(k)]
    targets = Counter(t for start, length in pieces for t in range(start + 1, start + length))
    ends = np.cumsum(lengths)
    firsts = {int(end) - length for end, length in zip(ends, lengths, strict=True)}
    assert targets == Counter(set(range(int(ends[-1]))) - firsts)
    for end, length in zip(ends.tolist(), lengths, strict=True):
        own = sorted(piece for piece in pieces if end - length <= piece[0] < end)
        assert len(own) == -(-(length - 1) // S)  # one, where it fits; none of a single token
        assert all(a[0] + a[1] - 1 == b[0] and a[1] == S + 1 for a, b in pairwise(own))
    assert packed.cut == sum(length > S + 1 for length in lengths)
    assert [packed.pieces(k) for k in range(len(packed))] == [
        again.pieces(k) for again in [BestFit(np.array(lengths), S, block)] for k in range(len(packed))
    ]


def test_packed_batches_hold_whole_documents_and_then_padding(data: TokenData) -> None:
    windows = pack(data, S)
    sampler = Sampler(data, 3, None, S, windows=windows)
    loader = Loader(data, sampler, 12, 6, prefetch=0, document_mask=True)
    padded = 0
    for batch in (batch for step in range(40) for batch in loader.step(step)):
        assert batch.document_BS is not None
        for row, number in enumerate(batch.sample_ids):
            sample = sampler.locate(number)
            whole = data.tokens(sample.source).tolist()
            tokens, targets, documents = [], [], []
            for n, (start, length) in enumerate(windows[sample.source].pieces(sample.window)):
                tokens += whole[start : start + length - 1]
                targets += whole[start + 1 : start + length]
                documents += [n] * (length - 1)
            missing = S - len(tokens)
            padded += missing
            assert batch.tokens_BS[row].tolist() == tokens + [data.eos_id] * missing
            assert batch.targets_BS[row].tolist() == targets + [IGNORE] * missing
            assert batch.document_BS[row].tolist() == documents + [documents[-1] + 1] * missing
    assert padded > 0


@pytest.mark.parametrize("backend", ["math", "sdpa"])
@pytest.mark.parametrize("name", TINY)
def test_the_loss_of_packed_windows_is_that_of_their_documents_one_by_one(name: str, backend: str) -> None:
    """Summed over windows, in float64, with gradients: grouped-query and latent attention, windows and sinks."""
    cfg, rng, seq_len = tiny(name), np.random.default_rng(0), 24
    cfg.attention.backend = backend  # type: ignore[assignment]
    model, alone = build(cfg, {}), build(cfg, {})
    lengths = rng.integers(1, 20, 14)
    text = rng.integers(0, 97, lengths.sum())
    packed = BestFit(lengths, seq_len)
    total = torch.zeros((), dtype=torch.float64)
    used = 0
    data = _Text(text)
    sampler = Sampler(data, 0, None, seq_len, windows={"text": packed})  # type: ignore[arg-type]
    for batch in Loader(data, sampler, len(packed), len(packed), prefetch=0, document_mask=True).step(0):  # type: ignore[arg-type]
        losses, _ = model(batch.tokens_BS, batch.targets_BS, document_BN=batch.document_BS, reduction="none")
        total = total + losses.sum()
        used += int((batch.targets_BS >= 0).sum())
    one_by_one = torch.zeros((), dtype=torch.float64)
    for end, length in zip(np.cumsum(lengths), lengths, strict=True):
        if length > 1:
            document = torch.from_numpy(text[end - length : end])[None]
            one_by_one = one_by_one + alone(document[:, :-1], document[:, 1:], reduction="none")[0].sum()
    assert used == lengths.sum() - len(lengths) < len(packed) * seq_len  # there was padding
    torch.testing.assert_close(total, one_by_one, rtol=1e-12, atol=0)
    total.backward(), one_by_one.backward()
    for (fqn, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert (p.grad - q.grad).norm() <= 1e-11 * q.grad.norm(), fqn


class _Text:
    """What sampler and loader need of a data set, over one array."""

    sources, domains, domain_of, vocab_size, eos_id = ["text"], ["text"], {"text": "text"}, 97, 96

    def __init__(self, tokens: np.ndarray) -> None:
        self._tokens = tokens

    def weights(self, given: object) -> dict[str, float]:
        return {"text": 1.0}

    def read(self, source: str, start: int, stop: int) -> np.ndarray:
        return self._tokens[start:stop]


def test_weights_hold_in_tokens_that_are_not_padding(data: TokenData) -> None:
    """Windows of one source are half empty, those of the other full: it gets twice the samples for half the tokens."""
    windows = {"sea": BestFit(np.full(50, S // 2 + 2), S), "code": BestFit(np.full(50, S + 1), S), "food": Cut(0, S)}
    sampler = Sampler(data, 0, {"sea": 1.0, "code": 1.0, "food": 0.0}, S, windows=windows)
    counts = sampler.dealer.counts(10_000)
    tokens = {name: counts[name] * windows[name].mean_tokens for name in ("sea", "code")}
    assert tokens["sea"] == pytest.approx(tokens["code"], rel=1e-3) and counts["sea"] > 1.8 * counts["code"]
    found = padding(windows, sampler.history.at(0).weights, S)
    assert found is not None and found.windows == 100 and found.cut == 0
    assert found.share == pytest.approx(1 - sum(tokens.values()) / (10_000 * S), rel=1e-3)


def test_text_of_every_length_is_packed(tmp_path: Path) -> None:
    """Sequences longer than all documents, and than the source; documents that are all longer; bad combinations."""
    cfg = config(tmp_path, write_corpus(tmp_path / "text", documents=3))
    prepare(cfg, progress=False)
    data = TokenData.open(cfg.dir)
    for seq_len in (8, 10**6):
        for name, packed in pack(data, seq_len).items():
            tokens = len(data.tokens(name)) - len(data.documents(name))
            assert len(packed) == -(-tokens // seq_len) or seq_len == 8
            assert packed.mean_tokens * len(packed) == pytest.approx(tokens)
    with pytest.raises(DataError, match="source 'sea' has no document of two tokens or more"):
        Sampler(data, 0, None, S, windows=pack(data, S) | {"sea": BestFit(np.ones(5, dtype=np.int32), S)})
    with pytest.raises(DataError, match=r"best_fit puts documents side by side; set data.document_mask=true"):
        Loader(data, Sampler(data, 0, None, S, windows=pack(data, S)), 2, 2)
    with pytest.raises(ConfigError, match=r"data.packing=best_fit .* set data.document_mask=true"):
        load(["data.packing=best_fit"])
    with pytest.raises(ConfigError, match=r"data.packing"):
        load(["data.packing=bestfit", "data.document_mask=true"])


def test_a_run_does_not_go_on_under_another_packing(data: TokenData) -> None:
    cfg = load(["data=demo"])
    cfg.data.sources = dict.fromkeys(data.sources, cfg.data.sources["plays"])
    asked = ask(cfg, {name: len(data.tokens(name)) for name in data.sources})
    saved = position(Sampler(data, 0, None, S), asked, 40)
    with pytest.raises(DataError, match=r"source 'sea' .* is cut otherwise .* restore it and data.packing"):
        restore(Sampler(data, 0, None, S, windows=pack(data, S)), asked, saved)
    saved = position(Sampler(data, 0, None, S, windows=pack(data, S)), asked, 40)
    assert restore(Sampler(data, 0, None, S, windows=pack(data, S)), asked, saved) == []
