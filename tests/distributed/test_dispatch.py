"""Expert parallel dispatch gives what the local dispatcher gives: outputs, gradients, loads. It moves no row twice.

Reference: one process with all experts and the local dispatcher, on the oracle kernels, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moetrain.config.errors import ConfigError
from moetrain.moe.balance import end_of_step
from moetrain.moe.dispatch import build_dispatcher
from moetrain.moe.routing import TokenContext
from tests.distributed.harness import run_ranks
from tests.moe.toys import config, empty_carry, make_layer, tokens

E, K, D = 8, 3, 16
PROBE = 7
BALANCE: dict[str, Any] = {"aux_loss": {"scope": "sequence"}, "z_loss": {}}


@dataclass(frozen=True)
class Result:
    """Of one rank, or of the whole batch. counts: loads of the step."""

    out: Tensor
    x_grad: Tensor
    router_grad: Tensor
    expert_grads: list[Tensor]
    counts: Tensor
    dropped: int


def make(case: str) -> Any:
    moe = {"capacity_factor": 0.9, "drop_policy": "score"} if case == "drops" else {}
    layer = make_layer(config(D, num_experts=E, top_k=K, shared_dim=6, **moe), BALANCE)
    if case == "hot expert":
        # Tokens have a large first feature, which the router gives to expert 5 first, then to 4 and 6.
        with torch.no_grad():
            layer.router.weight[:, 0] = torch.tensor([0.0, 0, 0, 0, 8, 9, 8, 0])
    return layer


def batch(case: str, n_tokens: int) -> tuple[Tensor, Tensor]:
    """(x_TD, upstream gradient)."""
    x = tokens(n_tokens, D)
    if case == "hot expert":
        x[:, 0] = 10
    return x, tokens(n_tokens, D, seed=PROBE)


def run_layer(layer: Any, x: Tensor, probe: Tensor, group: dist.ProcessGroup | None, recompute: bool) -> Result:
    x = x.clone().requires_grad_()
    context = TokenContext(seq_len=max(len(x), 1))
    if recompute:
        out, carry = checkpoint(layer, x, empty_carry(BALANCE), context, use_reentrant=False, preserve_rng_state=False)
    else:
        out, carry = layer(x, empty_carry(BALANCE), context)
    ((out * probe).sum() + carry.aux_A.sum()).backward()
    loads = end_of_step(layer, group, 0)
    assert x.grad is not None and layer.router.weight.grad is not None
    expert_grads = [p.grad for p in layer.experts.parameters()]
    return Result(out.detach(), x.grad, layer.router.weight.grad, expert_grads, loads.counts[""], loads.dropped[""])


def on_rank(kind: str, case: str, sizes: list[int], recompute: bool) -> tuple[Result, list[tuple[str, list[int]]]]:
    """This rank's share of the batch, with its slice of the experts. Second: rows sent by each all-to-all, per rank."""
    rank, world, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    layer = make(case)
    layer.dispatcher = build_dispatcher({"kind": kind}, E, group)
    for name, p in list(layer.experts.named_parameters()):
        setattr(layer.experts, name, nn.Parameter(p.detach().chunk(world)[rank].clone()))
    x, probe = (part.split(sizes)[rank] for part in batch(case, sum(sizes)))
    sent: list[tuple[str, list[int]]] = []
    original = dist.all_to_all_single

    def counting(out: Tensor, x: Tensor, out_splits: list[int], in_splits: list[int], **kwargs: Any) -> Any:
        row = x[:1].numel() * x.element_size() if len(x) else out[:1].numel() * out.element_size()
        sent.append((str(x.dtype), [n * row for n in in_splits]))
        return original(out, x, out_splits, in_splits, **kwargs)

    dist.all_to_all_single = counting
    return run_layer(layer, x, probe, group, recompute), sent


def reference(case: str, sizes: list[int]) -> Result:
    """One process, one rank's tokens after the other: capacity, where there is one, is per rank."""
    layer = make(case)
    x, probe = batch(case, sum(sizes))
    parts = []
    for part, part_probe in zip(x.split(sizes), probe.split(sizes), strict=True):
        parts.append(run_layer(layer, part, part_probe, None, recompute=False))
    # Gradients accumulate over the parts; loads and drops were taken after each.
    return Result(
        torch.cat([p.out for p in parts]),
        torch.cat([p.x_grad for p in parts]),
        parts[-1].router_grad,
        parts[-1].expert_grads,
        sum(p.counts for p in parts),  # type: ignore[arg-type]
        sum(p.dropped for p in parts),
    )


