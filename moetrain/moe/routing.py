"""The values that pass between router, dispatcher, experts and blocks.

Shapes, one letter a dimension: T tokens on this rank, S sequence length, E routed experts, e local experts, K experts
per token, D model width, R routed rows (token copies) held by this rank, A auxiliary loss terms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

V = TypeVar("V")


class Memo:
    """What a block decides once per token and step, so that recomputing the block repeats no decision.

    One fresh memo is made per block call (so per micro-batch) and passed as an argument of the checkpointed function;
    activation checkpointing hands the same object to the recomputation. Holds nothing that needs a gradient.
    """

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    def once(self, name: str, make: Callable[[], V]) -> V:
        """The value of ``make()`` from the first time that ``name`` was asked for."""
        if name not in self._values:
            self._values[name] = make()
        return self._values[name]

    def known(self, name: str) -> Any:
        """What ``once`` keeps under ``name``, or None if nothing has asked for it yet."""
        return self._values.get(name)


class Carry(NamedTuple):
    """What one block hands to the next besides the residual stream: a flat tuple of tensors, static in shape.

    aux_A: float, the running sums of the auxiliary loss terms over this rank's tokens and the layers so far, in the
        order of ``Decoder.aux_names``. Term a adds ``coefficient_a * sum over ranks of aux_A[a] / N`` to the loss, with
        N the tokens of the global batch: one normaliser for every term, whatever the mapping.
    state: tensors that a router or block kind declares (previous router logits, recurrent state ...), each (T, ...).
    """

    aux_A: Tensor
    state: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Routing:
    """Which token goes to which expert, with what weight: a list of assignments; top-k is the dense special case.

    Dense: ``ids_TK`` int64 and ``weights_TK`` float; ``token_A`` and the others are None.
    List:  ``token_A``, ``expert_A`` int64 and ``weight_A`` float, in ascending order of token (expert choice, dropping,
           a varying number of experts per token).
    Ids run from 0 to ``n_experts`` - 1; ids from there upward are free experts, which no dispatcher sees.
    n_tokens: T, which the list form alone does not tell.
    memo: the block's memo; the dispatcher keeps its layout there, so that recomputation reuses it.
    layer, step, training: the decoder layer, and as in TokenContext; for dispatchers that draw numbers or count.
    """

    n_experts: int
    n_tokens: int
    memo: Memo
    ids_TK: Tensor | None = None
    weights_TK: Tensor | None = None
    token_A: Tensor | None = None
    expert_A: Tensor | None = None
    weight_A: Tensor | None = None
    layer: int = 0
    step: int = 0
    training: bool = True

    def assignments(self) -> tuple[Tensor, Tensor, Tensor]:
        """(token_A, expert_A, weight_A) of either form."""
        if self.ids_TK is None:
            assert self.token_A is not None and self.expert_A is not None and self.weight_A is not None
            return self.token_A, self.expert_A, self.weight_A
        assert self.weights_TK is not None
        T, K = self.ids_TK.shape
        token_A = torch.arange(T, device=self.ids_TK.device).repeat_interleave(K)
        return token_A, self.ids_TK.reshape(-1), self.weights_TK.reshape(-1)

    def flat_weights(self) -> Tensor:
        """weight_A of either form."""
        weights = self.weight_A if self.weights_TK is None else self.weights_TK
        assert weights is not None
        return weights.reshape(-1)


class Rows(NamedTuple):
    """What an expert computation gets: the rows of each local expert, one expert after the other.

    A tuple, because FSDP finds a module's input tensors in tuples and not in other classes.

    Row r is ``x_ND[index_R[r]]``, so kernels can fuse the gather; ``index_R`` None means ``x_ND`` is already in order.
    counts: rows of each local expert: a plain list of ints, length e, or int64 (e,) on a GPU that nothing has waited
        for. They sum to R; zeros are legal.
    weight_R: the routing weight that multiplies the row's output, or None where combine applies the weights.
    row_NK: int64 (N, K): the rows of each token, where all have equally many and the experts are to give y_ND, their
        sums: no gradient of every row is then written. None: they give y_RD.
    """

    x_ND: Tensor
    counts: list[int] | Tensor
    index_R: Tensor | None = None
    weight_R: Tensor | None = None
    row_NK: Tensor | None = None


@dataclass(frozen=True)
class TokenContext:
    """What a layer may know about its tokens: T = B*S rows, sequence by sequence.

    seq_len: S, so that sequence-wise losses can find the sequences.
    step: optimizer step (0-based), for scheduled numbers and seeded noise.
    training: loads are counted and noise is drawn only while training.
    memo: the block call's memo.
    """

    seq_len: int
    step: int = 0
    training: bool = True
    memo: Memo = field(default_factory=Memo)
