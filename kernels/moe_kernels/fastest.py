"""The backend "fastest": whichever took the least time when all that can run were tried on the first rows of a kind."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moe_kernels.operands import Operands, Setting

log = logging.getLogger("moe_kernels")
REPEATS = 3

# (setting, experts, rows up to, whether a token's rows are summed) -> name. Of this process; nothing is kept on disk.
_taken: dict[tuple[Setting, int, int, bool], str] = {}


def fastest(o: Operands, paths: Mapping[str, Callable[[Operands], Tensor]]) -> str:
    """The name of the path that is fastest, forward and backward together, on operands like these.

    Alike are operands on one device, with equal dtype, widths, activation and number of experts, whose rows lie between
    the same two powers of two. The first of a kind are run through every path, ``REPEATS`` times after one to warm up;
    medians are compared, and one line of the log tells them. A path that raises is out.

    Another process may take another path, and so may the next run: results then agree up to rounding, not bit by bit.
    """
    rows = len(o.x_ND if o.index_R is None else o.index_R)
    if rows == 0:
        return next(iter(paths))
    upto = 1 << (rows - 1).bit_length()
    key = (o.setting, len(o.w13), upto, o.row_TK is not None)
    if key not in _taken:
        seconds, told = {}, []
        for name, path in paths.items():
            try:
                seconds[name] = _seconds(o, path)
                told.append(f"{name} {1e3 * seconds[name]:.3g} ms")
            except Exception as error:  # a package's kernel may raise anything
                told.append(f"{name} failed ({(str(error).splitlines() or [type(error).__name__])[0]})")
        if not seconds:
            raise RuntimeError(f"no expert backend could run: {', '.join(told)}")
        _taken[key] = min(seconds, key=lambda name: seconds[name])
        shape = f"{len(o.w13)} of width {o.setting.expert_dim}, up to {upto} rows"
        log.info("experts: %s: %s: %s", shape, ", ".join(told), _taken[key])
    return _taken[key]


def _seconds(o: Operands, path: Callable[[Operands], Tensor]) -> float:
    times = []
    for _ in range(REPEATS + 1):
        leaves = {name: t.detach() for name, t in o._asdict().items() if isinstance(t, Tensor)}
        floats = [t.requires_grad_() for t in leaves.values() if t.is_floating_point()]
        # No hooks of checkpointing or offloading, in whose middle this may be called.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            began = _now(o.x_ND.device)
            y = path(o._replace(**leaves))  # type: ignore[arg-type]
            torch.autograd.grad(y, floats, torch.ones_like(y), allow_unused=True)
            times.append(_now(o.x_ND.device) - began)
    return statistics.median(times[1:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
