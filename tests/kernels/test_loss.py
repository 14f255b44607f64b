"""Cross-entropy of a linear head against torch's own on full logits in float64."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from moe_kernels import VocabularyPart, linear_cross_entropy, token_counts
from torch import Tensor

from tests.kernels.expert_cases import refused_twice
from tests.kernels.ops import BACKENDS, compare, run

TOKENS, DIM, VOCAB = 50, 12, 37


def head(ignored: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """(h_TD, w_VD, targets_T) with a share of ignored targets."""
    g = torch.Generator().manual_seed(3)
    h = (4 * torch.randn(TOKENS, DIM, generator=g, dtype=torch.float64)).to(dtype)
    w = torch.randn(VOCAB, DIM, generator=g, dtype=torch.float64).to(dtype)
    targets = torch.randint(VOCAB, (TOKENS,), generator=g)
    targets[torch.rand(TOKENS, generator=g) < ignored] = -100
    return h.requires_grad_(), w.requires_grad_(), targets


@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.1], ids=["none ignored", "some ignored", "all ignored"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
def test_equals_cross_entropy(ignored: float, reduction: str, chunk: int) -> None:
    h, w, targets = head(ignored)
    got = linear_cross_entropy(h, w, targets, chunk=chunk, reduction=reduction)
    want = F.cross_entropy(h @ w.T, targets, reduction=reduction)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    # A gradient from above that is not 1, and for per-token losses differs from token to token.
    above = torch.linspace(0.5, 2.0, TOKENS, dtype=torch.float64) if reduction == "none" else torch.tensor(0.7).double()
    for a, b in zip(torch.autograd.grad(got, (h, w), above), torch.autograd.grad(want, (h, w), above), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradcheck(reduction: str) -> None:
    h, w, targets = head(0.3)
    h, w = h.detach()[:6, :4].requires_grad_(), w.detach()[:, :4].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets[:6] % 30, chunk=4, reduction=reduction, ignore_index=2), (h, w)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("classes", [5, 300])
def test_every_backend_in_float32(monkeypatch: pytest.MonkeyPatch, backend: str, reduction: str, classes: int) -> None:
    """Against torch in float64, with ignored targets and a row of more classes than a program of the kernel holds."""
    if backend == "triton":
        monkeypatch.setattr("moe_kernels.gpu.loss.BLOCK", 64)
    g = torch.Generator().manual_seed(classes)
    targets = torch.randint(classes, (TOKENS,), generator=g).index_fill(0, torch.tensor([3, 30]), -100)
    inputs = {"h": torch.randn(TOKENS, DIM, generator=g).double(), "w": torch.randn(classes, DIM, generator=g).double()}
    settings = {"reduction": reduction, "backend": backend, "chunk": 20}
    got = run(lambda h, w: linear_cross_entropy(h, w, targets, **settings), inputs, torch.float32)
    compare(got, run(lambda h, w: F.cross_entropy(h @ w.T, targets, reduction=reduction), inputs), 2e-6)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_bad_rows_stay_alone(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """NaN and infinities go where they go in torch's cross-entropy; other tokens do not see them. All ways to compute
    it; the compiled one takes part where there is a compiler."""
    if backend == "auto":
        monkeypatch.setattr("moe_kernels.native.dense.SMALL", 0)
    h, w = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.eye(4).repeat(10, 1)[:37]
    for row, value in enumerate((float("nan"), float("inf"), -float("inf"), 3e38)):
        h[row, 1] = value
    w = w.masked_fill(w == 0, 1e-30)  # no 0 times infinity
    h[4] = -float("inf")  # all logits are
    targets = torch.arange(6)
    got, want = (t.clone().requires_grad_() for t in (h, h))
    loss = linear_cross_entropy(got, w, targets, reduction="none", backend=backend)
    exact = F.cross_entropy(want @ w.T, targets, reduction="none")
    torch.testing.assert_close(loss, exact, equal_nan=True)
    loss[[3, 5]].sum().backward()
    exact[[3, 5]].sum().backward()
    torch.testing.assert_close(got.grad[[3, 5]], want.grad[[3, 5]])


def test_bf16_computes_softmax_in_float32() -> None:
    """From the same bf16 inputs the loss is float32 and within 0.5% of float64's; gradients are bf16, within 2%."""
    h, w, targets = head(0.3, torch.bfloat16)
    got = linear_cross_entropy(h, w, targets, chunk=16)
    h64, w64 = (t.detach().double().requires_grad_() for t in (h, w))
    want = F.cross_entropy(h64 @ w64.T, targets, reduction="sum")
    assert got.dtype == torch.float32 and abs(got.item() / want.item() - 1) < 5e-3
    for a, b in zip(torch.autograd.grad(got, (h, w)), torch.autograd.grad(want, (h64, w64)), strict=True):
        assert a.dtype == torch.bfloat16 and (a.double() - b).norm() < 0.02 * b.norm()


