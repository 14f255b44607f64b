"""One hop of tokens between ranks: each goes once to every rank that it has business with, and its list of experts too.

Copies of a token for several experts behind the same rank are made there, and their outputs are summed there: a token
crosses once, and one sum comes back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.comm import Group, Pending, all_to_all, start_all_to_all
from moetrain.moe.permute import RowOrder, count, gather_rows, inverse, order_by_expert, permute, sum_rows


@dataclass(frozen=True)
class Hop:
    """order: the copies that leave, by destination ("expert"), and within one in order of token.

    send, receive: copies to and from each rank of the group. send_A, receive_A: assignments.
    by_copy_A: assignments in order of the copies that they go with; by_token_A is its inverse.
    """

    order: RowOrder
    send: list[int]
    receive: list[int]
    send_A: list[int]
    receive_A: list[int]
    by_copy_A: Tensor
    by_token_A: Tensor


def plan_hop(
    token_A: Tensor, expert_A: Tensor, to_A: Tensor, n_tokens: int, group: Group
) -> tuple[Hop, Tensor, Tensor, int]:
    """The hop of ``n_tokens`` tokens, and what arrives by it: (hop, token_B, expert_B, number of tokens).

    token_A ascends, and so does token_B. to_A: the rank of the group to which the assignment goes. Two exchanges of
    integers: the counts, then which arriving copy each assignment belongs to.
    """
    n = 1 if group is None else group.size()
    copy_C, copy_A = torch.unique(token_A * n + to_A, return_inverse=True)
    to_C = copy_C % n
    order = order_by_expert(copy_C // n, to_C, n_tokens)
    place_A = order.row_A.index_select(0, copy_A)
    by_copy_A = place_A.argsort(stable=True)
    mine_n2 = torch.stack([count(to_C, n), count(to_A, n)], dim=1)
    theirs_n2 = all_to_all(mine_n2, [1] * n, [1] * n, group)
    # One transfer to the host for both.
    (send, send_A), (receive, receive_A) = torch.stack([mine_n2, theirs_n2]).transpose(1, 2).tolist()
    # Numbered within what goes to one rank; the receiver adds what came from ranks before.
    place_A = place_A - _starts(mine_n2[:, 0]).index_select(0, to_A)
    mine_A2 = torch.stack([place_A, expert_A], dim=1).index_select(0, by_copy_A)
    token_B, expert_B = all_to_all(mine_A2, receive_A, send_A, group).t().contiguous()
    token_B = token_B + _starts(theirs_n2[:, 0]).repeat_interleave(theirs_n2[:, 1], output_size=len(token_B))
    hop = Hop(order, send, receive, send_A, receive_A, by_copy_A, inverse(by_copy_A))
    return hop, token_B, expert_B, sum(receive)


def there(x_TD: Tensor, weight_A: Tensor, hop: Hop, group: Group) -> tuple[Tensor, Tensor]:
    """The tokens and weights that arrive, in the order of ``plan_hop``."""
    weight_A = permute(weight_A, hop.by_copy_A, hop.by_token_A)
    return (
        all_to_all(gather_rows(x_TD, hop.order), hop.receive, hop.send, group),
        all_to_all(weight_A, hop.receive_A, hop.send_A, group),
    )


def start_back(y_ND: Tensor, hop: Hop, group: Group) -> Pending:
    """What became of the tokens that had arrived, on its way back: for each token a sum over where it had gone."""
    return start_all_to_all(y_ND, hop.send, hop.receive, group).then(lambda y_CD: sum_rows(y_CD, hop.order))


def _starts(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts
