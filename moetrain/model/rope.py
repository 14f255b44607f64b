"""Rotary position embedding (RoFormer, arXiv 2104.09864) and the rules that extend its context.

Nothing here is a parameter or a buffer: tables are computed from the config, so a model built on the meta device has
nothing to restore. r is the rotated width of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moetrain.config.schema import RopeConfig


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


@dataclass
class Positions:
    """What attention knows about where tokens stand, made once per forward pass and shared by all blocks.

    cos, sin: (S, 1, r/2), or (B, S, 1, r/2) where positions differ between sequences; they broadcast over heads.
    """

    cos: Tensor
    sin: Tensor
    seq_len: int
    _masks: dict[int, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor | None:
        """Boolean (S, S), true where the query (row) sees the key (column); None for plain causal attention."""
        if window is None or window >= self.seq_len:
            return None
        if window not in self._masks:
            ones = torch.ones(self.seq_len, self.seq_len, dtype=torch.bool, device=self.cos.device)
            self._masks[window] = ones.tril() & ones.triu(1 - window)
        return self._masks[window]


class Rope:
    """Makes ``Positions``; keeps the tables of consecutive positions until length, device or dtype change."""

    def __init__(self, cfg: RopeConfig, width: int) -> None:
        self.cfg = cfg
        self.width = width
        self._kept: tuple[tuple[int, torch.device, torch.dtype], Tensor, Tensor] | None = None

    def positions(self, x_BSD: Tensor, positions_BS: Tensor | None) -> Positions:
        """Tables in x's dtype and device for ``positions_BS`` (int, (B, S) or (S,)), or for 0..S-1 when None."""
        seq_len = x_BSD.shape[1]
        if positions_BS is not None:
            return Positions(*self._tables(positions_BS, x_BSD), seq_len)
        key = (seq_len, x_BSD.device, x_BSD.dtype)
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, *self._tables(torch.arange(seq_len, device=x_BSD.device), x_BSD))
        return Positions(*self._kept[1:], seq_len)

    @torch.no_grad()
    def _tables(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        # float32, as every published checkpoint was trained with; float64 only where the whole model is
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        inv, factor = inverse_frequencies(self.cfg, self.width, wide)
        angles = positions[..., None, None].to(wide) * inv.to(positions.device)
        return (angles.cos() * factor).to(like.dtype), (angles.sin() * factor).to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the pairs of x (B, S, H, r): elements (i, i + r/2), or neighbours (2i, 2i+1) when ``interleaved``.

    Interleaved pairs come out as halves (all first elements, then all second ones): queries and keys are permuted
    alike, so their products are the same, and the writes are contiguous.
    """
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
