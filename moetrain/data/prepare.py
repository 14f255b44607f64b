"""From text to token shards: `moetrain prepare`.

The result is one folder: manifest.json, tokenizer.json, and for each domain a training and a held-out shard. It is
built in a sibling folder and renamed when whole, so it is complete or absent. A call that was stopped is continued by
the next (progress.py); a second call does nothing while config and text are the same.
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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from moetrain.comm.ranks import Ranks
from moetrain.config.errors import DataError
from moetrain.config.schema_data import DataConfig, SourceConfig
from moetrain.data.build import Build, fingerprint, known_sources, remember_sources
from moetrain.data.manifest import FILE, SPLITS, TOKENIZER_FILE, VERSION, Manifest
from moetrain.data.objectives import special_tokens
from moetrain.data.progress import Progress, remove_notes
from moetrain.data.readers import check_source, digest_of, find_sources
from moetrain.data.shards import Shard, shard_prefix
from moetrain.data.sources import SourceFile
from moetrain.data.tokenizer import load_tokenizer
from moetrain.data.weights import check_weights

logger = logging.getLogger("moetrain")

# settings of a source that came after the first version of the recipe
SINCE_FIRST = (
    "field",
    "filter",
    "dataset",
    "dataset_config",
    "dataset_split",
    "dataset_revision",
    "tokens",
    "token_dtype",
)


def prepare(cfg: DataConfig, progress: bool = True, began: Mapping[str, str] | None = None) -> Manifest:
    """Turn the text of ``cfg.sources`` into token shards in ``cfg.dir`` and return their manifest.

    ``began``: of a run that goes on, source -> SHA-256 of the training tokens that it began with. Data that holds these
    is kept although its text has changed since, and never replaced by other.

    For one process; the others wait for it. Calls from several jobs at once wait for each other (a lock file beside
    ``cfg.dir``). ``progress`` shows a bar on a terminal. Raises DataError, one line, for text, tokenizers, weights or
    folders that cannot be used, and for a full disk; an older prepared folder then stays as it was, and what is
    finished of the new one is kept beside it for the next call (``progress.py``).
    """
    _check(cfg)
    out = Path(cfg.dir)
    if not out.name or out.name == "..":
        raise DataError(
            f"data.dir '{cfg.dir}' names no folder that could be made; give one such as prepared/{cfg.name}"
        )
    out = Path(os.path.realpath(out)) if out.is_symlink() else out  # built where the link leads, and renamed there
    partial = out.with_name(f".{out.name}.partial")
    try:
        found = _current(cfg, out, began)
        if isinstance(found, Manifest):  # also on a read-only disk
            return _regrouped(cfg, out, found)
        if os.path.ismount(out):
            raise DataError(f"data.dir '{out}' is a mount point, which cannot be renamed; choose a folder below it")
        out.parent.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            found = _current(cfg, out, began)  # another process may just have made it
            if isinstance(found, Manifest):
                return found
            done = Progress(partial, _recipe(cfg))
            try:
                manifest = Build(cfg, found, partial, _recipe(cfg), progress, done).run()
            except BaseException:
                if not done.any():
                    shutil.rmtree(partial, ignore_errors=True)
                raise
            _refuse_other_text(out, manifest, began)
            _replace(out, partial)
            remove_notes(out)
        logger.info("prepared '%s':\n%s", out, manifest.table())
        return manifest
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = (
                f"the disk is full; free space and run again, which goes on from '{partial}', or choose another "
                f"data.dir and delete that"
            )
        else:
            what = f"{str(error.strerror or error).lower()}"
            what += f" ('{error.filename or out}'); see to that, or choose another data.dir"
        raise DataError(f"cannot write prepared data to '{out}': {what}") from None


def prepare_once(cfg: DataConfig, began: Mapping[str, str] | None = None) -> Manifest:
    """``prepare`` for all ranks of the default process group: rank 0 does the work, the others wait. Collective.

    Every rank raises the DataError that rank 0 met.
    """
    return Ranks().first_for_long(lambda: prepare(cfg, began=began))


def _check(cfg: DataConfig) -> None:
    """Everything that can be seen before a file is opened."""
    if not cfg.sources:
        raise DataError(
            "data.sources is empty; choose a preset such as data=demo, or give data.sources.NAME.paths=[FILE]"
        )
    for name in cfg.sources:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise DataError(f"domain name '{name}' cannot be a file name; use letters, digits, '.', '_' and '-'")
        check_source(cfg, name)
    _check_licences(cfg)
    check_weights({name: source.weight for name, source in cfg.sources.items()}, list(cfg.sources))


def _check_licences(cfg: DataConfig) -> None:
    """Raise DataError that names every source whose licence is not among ``cfg.licences``. Tags are compared without
    regard to case, as SPDX does."""
    if cfg.licences is None:
        return
    allowed = {licence.strip().casefold() for licence in cfg.licences}
    refused = [
        f"'{name}' ({source.licence.strip() or 'no licence'})"
        for name, source in cfg.sources.items()
        if not source.licence.strip() or source.licence.strip().casefold() not in allowed
    ]
    if refused:
        raise DataError(
            f"data.licences does not allow {', '.join(refused)}; allowed: {', '.join(cfg.licences) or 'none'}; remove "
            f"the source, state its licence in data.sources.NAME.licence, or allow it"
        )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the lock of ``out``; the system frees it when the process ends, however it ends. Where the file system knows
    no locks, there is none."""
    with open(out.with_name(f".{out.name}.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that prepares '%s'", out)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # Lustre that is mounted without flock, some NFS
            logger.warning(
                "the file system of '%s' has no locks (%s): see that no other process prepares it now",
                out,
                error.strerror,
            )
        yield


def _current(cfg: DataConfig, out: Path, began: Mapping[str, str] | None) -> Manifest | dict[str, list[SourceFile]]:
    """The manifest of ``out`` if nothing has to be done, else the files of every domain. Writes nothing. ``began``: see
    ``prepare``."""
    old, recipe = _existing(cfg.name, out), _recipe(cfg)
    try:
        files = {name: find_sources(name, source) for name, source in cfg.sources.items()}
    except DataError as error:
        if old is None or old.recipe != recipe:
            raise DataError(f"{error}; make the text with: {cfg.made_by}" if cfg.made_by else str(error)) from None
        logger.warning("%s; going on with the data that was prepared from it in '%s'", error, out)
        return old
    if old is None:
        return files
    if old.recipe == recipe and _whole(out, old):
        if _unchanged(cfg, out, old, files):
            return old
        if began is not None and _other_text(old, began) is None:
            logger.warning("the text has changed since '%s' was prepared; the run goes on with that", out)
            return old
    if old.recipe != recipe and began is not None and cfg.tokenizer.path is None and _other_text(old, began) is None:
        raise DataError(
            f"data settings differ from those of '{out}', with which this run began, so that a new tokenizer would be "
            f"trained; keep the run's with data.tokenizer.path={out / TOKENIZER_FILE}"
        )
    return files


def _other_text(manifest: Manifest, began: Mapping[str, str]) -> str | None:
    """The first source whose training tokens are not those of ``began`` (see ``prepare``), None where all are."""
    now = manifest.domains
    return next((n for n, sha256 in began.items() if n not in now or now[n].train.sha256["bin"] != sha256), None)


def _refuse_other_text(out: Path, manifest: Manifest, began: Mapping[str, str] | None) -> None:
    """Raise DataError where a run that goes on could not do so with what was made for it."""
    source = None if began is None else _other_text(manifest, began)
    if source is not None:
        raise DataError(
            f"source '{source}' is not the text, or not in the tokens, that this run began with, so '{out}' was left "
            f"as it is; restore text and data settings, give new text as a source of another name, and one that is not "
            f"wanted weight 0"
        )


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
    tokenizer = ":".join(["trained", str(cfg.tokenizer.vocab_size), *special_tokens(cfg)])
    if cfg.tokenizer.path is not None:
        loaded = load_tokenizer(cfg.tokenizer.path)
        tokenizer = hashlib.sha256(f"{loaded.eos}\n{loaded.tokenizer.to_str()}".encode()).hexdigest()
    sources = {name: [s.paths, s.licence, s.delimiter, *_changed(s, *SINCE_FIRST)] for name, s in cfg.sources.items()}
    settings = [VERSION, sources, tokenizer, cfg.val_fraction, *_changed(cfg, "invalid_utf8", "deduplicate")]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _changed(cfg: DataConfig | SourceConfig, *names: str) -> list[dict[str, object]]:
    """The settings among ``names`` that are not at their defaults, if any. So the recipes of data sets that were
    prepared before there was such a setting stay the same."""
    default = type(cfg)()
    found = {name: getattr(cfg, name) for name in names if getattr(cfg, name) != getattr(default, name)}
    return [found] if found else []


def _whole(out: Path, manifest: Manifest) -> bool:
    """Whether the shards are those of the manifest, by their sizes."""
    for name, domain in manifest.domains.items():
        for split in SPLITS:
            try:
                shard = Shard(shard_prefix(out, name, split))
            except DataError:
                return False
            if (shard.documents, len(shard.tokens)) != (domain.split(split).documents, domain.split(split).tokens):
                return False
    return True


def _unchanged(cfg: DataConfig, out: Path, manifest: Manifest, files: dict[str, list[SourceFile]]) -> bool:
    """Whether the text is what the shards were made from; reads only files whose size or time differ, and remembers
    these where ``out`` can be written."""
    known, hashed = known_sources(out), False
    digests: dict[str, list[str]] = {}
    for name, found in files.items():
        digests[name] = []
        for file in found:
            seen = known.get(str(file.path))
            if seen and seen[:2] == [file.size, file.mtime_ns]:
                digests[name].append(seen[2])
            else:
                digests[name].append(digest_of(cfg, name, file))
                hashed = True
    same = fingerprint(manifest.recipe, digests) == manifest.fingerprint
    if same and hashed:
        with suppress(OSError):
            remember_sources(out, files, digests)
    return same


def _regrouped(cfg: DataConfig, out: Path, manifest: Manifest) -> Manifest:
    """``manifest`` with the domains that its sources have in ``cfg``, which may change without preparing again; also in
    ``out`` where that can be written."""
    domains = {n: replace(info, domain=cfg.sources[n].domain or "") for n, info in manifest.domains.items()}
    if domains != manifest.domains:
        manifest = replace(manifest, domains=domains)
        with suppress(OSError):
            manifest.save(out)
    return manifest


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
