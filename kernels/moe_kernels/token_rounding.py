"""Token rounding: experts' row counts made multiples of the kernels' tile, so that no tile is computed in part."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDINGS = ("nearest", "random", "score", "balanced", "up", "down")


def round_tokens(
    scores_TE: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    tile: int = 128,
    rounding: str = "nearest",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(token_A, expert_A, weight_A): the assignments of a top-k routing after token rounding (arXiv 2512.14080).

    An expert's n tokens become the multiple of ``tile`` below n, its worst scored being dropped, or the one above n,
    the best scored of the others being added with their scores as weights. It does not go up past T.
    Assignments are in ascending order of token, then expert; counts differ from top-k's by less than a tile.

    scores_TE: (T, E), from 0 to 1. ids_TK, weights_TK: (T, K), the chosen experts, and their weights from 0 to 1.
    rounding, by the paper's names: "nearest" (NR-f; half a tile is dropped), "random" (SR-f: up with the probability of
        the part of a tile that is filled), "score" (NR-s: the same with sums of scores instead of counts), "balanced"
        (Balance-f: in order of expert, whichever keeps the total nearest to top-k's), "up", "down".
    generator: draws for "random" and "score". Differentiable in scores and weights.

    Raises:
        ValueError: no such rounding; tile is less than 1.
    """
    if rounding not in ROUNDINGS or tile < 1:
        raise ValueError(
            f"rounding is one of {', '.join(ROUNDINGS)}, and a tile 1 row or more, not {rounding} and {tile}"
        )
    T, E = scores_TE.shape
    chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(1, ids_TK, True)
    weight_TE = scores_TE.scatter(1, ids_TK, weights_TK.to(scores_TE.dtype))
    # Chosen ones come first in an expert's order, best first, then the others.
    order_TE = torch.where(chosen_TE, weight_TE, weight_TE - 1).detach().argsort(dim=0, descending=True, stable=True)
    count_E = chosen_TE.sum(0)
    floor_E = count_E // tile * tile
    ceil_E = -(-count_E // tile) * tile
    if rounding == "nearest":
        up_E = ceil_E - count_E < count_E - floor_E
    elif rounding == "random":
        up_E = _draw((count_E - floor_E) / tile, generator)
    elif rounding == "score":
        sum_TE = torch.cat([scores_TE.new_zeros(1, E), weight_TE.detach().gather(0, order_TE).cumsum(0)])
        below, at, above = (sum_TE.gather(0, n[None].clamp(max=T))[0] for n in (floor_E, count_E, ceil_E))
        up_E = _draw(((at - below) / (above - below)).nan_to_num(0.0), generator)
    elif rounding == "balanced":
        up_E = _balance(count_E.tolist(), tile).to(count_E.device)
    else:
        up_E = torch.full_like(count_E, rounding == "up", dtype=torch.bool)
    keep_E = torch.where(up_E & (ceil_E <= T), ceil_E, floor_E)
    place_TE = torch.empty_like(order_TE).scatter_(
        0, order_TE, torch.arange(T, device=order_TE.device)[:, None].expand(T, E)
    )
    token_A, expert_A = (place_TE < keep_E).nonzero(as_tuple=True)
    return token_A, expert_A, weight_TE[token_A, expert_A]


def _draw(probability_E: Tensor, generator: torch.Generator | None) -> Tensor:
    uniform_E = torch.rand(probability_E.shape, generator=generator, device=probability_E.device)
    return uniform_E < probability_E


def _balance(counts: list[int], tile: int) -> Tensor:
    """Whether each expert goes up: the choice that leaves the smaller sum of all deviations so far."""
    up, total = [], 0
    for n in counts:
        down_by = n % tile
        up.append(down_by > 0 and abs(total + tile - down_by) < abs(total - down_by))
        total += tile - down_by if up[-1] else -down_by
    return torch.tensor(up, dtype=torch.bool)
