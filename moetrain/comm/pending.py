"""Collectives under way: started now, waited for later, with what is computed in between hidden behind them.

The gradient travels the same way. Autograd runs the nodes of a graph from the youngest to the oldest, so the backward
of what was computed between start and wait lies between the backward of the wait, which starts the way back, and that
of the start, which waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Flight:
    """A tensor that a collective is filling. ``wait`` returns it once it is whole.

    cargo: what must live until then.
    """

    def __init__(self, out: Tensor, wait: Callable[[], Any], cargo: Tensor) -> None:
        self._out, self._wait, self._cargo = out, wait, cargo

    def wait(self) -> Tensor:
        """The tensor, whole."""
        self._wait()
        return self._out


# Starts a collective on a tensor.
Launch = Callable[[Tensor], Flight]


class Pending:
    """What ``start`` began, or a tensor that is there already. ``wait`` must be called once, on every rank."""

    def __init__(self, wait: Callable[[], Tensor]) -> None:
        self._wait = wait

    def wait(self) -> Tensor:
        """The result, with gradient."""
        return self._wait()

    def then(self, work: Callable[[Tensor], Tensor]) -> Pending:
        """The same with ``work`` done on the result once it is there."""
        return Pending(lambda: work(self._wait()))


def done(x: Tensor) -> Pending:
    """x, with nothing to wait for."""
    return Pending(lambda: x)


def start(x: Tensor, there: Launch, back: Launch) -> Pending:
    """Begin ``there(x)``. back: the transposed collective, which brings a gradient of its result to one of x."""
    journey = _Journey(there, back)
    token = _Start.apply(x, journey)
    return Pending(lambda: _Wait.apply(token, journey))


class _Journey:
    """What the two nodes of one collective share. ``flight``: the one under way, in either direction."""

    def __init__(self, there: Launch, back: Launch) -> None:
        self.there, self.back = there, back
        self.flight: Flight | None = None

    def land(self) -> Tensor:
        flight, self.flight = self.flight, None
        assert flight is not None
        return flight.wait()


class _Start(torch.autograd.Function):
    """Its output is an empty tensor that ties the nodes together: nobody must touch the real one before the wait."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        journey.flight = journey.there(x)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.journey.land(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        return journey.land()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.journey.flight = ctx.journey.back(grads[0])
        return grads[0].new_empty(0), None
