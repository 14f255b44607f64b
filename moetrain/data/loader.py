"""Batches: those of a training step, made ahead of time by a background thread, and those of the held-out text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from moetrain.config.errors import DataError
from moetrain.data.dataset import TokenData
from moetrain.data.gather import IGNORE, documents, gather
from moetrain.data.objectives import Objective
from moetrain.data.order import Permutation, seed_key
from moetrain.data.sampler import Sample, Sampler

Split = Literal["train", "val"]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank. ``tokens_BS`` and ``targets_BS`` are int64 (B, S); a target of -100 is not
    predicted. ``sample_ids`` are the run's sample numbers (-1: padding), ``domain_B`` the int64 (B,) numbers of their
    domains in ``TokenData.domains``. ``document_BS``, ``prefix_BS`` (bool): see ``gather.Rows``; None without masks.
    """

    tokens_BS: Tensor
    targets_BS: Tensor
    sample_ids: list[int]
    domain_B: Tensor
    document_BS: Tensor | None = None
    prefix_BS: Tensor | None = None

    def pinned(self) -> Batch:
        """The same batch in page-locked memory, from which copies to a GPU do not hold up this thread."""
        names = ("tokens_BS", "targets_BS", "document_BS", "prefix_BS")
        parts = {name: getattr(self, name) for name in names}
        return replace(self, **{name: part.pin_memory() for name, part in parts.items() if part is not None})


