"""Where the tokens of a forward pass stand: their rotary positions, and which of them may see which.

Shapes: N tokens of a whole sequence, S of them on this rank (all, unless context parallelism splits sequences).
"""

from __future__ import annotations

from typing import Any

import torch
from moe_kernels import rope
from torch import Tensor


class Places:
    """Made once per forward pass and shared by all blocks.

    seq_len: N. index_S: int64 (S,), where each of this rank's tokens stands in its sequence; None: all N are here, in
    order. document_BN: int (B, N), the document of every token of the whole sequences, numbered in ascending order;
    attention stays within a document. None: a sequence is one document. prefix_BN: bool (B, N), True for tokens that
    those before them see too, as the tokens of a prefix do (UniLM, arXiv 1905.03197); None: plain causal. device: of
    these and of the masks.
    cos, sin: rotary tables of this rank's tokens, (S, 1, r/2), or (B, S, 1, r/2) where sequences differ; they broadcast
    over heads. r is the rotated width of a head.
    kept: what cores made from the places for one block, for the blocks after it; the key names it.
    Not a dataclass: FSDP would look into it for tensors.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        seq_len: int,
        index_S: Tensor | None = None,
        document_BN: Tensor | None = None,
        device: torch.device | None = None,
        prefix_BN: Tensor | None = None,
    ) -> None:
        self.seq_len, self.index_S, self.document_BN, self.prefix_BN = seq_len, index_S, document_BN, prefix_BN
        self.device = device or torch.device("cpu")
        self.kept: dict[Any, Any] = {}

    def position_in_document(self) -> Tensor:
        """Position of this rank's tokens from the first token of their document, int64 (B, S)."""
        assert self.document_BN is not None
        index_N = torch.arange(self.seq_len, device=self.device)
        is_first_BN = torch.ones_like(self.document_BN, dtype=torch.bool)
        is_first_BN[:, 1:] = self.document_BN[:, 1:] != self.document_BN[:, :-1]
        first_BN = index_N.where(is_first_BN, 0).cummax(dim=1).values
        position_BN = index_N - first_BN
        return position_BN if self.index_S is None else position_BN.index_select(1, self.index_S)

    def mask(self, window: int | None) -> Tensor | None:
        """True where one of this rank's tokens (row) sees another (column): (S, S), or (B, 1, S, S) with documents
        or prefixes.
        None: plain causal attention in order."""
        window = self.effective(window)
        if ("mask", window) not in self.kept:
            own = None if self.plain(window) else self.own_index()
            self.kept["mask", window] = None if own is None else self.sees(own, own, window)
        return self.kept["mask", window]

    def plain(self, window: int | None) -> bool:
        """Whether every token sees all before it and itself, and all tokens are here in order."""
        masked = self.document_BN is not None or self.prefix_BN is not None
        return self.effective(window) is None and not masked and self.index_S is None

    def effective(self, window: int | None) -> int | None:
        """``window``; None where it is no shorter than the sequence."""
        return None if window is None or window >= self.seq_len else window

    def own_index(self) -> Tensor:
        """index_S, spelled out."""
        return torch.arange(self.seq_len, device=self.device) if self.index_S is None else self.index_S

    def whole(self) -> Places:
        """The same sequences as a rank sees them that holds all of their tokens, in order; for masks (no tables)."""
        if "whole" not in self.kept:
            self.kept["whole"] = Places(self.seq_len, None, self.document_BN, self.device, self.prefix_BN)
        return self.kept["whole"]

    def sees(self, query_Q: Tensor, key_K: Tensor, window: int | None) -> Tensor:
        """True where the token at index ``query_Q`` of a sequence sees the one at ``key_K``: (Q, K), or
        (B, 1, Q, K) with documents or prefixes. A window reaches as far ahead in a prefix as it does back."""
        behind_QK = query_Q[:, None] - key_K[None, :]
        seen = behind_QK >= 0
        if self.prefix_BN is not None:
            seen = seen | self.prefix_BN[:, None, key_K]
        if window is not None:
            seen = seen & (behind_QK.abs() < window)
        if self.document_BN is not None:
            seen = seen & (self.document_BN[:, query_Q, None] == self.document_BN[:, None, key_K])
        return seen if seen.dim() == 2 else seen.unsqueeze(1)


def rotate(x: Tensor, places: Places, interleaved: bool) -> Tensor:
    """Rotate the pairs of x (B, S, H, d): elements (i, i + r/2), or neighbours (2i, 2i+1) when ``interleaved``.

    Elements from r on stay as they are.
    Interleaved pairs come out as halves (all first elements, then all second ones): queries and keys are permuted
    alike, so their products are the same, and the writes are contiguous.
    """
    return rope(x, places.cos, places.sin, interleaved=interleaved)
