"""Token shards are Megatron's indexed format: compared with the layout written out byte by byte, and with
megatron-core."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from moetrain.config.errors import DataError
from moetrain.data.shards import Shard, ShardWriter, TokenFile, dtype_for

DOCUMENTS = [[5, 6, 7, 0], [8, 0], [1, 2, 3, 4, 5, 6, 0]]


def write(prefix: Path, vocab_size: int) -> None:
    writer = ShardWriter(prefix, dtype_for(vocab_size))
    for document in DOCUMENTS:
        writer.add(np.array(document))
    writer.close()


@pytest.mark.parametrize(("vocab_size", "code", "letter"), [(2048, 8, "H"), (65_499, 8, "H"), (65_500, 4, "i")])
def test_bytes_are_those_of_the_format(tmp_path: Path, vocab_size: int, code: int, letter: str) -> None:
    write(tmp_path / "a", vocab_size)
    flat = [token for document in DOCUMENTS for token in document]
    size = struct.calcsize(f"<{letter}")
    assert (tmp_path / "a.bin").read_bytes() == struct.pack(f"<{len(flat)}{letter}", *flat)
    header = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code) + struct.pack("<QQ", 3, 4)
    body = struct.pack("<3i", 4, 2, 7) + struct.pack("<3q", 0, 4 * size, 6 * size) + struct.pack("<4q", 0, 1, 2, 3)
    assert (tmp_path / "a.idx").read_bytes() == header + body


@pytest.mark.parametrize("vocab_size", [2048, 100_000])
def test_what_is_written_is_read(tmp_path: Path, vocab_size: int) -> None:
    write(tmp_path / "a", vocab_size)
    shard = Shard(tmp_path / "a")
    assert shard.tokens.tolist() == [token for document in DOCUMENTS for token in document]
    assert shard.lengths.tolist() == [4, 2, 7] and shard.documents == 3


@pytest.mark.parametrize("vocab_size", [2048, 100_000])
def test_megatron_core_reads_and_writes_the_same_bytes(tmp_path: Path, vocab_size: int) -> None:
    indexed = pytest.importorskip(
        "megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed (extra 'megatron')"
    )
    torch = pytest.importorskip("torch")
    write(tmp_path / "ours", vocab_size)
    theirs = indexed.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=indexed.DType.optimal_dtype(vocab_size))
    for document in DOCUMENTS:
        theirs.add_document(torch.tensor(document), [len(document)])
    theirs.finalize(str(tmp_path / "theirs.idx"))
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()
    read = indexed.IndexedDataset(str(tmp_path / "ours"))
    assert [read[i].tolist() for i in range(len(read))] == DOCUMENTS
    assert Shard(tmp_path / "theirs").lengths.tolist() == [len(document) for document in DOCUMENTS]


def test_damaged_shards_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "a", 2048)
    good_idx, good_bin = (tmp_path / "a.idx").read_bytes(), (tmp_path / "a.bin").read_bytes()
    for idx, tokens, message in [
        (b"something else", good_bin, "a.idx' is not a token index"),
        (good_idx[:20], good_bin, "a.idx' is not a token index"),
        (good_idx[:9] + struct.pack("<Q", 2) + good_idx[17:], good_bin, "version 2"),
        (good_idx[:-3], good_bin, "a.idx' is damaged"),
        (good_idx, good_bin[:-1], "a.bin' is damaged"),
        (good_idx, good_bin + good_bin, "a.bin' is damaged"),
        (good_idx, b"", "a.bin' is damaged"),
    ]:
        (tmp_path / "a.idx").write_bytes(idx)
        (tmp_path / "a.bin").write_bytes(tokens)
        with pytest.raises(DataError, match=message) as error:
            Shard(tmp_path / "a")
        assert "\n" not in str(error.value)


def test_foreign_indexes_are_refused_by_name(tmp_path: Path) -> None:
    """What megatron-core may write and we do not: other ids, several sequences a document, modes of sequences."""
    write(tmp_path / "a", 2048)
    idx = (tmp_path / "a.idx").read_bytes()
    lengths, two = struct.pack("<3i", 4, 2, 7), struct.pack("<3q", 0, 1, 3)
    pointers = struct.pack("<3q", 0, 8, 12)
    for content, message in [
        (idx[:17] + b"\x05" + idx[18:], "dtype code 5; only version 1 with "),
        (idx + b"\0\0\0", "sequence modes"),
        (
            struct.pack("<9sQBQQ", idx[:9], 1, 8, 3, 3) + lengths + pointers + two,
            r"not one sequence a document \(2 documents, 3 sequences",
        ),
        (idx[:-8] + struct.pack("<q", 9), "not one sequence a document"),
    ]:
        (tmp_path / "a.idx").write_bytes(content)
        with pytest.raises(DataError, match=message) as error:
            Shard(tmp_path / "a")
        assert "\n" not in str(error.value)
    (tmp_path / "a.idx").unlink()
    (tmp_path / "a.idx").mkdir()
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        Shard(tmp_path / "a")


def test_slices_are_those_of_the_array(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 2**31, 1000, dtype=np.int32)
    ids.tofile(tmp_path / "a")
    tokens = TokenFile(tmp_path / "a", ids.dtype)
    for where in (
        slice(None),
        slice(3, 9),
        slice(990, 2000),
        slice(7, 3),
        slice(-5, None),
        slice(2, 900, 7),
        0,
        -1,
        999,
    ):
        assert np.array_equal(tokens[where], ids[where]) and np.asarray(tokens[where]).dtype == ids.dtype
    assert len(tokens) == 1000 and tokens.nbytes == ids.nbytes and tokens.tolist() == list(ids)
    with pytest.raises(IndexError):
        tokens[1000]


def test_a_file_cut_short_under_a_reader_is_one_line_and_one_deleted_stays_readable(tmp_path: Path) -> None:
    write(tmp_path / "a", 2048)
    tokens = Shard(tmp_path / "a").tokens
    os.truncate(tmp_path / "a.bin", 10)  # a memory map would end this process here
    assert tokens[:5].tolist() == DOCUMENTS[0] + [8]
    with pytest.raises(DataError, match=r"a.bin' became shorter .* ends before token 7; restore it") as error:
        tokens[4:8]
    assert "\n" not in str(error.value)
    (tmp_path / "a.bin").unlink()
    assert tokens[:4].tolist() == DOCUMENTS[0]
