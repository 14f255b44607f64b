"""From samples to rows of token ids, targets and documents: the one place where training tokens are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moetrain.data.sampler import Sample, Sampler

IGNORE = -100  # target that is not predicted


@dataclass(frozen=True)
class Rows:
    """B samples as int64 arrays (B, S): inputs, targets (-100: not predicted), and the document of each position,
    ascending from 0 in every row; None where sequences are not cut by document. ``by_document``: whether rows are made
    of whole documents, with padding. ``prefix_BS``: True for tokens that earlier ones see too; None: none are so (see
    ``objectives``)."""

    tokens_BS: np.ndarray
    targets_BS: np.ndarray
    document_BS: np.ndarray | None
    by_document: bool = False
    prefix_BS: np.ndarray | None = None


def gather(sampler: Sampler, samples: Sequence[Sample], document_mask: bool) -> Rows:
    """The rows of ``samples``.

    The pieces of a window follow each other. A piece of n + 1 tokens takes n positions: each of its tokens but the last
    is an input whose target is the token after it. What is left of a row is padding: the end-of-document token as
    input, no target, a document of its own. Documents are the pieces where windows are made ``by_document``, else what
    lies between end-of-document tokens (``documents``). Raises DataError for an id past the vocabulary.
    """
    data, shape = sampler.data, (len(samples), sampler.seq_len)
    tokens, targets = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
    document = np.empty(shape, dtype=np.int64) if document_mask else None
    padded: list[tuple[int, int]] = []  # rows and where their padding begins
    stream: list[int] = []  # rows whose documents only their tokens tell
    for row, sample in enumerate(samples):
        windows, at = sampler.windows[sample.source], 0
        for number, (start, length) in enumerate(windows.pieces(sample.window)):
            ids, end = data.read(sample.source, start, start + length), at + length - 1
            tokens[row, at:end], targets[row, at:end] = ids[:-1], ids[1:]
            if document is not None:
                document[row, at:end] = number
            at = end
        if at < shape[1]:
            tokens[row, at:] = targets[row, at:] = data.eos_id
            padded.append((row, at))
            if document is not None:
                document[row, at:] = number + 1
        if document is not None and not windows.by_document:
            stream.append(row)
    if min(tokens.min(), targets.min()) < 0 or max(tokens.max(), targets.max()) >= data.vocab_size:
        for sample in samples:
            sampler.tokens(sample)  # refuses the token by its place
    if document is not None and stream:
        document[stream] = documents(tokens if len(stream) == shape[0] else tokens[stream], data.eos_id)
    for row, at in padded:
        targets[row, at:] = IGNORE
    by_document = any(sampler.windows[sample.source].by_document for sample in samples)
    return Rows(tokens, targets, document, by_document)


def documents(tokens_BS: np.ndarray, eos_id: int) -> np.ndarray:
    """The document of each token of a window, int64 (B, S), from 0: an end-of-document token ends its document.

    Targets stay as they are: the last target of a document is the next one's first token, predicted from the
    end-of-document token as the start of a text is at inference. So a mask changes neither what is predicted nor the
    number of targets, and losses with and without it can be compared. Megatron-Core does the same under
    reset_attention_mask and reset_position_ids, unless eod_mask_loss is set too.
    """
    document_BS = np.zeros(tokens_BS.shape, dtype=np.int64)
    np.cumsum(tokens_BS[:, :-1] == eos_id, axis=1, out=document_BS[:, 1:])
    return document_BS
