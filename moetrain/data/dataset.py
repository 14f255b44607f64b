"""A prepared data set, opened for reading."""

from __future__ import annotations

import hashlib
import resource
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from moetrain.config.errors import DataError
from moetrain.data.manifest import SPLITS, TOKENIZER_FILE, Manifest
from moetrain.data.shards import Shard, TokenFile, bin_path, dtype_for, idx_path, shard_prefix
from moetrain.data.weights import resolve_weights

VERIFY_BELOW = 256_000_000  # bytes of shards that are hashed at every opening: about 0.2 s


class TokenData:
    """Token shards of all sources. ``open`` makes one; it may be shared by threads and inherited by forks.

    ``sources``: names of all sources. ``domain_of``: source -> its domain. ``domains``: names of all domains, in the
    order of their first sources.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        shards: dict[tuple[str, str], Shard],
        vocab_size: int,
        domain_of: Mapping[str, str] | None = None,
    ) -> None:
        self.dir = folder
        self.manifest = manifest
        self.sources = list(manifest.domains)
        given = domain_of or {}
        self.domain_of = {name: given.get(name) or info.domain or name for name, info in manifest.domains.items()}
        self.domains = list(dict.fromkeys(self.domain_of.values()))
        self.vocab_size = vocab_size
        self.eos_id = manifest.eos_id
        self.tokenizer_path = folder / TOKENIZER_FILE
        self._shards = shards

    @classmethod
    def open(
        cls,
        folder: str | Path,
        vocab_size: int | None = None,
        verify: bool | None = None,
        domain_of: Mapping[str, str] | None = None,
    ) -> TokenData:
        """Open what ``prepare`` wrote to ``folder``. ``domain_of``: source -> domain, where the config groups sources
        otherwise than when they were prepared.

        ``vocab_size``: rows of the model's embedding; no token may reach it (None: the tokenizer's own size).
        ``verify``: compare every file's SHA-256 with the manifest (None: when the shards are small). Raises DataError
        for data that is missing, damaged, not what its manifest says, or of a tokenizer that is larger than the
        model's vocabulary.
        """
        folder = Path(folder)
        manifest = Manifest.load(folder)
        if vocab_size is not None and manifest.vocab_size > vocab_size:
            raise DataError(
                f"the tokenizer of '{folder}' has {manifest.vocab_size} tokens, the model's vocabulary "
                f"{vocab_size}; set model.vocab_size to "
                f"{manifest.vocab_size} or more, or prepare the data with a smaller tokenizer"
            )
        _allow_files(4 * len(manifest.domains))
        shards = {}
        for domain, info in manifest.domains.items():
            for split in SPLITS:
                shard = Shard(shard_prefix(folder, domain, split))
                if shard.dtype != dtype_for(manifest.vocab_size):
                    raise DataError(
                        f"{split} shard of '{domain}' in '{folder}' holds {shard.dtype} ids, its manifest's "
                        f"{manifest.vocab_size} tokens need {dtype_for(manifest.vocab_size)}; run 'moetrain prepare' "
                        f"again"
                    )
                wanted, got = (
                    (info.split(split).documents, info.split(split).tokens),
                    (shard.documents, len(shard.tokens)),
                )
                if got != wanted:
                    raise DataError(
                        f"{split} shard of domain '{domain}' in '{folder}' holds {got[0]} documents and "
                        f"{got[1]} tokens, its manifest says "
                        f"{wanted[0]} and {wanted[1]}; run 'moetrain prepare' again"
                    )
                shards[domain, split] = shard
        data = cls(folder, manifest, shards, vocab_size or manifest.vocab_size, domain_of)
        if verify or (verify is None and sum(s.tokens.nbytes for s in shards.values()) < VERIFY_BELOW):
            data.verify()
        return data

    def tokens(self, source: str, split: str = "train") -> TokenFile:
        """All token ids of a source's 'train' or 'val' split in order: slices of it are arrays (uint16 or int32), read
        when they are asked for."""
        return self._shards[source, split].tokens

    def read(self, source: str, start: int, stop: int) -> np.ndarray:
        """Training tokens ``start`` to ``stop`` of a source, as ``tokens`` gives them."""
        return self._shards[source, "train"].tokens[start:stop]

    def documents(self, source: str, split: str = "train") -> np.ndarray:
        """Tokens of each document, the end-of-document token included (int32)."""
        return self._shards[source, split].lengths

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the shards."""
        return Tokenizer.from_file(str(self.tokenizer_path))

    def weights(self, given: Mapping[str, float | None] | None = None) -> dict[str, float]:
        """Shares of training tokens by source, summing to 1; see ``resolve_weights`` for what may be given."""
        return resolve_weights(given, {d: info.train.tokens for d, info in self.manifest.domains.items()})

    def describe(self) -> list[str]:
        """One phrase a source for logs."""
        return [f"{d} {i.train.tokens:,} tokens (+{i.val.tokens:,} held out)" for d, i in self.manifest.domains.items()]

    def verify(self) -> None:
        """Compare the SHA-256 of every file with the manifest. Raises DataError naming the first that differs."""
        expected = {self.tokenizer_path: self.manifest.tokenizer_sha256}
        for source, split in self._shards:
            sha256, prefix = self.manifest.domains[source].split(split).sha256, shard_prefix(self.dir, source, split)
            expected |= {bin_path(prefix): sha256["bin"], idx_path(prefix): sha256["idx"]}
        for path, digest in expected.items():
            if not path.is_file():
                raise DataError(f"'{path}' is missing; delete '{self.dir}' and run 'moetrain prepare' again")
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise DataError(
                        f"'{path}' is damaged (its SHA-256 is not its manifest's); delete '{self.dir}' and run "
                        f"'moetrain prepare' again"
                    )


def _allow_files(count: int) -> None:
    """Let this process open ``count`` files more than the usual limit leaves room for, if the system allows that many:
    a shard keeps two open, and the limit is often 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )
