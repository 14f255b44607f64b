"""One MoE layer on several ranks, and the same layer in one process: what the dispatcher tests compare.

Reference: one process with all experts and the local dispatcher, on the oracle kernels, in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo  # checkpoint() loads it, for seconds; ranks are forked with it
import torch.distributed as dist
from moetrain_launch.fork import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from moetrain.moe.balance import end_of_step
from moetrain.moe.dispatch import build_dispatcher
from moetrain.moe.routing import TokenContext
from tests.moe.toys import config, empty_carry, make_layer, tokens

E, K, D = 8, 3, 16
PROBE = 7
BALANCE: dict[str, Any] = {"aux_loss": {"scope": "sequence"}, "z_loss": {}}
MOE: dict[str, dict[str, Any]] = {
    "drops": {"capacity_factor": 0.9, "drop_policy": "score"},
    "biases": {"bias": True, "activation": "gpt_oss"},
}
# The dimension that expert tensor parallel ranks split.
ETP_DIM = {"w13": 2, "w2": 2, "b13": 2, "b2": 1}


@dataclass(frozen=True)
class Result:
    """Of one rank, or of the whole batch. counts: loads of the step. grads: of the experts' parameters by name."""

    out: Tensor
    x_grad: Tensor
    router_grad: Tensor
    shared_grads: list[Tensor]
    grads: dict[str, Tensor]
    counts: Tensor
    dropped: int


@dataclass(frozen=True)
class Sent:
    """One all-to-all of a rank: bytes to each rank of the group, as ranks of the world."""

    dtype: str
    bytes_to: dict[int, int]


@dataclass(frozen=True)
class Spread:
    """How a case runs on ranks: world = ep x etp, ranks of etp fastest. recompute: none, selective or full."""

    dispatch: dict[str, Any]
    ep: int
    etp: int = 1
    recompute: str = "none"
    overlap: bool = False
    dtype: torch.dtype = torch.float64
    extra: dict[str, Any] = field(default_factory=dict)


def make(case: str, dtype: torch.dtype = torch.float64) -> Any:
    """The whole layer, the same on every rank."""
    layer = make_layer(config(D, num_experts=E, top_k=K, shared_dim=6, **MOE.get(case, {})), BALANCE, dtype)
    if case == "hot expert":
        # Tokens have a large first feature, which the router gives to expert 5 first, then to 4 and 6.
        with torch.no_grad():
            layer.router.weight[:, 0] = torch.tensor([0.0, 0, 0, 0, 8, 9, 8, 0])
    return layer


