"""Objectives: the text can be restored from what they make of it, their shares are the papers', and a prefix is seen
as an explicit mask says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moetrain.config import load
from moetrain.config.errors import ConfigError, DataError
from moetrain.config.schema_data import DataConfig, TokenizerConfig, Ul2Config
from moetrain.data.dataset import TokenData
from moetrain.data.gather import IGNORE, Rows
from moetrain.data.loader import Loader
from moetrain.data.objectives import DENOISERS, FillInTheMiddle, Ul2, build_objective
from moetrain.data.packing import pack
from moetrain.data.prepare import prepare
from moetrain.data.sampler import Sample, Sampler
from moetrain.data.toy import toy_data
from moetrain.model.attention.kernels import Rule, attend
from moetrain.model.places import Places
from tests.data.conftest import config, write_corpus

EOS, PRE, MID, SUF = 0, 901, 902, 903
MODES = {"R": 911, "S": 912, "X": 913}
SENTINEL = 1000  # and up


def sample(index: int) -> Sample:
    return Sample(index, "a", 0, index)


def fim(rate: float, spm_rate: float = 0.5) -> FillInTheMiddle:
    return FillInTheMiddle(rate, spm_rate, PRE, MID, SUF, EOS, seed=3)


def rows_of(ids: np.ndarray) -> Rows:
    return Rows(ids[None, :-1].copy(), ids[None, 1:].copy(), None)


def restored(ids: list[int]) -> tuple[list[int], str]:
    """A document's text from its rewritten form by the definition of the two orders, and which it was."""
    if PRE not in ids:
        return ids, "plain"
    suffix, middle = ids.index(SUF), ids.index(MID)
    if suffix == 1:
        return ids[middle + 1 :] + ids[2:middle], "spm"
    return ids[1:suffix] + ids[middle + 1 :] + ids[suffix + 1 : middle], "psm"


def test_fim_hides_a_random_middle_and_loses_nothing_but_what_has_no_room() -> None:
    rng = np.random.default_rng(0)
    seen = {"plain": 0, "psm": 0, "spm": 0}
    cuts = []
    for i in range(400):
        text = rng.integers(1, 900, size=201)
        text[[60, 130]] = EOS
        rows = fim(0.6, 0.25)(rows_of(text), [sample(i)])
        ids = [*rows.tokens_BS[0].tolist(), int(rows.targets_BS[0, -1])]
        assert rows.tokens_BS[0, 1:].tolist() == rows.targets_BS[0, :-1].tolist()
        assert len(ids) == 201
        ends = [n for n, token in enumerate(ids) if token == EOS]
        first, second = ids[: ends[0]], ids[ends[0] + 1 : ends[1]]
        for got, want in ((first, text[:60]), (second, text[61:130])):
            back, kind = restored(got)
            assert back == want.tolist()
            seen[kind] += 1
            if kind == "psm":
                cuts.append((got.index(SUF) - 1) / len(want))
    total = sum(seen.values())
    assert seen["plain"] / total == pytest.approx(0.4, abs=0.06)
    assert seen["spm"] / total == pytest.approx(0.6 * 0.25, abs=0.05)
    assert np.mean(cuts) == pytest.approx(1 / 3, abs=0.05)  # the lower of two uniform cuts


