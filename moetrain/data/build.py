"""The pass that makes a prepared data set: read and check all text, choose what is held out, tokenise, write."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from moetrain.config.errors import DataError
from moetrain.config.schema import DataConfig
from moetrain.data.manifest import SPLITS, TOKENIZER_FILE, DomainInfo, Manifest, SplitInfo, removed_line
from moetrain.data.read import Reader, ReadOptions, check_packages
from moetrain.data.shards import ShardWriter, dtype_for, shard_prefix
from moetrain.data.sources import SourceFile, compile_delimiter
from moetrain.data.split import DocumentKey, HeldOut, choose_held_out, cut_tail
from moetrain.data.tokenizer import LoadedTokenizer, describe_tokenizer, load_tokenizer, train_tokenizer
from moetrain.data.workers import Workers, look_at, tokenize

logger = logging.getLogger("moetrain")

SOURCES_FILE = "sources.json"  # sizes, times and hashes of the files: shows quickly that nothing changed
BATCH_CHARS = 1_000_000  # text handed to the tokenizer at once


def fingerprint(recipe: str, digests: dict[str, list[str]]) -> str:
    """Hash of settings and text: the same for the same shards."""
    return hashlib.sha256(json.dumps([recipe, digests]).encode()).hexdigest()


def batches(documents: Iterable[tuple[str, str, int]]) -> Iterator[tuple[tuple[list[tuple[str, int]], int], list[str]]]:
    """Runs of documents, each (split, text, source bytes read for it), with about BATCH_CHARS characters: (((split,
    UTF-8 bytes) of each, source bytes read for all), texts)."""
    marks: list[tuple[str, int]] = []
    texts: list[str] = []
    chars = done = 0
    for split, text, read in documents:
        if text:
            marks.append((split, len(text.encode("utf-8"))))
            texts.append(text)
        chars, done = chars + len(text), done + read
        if chars >= BATCH_CHARS:
            yield (marks, done), texts
            marks, texts, chars, done = [], [], 0, 0
    yield (marks, done), texts


def _with_progress(reader: Reader) -> Iterator[tuple[str, str, int]]:
    """The documents of a file before they have a split."""
    at = 0
    for text in reader:
        done, at = reader.position - at, reader.position
        yield "", text, done


@dataclass
class Build:
    """One data set in the making. ``run`` reads all files twice (three times when a tokenizer is trained), so that no
    text has to be kept in memory.

    What is kept: a hash and a size of each document of a domain (0.3 GB per million while the hold-out is chosen), one
    byte per document of all domains, and with ``data.deduplicate`` a set of the 16-byte digests of all different texts,
    about 0.1 GB per million.
    """

    cfg: DataConfig
    files: dict[str, list[SourceFile]]
    out: Path
    recipe: str
    progress: bool
    digests: dict[str, list[str]] = field(default_factory=dict)
    held_out: dict[str, HeldOut] = field(default_factory=dict)
    replaced: dict[str, int] = field(default_factory=dict)
    kept: dict[str, bytearray] = field(default_factory=dict)  # one byte a document: 1 where it is kept
    removed: dict[str, Counter[str]] = field(default_factory=dict)  # documents by the reason why they are not
    seen: set[bytes] = field(default_factory=set)  # digests of all texts that are kept, for the search of duplicates

    def run(self) -> Manifest:
        """Fill ``out``; the manifest comes last."""
        for file in (file for found in self.files.values() for file in found):
            check_packages(file.path)
        with Workers(self.cfg.processes) as workers:
            with self._bar("read") as bar:
                for domain in self.files:
                    self._survey(domain, workers, bar)
            tokenizer = self._tokenizer()
            tokenizer.save(self.out / TOKENIZER_FILE)
            with self._bar("prepare") as bar:
                domains = {domain: self._write(domain, tokenizer, workers, bar) for domain in self.files}
        manifest = Manifest(
            name=self.cfg.name,
            recipe=self.recipe,
            fingerprint=fingerprint(self.recipe, self.digests),
            vocab_size=tokenizer.vocab_size,
            eos=tokenizer.eos,
            eos_id=tokenizer.eos_id,
            tokenizer_sha256=hashlib.sha256((self.out / TOKENIZER_FILE).read_bytes()).hexdigest(),
            domains=domains,
        )
        known = {
            str(file.path): [file.size, file.mtime_ns, digest]
            for domain, found in self.files.items()
            for file, digest in zip(found, self.digests[domain], strict=True)
        }
        (self.out / SOURCES_FILE).write_text(json.dumps(known, indent=0, ensure_ascii=False), encoding="utf-8")
        manifest.save(self.out)
        return manifest

    def _bar(self, what: str) -> tqdm:
        """A progress bar over the bytes of all files, on a terminal."""
        size = sum(file.size for found in self.files.values() for file in found)
        return tqdm(total=size, unit="B", unit_scale=True, desc=what, disable=None if self.progress else True)

    def _reader(self, domain: str, file: SourceFile) -> Reader:
        source, cfg = self.cfg.sources[domain], self.cfg
        options = ReadOptions(
            domain, source.field, compile_delimiter(domain, source), cfg.max_line_mb, cfg.invalid_utf8 == "replace"
        )
        return Reader(file, options)

    def _survey(self, domain: str, workers: Workers, bar: tqdm) -> None:
        """First reading: check every file, and choose the documents that are removed and those that are held out."""
        keys: list[DocumentKey] = []
        kept, removed, empty = bytearray(), Counter[str](), 0
        self.digests[domain], self.replaced[domain] = [], 0
        self.kept[domain], self.removed[domain] = kept, removed
        look = partial(look_at, self.cfg.sources[domain].filter)
        for file in self.files[domain]:
            reader, before = self._reader(domain, file), len(kept)
            for (_, done), looks in workers.map(look, batches(_with_progress(reader))):
                for key, rule in looks:
                    why = self._why_removed(domain, key, rule)
                    kept.append(why is None)
                    if why is None:
                        keys.append(key)
                    else:
                        removed[why] += 1
                bar.update(done)
            self.digests[domain].append(reader.digest)
            self.replaced[domain] += reader.replaced
            empty += len(kept) == before
        self._check_some_text(domain, empty)
        self.held_out[domain] = choose_held_out(keys, self.cfg.val_fraction)

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

    def _check_some_text(self, domain: str, empty: int) -> None:
        """Raise DataError for a domain of which nothing is left; say how many of its files are ``empty``."""
        if not self.kept[domain]:
            raise DataError(
                f"domain '{domain}' has no text: its {empty} files are empty; correct "
                f"data.sources.{domain}.paths or remove the domain"
            )
        if not any(self.kept[domain]):
            raise DataError(
                f"domain '{domain}' has no text left: all its {len(self.kept[domain]):,} documents were removed "
                f"({removed_line(self.removed[domain])}); remove the domain, or change what removes them"
            )
        if empty:
            logger.info(
                "domain '%s': %d of %d files are empty and were left out", domain, empty, len(self.files[domain])
            )

    def _tokenizer(self) -> LoadedTokenizer:
        """The tokenizer asked for, or one trained on the training documents alone."""
        if self.cfg.tokenizer.path is not None:
            return load_tokenizer(self.cfg.tokenizer.path)
        texts = (text for domain in self.files for split, text, _ in self._documents(domain) if split == "train")
        return describe_tokenizer(train_tokenizer(texts, self.cfg.tokenizer.vocab_size), "the trained tokenizer")

    def _documents(self, domain: str) -> Iterator[tuple[str, str, int]]:
        """(split, text, source bytes read since the last one) of every document that is kept, in order."""
        held, number = self.held_out[domain], 0
        kept = iter(self.kept[domain])
        for file, digest in zip(self.files[domain], self.digests[domain], strict=True):
            reader, at = self._reader(domain, file), 0
            for text in reader:
                if not next(kept, 0):
                    continue
                done, at = reader.position - at, reader.position
                if held.cut is not None and held.cut[0] == number:
                    head, tail = cut_tail(text, held.cut[1])
                    yield "train", head, 0
                    yield "val", tail, done
                else:
                    yield ("val" if number in held.whole else "train"), text, done
                number += 1
            if reader.digest != digest:
                raise DataError(f"'{file.path}' changed while it was read; run again when nothing writes to it")

    def _write(self, domain: str, tokenizer: LoadedTokenizer, workers: Workers, bar: tqdm) -> DomainInfo:
        """Second reading: tokenise in batches and write the domain's two shards."""
        dtype = dtype_for(tokenizer.vocab_size)
        writers = {split: ShardWriter(shard_prefix(self.out, domain, split), dtype) for split in SPLITS}
        sizes = dict.fromkeys(SPLITS, 0)
        work = partial(tokenize, self.out / TOKENIZER_FILE)
        for (marks, done), found in workers.map(work, batches(self._documents(domain))):
            for (split, size), ids in zip(marks, found, strict=True):
                writers[split].add(np.append(ids, tokenizer.eos_id))
                sizes[split] += size
            bar.update(done)
        for writer in writers.values():
            writer.close()
            if not writer.lengths:
                raise DataError(
                    f"domain '{domain}' has too little text for a training and a held-out part with "
                    f"data.val_fraction={self.cfg.val_fraction}; give it more text or remove it"
                )
        info = {s: SplitInfo(len(w.lengths), sum(w.lengths), sizes[s], w.sha256) for s, w in writers.items()}
        licence = self.cfg.sources[domain].licence
        removed = dict(sorted(self.removed[domain].items()))
        group = self.cfg.sources[domain].domain or ""
        return DomainInfo(licence, info["train"], info["val"], self.replaced[domain], removed, group)
