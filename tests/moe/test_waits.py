"""What would wait for a GPU. On meta tensors have no values, so what runs there has asked for none, nor for a size that
depends on them. Copies from the host's memory, which wait too, are an error here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moetrain.config.schema import ExpertsConfig
from moetrain.model.decoder import Decoder
from moetrain.moe.balance import aux_names
from moetrain.moe.build import build_moe_layer
from moetrain.moe.routing import Carry, TokenContext
from moetrain.parallel.context import _IndexOf
from moetrain.parallel.run import Inputs, local_inputs
from tests.moe.toys import config


class NoNumbers(TorchFunctionMode):
    """No tensor on the device is made of Python's numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.tensor, torch.as_tensor) or isinstance(args[0], Tensor), f"{func} waits"
        return func(*args, **(kwargs or {}))


class NoCopies(TorchDispatchMode):
    """All tensors of an operator are on one device, but for numbers. seen: the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        copies = name in ("_to_copy", "copy_")
        assert len({t.device.type for t in tensors if copies or t.dim()}) <= 1, f"{name} waits"
        self.seen.add(name)
        return out


@contextmanager
def no_waits() -> Iterator[set[str]]:
    with NoNumbers(), NoCopies() as copies:
        yield copies.seen


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("router", [{}, {"min_sum": 1e-12}, {"score": "sigmoid", "n_groups": 4, "topk_groups": 2}])
@pytest.mark.parametrize("scope", ["sequence", "step", "micro_batch"])
def test_a_layer_that_holds_all_its_experts_waits_for_nothing(
    router: dict[str, Any], recompute: bool, scope: str
) -> None:
    balance: dict[str, Any] = {"aux_loss": {"scope": scope}, "bias": {}, "z_loss": {}}
    with torch.device("meta"):
        cfg = config(16, router, expert_dim=16, shared_dim=8)
        layer: Any = build_moe_layer(cfg, 0, balance, ExpertsConfig(backend="grouped_mm")).bfloat16()
        x_TD = torch.empty(12, 16, dtype=torch.bfloat16, requires_grad=True)
        carry = Carry(torch.zeros(len(aux_names(balance))))
    layer.experts.recompute = recompute
    with no_waits() as seen:
        out_TD, carry = layer(x_TD, carry, TokenContext(seq_len=6))
        (out_TD.float().sum() + carry.aux_A.sum()).backward()
    assert {"sort", "_grouped_mm", "_embedding_bag"} <= seen
    assert x_TD.grad is not None and all(p.grad is not None for p in layer.parameters())


def test_only_the_first_of_many_micro_batches_waits_for_the_places_of_its_tokens() -> None:
    """With documents, and sequences that are split over context parallel ranks."""
    with torch.device("meta"):
        model = Decoder(config(16), {}, ExpertsConfig())
        ids_BN = torch.zeros(2, 8, dtype=torch.int64)
        x_BSD = torch.empty(2, 4, 16)
    model.index_of = _IndexOf(2, 0)
    for waits in (nullcontext(), no_waits()):
        with waits:
            tokens_BS, more = local_inputs(model, Inputs(ids_BN, ids_BN, ids_BN))
            places = model.places(x_BSD, more["seq_len"], more["document_BN"])
    assert tokens_BS.shape == (2, 4) == places.cos.shape[:2]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.tolist(),
        lambda x: int(x.max()),
        lambda x: x[x > 0],
        lambda x: torch.bincount(x),
        lambda x: x.repeat_interleave(x),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: torch.zeros(2).to(x.device),
    ],
)
def test_what_waits_is_noticed(wait: Any) -> None:
    x = torch.empty(3, device="meta", dtype=torch.int64)
    with pytest.raises((AssertionError, RuntimeError)), no_waits():
        wait(x)
