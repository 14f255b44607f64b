"""Routers fitted to what a dense layer does: a token is to get the experts that come nearest to it.

After the prior-approximate router of FactorLLM (arXiv 2408.11855), where the experts are those that are nearest to the
top_k-th part of E of the dense output. That prefers experts that put out little; nearest to all of it did better here
(docs/lab-notebook.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.config.errors import ConfigError
from moetrain.moe.mlp import MLP
from moetrain.upcycle.method import Context, Model
from moetrain.upcycle.watch import layer_inputs

CHUNK = 512  # tokens at a time
STRETCHES, HELD_OUT = 64, 8  # the text in so many stretches, of which one in so many tells how good a fit is


@dataclass(frozen=True)
class Parts:
    """How a dense layer is cut. members_EF: inner dimensions of each expert; shared_F: those of the shared expert."""

    members_EF: Tensor
    shared_F: Tensor


@dataclass(frozen=True)
class Fits:
    """rows: router rows (E, D) of each layer, float32. picked: share of the wanted experts that are picked on text that
    the fit has not seen, mean over layers: by the fitted rows, by mean keys, and by chance."""

    rows: dict[int, Tensor]
    picked: dict[str, float]


def check_text(context: Context) -> None:
    """Raise ConfigError where there is not enough text for ``fit_routers``, or none."""
    N = context.ids().numel()
    if N < STRETCHES:
        raise ConfigError(
            f"routers are fitted to {STRETCHES} tokens of text or more, and there are {N}; give more text"
        )


def fit_routers(parent: Model, context: Context, parts: Callable[[int], Parts | None], top_k: int) -> Fits:
    """Fit the routers of the layers for which ``parts`` says how they are cut, one after the other, on the text."""
    N = context.ids().numel()
    held_N = torch.arange(N) * STRETCHES // N % HELD_OUT == HELD_OUT - 1
    rows, fitted, by_keys, chance = {}, [], [], []
    for layer, mlp, x_ND in layer_inputs(parent, context):
        cut = parts(layer)
        if cut is None:
            continue
        wanted_NK = wanted_experts(mlp, x_ND, cut, top_k)
        rows[layer] = fit_rows(x_ND[~held_N], wanted_NK[~held_N], len(cut.members_EF))
        keys_FD = (mlp.w_up if mlp.w_gate is None else mlp.w_gate).weight.detach()
        keys_ED = keys_FD[cut.members_EF].mean(1)
        fitted.append(picked(rows[layer], x_ND[held_N], wanted_NK[held_N]))
        by_keys.append(picked(keys_ED, x_ND[held_N], wanted_NK[held_N]))
        chance.append(top_k / len(cut.members_EF))
    means = (sum(shares) / len(shares) for shares in (fitted, by_keys, chance))
    return Fits(rows, dict(zip(("wanted_by_fit", "wanted_by_keys", "wanted_by_chance"), means, strict=True)))


@torch.no_grad()
def wanted_experts(mlp: MLP, x_ND: Tensor, parts: Parts, top_k: int) -> Tensor:
    """The experts of each token (N, top_k) whose own outputs are nearest, by squared distance, to what ``mlp`` adds to
    the shared part."""
    down_DF = mlp.w_down.weight
    found = []
    for x in x_ND.split(CHUNK):
        h = mlp.inner(x)
        target = mlp.w_down(h) - h[:, parts.shared_F] @ down_DF[:, parts.shared_F].T
        away = [(h[:, mine] @ down_DF[:, mine].T - target).square().sum(1) for mine in parts.members_EF]
        found.append(torch.stack(away, 1).topk(top_k, largest=False).indices)
    return torch.cat(found)


def fit_rows(x_ND: Tensor, wanted_NK: Tensor, n_experts: int) -> Tensor:
    """Rows (E, D) of the linear router that gives the wanted experts of each token the most probability.

    The least cross-entropy of softmax(x W^T) to equal shares for the wanted experts, by L-BFGS in float64: convex. The
    prior on W is normal and makes logits of order 1, which matters where there are few tokens for so many numbers.
    """
    x_ND = x_ND.to(torch.float64)
    x_ND = x_ND / x_ND.square().mean().sqrt().clamp(min=1e-12)
    N, D = x_ND.shape
    share_NE = torch.zeros(N, n_experts, dtype=torch.float64).scatter_(1, wanted_NK, 1 / wanted_NK.shape[1])
    with torch.enable_grad():
        rows_ED = torch.zeros(n_experts, D, dtype=torch.float64, requires_grad=True)
        search = torch.optim.LBFGS([rows_ED], max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            search.zero_grad()
            loss = F.cross_entropy(x_ND @ rows_ED.T, share_NE) + rows_ED.square().sum() * (D / (2 * N))
            loss.backward()
            return loss

        search.step(closure)  # type: ignore[arg-type]
    return rows_ED.detach().float()


def picked(rows_ED: Tensor, x_ND: Tensor, wanted_NK: Tensor) -> float:
    """Share of the wanted experts among those that a router with these rows picks."""
    chosen_NK = (x_ND @ rows_ED.T).topk(wanted_NK.shape[1]).indices
    return float((chosen_NK[:, :, None] == wanted_NK[:, None, :]).any(1).double().mean())
