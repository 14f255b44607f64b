"""Samples, batches and held-out windows: each token where it should be, once, whatever the mapping."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from moetrain.config.errors import DataError
from moetrain.data.dataset import TokenData
from moetrain.data.loader import Batch, Loader, held_out_windows, validation_batches
from moetrain.data.sampler import Sampler
from moetrain.data.weights import resolve_weights

S = 32


def test_a_sample_is_a_pure_function_of_its_number(data: TokenData) -> None:
    numbers = [*range(400), 10**9, 10**12 + 7]
    forward = Sampler(data, 5, None, S)
    expected = {i: forward.locate(i) for i in numbers}
    random.Random(0).shuffle(numbers)
    other = Sampler(data, 5, None, S)
    assert {i: other.locate(i) for i in numbers} == expected
    assert any(Sampler(data, 6, None, S).locate(i) != expected[i] for i in range(20))


def test_an_epoch_gives_every_window_of_a_domain_once(data: TokenData) -> None:
    sampler = Sampler(data, 1, None, S)
    drawn: dict[str, list[tuple[int, int]]] = {domain: [] for domain in data.domains}
    for i in range(4 * sum(map(len, sampler.windows.values()))):
        sample = sampler.locate(i)
        drawn[sample.source].append((sample.epoch, sample.window * S))
    for domain, draws in drawn.items():
        n = (len(data.tokens(domain)) - 1) // S
        starts = {k * S for k in range(n)}
        epochs = [draws[e * n : (e + 1) * n] for e in range(3)]
        assert all({start for _, start in epoch} == starts and len(epoch) == n for epoch in epochs)
        assert [{e for e, _ in epoch} for epoch in epochs] == [{0}, {1}, {2}]
        orders = [[start for _, start in epoch] for epoch in epochs]
        assert orders[0] != orders[1] != orders[2] and orders[0] != sorted(starts)


def test_a_sample_holds_the_tokens_of_its_window(data: TokenData) -> None:
    sampler = Sampler(data, 2, {"sea": 1.0, "code": 2.0, "food": 0.0}, S)
    for i in range(60):
        sample = sampler.locate(i)
        domain, ids = sampler[i]
        whole = np.fromfile(data.dir / f"{domain}.train.bin", dtype="<u2")
        assert domain == sample.source and ids.dtype == np.int64
        assert ids.tolist() == whole[sample.window * S : sample.window * S + S + 1].tolist() and len(ids) == S + 1
    assert {sampler.locate(i).source for i in range(60)} == {"sea", "code"}


def test_epochs_count_passes(data: TokenData) -> None:
    sampler = Sampler(data, 0, None, S)
    passes = sampler.epochs(sum(map(len, sampler.windows.values())))
    assert passes == pytest.approx(dict.fromkeys(data.domains, 1.0), abs=0.02)


def test_weights_are_shares_of_tokens() -> None:
    tokens = {"a": 100, "b": 300, "c": 600}
    assert resolve_weights(None, tokens) == pytest.approx({"a": 0.1, "b": 0.3, "c": 0.6})
    assert resolve_weights({"a": 2, "b": 1, "c": 1}, tokens) == {"a": 0.5, "b": 0.25, "c": 0.25}
    assert resolve_weights({"a": 0.4, "b": None}, tokens) == pytest.approx({"a": 0.4, "b": 0.2, "c": 0.4})
    wrong: list[tuple[dict[str, float | None], str]] = [
        ({"a": -0.1}, "weight of domain 'a' is -0.1"),
        ({"a": float("nan")}, "weight of domain 'a' is nan"),
        ({"a": float("inf")}, "weight of domain 'a' is inf"),
        ({"a": 0, "b": 0, "c": 0}, "the weights of all domains are 0"),
        ({"a": 0.5, "b": 0.5}, "leave nothing for c"),
        ({"aa": 1}, "unknown domain 'aa'; did you mean 'a'"),
    ]
    for given, message in wrong:
        with pytest.raises(DataError, match=message):
            resolve_weights(given, tokens)


def test_text_shorter_than_one_sequence_is_refused(data: TokenData) -> None:
    long = len(data.tokens("sea"))
    with pytest.raises(
        DataError, match=rf"source 'sea' has {long} training tokens, less than one sequence of {long} \+"
    ):
        Sampler(data, 0, None, long)
    assert len(Sampler(data, 0, None, long - 1).windows["sea"]) == 1
    assert Sampler(data, 0, {"sea": 0, "code": 1, "food": 1}, long).locate(0).source != "sea"


def ids_of(batches: list[Batch]) -> list[list[int]]:
    return [batch.sample_ids for batch in batches]


@pytest.mark.parametrize(("dp", "micro"), [(1, 24), (1, 4), (2, 6), (3, 2), (4, 6), (8, 3)])
def test_every_sample_of_a_step_goes_to_one_rank(data: TokenData, dp: int, micro: int) -> None:
    sampler, n_micro = Sampler(data, 3, None, S), 24 // (dp * micro)
    whole = Loader(data, sampler, 24, 24 // n_micro, prefetch=0)
    ranks = [Loader(data, sampler, 24, micro, rank, dp, prefetch=0) for rank in range(dp)]
    for step in (0, 1, 77):
        batches = [loader.step(step) for loader in ranks]
        dealt = [number for batch in batches for ids in ids_of(batch) for number in ids]
        assert sorted(dealt) == list(range(24 * step, 24 * step + 24))
        for m, together in enumerate(ids_of(whole.step(step))):  # same micro-batches, whatever the ranks
            assert [number for batch in batches for number in batch[m].sample_ids] == together
        for batch in (batch for per_rank in batches for batch in per_rank):
            for row, number in enumerate(batch.sample_ids):
                domain, ids = sampler[number]
                assert batch.tokens_BS[row].tolist() == ids[:-1].tolist()
                assert batch.targets_BS[row].tolist() == ids[1:].tolist()
                assert data.domains[int(batch.domain_B[row])] == domain
            assert batch.tokens_BS.dtype == batch.targets_BS.dtype == torch.int64


def test_no_rank_is_tied_to_a_domain(data: TokenData) -> None:
    """Equal weights alternate strictly; dealt in that order, each of two ranks would see one domain only."""
    sampler = Sampler(data, 0, {"sea": 1.0, "code": 1.0, "food": 0.0}, S)
    for rank in (0, 1):
        loader = Loader(data, sampler, 2, 1, rank, 2, prefetch=0)
        seen = [int(loader.step(step)[0].domain_B) for step in range(40)]
        assert 10 <= seen.count(0) <= 30 and seen.count(0) + seen.count(1) == 40


def test_prefetching_changes_nothing_and_any_step_may_follow_any_other(data: TokenData) -> None:
    sampler = Sampler(data, 4, None, S)
    plain, ahead = (Loader(data, sampler, 8, 4, 0, 2, prefetch=n) for n in (0, 3))
    for step in (0, 1, 2, 3, 10, 11, 5, 5, 6, 1000):
        a, b = plain.step(step), ahead.step(step)
        assert ids_of(a) == ids_of(b) and all(torch.equal(x.tokens_BS, y.tokens_BS) for x, y in zip(a, b, strict=True))
    assert ahead.waited_s > 0
    ahead.close()


def documents_by_hand(tokens: list[int], eos: int) -> list[int]:
    """Numbers of the documents of a window, token by token."""
    numbers, number = [], 0
    for token in tokens:
        numbers.append(number)
        number += token == eos
    return numbers


def test_a_document_mask_numbers_documents_and_changes_nothing_else(data: TokenData) -> None:
    sampler = Sampler(data, 4, None, S)
    plain, masked = (Loader(data, sampler, 8, 4, 0, 2, document_mask=flag) for flag in (False, True))
    pairs = [pair for step in range(30) for pair in zip(plain.step(step), masked.step(step), strict=True)]
    for domain in data.domains:
        both = (validation_batches(data, domain, S, 3, 0, 1, 2, document_mask=flag) for flag in (False, True))
        pairs += list(zip(*both, strict=True))
    most = 0
    for without, batch in pairs:
        assert without.document_BS is None and batch.document_BS is not None
        assert torch.equal(without.tokens_BS, batch.tokens_BS) and torch.equal(without.targets_BS, batch.targets_BS)
        assert without.sample_ids == batch.sample_ids and torch.equal(without.domain_B, batch.domain_B)
        for tokens, numbers in zip(batch.tokens_BS.tolist(), batch.document_BS.tolist(), strict=True):
            assert numbers == documents_by_hand(tokens, data.eos_id)
            most = max(most, numbers[-1])
    assert most > 0  # some window had more than one
    plain.close(), masked.close()


def test_errors_of_the_background_thread_reach_the_step(data: TokenData) -> None:
    broken = TokenData(data.dir, data.manifest, {(d, s): data._shards[d, s] for d, s in data._shards}, vocab_size=90)
    loader = Loader(broken, Sampler(broken, 0, None, S), 8, 4, prefetch=2)
    with pytest.raises(DataError, match=r"token \d+ of source '\w+' is \d+, past the vocabulary of 90"):
        loader.step(0)
    loader.close()
    with pytest.raises(DataError, match="past the vocabulary of 90"):
        list(validation_batches(broken, "sea", S, 2))


def test_batches_that_do_not_divide_are_refused(data: TokenData) -> None:
    with pytest.raises(
        DataError, match=r"global_batch=10 is not a multiple of train.micro_batch=4 x 2 data ranks; use 8"
    ):
        Loader(data, Sampler(data, 0, None, S), 10, 4, 0, 2)


@pytest.mark.parametrize(("seq_len", "batch_size", "dp"), [(32, 4, 1), (32, 4, 3), (17, 1, 2), (5000, 2, 2)])
def test_every_held_out_token_is_predicted_once_from_its_predecessor(
    data: TokenData, seq_len: int, batch_size: int, dp: int
) -> None:
    for domain in data.domains:
        ranks = [list(validation_batches(data, domain, seq_len, batch_size, 0, rank, dp)) for rank in range(dp)]
        assert len({len(batches) for batches in ranks}) == 1  # all ranks run as many forward passes
        windows: dict[int, tuple[list[int], list[int]]] = {}
        for batch in (batch for batches in ranks for batch in batches):
            assert batch.tokens_BS.shape == batch.targets_BS.shape == (batch_size, seq_len)
            for row, number in enumerate(batch.sample_ids):
                targets = batch.targets_BS[row]
                if number < 0:
                    assert (targets == -100).all()
                else:
                    assert number not in windows
                    kept = targets != -100
                    windows[number] = (batch.tokens_BS[row][kept].tolist(), targets[kept].tolist())
        held_out = data.tokens(domain, "val").tolist()
        in_order = [windows[number] for number in sorted(windows)]
        assert [token for inputs, _ in in_order for token in inputs] == held_out[:-1]
        assert [token for _, targets in in_order for token in targets] == held_out[1:]


def test_a_limited_evaluation_is_spread_over_the_held_out_text() -> None:
    assert held_out_windows(1001, 10, 0) == range(0, 1000, 10)
    assert held_out_windows(1001, 10, 500) == range(0, 1000, 10)
    assert held_out_windows(1001, 10, 4) == [0, 250, 500, 750]
