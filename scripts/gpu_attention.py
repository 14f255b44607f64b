"""Attention for ``gpu_check.py``: the kernels that know documents, checked against ``math`` in float64, and timed.

They are moetrain's (``moetrain.model.attention``), so that it must be importable (``gpu_train.py``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from gpu_times import normal, pass_times
from torch import Tensor


class Heads(NamedTuple):
    """H query heads of width d over G of keys, and of values of width v; a window or None."""

    name: str
    H: int
    G: int
    d: int
    v: int
    window: int | None


CASES = [
    Heads("grouped", 8, 2, 64, 64, None),
    Heads("window", 4, 4, 128, 128, 50),
    Heads("latent", 4, 4, 192, 128, None),
]
TIMED = Heads("OLMoE", 16, 16, 128, 128, None)
LENGTHS = (1, 63, 200, 1, 17, 230)  # of the documents of a sequence


def documents(device: str, batch: int, lengths: tuple[int, ...]) -> Tensor:
    """document_BN: every sequence has these, each beginning with another."""
    rows = [lengths[i % len(lengths) :] + lengths[: i % len(lengths)] for i in range(batch)]
    numbers = [[i for i, n in enumerate(row) for _ in range(n)] for row in rows]
    return torch.tensor(numbers, device=device)


def heads(device: str, h: Heads, batch: int, seq_len: int) -> list[Tensor]:
    """Queries, keys and values: one draw, so that none of them is another."""
    shapes = ((h.H, h.d), (h.G, h.d), (h.G, h.v))
    parts = normal(device, batch, seq_len, sum(n * width for n, width in shapes)).split([n * w for n, w in shapes], -1)
    return [part.unflatten(-1, shape).contiguous() for part, shape in zip(parts, shapes, strict=True)]


def run(tensors: list[Tensor], dtype: torch.dtype, call: Callable[..., Tensor]) -> dict[str, Tensor]:
    """The output and every gradient, in float64."""
    leaves = [t.bfloat16().to(dtype).requires_grad_() for t in tensors]
    out = call(*leaves)
    upstream = torch.arange(1.0, out.numel() + 1, device=out.device, dtype=torch.float64).cos().view_as(out).to(dtype)
    found = (out.detach(), *torch.autograd.grad(out, leaves, upstream))
    return {name: t.double() for name, t in zip(("out", "q", "k", "v"), found, strict=True)}


def backends(device: str, h: Heads) -> dict[str, str | None]:
    """Why each of moetrain's kernels cannot run on these; None where it can."""
    from moetrain.config.errors import ConfigError
    from moetrain.model.attention.kernels import choose
    from moetrain.model.attention.packed import Setting

    found: dict[str, str | None] = {"sdpa": None}
    for name in ("flash", "flex"):
        try:
            choose(name, Setting(torch.device(device), torch.bfloat16, h.d, h.v, False, False, False))
            found[name] = None
        except ConfigError as error:
            found[name] = str(error)
    return found


def check_attention(
    device: str, check: Callable[[str, float, Callable[[], float]], dict[str, Any]], worst: Callable[..., float]
) -> list[dict[str, Any]]:
    """A row for each case and kernel. Sequences of documents, two of one token."""
    from moetrain.model.attention.kernels import Rule, attend
    from moetrain.model.places import Places

    rows = []
    for h in CASES:
        tensors = heads(device, h, 3, sum(LENGTHS))

        def call(*qkv: Tensor, backend: str, h: Heads = h) -> Tensor:
            places = Places(sum(LENGTHS), None, documents(device, 3, LENGTHS), torch.device(device))
            return attend(*qkv, places, Rule(h.d**-0.5, h.window, backend=backend))  # type: ignore[arg-type]

        want = run(tensors, torch.float64, functools.partial(call, backend="math"))
        for name, why in backends(device, h).items():
            if why is None:
                got = functools.partial(run, tensors, torch.bfloat16, functools.partial(call, backend=name))
                rows.append(check(f"attention {h.name}, {name}", 2e-2, lambda got=got, want=want: worst(got(), want)))
            else:
                print(f"attention {h.name}: {why}", flush=True)
    return rows


def time_attention(device: str, tiny: bool) -> list[dict[str, Any]]:
    """Forward and backward of OLMoE's attention over sequences of documents, for each kernel that runs here."""
    from moetrain.model.attention.kernels import Rule, attend
    from moetrain.model.places import Places

    lengths, batch = (LENGTHS, 1) if tiny else ((1500, 200, 1, 700, 1100, 395, 200), 4)
    h, seq_len, rows = TIMED, sum(lengths), []
    leaves = [t.bfloat16().requires_grad_() for t in heads(device, h, batch, seq_len)]
    places = Places(seq_len, None, documents(device, batch, lengths), torch.device(device))
    print(f"\nattention, {batch} sequences of {seq_len} tokens in {len(lengths)} documents, {h}", flush=True)
    for name, why in backends(device, h).items():
        if why is None:
            forward = functools.partial(attend, *leaves, places, Rule(h.d**-0.5, backend=name))  # type: ignore[arg-type]
            took = pass_times(forward, leaves, device)
            rows.append({"backend": name, "tokens": batch * seq_len, "seconds": took})
            print(f"  {name:6} forward {took[0] * 1e3:8.3f} ms  backward {took[1] * 1e3:8.3f} ms", flush=True)
    return rows
