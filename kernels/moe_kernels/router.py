"""The choice of experts: scores, the best k, their weights and the experts' loads, in one operation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels.choice import takes_triton

# Keeps the sum of sigmoid scores that all underflow from dividing by zero (DeepSeek-V3's own guard).
TINY = 1e-20


class Choice(NamedTuple):
    """weights_TK: float32 or wider, with gradient. ids_TK: int64, best first. counts_E: int64, how often each expert
    was chosen. scores_TE: of all experts, with gradient, as weights; None unless asked for."""

    weights_TK: Tensor
    ids_TK: Tensor
    counts_E: Tensor
    scores_TE: Tensor | None


class _Rule(NamedTuple):
    k: int
    softmax: bool
    groups: int
    top_groups: int
    top2: bool
    renormalize: bool
    scale: float
    with_scores: bool


def router_topk(
    logits_TE: Tensor,
    k: int,
    *,
    score: str = "softmax",
    bias_E: Tensor | None = None,
    groups: int = 1,
    top_groups: int | None = None,
    group_score: str = "top2_sum",
    renormalize: bool = True,
    scale: float = 1.0,
    with_scores: bool = False,
    ids_TK: Tensor | None = None,
    backend: str = "auto",
) -> Choice:
    """The k experts of each token with the best scores, and their weights: the scores, over their sum if
    ``renormalize``, times ``scale``. In float32, or wider if logits are.

    logits_TE: (T, E). score: "softmax" or "sigmoid". bias_E: added to the scores for choosing only (arXiv 2408.15664).
    groups, top_groups: experts are taken from the best ``top_groups`` (None: all) of so many equal groups; a group's
        score, biased, is its best expert's, "max" (DeepSeek-V2), or the sum of its best two, "top2_sum" (DeepSeek-V3).
    with_scores: return all scores as well; for auxiliary losses. ids_TK: what was chosen before, int64, for a layer
        that is computed again; nothing is chosen then. backend: one of ``OP_BACKENDS``.

    Of equal scores the lower id is chosen, of equal groups the lower one. NaN counts as more than all numbers: a row
    with a NaN gets ids 0 to k - 1 by softmax, and NaN weights. Deterministic. Differentiable once in the logits, by way
    of weights and scores; with s' the gradient of the scores, softmax: s (s' - sum(s s')), sigmoid: s (1 - s) s'.

    Raises:
        ValueError: shapes or settings do not fit; the backend is unknown or cannot run here.
    """
    top_groups = groups if top_groups is None else top_groups
    _check(logits_TE, k, score, bias_E, groups, top_groups, group_score)
    if ids_TK is not None and ids_TK.shape != (len(logits_TE), k):
        raise ValueError(f"ids_TK has shape {tuple(ids_TK.shape)}; it is (T, k), ({len(logits_TE)}, {k})")
    rule = _Rule(
        k, score == "softmax", groups, top_groups, group_score == "top2_sum", renormalize, float(scale), with_scores
    )
    if takes_triton("router_topk", backend, logits_TE, bias_E, ids_TK):
        bias_E = None if bias_E is None else bias_E.contiguous()
        weights_TK, ids_TK, counts_E, scores_TE = _TritonTopK.apply(logits_TE.contiguous(), bias_E, ids_TK, rule)
        return Choice(weights_TK, ids_TK, counts_E, scores_TE if with_scores else None)
    return _torch(logits_TE, bias_E, ids_TK, rule)


def _torch(logits_TE: Tensor, bias_E: Tensor | None, ids_TK: Tensor | None, rule: _Rule) -> Choice:
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    scores_TE = logits_TE.softmax(dim=-1) if rule.softmax else logits_TE.sigmoid()
    with torch.no_grad():
        ids_TK = _choose(scores_TE, bias_E, rule) if ids_TK is None else ids_TK
        counts_E = ids_TK.new_zeros(logits_TE.shape[1])
        counts_E.scatter_add_(0, ids_TK.flatten(), torch.ones_like(ids_TK).flatten())
    weights_TK = scores_TE.gather(1, ids_TK)
    if rule.renormalize:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + TINY)
    if rule.scale != 1:
        weights_TK = weights_TK * rule.scale
    return Choice(weights_TK, ids_TK, counts_E, scores_TE if rule.with_scores else None)


def _choose(scores_TE: Tensor, bias_E: Tensor | None, rule: _Rule) -> Tensor:
    """ids_TK, best first."""
    biased_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if rule.top_groups < rule.groups:
        biased_TE = _close_groups(biased_TE, rule)
    return _best(biased_TE, rule.k)


def _close_groups(biased_TE: Tensor, rule: _Rule) -> Tensor:
    """All but the best groups at -inf."""
    biased_TGe = biased_TE.unflatten(1, (rule.groups, -1))
    best_TG = biased_TGe.topk(2, dim=-1).values.sum(dim=-1) if rule.top2 else biased_TGe.amax(dim=-1)
    closed_TG = torch.ones_like(best_TG, dtype=torch.bool).scatter_(1, _best(best_TG, rule.top_groups), False)
    return biased_TGe.masked_fill(closed_TG.unsqueeze(-1), float("-inf")).flatten(1)


def _best(scores_TE: Tensor, k: int) -> Tensor:
    """The ids of the k best of each row, best first, of equal ones the lower id first, which topk does not promise."""
    if scores_TE.device.type != "cpu" or torch.compiler.is_compiling():  # where a look at the values would wait
        return scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    values, ids = scores_TE.topk(min(k + 1, scores_TE.shape[1]), dim=-1)
    ids, clear_T = ids[:, :k], (values[:, :-1] > values[:, 1:]).all(dim=-1)
    if not clear_T.all():
        ids[~clear_T] = scores_TE[~clear_T].sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return ids.contiguous()


class _TritonTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, bias_E: Tensor | None, known_TK: Tensor | None, rule: _Rule
    ) -> tuple[Tensor, ...]:
        from moe_kernels.gpu.router import router_topk_forward  # needs triton

        if known_TK is None:
            weights_TK, ids_TK, counts_E, scores_TE = router_topk_forward(logits_TE, bias_E, *rule)
        else:  # backward keeps the same as the first time, and ids must be another tensor than what came in
            choice = _torch(logits_TE, bias_E, known_TK.clone(), rule)
            weights_TK, ids_TK, counts_E = choice[:3]
            scores_TE = logits_TE.new_empty(0) if choice.scores_TE is None else choice.scores_TE
        ctx.save_for_backward(logits_TE, ids_TK)
        ctx.rule = rule
        ctx.mark_non_differentiable(ids_TK, counts_E)
        return weights_TK, ids_TK, counts_E, scores_TE

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        from moe_kernels.gpu.router import router_topk_backward

        rule: _Rule = ctx.rule
        dscores_TE = grads[3].contiguous() if rule.with_scores else None
        dweights_TK = grads[0].contiguous()
        dlogits_TE = router_topk_backward(
            dweights_TK, dscores_TE, *ctx.saved_tensors, rule.softmax, rule.renormalize, rule.scale
        )
        return dlogits_TE, None, None, None


def _check(
    logits_TE: Tensor, k: int, score: str, bias_E: Tensor | None, groups: int, top_groups: int, group_score: str
) -> None:
    if logits_TE.dim() != 2 or not 1 <= k <= logits_TE.shape[1]:
        raise ValueError(f"logits are (T, E), and k from 1 to E, not {tuple(logits_TE.shape)} and {k}")
    E = logits_TE.shape[1]
    if bias_E is not None and bias_E.shape != (E,):
        raise ValueError(f"bias_E has shape {tuple(bias_E.shape)} where logits {tuple(logits_TE.shape)} need ({E},)")
    if score not in ("softmax", "sigmoid"):
        raise ValueError(f"score is softmax or sigmoid, not {score!r}")
    if group_score not in ("top2_sum", "max"):
        raise ValueError(f"group_score is top2_sum or max, not {group_score!r}")
    if groups < 1 or E % groups or not 1 <= top_groups <= groups:
        raise ValueError(f"groups={groups} must divide {E} experts, and top_groups={top_groups} be from 1 to groups")
    size = E // groups
    if k > top_groups * size:
        raise ValueError(f"{top_groups} groups of {size} experts cannot give k={k}; raise top_groups")
    if top_groups < groups and group_score == "top2_sum" and size < 2:
        raise ValueError(
            f"group_score top2_sum needs 2 experts or more in a group, not {size}; use max or fewer groups"
        )
