"""What torch.compile does not see into. Importing the compiler takes as long as importing torch, so the decorators of
``torch.compiler``, which import it, are not for functions that others call too."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(fn: Callable[P, R]) -> Callable[P, R]:
    """``torch.compiler.disable``, once something has imported the compiler; nothing can be compiled before."""
    disabled: Callable[P, R] | None = None

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:
                return fn(*args, **kwargs)
            disabled = torch.compiler.disable(fn)
        return disabled(*args, **kwargs)

    return call


def constant(fn: Callable[P, R]) -> Callable[P, R]:
    """``torch.compiler.assume_constant_result``, which sets this mark."""
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn
