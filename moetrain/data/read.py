"""One file's documents, read as a stream: text, JSON lines, parquet and Arrow streams, plain or compressed.

JSON lines are read block by block, parquet row group by row group and Arrow record batch by record batch (pyarrow
decodes one as a whole), so a file may be larger than memory. A text file is held in memory whole while it is read,
since a delimiter is a regular expression that may span lines.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moetrain.config.errors import DataError
from moetrain.data.sources import SourceFile, compression_of, kind_of

READ_BLOCK = 1_000_000
COMPRESSED_BLOCK = 16_384  # small, because a block may grow a thousandfold when it is decompressed
ROWS = 128  # parquet rows that are Python objects at once
BOM = b"\xef\xbb\xbf"
REPLACEMENT = "\ufffd"
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell them; UTF-8 cannot
PACKAGES = {".zst": "zstandard", "parquet": "pyarrow", "arrow": "pyarrow"}  # of the optional extra 'data'


@dataclass(frozen=True)
class ReadOptions:
    """How the files of a domain are read: see the fields of the same names in SourceConfig and DataConfig."""

    domain: str
    field: str
    delimiter: re.Pattern[str] | None
    max_line_mb: int
    replace_invalid: bool


def check_packages(path: Path) -> None:
    """Raise DataError when a package that is needed to read ``path`` is not installed."""
    for need in (compression_of(path), kind_of(path)):
        if need in PACKAGES:
            needed(PACKAGES[need], path)


def needed(package: str, path: Path | str) -> Any:
    """The module ``package``. Raises DataError when it is not installed, which reading ``path`` needs."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise DataError(f"'{path}' needs the package {package}; install it with pip install 'moetrain[data]'") from None


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, after the kind of file that it is read as (no kind for text)."""
    with open(path, "rb") as stream:
        return _digest_of(path, hashlib.file_digest(stream, "sha256").hexdigest())


def _digest_of(path: Path, sha256: str) -> str:
    return sha256 if kind_of(path) == "text" else f"{kind_of(path)}:{sha256}"


Document = str | np.ndarray  # a text, or the token ids of one (tokens.py)


class DocumentReader(Protocol):
    """What prepare needs of one reading of one file: its documents, once, and the attributes of ``Reader``."""

    position: int
    replaced: int
    digest: str

    def __iter__(self) -> Iterator[Document]: ...


class Reader:
    """One reading of one file: iterate over it, once, for its documents. Those without any visible character are left
    out.

    ``position`` is how many bytes of the file have been read so far. After the last document ``digest`` is that of
    ``file_digest`` and ``replaced`` the number of invalid UTF-8 sequences that were replaced. Iterating raises
    DataError, one line with the file and the line, for everything that is wrong with the file.
    """

    def __init__(self, file: SourceFile, options: ReadOptions) -> None:
        self.path, self.size, self.options = file.path, file.size, options
        self.position = self.replaced = 0
        self.digest = ""
        self._line = 0  # lines that are complete; the last of them is the one being looked at
        self._sha256 = hashlib.sha256()

    def __iter__(self) -> Iterator[str]:
        try:
            for document in self._every():
                if document and not document.isspace():
                    yield document
        except OSError as error:
            raise DataError(f"cannot read '{self.path}': {error.strerror or first_line(error)}") from None
        self.digest = _digest_of(self.path, self._sha256.hexdigest())

    def _every(self) -> Iterator[str]:
        """All documents, with the empty ones."""
        kinds = {"text": self._texts, "jsonl": self._json_texts, "parquet": self._row_texts, "arrow": self._row_texts}
        return kinds[kind_of(self.path)]()

    # ---- bytes -----------------------------------------------------------------------------------------------------

    def _raw(self, size: int = READ_BLOCK) -> Iterator[bytes]:
        """The file's bytes as they are on disk."""
        with open(self.path, "rb") as file:
            while block := file.read(size):
                self._sha256.update(block)
                self.position = file.tell()
                yield block

    def _blocks(self) -> Iterator[bytes]:
        """The file's bytes, decompressed."""
        compression = compression_of(self.path)
        if compression is None:
            return self._raw()
        if compression == ".gz":
            return self._decompressed(lambda: zlib.decompressobj(wbits=31), zlib.error)
        zstandard = importlib.import_module("zstandard")
        # the window of files that were made with zstd --long=31
        new = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        return self._decompressed(new, zstandard.ZstdError)

    def _decompressed(self, new: Callable[[], Any], damage: type[Exception]) -> Iterator[bytes]:
        """What the gzip members or zstd frames of the file hold, one after the other."""
        stream = None
        try:
            for block in self._raw(COMPRESSED_BLOCK):
                while block:
                    if stream is None:
                        block = block.lstrip(b"\0")  # gzip files may be padded, and no member begins with it
                        if not block:
                            break
                        stream = new()
                    data = stream.decompress(block)
                    for at in range(0, len(data), READ_BLOCK):
                        yield data[at : at + READ_BLOCK]
                    block, stream = (stream.unused_data, None) if stream.eof else (b"", stream)
        except damage as error:
            raise DataError(
                f"'{self.path}' is damaged after line {self._line}: {first_line(error)}; make or fetch it again"
            ) from None
        if stream is not None:
            raise DataError(f"'{self.path}' is cut off after line {self._line}; make or fetch it again")

    def _too_long(self, line: int) -> DataError:
        limit = self.options.max_line_mb
        return DataError(
            f"'{self.path}' line {line} has more than {limit} MB; is it text? Break the line, or raise data.max_line_mb"
        )

    # ---- text ------------------------------------------------------------------------------------------------------

    def _texts(self) -> Iterator[str]:
        """The pieces of a text file between its delimiters."""
        text = self._whole_text()
        if self.options.delimiter is None:
            yield text
        else:
            yield from self.options.delimiter.split(text)

    def _whole_text(self) -> str:
        """Text of the file; a line that is too long is found before the whole file is in memory."""
        limit, blocks, length, at = self.options.max_line_mb * 1_000_000, [], 0, 0
        for block in self._blocks():
            if (nul := block.find(0)) >= 0:
                line = self._line + block.count(b"\n", 0, nul) + 1
                raise DataError(
                    f"'{self.path}' line {line} is not text: byte {at + nul} is NUL; leave the file out or convert it "
                    f"to UTF-8 text"
                )
            first, last = block.find(b"\n"), block.rfind(b"\n")
            length += len(block) if first < 0 else first
            # inside one block of text no line can be longer than the limit, which is at least one block
            if length > limit:
                raise self._too_long(self._line + 1)
            length = length if first < 0 else len(block) - 1 - last
            self._line += block.count(b"\n")
            blocks.append(block)
            at += len(block)
        data = b"".join(blocks)
        del blocks
        mark = len(BOM) if data.startswith(BOM) else 0
        return self._decode(data[mark:], mark)

    def _decode(self, data: bytes, before: int = 0, where: str | None = None) -> str:
        """``data`` as text. ``where`` names its place; without it that is found from the bytes, ``before`` of which
        came before ``data``."""
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            if self.options.replace_invalid:
                text = data.decode("utf-8", errors="replace")
                self.replaced += text.count(REPLACEMENT) - data.count(REPLACEMENT.encode())
                return text
            if where is None:
                line = data.count(b"\n", 0, error.start) + 1
                where = f"line {line}"
            raise DataError(
                f"'{self.path}' {where} is not UTF-8 text: byte {before + error.start} is "
                f"0x{data[error.start]:02x}; convert it, for example with iconv -t UTF-8, or set "
                f"data.invalid_utf8=replace"
            ) from None

    # ---- JSON lines ------------------------------------------------------------------------------------------------

    def _lines(self) -> Iterator[bytes]:
        """The file's lines without their ends, in memory one block and one line at a time."""
        limit, length = self.options.max_line_mb * 1_000_000, 0
        kept: list[bytes] = []  # pieces of the line that is still open
        for block in self._blocks():
            *ended, rest = block.split(b"\n")
            for piece in ended:
                self._line += 1
                if length + len(piece) > limit:
                    raise self._too_long(self._line)
                yield b"".join((*kept, piece))
                kept, length = [], 0
            kept.append(rest)
            length += len(rest)
            if length > limit:
                raise self._too_long(self._line + 1)
        if length:
            self._line += 1
            yield b"".join(kept)

    def _json_texts(self) -> Iterator[str]:
        """The text field of every line; empty lines are passed over."""
        for line in self._lines():
            if self._line == 1:
                line = line.removeprefix(BOM)
            if line.strip():
                yield self._json_text(line, f"line {self._line}")

    def _json_text(self, line: bytes, where: str) -> str:
        field = self.options.field
        try:
            record = json.loads(self._decode(line, 0, where))
        except (ValueError, RecursionError) as error:
            what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(f"'{self.path}' {where} is not JSON: {what}; repair or remove the line") from None
        if not isinstance(record, dict):
            raise DataError(
                f"'{self.path}' {where} is no JSON object; write one like {{\"{field}\": ...}} on each line"
            )
        if field not in record:
            raise self._no_field(where, list(record))
        text = record[field]
        if not isinstance(text, str):
            raise DataError(
                f"'{self.path}' {where}: field '{field}' is {_json_type(text)}, not text; correct the line or "
                f"data.sources.{self.options.domain}.field"
            )
        return self._without_surrogates(text, where) if rb"\u" in line else text

    def _without_surrogates(self, text: str, where: str) -> str:
        """``text`` without halves of UTF-16 pairs, which no UTF-8 text can hold."""
        if LONE_SURROGATE.search(text) is None:
            return text
        if not self.options.replace_invalid:
            raise DataError(
                f"'{self.path}' {where} is not UTF-8 text: it has half of a surrogate pair (\\ud800 to \\udfff); "
                f"repair the line, or set data.invalid_utf8=replace"
            )
        text, count = LONE_SURROGATE.subn(REPLACEMENT, text)
        self.replaced += count
        return text

    def _no_field(self, where: str, names: list[str]) -> DataError:
        known = ", ".join(repr(name) for name in names[:8]) + (", ..." if len(names) > 8 else "")
        return DataError(
            f"'{self.path}' {where} has no field '{self.options.field}', but {known or 'none at all'}; set "
            f"data.sources.{self.options.domain}.field"
        )

    # ---- parquet and Arrow -----------------------------------------------------------------------------------------

    def _row_texts(self) -> Iterator[str]:
        """The text column of every row, ROWS rows at a time."""
        arrow = importlib.import_module("pyarrow")
        row, kind = 0, "an Arrow stream" if kind_of(self.path) == "arrow" else "parquet"
        try:
            for values in self._stream_rows(arrow) if kind_of(self.path) == "arrow" else self._parquet_rows(arrow):
                for value in values:
                    row += 1
                    yield self._row_text(value, f"row {row}")
        except (arrow.ArrowException, OSError) as error:
            raise DataError(
                f"'{self.path}' is not {kind}, or damaged or cut off after row {row}: {first_line(error)}; make or "
                f"fetch it again"
            ) from None
        for _ in self._raw():  # these are not read from front to end: the hash is taken after it
            pass

    def _parquet_rows(self, arrow: Any) -> Iterator[list[bytes | None]]:
        """Values of the text column, ROWS rows at a time."""
        field, done = self.options.field, 0
        with importlib.import_module("pyarrow.parquet").ParquetFile(
            self.path, buffer_size=READ_BLOCK, pre_buffer=False
        ) as file:
            self._check_column(arrow, file.schema_arrow)
            for batch in file.iter_batches(batch_size=ROWS, columns=[field]):
                done += batch.num_rows
                self.position = int(self.size * done / file.metadata.num_rows)
                yield self._values(arrow, batch)

    def _stream_rows(self, arrow: Any) -> Iterator[list[bytes | None]]:
        """Values of the text column, in memory one record batch."""
        with open(self.path, "rb") as file, arrow.ipc.open_stream(file) as stream:
            self._check_column(arrow, stream.schema)
            for batch in stream:
                self.position = file.tell()
                for first in range(0, batch.num_rows, ROWS):
                    yield self._values(arrow, batch.slice(first, ROWS))

    def _check_column(self, arrow: Any, schema: Any) -> None:
        """Raise DataError unless the field is a column of text."""
        field = self.options.field
        if field not in schema.names:
            raise self._no_field("(its columns)", schema.names)
        if schema.names.count(field) > 1:
            raise DataError(f"'{self.path}' has several columns '{field}'; rename all but one of them")
        kind = schema.field(field).type
        text = kind.value_type if arrow.types.is_dictionary(kind) else kind
        if text not in (arrow.string(), arrow.large_string(), arrow.string_view()):
            raise DataError(
                f"'{self.path}': column '{field}' holds {kind}, not text; correct the file or "
                f"data.sources.{self.options.domain}.field"
            )

    def _values(self, arrow: Any, batch: Any) -> list[bytes | None]:
        """The text column of a record batch or table, as bytes, so that invalid UTF-8 is met by the same rules as
        elsewhere."""
        column = batch.column(batch.schema.names.index(self.options.field))
        if isinstance(column, arrow.ChunkedArray):
            column = column.combine_chunks()
        column = column.dictionary_decode() if arrow.types.is_dictionary(column.type) else column
        return column.cast(arrow.large_binary()).to_pylist()

    def _row_text(self, value: bytes | None, where: str) -> str:
        if value is None:
            raise DataError(
                f"'{self.path}' {where}: field '{self.options.field}' is null, not text; correct the row or "
                f"data.sources.{self.options.domain}.field"
            )
        if len(value) > self.options.max_line_mb * 1_000_000:
            raise DataError(
                f"'{self.path}' {where} has more than {self.options.max_line_mb} MB; is it text? Raise data.max_line_mb"
            )
        return self._decode(value, 0, where)


def _json_type(value: object) -> str:
    names = {bool: "true or false", type(None): "null", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["unknown error"])[0]