class Loader:
    """The micro-batches of one data rank. ``step(s)`` depends on nothing but its arguments, so resuming is asking for
    the next step.

    Step s consists of the samples s*G .. s*G + G - 1 (G = ``global_batch``; see ``begin``) in an order shuffled by
    (seed, s), so that no rank always gets the same domain where the mixture is regular. Micro-batch m takes the m-th
    stretch of ``micro_batch * dp_size`` of them, and rank r the r-th part of that: with the same number of
    micro-batches, a micro-batch over all ranks holds the same samples under every mapping. ``prefetch`` steps are made
    ahead of the one asked for (0: none, no thread). ``waited_s``: seconds that ``step`` has waited for data.
    ``document_mask``: batches say which document a token belongs to. ``pin_memory``: batches are in page-locked memory,
    for a GPU. ``objective`` rewrites rows; None: next tokens. A rank reads the tokens of its own samples and no others.

    Raises DataError for sizes that do not divide, and for windows made by document without ``document_mask``.
    """

    def __init__(
        self,
        data: TokenData,
        sampler: Sampler,
        global_batch: int,
        micro_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        prefetch: int = 1,
        document_mask: bool = False,
        pin_memory: bool = False,
        objective: Objective | None = None,
    ) -> None:
        if global_batch % (micro_batch * dp_size):
            per_pass = micro_batch * dp_size
            nearest = max(1, round(global_batch / per_pass)) * per_pass
            raise DataError(
                f"train.global_batch={global_batch} is not a multiple of train.micro_batch={micro_batch} x "
                f"{dp_size} data ranks; use {nearest}"
            )
        if not document_mask and any(windows.by_document for windows in sampler.windows.values()):
            raise DataError("data.packing=best_fit puts documents side by side; set data.document_mask=true")
        self.data, self.sampler = data, sampler
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.prefetch = prefetch
        self.document_mask, self.pin_memory, self.objective = document_mask, pin_memory, objective
        self.waited_s = 0.0
        self._number = {name: data.domains.index(domain) for name, domain in data.domain_of.items()}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data") if prefetch else None
        self._ready: dict[int, Future[list[Batch]]] = {}
        self._begin = (0, 0)  # a step, and its first sample

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of optimizer step ``step`` (from 0). Raises what went wrong in the thread,
        DataError for damaged data."""
        start = time.perf_counter()
        if self._thread is None:
            batches = self._make(step)
        else:
            wanted = range(step, step + self.prefetch + 1)
            for stale in [s for s in self._ready if s not in wanted]:
                self._ready.pop(stale).cancel()
            for s in wanted:
                if s not in self._ready:
                    self._ready[s] = self._thread.submit(self._make, s)
            batches = self._ready.pop(step).result()
        self.waited_s += time.perf_counter() - start
        self.sampler.dealer.dealt = self.first_sample(step + 1)
        return batches

    def again(self, samples: Sequence[int]) -> list[Batch]:
        """This rank's micro-batches of the step that dealt ``samples`` (of ``sample_ids``), once more."""
        if self._thread is None:
            return self._deal(samples)
        return self._thread.submit(self._deal, samples).result()

    def first_sample(self, step: int) -> int:
        """The first sample number of a step."""
        return self._begin[1] + (step - self._begin[0]) * self.global_batch

    def step_of(self, sample: int) -> int:
        """The step that a sample belongs to."""
        return self._begin[0] + (sample - self._begin[1]) // self.global_batch

    def begin(self, step: int, sample: int) -> None:
        """Step ``step`` begins with sample ``sample``: a resumed run goes on after the last sample that was dealt, also
        when ``global_batch`` is not what it was."""
        self.forget_ready()
        self._begin = (step, sample)

    def change(self, weights: Mapping[str, float], why: str) -> None:
        """From the step after the one that was asked for last on, deal by ``weights``; see ``Sampler.change``. What has
        been made ahead is made again."""
        self.forget_ready()
        self.sampler.change(self.sampler.dealer.dealt, weights, why)

    def forget_ready(self) -> None:
        """Forget the steps that were made ahead; returns when the background thread is idle."""
        for future in self._ready.values():
            if not future.cancel():
                wait([future])
        self._ready.clear()

    def sample_ids(self, step: int) -> list[int]:
        """Sample numbers of a whole step in the order in which they are dealt to micro-batches and ranks."""
        order, first = (
            Permutation(self.global_batch, seed_key(self.sampler.seed, "step", step)),
            self.first_sample(step),
        )
        return [first + i for i in order.entries(range(self.global_batch))]

    def close(self) -> None:
        """Stop the background thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def _make(self, step: int) -> list[Batch]:
        return self._deal(self.sample_ids(step))

    def _deal(self, ids: Sequence[int]) -> list[Batch]:
        stride = self.micro_batch * self.dp_size
        starts = range(self.dp_rank * self.micro_batch, self.global_batch, stride)
        own = self.sampler.locate_all([i for start in starts for i in ids[start : start + self.micro_batch]])
        return [self._batch(own[m : m + self.micro_batch]) for m in range(0, len(own), self.micro_batch)]

    def _batch(self, samples: Sequence[Sample]) -> Batch:
        rows = gather(self.sampler, samples, self.document_mask)
        if self.objective is not None:
            rows = self.objective(rows, samples)
        batch = Batch(
            torch.from_numpy(rows.tokens_BS),
            torch.from_numpy(rows.targets_BS),
            [sample.index for sample in samples],
            torch.tensor([self._number[sample.source] for sample in samples]),
            None if rows.document_BS is None else torch.from_numpy(rows.document_BS),
            None if rows.prefix_BS is None else torch.from_numpy(rows.prefix_BS),
        )
        return batch.pinned() if self.pin_memory else batch


def held_out_windows(tokens: int, seq_len: int, max_sequences: int = 0) -> range | list[int]:
    """First tokens of the windows that predict tokens 1 .. ``tokens`` - 1 once each; the last may be partial. With
    ``max_sequences`` > 0, at most that many of them, spread evenly."""
    starts = range(0, tokens - 1, seq_len)
    if max_sequences <= 0 or max_sequences >= len(starts):
        return starts
    return [starts[i * len(starts) // max_sequences] for i in range(max_sequences)]


def validation_batches(
    data: TokenData,
    source: str,
    seq_len: int,
    batch_size: int,
    max_sequences: int = 0,
    dp_rank: int = 0,
    dp_size: int = 1,
    document_mask: bool = False,
    split: Split = "val",
) -> Iterator[Batch]:
    """This rank's share of a source's held-out windows, in batches of ``batch_size`` (B) sequences of ``seq_len`` (S)
    tokens; see ``window_batches``. ``split``: "train" takes its training text instead."""
    windows = [(source, start) for start in held_out_windows(len(data.tokens(source, split)), seq_len, max_sequences)]
    yield from window_batches(data, windows, seq_len, batch_size, dp_rank, dp_size, document_mask, split)


def window_batches(
    data: TokenData,
    windows: Sequence[tuple[str, int]],
    seq_len: int,
    batch_size: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    document_mask: bool = False,
    split: Split = "val",
) -> Iterator[Batch]:
    """This rank's share of ``windows``, (source, first token) each, in batches of ``batch_size`` (B) sequences of
    ``seq_len`` (S) tokens.

    Every rank gets the same number of batches. What is missing, at the end of a text and as whole padding sequences,
    has targets of -100 and the end-of-document token as input. ``sample_ids`` are places in ``windows``, -1 for
    padding. ``document_mask``: as for ``Loader``. Raises DataError for an id past the vocabulary.
    """
    per_pass = batch_size * dp_size
    for first in range(dp_rank * batch_size, -(-len(windows) // per_pass) * per_pass, per_pass):
        inputs = np.full((batch_size, seq_len), data.eos_id, dtype=np.int64)
        targets = np.full((batch_size, seq_len), IGNORE, dtype=np.int64)
        numbers = [n if n < len(windows) else -1 for n in range(first, first + batch_size)]
        domain_B = torch.zeros(batch_size, dtype=torch.int64)
        for row, number in enumerate(numbers):
            source, start = windows[max(number, 0)]
            domain_B[row] = data.domains.index(data.domain_of[source])
            if number >= 0:
                window = data.tokens(source, split)[start : start + seq_len + 1].astype(np.int64)
                inputs[row, : len(window) - 1], targets[row, : len(window) - 1] = window[:-1], window[1:]
                if window.max() >= data.vocab_size:
                    raise DataError(
                        f"{'held-out' if split == 'val' else 'training'} shard of source '{source}' holds token "
                        f"{window.max()}, past the vocabulary of {data.vocab_size}; it is "
                        "damaged or of another tokenizer: delete the prepared folder and run 'moetrain prepare' again"
                    )
        document_BS = torch.from_numpy(documents(inputs, data.eos_id)) if document_mask else None
        yield Batch(torch.from_numpy(inputs), torch.from_numpy(targets), numbers, domain_B, document_BS)
