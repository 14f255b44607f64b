"""The pass that makes a prepared data set: read and check all text, choose what is held out, tokenise, write."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from moetrain.config.errors import DataError
from moetrain.config.schema_data import DataConfig
from moetrain.data.manifest import TOKENIZER_FILE, DomainInfo, Manifest, SplitInfo, removed_line
from moetrain.data.objectives import special_tokens
from moetrain.data.progress import Progress, Survey, Written
from moetrain.data.read import Document, DocumentReader
from moetrain.data.readers import check_files, open_reader
from moetrain.data.shards import dtype_for
from moetrain.data.sources import SourceFile, kind_of, left_out
from moetrain.data.split import DocumentKey, HeldOut, Keys, choose_held_out, cut
from moetrain.data.tokenizer import LoadedTokenizer, describe_tokenizer, load_tokenizer, train_tokenizer
from moetrain.data.workers import Workers, look_at, tokenize

logger = logging.getLogger("moetrain")

SOURCES_FILE = "sources.json"  # sizes, times and hashes of the files: shows quickly that nothing changed
BATCH_CHARS = 1_000_000  # text handed to the tokenizer at once
KEEP_SECONDS = 60  # between two notes of which files of a source are read
JOURNAL_BATCHES = 32  # batches between two notes of how far a source is written: under a minute


@dataclass
class Batch:
    """Documents that are tokenised together. ``marks``: (split, UTF-8 bytes) of each that is not empty; ``items``: how
    many there are with the empty ones; ``read``: bytes of source files that were read for them."""

    marks: list[tuple[str, int]] = field(default_factory=list)
    items: int = 0
    read: int = 0


def fingerprint(recipe: str, digests: dict[str, list[str]]) -> str:
    """Hash of settings and text: the same for the same shards."""
    return hashlib.sha256(json.dumps([recipe, digests]).encode()).hexdigest()


def remember_sources(out: Path, files: dict[str, list[SourceFile]], digests: dict[str, list[str]]) -> None:
    """Note sizes, times and hashes of the files of every source in ``out``, whole or not at all."""
    known = {
        str(file.path): [file.size, file.mtime_ns, digest]
        for source, found in files.items()
        for file, digest in zip(found, digests[source], strict=True)
    }
    temporary = out / f"{SOURCES_FILE}.tmp"
    temporary.write_text(json.dumps(known, indent=0, ensure_ascii=False), encoding="utf-8")
    temporary.replace(out / SOURCES_FILE)


def known_sources(out: Path) -> dict[str, Any]:
    """Path -> (size, time, hash) of what ``remember_sources`` noted, as far as it can be read."""
    try:
        known = json.loads((out / SOURCES_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def batches(documents: Iterable[tuple[str, Document, int]]) -> Iterator[tuple[Batch, list[Document]]]:
    """Runs of documents, each (split, document, source bytes read for it), with about BATCH_CHARS characters or tokens,
    and those that are not empty."""
    batch, chars = Batch(), 0
    texts: list[Document] = []
    for split, text, read in documents:
        if len(text):
            batch.marks.append((split, len(text.encode("utf-8")) if isinstance(text, str) else 0))
            texts.append(text)
        batch.items, batch.read, chars = batch.items + 1, batch.read + read, chars + len(text)
        if chars >= BATCH_CHARS:
            yield batch, texts
            batch, chars, texts = Batch(), 0, []
    yield batch, texts


def _with_progress(reader: DocumentReader) -> Iterator[tuple[str, Document, int]]:
    """The documents of a file before they have a split."""
    at = 0
    for text in reader:
        done, at = reader.position - at, reader.position
        yield "", text, done


@dataclass
class Build:
    """One data set in the making. ``run`` reads all files twice (three times when a tokenizer is trained), so that no
    text has to be kept in memory.

    ``done`` keeps what is finished, so that a call which was stopped is continued by the next: surveys of sources, a
    trained tokenizer, shards, and of a source that was being written all but the last JOURNAL_BATCHES batches.

    What is in memory: a hash and a size of each document of a source (0.06 GB per million while the hold-out is
    chosen), one byte per document of all sources, and with ``data.deduplicate`` a set of the 16-byte digests of all
    different texts, about 0.1 GB per million.
    """

    cfg: DataConfig
    files: dict[str, list[SourceFile]]
    out: Path
    recipe: str
    progress: bool
    done: Progress
    surveys: dict[str, Survey] = field(default_factory=dict)
    seen: set[bytes] = field(default_factory=set)  # digests of all texts that are kept, for the search of duplicates
    tokens: int = 0  # that this call has written
    tokens_before: int = 0  # that were written when it began

    def run(self) -> Manifest:
        """Fill ``out``; the manifest comes last."""
        for source, found in self.files.items():
            check_files(self.cfg, source, found)
            if others := left_out(self.cfg.sources[source]):
                logger.info("source '%s': files with other endings are left out: %s", source, removed_line(others))
        began = time.perf_counter()
        with Workers(self.cfg.processes) as workers:
            with self._bar("read") as bar:
                self._survey_all(workers, bar)
            tokenizer = self._tokenizer()
            tokenizer.save(self.out / TOKENIZER_FILE)
            with self._bar("prepare") as bar:
                domains = {source: self._write(source, tokenizer, workers, bar) for source in self.files}
        self._say_speed(domains, time.perf_counter() - began)
        digests = {source: survey.digests for source, survey in self.surveys.items()}
        manifest = Manifest(
            name=self.cfg.name,
            recipe=self.recipe,
            fingerprint=fingerprint(self.recipe, digests),
            vocab_size=tokenizer.vocab_size,
            eos=tokenizer.eos,
            eos_id=tokenizer.eos_id,
            tokenizer_sha256=hashlib.sha256((self.out / TOKENIZER_FILE).read_bytes()).hexdigest(),
            domains=domains,
        )
        remember_sources(self.out, self.files, digests)
        manifest.save(self.out)
        return manifest

    def _say_speed(self, domains: dict[str, DomainInfo], seconds: float) -> None:
        """Log the tokens that this call has written a second, reading and filtering included."""
        tokens = self.tokens
        logger.info("%s tokens in %.1f s: %s tokens/s", f"{tokens:,}", seconds, f"{tokens / max(seconds, 1e-9):,.0f}")

    def _bar(self, what: str) -> tqdm:
        """A progress bar over the bytes of all files, on a terminal."""
        size = sum(file.size for found in self.files.values() for file in found)
        return tqdm(total=size, unit="B", unit_scale=True, desc=what, disable=None if self.progress else True)

    def _survey_all(self, workers: Workers, bar: tqdm) -> None:
        """First reading of all sources, but for those whose survey was kept and still holds."""
        complete, kept = True, 0
        for source, files in self.files.items():
            # Which documents are duplicates depends on all sources before.
            usable = complete or not self.cfg.deduplicate
            survey = self.done.survey(source, files) if usable else None
            if survey is not None:
                kept += len(survey.digests)
                bar.update(sum(file.size for file in files[: len(survey.digests)]))
                if self.cfg.deduplicate:
                    digests = survey.keys.digests
                    self.seen.update(bytes(digests[i : i + 16]) for i in range(0, len(digests), 16))
            if survey is None or survey.held_out is None:
                if complete:
                    self.done.forget_writing()
                complete = False
                survey = self._survey(source, survey or Survey(), workers, bar)
                self.done.keep_survey(source, files, survey)
            self.surveys[source] = survey
        if kept:
            every = sum(map(len, self.files.values()))
            logger.info("going on with a prepare that was stopped: %d of %d files were read", kept, every)

    def _survey(self, source: str, found: Survey, workers: Workers, bar: tqdm) -> Survey:
        """First reading of a source, from where ``found`` ends: check every file, choose what is removed and what is
        held out."""
        files, last, wait = self.files[source], time.monotonic(), float(KEEP_SECONDS)
        look = partial(look_at, self.cfg.sources[source].filter)
        for number, file in enumerate(files[len(found.digests) :], start=len(found.digests) + 1):
            reader, before = open_reader(self.cfg, source, file), len(found.kept)
            for batch, looks in workers.map(look, batches(_with_progress(reader))):
                for key, rule in looks:
                    why = self._why_removed(source, key, rule)
                    found.kept.append(why is None)
                    if why is None:
                        found.keys.add(key)
                    else:
                        found.removed[why] += 1
                bar.update(batch.read)
            found.digests.append(reader.digest)
            found.replaced += reader.replaced
            found.empty += len(found.kept) == before
            if number < len(files) and time.monotonic() - last >= wait:
                last = time.monotonic()
                self.done.keep_survey(source, files[:number], found)
                wait = KEEP_SECONDS * max(1, (time.monotonic() - last) / 3)  # 5% of the time at most
        self._check_some_text(source, found)
        found.held_out = choose_held_out(found.keys, self.cfg.val_fraction)
        found.keys.sizes = array("q")
        if not self.cfg.deduplicate:
            found.keys = Keys()
        return found

    def _why_removed(self, domain: str, key: DocumentKey, rule: str | None) -> str | None:
        """Why a document is left out, None where it is kept. Two texts are the same when their BLAKE2b digests of 128
        bits are; a text that a filter removes from one domain may stay in another."""
        if rule is not None:
            return f"{self.cfg.sources[domain].filter} {rule}"
        if self.cfg.deduplicate:
            if key.digest in self.seen:
                return "duplicate"
            self.seen.add(key.digest)
        return None

    def _check_some_text(self, domain: str, found: Survey) -> None:
        """Raise DataError for a domain of which nothing is left; say how many of its files are empty, and when its
        delimiter divides none."""
        empty = found.empty
        if not found.kept:
            raise DataError(
                f"domain '{domain}' has no text: its {empty} files are empty; correct "
                f"data.sources.{domain}.paths or remove the domain"
            )
        if not any(found.kept):
            raise DataError(
                f"domain '{domain}' has no text left: all its {len(found.kept):,} documents were removed "
                f"({removed_line(found.removed)}); remove the domain, or change what removes them"
            )
        if empty:
            logger.info(
                "domain '%s': %d of %d files are empty and were left out", domain, empty, len(self.files[domain])
            )
        files, delimiter = self.files[domain], self.cfg.sources[domain].delimiter
        texts = all(kind_of(file.path) == "text" for file in files)
        if delimiter is not None and texts and len(found.kept) == len(files) - empty:
            logger.warning(
                "domain '%s': data.sources.%s.delimiter '%s' divides none of its %d files, so each is one document; "
                "does it fit them? Where lines end with CR LF, write '\\r?$' for '$' and '\\r?\\n' for '\\n'",
                domain, domain, delimiter, len(files),
            )  # fmt: skip

    def _tokenizer(self) -> LoadedTokenizer:
        """The tokenizer asked for, or one trained on the training documents alone."""
        if self.cfg.tokenizer.path is not None:
            return load_tokenizer(self.cfg.tokenizer.path)
        what = "the trained tokenizer"
        if self.done.tokenizer is not None:
            return describe_tokenizer(Tokenizer.from_file(str(self.done.tokenizer)), what)
        every = (found for domain in self.files for found in self._documents(domain))
        texts = (text for split, text, _ in every if split == "train" and isinstance(text, str))
        trained = train_tokenizer(texts, self.cfg.tokenizer.vocab_size, special_tokens(self.cfg))
        self.done.keep_tokenizer(trained.to_str())
        return describe_tokenizer(trained, what)

    def _documents(self, domain: str) -> Iterator[tuple[str, Document, int]]:
        """(split, document, source bytes read since the last one) of every document that is kept, in order."""
        survey, number = self.surveys[domain], 0
        held, kept = survey.held_out or HeldOut(frozenset(), None), iter(survey.kept)
        for file, digest in zip(self.files[domain], survey.digests, strict=True):
            reader, at = open_reader(self.cfg, domain, file), 0
            for text in reader:
                if not next(kept, 0):
                    continue
                done, at = reader.position - at, reader.position
                if held.cut is not None and held.cut[0] == number:
                    head, tail = cut(text, held.cut[1])
                    yield "train", head, 0
                    yield "val", tail, done
                else:
                    yield ("val" if number in held.whole else "train"), text, done
                number += 1
            if reader.digest != digest:
                raise DataError(f"'{file.path}' changed while it was read; run again when nothing writes to it")

    def _write(self, source: str, tokenizer: LoadedTokenizer, workers: Workers, bar: tqdm) -> DomainInfo:
        """Second reading: tokenise in batches and write the source's two shards, or what a call that was stopped has
        left of them."""
        info = self.done.info(source)
        if info is not None:
            self.tokens_before += info.train.tokens + info.val.tokens
            bar.update(sum(file.size for file in self.files[source]))
            return info
        writers, written = self.done.writers(source, dtype_for(tokenizer.vocab_size))
        self.tokens_before += sum(sum(writer.lengths) for writer in writers.values())
        sizes, items, read = dict(written.sizes), written.items, written.read
        bar.update(read)
        work = partial(tokenize, self.out / TOKENIZER_FILE)
        documents = islice(self._documents(source), items, None)
        for number, (batch, found) in enumerate(workers.map(work, batches(documents)), start=1):
            for (split, size), ids in zip(batch.marks, found, strict=True):
                writers[split].add(np.append(ids, tokenizer.eos_id))
                sizes[split] += size
                self.tokens += len(ids) + 1
            items, read = items + batch.items, read + batch.read
            bar.update(batch.read)
            bar.set_postfix_str(f"{self.tokens / max(bar.format_dict['elapsed'], 1e-9):,.0f} tokens/s", refresh=False)
            if number % JOURNAL_BATCHES == 0:
                counts = {split: len(writer.lengths) for split, writer in writers.items()}
                now = Written(items, read, counts, dict(sizes))
                self.done.keep_written(source, writers, written, now)
                written = now
        for writer in writers.values():
            writer.close()
            if not writer.lengths:
                raise DataError(
                    f"domain '{source}' has too little text for a training and a held-out part with "
                    f"data.val_fraction={self.cfg.val_fraction}; give it more text or remove it"
                )
        splits = {s: SplitInfo(len(w.lengths), sum(w.lengths), sizes[s], w.sha256) for s, w in writers.items()}
        survey, options = self.surveys[source], self.cfg.sources[source]
        removed = dict(sorted(survey.removed.items()))
        info = DomainInfo(
            options.licence, splits["train"], splits["val"], survey.replaced, removed, options.domain or ""
        )
        self.done.keep_info(source, info)
        return info
