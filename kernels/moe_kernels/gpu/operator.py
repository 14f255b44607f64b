"""Functions that launch kernels, as operators of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


class Operator:
    """An operator ``moe_kernels::name`` to torch.compile, to dispatch modes and for tensors without data; else the
    function itself, since the way through torch.library takes a third of Python's time for a small kernel's launch.

    Called inside autograd functions, with positional arguments, the first of them a tensor.
    """

    def __init__(self, name: str, fn: Callable[..., Any], mutates: tuple[str, ...] = ()) -> None:
        self.fn = fn
        self.op = torch.library.custom_op(f"moe_kernels::{name}", fn, mutates_args=mutates)
        self.register_fake = self.op.register_fake

    def __call__(self, *args: Any) -> Any:
        first = args[0]
        if torch.compiler.is_compiling() or first.is_meta or is_in_torch_dispatch_mode():
            return self.op(*args)
        if first.is_cuda and first.get_device() != torch.cuda.current_device():  # to which triton launches
            with torch.cuda.device(first.get_device()):
                return self.fn(*args)
        return self.fn(*args)


def operator(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Operator]:
    """Make a function an ``Operator``. mutates: the arguments that it writes to."""
    return lambda fn: Operator(name, fn, mutates)
