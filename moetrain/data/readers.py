"""Which reader a source has: text files (read.py), a Hugging Face data set (hub.py) or ready tokens (tokens.py)."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from moetrain.config.errors import DataError
from moetrain.config.schema_data import DataConfig, SourceConfig
from moetrain.data.hub import DatasetReader, find_dataset
from moetrain.data.read import DocumentReader, Reader, ReadOptions, check_packages, file_digest
from moetrain.data.sources import SourceFile, compile_delimiter, find_files, kind_of, resolve
from moetrain.data.tokenizer import LoadedTokenizer, load_tokenizer
from moetrain.data.tokens import TokenReader, find_tokens, token_digest


def check_source(cfg: DataConfig, name: str) -> None:
    """Raise DataError for settings of a source that contradict each other."""
    source, where = cfg.sources[name], f"data.sources.{name}"
    given = [key for key in ("paths", "dataset", "tokens") if getattr(source, key)]
    if len(given) > 1:
        raise DataError(f"{where} has {' and '.join(given)}; give one of them, and the other to a source of its own")
    for key, owner in (
        ("dataset_config", "dataset"),
        ("dataset_split", "dataset"),
        ("dataset_revision", "dataset"),
        ("token_dtype", "tokens"),
        ("delimiter", "paths"),
    ):
        if given and given[0] != owner and getattr(source, key) is not None:
            raise DataError(f"{where}.{key} is for {owner}, but the source has {given[0]}; remove it")
    compile_delimiter(name, source)
    if source.tokens and source.filter != "none":
        raise DataError(f"{where}.filter={source.filter} needs text, but the source has tokens; remove it")
    if source.tokens and cfg.tokenizer.path is None:
        raise DataError(
            f"{where}.tokens needs the tokenizer that made them; set data.tokenizer.path to its tokenizer.json"
        )


def find_sources(name: str, source: SourceConfig) -> list[SourceFile]:
    """Files of a source, in order. Raises DataError as ``find_files``, ``find_dataset`` and ``find_tokens``."""
    if source.tokens:
        return find_tokens(name, source)
    return find_dataset(name, source) if source.dataset else find_files(name, source)


def check_files(cfg: DataConfig, name: str, files: list[SourceFile]) -> None:
    """Raise DataError for what can be seen of a source's files before any is read through."""
    field, default = cfg.sources[name].field, SourceConfig().field
    if field != default and all(file.form == "text" and kind_of(file.path) == "text" for file in files):
        raise DataError(
            f"data.sources.{name}.field={field} is for JSON lines and parquet, but none of its files is: "
            f"'{files[0].path}' is text by its ending; remove field, or rename the files, for example to .jsonl"
        )
    for file in files:
        if file.form == "text":
            check_packages(file.path)
        else:
            open_reader(cfg, name, file)


def open_reader(cfg: DataConfig, name: str, file: SourceFile) -> DocumentReader:
    """A new reading of one file of a source. Raises DataError."""
    source = cfg.sources[name]
    if file.form == "tokens":
        return TokenReader(file, name, source, _tokenizer(cfg.tokenizer.path or ""), cfg.max_line_mb)
    delimiter = compile_delimiter(name, source)
    options = ReadOptions(name, source.field, delimiter, cfg.max_line_mb, cfg.invalid_utf8 == "replace")
    return DatasetReader(file, options, source) if file.form == "dataset" else Reader(file, options)


def digest_of(cfg: DataConfig, name: str, file: SourceFile) -> str:
    """What ``digest`` of a reading of the file is after the last document."""
    if file.form == "text":
        return file_digest(file.path)
    if file.form == "tokens":
        return token_digest(file.path)
    reader = open_reader(cfg, name, file)
    for _ in reader:
        pass
    return reader.digest


def _tokenizer(path: str) -> LoadedTokenizer:
    folder = Path(resolve(path))
    folder = folder if folder.is_dir() else folder.parent
    stamps = [file.stat().st_mtime_ns for file in sorted(folder.glob("*.json"))]
    return _load_once(path, tuple(stamps))


@lru_cache(maxsize=1)  # asked for with every file, and it may be large
def _load_once(path: str, stamps: tuple[int, ...]) -> LoadedTokenizer:
    return load_tokenizer(path)
