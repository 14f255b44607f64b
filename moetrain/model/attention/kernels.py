"""Softmax attention over whole sequences: one signature, five backends. ``math`` spells it out and is the oracle.

Shapes: B batch, S sequence, H query heads, G key/value heads (G divides H), d head width, v value width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from moe_kernels.uncompiled import uncompiled
from torch import Tensor

from moetrain.config.errors import ConfigError
from moetrain.model.attention import packed
from moetrain.model.places import Places


class Rule(NamedTuple):
    """What attention is besides its tensors, as one module asks for it.

    window: a query sees so many tokens, its own included; None: all before it. sinks_H: a logit per head that joins the
    softmax and has no value (GPT-OSS, arXiv 2508.10925). backend: see ``choose``.
    """

    scale: float
    window: int | None = None
    sinks_H: Tensor | None = None
    backend: str = "auto"


class Core(Protocol):
    """What an attention module calls; ``attend``, or its form for sequences that are split over ranks."""

    def __call__(self, q_BSHd: Tensor, k_BSGd: Tensor, v_BSGv: Tensor, places: Places, rule: Rule) -> Tensor: ...


def attend(q_BSHd: Tensor, k_BSGd: Tensor, v_BSGv: Tensor, places: Places, rule: Rule) -> Tensor:
    """softmax(scale * q k^T) v -> (B, S, H, v).

    Causal, within documents (``places``) and the rule's window. Backend ``auto`` counts what else it could be only
    where there are documents, prefixes or a window.
    """
    scale, window, sinks_H, backend = rule
    if chooses(backend, q_BSHd.device, places, window, compiled=torch.compiler.is_compiling()):
        setting = packed.Setting(
            q_BSHd.device, q_BSHd.dtype, q_BSHd.shape[-1], v_BSGv.shape[-1],
            sinks_H is not None, places.prefix_BN is not None, places.index_S is not None,
        )  # fmt: skip
        name, _ = choose(backend, setting)
        if name in PACKED:
            return PACKED[name].run(q_BSHd, k_BSGd, v_BSGv, places, window, scale)
        mask = uncompiled(places.mask)(window)
    else:
        mask = places.mask(window)
    return attend_masked(q_BSHd, k_BSGd, v_BSGv, mask, rule)


class _Packed(NamedTuple):
    """obstacle: why it cannot run, or None where it can."""

    obstacle: Callable[[packed.Setting], str | None]
    run: Callable[..., Tensor]


PACKED = {
    "flash": _Packed(packed.flash_obstacle, packed.flash),
    "flex": _Packed(packed.flex_obstacle, packed.flex),
    "native": _Packed(packed.native_obstacle, packed.native),
}


def chooses(backend: str, device: torch.device, places: Places, window: int | None, compiled: bool) -> bool:
    """Whether ``attend`` asks ``choose``, and may need no mask. torch.compile does not see into ``native``; in dry runs
    for CUDA (on meta) SDPA stands for every fused kernel."""
    if backend == "auto":
        here = packed.runs_native(device) and not compiled
        return here or (device.type == "cuda" and not places.plain(window))
    return backend in PACKED and device.type != "meta"


@uncompiled
def choose(backend: str, setting: packed.Setting) -> tuple[str, str]:
    """(name, why) of the kernel that runs for ``backend``: of "auto" the first of flash, flex, native, sdpa that can.

    Raises ConfigError: it was asked for by name and cannot run.
    """
    asked = ["native"] if packed.runs_native(setting.device) else ["flash", "flex"]
    reasons = {name: PACKED[name].obstacle(setting) for name in PACKED if name == backend or name in asked}
    if backend in PACKED:
        if reasons[backend] is not None:
            raise ConfigError(f"model.attention.backend={backend} cannot run: {reasons[backend]}; use auto or sdpa")
        return backend, "asked for"
    if backend != "auto":
        return backend, "asked for"
    able = next((name for name, reason in reasons.items() if reason is None), None)
    found = packed.flash_function() if able == "flash" else None
    if able is None:
        return "sdpa", "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return able, "documents and windows without a mask of all pairs" if found is None else f"by {found[0]}"


def attend_masked(q_BQHd: Tensor, k_BKGd: Tensor, v_BKGv: Tensor, mask: Tensor | None, rule: Rule) -> Tensor:
    """``attend`` under a mask: true where a query (row) sees a key (column), (Q, K) or (B, 1, Q, K); None: causal. The
    rule's window is not looked at."""
    q, k, v = (t.transpose(1, 2) for t in (q_BQHd, k_BKGd, v_BKGv))
    out = (_math if rule.backend == "math" else _sdpa)(q, k, v, rule.scale, mask, rule.sinks_H)
    return out.transpose(1, 2)


def _causal(seq_len: int, device: torch.device) -> Tensor:
    return torch.ones(seq_len, seq_len, dtype=torch.bool, device=device).tril()


def _math(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, sinks_H: Tensor | None) -> Tensor:
    B, H, S, _ = q.shape
    G = k.shape[1]
    mask = _causal(S, q.device) if mask is None else mask
    scores = q.unflatten(1, (G, H // G)) @ k.unsqueeze(2).transpose(-1, -2) * scale
    mask = mask if mask.dim() == 2 else mask.unsqueeze(2)  # the same for all heads: (B, 1, 1, Q, K)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks_H is not None:
        scores = torch.cat((scores, sinks_H.view(1, G, H // G, 1, 1).expand(B, -1, -1, S, 1).to(scores.dtype)), dim=-1)
    wide = torch.float32 if q.dtype in (torch.bfloat16, torch.float16) else q.dtype
    probs = scores.softmax(dim=-1, dtype=wide)[..., : k.shape[2]].to(v.dtype)
    return (probs @ v.unsqueeze(2)).flatten(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, sinks_H: Tensor | None) -> Tensor:
    width = v.shape[-1]
    if sinks_H is not None:
        mask = _causal(q.shape[2], q.device) if mask is None else mask
        q, k, v, mask = _sink_as_key(q, k, v, scale, mask, sinks_H)
    if q.device.type == "cpu" and v.shape[-1] < q.shape[-1]:
        # The CPU's flash kernel needs equal widths; without it attention falls back to the path that builds all scores,
        # three times slower at DeepSeek's 3:2 widths.
        v = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
    if q.device.type == "cuda" and mask is not None and q.shape[1] != k.shape[1]:
        # CUDA's fused kernel that takes a mask knows no groups, and the one that knows groups takes no mask: without
        # copies of keys and values attention falls back to the path that builds all scores.
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[..., :width]


def _sink_as_key(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor, sinks_H: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Express the sink as one more key with value zero, which fused kernels know how to differentiate.

    Eight more head dimensions (kernels want a multiple of 8): the first is sink/scale in queries, 1 in the sink's key
    and 0 in all other keys; so the sink's score is exactly its logit.
    """
    B, H, S, _ = q.shape
    G = k.shape[1]
    sink_q = F.pad((sinks_H / scale).to(q.dtype).view(1, H, 1, 1), (0, 7)).expand(B, -1, S, -1)
    sink_k = F.pad(k.new_ones(1, 1, 1, 1), (k.shape[-1], 7)).expand(B, G, -1, -1)
    q = torch.cat((q, sink_q), dim=-1)
    k = torch.cat((sink_k, F.pad(k, (0, 8))), dim=2)
    v = F.pad(v, (0, 0, 1, 0))
    return q, k, v, F.pad(mask, (1, 0), value=True)
