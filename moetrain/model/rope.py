"""Rotary position embedding (RoFormer, arXiv 2104.09864) and the rules that extend its context.

Nothing here is a parameter or a buffer: tables are computed from the config, so a model built on the meta device has
nothing to restore. r is the rotated width of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moetrain.config.schema import RopeConfig
from moetrain.model.places import Places


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Attention temperature of an extension by ``factor`` (YaRN, arXiv 2309.00071, equation 22; DeepSeek's mscale)."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def inverse_frequencies(cfg: RopeConfig, width: int, dtype: torch.dtype) -> tuple[Tensor, float]:
    """(radians per token of each pair, (r/2,); factor on cos and sin) for a rotated width r = ``width``, on the CPU.

    Rules: ``linear`` divides positions (arXiv 2306.15595); ``llama3`` divides only long wavelengths (Llama 3.1's code);
    ``yarn`` interpolates by wavelength and scales attention (arXiv 2309.00071).
    """
    inv = 1.0 / (cfg.theta ** (torch.arange(0, width, 2, dtype=dtype, device="cpu") / width))
    if cfg.scaling == "linear":
        return inv / cfg.factor, 1.0
    if cfg.scaling == "llama3":
        return _llama3(cfg, inv), 1.0
    if cfg.scaling == "yarn":
        return _yarn(cfg, inv, width), yarn_temperature(cfg)
    return inv, 1.0


def _llama3(cfg: RopeConfig, inv: Tensor) -> Tensor:
    # from 0 at wavelength original / low_freq_factor (fully scaled) to 1 at original / high_freq_factor (kept)
    turns = cfg.original_max_seq_len * inv / (2 * math.pi)
    smooth = ((turns - cfg.low_freq_factor) / (cfg.high_freq_factor - cfg.low_freq_factor)).clamp(0, 1)
    return (1 - smooth) * inv / cfg.factor + smooth * inv


def _yarn(cfg: RopeConfig, inv: Tensor, width: int) -> Tensor:
    def pair_at(turns: float) -> float:
        """The (fractional) pair that makes ``turns`` rotations over the original context."""
        return width * math.log(cfg.original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(cfg.theta))

    low, high = pair_at(cfg.beta_fast), pair_at(cfg.beta_slow)
    if cfg.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    interpolated = ((torch.arange(width // 2, dtype=inv.dtype, device="cpu") - low) / (high - low)).clamp(0, 1)
    return inv / cfg.factor * interpolated + inv * (1 - interpolated)


def yarn_temperature(cfg: RopeConfig) -> float:
    """Factor on cos and sin under yarn: the default rule, or the ratio of both mscales (DeepSeek)."""
    if cfg.mscale and cfg.mscale_all_dim:
        return yarn_mscale(cfg.factor, cfg.mscale) / yarn_mscale(cfg.factor, cfg.mscale_all_dim)
    return yarn_mscale(cfg.factor)


class Rope:
    """Makes ``Places``; keeps the tables of consecutive positions until length, split, device or dtype change."""

    def __init__(self, cfg: RopeConfig, width: int) -> None:
        self.cfg = cfg
        self.width = width
        self._kept: tuple[object, Tensor, Tensor] | None = None
        self._index: tuple[Tensor, Tensor] | None = None  # as it was given, and on the device
        self._inverse: dict[tuple[torch.dtype, torch.device], tuple[Tensor, float]] = {}

    def places(
        self,
        seq_len: int,
        like: Tensor,
        *,
        index_S: Tensor | None = None,
        document_BN: Tensor | None = None,
        positions_BS: Tensor | None = None,
        prefix_BN: Tensor | None = None,
    ) -> Places:
        """Places of this rank's tokens in sequences of ``seq_len`` (N) tokens, with tables in like's dtype and device.

        index_S: where each of them stands; None: all are here, in order. document_BN: see ``Places``; positions then
        start from 0 in every document. positions_BS: int (B, S) or (S,), rotary positions that replace these.
        prefix_BN: see ``Places``.
        """
        index_S = self._moved(index_S, like.device)
        if document_BN is not None:
            if document_BN.shape[1] != seq_len:
                raise ValueError(f"documents of {document_BN.shape[1]} tokens for sequences of {seq_len}")
            document_BN = document_BN.to(like.device)
        if prefix_BN is not None:
            prefix_BN = prefix_BN.to(like.device)
        places = Places(seq_len, index_S, document_BN, like.device, prefix_BN)
        if positions_BS is None and document_BN is not None:
            positions_BS = places.position_in_document()
        if positions_BS is not None:
            places.cos, places.sin = self._tables(positions_BS.to(like.device), like)
            return places
        key = (seq_len, like.device, like.dtype, None if index_S is None else id(index_S))
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, *self._tables(places.own_index(), like))
        places.cos, places.sin = self._kept[1:]
        return places

    def _moved(self, index_S: Tensor | None, device: torch.device) -> Tensor | None:
        """``index_S`` on ``device``; the same tensor as long as the same is given, so that nothing waits for it."""
        if index_S is None:
            return None
        if self._index is None or self._index[0] is not index_S or self._index[1].device != device:
            self._index, self._kept = (index_S, index_S.to(device)), None
        return self._index[1]

    @torch.no_grad()
    def _tables(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        # float32, as every published checkpoint was trained with; float64 only where the whole model is
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        key = (wide, positions.device)
        if key not in self._inverse:  # made on the CPU: with documents every forward pass would wait for them
            inv, factor = inverse_frequencies(self.cfg, self.width, wide)
            self._inverse[key] = inv.to(positions.device), factor
        inv, factor = self._inverse[key]
        angles = positions[..., None, None].to(wide) * inv
        return (angles.cos() * factor).to(like.dtype), (angles.sin() * factor).to(like.dtype)