def batch(case: str, n_tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(x_TD, upstream gradient)."""
    x = tokens(n_tokens, D, dtype=dtype)
    if case == "hot expert":
        x[:, 0] = 10
    return x, tokens(n_tokens, D, seed=PROBE, dtype=dtype)


def run_layer(layer: Any, x: Tensor, probe: Tensor, group: dist.ProcessGroup | None, recompute: str) -> Result:
    """Forward and backward of one step."""
    x = x.clone().requires_grad_()
    context = TokenContext(seq_len=max(len(x), 1))
    layer.experts.recompute = layer.shared.recompute = recompute == "selective"
    carry = empty_carry(BALANCE, x.dtype)
    if recompute == "full":
        out, carry = checkpoint(layer, x, carry, context, use_reentrant=False, preserve_rng_state=False)
    else:
        out, carry = layer(x, carry, context)
    ((out * probe).sum() + carry.aux_A.sum()).backward()
    loads = end_of_step(layer, group, 0)
    assert x.grad is not None
    return Result(
        out=out.detach(),
        x_grad=x.grad,
        router_grad=layer.router.weight.grad,
        shared_grads=[p.grad for p in layer.shared.parameters()],
        grads={name: p.grad for name, p in layer.experts.named_parameters()},
        counts=loads.counts[""],
        dropped=loads.dropped[""],
    )


def split_layer(layer: Any, spread: Spread) -> None:
    """Give ``layer`` this rank's part of the experts, and its dispatcher."""
    mesh = init_device_mesh("cpu", (spread.ep, spread.etp), mesh_dim_names=("ep", "etp"))
    ep_rank, etp_rank = mesh.get_local_rank("ep"), mesh.get_local_rank("etp")
    groups = mesh.get_group("ep"), mesh.get_group("etp")
    layer.dispatcher = build_dispatcher(spread.dispatch, E, *groups)
    layer.dispatcher.overlap = spread.overlap
    for name, p in list(layer.experts.named_parameters()):
        part = p.detach().chunk(spread.ep)[ep_rank].chunk(spread.etp, ETP_DIM[name])[etp_rank]
        setattr(layer.experts, name, nn.Parameter(part.clone()))
    width = D // spread.etp
    layer.experts.output_slice = slice(etp_rank * width, (etp_rank + 1) * width)


@contextmanager
def watching() -> Iterator[list[Sent]]:
    """Every all-to-all of this rank, in order."""
    sent: list[Sent] = []
    original = dist.all_to_all_single

    def spy(out: Tensor, x: Tensor, out_splits: list[int], in_splits: list[int], *, group: Any, **kwargs: Any) -> Any:
        row = (x[:1] if len(x) else out[:1]).numel() * x.element_size()
        ranks = dist.get_process_group_ranks(group)
        bytes_to = {rank: n * row for rank, n in zip(ranks, in_splits, strict=True)}
        sent.append(Sent(str(x.dtype).removeprefix("torch."), bytes_to))
        return original(out, x, out_splits, in_splits, group=group, **kwargs)

    dist.all_to_all_single = spy
    try:
        yield sent
    finally:
        dist.all_to_all_single = original


def on_rank(spread: Spread, case: str, sizes: list[int]) -> tuple[Result, list[Sent]]:
    """This rank's share of the batch, with its part of the experts."""
    rank = dist.get_rank()
    layer = make(case, spread.dtype)
    split_layer(layer, spread)
    x, probe = (part.split(sizes)[rank] for part in batch(case, sum(sizes), spread.dtype))
    with watching() as sent:
        return run_layer(layer, x, probe, dist.group.WORLD, spread.recompute), sent


def reference(case: str, sizes: list[int]) -> Result:
    """One process, one rank's tokens after the other: capacity, where there is one, is per rank."""
    layer = make(case)
    x, probe = batch(case, sum(sizes))
    pairs = zip(x.split(sizes), probe.split(sizes), strict=True)
    parts = [run_layer(layer, part, part_probe, None, "none") for part, part_probe in pairs]
    # Gradients accumulate over the parts; loads and drops were taken after each.
    return Result(
        out=torch.cat([p.out for p in parts]),
        x_grad=torch.cat([p.x_grad for p in parts]),
        router_grad=parts[-1].router_grad,
        shared_grads=parts[-1].shared_grads,
        grads=parts[-1].grads,
        counts=sum(p.counts for p in parts),  # type: ignore[arg-type]
        dropped=sum(p.dropped for p in parts),
    )


def compare(spread: Spread, case: str, sizes: list[int], tolerance: float = 1e-12) -> list[list[Sent]]:
    """Run ``case`` on ranks that hold ``sizes`` tokens and in one process, and assert that all numbers agree.

    Returns what each rank sent.
    """
    assert len(sizes) == spread.ep * spread.etp
    expected = reference(case, sizes)
    results, sent = zip(*run_ranks(len(sizes), on_rank, spread, case, sizes), strict=True)

    def close(ours: Tensor, theirs: Tensor) -> None:
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)

    close(torch.cat([r.out for r in results]), expected.out)
    close(torch.cat([r.x_grad for r in results]), expected.x_grad)
    close(sum(r.router_grad for r in results), expected.router_grad)  # type: ignore[arg-type]
    for i, grad in enumerate(expected.shared_grads):
        close(sum(r.shared_grads[i] for r in results), grad)  # type: ignore[arg-type]
    for name, grad in expected.grads.items():
        parts = [r.grads[name] for r in results]
        rows = [torch.cat(parts[i : i + spread.etp], ETP_DIM[name]) for i in range(0, len(parts), spread.etp)]
        close(torch.cat(rows), grad)
    for r in results:
        assert torch.equal(r.counts, expected.counts), "every rank knows the loads of all"
        assert r.dropped == expected.dropped
    if case == "hot expert":
        assert expected.counts.tolist() == [0, 0, 0, 0] + [sum(sizes)] * 3 + [0]
    assert (expected.dropped > 0) == (case == "drops")
    return list(sent)


def owners(case: str, sizes: list[int], ep: int) -> list[Tensor]:
    """Of each rank: for each of its tokens the ep ranks of its K experts, int64 (T, K)."""
    layer, (x, _) = make(case), batch(case, sum(sizes))
    ids = (x @ layer.router.weight.T).topk(K).indices
    return list((ids // (E // ep)).split(sizes))