def test_ul2_restores_its_window_and_has_the_papers_shares() -> None:
    """A T5 decoder's inverse: each sentinel of the first part is replaced by what follows it in the second."""
    length = 2048
    ul2 = Ul2(list(range(SENTINEL, SENTINEL + 300)), MODES, EOS, length, seed=1)
    rng, found = np.random.default_rng(0), {}
    for i in range(700):
        window = rng.integers(1, 900, size=length + 1)
        ids, given = ul2.rewrite(window, i)
        first, second = ids[1:given].tolist(), ids[given:].tolist()
        assert second.pop() == EOS and len(ids) <= length + 1
        spans: dict[int, list[int]] = {}
        for token in second:
            spans.setdefault(token, []) if token >= SENTINEL else spans[max(spans)].append(token)
        text = [t for token in first for t in (spans[token] if token >= SENTINEL else [token])]
        assert text == window[: len(text)].tolist()
        sizes = [len(span) for span in spans.values()]
        key = (int(ids[0]), round(sum(sizes) / len(text), 2), round(float(np.mean(sizes)), 1))
        found[key] = found.get(key, 0) + 1
        left = length + 1 - len(text) - 2 * len(spans) - 2
        assert 0 <= left <= 4  # no room was wasted
    assert len(found) == len(DENOISERS)
    for denoiser in DENOISERS:
        key = min(
            found, key=lambda k: (k[0] != MODES[denoiser.mode], abs(k[1] - denoiser.rate), abs(k[2] - denoiser.mean))
        )
        assert key[0] == MODES[denoiser.mode] and key[1] == pytest.approx(denoiser.rate, abs=0.01)
        if denoiser.mean:
            assert key[2] == pytest.approx(denoiser.mean, rel=0.15)
        assert found[key] / 700 == pytest.approx(1 / 7, abs=0.04)


def test_ul2_predicts_what_follows_the_prefix() -> None:
    ul2 = Ul2(list(range(SENTINEL, SENTINEL + 100)), MODES, EOS, 64, seed=1)
    window = np.arange(1, 66)
    for i in range(20):
        rows = ul2(rows_of(window), [sample(i)])
        ids, given = ul2.rewrite(window, i)
        tokens, targets = rows.tokens_BS[0], rows.targets_BS[0]
        assert rows.prefix_BS is not None and rows.prefix_BS[0].nonzero()[0].tolist() == list(range(given))
        predicted = (targets != IGNORE).nonzero()[0]
        assert targets[predicted].tolist() == ids[given + 1 :].tolist()
        assert tokens[: len(ids) - 1].tolist() == ids[:-1].tolist() and predicted[0] == given


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("backend", ["math", "sdpa"])
@pytest.mark.parametrize("window", [None, 5])
def test_a_prefix_is_seen_as_an_explicit_mask_says(heads: int, backend: str, window: int | None) -> None:
    """float64, grouped heads too, against softmax over an explicit mask; two documents in a row."""
    torch.manual_seed(0)
    B, N, H, d = 2, 12, 4, 8
    q, k, v = (torch.randn(B, N, h, d, dtype=torch.float64) for h in (H, heads, heads))
    prefix = torch.zeros(B, N, dtype=torch.bool)
    prefix[0, :7], prefix[1, 2:4] = True, True
    document = torch.tensor([[0] * 9 + [1] * 3] * B)
    got = attend(q, k, v, Places(N, None, document, None, prefix), Rule(0.3, window, backend=backend))
    for b in range(B):
        allowed = torch.tensor(
            [
                [
                    bool((key <= query or prefix[b, key]) and document[b, key] == document[b, query])
                    and (window is None or abs(query - key) < window)
                    for key in range(N)
                ]
                for query in range(N)
            ]
        )
        for h in range(H):
            g = h * heads // H
            scores = (q[b, :, h] @ k[b, :, g].T * 0.3).masked_fill(~allowed, -torch.inf)
            assert torch.allclose(got[b, :, h], F.softmax(scores, dim=-1) @ v[b, :, g], atol=1e-12)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenData]:
    """The small corpus, tokenised once with the tokens of each objective."""
    folder = tmp_path_factory.mktemp("objectives")
    sources, found = write_corpus(folder / "text"), {}
    for objective in ("fim", "ul2"):
        cfg = settings(folder / objective, sources, objective)
        prepare(cfg, progress=False)
        found[objective] = TokenData.open(cfg.dir)
    return found


