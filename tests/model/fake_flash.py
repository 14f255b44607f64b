"""Stand-ins for kernels of packed attention, in plain torch, with the arguments that the real ones document."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, scale: float, back: int) -> Tensor:
    """One document and head at a time: a query sees keys up to its own, ``back`` of them before it (-1: all)."""
    out, group = [], q.shape[1] // k.shape[1]
    for first, last in zip(ends.tolist(), ends.tolist()[1:], strict=False):
        heads = []
        for head in range(q.shape[1]):
            one, keys, values = q[first:last, head], k[first:last, head // group], v[first:last, head // group]
            distance = torch.arange(last - first)[:, None] - torch.arange(last - first)
            seen = (distance >= 0) & ((distance <= back) | torch.tensor(back < 0))
            heads.append((one @ keys.t() * scale).masked_fill(~seen, float("-inf")).softmax(-1) @ values)
        out.append(torch.stack(heads, 1))
    return torch.cat(out)


def checked(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
    """The ends of documents."""
    assert q.dim() == k.dim() == v.dim() == 3 and q.shape[-1] == k.shape[-1] == v.shape[-1]
    assert cu_q.dtype == torch.int32 and cu_q.equal(cu_k)
    assert int(cu_q[0]) == 0 and int(cu_q[-1]) == len(q) and (cu_q.diff() > 0).all()
    assert max_q == max_k == int(cu_q.diff().max())
    return cu_q


def flash_attn_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
) -> Tensor:
    """flash_attn_varlen_func of flash-attn 2.8."""
    ends = checked(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert causal and softmax_scale is not None and window_size[1] in (-1, 0)
    return attention(q, k, v, ends, softmax_scale, window_size[0])


def flash_attn_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Any = None,
    seqused_k: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: Any = None,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor]:
    """flash_attn_varlen_func of an early flash-attn 3, which gave the log-sum as well."""
    ends = checked(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert causal and softmax_scale is not None
    return attention(q, k, v, ends, softmax_scale, window_size[0]), q.new_zeros(q.shape[1], len(q))


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Any = None,
    block_table: Any = None,
    num_splits: int | None = None,
) -> Tensor:
    """torch.nn.attention.varlen of torch 2.13: (-1, 0) is causal."""
    assert cu_seq_k is not None and scale is not None and window_size[1] == 0
    assert enable_gqa or query.shape[1] == key.shape[1]
    return attention(
        query, key, value, checked(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k), scale, window_size[0]
    )
