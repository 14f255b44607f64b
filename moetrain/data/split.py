"""Which documents are held out for validation."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class DocumentKey:
    """A document as the split sees it: a hash of its text or its token ids, and its length in bytes or in tokens."""

    digest: bytes
    size: int

    @classmethod
    def of(cls, document: str | np.ndarray) -> DocumentKey:
        """Key of a document's text or token ids."""
        if isinstance(document, np.ndarray):
            ids = document.astype("<i8").tobytes()
            return cls(hashlib.blake2b(ids, digest_size=16, person=b"tokens").digest(), len(document))
        data = document.encode("utf-8")
        return cls(hashlib.blake2b(data, digest_size=16).digest(), len(data))


@dataclass(frozen=True)
class HeldOut:
    """Documents that are held out whole, by number, and at most one (number, bytes or tokens) whose tail is."""

    whole: frozenset[int]
    cut: tuple[int, int] | None


class Keys:
    """The keys of many documents, 24 bytes each."""

    def __init__(self, keys: Iterable[DocumentKey] = ()) -> None:
        self.digests, self.sizes = bytearray(), array("q")
        for key in keys:
            self.add(key)

    def add(self, key: DocumentKey) -> None:
        """Append the key of the next document."""
        self.digests += key.digest
        self.sizes.append(key.size)


def choose_held_out(documents: Keys, fraction: float) -> HeldOut:
    """Hold out about ``fraction`` of the bytes: whole documents in the order of their hashes, equal ones together.

    So the choice depends on the texts alone, and no held-out document is also trained on. A document that would
    overshoot the wanted bytes by more than a quarter is passed over. Where that leaves less than half of what is
    wanted (few, long documents), the rest is the tail of the longest other document (one that has no copy, if there
    is any).
    """
    sizes = np.frombuffer(documents.sizes, dtype=np.int64)
    wanted = fraction * int(sizes.sum())
    high, low = np.frombuffer(documents.digests, dtype=">u8").reshape(-1, 2).T
    order = np.lexsort((low, high))
    new = np.ones(len(order), dtype=bool)  # where a run of equal documents begins
    new[1:] = (np.diff(high[order]) != 0) | (np.diff(low[order]) != 0)
    starts = np.flatnonzero(new)
    taken, chosen = 0, []
    for group, size in enumerate(np.add.reduceat(sizes[order], starts)):
        if taken >= wanted:
            break
        if taken + size <= 1.25 * wanted:
            taken += int(size)
            chosen.append(group)
    group_of = np.cumsum(new) - 1  # of each document in ``order``
    held = order[np.isin(group_of, chosen)]
    whole = frozenset(held.tolist())
    if taken >= wanted / 2:
        return HeldOut(whole, None)
    single = np.zeros(len(order), dtype=bool)
    single[order] = np.bincount(group_of)[group_of] == 1
    others = np.setdiff1d(np.arange(len(order)), held)
    longest = others[np.lexsort((-others, low[others], high[others], sizes[others], single[others]))[-1]]
    return HeldOut(whole, (int(longest), max(1, round(wanted - taken))))


def cut(document: str | np.ndarray, tail: int) -> tuple[str | np.ndarray, str | np.ndarray]:
    """A document in two, the second about ``tail`` UTF-8 bytes or exactly ``tail`` tokens long."""
    if isinstance(document, np.ndarray):
        at = max(1, len(document) - tail)
        return document[:at], document[at:]
    return cut_tail(document, tail)


def cut_tail(text: str, tail: int) -> tuple[str, str]:
    """``text`` in two, the second about ``tail`` UTF-8 bytes long: at the line end nearest to that, when one lies
    within half of ``tail``, else between two characters."""
    data = text.encode("utf-8")
    aim = max(1, len(data) - tail)
    ends = (data.rfind(b"\n", 0, aim) + 1, data.find(b"\n", aim) + 1)
    near = [end for end in ends if 0 < end < len(data) and abs(end - aim) <= tail / 2]
    if near:
        at = min(near, key=lambda end: abs(end - aim))
    else:
        at = aim
        while at < len(data) and data[at] & 0xC0 == 0x80:  # inside a character
            at += 1
    return data[:at].decode("utf-8"), data[at:].decode("utf-8")
