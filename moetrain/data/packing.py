"""Best-fit packing: whole documents side by side in a window, as tightly as they go.

"Fewer Truncations Improve Language Modeling", Ding et al. 2024, arXiv 2404.10830.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moetrain.data.dataset import TokenData
from moetrain.data.sampler import Windows

BLOCK = 1 << 20  # documents that are packed together


class BestFit:
    """The windows of a source of which no document is cut that fits one.

    A window predicts ``seq_len`` tokens. A document of L tokens (its end-of-document token is the last) takes L - 1 of
    them: its first L - 1 tokens are inputs, all but its first are targets. So ``pieces`` of a window have ``seq_len``
    + 1 tokens only where there is one piece; in general their lengths less 1 sum to at most ``seq_len``, and what is
    missing is padding. No target reaches from one document into the next: in an epoch every token but the first of
    each document is a target exactly once, and a document of one token is left out. A document of more than
    ``seq_len`` + 1 tokens is cut into full windows and a rest that is packed as a document is; each part begins with
    the last token of the part before, so here, too, every token but the document's first is a target once.

    ``lengths``: tokens of each document, in the order of the shard. Documents are packed in blocks of ``block``, so
    that what packing needs beside its result (some 50 bytes a document) does not grow with the source. The result
    depends on ``lengths`` and ``seq_len`` alone. It keeps 12 bytes for each piece and 8 for each window.
    """

    def __init__(self, lengths: np.ndarray, seq_len: int, block: int = BLOCK) -> None:
        self.seq_len = seq_len
        first, pieces, starts, sizes, bounds = 0, 0, [], [], [np.zeros(1, dtype=np.int64)]
        self.cut = 0  # documents that are longer than a window
        for begin in range(0, len(lengths), block):
            some = np.asarray(lengths[begin : begin + block], dtype=np.int64)
            start, size, windows = _pack(some, seq_len)
            starts.append(start + first)
            sizes.append(size)
            bounds.append(windows + pieces)
            first, pieces = first + int(some.sum()), pieces + len(size)
            self.cut += int((some > seq_len + 1).sum())
        self._starts = np.concatenate(starts) if starts else np.zeros(0, dtype=np.int64)
        self._sizes = np.concatenate(sizes) if sizes else np.zeros(0, dtype=np.int32)
        self._bounds = np.concatenate(bounds)
        self.targets = int(self._sizes.sum(dtype=np.int64))

    by_document = True

    @property
    def mean_tokens(self) -> float:
        return self.targets / len(self) if len(self) else 0.0

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def pieces(self, k: int) -> list[tuple[int, int]]:
        some = slice(self._bounds[k], self._bounds[k + 1])
        return list(zip(self._starts[some].tolist(), (self._sizes[some] + 1).tolist(), strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes that the windows take."""
        return self._starts.nbytes + self._sizes.nbytes + self._bounds.nbytes


@dataclass(frozen=True)
class Padding:
    """Of a run's windows together, each source once. ``share``: of the positions that hold no token. ``cut``:
    documents that are longer than a window."""

    windows: int
    share: float
    cut: int


def pack(data: TokenData, seq_len: int) -> dict[str, Windows]:
    """Source -> its best-fit windows of ``seq_len`` tokens."""
    return {name: BestFit(data.documents(name), seq_len) for name in data.sources}


def padding(windows: Mapping[str, Windows], weights: Mapping[str, float], seq_len: int) -> Padding | None:
    """What packing leaves empty under ``weights`` (source -> share of tokens); None where nothing is packed."""
    packed = {name: w for name, w in windows.items() if isinstance(w, BestFit) and weights.get(name, 0) > 0 and len(w)}
    if not packed:
        return None
    samples = {name: weights[name] / w.mean_tokens for name, w in packed.items()}
    used = sum(weights[name] for name in packed) / (seq_len * sum(samples.values()))
    return Padding(sum(map(len, packed.values())), 1 - used, sum(w.cut for w in packed.values()))


def _pack(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pack the documents of one block: (start, size, end) with the first token (int64) and the targets (int32) of each
    piece, in the order of windows, and, for each window, the pieces up to its end (int64)."""
    targets = np.maximum(lengths - 1, 0)
    parts = -(-targets // seq_len)  # pieces of each document
    document = np.repeat(np.arange(len(lengths)), parts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(parts) - parts, parts)
    start = (np.cumsum(lengths) - lengths)[document] + number * seq_len
    size = np.minimum(targets[document] - number * seq_len, seq_len)
    order = np.argsort(-size, kind="stable")  # decreasing, equal ones in the order of the text
    window = np.empty(len(order), dtype=np.int64)
    window[order] = _best_fit(size[order], seq_len)
    order = np.argsort(window, kind="stable")  # within a window in the order of the text
    ends = np.cumsum(np.bincount(window)) if len(window) else np.zeros(0, dtype=np.int64)
    return start[order], size[order].astype(np.int32), ends


def _best_fit(sizes: np.ndarray, space: int) -> np.ndarray:
    """The window of each item of ``sizes`` (decreasing, 1 to ``space``), int64: each goes to the fullest window that
    has room for it, or opens one.

    Items of a size s are placed together. The fullest window that fits one, with r left, takes the next ones too, r //
    s in all: it only gets fuller. And windows with equal r do so one after the other, so one step places as many items
    as fill all windows with r left, or all of the size. A bit mask says which r there are.
    """
    window = np.empty(len(sizes), dtype=np.int64)
    opened, left = 0, 0  # windows so far; bit r of left: there are windows with r left
    having: dict[int, list[np.ndarray]] = {}  # r -> windows
    distinct, counts = np.unique(-sizes, return_counts=True)
    at = 0
    for s, count in zip((-distinct).tolist(), counts.tolist(), strict=True):
        end = at + count
        while at < end:
            above = left >> s
            if above:
                r = s + (above & -above).bit_length() - 1
                windows = having[r].pop()
                if not having[r]:
                    left ^= 1 << r
            else:
                r, new = space, -(-(end - at) // (space // s))
                windows = np.arange(opened, opened + new)
                opened += new
            each = r // s
            taken = min(len(windows) * each, end - at)
            full, rest = divmod(taken, each)
            window[at : at + full * each] = np.repeat(windows[:full], each)
            window[at + full * each : at + taken] = windows[full : full + 1]
            at += taken
            groups = [
                (r - each * s, windows[:full]),
                (r - rest * s, windows[full : full + 1]),
                (r, windows[full + 1 :]),
            ]
            if not rest:
                groups = [groups[0], (r, windows[full:])]
            for after, group in groups:
                if after and len(group):
                    having.setdefault(after, []).append(group)
                    left |= 1 << after
    return window