def in_parts(n: int, run: Callable[[int, Callable[[Tensor], Tensor]], list[Tensor]]) -> list[list[Tensor]]:
    """``run(i, gather)`` for each part i of n, in threads that meet in ``gather``."""
    sent: dict[int, Tensor] = {}
    meeting = threading.Barrier(n, timeout=20)

    def one(i: int) -> list[Tensor]:
        def gather(x: Tensor) -> Tensor:
            sent[i] = x
            meeting.wait()
            everyone = torch.stack([sent[j] for j in range(n)])
            meeting.wait()
            return everyone

        return run(i, gather)

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(one, range(n)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize(("n", "chunk"), [(2, 7), (3, 50), (VOCAB, 16)])
def test_parts_of_the_vocabulary_add_up(
    monkeypatch: pytest.MonkeyPatch, n: int, chunk: int, reduction: str, dtype: torch.dtype
) -> None:
    """Also with unequal parts, parts of one class, and logits in several blocks. Gradients of weights are complete."""
    monkeypatch.setattr("moe_kernels.loss_softmax.BLOCK_LOGITS", 60)
    h, w, targets = head(0.3, dtype)
    owner_T = torch.arange(TOKENS) * n // TOKENS
    above = torch.linspace(0.5, 2.0, TOKENS, dtype=torch.float64) if reduction == "none" else torch.tensor(0.7).double()
    starts = [i * VOCAB // n for i in range(n + 1)]

    def run(i: int, gather: Callable[[Tensor], Tensor]) -> list[Tensor]:
        own_h, own_w = h.detach().requires_grad_(), w.detach()[starts[i] : starts[i + 1]].requires_grad_()
        part = VocabularyPart(starts[i], VOCAB, owner_T == i, gather)
        loss = linear_cross_entropy(own_h, own_w, targets, chunk=chunk, reduction=reduction, part=part)
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        if reduction == "none":
            assert not loss[owner_T != i].any()
        return [loss.detach(), *torch.autograd.grad(loss, (own_h, own_w), above.to(loss.dtype))]

    losses, grads_h, grads_w = zip(*in_parts(n, run), strict=True)
    h64, w64 = (t.detach().double().requires_grad_() for t in (h, w))
    want = F.cross_entropy(h64 @ w64.T, targets, reduction=reduction)
    want_h, want_w = torch.autograd.grad(want, (h64, w64), above)
    for got, exact in ((sum(losses), want), (sum(g.double() for g in grads_h), want_h), (torch.cat(grads_w), want_w)):
        assert (got.double() - exact).norm() < (1e-12 if dtype == torch.float64 else 0.02) * exact.norm()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_second_derivative_is_refused(reduction: str) -> None:
    h, w, targets = head(0.3)
    refused_twice(lambda h: linear_cross_entropy(h, w, targets, reduction=reduction), h.detach())


def test_huge_logits_do_not_overflow() -> None:
    h, w, targets = head(0.0)
    got = linear_cross_entropy(h.float() * 1e4, w.float(), targets)
    torch.testing.assert_close(got, F.cross_entropy(1e4 * h @ w.T, targets, reduction="sum").float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_frozen_inputs_and_evaluation(needs: tuple[bool, bool]) -> None:
    h, w, targets = head(0.3)
    want = F.cross_entropy(h @ w.T, targets, reduction="sum")
    wants = torch.autograd.grad(want, (h, w))
    a, b = (t.detach().requires_grad_(need) for t, need in zip((h, w), needs, strict=True))
    got = linear_cross_entropy(a, b, targets)
    assert got.requires_grad == any(needs)
    if any(needs):
        got.backward()
    for t, need, grad in zip((a, b), needs, wants, strict=True):
        assert (t.grad is not None) == need and (t.grad is None or torch.allclose(t.grad, grad))
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(h, w, targets), want)


def test_full_logits_never_exist() -> None:
    """No tensor larger than a chunk of logits is made or kept."""
    h, w, targets = head(0.0)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest] + [t.numel() for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t)])
            return out

    with Watch():
        linear_cross_entropy(h, w, targets, chunk=5).backward()
    assert largest <= max(TOKENS * DIM, VOCAB * DIM, 5 * VOCAB)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_autocast_changes_nothing(reduction: str) -> None:
    """Of several chunks, the sum of the weights' gradient was begun in bfloat16, and could not go on."""

    def run() -> list[torch.Tensor]:
        h, w, targets = head(0.0)
        leaves = [h.float().detach().requires_grad_(), w.float().detach().requires_grad_()]
        loss = linear_cross_entropy(*leaves, targets, chunk=TOKENS // 3, reduction=reduction)
        return [loss, *torch.autograd.grad(loss.sum(), leaves)]

    want = run()
    with torch.autocast("cpu", torch.bfloat16):
        got = run()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"reduction": "mean"}, "reduction is 'sum' or 'none', not 'mean'"),
        ({"chunk": 0}, "chunk is at least 1 token"),
        ({"backend": "cuda"}, "linear_cross_entropy has no backend 'cuda'; known: auto, torch, triton"),
        ({"backend": "triton"}, "linear_cross_entropy cannot run on backend 'triton'.*; use 'auto' or 'torch'"),
        ({"h_TD": torch.zeros(3, 4)}, "needs h .T, D., w .V, D. and targets .T,."),
        ({"targets_T": torch.zeros(3, dtype=torch.int64)}, "targets"),
        ({"w_VD": torch.zeros(VOCAB, DIM)}, "needs one dtype"),
        ({"w_VD": torch.zeros(0, DIM)}, "V > 0"),
        ({"w_VD": torch.zeros(VOCAB, DIM, dtype=torch.float64, device="meta")}, "tensors are on cpu and on meta"),
        ({"targets_T": torch.zeros(TOKENS, dtype=torch.int32)}, "targets are int64, not torch.int32"),
        ({"targets_T": torch.full((TOKENS,), VOCAB)}, "targets must be class numbers below 37 or -100; one is"),
        ({"targets_T": torch.full((TOKENS,), -1)}, "targets must be class numbers below 37 or -100; one is"),
    ],
)
def test_inputs_that_do_not_fit(change: dict, complaint: str) -> None:
    h, w, targets = head(0.0)
    with pytest.raises(ValueError, match=complaint) as error:
        linear_cross_entropy(**{"h_TD": h, "w_VD": w, "targets_T": targets, **change})
    assert "\n" not in str(error.value)


def test_token_counts() -> None:
    ids = torch.tensor([[3, 0, 0], [2, 7, -1]])
    counts = token_counts(ids, 4)
    assert counts.tolist() == [2, 0, 1, 1] and counts.dtype == torch.int64
    assert token_counts(torch.empty(0, dtype=torch.int64), 3).tolist() == [0, 0, 0]
