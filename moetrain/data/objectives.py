"""What a window of text asks the model to predict, other than each next token: fill-in-the-middle, UL2's denoisers.

An objective rewrites rows of tokens as a pure function of (seed, sample number), so it depends on neither mapping nor
resuming. Evaluation stays with next tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from moetrain.config.errors import DataError
from moetrain.config.schema_data import DataConfig
from moetrain.data.gather import IGNORE, Rows, documents
from moetrain.data.order import seed_key
from moetrain.data.sampler import Sample


class Objective(Protocol):
    """What the loader calls on the rows of a micro-batch."""

    def __call__(self, rows: Rows, samples: Sequence[Sample]) -> Rows:
        """``rows`` rewritten, of the same shape."""
        ...


def build_objective(cfg: DataConfig, tokenizer: Tokenizer, eos_id: int, seq_len: int, seed: int) -> Objective | None:
    """The objective of ``cfg.objective``; None for next tokens. Raises DataError when the tokenizer lacks a token that
    it needs."""
    if cfg.objective == "next_token":
        return None
    needed = special_tokens(cfg)
    known = tokenizer.get_vocab(with_added_tokens=True)
    missing = [token for token in needed if token not in known]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(
            f"data.objective={cfg.objective} needs the token '{missing[0]}'{more}, which the tokenizer does not have; "
            f"name those that it has in data.{cfg.objective}, or set data.tokenizer.path=null to train one with them"
        )
    ids = [known[token] for token in needed]
    if cfg.objective == "fim":
        pre, middle, suffix = ids
        return FillInTheMiddle(cfg.fim.rate, cfg.fim.spm_rate, pre, middle, suffix, eos_id, seed)
    return Ul2(ids[3:], dict(zip("RSX", ids[:3], strict=True)), eos_id, seq_len, seed)


def special_tokens(cfg: DataConfig) -> list[str]:
    """The tokens that the objective of ``cfg`` needs; a tokenizer that is trained here gets them."""
    if cfg.objective == "fim":
        return list(cfg.fim.tokens)
    if cfg.objective == "ul2":
        return [*cfg.ul2.modes, *(cfg.ul2.sentinel.format(i) for i in range(cfg.ul2.sentinels))]
    return []


def _random(seed: int, name: str, sample: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed_key(seed, name, sample)))


class FillInTheMiddle:
    """Bavarian et al. 2022, arXiv 2207.14255: a document becomes <prefix> p <suffix> s <middle> m (PSM) or, in its
    joint form, <prefix> <suffix> s <middle> p m (SPM), with two uniformly random cuts between tokens.

    ``rate`` of the documents are rewritten, ``spm_rate`` of these as SPM. A document here is what a window holds of
    one. Each gets three tokens longer, and what the row then has no room for is cut off at its end. The end-of-document
    token stays the last. The paper cuts between characters; ours are tokens, since shards hold nothing else.
    """

    def __init__(
        self, rate: float, spm_rate: float, prefix: int, middle: int, suffix: int, eos_id: int, seed: int
    ) -> None:
        self.rate, self.spm_rate, self.seed, self.eos_id = rate, spm_rate, seed, eos_id
        self.prefix, self.middle, self.suffix = prefix, middle, suffix

    def __call__(self, rows: Rows, samples: Sequence[Sample]) -> Rows:
        """See ``Objective``."""
        tokens, targets = np.full_like(rows.tokens_BS, self.eos_id), np.full_like(rows.targets_BS, IGNORE)
        document = None if rows.document_BS is None else np.empty_like(rows.document_BS)
        for row, sample in enumerate(samples):
            random, at, number = _random(self.seed, "fim", sample.index), 0, -1
            for number, ids in enumerate(self._pieces(rows, row)):
                new = self._rewrite(ids, random)[: tokens.shape[1] - at + 1]
                end = at + len(new) - 1
                tokens[row, at:end], targets[row, at:end] = new[:-1], new[1:]
                if document is not None:
                    document[row, at:end] = number
                at = end
            if document is not None:
                document[row, at:] = number + 1
        if document is not None and not rows.by_document:
            document = documents(tokens, self.eos_id)
        return Rows(tokens, targets, document, rows.by_document)

    def _pieces(self, rows: Rows, row: int) -> list[np.ndarray]:
        """The stretches of text that a row consists of, each with its last target."""
        used = int((rows.targets_BS[row] != IGNORE).sum())  # padding comes last
        tokens, targets = rows.tokens_BS[row, :used], rows.targets_BS[row, :used]
        if not rows.by_document or rows.document_BS is None:
            bounds = [0, used]
        else:
            new = np.flatnonzero(np.diff(rows.document_BS[row, :used])) + 1
            bounds = [0, *new.tolist(), used]
        return [np.append(tokens[a:b], targets[b - 1]) for a, b in pairwise(bounds) if b > a]

    def _rewrite(self, ids: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Rewrite the documents of a stretch of text."""
        parts: list[np.ndarray] = []
        begin = 0
        for end in [*np.flatnonzero(ids == self.eos_id).tolist(), len(ids)]:
            text = ids[begin:end]
            if len(text) and random.random() < self.rate:
                text = self._fill(text, random)
            parts += [text, ids[end : end + 1]]
            begin = end + 1
        return np.concatenate(parts)

    def _fill(self, text: np.ndarray, random: np.random.Generator) -> np.ndarray:
        low, high = sorted(random.integers(0, len(text), size=2, endpoint=True).tolist())
        p, m, s = text[:low], text[low:high], text[high:]
        if random.random() < self.spm_rate:
            return np.concatenate([[self.prefix, self.suffix], s, [self.middle], p, m])
        return np.concatenate([[self.prefix], p, [self.suffix], s, [self.middle], m])


