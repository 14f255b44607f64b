"""Balance methods: values and gradients against transformers and closed forms, and sums that no split changes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moetrain.moe.balance import aux_coefs, aux_names, end_of_step
from moetrain.moe.routing import TokenContext
from tests.moe.toys import config, empty_carry, make_layer, make_router, tokens

E, K, S, B = 8, 2, 12, 5
SCOPES = ("sequence", "step", "micro_batch")


def aux(scope: str, coef: Any = 0.01) -> dict[str, Any]:
    return {"aux_loss": {"scope": scope, "coef": coef}}


def terms(router: Any, x: Tensor, balance: dict[str, Any], step: int = 0) -> Tensor:
    """aux_A of one router call on whole sequences of S tokens."""
    return router(x, empty_carry(balance), TokenContext(seq_len=S, step=step))[1].aux_A


def switch_loss(router: Any, x: Tensor) -> Any:
    """transformers' loss of the same tokens, on our scale: theirs is top_k times as large."""
    return load_balancing_loss_func((x.float() @ router.weight.float().T,), E, K) / K


def test_micro_batch_scope_equals_transformers() -> None:
    router, x = make_router(config(), aux("micro_batch")), tokens(B * S)
    loss = terms(router, x, aux("micro_batch"))[0] / (B * S)
    expected = switch_loss(router, x)
    torch.testing.assert_close(loss.float(), expected, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss, router.weight)
    (expected_gradient,) = torch.autograd.grad(expected, router.weight)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)


def test_sequence_scope_is_the_mean_of_transformers_loss_per_sequence() -> None:
    router, x = make_router(config(), aux("sequence")), tokens(B * S)
    loss = terms(router, x, aux("sequence"))[0] / (B * S)
    expected = torch.stack([switch_loss(router, sequence) for sequence in x.split(S)]).mean()
    torch.testing.assert_close(loss.float(), expected, rtol=1e-6, atol=0)


