"""From text to token shards: `moetrain prepare`.

The result is one folder: manifest.json, tokenizer.json, and for each domain a training and a held-out shard. It is
built in a sibling folder and renamed when whole, so it is complete or absent. A second call does nothing while config
and text are the same.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from moetrain.comm.ranks import Ranks
from moetrain.config.errors import DataError
from moetrain.config.schema import DataConfig
from moetrain.data.manifest import FILE, SPLITS, TOKENIZER_FILE, VERSION, DomainInfo, Manifest, SplitInfo
from moetrain.data.shards import Shard, ShardWriter, dtype_for
from moetrain.data.sources import SourceFile, compile_delimiter, find_files, read_text, split_documents
from moetrain.data.split import DocumentKey, HeldOut, choose_held_out, cut_tail
from moetrain.data.tokenizer import LoadedTokenizer, describe_tokenizer, load_tokenizer, train_tokenizer
from moetrain.data.weights import check_weights

logger = logging.getLogger("moetrain")

SOURCES_FILE = (
    "sources.json"  # sizes, times and hashes of the text files: lets a second call see quickly that nothing changed
)
BATCH_CHARS = 1_000_000  # text handed to the tokenizer at once


def shard_prefix(folder: Path, domain: str, split: str) -> Path:
    """Path of a domain's shard without .bin or .idx; ``split`` is 'train' or 'val'."""
    return folder / f"{domain}.{split}"


def prepare(cfg: DataConfig, progress: bool = True) -> Manifest:
    """Turn the text of ``cfg.sources`` into token shards in ``cfg.dir`` and return their manifest.

    For one process; the others wait for it. Calls from several jobs at once wait for each other (a lock file beside
    ``cfg.dir``). ``progress`` shows a bar on a terminal. Raises DataError, one line, for text, tokenizers, weights or
    folders that cannot be used, and for a full disk; then nothing is left behind and an older prepared folder stays
    as it was.
    """
    _check(cfg)
    out = Path(cfg.dir)
    partial = out.with_name(f".{out.name}.partial")
    try:
        found = _current(cfg, out)
        if isinstance(found, Manifest):  # also on a read-only disk
            return found
        out.parent.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            found = _current(cfg, out)  # another process may just have made it
            if isinstance(found, Manifest):
                return found
            try:
                shutil.rmtree(partial, ignore_errors=True)  # left by a call that was killed
                partial.mkdir()
                manifest = _Build(cfg, found, partial, _recipe(cfg), progress).run()
                _replace(out, partial)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        logger.info("prepared '%s':\n%s", out, manifest.table())
        return manifest
    except OSError as error:
        what = (
            "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error.strerror or error).lower()
        )
        raise DataError(
            f"cannot write prepared data to '{out}': {what}; free space or choose another data.dir, then run again"
        ) from None


def prepare_once(cfg: DataConfig) -> None:
    """``prepare`` for all ranks of the default process group: rank 0 does the work, the others wait. Collective.

    Every rank raises the DataError that rank 0 met.
    """
    Ranks().first(lambda: prepare(cfg))


