"""Documents that are token ids already: .npy files as OLMo's tools write them, and Megatron's .idx with .bin.

A .npy file is a row of ids, most often without numpy's header in spite of its name, where the tokenizer's
end-of-document token ends each document. In a Megatron pair the index says where documents end; that token ends one
there too. Ids are taken as they are: they must come from the tokenizer of ``data.tokenizer.path``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moetrain.config.errors import DataError
from moetrain.config.schema_data import SourceConfig
from moetrain.data.shards import DTYPES, bin_path, read_index
from moetrain.data.sources import SourceFile, matching
from moetrain.data.tokenizer import LoadedTokenizer

READ_IDS = 1_000_000
IN_INDEX: dict[int, np.dtype[Any]] = DTYPES | {5: np.dtype("<i8")}  # some tools write int64
UINT16_IDS = 1 << 16  # OLMo's rule: up to this vocabulary size, uint16
NUMPY_MAGIC = b"\x93NUMPY"
REMEDY = "make or fetch it again"


def find_tokens(source: str, cfg: SourceConfig) -> list[SourceFile]:
    """Files of ``data.sources.SOURCE.tokens``, each once, in order; a pair of .idx and .bin is one, named by its .idx.

    Raises DataError for what does not exist, or is neither .npy nor half of a pair.
    """
    found: dict[Path, SourceFile] = {}
    for entry in cfg.tokens:
        for path in matching(source, entry, _in_folder, "tokens", "token"):
            if path.suffix not in (".npy", ".idx", ".bin"):
                raise DataError(
                    f"'{path}' is no token file: data.sources.{source}.tokens takes .npy, and .idx with .bin; text "
                    f"belongs in data.sources.{source}.paths"
                )
            parts = [path] if path.suffix == ".npy" else [path.with_suffix(".idx"), path.with_suffix(".bin")]
            for part in parts:
                if not part.is_file():
                    raise DataError(f"'{part}' is missing: Megatron's format is an .idx and a .bin of one name")
            stats = [part.stat() for part in parts]
            size, newest = sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats)
            found.setdefault(parts[0].resolve(), SourceFile(parts[0], size, newest, "tokens"))
    return list(found.values())


def _in_folder(path: Path) -> bool:
    return path.suffix in (".npy", ".idx")


def token_digest(path: Path) -> str:
    """SHA-256 of a .npy file, or of an .idx with its .bin, after the kind."""
    sha256 = hashlib.sha256()
    for part in (path,) if path.suffix == ".npy" else (path, path.with_suffix(".bin")):
        with open(part, "rb") as file:
            while block := file.read(READ_IDS):
                sha256.update(block)
    return f"{path.suffix[1:]}:{sha256.hexdigest()}"


@dataclass(frozen=True)
class _Ids:
    """Where ids lie in a file: from byte ``first`` on, ``count`` of them. ``ends``: ids before the end of each
    document, None where only the end-of-document token tells."""

    path: Path
    first: int
    count: int
    dtype: np.dtype[Any]
    ends: np.ndarray | None


class TokenReader:
    """One reading of one file or pair, as ``Reader`` is of text: iterate over it, once, for the ids of its documents,
    without the end-of-document token. Empty documents are left out.

    Making one checks what headers, sizes and the index tell. That, and iterating, raise DataError, one line.
    """

    def __init__(self, file: SourceFile, source: str, cfg: SourceConfig, tokenizer: LoadedTokenizer, max_mb: int):
        self.path, self.source, self.tokenizer = file.path, source, tokenizer
        self.max_ids = max_mb * 1_000_000
        self.position = self.replaced = 0
        self.digest = ""
        self._ids = self._npy(cfg.token_dtype) if file.path.suffix == ".npy" else self._pair()
        if self._ids.dtype.itemsize == 2 and tokenizer.vocab_size > UINT16_IDS:
            raise DataError(
                f"'{self.path}' holds {self._ids.dtype.name} ids, which cannot name the {tokenizer.vocab_size:,} "
                f"tokens of data.tokenizer.path; give the tokenizer that made it, or correct "
                f"data.sources.{source}.token_dtype"
            )

    def __iter__(self) -> Iterator[np.ndarray]:
        try:
            for document in self._documents():
                if len(document):
                    yield document
            self.digest = token_digest(self.path)
        except OSError as error:
            raise DataError(f"cannot read '{self.path}': {error.strerror or error}") from None

    # ---- what the file is ------------------------------------------------------------------------------------------

    def _npy(self, asked: str | None) -> _Ids:
        """The ids of a .npy file, with numpy's header or without."""
        size = self.path.stat().st_size
        with open(self.path, "rb") as file:
            if file.read(len(NUMPY_MAGIC)) == NUMPY_MAGIC:
                dtype, count = self._numpy_header(file)
                first = file.tell()
                if size != first + count * dtype.itemsize:
                    raise DataError(
                        f"'{self.path}' is damaged: {size} bytes where its header asks for "
                        f"{first + count * dtype.itemsize}; {REMEDY}"
                    )
                if asked not in (None, dtype.name):
                    raise DataError(
                        f"'{self.path}' holds {dtype.name} ids by its header; remove "
                        f"data.sources.{self.source}.token_dtype={asked}"
                    )
                return self._not_empty(_Ids(self.path, first, count, dtype, None))
        dtype = np.dtype(asked or ("uint16" if self.tokenizer.vocab_size <= UINT16_IDS else "uint32")).newbyteorder("<")
        count, left = divmod(size, dtype.itemsize)
        if left:
            raise DataError(
                f"'{self.path}' is cut off, or not {dtype.name}: {size} bytes are no whole number of ids; {REMEDY}, or "
                f"set data.sources.{self.source}.token_dtype"
            )
        if asked is None and dtype.itemsize == 2 and self._looks_like_four_bytes(size):
            raise DataError(
                f"'{self.path}' looks like uint32 ids: every second uint16 is 0; set "
                f"data.sources.{self.source}.token_dtype=uint32 (or uint16, if they are)"
            )
        return self._not_empty(_Ids(self.path, 0, count, dtype, None))

    def _numpy_header(self, file: BinaryIO) -> tuple[np.dtype[Any], int]:
        """(dtype, ids) of a file after its magic word. Raises DataError for anything but a row of integers."""
        file.seek(0)
        try:
            version = np.lib.format.read_magic(file)
            reads = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
            shape, _, dtype = reads(file)
        except (ValueError, EOFError) as error:
            raise DataError(f"'{self.path}' has a damaged numpy header: {str(error).splitlines()[0]}") from None
        if dtype.kind not in "iu" or dtype.itemsize == 1 or len(shape) != 1:
            raise DataError(
                f"'{self.path}' holds {dtype.name} of shape {shape}, not a row of token ids; save a one-dimensional "
                f"array of uint16 or uint32"
            )
        return dtype, shape[0]

    def _looks_like_four_bytes(self, size: int) -> bool:
        """Whether the second half of every 4 bytes is 0, and not the first, as far as the first block shows."""
        if size % 4:
            return False
        with open(self.path, "rb") as file:
            pairs = np.frombuffer(file.read(4 * READ_IDS), dtype="<u2").reshape(-1, 2)
        return len(pairs) > 1 and not pairs[:, 1].any() and bool(pairs[:, 0].any())

    def _pair(self) -> _Ids:
        """The ids and document ends of an .idx with its .bin."""
        index, data = read_index(self.path, IN_INDEX, REMEDY), bin_path(self.path.with_suffix(""))
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(index.lengths, dtype=np.int64)])
        bounds, count = index.bounds, int(starts[-1])
        if (
            (len(index.lengths) and int(index.lengths.min()) < 0)
            or len(bounds) == 0
            or bounds[0] != 0
            or (np.diff(bounds) < 0).any()
            or not np.array_equal(index.pointers, starts[:-1] * index.dtype.itemsize)
        ):
            raise DataError(f"'{self.path}' is damaged: its sequences or documents do not follow each other; {REMEDY}")
        if bounds[-1] != len(index.lengths):
            raise DataError(
                f"'{self.path}' has {len(index.lengths)} sequences and documents of {bounds[-1]}; write it with "
                f"end_document after each document"
            )
        if data.stat().st_size != count * index.dtype.itemsize:
            raise DataError(
                f"'{data}' is damaged: {data.stat().st_size} bytes do not hold the {count} {index.dtype.name} ids of "
                f"its index; {REMEDY}"
            )
        return self._not_empty(_Ids(data, 0, count, index.dtype, starts[bounds[1:]]))

    def _not_empty(self, ids: _Ids) -> _Ids:
        if ids.count == 0:
            raise DataError(f"'{ids.path}' is empty; {REMEDY}, or leave it out of data.sources.{self.source}.tokens")
        return ids

    # ---- documents -------------------------------------------------------------------------------------------------

    def _documents(self) -> Iterator[np.ndarray]:
        """The ids between two ends, in memory one block and one document at a time."""
        kept: list[np.ndarray] = []  # pieces of the document that is still open
        length, ended = 0, False
        for at, block in self._blocks():
            is_eos = block == self.tokenizer.eos_id
            ended = ended or bool(is_eos.any())
            cuts = np.flatnonzero(is_eos) + 1
            if self._ids.ends is not None:
                first, last = np.searchsorted(self._ids.ends, [at, at + len(block)], side="right")
                cuts = np.union1d(cuts, self._ids.ends[first:last] - at)
            begin = 0
            for end in cuts.tolist():
                kept.append(block[begin:end])
                yield self._whole(kept)
                kept, length, begin = [], 0, end
            kept.append(block[begin:])
            length += len(block) - begin
            if length > self.max_ids:
                raise DataError(
                    f"'{self.path}' has more than {self.max_ids:,} ids without the end-of-document token "
                    f"{self.tokenizer.eos_id}; is it of data.tokenizer.path? Or raise data.max_line_mb"
                )
        if not ended and self._ids.ends is None:
            raise DataError(
                f"'{self.path}' never has the end-of-document token {self.tokenizer.eos_id} ({self.tokenizer.eos}), "
                f"which separates the documents of a .npy file; give the data.tokenizer.path that made it"
            )
        yield self._whole(kept)

    def _whole(self, pieces: list[np.ndarray]) -> np.ndarray:
        document = np.concatenate(pieces)
        return document[:-1] if len(document) and document[-1] == self.tokenizer.eos_id else document

    def _blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(ids before, ids) of every block. Raises DataError for an id that the tokenizer does not have."""
        ids, size = self._ids, self.tokenizer.vocab_size
        with open(ids.path, "rb") as file:
            file.seek(ids.first)
            for at in range(0, ids.count, READ_IDS):
                block = np.fromfile(file, dtype=ids.dtype, count=min(READ_IDS, ids.count - at))
                wrong = np.flatnonzero((block >= size) | (block < 0))
                if len(wrong):
                    where = at + int(wrong[0])
                    raise DataError(
                        f"'{ids.path}' id number {where + 1:,} is {block[wrong[0]]}, but the tokenizer has {size:,} "
                        f"tokens; give the data.tokenizer.path that made it{self._dtype_hint()}"
                    )
                self.position = file.tell()
                yield at, block

    def _dtype_hint(self) -> str:
        headerless = self.path.suffix == ".npy" and self._ids.first == 0
        return f", or the data.sources.{self.source}.token_dtype it has" if headerless else ""
