"""Raw text: from the paths of a source to its files, and what kind each is. `read.py` reads them."""

from __future__ import annotations

import glob
import importlib.resources
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moetrain.config.errors import DataError
from moetrain.config.schema_data import SourceConfig

PACKAGE_PREFIX = "moetrain:"
# A folder gives its files with these endings, JSON lines and parquet. Files that are named, or matched by a glob, are
# read whatever their ending.
TEXT_SUFFIXES = frozenset(
    f".{suffix}"
    for group in (
        "txt text md markdown rst tex org html xml json yaml yml toml csv",
        "py pyi go c h cc cpp hpp cu java js jsx ts tsx rs rb php pl lua r jl scala kt swift cs hs ml el lisp sh sql",
    )
    for suffix in group.split()
)
COMPRESSIONS = (".gz", ".zst")
JSON_LINES = (".jsonl", ".ndjson")
SAVED_MARKS = ("state.json", "dataset_dict.json")  # in folders that save_to_disk of 'datasets' wrote
PREPARED_MARKS = {"manifest.json", "sources.json", "tokenizer.json"}  # in folders that prepare wrote


@dataclass(frozen=True)
class SourceFile:
    """One file as it was found: enough to tell later whether it has changed. ``form`` says who reads it: read.py,
    tokens.py (``path`` is the .npy or .idx) or hub.py (``path`` names a data set and is no file)."""

    path: Path
    size: int
    mtime_ns: int
    form: Literal["text", "tokens", "dataset"] = "text"


def compression_of(path: Path) -> str | None:
    """'.gz', '.zst' or None, by the ending."""
    return path.suffix.lower() if path.suffix.lower() in COMPRESSIONS else None


def kind_of(path: Path) -> Literal["text", "jsonl", "parquet", "arrow"]:
    """How a file is read, by its ending: JSON lines are .jsonl and .ndjson, and .json where it is compressed (large
    corpora are published so); what is not known is text."""
    compressed = compression_of(path) is not None
    ending = (path.with_suffix("") if compressed else path).suffix.lower()
    if ending in JSON_LINES or (compressed and ending == ".json"):
        return "jsonl"
    if compressed:
        return "text"
    return "parquet" if ending == ".parquet" else "arrow" if ending == ".arrow" else "text"


def _in_folder(path: Path) -> bool:
    """Whether a folder gives this file: with a known ending, and compressed only where it holds JSON lines."""
    return kind_of(path) in ("jsonl", "parquet") or path.suffix.lower() in TEXT_SUFFIXES


def resolve(path: str) -> str:
    """``path`` with a leading 'moetrain:' replaced by the folder of the installed package and ``~`` by the home
    folder."""
    if path.startswith(PACKAGE_PREFIX):
        return str(importlib.resources.files("moetrain") / path.removeprefix(PACKAGE_PREFIX))
    return os.path.expanduser(path)


def find_files(domain: str, source: SourceConfig) -> list[SourceFile]:
    """Files of a domain, each once, in the order of its paths and sorted by name inside a folder or glob.

    Raises DataError for a path that does not exist, a glob that matches no file, and a folder without text.
    """
    if not source.paths:
        raise DataError(f"domain '{domain}' has no text: give data.sources.{domain}.paths, dataset or tokens")
    found: dict[Path, SourceFile] = {}
    for path in source.paths:
        for file in matching(domain, path):
            stat = file.stat()
            found.setdefault(file.resolve(), SourceFile(file, stat.st_size, stat.st_mtime_ns))
    return list(found.values())


def left_out(source: SourceConfig) -> Counter[str]:
    """Ending -> files of the source's folders that are not read, since it is not known; hidden ones are not counted."""
    folders = [name for path in source.paths if os.path.isdir(name := resolve(path))]
    every = (Path(p).relative_to(folder) for folder in folders for p in _below(folder))
    return Counter(p.suffix or p.name for p in every if not _in_folder(p) and not _hidden(p))


def matching(
    source: str, path: str, wanted: Callable[[Path], bool] = _in_folder, field: str = "paths", what: str = "text"
) -> list[Path]:
    """The files that one entry of the list ``data.sources.SOURCE.FIELD`` stands for; of a folder those that are
    ``wanted``. Raises DataError as ``find_files``."""
    name = resolve(path)
    if os.path.isdir(name):
        if any((Path(name) / mark).is_file() for mark in SAVED_MARKS):
            raise DataError(
                f"domain '{source}': folder '{path}' is a data set that save_to_disk wrote; give it as "
                f"data.sources.{source}.dataset"
            )
        every = sorted(Path(p) for p in _below(name) if os.path.isfile(p))
        files = [p for p in every if wanted(p) and not _hidden(p.relative_to(name))]
        if not files:
            raise DataError(
                f"domain '{source}': folder '{path}' holds {len(every)} files and none with a known {what} ending; "
                f"name the files by a glob such as '{path}/**/*.dat'"
            )
    elif os.path.exists(name):
        files = [Path(name)]
    elif glob.has_magic(name):
        files = sorted(Path(p) for p in glob.glob(name, recursive=True) if os.path.isfile(p))
        if not files:
            raise DataError(
                f"domain '{source}': no file matches '{path}' (looked from {os.getcwd()}); correct "
                f"data.sources.{source}.{field}"
            )
    else:
        raise DataError(
            f"domain '{source}': '{path}' does not exist (looked from {os.getcwd()}); correct "
            f"data.sources.{source}.{field}"
        )
    return files


def _below(folder: str) -> Iterator[str]:
    """All files below a folder, also where it links to folders elsewhere: corpora are put together so. Links to what
    lies in the folder, or around it, are not followed, and no folder is read twice. Prepared data is left out: text
    that has what is made of it would change with every call."""
    top, seen = os.path.realpath(folder), set()
    for where, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen or set(files) >= PREPARED_MARKS:
            folders.clear()
            continue
        seen.add(real)
        yield from (os.path.join(where, file) for file in files)
        folders[:] = sorted(f for f in folders if not _near(os.path.join(where, f), top))


def _near(path: str, top: str) -> bool:
    """Whether ``path`` is a link to something in or around ``top``."""
    real = os.path.realpath(path)
    return os.path.islink(path) and os.path.commonpath([real, top]) in (real, top)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def compile_delimiter(domain: str, source: SourceConfig) -> re.Pattern[str] | None:
    """The domain's delimiter, where ^ and $ match at every line. Raises DataError for one that is no regular
    expression, has groups, or divides everywhere."""
    if source.delimiter is None:
        return None
    try:
        pattern = re.compile(source.delimiter, re.MULTILINE)
    except re.error as error:
        raise DataError(
            f"data.sources.{domain}.delimiter '{source.delimiter}' is not a regular expression: {error}"
        ) from None
    if (found := pattern.match("aa", 1)) and not found.group():
        raise DataError(
            f"data.sources.{domain}.delimiter '{source.delimiter}' fits between any two letters, so each would be a "
            f"document; give null for one document a file, or what stands between documents"
        )
    if pattern.groups:
        raise DataError(
            f"data.sources.{domain}.delimiter '{source.delimiter}' has a capturing group; write (?:...) instead "
            f"of (...)"
        )
    return pattern
