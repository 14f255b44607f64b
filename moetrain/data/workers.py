"""The parts of prepare that take time, on batches of documents, in this process or in several; results in order."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import TypeVar

import numpy as np
from tokenizers import Tokenizer

from moetrain.config.errors import DataError
from moetrain.data.filters import FILTERS
from moetrain.data.read import Document
from moetrain.data.split import DocumentKey
from moetrain.data.tokenizer import ids_of

K = TypeVar("K")
R = TypeVar("R")


def look_at(filter_name: str, documents: list[Document]) -> list[tuple[DocumentKey, str | None]]:
    """Key of each document, and the rule of the filter that its text breaks, if it breaks one."""
    return [(DocumentKey.of(d), FILTERS[filter_name](d) if isinstance(d, str) else None) for d in documents]


def tokenize(file: Path, documents: list[Document]) -> list[np.ndarray]:
    """Token ids of each document; of texts by the tokenizer.json ``file``, which every process reads once: a tokenizer
    that is sent with every batch would be megabytes of text. A batch is all texts or all ids, since a source is."""
    texts = [document for document in documents if isinstance(document, str)]
    if len(texts) < len(documents):
        return [np.asarray(document, dtype=np.int64) for document in documents]
    tokenizer = _tokenizer_of(file, file.stat().st_mtime_ns)  # the next data set may have its own at the same path
    return [np.asarray(ids, dtype=np.int64) for ids in ids_of(tokenizer, texts)]


@lru_cache(maxsize=1)
def _tokenizer_of(file: Path, mtime_ns: int) -> Tokenizer:
    return Tokenizer.from_file(str(file))


class Workers:
    """``processes`` processes as a context manager; 1: none but this one."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self.processes > 1:
            # spawn: this process has threads of its own (tokenizers, pyarrow), which a fork could catch holding a lock
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.processes, mp_context=context, initializer=_start)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(
        self, function: Callable[[list[Document]], R], batches: Iterable[tuple[K, list[Document]]]
    ) -> Iterator[tuple[K, R]]:
        """(key, function(documents)) of every (key, documents), in order. At most two batches per process are read
        ahead, so memory stays bounded. Raises DataError when a process is killed."""
        if self._pool is None:
            for key, documents in batches:
                yield key, function(documents)
            return
        waiting: deque[tuple[K, Future[R]]] = deque()
        try:
            for key, documents in batches:
                waiting.append((key, self._pool.submit(function, documents)))
                if len(waiting) >= 2 * self.processes:
                    first, result = waiting.popleft()
                    yield first, result.result()
            for first, result in waiting:
                yield first, result.result()
        except BrokenProcessPool:
            raise DataError(
                f"one of data.processes={self.processes} processes was killed or could not start, perhaps for want of "
                f"memory; run again with fewer"
            ) from None


def _start() -> None:
    """In a new process: one thread for the tokenizer, and an end when the process that wants the results is gone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