CASES = [
    ("dropless", [13, 8]),
    ("dropless", [0, 9]),
    ("dropless", [0, 0]),
    ("hot expert", [6, 7]),
    ("drops", [20, 11]),
    ("dropless", [5, 9, 3, 8]),
    ("dropless", [0, 12, 0, 1]),
    ("hot expert", [4, 0, 5, 3]),
    ("drops", [9, 0, 16, 5]),
]


@pytest.mark.parametrize(("case", "sizes"), CASES, ids=lambda v: str(v))
@pytest.mark.parametrize("kind", ["all_to_all", "all_gather"])
def test_expert_parallel_equals_one_process(kind: str, case: str, sizes: list[int]) -> None:
    expected = reference(case, sizes)
    results = [result for result, _ in run_ranks(len(sizes), on_rank, kind, case, sizes, False)]

    def close(ours: Tensor, theirs: Tensor) -> None:
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)

    close(torch.cat([r.out for r in results]), expected.out)
    close(torch.cat([r.x_grad for r in results]), expected.x_grad)
    close(sum(r.router_grad for r in results), expected.router_grad)  # type: ignore[arg-type]
    for i, grad in enumerate(expected.expert_grads):
        close(torch.cat([r.expert_grads[i] for r in results]), grad)
    for r in results:
        assert torch.equal(r.counts, expected.counts), "every rank knows the loads of all"
        assert r.dropped == expected.dropped
    if case == "hot expert":
        assert expected.counts.tolist() == [0, 0, 0, 0] + [sum(sizes)] * 3 + [0]
    assert (expected.dropped > 0) == (case == "drops")


@pytest.mark.parametrize("recompute", [False, True])
def test_all_to_all_moves_the_fewest_bytes_and_counts_once(recompute: bool) -> None:
    """A rank sends each row whose expert is elsewhere once there; outputs come back once; gradients mirror both."""
    sizes, world = [11, 6, 0, 9], 4
    layer, (x, _) = make("dropless"), batch("dropless", sum(sizes))
    ids = (x @ layer.router.weight.T).topk(K).indices
    owner = (ids // (E // world)).split(sizes)
    rows = [[int((owner[r] == s).sum()) for s in range(world)] for r in range(world)]
    for rank, (_, sent) in enumerate(run_ranks(world, on_rank, "all_to_all", "dropless", sizes, recompute)):
        ints = [splits for dtype, splits in sent if dtype == "torch.int64"]
        floats = [[n // (D * 8) for n in splits] for dtype, splits in sent if dtype == "torch.float64"]
        assert ints == [[E // world * 8] * world], "one exchange of counts, also with recomputation"
        there, back = rows[rank], [rows[source][rank] for source in range(world)]
        # Dispatch and combine, again when recomputed, then their gradients in reverse order.
        assert floats == [there, back] * (2 if recompute else 1) + [there, back]


def test_auto_is_local_on_one_rank_and_all_to_all_on_more() -> None:
    assert type(build_dispatcher({"kind": "auto"}, E, None)).__name__ == "LocalDispatcher"
    assert (
        run_ranks(2, _auto_and_refusals)
        == [
            (
                "AllToAllDispatcher",
                "dispatch=local needs all experts on every rank, but parallel.ep=2; "
                "use dispatch=all_to_all or parallel.ep=1",
                "model.moe.num_experts=9 experts cannot be split evenly over parallel.ep=2 ranks; "
                "make ep a divisor of num_experts",
            )
        ]
        * 2
    )


def _auto_and_refusals() -> tuple[str, str, str]:
    group, messages = dist.group.WORLD, []
    for kind, n_experts in (("local", E), ("auto", 9)):
        with pytest.raises(ConfigError) as error:
            build_dispatcher({"kind": kind}, n_experts, group)
        messages.append(str(error.value))
    return type(build_dispatcher({"kind": "auto"}, E, group)).__name__, messages[0], messages[1]
