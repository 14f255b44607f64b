"""Keys and values of the tokens that a model has read, so that the next ones are computed alone.

Shapes: B batch, S new tokens, P tokens read before, H query heads, G key/value heads, d head width, v value width.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from moetrain.model.attention.kernels import Rule, attend, attend_masked
from moetrain.model.decoder import Decoder
from moetrain.model.places import Places


class LayerCache:
    """Attention's core for one layer: ``attend`` to all keys so far, of which it keeps those that are still seen.

    k_BPGd, v_BPGv: keys, rotated, and values; a layer with a window keeps its last ``window - 1``. Latent attention's
    are the heads that its latents grew into.
    """

    def __init__(self) -> None:
        self.k_BPGd: Tensor | None = None
        self.v_BPGv: Tensor | None = None

    def __call__(self, q_BSHd: Tensor, k_BSGd: Tensor, v_BSGv: Tensor, places: Places, rule: Rule) -> Tensor:
        """See ``attend``; ``places`` are those of the new tokens in all tokens so far."""
        if self.k_BPGd is None or self.v_BPGv is None:
            self._keep(k_BSGd, v_BSGv, rule.window)
            return attend(q_BSHd, k_BSGd, v_BSGv, places, rule)
        k, v = torch.cat((self.k_BPGd, k_BSGd), dim=1), torch.cat((self.v_BPGv, v_BSGv), dim=1)
        self._keep(k, v, rule.window)
        key_index = torch.arange(places.seq_len - k.shape[1], places.seq_len, device=k.device)
        mask = places.sees(places.own_index(), key_index, rule.window)
        return attend_masked(q_BSHd, k, v, mask, rule)

    def _keep(self, k: Tensor, v: Tensor, window: int | None) -> None:
        first = 0 if window is None else max(0, k.shape[1] - (window - 1))
        # copied where it is a part, which would hold all of it in memory
        self.k_BPGd, self.v_BPGv = (t[:, first:].clone() if first else t for t in (k, v))


class Cache:
    """A whole model on one device that reads its text bit by bit; use as ``with Cache(model) as cache``.

    At the end the model is as it was. ``length``: tokens read so far.
    """

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.length = 0
        self._before: list[tuple[Any, Any]] = []

    def __enter__(self) -> Cache:
        for block in self.model.layers.values():
            attention: Any = block.attention
            self._before.append((attention, attention.core))
            attention.core = LayerCache()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for attention, core in self._before:
            attention.core = core
        self._before.clear()
        self.model.index_of = None

    @torch.no_grad()
    def read(self, tokens_BS: Tensor) -> Tensor:
        """Logits (B, S, V) after each of the next tokens of B texts."""
        index_S = torch.arange(self.length, self.length + tokens_BS.shape[1], device=tokens_BS.device)
        self.model.index_of = None if self.length == 0 else lambda seq_len: index_S
        self.length += tokens_BS.shape[1]
        logits_BSV, _ = self.model(tokens_BS, seq_len=self.length)
        return logits_BSV
