"""The choice of experts in Triton: rows of logits are read once; scores, groups, the best k and loads in registers.

Scores are compared as integers: 32 bits in the order of the numbers, NaN on top, then 32 bits that are higher for lower
ids. So all differ, the largest is the choice, and equal scores go to the lower id.
"""
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels import router
from moe_kernels.gpu.operator import operator
from moe_kernels.gpu.tiles import cdiv, next_power_of_2

# Programs that count loads; numbers that a program holds at a time; the limits of what is compiled.
PROGRAMS, TILE, MOST_CHOSEN, MOST_EXPERTS = 512, 2048, 16, 2048

_TINY: tl.constexpr = tl.constexpr(router.TINY)
_LOWEST: tl.constexpr = tl.constexpr(-(2**63))  # below the key of any number
_IDS: tl.constexpr = tl.constexpr(2**32 - 1)
_NAN: tl.constexpr = tl.constexpr(2**31 - 1)
_CLOSED: tl.constexpr = tl.constexpr((-8388608 ^ 0x7FFFFFFF) << 32)  # the key of -inf


@triton.jit
def _ordered(x):
    """float32 -> int32 in the same order; NaN is the largest."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, _NAN, tl.where(bits < 0, bits ^ _NAN, bits))


@triton.jit
def _number(key):
    """The number of a key."""
    bits = (key >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ _NAN, bits).to(tl.float32, bitcast=True)


@triton.jit
def _scores(logits, at, mask, real, SOFTMAX: tl.constexpr):
    """The scores of the logits ``at``, float32; those of columns that are not ``real`` count for nothing."""
    x = tl.load(logits + at, mask=mask, other=0.0).to(tl.float32)
    if SOFTMAX:
        z = tl.where(real, x, float("-inf"))
        z = tl.exp(z - tl.max(z, 1)[:, None])
        return z / tl.sum(z, 1)[:, None]
    else:
        return tl.sigmoid(x)


@triton.jit
def _close_groups(
    key, ROWS: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr,
    GROUPS_POW2: tl.constexpr, SIZE_POW2: tl.constexpr,
):  # fmt: skip
    """Keys with those of all but the best groups at -inf; such as are no expert's stay lowest."""
    key = tl.reshape(key, (ROWS, GROUPS_POW2, SIZE_POW2))
    best = tl.max(key, 2)
    value = _number(best)
    if TOP2:
        value += _number(tl.max(tl.where(key == best[:, :, None], _LOWEST, key), 2))
    g = tl.arange(0, GROUPS_POW2)
    group = (_ordered(value).to(tl.int64) << 32) | (GROUPS_POW2 - 1 - g)[None, :]
    group = tl.where((g < GROUPS)[None, :], group, _LOWEST)
    left = group
    for _ in tl.static_range(TOP_GROUPS):
        left = tl.where(left == tl.max(left, 1)[:, None], _LOWEST, left)
    stays = (left != group)[:, :, None] | (key == _LOWEST)
    key = tl.where(stays, key, (key & _IDS) | _CLOSED)
    return tl.reshape(key, (ROWS, GROUPS_POW2 * SIZE_POW2))


