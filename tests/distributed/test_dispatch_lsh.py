"""LSH-compressed dispatch: its formula and derivative, against one process that does the same with plain torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from moetrain_launch.fork import run_ranks
from torch import Tensor
from torch.autograd import gradcheck

from moetrain import config
from moetrain.config.errors import ConfigError
from moetrain.moe.dispatch import build_dispatcher
from moetrain.moe.dispatch.buckets import hash_rows, rotations
from moetrain.moe.routing import Carry, Memo, Routing, Rows, TokenContext
from moetrain.train import parity
from tests.distributed.moe_ranks import D, E, K, Result, Spread, batch, compare, make, on_rank, reference
from tests.distributed.toy_run import load

SIZES = {1: [17], 2: [19, 12], 4: [15, 0, 21, 8]}


def lsh(hashes: int = 3, **more: Any) -> dict[str, Any]:
    return {"kind": "lsh", "hashes": hashes, "axes": 1, **more}


@pytest.mark.parametrize(("ep", "etp"), [(1, 1), (2, 1), (4, 1), (2, 2)])
def test_small_enough_buckets_give_the_plain_layer(ep: int, etp: int) -> None:
    """60 hashes of 32 directions: no two tokens agree in all. Outputs and all gradients are those of one process."""
    sizes = SIZES[ep * etp]
    compare(Spread(lsh(60, axes=D), ep, etp), "biases" if etp > 1 else "dropless", sizes)


@pytest.mark.parametrize("case", ["drops", "hot expert"])
def test_it_goes_with_dropping_and_with_idle_ranks(case: str) -> None:
    compare(Spread(lsh(60, axes=D), 4), case, SIZES[4])


def compressed(x_TD: Tensor, layer: Any, options: dict[str, Any]) -> Tensor:
    """The layer by the paper's rule in a loop over buckets: autograd alone knows the derivative."""
    scores = (x_TD @ layer.router.weight.T).softmax(1)
    weights_TK, ids_TK = scores.topk(K)
    weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
    turned = rotations(D, options["hashes"], options["axes"], 0, layer.router.layer).double()
    out = [layer.shared(x) for x in x_TD]
    for e in range(E):
        buckets: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        mine_TD = x_TD.detach()[(ids_TK == e).any(1)]
        hashed = hash_rows(x_TD.detach() - mine_TD.mean(0), turned).tolist()
        for t, k in (ids_TK == e).nonzero().tolist():
            buckets.setdefault(tuple(hashed[t]), []).append((t, k))
        for bucket in buckets.values():
            mean = torch.stack([x_TD[t] for t, _ in bucket]).mean(0)
            gate, up = layer.experts.w13[e, 0] @ mean, layer.experts.w13[e, 1] @ mean
            y = layer.experts.w2[e] @ (torch.nn.functional.silu(gate) * up)
            for t, k in bucket:
                far = x_TD[t] - mean if options.get("residual", True) else 0
                out[t] = out[t] + weights_TK[t, k] * (y + far)
    return torch.stack(out) if len(x_TD) else x_TD


def expected(options: dict[str, Any], sizes: list[int]) -> Result:
    """One rank's tokens after the other, since buckets are of one rank."""
    layer = make("dropless")
    x, probe = batch("dropless", sum(sizes))
    x.requires_grad_()
    out = torch.cat([compressed(part, layer, options) for part in x.split(sizes)])
    (out * probe).sum().backward()
    assert x.grad is not None
    grads = {name: p.grad for name, p in layer.experts.named_parameters()}
    return Result(out.detach(), x.grad, layer.router.weight.grad, [p.grad for p in layer.shared.parameters()], grads,
                  torch.zeros(0), 0)  # fmt: skip


def without_balance(spread: Spread, sizes: list[int]) -> tuple[Result, list[Any]]:
    """``on_rank`` without auxiliary losses, which the loop above does not know."""
    from tests.distributed import moe_ranks

    moe_ranks.BALANCE = {}
    return on_rank(spread, "dropless", sizes)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("ep", [1, 2, 4])
