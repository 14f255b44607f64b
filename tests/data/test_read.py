"""Formats of source files: the same documents give the same shards, whatever they come in; a wrong file is one line
that names the file and the line."""

from __future__ import annotations

import gzip
import io
import json
import random
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from moetrain.config.errors import DataError
from moetrain.config.schema_data import DataConfig, SourceConfig
from moetrain.data.manifest import Manifest
from moetrain.data.prepare import prepare
from moetrain.data.read import Reader, ReadOptions
from moetrain.data.sources import find_files
from tests.data.conftest import config, document

DOCUMENTS = [document("food", n) for n in range(80)] + ["", " \n", "naïve 漢字 \U0001f600\n" * 30]


def json_lines(texts: list[str], field: str = "text") -> bytes:
    """One object a line, with another field before the text; the last line has no end."""
    return "\n".join(json.dumps({"id": i, field: text}) for i, text in enumerate(texts)).encode()


def parquet(texts: list[Any], kind: pyarrow.DataType, field: str = "text", rows: int = 7, first: str = "id") -> bytes:
    """Row groups of ``rows`` rows, with another column before the text."""
    table = pyarrow.table([list(range(len(texts))), pyarrow.array(texts, kind)], names=[first, field])
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink, row_group_size=rows)
    return sink.getvalue()