@triton.jit(do_not_specialize=["T", "EACH"])
def router_topk_kernel(
    logits, bias, weights, ids, scores, counts, T, EACH, scale,
    E: tl.constexpr, K: tl.constexpr, K_POW2: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    GROUPS_POW2: tl.constexpr, SIZE_POW2: tl.constexpr, TOP2: tl.constexpr, SOFTMAX: tl.constexpr,
    RENORMALIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of EACH consecutive rows; ``counts`` (programs, E) are those of its rows. A group has SIZE_POW2 columns."""
    SIZE: tl.constexpr = E // GROUPS
    WIDE: tl.constexpr = GROUPS_POW2 * SIZE_POW2
    c, k = tl.arange(0, WIDE), tl.arange(0, K_POW2)
    group, place = c // SIZE_POW2, c % SIZE_POW2
    e, real = group * SIZE + place, (group < GROUPS) & (place < SIZE)
    count = tl.zeros((WIDE,), tl.int32)
    first = tl.program_id(0) * EACH
    end = tl.minimum(first + EACH, T)
    for row in range(first, end, ROWS):
        t = row + tl.arange(0, ROWS)
        live, row_at = (t < end)[:, None], t.to(tl.int64)[:, None]
        mask = live & real[None, :]
        at = row_at * E + e[None, :]
        s = _scores(logits, at, mask, real[None, :], SOFTMAX)
        if scores is not None:
            tl.store(scores + at, s, mask=mask)
        biased = s
        if bias is not None:
            biased += tl.load(bias + e, mask=real, other=0.0).to(tl.float32)[None, :]
        key = (_ordered(biased).to(tl.int64) << 32) | (WIDE - 1 - c)[None, :]
        key = tl.where(real[None, :], key, _LOWEST)
        if TOP_GROUPS < GROUPS:
            key = _close_groups(key, ROWS, GROUPS, TOP_GROUPS, TOP2, GROUPS_POW2, SIZE_POW2)
        w, chosen = tl.zeros((ROWS, K_POW2), tl.float32), tl.zeros((ROWS, K_POW2), tl.int64)
        for i in tl.static_range(K):
            best = tl.max(key, 1)
            hit = key == best[:, None]
            column = WIDE - 1 - (best & _IDS)
            chosen = tl.where((k == i)[None, :], (column // SIZE_POW2 * SIZE + column % SIZE_POW2)[:, None], chosen)
            w = tl.where((k == i)[None, :], tl.sum(tl.where(hit, s, 0.0), 1)[:, None], w)
            key = tl.where(hit, _LOWEST, key)
        count += tl.sum(((key == _LOWEST) & mask).to(tl.int32), 0)
        if RENORMALIZE:
            w = w / (tl.sum(w, 1) + _TINY)[:, None]
        tl.store(weights + row_at * K + k[None, :], w * scale, mask=live & (k < K)[None, :])
        tl.store(ids + row_at * K + k[None, :], chosen, mask=live & (k < K)[None, :])
    tl.store(counts + tl.program_id(0) * E + e, count, mask=real)


@triton.jit(do_not_specialize=["T"])
def router_topk_backward_kernel(
    logits, ids, dweights, dscores, dlogits, T, scale,
    E: tl.constexpr, K: tl.constexpr, E_POW2: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """With w = scale s / S over the chosen: s' = scale (w' - sum(w' s) / S) / S; then the derivative of the score."""
    e = tl.arange(0, E_POW2)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_at = t.to(tl.int64)
    mask = (t < T)[:, None] & (e < E)[None, :]
    at = row_at[:, None] * E + e[None, :]
    s = _scores(logits, at, mask, (e < E)[None, :], SOFTMAX)
    ds = tl.zeros((ROWS, E_POW2), tl.float32)
    chosen = tl.zeros((ROWS, E_POW2), tl.int32)
    for i in tl.static_range(K):
        hit = tl.load(ids + row_at * K + i, mask=t < T, other=-1)[:, None] == e[None, :]
        ds = tl.where(hit, tl.load(dweights + row_at * K + i, mask=t < T, other=0.0)[:, None], ds)
        chosen = tl.where(hit, 1, chosen)
    ds *= scale
    if RENORMALIZE:
        own = tl.where(chosen > 0, s, 0.0)
        total = tl.sum(own, 1) + _TINY
        ds = tl.where(chosen > 0, (ds - (tl.sum(ds * own, 1) / total)[:, None]) / total[:, None], 0.0)
    if dscores is not None:
        ds += tl.load(dscores + at, mask=mask, other=0.0)
    dx = s * (ds - tl.sum(s * ds, 1)[:, None]) if SOFTMAX else s * (1 - s) * ds
    tl.store(dlogits + at, dx.to(dlogits.dtype.element_ty), mask=mask)


def launch(
    E: int, k: int, groups: int, top_groups: int, top2: bool, softmax: bool, renormalize: bool
) -> dict[str, int]:
    """The constants of the forward kernel."""
    groups, top_groups = (groups, top_groups) if top_groups < groups else (1, 1)
    groups_wide, size_wide = next_power_of_2(groups), next_power_of_2(E // groups)
    if k > MOST_CHOSEN or groups_wide * size_wide > MOST_EXPERTS:
        raise ValueError(
            f"router_topk on backend 'triton' takes k up to {MOST_CHOSEN} and, with groups filled up to powers of two, "
            f"{MOST_EXPERTS} experts, not k={k} of {groups} groups of {E // groups}; use 'auto' or 'torch'"
        )
    return {
        "E": E,
        "K": k,
        "K_POW2": next_power_of_2(k),
        "GROUPS": groups,
        "TOP_GROUPS": top_groups,
        "GROUPS_POW2": groups_wide,
        "SIZE_POW2": size_wide,
        "TOP2": top2,
        "SOFTMAX": softmax,
        "RENORMALIZE": renormalize,
        "ROWS": max(1, TILE // (groups_wide * size_wide)),
    }


def launch_backward(E: int, k: int, softmax: bool, renormalize: bool) -> dict[str, int]:
    """The constants of the backward kernel."""
    wide = next_power_of_2(E)
    rows = max(1, TILE // wide)
    return {"E": E, "K": k, "E_POW2": wide, "SOFTMAX": softmax, "RENORMALIZE": renormalize, "ROWS": rows}


def _outputs(logits_TE: Tensor, k: int, with_scores: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Room for weights_TK, ids_TK and, if asked for, scores_TE."""
    T, E = logits_TE.shape
    weights_TK, ids_TK = logits_TE.new_empty(T, k, dtype=torch.float32), logits_TE.new_empty(T, k, dtype=torch.int64)
    return weights_TK, ids_TK, logits_TE.new_empty((T, E) if with_scores else 0, dtype=torch.float32)


@operator("router_topk_forward")
def router_topk_forward(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    k: int,
    softmax: bool,
    groups: int,
    top_groups: int,
    top2: bool,
    renormalize: bool,
    scale: float,
    with_scores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weights_TK, ids_TK, counts_E, scores_TE or nothing)."""
    T, E = logits_TE.shape
    constants = launch(E, k, groups, top_groups, top2, softmax, renormalize)
    each = constants["ROWS"] * cdiv(max(T, 1), constants["ROWS"] * PROGRAMS)
    weights_TK, ids_TK, scores_TE = _outputs(logits_TE, k, with_scores)
    counts_PE = logits_TE.new_empty(cdiv(T, each), E, dtype=torch.int32)
    if T:
        router_topk_kernel[(len(counts_PE),)](
            logits_TE, bias_E, weights_TK, ids_TK, scores_TE if with_scores else None, counts_PE, T, each, scale,
            **constants,
        )  # fmt: skip
    return weights_TK, ids_TK, counts_PE.sum(0), scores_TE


@router_topk_forward.register_fake
def _(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    k: int,
    softmax: bool,
    groups: int,
    top_groups: int,
    top2: bool,
    renormalize: bool,
    scale: float,
    with_scores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights_TK, ids_TK, scores_TE = _outputs(logits_TE, k, with_scores)
    return weights_TK, ids_TK, ids_TK.new_empty(logits_TE.shape[1]), scores_TE


@operator("router_topk_backward")
def router_topk_backward(
    dweights_TK: Tensor,
    dscores_TE: Tensor | None,
    logits_TE: Tensor,
    ids_TK: Tensor,
    softmax: bool,
    renormalize: bool,
    scale: float,
) -> Tensor:
    """The gradient in the logits."""
    (T, E), dlogits_TE = logits_TE.shape, torch.empty_like(logits_TE)
    constants = launch_backward(E, ids_TK.shape[1], softmax, renormalize)
    if T:
        router_topk_backward_kernel[(cdiv(T, constants["ROWS"]),)](
            logits_TE, ids_TK, dweights_TK, dscores_TE, dlogits_TE, T, scale, **constants
        )
    return dlogits_TE


@router_topk_backward.register_fake
def _(dweights_TK: Tensor, dscores_TE: Tensor | None, logits_TE: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(logits_TE)