def settings(folder: Path, sources: object, objective: str) -> DataConfig:
    options = {"objective": objective, "ul2": Ul2Config(sentinels=20)}
    return config(folder, sources, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", ["fim", "ul2"])
def test_samples_depend_on_the_seed_and_their_number_alone(corpus: dict[str, TokenData], objective: str) -> None:
    """The same samples from loaders of two ranks and of one, with documents packed for fill-in-the-middle."""
    data = corpus[objective]
    cfg = DataConfig(objective=objective, ul2=Ul2Config(sentinels=20))  # type: ignore[arg-type]
    packed = objective == "fim"
    made: list[dict[int, list[list[int]]]] = []
    for ranks in (1, 2):
        found: dict[int, list[list[int]]] = {}
        for rank in range(ranks):
            sampler = Sampler(data, 1, None, 64, windows=pack(data, 64) if packed else None)
            rewrite = build_objective(cfg, data.tokenizer(), data.eos_id, 64, seed=1)
            loader = Loader(data, sampler, 8, 2, rank, ranks, 0, packed, objective=rewrite)
            for step in (0, 5):
                for batch in loader.step(step):
                    for row, number in enumerate(batch.sample_ids):
                        found[number] = [batch.tokens_BS[row].tolist(), batch.targets_BS[row].tolist()]
        made.append(found)
    assert made[0] == made[1]
    sampler = Sampler(data, 1, None, 64, windows=pack(data, 64) if packed else None)
    plain = Loader(data, sampler, 8, 2, 0, 1, 0, packed).step(0)
    assert any(made[0][n][0] != batch.tokens_BS[r].tolist() for batch in plain for r, n in enumerate(batch.sample_ids))


def test_a_tokenizer_without_the_tokens_is_refused_by_name(corpus: dict[str, TokenData]) -> None:
    data = corpus["ul2"]
    with pytest.raises(DataError, match=r"data.objective=fim needs the token '<\|fim_prefix\|>' and 2 more"):
        build_objective(DataConfig(objective="fim"), data.tokenizer(), data.eos_id, 64, 0)
    with pytest.raises(DataError, match=r"puts up to 64 spans .* data\.ul2\.sentinels=20; set it to 64 or more"):
        cfg = DataConfig(objective="ul2", ul2=Ul2Config(sentinels=20))
        build_objective(cfg, data.tokenizer(), data.eos_id, 512, 0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.objective=ul2", "data.document_mask=true"], "ul2 corrupts whole windows; set data.packing=cut"),
        (["data.objective=ul2", "parallel.cp=2"], "parallel.context=all_gather does not move"),
        (["data.objective=ul2", "train.seq_len=8"], "needs train.seq_len of 16 or more"),
        (["data.objective=infill"], "data.objective"),
        (["data.objective=fim", "data.fim.rate=1.5"], "data.fim.rate"),
        (["data.objective=fim", "data.fim.tokens=[a,b]"], "data.fim.tokens must be 3 different tokens"),
        (["data.objective=ul2", "data.ul2.sentinel=x"], "needs {} where the number goes"),
        (["data.objective=ul2", "data.ul2.sentinels=0"], "data.ul2.sentinels"),
    ],
)
def test_what_cannot_be_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises((ConfigError, DataError)) as error:
        load(["experiment=demo", *overrides])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_no_room_for_the_tokens(tmp_path: Path) -> None:
    cfg = settings(tmp_path, write_corpus(tmp_path / "text", documents=3), "ul2")
    cfg.tokenizer = TokenizerConfig(vocab_size=270)
    with pytest.raises(DataError, match=r"23 tokens of data\.objective; use 280 or more"):
        prepare(cfg, progress=False)


@pytest.mark.parametrize("objective", ["fim", "ul2"])
def test_the_toy_text_of_the_parity_command_has_an_objectives_tokens(tmp_path: Path, objective: str) -> None:
    """With default options, in the toy's vocabulary of 300, for sequences of up to 48 tokens."""
    cfg = toy_data(tmp_path, DataConfig(objective=objective))  # type: ignore[arg-type]
    prepare(cfg, progress=False)
    data = TokenData.open(cfg.dir, vocab_size=300)
    for seq_len in (16, 48):
        assert build_objective(cfg, data.tokenizer(), data.eos_id, seq_len, seed=0) is not None
