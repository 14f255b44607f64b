"""Attention within documents without a mask of all pairs. On CUDA: flash-attn or torch's ``varlen_attn``, which take
documents one after the other, and ``flex_attention``, which skips blocks of pairs that do not see each other. On the
CPU: moe_kernels' compiled attention, which does so too.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from moe_kernels.native.attention import native_attention
from moe_kernels.native.library import native_obstacle as compiled_obstacle
from moe_kernels.uncompiled import uncompiled
from torch import Tensor

from moetrain.model.places import Places

HALF = (torch.bfloat16, torch.float16)
WIDEST = 256  # flash-attn's limit on the width of a head


class Setting(NamedTuple):
    """What decides which kernel can run. width, v_width: of a head's query and of its value."""

    device: torch.device
    dtype: torch.dtype
    width: int
    v_width: int
    sinks: bool
    prefix: bool
    split: bool  # this rank has a part of each sequence


def common_obstacle(s: Setting) -> str | None:
    """Why neither kernel can run, or None where one may."""
    if s.device.type != "cuda":
        return f"it needs CUDA, and this is {s.device.type}"
    if s.dtype not in HALF:
        return f"it takes bf16, not {str(s.dtype).removeprefix('torch.')}"
    return None


def flash_obstacle(s: Setting) -> str | None:
    """Why flash-attn cannot run, or None where it can."""
    if (found := common_obstacle(s)) is not None:
        return found
    if s.sinks or s.prefix or s.split:
        return f"it has no {'sinks' if s.sinks else 'prefix masks' if s.prefix else 'sequences split over ranks'}"
    if s.v_width > s.width or s.width > WIDEST or s.width % 8:
        return f"it takes heads of 8 to {WIDEST} by 8 and values no wider, not {s.width} and {s.v_width}"
    return None if flash_function() is not None else "none is there (pip install flash-attn --no-build-isolation)"


def flex_obstacle(s: Setting) -> str | None:
    """Why flex_attention cannot run, or None where it can."""
    if (found := common_obstacle(s)) is not None:
        return found
    if s.sinks or s.split:
        return f"it has no {'sinks' if s.sinks else 'sequences split over ranks'}"
    return None if importlib.util.find_spec("triton") is not None else "triton is not installed"


def runs_native(place: torch.device) -> bool:
    """Whether ``native`` may be for this device. A dry run for the CPU has another answer (``planner.fused``)."""
    return place.type == "cpu"


def native_obstacle(s: Setting) -> str | None:
    """Why the compiled kernel for the CPU cannot run, or None where it can."""
    if not runs_native(s.device):
        return f"it is for the CPU, and this is {s.device.type}"
    if s.sinks or s.prefix or s.split:
        return f"it has no {'sinks' if s.sinks else 'prefix masks' if s.prefix else 'sequences split over ranks'}"
    return compiled_obstacle(s.dtype)


@functools.cache
def flash_function() -> tuple[str, Callable[..., Tensor]] | None:
    """(name, call) of the first that is there of flash-attn 3 on Hopper, flash-attn 2, and torch's ``varlen_attn``.

    call(q, k, v, ends, ends, longest, longest, scale, window) on (tokens, heads, width); the window counts the query's
    own token, None is all before it.
    """
    hopper = not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] == 9
    for name, module in (("flash-attn 3", "flash_attn_interface"), ("flash-attn 2", "flash_attn")):
        if name == "flash-attn 3" and not hopper:
            continue
        try:
            return name, functools.partial(_flash_attn, importlib.import_module(module).flash_attn_varlen_func)
        except (ImportError, AttributeError, OSError):  # absent, another package of that name, or for another torch
            continue
    try:
        varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return None
    takes = inspect.signature(varlen).parameters
    wanted = ("scale", "window_size", "enable_gqa")  # torch 2.10's has none of them
    return ("torch's varlen_attn", functools.partial(_varlen, varlen)) if all(x in takes for x in wanted) else None


def _flash_attn(call: Callable[..., Any], *operands: Any) -> Tensor:
    """flash_attn_varlen_func of flash-attn 2 and 3."""
    *tensors, scale, window = operands
    back = -1 if window is None else window - 1
    out = call(*tensors, softmax_scale=scale, causal=True, window_size=(back, 0 if back >= 0 else -1),
               deterministic=torch.are_deterministic_algorithms_enabled())  # fmt: skip
    return out[0] if isinstance(out, tuple) else out  # early ones of flash-attn 3 add the log-sum


