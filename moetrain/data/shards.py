"""Token shards in Megatron's indexed format, version 1: PREFIX.bin holds the token ids, PREFIX.idx says where
documents lie.

PREFIX.idx, little endian: 9 bytes magic, uint64 version (1), uint8 dtype code, uint64 number of sequences S, uint64
number of document bounds (documents + 1), int32 length[S] in tokens, int64 pointer[S] in bytes into .bin, int64
bound[documents + 1] in sequences. We write one sequence a document, so bound = 0..S. The layout is that of
megatron-core's ``IndexedDataset`` (megatron/core/datasets/indexed_dataset.py); tests compare the bytes with those it
writes.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.config.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}  # the codes that hold token ids
UINT16_VOCAB = 65500  # Megatron's rule: from this vocabulary size on, int32


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """Smallest dtype that Megatron would choose for ids below ``vocab_size``."""
    return DTYPES[8 if vocab_size < UINT16_VOCAB else 4]


def shard_prefix(folder: Path, domain: str, split: str) -> Path:
    """Path of a domain's shard without .bin or .idx; ``split`` is 'train' or 'val'."""
    return folder / f"{domain}.{split}"


def bin_path(prefix: Path) -> Path:
    """The file of token ids."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """The file of document bounds."""
    return prefix.with_name(prefix.name + ".idx")


class ShardWriter:
    """Writes one shard, document by document. After ``close`` both files are whole, on disk, and ``sha256`` names their
    contents.

    ``lengths``: tokens of the documents that are there already and stay; what follows them is cut off. Raises
    ValueError when there are fewer.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[Any], lengths: Sequence[int] = ()) -> None:
        self.prefix, self.dtype = prefix, dtype
        self.lengths: list[int] = list(lengths)
        self.sha256: dict[str, str] = {}
        self._digest = hashlib.sha256()
        self._bin = open(bin_path(prefix), "r+b" if lengths else "wb")  # noqa: SIM115 closed by close()
        left = sum(self.lengths) * dtype.itemsize
        while left:
            block = self._bin.read(min(left, 1 << 20))
            if not block:
                raise ValueError(f"'{bin_path(prefix)}' is shorter than its journal says")
            self._digest.update(block)
            left -= len(block)
        self._bin.truncate(self._bin.tell())

    def flush(self) -> None:
        """Wait until all documents so far are on disk."""
        self._bin.flush()
        os.fsync(self._bin.fileno())

    def add(self, ids: np.ndarray) -> None:
        """Append one document, its end-of-document token included."""
        data = ids.astype(self.dtype, copy=False).tobytes()
        self._bin.write(data)
        self._digest.update(data)
        self.lengths.append(len(ids))

    def close(self) -> None:
        """Write the index."""
        lengths = np.asarray(self.lengths, dtype="<i4")
        ends = np.cumsum(lengths, dtype="<i8") * self.dtype.itemsize
        pointers = np.concatenate([np.zeros(1, "<i8"), ends])[:-1]
        bounds = np.arange(len(lengths) + 1, dtype="<i8")
        code = next(code for code, dtype in DTYPES.items() if dtype == self.dtype)
        index = (
            HEADER.pack(MAGIC, 1, code, len(lengths), len(bounds))
            + lengths.tobytes()
            + pointers.tobytes()
            + bounds.tobytes()
        )
        self.flush()
        self._bin.close()
        with open(idx_path(self.prefix), "wb") as file:
            file.write(index)
            file.flush()
            os.fsync(file.fileno())
        self.sha256 = {"bin": self._digest.hexdigest(), "idx": hashlib.sha256(index).hexdigest()}


class Shard:
    """A shard read by memory map. ``tokens`` are all its ids in order, ``lengths`` the tokens of each sequence.

    Raises DataError for files that are missing, truncated, or not in this format.
    """

    def __init__(self, prefix: Path) -> None:
        index_file, data_file = idx_path(prefix), bin_path(prefix)
        for path in (index_file, data_file):
            if not path.is_file():
                raise DataError(f"shard file '{path}' is missing; run 'moetrain prepare' again")
        size = index_file.stat().st_size
        with open(index_file, "rb") as file:
            head = file.read(HEADER.size)
        if len(head) < HEADER.size or head[:9] != MAGIC:
            raise DataError(f"'{index_file}' is not a token index (Megatron .idx); run 'moetrain prepare' again")
        _, version, code, sequences, bounds = HEADER.unpack(head)
        if version != 1 or code not in DTYPES:
            raise DataError(
                f"'{index_file}' has version {version} and dtype code {code}; only version 1 with uint16 (8) or "
                f"int32 (4) is read"
            )
        expected = HEADER.size + 12 * sequences + 8 * bounds
        if size != expected:
            raise DataError(
                f"'{index_file}' is damaged: {size} bytes where its header asks for {expected}; run 'moetrain "
                f"prepare' again"
            )
        index = np.memmap(index_file, mode="r", dtype=np.uint8)
        self.dtype = DTYPES[code]
        self.lengths = index[HEADER.size : HEADER.size + 4 * sequences].view("<i4")
        self.documents = bounds - 1
        count, left = divmod(data_file.stat().st_size, self.dtype.itemsize)
        if left or count != int(self.lengths.sum(dtype=np.int64)) or count == 0:
            raise DataError(
                f"'{data_file}' is damaged: {data_file.stat().st_size} bytes do not hold the "
                f"{int(self.lengths.sum(dtype=np.int64))} tokens "
                "of its index; run 'moetrain prepare' again"
            )
        self.tokens = np.memmap(data_file, mode="r", dtype=self.dtype)
