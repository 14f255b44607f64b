"""The manifest of a prepared data set: what its shards hold, from which text, with which tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moetrain.config.errors import DataError

FORMAT = "moetrain-data"
VERSION = 1
FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
SPLITS = ("train", "val")


@dataclass(frozen=True)
class SplitInfo:
    """One shard. ``tokens`` count the end-of-document tokens, one a document; ``bytes`` are UTF-8 bytes of text, 0
    where it came as tokens."""

    documents: int
    tokens: int
    bytes: int
    sha256: dict[str, str]


@dataclass(frozen=True)
class DomainInfo:
    """One source: its licence tag, its training and held-out shards, how many invalid UTF-8 sequences of its text were
    replaced, and how many documents were removed for which reason."""

    licence: str
    train: SplitInfo
    val: SplitInfo
    replaced: int = 0
    removed: dict[str, int] = field(default_factory=dict)
    domain: str = ""  # that the source belongs to; empty: its own name

    def split(self, name: str) -> SplitInfo:
        """The shard called 'train' or 'val'."""
        return self.train if name == "train" else self.val

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token of text (end-of-document tokens not counted), over both splits."""
        text_tokens = sum(s.tokens - s.documents for s in (self.train, self.val))
        return (self.train.bytes + self.val.bytes) / max(1, text_tokens)


@dataclass(frozen=True)
class Manifest:
    """A whole prepared data set. ``recipe`` and ``fingerprint`` are hashes: of the config alone, and of the config
    with the text."""

    name: str
    recipe: str
    fingerprint: str
    vocab_size: int
    eos: str
    eos_id: int
    tokenizer_sha256: str
    domains: dict[str, DomainInfo]

    def save(self, folder: Path) -> None:
        """Write manifest.json into ``folder``, whole or not at all."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        for name, domain in self.domains.items():
            for key in ("replaced", "removed", "domain"):  # said only where there is something to say
                if not getattr(domain, key):
                    del content["domains"][name][key]
            content["domains"][name]["bytes_per_token"] = round(domain.bytes_per_token, 4)
        temporary = folder / f"{FILE}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())  # it may take the place of one that cannot be made again
        temporary.replace(folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read manifest.json of ``folder``. Raises DataError when it is missing, damaged, or of another version."""
        file = folder / FILE
        if not file.is_file():
            raise DataError(
                f"'{folder}' holds no prepared data ({FILE} is missing); run 'moetrain prepare' or correct data.dir"
            )
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise KeyError("format")
            if content["version"] != VERSION:
                raise DataError(
                    f"'{file}' has version {content['version']}, this program reads {VERSION}; delete "
                    f"'{folder}' and run 'moetrain prepare'"
                )
            domains = {name: domain_info(d) for name, d in content["domains"].items()}
            fields = {k: v for k, v in content.items() if k not in ("format", "version", "domains")}
            return cls(**fields, domains=domains)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"'{file}' is damaged; delete '{folder}' and run 'moetrain prepare' again") from None

    def table(self) -> str:
        """The domains as lines of text, for people."""
        rows = [f"{'domain':<16}{'documents':>11}{'tokens':>13}{'held out':>11}{'MB':>9}{'bytes/token':>13}  licence"]
        for name, d in self.domains.items():
            rows.append(
                f"{name:<16}{d.train.documents + d.val.documents:>11,}{d.train.tokens:>13,}{d.val.tokens:>11,}"
                f"{_size(d)}  {d.licence}".rstrip()
            )
        for name, d in self.domains.items():
            if d.removed:
                rows.append(f"{name}: {sum(d.removed.values()):,} documents were removed: {removed_line(d.removed)}")
            if d.replaced:
                rows.append(f"{name}: {d.replaced:,} invalid UTF-8 sequences were replaced")
        return "\n".join(rows)


def _size(d: DomainInfo) -> str:
    """Columns of the text's size, which is not known of what came as tokens."""
    size = d.train.bytes + d.val.bytes
    return f"{size / 1e6:>9.2f}{d.bytes_per_token:>13.2f}" if size else f"{'-':>9}{'-':>13}"


def removed_line(removed: Mapping[str, int]) -> str:
    """Reasons and how many documents were removed for each, the most frequent first."""
    return ", ".join(f"{why} {count:,}" for why, count in sorted(removed.items(), key=lambda item: -item[1]))


def domain_info(content: dict[str, Any]) -> DomainInfo:
    """What ``asdict`` gave of one. Raises KeyError or TypeError for anything else."""
    train, val = SplitInfo(**content["train"]), SplitInfo(**content["val"])
    return DomainInfo(
        content["licence"],
        train,
        val,
        content.get("replaced", 0),
        content.get("removed", {}),
        content.get("domain", ""),
    )
