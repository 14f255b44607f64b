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
import operator
import os
import struct
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.config.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}  # the codes that hold token ids
PREAD_MOST = 1 << 30  # bytes; Linux reads 2 GiB at most at once
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


@dataclass(frozen=True)
class Index:
    """What an .idx file says, as read-only views of the mapped file. ``lengths``: tokens of each sequence (int32);
    ``pointers``: byte of the .bin at which it begins (int64); ``bounds``: sequences before each document, and in all
    (int64)."""

    dtype: np.dtype[Any]
    lengths: np.ndarray
    pointers: np.ndarray
    bounds: np.ndarray


def read_index(file: Path, dtypes: Mapping[int, np.dtype[Any]], remedy: str) -> Index:
    """Open ``file``. Raises DataError, which says ``remedy``, unless its size is what its header asks for and its dtype
    one of ``dtypes``."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            head = stream.read(HEADER.size)
    except OSError as error:
        raise _unreadable(file, error, remedy) from None
    if len(head) < HEADER.size or head[:9] != MAGIC:
        raise DataError(f"'{file}' is not a token index (Megatron .idx); {remedy}")
    _, version, code, sequences, bounds = HEADER.unpack(head)
    if version != 1 or code not in dtypes:
        known = " or ".join(f"{dtype.name} ({code})" for code, dtype in dtypes.items())
        raise DataError(f"'{file}' has version {version} and dtype code {code}; only version 1 with {known} is read")
    expected = HEADER.size + 12 * sequences + 8 * bounds
    if sequences and size == expected + sequences:
        raise DataError(f"'{file}' has sequence modes (of a multimodal data set), which are not read; {remedy}")
    if size != expected:
        raise DataError(f"'{file}' is damaged: {size} bytes where its header asks for {expected}; {remedy}")
    data = np.memmap(file, mode="r", dtype=np.uint8)
    ends = np.cumsum([HEADER.size, 4 * sequences, 8 * sequences, 8 * bounds])
    lengths, pointers, starts = (
        data[first:end].view(kind) for first, end, kind in zip(ends, ends[1:], ("<i4", "<i8", "<i8"), strict=False)
    )
    return Index(dtypes[code], lengths, pointers, starts)


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


class TokenFile(Sequence[int]):
    """Token ids in a file, from its beginning: ``len`` of them, read by slices (``[a:b]`` gives those of an array).

    Slices are read with ``pread``, so a file that is cut short, or whose disk fails, while a job runs is a DataError; a
    memory map would end the process (SIGBUS). A file that is deleted stays readable on a local disk. May be shared by
    threads and inherited by forks.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.path, self.dtype = path, dtype
        self._fd = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._fd)
        self._len = os.fstat(self._fd).st_size // dtype.itemsize

    def __len__(self) -> int:
        return self._len

    @property
    def nbytes(self) -> int:
        """Bytes of all ids."""
        return self._len * self.dtype.itemsize

    def __getitem__(self, where: Any) -> Any:
        if isinstance(where, slice):
            start, stop, step = where.indices(self._len)
            if step == 1:
                return self._read(start, max(start, stop))
            return np.asarray(self)[where]
        at = operator.index(where)
        if not -self._len <= at < self._len:
            raise IndexError(f"token {at} of {self._len}")
        return self._read(at % self._len, at % self._len + 1)[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self._read(0, self._len)
        return array if dtype is None else array.astype(dtype, copy=False)

    def tolist(self) -> list[int]:
        """All ids."""
        return np.asarray(self).tolist()

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Ids ``start`` to ``stop`` - 1."""
        size, at = (stop - start) * self.dtype.itemsize, start * self.dtype.itemsize
        parts: list[bytes] = []
        try:
            while size and (part := os.pread(self._fd, min(size, PREAD_MOST), at)):
                parts.append(part)
                size, at = size - len(part), at + len(part)
        except OSError as error:
            raise DataError(f"cannot read '{self.path}': {error.strerror}; see to the disk, then resume") from None
        if size:
            raise DataError(
                f"'{self.path}' became shorter while it was in use: it ends before token {stop - 1}; restore it, or "
                f"delete its folder and run 'moetrain prepare' again, then resume"
            )
        return np.frombuffer(parts[0] if len(parts) == 1 else b"".join(parts), dtype=self.dtype)


class Shard:
    """A shard as ``ShardWriter`` writes it, opened for reading. ``tokens`` are all its ids in order, ``lengths`` the
    tokens of each document.

    Raises DataError for files that are missing, unreadable, truncated, not in this format, or written by another
    program that puts several sequences in a document.
    """

    def __init__(self, prefix: Path) -> None:
        again = "run 'moetrain prepare' again"
        index_file, data_file = idx_path(prefix), bin_path(prefix)
        index = read_index(index_file, DTYPES, again)
        self.dtype, self.lengths, self.documents = index.dtype, index.lengths, len(index.lengths)
        bounds = index.bounds
        if len(bounds) != self.documents + 1 or bounds[0] != 0 or bounds[-1] != self.documents:
            raise DataError(
                f"'{index_file}' is not one sequence a document ({len(bounds) - 1} documents, {self.documents} "
                f"sequences); it is damaged or of another program: {again}"
            )
        try:
            size = data_file.stat().st_size
            self.tokens = TokenFile(data_file, self.dtype)
        except OSError as error:
            raise _unreadable(data_file, error, again) from None
        wanted = int(self.lengths.sum(dtype=np.int64))
        if size != wanted * self.dtype.itemsize or size == 0:
            raise DataError(
                f"'{data_file}' is damaged: {size} bytes do not hold the {wanted} tokens of its index; {again}"
            )


def _unreadable(path: Path, error: OSError, remedy: str) -> DataError:
    why = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
    return DataError(f"shard file '{path}' {why}; {remedy}")
