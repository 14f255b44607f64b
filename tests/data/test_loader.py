"""What a loader reads, and in which memory: its own share, page-locked for a GPU. Entries of permutations at once."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch

from moetrain.data.dataset import TokenData
from moetrain.data.loader import Loader
from moetrain.data.order import Permutation
from moetrain.data.packing import pack
from moetrain.data.sampler import Sampler
from moetrain.train.step import inputs_of

S = 32


class Counting(TokenData):
    """Counts the training tokens that are read."""

    reads: list[tuple[str, int, int]]

    @classmethod
    def like(cls, data: TokenData) -> Counting:
        found = cls(data.dir, data.manifest, data._shards, data.vocab_size)
        found.reads = []
        return found

    def read(self, source: str, start: int, stop: int) -> np.ndarray:
        self.reads.append((source, start, stop))
        return super().read(source, start, stop)

    def tokens(self, source: str, split: str = "train") -> np.ndarray:
        assert split == "val", "training tokens are read through read"
        return super().tokens(source, split)


@pytest.mark.parametrize("packing", ["cut", "best_fit"])
def test_a_rank_reads_its_own_share_of_the_tokens(data: TokenData, packing: str) -> None:
    windows = pack(data, S) if packing == "best_fit" else Sampler(data, 0, None, S).windows
    read = {}
    for dp in (1, 4):
        for rank in range(dp):
            counting = Counting.like(data)
            loader = Loader(counting, Sampler(counting, 0, None, S, windows=windows), 24, 3, rank, dp, 0, True)
            for step in range(10):
                loader.step(step)
            read[dp, rank] = counting.reads
    together = [part for rank in range(4) for part in read[4, rank]]
    assert sorted(together) == sorted(read[1, 0])
    tokens = [sum(stop - start for _, start, stop in read[4, rank]) for rank in range(4)]
    assert max(tokens) < 1.1 * sum(tokens) / 4


def test_batches_for_a_gpu_are_page_locked_off_the_main_thread(
    data: TokenData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU cannot lock pages, so a stand-in notes the call; and copies to the device ask not to wait."""
    pinned: list[tuple[int, bool]] = []

    def pin(self: torch.Tensor) -> torch.Tensor:
        pinned.append((id(self), threading.current_thread() is threading.main_thread()))
        return self.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    sampler = Sampler(data, 0, None, S)
    plain = Loader(data, sampler, 8, 4, prefetch=1, document_mask=True)
    ready = plain.step(0)
    assert not pinned
    plain.close()
    loader = Loader(data, sampler, 8, 4, prefetch=1, document_mask=True, pin_memory=True)
    batches = loader.step(0)
    loader.close()
    assert len(pinned) >= 6 and not any(main for _, main in pinned)  # three tensors of two micro-batches, and step 1's
    for a, b in zip(ready, batches, strict=True):
        assert torch.equal(a.tokens_BS, b.tokens_BS) and torch.equal(a.targets_BS, b.targets_BS)
    asked: list[object] = []
    real = torch.Tensor.to

    def to(self: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        asked.append(options.get("non_blocking"))
        return real(self, *args, **options)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(torch.Tensor, "to", to)
    inputs_of(batches[0], torch.device("cpu"))
    assert asked == [True, True, True]


def test_entries_of_a_permutation_at_once_are_those_one_by_one() -> None:
    rng = random.Random(0)
    for n in (1, 2, 9, 1000, 2**31 + 11, 2**45 + 3):
        permutation = Permutation(n, rng.getrandbits(64))
        numbers = [rng.randrange(n) for _ in range(200)]
        assert permutation.entries(numbers) == [permutation[i] for i in numbers]
        assert permutation.entries(numbers[:3]) == [permutation[i] for i in numbers[:3]]
