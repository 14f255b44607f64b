"""Tokens that are where their experts are, each once, with a list of who goes to whom: what most dispatchers end in.

Where an expert's matrices are split over ranks (expert tensor parallel, etp), these ranks hold different tokens, and
each of them computes a part of every output. So they gather each other's tokens before the experts, and sum the parts
afterwards, each for its own tokens. Without such ranks nothing is sent, and nothing copied either: the kernels get the
order of the rows instead of the rows, and the weights beside it, to be fused there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.comm import Group, Pending, all_gather_ints, all_gather_v, start_reduce_scatter_v
from moetrain.moe.permute import RowOrder, count_sorted, order_by_expert, permute, sum_rows
from moetrain.moe.routing import Rows


@dataclass(frozen=True)
class Held:
    """tokens, assignments: how many each etp rank brings. N, A: their sums.

    order: the A rows by expert; its N tokens are numbered over the etp ranks. counts: rows of each local expert, see
    ``Rows``. top_k: how many rows each token has, or None where that differs.
    """

    tokens: list[int]
    assignments: list[int]
    order: RowOrder
    counts: list[int] | Tensor
    top_k: int | None


def hold(
    token_A: Tensor, expert_A: Tensor, n_tokens: int, n_experts: int, etp_group: Group, top_k: int | None = None
) -> Held:
    """The layout of this rank's ``n_tokens`` tokens. token_A ascends; expert_A: local experts, of ``n_experts``; top_k:
    as in ``Held``. Waits for the GPU only where etp ranks exchange."""
    sizes = all_gather_ints([n_tokens, len(token_A)], etp_group, token_A.device)
    tokens, assignments = ([size[i] for size in sizes] for i in (0, 1))
    if etp_group is not None:
        pair_A2 = torch.stack([token_A + sum(tokens[: etp_group.rank()]), expert_A], dim=1)
        token_A, expert_A = all_gather_v(pair_A2, assignments, etp_group).t().contiguous()
    order = order_by_expert(token_A, expert_A, sum(tokens))
    counts_e = count_sorted(expert_A.index_select(0, order.assignment_R), n_experts)
    counts = counts_e.tolist() if counts_e.device.type == "cpu" else counts_e
    return Held(tokens, assignments, order, counts, top_k)


def gather(x_TD: Tensor, weight_A: Tensor, held: Held, etp_group: Group) -> tuple[Tensor, Tensor]:
    """The tokens and weights of all etp ranks: (x_ND, weight_A)."""
    return all_gather_v(x_TD, held.tokens, etp_group), all_gather_v(weight_A, held.assignments, etp_group)


def rows(x_ND: Tensor, weight_A: Tensor, held: Held) -> Rows:
    """What the experts get; they apply the weights, and where tokens have equally many rows they add these up."""
    order = held.order
    weight_R = permute(weight_A, order.assignment_R, order.row_A)
    row_NK = None if held.top_k is None else order.row_A.view(-1, held.top_k)
    return Rows(x_ND, held.counts, index_R=order.token_R, weight_R=weight_R, row_NK=row_NK)


def sum_per_token(y: Tensor, held: Held) -> Tensor:
    """y_ND: each token's rows summed, here or by the experts already."""
    return sum_rows(y, held.order) if held.top_k is None else y


def start_scatter(y_ND: Tensor, held: Held, etp_group: Group) -> Pending:
    """The way back of ``gather``: y_TD, this rank's tokens, summed over the etp ranks."""
    return start_reduce_scatter_v(y_ND, held.tokens, etp_group)
