"""Gradients of weights that are computed apart from those of inputs, later: what zero-bubble pipelines fill their
bubbles with (arXiv 2401.10241)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

Work: TypeAlias = Callable[[], None]


class _State:
    """Of the process: on a GPU, backward runs in a thread of its own."""

    on = False
    waiting: list[Work] | None = None


@contextlib.contextmanager
def late_weight_gradients(waiting: list[Work] | None = None) -> Iterator[None]:
    """Around the forward and the backward passes of a model whose weights' gradients may come later.

    waiting: a backward pass within appends to it what adds the gradients of matrices in ``linear`` and in the experts
        of the paths "cpu" and "triton" (not in FP8) to their parameters; run each once, in any order, in this context
        or out of it. All other gradients are complete when backward ends. It keeps inputs of these products, and no
        weights. None: backward computes all, as ever.
    """
    before = _State.on, _State.waiting
    _State.on, _State.waiting = True, waiting
    try:
        yield
    finally:
        _State.on, _State.waiting = before


def may_be_late() -> bool:
    """Whether a forward pass must be made of functions whose backward can leave gradients for later."""
    return not torch.compiler.is_compiling() and _State.on


def is_late() -> bool:
    """Whether a backward pass leaves the gradients of weights for later."""
    return _State.waiting is not None


def room_for(w: Tensor) -> Callable[[], Tensor]:
    """Gives memory for the gradient of ``w``: allocated at once, or where the gradient comes later when called."""
    if _State.waiting is None:
        room = torch.empty_like(w, memory_format=torch.contiguous_format)
        return lambda: room
    return functools.partial(torch.empty, w.shape, dtype=w.dtype, device=w.device)


def now_or_later(ctx: Any, tensor: int, compute: Callable[[], Tensor]) -> Tensor | None:
    """In backward, the gradient of the ``tensor``-th of the function's inputs that are tensors: what ``compute``
    returns, or None where it comes later."""
    if _State.waiting is None:
        return compute()
    edge = GradientEdge(*ctx.next_functions[tensor])

    def add() -> None:
        with torch.no_grad():
            gradient = compute()
        torch.autograd.backward([edge], [gradient])

    _State.waiting.append(add)
    return None