def in_members(compress: Callable[[bytes], bytes], data: bytes) -> bytes:
    """Compressed in two members or frames, cut in the middle of a line, as tools that append or run in parallel do."""
    return compress(data[: len(data) // 2]) + compress(data[len(data) // 2 :])


TEXT = pyarrow.string()
AS_FILES: dict[str, bytes] = {
    "a.txt": "%%\n".join(DOCUMENTS).encode(),
    "bom.txt": b"\xef\xbb\xbf" + "%%\n".join(DOCUMENTS).encode(),
    "a.txt.gz": gzip.compress("%%\n".join(DOCUMENTS).encode()),
    "a.jsonl": json_lines(DOCUMENTS),
    "windows.ndjson": b"\xef\xbb\xbf" + json_lines(DOCUMENTS).replace(b"\n", b"\r\n\r\n") + b"\r\n",
    "a.jsonl.gz": in_members(gzip.compress, json_lines(DOCUMENTS)) + b"\0" * 512,
    "a.json.gz": gzip.compress(json_lines(DOCUMENTS)),
    "a.jsonl.zst": in_members(zstandard.ZstdCompressor().compress, json_lines(DOCUMENTS)),
    "a.parquet": parquet(DOCUMENTS, TEXT),
    "large.parquet": parquet(DOCUMENTS, pyarrow.large_string()),
    "dictionary.parquet": parquet(DOCUMENTS, pyarrow.dictionary(pyarrow.int32(), TEXT)),
}


def prepared(folder: Path, name: str, content: bytes, **options: Any) -> tuple[DataConfig, Manifest]:
    """The data set whose only file holds ``content``."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    source = SourceConfig(paths=[str(folder / name)], delimiter="%%\n", field=options.pop("field", "text"))
    cfg = config(folder, {"a": source}, **options)
    return cfg, prepare(cfg, progress=False)


def test_the_same_documents_give_the_same_bytes_in_every_format(tmp_path: Path) -> None:
    shards = {}
    for name, content in AS_FILES.items():
        cfg, manifest = prepared(tmp_path / name, name, content)
        files = [*Path(cfg.dir).glob("a.*"), Path(cfg.dir) / "tokenizer.json"]
        shards[name] = {file.name: file.read_bytes() for file in files}
        assert len(files) == 5 and manifest.domains["a"].train.documents + manifest.domains["a"].val.documents == 81
        stamp = (Path(cfg.dir) / "manifest.json").stat().st_mtime_ns
        (tmp_path / name / name).touch()
        assert prepare(cfg, progress=False) == manifest  # touched, not changed: nothing is done
        assert (Path(cfg.dir) / "manifest.json").stat().st_mtime_ns == stamp
    for name, found in shards.items():
        assert found == shards["a.txt"], name


def test_another_field_is_another_data_set(tmp_path: Path) -> None:
    lines = b"\n".join(json.dumps({"text": "x y " * n, "body": "z " * n}).encode() for n in range(1, 99))
    cfg, first = prepared(tmp_path, "a.jsonl", lines)
    cfg.sources["a"].field = "body"
    second = prepare(cfg, progress=False)
    assert first.recipe != second.recipe and second.domains["a"].train.bytes < first.domains["a"].train.bytes


def test_a_folder_gives_its_json_lines_and_parquet(tmp_path: Path) -> None:
    for name in (*AS_FILES, "a.png", "b.jsonl.bz2", ".c.jsonl", "d.bin.gz"):
        (tmp_path / name).write_bytes(b"")
    found = {file.path.name for file in find_files("a", SourceConfig(paths=[str(tmp_path)]))}
    assert found == set(AS_FILES) - {"a.txt.gz"}


GOOD = json_lines(["one", "two"]) + b"\n"
LONG = json_lines(["one", "x " * 600_000])
ZSTD = zstandard.ZstdCompressor().compress(json_lines([f"line {n} {hash(str(n))}" for n in range(9999)]))
GZIP = gzip.compress(json_lines([f"line {n} {hash(str(n))}" for n in range(9999)]))
# what it is: (name, content, message)
WRONG: dict[str, tuple[str, bytes, str]] = {
    "no field": ("a.jsonl", GOOD + b'{"body": "x", "a\\nb": 1}', r"a.jsonl' line 3 has no field 'text', but 'body', "),
    "empty object": ("a.jsonl", GOOD + b"{}", "a.jsonl' line 3 has no field 'text', but none at all; set data.sources"),
    "number": ("a.jsonl", GOOD + b'{"text": 3}', "a.jsonl' line 3: field 'text' is a number, not text; correct"),
    "null": ("a.jsonl", GOOD + b'\n{"text": null}', "a.jsonl' line 4: field 'text' is null, not text"),
    "no object": ("a.jsonl", GOOD + b'["text"]', "a.jsonl' line 3 is no JSON object"),
    "broken": ("a.jsonl", GOOD + b'{"text": "x\n' + GOOD, "a.jsonl' line 3 is not JSON: .* at column 10; repair"),
    "deep": ("a.jsonl", GOOD + b"[" * 100_000, "a.jsonl' line 3 is not JSON: .*recursion"),
    "broken in gzip": ("a.jsonl.gz", gzip.compress(GOOD + b"{"), "a.jsonl.gz' line 3 is not JSON"),
    "NUL": ("a.jsonl", GOOD + b'{"text": "\0"}', "a.jsonl' line 3 is not JSON: Invalid control character"),
    "Latin-1": ("a.jsonl", GOOD + b'{"text": "caf\xe9"}', "a.jsonl' line 3 is not UTF-8 text: byte 13 is 0xe9"),
    "surrogate": ("a.jsonl", GOOD + rb'{"text": "\ud800x"}', "a.jsonl' line 3 is not UTF-8 text: it has half of a"),
    "long line": ("a.jsonl", LONG, "a.jsonl' line 2 has more than 1 MB"),
    "long line in zst": ("a.jsonl.zst", zstandard.ZstdCompressor().compress(LONG), "a.jsonl.zst' line 2 has more than"),
    "text, late NUL": ("a.txt", b"a\n" * 700_000 + b"\0", "a.txt' line 700001 is not text: byte 1400000 is NUL"),
    "text in gzip": ("a.txt.gz", gzip.compress(b"x\n" + b"y" * 3_000_000), "a.txt.gz' line 2 has more than 1 MB"),
    "gzip cut off": ("a.jsonl.gz", GZIP[:-1000], r"a.jsonl.gz' is cut off after line \d\d\d\d; make or fetch it again"),
    "gzip end cut off": ("a.jsonl.gz", GZIP[:-2], "a.jsonl.gz' is cut off after line 999"),
    "zst cut off": ("a.jsonl.zst", ZSTD[:-1000], r"a.jsonl.zst' is cut off after line \d+; make or fetch it again"),
    "no gzip": ("a.jsonl.gz", GOOD, "a.jsonl.gz' is damaged after line 0"),
    "no zst": ("a.jsonl.zst", GOOD, "a.jsonl.zst' is damaged after line 0"),
    "gzip damaged": ("a.jsonl.gz", GZIP[:-6] + b"??????", "a.jsonl.gz' is damaged after line"),
    "no parquet": ("a.parquet", GOOD, "a.parquet' is not parquet, or damaged or cut off after row 0"),
    "empty parquet": ("a.parquet", b"", "a.parquet' is not parquet, or damaged or cut off after row 0"),
    "parquet cut off": ("a.parquet", parquet(["x"] * 99, TEXT)[:-100], "a.parquet' is not parquet, or damaged or cut"),
    "no column": ("a.parquet", parquet(["x"], TEXT, "body"), "has no field 'text', but 'id', 'body'; set data.sources"),
    "two columns": ("a.parquet", parquet(["x"], TEXT, first="text"), "several columns 'text'; rename all but one"),
    "column of numbers": ("a.parquet", parquet([1], pyarrow.int64()), "column 'text' holds int64, not text"),
    "null in parquet": ("a.parquet", parquet(["x"] * 9 + [None], TEXT), "a.parquet' row 10: field 'text' is null"),
    "long row": ("a.parquet", parquet(["x", "y" * 1_000_001], TEXT), "a.parquet' row 2 has more than 1 MB"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_one_line_with_its_place(tmp_path: Path, case: str) -> None:
    name, content, message = WRONG[case]
    with pytest.raises(DataError, match=message) as error:
        prepared(tmp_path, name, content, max_line_mb=1)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "prepared").exists()


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")])
def test_a_missing_package_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"{name}' needs the package {package}; install it .*moetrain\[data\]"):
        prepared(tmp_path, name, AS_FILES[name])
    prepared(tmp_path, "b.jsonl.gz", AS_FILES["a.jsonl.gz"])  # needs neither


def test_invalid_utf8_is_replaced_and_counted_where_that_is_asked(tmp_path: Path) -> None:
    words = [f"some words, and number {n} " * 20 for n in range(30)]
    bad = [b"caf\xe9 \xff\xfe and \xef\xbf\xbd is no error", *(word.encode() for word in words)]
    column = pyarrow.StringArray.from_buffers(len(bad), *pyarrow.array(bad, pyarrow.binary()).buffers()[1:])
    lines = [b'{"text": "' + text + b'"}' for text in bad]
    files = {
        "a.txt": (b"%%\n".join(bad), 3),
        "a.jsonl": (b"\n".join(lines), 3),
        "b.jsonl": (b"\n".join(lines).replace(b"\xff\xfe", rb"\udead\ud8ff"), 3),
        "a.parquet": (parquet(column, TEXT), 3),
    }
    for name, (content, count) in files.items():
        with pytest.raises(DataError, match="is not UTF-8 text"):
            prepared(tmp_path / name, name, content)
        cfg, manifest = prepared(tmp_path / name, name, content, invalid_utf8="replace")
        assert manifest.domains["a"].replaced == count and Manifest.load(Path(cfg.dir)) == manifest
        assert f"a: {count} invalid UTF-8 sequences were replaced" in manifest.table()
        first, last = manifest.domains["a"].train, manifest.domains["a"].val
        shown = b"".join(bad).decode("utf-8", errors="replace")
        assert first.bytes + last.bytes == len(shown.encode())


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_a_large_file_is_never_in_memory_whole(tmp_path: Path, ending: str) -> None:
    """40 MB of text in documents of 20 kB take a few MB to read, in parquet in row groups of 2 MB."""
    rng = random.Random(0)
    texts = [f"{n} " + rng.randbytes(10_000).hex() for n in range(2000)]
    lines = json_lines(texts)
    content = {
        "jsonl": lambda: lines,
        "jsonl.gz": lambda: gzip.compress(lines, 1),
        "jsonl.zst": lambda: zstandard.ZstdCompressor().compress(lines),
        "parquet": lambda: parquet(texts, TEXT, rows=100),
    }[ending]()
    path = tmp_path / f"a.{ending}"
    path.write_bytes(content)
    (file,) = find_files("a", SourceConfig(paths=[str(path)]))
    options = ReadOptions("a", "text", None, 64, False)
    before, arrow, read = pyarrow.total_allocated_bytes(), 0, 0
    tracemalloc.start()
    for text in Reader(file, options):
        read += len(text)
        arrow = max(arrow, pyarrow.total_allocated_bytes() - before)
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read == sum(map(len, texts)) and python + arrow < 16_000_000