@dataclass(frozen=True)
class Denoiser:
    """Mean span length in tokens (0: one span, at the end), share of tokens that are corrupted, and the mode token."""

    mean: int
    rate: float
    mode: str


# UL2, arXiv 2205.05131, section 3.1 and table 1
DENOISERS = (
    Denoiser(3, 0.15, "R"),
    Denoiser(8, 0.15, "R"),
    Denoiser(0, 0.25, "S"),
    Denoiser(3, 0.5, "X"),
    Denoiser(8, 0.5, "X"),
    Denoiser(64, 0.15, "X"),
    Denoiser(64, 0.5, "X"),
)


class Ul2:
    """UL2's mixture of denoisers (Tay et al. 2022, arXiv 2205.05131) for a decoder alone.

    A row becomes [mode] text with sentinels in place of spans, then each sentinel with its span, then the
    end-of-document token. The first part is the prefix, whose tokens all see each other; only what follows the first
    sentinel after it is predicted. Each row takes one of the seven denoisers, all equally often. Spans are drawn as
    T5 draws them (arXiv 1910.10683): random partitions of the corrupted and of the other tokens.

    As in T5, a row reads as many tokens of its window as make it full and no more: 2 for each span and 2 besides are
    not text, and the rest of the window is left out (4% of it at rate 0.15 and mean 8, 25% at 0.5 and 3).

    Raises DataError when there are fewer ``sentinels`` than the largest number of spans.
    """

    def __init__(self, sentinels: list[int], modes: dict[str, int], eos_id: int, seq_len: int, seed: int) -> None:
        self.sentinels, self.modes, self.eos_id, self.seed = np.asarray(sentinels), modes, eos_id, seed
        self.sizes = [_fitting(denoiser, seq_len + 1) for denoiser in DENOISERS]
        needed = max(_spans(denoiser, n)[1] for denoiser, n in zip(DENOISERS, self.sizes, strict=True))
        if needed > len(sentinels):
            raise DataError(
                f"data.objective=ul2 puts up to {needed} spans in a sequence of train.seq_len={seq_len}, "
                f"data.ul2.sentinels={len(sentinels)}; set it to {needed} or more"
            )

    def __call__(self, rows: Rows, samples: Sequence[Sample]) -> Rows:
        """See ``Objective``."""
        tokens, targets = np.full_like(rows.tokens_BS, self.eos_id), np.full_like(rows.targets_BS, IGNORE)
        prefix = np.zeros(tokens.shape, dtype=bool)
        for row, sample in enumerate(samples):
            window = np.append(rows.tokens_BS[row], rows.targets_BS[row, -1])
            ids, length = self.rewrite(window, sample.index)
            tokens[row, : len(ids) - 1] = ids[:-1]
            targets[row, length : len(ids) - 1] = ids[length + 1 :]  # the first sentinel is given, not predicted
            prefix[row, :length] = True
        return Rows(tokens, targets, None, rows.by_document, prefix)

    def rewrite(self, window: np.ndarray, sample: int) -> tuple[np.ndarray, int]:
        """(ids, length of the prefix) of a window of seq_len + 1 tokens."""
        random = _random(self.seed, "ul2", sample)
        choice = int(random.integers(len(DENOISERS)))
        denoiser, text = DENOISERS[choice], window[: self.sizes[choice]]
        noise, spans = _spans(denoiser, len(text))
        lengths = np.empty(2 * spans, dtype=np.int64)  # text that stays, span, text that stays, span, ...
        lengths[0::2] = _partition(len(text) - noise, spans, random)
        lengths[1::2] = _partition(noise, spans, random)
        parts = np.split(text, np.cumsum(lengths)[:-1])
        given, hidden = [np.array([self.modes[denoiser.mode]])], []
        for i in range(spans):
            sentinel = self.sentinels[i : i + 1]
            given += [parts[2 * i], sentinel]
            hidden += [sentinel, parts[2 * i + 1]]
        given_ids = np.concatenate(given)
        return np.concatenate([given_ids, *hidden, [self.eos_id]]), len(given_ids)


def _spans(denoiser: Denoiser, n: int) -> tuple[int, int]:
    """(corrupted tokens, spans) in ``n`` tokens: T5's rounding, with at least one token of each kind."""
    noise = min(max(round(n * denoiser.rate), 1), n - 1)
    spans = 1 if denoiser.mean == 0 else max(1, round(noise / denoiser.mean))
    return noise, min(spans, noise, n - noise)


def _fitting(denoiser: Denoiser, room: int) -> int:
    """The most tokens of text that make a row of at most ``room`` tokens."""
    n = room - 4  # one span: mode, two sentinels, end
    while n > 2 and n + 2 * _spans(denoiser, n)[1] + 2 > room:
        n -= 1
    return n


def _partition(total: int, parts: int, random: np.random.Generator) -> np.ndarray:
    """``total`` as a sum of ``parts`` positive numbers, all sums equally likely."""
    cuts = np.sort(random.choice(total - 1, size=parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))