def _check(cfg: DataConfig) -> None:
    """Everything that can be seen before a file is opened."""
    if not cfg.sources:
        raise DataError(
            "data.sources is empty; choose a preset such as data=demo, or give data.sources.NAME.paths=[FILE]"
        )
    for name in cfg.sources:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise DataError(f"domain name '{name}' cannot be a file name; use letters, digits, '.', '_' and '-'")
    check_weights({name: source.weight for name, source in cfg.sources.items()}, list(cfg.sources))


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the lock of ``out``; the system frees it when the process ends, however it ends."""
    with open(out.with_name(f".{out.name}.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that prepares '%s'", out)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _current(cfg: DataConfig, out: Path) -> Manifest | dict[str, list[SourceFile]]:
    """The manifest of ``out`` if nothing has to be done, else the files of every domain. Writes nothing."""
    old, recipe = _existing(cfg.name, out), _recipe(cfg)
    try:
        files = {name: find_files(name, source) for name, source in cfg.sources.items()}
    except DataError as error:
        if old is None or old.recipe != recipe:
            raise
        logger.warning("%s; going on with the data that was prepared from it in '%s'", error, out)
        return old
    return old if old is not None and old.recipe == recipe and _unchanged(out, old, files) else files


def _existing(name: str, out: Path) -> Manifest | None:
    """The manifest of the folder as it is, None where there is none. Raises DataError for a folder that is something
    else."""
    if not out.exists():
        return None
    if (out / FILE).is_file():
        manifest = Manifest.load(out)
        if manifest.name != name:  # may have taken days: never replaced by mistake
            raise DataError(
                f"data.dir '{out}' holds the prepared data set '{manifest.name}', not '{name}'; choose another "
                f"data.dir, or remove it yourself"
            )
        return manifest
    if out.is_dir() and not any(out.iterdir()):
        return None
    raise DataError(f"data.dir '{out}' exists and is not prepared data; choose another data.dir, or remove it yourself")


def _recipe(cfg: DataConfig) -> str:
    """Hash of all settings that decide the shards' bytes."""
    tokenizer = f"trained:{cfg.tokenizer.vocab_size}"
    if cfg.tokenizer.path is not None:
        loaded = load_tokenizer(cfg.tokenizer.path)
        tokenizer = hashlib.sha256(f"{loaded.eos}\n{loaded.tokenizer.to_str()}".encode()).hexdigest()
    sources = {name: [s.paths, s.licence, s.delimiter] for name, s in cfg.sources.items()}
    return hashlib.sha256(json.dumps([VERSION, sources, tokenizer, cfg.val_fraction]).encode()).hexdigest()


def _fingerprint(recipe: str, digests: dict[str, list[str]]) -> str:
    return hashlib.sha256(json.dumps([recipe, digests]).encode()).hexdigest()


