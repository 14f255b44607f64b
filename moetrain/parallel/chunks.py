"""Which chunk of a split sequence sees which, and which rank therefore needs which. See ``parallel.context``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.model.places import Places


@dataclass(frozen=True)
class Chunks:
    """Sequences of ``seq_len`` tokens in 2*cp chunks, numbered in order. window: tokens that a token sees, its own
    included; None: all before it. Documents are not looked at: what is here must be the same in every batch."""

    cp: int
    seq_len: int
    window: int | None

    @property
    def length(self) -> int:
        """C, tokens of a chunk."""
        return self.seq_len // (2 * self.cp)

    def held(self, rank: int) -> tuple[int, int]:
        """The chunks in slots 0 and 1 of ``rank``: its head and its tail."""
        return rank, 2 * self.cp - 1 - rank

    def seen_by(self, chunk: int) -> range:
        """The chunks with a token that some token of ``chunk`` sees; consecutive, itself the last."""
        first = 0 if self.window is None else max(0, chunk * self.length - self.window + 1) // self.length
        return range(first, chunk + 1)

    def needed(self, rank: int) -> list[int]:
        """The chunks that ``rank`` computes with, ascending."""
        head, tail = self.held(rank)
        return sorted({*self.seen_by(head), *self.seen_by(tail)})

    def slots(self, source: int, to: int) -> list[int]:
        """Slots of rank ``source`` whose chunks rank ``to`` needs."""
        needed = self.needed(to)
        return [slot for slot, chunk in enumerate(self.held(source)) if chunk in needed]


def chunk_mask(places: Places, length: int, window: int | None, query: int, keys: range) -> Tensor | None:
    """True where a token of chunk ``query`` sees one of the consecutive chunks ``keys``: (C, K), or (B, 1, C, K) with
    documents. None: plain causal where both are one and the same chunk, else every token sees all."""
    whole = window is None or (query + 1) * length - keys.start * length <= window
    if places.document_BN is None and whole and (query not in keys or len(keys) == 1):
        return None
    device = places.device
    query_C = torch.arange(query * length, (query + 1) * length, device=device)
    return places.sees(query_C, torch.arange(keys.start * length, keys.stop * length, device=device), window)