def _varlen(call: Callable[..., Any], *operands: Any) -> Tensor:
    *tensors, scale, window = operands
    back = -1 if window is None else window - 1
    grouped = tensors[0].shape[1] != tensors[1].shape[1]
    return call(*tensors, scale=scale, window_size=(back, 0), enable_gqa=grouped)


def document_ends(places: Places, batch: int) -> tuple[Tensor, int]:
    """(ends, longest): int32 (n + 1,), the first token of each document of all sequences one after the other, and the
    number of tokens; the tokens of the longest document. Made once per forward pass: it waits for the GPU."""
    if "ends" not in places.kept:
        N = places.seq_len
        if places.document_BN is None:
            ends, longest = torch.arange(0, batch * N + 1, N, device=places.device), N
        else:
            first = torch.ones_like(places.document_BN, dtype=torch.bool)
            first[:, 1:] = places.document_BN[:, 1:] != places.document_BN[:, :-1]
            ends = F.pad(first.flatten().nonzero()[:, 0], (0, 1), value=batch * N)
            longest = int(ends.diff().max())
        places.kept["ends"] = ends.to(torch.int32), longest
    return places.kept["ends"]


def native(q_BSHd: Tensor, k_BSGd: Tensor, v_BSGv: Tensor, places: Places, window: int | None, scale: float) -> Tensor:
    """See ``kernels.attend``."""
    window = places.effective(window)
    if ("native", window) not in places.kept:
        own_S = torch.arange(places.seq_len, device=places.device)
        first_BS = own_S - (own_S if places.document_BN is None else places.position_in_document())
        if window is not None:
            first_BS = first_BS.maximum(own_S - (window - 1))
        places.kept["native", window] = first_BS.expand(len(q_BSHd), -1).contiguous()
    return native_attention(q_BSHd, k_BSGd, v_BSGv, places.kept["native", window], scale)


@uncompiled
def flash(q_BSHd: Tensor, k_BSGd: Tensor, v_BSGv: Tensor, places: Places, window: int | None, scale: float) -> Tensor:
    """See ``kernels.attend``. Narrower values are padded: one kernel for both widths."""
    found = flash_function()
    assert found is not None
    B, S, width = len(q_BSHd), q_BSHd.shape[1], v_BSGv.shape[-1]
    v = F.pad(v_BSGv, (0, q_BSHd.shape[-1] - width))
    ends, longest = document_ends(places, B)
    tensors = (t.flatten(0, 1) for t in (q_BSHd, k_BSGd, v))
    out = found[1](*tensors, ends, ends, longest, longest, scale, places.effective(window))
    return out[..., :width].unflatten(0, (B, S))


@uncompiled
def flex(q_BSHd: Tensor, k_BSGd: Tensor, v_BSGv: Tensor, places: Places, window: int | None, scale: float) -> Tensor:
    """See ``kernels.attend``."""
    from torch.nn.attention.flex_attention import create_block_mask

    window = places.effective(window)
    document, prefix = places.document_BN, places.prefix_BN

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """``Places.sees`` of one pair."""
        seen = query >= key
        if prefix is not None:
            seen = seen | prefix[b, key]
        if window is not None:
            seen = seen & ((query - key).abs() < window)
        return seen if document is None else seen & (document[b, query] == document[b, key])

    if ("flex", window) not in places.kept:
        S, alike = q_BSHd.shape[1], document is None and prefix is None
        mask = create_block_mask(sees, None if alike else len(q_BSHd), None, S, S, device=q_BSHd.device)
        places.kept["flex", window] = mask
    q, k, v = (t.transpose(1, 2) for t in (q_BSHd, k_BSGd, v_BSGv))
    grouped, mask = q.shape[1] != k.shape[1], places.kept["flex", window]
    return _flex(q.device.type)(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped).transpose(1, 2)


@functools.cache
def _flex(device: str) -> Any:
    """flex_attention: compiled on CUDA, where without it all scores would be built."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if device == "cuda" else flex_attention