def test_step_scope_uses_the_loads_of_the_step_before_and_uniform_ones_at_first() -> None:
    balance = aux("step")
    layer = make_layer(config(), balance)
    router, x, y = layer.router, tokens(B * S), tokens(B * S, seed=1)
    # E * sum_e 1/E * P_e = 1 per token, whatever the router does.
    torch.testing.assert_close(terms(router, x, balance)[0].item(), float(B * S), rtol=1e-13, atol=0)
    terms(router, y, balance)
    end_of_step(layer, None, step=0)

    logits = torch.cat([x, y]) @ router.weight.T
    share = torch.bincount(logits.topk(K).indices.flatten(), minlength=E).double() / (K * 2 * B * S)
    expected = E * (share * (x @ router.weight.T).softmax(-1).sum(0)).sum()
    torch.testing.assert_close(terms(router, x, balance, step=1)[0], expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("scope", ["sequence", "step"])
@pytest.mark.parametrize("sizes", [[5], [1, 4], [2, 1, 2], [1, 1, 1, 1, 1]])
def test_splitting_the_batch_changes_nothing(scope: str, sizes: list[int]) -> None:
    """Two steps, each cut into micro-batches (or ranks) of whole sequences: the same sums, gradients and loads."""
    balance = {**aux(scope), "z_loss": {}}
    whole, split = (make_layer(config(), balance) for _ in range(2))
    for step, x in enumerate([tokens(B * S), tokens(B * S, seed=1)]):
        expected = terms(whole.router, x, balance, step)
        expected.sum().backward()
        for part in x.split([S * n for n in sizes]):
            value = terms(split.router, part, balance, step)
            value.sum().backward()
            expected = expected - value
        assert expected.abs().max() < 1e-11
        torch.testing.assert_close(split.router.weight.grad, whole.router.weight.grad, rtol=1e-12, atol=1e-13)
        loads, expected_loads = end_of_step(split, None, step), end_of_step(whole, None, step)
        assert torch.equal(loads.counts[""], expected_loads.counts[""])


def test_sigmoid_scores_enter_the_loss_as_shares_of_their_sum() -> None:
    """DeepSeek-V3, eq. 17 to 20, written as loops over one sequence."""
    router = make_router(config(router={"score": "sigmoid", "scale": 2.5}), aux("sequence"))
    x = tokens(S)
    scores = (x @ router.weight.T).sigmoid()
    chosen = [scores[t].topk(K).indices.tolist() for t in range(S)]
    expected = 0.0
    for e in range(E):
        f = E / (K * S) * sum(e in ids for ids in chosen)
        P = sum((scores[t, e] / scores[t].sum()).item() for t in range(S)) / S
        expected += f * P
    loss = terms(router, x, aux("sequence"))[0] / S
    assert loss.item() == pytest.approx(expected, rel=1e-13)


def test_z_loss_is_the_squared_logsumexp() -> None:
    router, x = make_router(config(), {"z_loss": {}}), tokens(S)
    expected = sum(torch.log(torch.exp(router.weight @ x[t]).sum()).item() ** 2 for t in range(S))
    assert terms(router, x, {"z_loss": {}})[0].item() == pytest.approx(expected, rel=1e-13)


def test_terms_ride_in_the_carry_in_the_order_of_the_config_and_add_up_over_layers() -> None:
    balance = {"z_loss": {}, "bias": {}, "aux_loss": {"scope": "sequence"}}
    assert aux_names(balance) == ("z_loss", "aux_loss")
    router, x = make_router(config(), balance), tokens(S)
    z, switch = (terms(make_router(config(), {n: balance[n]}), x, {n: balance[n]})[0] for n in aux_names(balance))
    carry = empty_carry(balance)
    for _ in range(3):
        carry = router(x, carry, TokenContext(seq_len=S))[1]
    torch.testing.assert_close(carry.aux_A, torch.stack([3 * z, 3 * switch]))
    unchanged = router(x, carry, TokenContext(seq_len=S, training=False))[1]
    assert torch.equal(unchanged.aux_A, carry.aux_A), "no term outside training"


def test_coefficients_follow_their_schedules() -> None:
    balance = {"aux_loss": {"coef": {0: 0.02, 10: 0.01}}, "bias": {}, "z_loss": {"coef": 0.5}}
    assert aux_coefs(balance, 0) == [0.02, 0.5]
    assert aux_coefs(balance, 5) == [pytest.approx(0.015), 0.5]
    assert aux_coefs(balance, 99) == [0.01, 0.5]


def test_bias_moves_by_the_sign_of_the_integer_violation() -> None:
    layer = make_layer(config(router={"score": "sigmoid"}), {"bias": {"rate": {0: 0.5, 1: 0.25}}})
    bias = layer.router.balance["bias"]
    # Mean load 2**40 + 1/8: float32 could tell neither of the first two from the mean.
    loads = torch.full((E,), 2**40)
    loads[0] += 1
    bias.after_step(loads, step=0)
    assert bias.bias_E.tolist() == [-0.5] + [0.5] * (E - 1)
    bias.after_step(torch.full((E,), 7), step=1)
    assert bias.bias_E.tolist() == [-0.5] + [0.5] * (E - 1), "balanced experts stay"
    bias.after_step(torch.arange(E), step=1)
    assert bias.bias_E.tolist() == [-0.25, 0.75, 0.75, 0.75, 0.25, 0.25, 0.25, 0.25]


def test_bias_chooses_but_does_not_weigh_and_balances_a_skewed_router() -> None:
    balance = {"bias": {"rate": 0.02}}
    layer = make_layer(config(router={"score": "sigmoid", "renormalize": False}), balance)
    x = tokens(200) + 0.7 * layer.router.weight[3].detach()
    ratios = []
    for step in range(60):
        routing, _ = layer.router(x, empty_carry(), TokenContext(seq_len=200, step=step))
        scores = (x @ layer.router.weight.T).sigmoid()
        torch.testing.assert_close(routing.weights_TK, scores.gather(1, routing.ids_TK), rtol=1e-14, atol=0)
        loads = end_of_step(layer, None, step).counts[""]
        ratios.append(float(loads.max() / loads.double().mean()))
    assert ratios[0] > 2 and ratios[-1] < 1.3


def test_bias_keeps_float32_in_a_bf16_model() -> None:
    layer = make_layer(config(), {"bias": {}}).to(torch.bfloat16)
    assert layer.router.balance["bias"].bias_E.dtype == torch.float64
    layer = make_layer(config(), {"bias": {}}, torch.float32).to(torch.bfloat16)
    assert layer.router.balance["bias"].bias_E.dtype == torch.float32
    assert layer.router.weight.dtype == torch.bfloat16


def test_end_of_step_sums_micro_batches_per_layer_and_starts_anew() -> None:
    model = torch.nn.ModuleDict({"a": make_layer(config()), "b": make_layer(config(capacity_factor=0.5))})
    for x in (tokens(S), tokens(S, seed=1)):
        for layer in model.values():
            layer(x, empty_carry(), TokenContext(seq_len=S))
    loads = end_of_step(model, None, step=0)
    assert list(loads.counts) == ["a", "b"]
    assert torch.equal(loads.counts["a"], loads.counts["b"]), "choices are counted before dropping"
    assert int(loads.counts["a"].sum()) == 2 * S * K
    assert loads.dropped["a"] == 0 and loads.dropped["b"] >= 2 * (S * K - E * math.ceil(0.5 * S * K / E))
    assert int(end_of_step(model, None, step=1).counts["a"].sum()) == 0


def test_state_that_a_checkpoint_needs_is_in_the_state_dict_and_nothing_else() -> None:
    layer = make_layer(config(), {"bias": {}, **aux("step")})
    buffers = set(layer.state_dict()) - {name for name, _ in layer.named_parameters()}
    assert buffers == {"router.balance.bias.bias_E", "router.balance.aux_loss.loads_E"}