def test_outputs_and_gradients_are_those_of_the_rule(ep: int, residual: bool, recompute: str) -> None:
    if recompute == "full" and ep != 2:
        return
    options, sizes = lsh(residual=residual), SIZES[ep]
    want = expected(options, sizes)
    results, sent = zip(*run_ranks(ep, without_balance, Spread(options, ep, recompute=recompute), sizes), strict=True)

    def close(ours: Tensor, theirs: Tensor) -> None:
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)

    close(torch.cat([r.out for r in results]), want.out)
    close(torch.cat([r.x_grad for r in results]), want.x_grad)
    close(sum(r.router_grad for r in results), want.router_grad)  # type: ignore[arg-type]
    for name, grad in want.grads.items():
        close(torch.cat([r.grads[name] for r in results]), grad)
    if ep > 1:
        plain = reference("dropless", sizes)
        assert (plain.out - want.out).abs().max() > 0.01, "something was compressed"
        there, back, *rest = [sum(s.bytes_to.values()) // (8 * D) for s in sent[0] if s.dtype == "float64"]
        assert there < sizes[0] * K, "fewer rows left than the rank has"
        # Means there, outputs back, again when recomputed; then gradients: as many, for sums of buckets travel.
        back_in = [s.bytes_to for s in sent[0] if s.dtype == "int64"]
        assert len(back_in) == 1, "counts once, also with recomputation"
        assert rest == ([there, back] if recompute == "full" else []) + [there, back]


def layer_of_rows(options: dict[str, Any], x_TD: Tensor, expert: Callable[[Rows], Tensor]) -> Tensor:
    """Dispatch, ``expert`` and combine of one rank: each token goes to expert 0 with weight 1."""
    dispatcher = build_dispatcher(options, E, dist.group.WORLD)
    T = len(x_TD)
    routing = Routing(E, T, Memo(), torch.zeros(T, 1, dtype=torch.int64), torch.ones(T, 1, dtype=x_TD.dtype))
    rows, plan = dispatcher.dispatch(x_TD, routing)
    return dispatcher.combine(expert(rows), plan, beside=lambda: 0.0)


def check_derivative() -> bool:
    w = torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x = torch.randn(12, D, dtype=torch.float64, generator=torch.Generator().manual_seed(4), requires_grad=True)

    def expert(rows: Rows) -> Tensor:
        return (rows.x_ND[rows.index_R] @ w).tanh()

    both = [lsh(2, residual=residual) for residual in (True, False)]
    return all(gradcheck(lambda x, o=o: layer_of_rows(o, x, expert), x) for o in both)


def test_the_derivative_is_that_of_finite_differences() -> None:
    """Buckets stay as they are for steps as small as gradcheck's."""
    assert run_ranks(1, check_derivative) == [True]


def bad_rows() -> tuple[Tensor, Tensor, Tensor]:
    layer = make("dropless", torch.float32)
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(5))
    x[3, 1], x[8] = float("nan"), float("inf")
    carry, context = Carry(torch.zeros(2)), TokenContext(seq_len=20)
    plain, _ = layer(x, carry, context)
    layer.dispatcher = build_dispatcher(lsh(60, axes=D), E, dist.group.WORLD)
    same, _ = layer(x, carry, TokenContext(seq_len=20))
    layer.dispatcher = build_dispatcher(lsh(1), E, dist.group.WORLD)
    few, _ = layer(x, carry, TokenContext(seq_len=20))
    tally = layer.dispatcher.tally[0]
    return plain, same, torch.cat([few.isfinite().all(1).float(), tally.float()])


def test_a_token_that_is_not_finite_passes_as_it_does_without_compression() -> None:
    plain, same, rest = run_ranks(1, bad_rows)[0]
    torch.testing.assert_close(same, plain, equal_nan=True)
    assert (rest[:20] == 0).nonzero()[:, 0].tolist() == [3, 8], "no other token is touched"
    assert rest[20:].isfinite().all() and rest[21] < rest[20] == 20 * K


def in_evaluation() -> tuple[bool, bool, int]:
    layer = make("dropless")
    x, carry = torch.randn(20, D, dtype=torch.float64), Carry(torch.zeros(2, dtype=torch.float64))
    plain, _ = layer(x, carry, TokenContext(20, training=False))
    layer.dispatcher = build_dispatcher(lsh(1), E, dist.group.WORLD)
    held_out, _ = layer(x, carry, TokenContext(20, training=False))
    seen = len(layer.dispatcher.tally)
    trained, _ = layer(x, carry, TokenContext(20))
    return torch.allclose(held_out, plain, rtol=1e-12), torch.allclose(trained, plain), seen


def test_nothing_is_compressed_or_counted_outside_training() -> None:
    assert run_ranks(1, in_evaluation) == [(True, False, 0)]


def seen_of_later_tokens() -> tuple[bool, bool]:
    """Whether the first 10 of 40 tokens get other outputs when the 30 after them change, in training and outside."""
    layer, x = make("dropless"), torch.randn(40, D, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    other, carry = torch.cat([x[:10], x[10:].flip(1)]), Carry(torch.zeros(2, dtype=torch.float64))
    layer.dispatcher = build_dispatcher(lsh(1), E, dist.group.WORLD)
    found = []
    for training in (True, False):
        a, b = (layer(t, carry, TokenContext(40, training=training))[0][:10] for t in (x, other))
        found.append(not torch.allclose(a, b, rtol=1e-9, atol=1e-9))
    return found[0], found[1]


def test_means_show_a_token_what_comes_later_but_not_in_evaluation() -> None:
    """Why the training loss of a causal model cannot be compared, and the held-out loss can."""
    assert run_ranks(1, seen_of_later_tokens) == [(True, False)]


def resampled() -> list[int]:
    layer, sent = make("dropless"), []
    x, carry = torch.randn(60, D, dtype=torch.float64), Carry(torch.zeros(2, dtype=torch.float64))
    for resample in (False, True):
        layer.dispatcher = build_dispatcher(lsh(4, resample=resample), E, dist.group.WORLD)
        outs = [layer(x, carry, TokenContext(60, step=step))[0] for step in (0, 1, 1)]
        sent += [int(torch.equal(outs[0], outs[1])), int(torch.equal(outs[1], outs[2]))]
    return sent


def test_rotations_change_with_the_step_where_asked() -> None:
    assert run_ranks(1, resampled) == [[1, 1, 0, 1]]


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("hashes=0", "dispatch.hashes"),
        ("hashes=-2", "dispatch.hashes"),
        ("hashes=2.5", "dispatch.hashes"),
        ("hashes=null", "dispatch.hashes"),
        ("axes=0", "dispatch.axes"),
        ("axes=many", "dispatch.axes"),
        ("residual=perhaps", "dispatch.residual"),
        ("resample=3", "dispatch.resample"),
        ("hash=3", "hash"),
    ],
)
def test_bad_settings_are_refused_by_name(setting: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        config.load(["dispatch=lsh", f"dispatch.{setting}"])
    assert "\n" not in str(error.value)


def test_no_parity_is_claimed_for_it(prepared: Path) -> None:
    with pytest.raises(ConfigError, match="dispatch=lsh changes the function"):
        parity.prove(load(prepared, ["dispatch=lsh"]), 2)
