"""Hugging Face data sets as sources: folders that save_to_disk wrote, and everything that ``datasets.load_dataset``
opens by name or folder, which is read as a stream.

A saved folder is read as its Arrow files, in the order of its state.json, without ``datasets``.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moetrain.config.errors import DataError
from moetrain.config.schema_data import SourceConfig
from moetrain.data.read import ROWS, Reader, ReadOptions, first_line, needed
from moetrain.data.sources import SAVED_MARKS, SourceFile, resolve

DEFAULT_SPLIT = "train"


def find_dataset(source: str, cfg: SourceConfig) -> list[SourceFile]:
    """Files of ``data.sources.SOURCE.dataset``: the Arrow files of a saved folder, else one that stands for the whole.
    Asks no network. Raises DataError for a folder that is damaged or has not that split."""
    folder = Path(resolve(cfg.dataset or ""))
    if any((folder / mark).is_file() for mark in SAVED_MARKS):
        return _saved_files(source, folder, cfg)
    if cfg.dataset is not None and cfg.dataset.startswith(("/", "./", "../", "~")) and not folder.exists():
        raise DataError(
            f"source '{source}': folder '{cfg.dataset}' does not exist (looked from {os.getcwd()}); correct "
            f"data.sources.{source}.dataset"
        )
    stats = [path.stat() for path in sorted(folder.rglob("*")) if path.is_file()] if folder.is_dir() else []
    size, newest = sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)
    name = "|".join([str(cfg.dataset), cfg.dataset_config or "", cfg.dataset_split or "", cfg.dataset_revision or ""])
    return [SourceFile(Path(f"{name}|{cfg.field}"), size, newest, "dataset")]


def _saved_files(source: str, folder: Path, cfg: SourceConfig) -> list[SourceFile]:
    """The Arrow files of one split, in order."""
    if cfg.dataset_config is not None or cfg.dataset_revision is not None:
        raise DataError(
            f"'{folder}' was written by save_to_disk, which keeps one configuration; remove "
            f"data.sources.{source}.dataset_config and dataset_revision"
        )
    marks = folder / "dataset_dict.json"
    if marks.is_file():
        splits = _json(marks, "splits")
        folder = folder / _split(source, str(folder), cfg.dataset_split, splits)
    state = _json(folder / "state.json")
    named = state.get("_split")
    if not marks.is_file() and cfg.dataset_split not in (None, named):
        raise DataError(
            f"'{folder}' holds one split, {named or 'which has no name'}, not '{cfg.dataset_split}'; remove or correct "
            f"data.sources.{source}.dataset_split"
        )
    if state.get("_indices_data_files"):
        raise DataError(f"'{folder}' holds a selection of rows by index; call flatten_indices() before save_to_disk")
    try:
        paths = [folder / part["filename"] for part in state["_data_files"]]
    except (KeyError, TypeError):
        raise DataError(f"'{folder / 'state.json'}' names no data files; save the data set again") from None
    for path in paths:
        if not path.is_file():
            raise DataError(f"'{path}' is missing, which its state.json names; save the data set again")
    return [SourceFile(path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def _json(file: Path, key: str | None = None) -> Any:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return content if key is None else content[key]
    except FileNotFoundError:
        raise DataError(f"'{file}' is missing; save the data set again") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"'{file}' is damaged; save the data set again") from None


def _split(source: str, name: str, asked: str | None, known: list[str]) -> str:
    """The split ``asked`` for; None: train, or the only one."""
    split = asked or (known[0] if len(known) == 1 else DEFAULT_SPLIT)
    if split not in known:
        raise DataError(
            f"data set '{name}' has no split '{split}', but {', '.join(map(repr, known)) or 'none at all'}; set "
            f"data.sources.{source}.dataset_split"
        )
    return split


class DatasetReader(Reader):
    """One reading of a data set through ``datasets``, in memory ROWS rows at a time beside what that holds.

    ``digest`` is of the texts, each after its length. Making one opens the data set, so a wrong name, configuration,
    split or column is found at once.
    """

    def __init__(self, file: SourceFile, options: ReadOptions, cfg: SourceConfig) -> None:
        super().__init__(file, options)
        self.path = Path(cfg.dataset or "")
        self._rows = self._open(cfg)
        if self._rows.column_names is not None and options.field not in self._rows.column_names:
            raise self._no_field("(its columns)", self._rows.column_names)

    def __iter__(self) -> Iterator[str]:
        yield from super().__iter__()
        self.digest = f"dataset:{self._sha256.hexdigest()}"

    def _open(self, cfg: SourceConfig) -> Any:
        """The rows of the split. Opening downloads no rows."""
        datasets, name = needed("datasets", self.path), resolve(cfg.dataset or "")
        try:
            with _quiet(datasets):
                found = datasets.load_dataset(
                    name, name=cfg.dataset_config, revision=cfg.dataset_revision, streaming=True
                )
        except Exception as error:  # anything that the code of a data set, a file system or the network may raise
            raise self._cannot_open(datasets, error) from None
        return found[_split(self.options.domain, str(self.path), cfg.dataset_split, list(found))]

    def _cannot_open(self, datasets: Any, error: Exception) -> DataError:
        source, message = self.options.domain, " ".join(str(error).split())[:300]
        if isinstance(error, datasets.exceptions.DatasetNotFoundError):
            what = f"is no data set on the hub that you may read; correct data.sources.{source}.dataset, or log in"
        elif isinstance(error, ConnectionError):
            what = (
                f"is no folder here, and the hub cannot be reached: {message}; correct data.sources.{source}.dataset, "
                f"go online, or give a folder that save_to_disk wrote"
            )
        elif "BuilderConfig" in message or "Config name is missing" in message:
            what = f"needs another configuration: {message}; set data.sources.{source}.dataset_config"
        else:
            what = f"cannot be opened by datasets: {message or type(error).__name__}"
        return DataError(f"'{self.path}' {what}")

    def _every(self) -> Iterator[str]:
        """The text column of every row."""
        arrow, datasets, row = needed("pyarrow", self.path), needed("datasets", self.path), 0
        tables = iter(self._rows.with_format("arrow").iter(batch_size=ROWS))
        while True:
            try:
                with _quiet(datasets):
                    table = next(tables, None)
            except Exception as error:  # as above
                raise DataError(f"'{self.path}' cannot be read after row {row}: {first_line(error)}") from None
            if table is None:
                return
            self._check_column(arrow, table.schema)
            for value in self._values(arrow, table):
                row += 1
                text = self._row_text(value, f"row {row}")
                self._sha256.update(len(value or b"").to_bytes(8, "little") + (value or b""))
                yield text


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No lines about every retry and progress: what fails is said in one."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "datasets", "fsspec")]
    before = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