def _unchanged(out: Path, manifest: Manifest, files: dict[str, list[SourceFile]]) -> bool:
    """Whether the shards are whole and the text is what they were made from; reads only text files whose size or
    time differ."""
    for name, domain in manifest.domains.items():
        for split in SPLITS:
            try:
                shard = Shard(shard_prefix(out, name, split))
            except DataError:
                return False
            if (shard.documents, len(shard.tokens)) != (domain.split(split).documents, domain.split(split).tokens):
                return False
    try:
        known = json.loads((out / SOURCES_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    digests: dict[str, list[str]] = {}
    for name, found in files.items():
        digests[name] = []
        for file in found:
            seen = known.get(str(file.path))
            if seen and seen[:2] == [file.size, file.mtime_ns]:
                digests[name].append(seen[2])
            else:
                with open(file.path, "rb") as stream:
                    digests[name].append(hashlib.file_digest(stream, "sha256").hexdigest())
    return _fingerprint(manifest.recipe, digests) == manifest.fingerprint


def _replace(out: Path, partial: Path) -> None:
    """Force the finished folder to disk and put it in the place of the old one."""
    for path in (*partial.iterdir(), partial):
        _to_disk(path)
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.rename(out, old)
    os.rename(partial, out)
    _to_disk(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass
class _Build:
    """One pass of the work: read and check all text, choose what is held out, tokenise, write."""

    cfg: DataConfig
    files: dict[str, list[SourceFile]]
    out: Path
    recipe: str
    progress: bool
    digests: dict[str, list[str]] = field(default_factory=dict)
    held_out: dict[str, HeldOut] = field(default_factory=dict)

    def run(self) -> Manifest:
        """Fill ``out``; the manifest comes last."""
        for domain in self.files:
            self._survey(domain)
        tokenizer = self._tokenizer()
        tokenizer.save(self.out / TOKENIZER_FILE)
        size = sum(file.size for found in self.files.values() for file in found)
        bar = tqdm(total=size, unit="B", unit_scale=True, desc="prepare", disable=None if self.progress else True)
        with bar:
            domains = {domain: self._write(domain, tokenizer, bar) for domain in self.files}
        manifest = Manifest(
            name=self.cfg.name,
            recipe=self.recipe,
            fingerprint=_fingerprint(self.recipe, self.digests),
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

    def _survey(self, domain: str) -> None:
        """First reading: check every file and choose the held-out documents."""
        keys, empty = [], 0
        self.digests[domain] = []
        for file in self.files[domain]:
            documents, digest = self._read(domain, file)
            self.digests[domain].append(digest)
            keys += [DocumentKey.of(document) for document in documents]
            empty += not documents
        if not keys:
            raise DataError(
                f"domain '{domain}' has no text: its {empty} files are empty; correct "
                f"data.sources.{domain}.paths or remove the domain"
            )
        if empty:
            logger.info(
                "domain '%s': %d of %d files are empty and were left out", domain, empty, len(self.files[domain])
            )
        self.held_out[domain] = choose_held_out(keys, self.cfg.val_fraction)

    def _read(self, domain: str, file: SourceFile) -> tuple[list[str], str]:
        text, digest = read_text(file.path, self.cfg.max_line_mb)
        return split_documents(text, compile_delimiter(domain, self.cfg.sources[domain])), digest

    def _tokenizer(self) -> LoadedTokenizer:
        """The tokenizer asked for, or one trained on the training documents alone."""
        if self.cfg.tokenizer.path is not None:
            return load_tokenizer(self.cfg.tokenizer.path)
        texts = (text for domain in self.files for split, text, _ in self._documents(domain) if split == "train")
        return describe_tokenizer(train_tokenizer(texts, self.cfg.tokenizer.vocab_size), "the trained tokenizer")

    def _documents(self, domain: str) -> Iterator[tuple[str, str, int]]:
        """(split, text, source bytes done) of every document, in order; the bytes of a file are counted at its last
        document."""
        held, number = self.held_out[domain], 0
        for file, digest in zip(self.files[domain], self.digests[domain], strict=True):
            documents, now = self._read(domain, file)
            if now != digest:
                raise DataError(f"'{file.path}' changed while it was read; run again when nothing writes to it")
            for i, text in enumerate(documents):
                done = file.size if i == len(documents) - 1 else 0
                if held.cut is not None and held.cut[0] == number:
                    head, tail = cut_tail(text, held.cut[1])
                    yield "train", head, 0
                    yield "val", tail, done
                else:
                    yield ("val" if number in held.whole else "train"), text, done
                number += 1

    def _batches(self, domain: str) -> Iterator[tuple[list[str], list[str], int]]:
        """(splits, texts, source bytes done) of runs of documents with about BATCH_CHARS characters."""
        splits: list[str] = []
        texts: list[str] = []
        chars = done = 0
        for split, text, size in self._documents(domain):
            if text:
                splits.append(split)
                texts.append(text)
            chars, done = chars + len(text), done + size
            if chars >= BATCH_CHARS:
                yield splits, texts, done
                splits, texts, chars, done = [], [], 0, 0
        yield splits, texts, done

    def _write(self, domain: str, tokenizer: LoadedTokenizer, bar: tqdm) -> DomainInfo:
        """Second reading: tokenise in batches and write the domain's two shards."""
        dtype = dtype_for(tokenizer.vocab_size)
        writers = {split: ShardWriter(shard_prefix(self.out, domain, split), dtype) for split in SPLITS}
        sizes = dict.fromkeys(SPLITS, 0)
        for splits, texts, done in self._batches(domain):
            for split, text, ids in zip(splits, texts, tokenizer.token_ids(texts), strict=True):
                writers[split].add(np.asarray([*ids, tokenizer.eos_id], dtype=np.int64))
                sizes[split] += len(text.encode("utf-8"))
            bar.update(done)
        for writer in writers.values():
            writer.close()
            if not writer.lengths:
                raise DataError(
                    f"domain '{domain}' has too little text for a training and a held-out part with "
                    f"data.val_fraction={self.cfg.val_fraction}; give it more text or remove it"
                )
        info = {s: SplitInfo(len(w.lengths), sum(w.lengths), sizes[s], w.sha256) for s, w in writers.items()}
        return DomainInfo(self.cfg.sources[domain].licence, info["train"], info["val"])
