"""Raw text: from the paths of a domain to its documents. Everything that can be wrong with a file is found here."""

from __future__ import annotations

import glob
import hashlib
import importlib.resources
import os
import re
from dataclasses import dataclass
from pathlib import Path

from moetrain.config.errors import DataError
from moetrain.config.schema import SourceConfig

PACKAGE_PREFIX = "moetrain:"
# A folder gives its files with these endings. Files that are named, or matched by a glob, are read whatever their
# ending.
TEXT_SUFFIXES = frozenset(
    f".{suffix}"
    for group in (
        "txt text md markdown rst tex org html xml json yaml yml toml csv",
        "py pyi go c h cc cpp hpp cu java js jsx ts tsx rs rb php pl lua r jl scala kt swift cs hs ml el lisp sh sql",
    )
    for suffix in group.split()
)
READ_BLOCK = 1_000_000


@dataclass(frozen=True)
class SourceFile:
    """One text file as it was found: enough to tell later whether it has changed."""

    path: Path
    size: int
    mtime_ns: int


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
        raise DataError(f"domain '{domain}' has no text: give data.sources.{domain}.paths, or remove the domain")
    found: dict[Path, SourceFile] = {}
    for path in source.paths:
        for file in _matches(domain, path):
            stat = file.stat()
            found.setdefault(file.resolve(), SourceFile(file, stat.st_size, stat.st_mtime_ns))
    return list(found.values())


def _matches(domain: str, path: str) -> list[Path]:
    """The files that one entry of ``paths`` stands for."""
    name = resolve(path)
    if os.path.isdir(name):
        every = sorted(p for p in Path(name).rglob("*") if p.is_file())
        files = [p for p in every if p.suffix.lower() in TEXT_SUFFIXES and not _hidden(p.relative_to(name))]
        if not files:
            raise DataError(
                f"domain '{domain}': folder '{path}' holds {len(every)} files and none with a known text "
                f"ending; name the files by a "
                f"glob such as '{path}/**/*.dat'"
            )
    elif os.path.exists(name):
        files = [Path(name)]
    elif glob.has_magic(name):
        files = sorted(Path(p) for p in glob.glob(name, recursive=True) if os.path.isfile(p))
        if not files:
            raise DataError(
                f"domain '{domain}': no file matches '{path}' (looked from {os.getcwd()}); correct "
                f"data.sources.{domain}.paths"
            )
    else:
        raise DataError(
            f"domain '{domain}': '{path}' does not exist (looked from {os.getcwd()}); correct "
            f"data.sources.{domain}.paths"
        )
    return files


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def read_text(path: Path, max_line_mb: int) -> tuple[str, str]:
    """Text of a file and the SHA-256 of its bytes.

    Raises DataError for a file that cannot be read, holds NUL bytes, is not UTF-8, or has a line of more than
    ``max_line_mb`` MB (found while reading, before the whole file is in memory).
    """
    limit = max_line_mb * 1_000_000
    digest, blocks, line, at = hashlib.sha256(), [], 0, 0
    try:
        with open(path, "rb") as file:
            while block := file.read(READ_BLOCK):
                if (nul := block.find(0)) >= 0:
                    raise DataError(
                        f"'{path}' is not text: byte {at + nul} is NUL; leave the file out or convert it to UTF-8 text"
                    )
                first, last = block.find(b"\n"), block.rfind(b"\n")
                line += len(block) if first < 0 else first
                # inside one block no line can be longer than the limit, which is at least one block
                if line > limit:
                    raise DataError(
                        f"'{path}' has a line of more than {max_line_mb} MB before byte {at + len(block)}; is "
                        f"it text? Break the line, or raise "
                        "data.max_line_mb"
                    )
                line = line if first < 0 else len(block) - 1 - last
                digest.update(block)
                blocks.append(block)
                at += len(block)
        return b"".join(blocks).decode("utf-8-sig"), digest.hexdigest()
    except UnicodeDecodeError as error:
        raise DataError(
            f"'{path}' is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}; convert it, "
            f"for example with iconv -t UTF-8"
        ) from None
    except OSError as error:
        raise DataError(f"cannot read '{path}': {error.strerror}") from None


def split_documents(text: str, delimiter: re.Pattern[str] | None) -> list[str]:
    """Documents of one file's text; those without any visible character are left out."""
    pieces = [text] if delimiter is None else delimiter.split(text)
    return [piece for piece in pieces if piece.strip()]


def compile_delimiter(domain: str, source: SourceConfig) -> re.Pattern[str] | None:
    """The domain's delimiter, where ^ and $ match at every line. Raises DataError for one that is no regular
    expression or has groups."""
    if source.delimiter is None:
        return None
    try:
        pattern = re.compile(source.delimiter, re.MULTILINE)
    except re.error as error:
        raise DataError(
            f"data.sources.{domain}.delimiter '{source.delimiter}' is not a regular expression: {error}"
        ) from None
    if pattern.groups:
        raise DataError(
            f"data.sources.{domain}.delimiter '{source.delimiter}' has a capturing group; write (?:...) instead "
            f"of (...)"
        )
    return pattern
