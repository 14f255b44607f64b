"""Where the tokens of a forward pass stand: their rotary positions, and which of them may see which.

Shapes: N tokens of a whole sequence, S of them on this rank (all, unless context parallelism splits sequences).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Places:
    """Made once per forward pass and shared by all blocks.

    seq_len: N. index_S: int64 (S,), where each of this rank's tokens stands in its sequence; None: all N are here, in
    order. document_BN: int (B, N), the document of every token of the whole sequences, numbered in ascending order;
    attention stays within a document. None: a sequence is one document.
    cos, sin: rotary tables of this rank's tokens, (S, 1, r/2), or (B, S, 1, r/2) where sequences differ; they broadcast
    over heads. r is the rotated width of a head.
    """

    seq_len: int
    index_S: Tensor | None = None
    document_BN: Tensor | None = None
    cos: Tensor = field(init=False)
    sin: Tensor = field(init=False)
    _masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def position_in_document(self, device: torch.device) -> Tensor:
        """Position of this rank's tokens from the first token of their document, int64 (B, S)."""
        assert self.document_BN is not None
        document_BN = self.document_BN.to(device)
        index_N = torch.arange(self.seq_len, device=device)
        is_first_BN = torch.ones_like(document_BN, dtype=torch.bool)
        is_first_BN[:, 1:] = document_BN[:, 1:] != document_BN[:, :-1]
        first_BN = index_N.where(is_first_BN, 0).cummax(dim=1).values
        position_BN = index_N - first_BN
        return position_BN if self.index_S is None else position_BN.index_select(1, self.index_S)

    def mask(self, window: int | None) -> Tensor | None:
        """True where one of this rank's tokens (row) sees another (column): (S, S), or (B, 1, S, S) with documents.
        None: plain causal attention in order."""
        if window is not None and window >= self.seq_len:
            window = None
        if window not in self._masks:
            plain = window is None and self.document_BN is None and self.index_S is None
            own = None if plain else self.own_index()
            self._masks[window] = None if own is None else self.sees(own, own, window)
        return self._masks[window]

    def own_index(self) -> Tensor:
        """index_S, spelled out."""
        return torch.arange(self.seq_len, device=self.cos.device) if self.index_S is None else self.index_S

    def sees(self, query_Q: Tensor, key_K: Tensor, window: int | None) -> Tensor:
        """True where the token at index ``query_Q`` of a sequence sees the one at ``key_K``: (Q, K), or
        (B, 1, Q, K) with documents."""
        behind_QK = query_Q[:, None] - key_K[None, :]
        seen = behind_QK >= 0 if window is None else (behind_QK >= 0) & (behind_QK < window)
        if self.document_BN is None:
            return seen
        document_BN = self.document_BN.to(query_Q.device)
        same_BQK = document_BN[:, query_Q, None] == document_BN[:, None, key_K]
        return (seen & same_BQK).unsqueeze(1)


def rotate(x: Tensor, places: Places, interleaved: bool) -> Tensor:
    """Rotate the pairs of x (B, S, H, r): elements (i, i + r/2), or neighbours (2i, 2i+1) when ``interleaved``.

    Interleaved pairs come out as halves (all first elements, then all second ones): queries and keys are permuted
    alike, so their products are the same, and the writes are contiguous.
    """
    cos, sin = places.cos, places.sin
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
