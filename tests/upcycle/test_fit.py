"""Routers fitted to a dense layer: what is wanted, that the fit is the best there is, and that it lowers the loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from moetrain.config.errors import ConfigError
from moetrain.convert.source import Held
from moetrain.data.sources import resolve
from moetrain.data.tokenizer import ids_of, load_tokenizer
from moetrain.moe.mlp import MLP
from moetrain.upcycle.fit import Parts, fit_rows, picked, wanted_experts
from moetrain.upcycle.measure import build, loss
from moetrain.upcycle.method import Model
from tests.upcycle.conftest import save_dense
from tests.upcycle.theirs import apply, read_parent, saved


def test_wanted_experts_by_hand() -> None:
    """Of 3 experts beside a shared part, for each token: the two that come nearest to what that part leaves out."""
    torch.manual_seed(0)
    mlp = MLP(6, 10, "swiglu").double().requires_grad_(False)
    parts = Parts(torch.tensor([[0, 4], [1, 5], [2, 8]]), torch.tensor([3, 9]))
    x = torch.randn(12, 6, dtype=torch.float64)
    found = wanted_experts(mlp, x, parts, 2)
    for t in range(12):
        h = torch.nn.functional.silu(mlp.w_gate.weight @ x[t]) * (mlp.w_up.weight @ x[t])

        def of(dimensions: list[int], h: Tensor = h) -> Tensor:
            return sum(h[f] * mlp.w_down.weight[:, f] for f in dimensions)  # type: ignore[return-value]

        target = of(list(range(10))) - of([3, 9])
        away = [float((of(e) - target).norm()) for e in parts.members_EF.tolist()]
        assert set(found[t].tolist()) == set(sorted(range(3), key=lambda e: away[e])[:2])


def test_the_fit_is_that_of_logistic_regression() -> None:
    """One wanted expert per token: scikit-learn's multinomial regression with the same prior gives the same chances."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 5, generator=generator) * 3
    wanted = (x @ torch.randn(5, 4, generator=generator) + torch.randn(300, 4, generator=generator)).argmax(1)
    rows = fit_rows(x, wanted[:, None], 4)
    unit = (x / x.square().mean().sqrt()).double()
    theirs = LogisticRegression(C=1 / 5, fit_intercept=False, tol=1e-9, max_iter=1000).fit(unit.numpy(), wanted.numpy())
    chances = torch.from_numpy(theirs.predict_proba(unit.numpy()))
    torch.testing.assert_close((unit @ rows.double().T).softmax(1), chances, rtol=1e-3, atol=1e-4)


def test_a_router_that_there_is_is_found_again() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 16, generator=generator)
    true = torch.randn(8, 16, generator=generator)
    wanted = (x @ true.T).topk(3).indices
    assert picked(true, x, wanted) == 1
    assert picked(fit_rows(x[:1500], wanted[:1500], 8), x[1500:], wanted[1500:]) > 0.9


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Tensor]:
    """(a small dense model, trained on most of the demo's documentation of Python; ids of the rest)."""
    folder = save_dense(tmp_path_factory.mktemp("trained") / "dense")
    parent = read_parent(folder)
    text = Path(resolve("moetrain:data/demo/docs.txt")).read_text()
    (numbers,) = ids_of(load_tokenizer(str(folder / "tokenizer.json")).tokenizer, [text[:300_000]])
    ids = torch.tensor(numbers[: len(numbers) // 64 * 64]).view(-1, 64)
    decoder = build(parent).train()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=5e-3)
    for step in range(200):
        part = ids[:-256].roll(-16 * step, 0)[:16]
        (decoder(part, torch.cat((part[:, 1:], torch.full((16, 1), -100)), 1))[0] / (16 * 63)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return Model(parent.cfg, Held(decoder.state_dict())), ids[-256:]


@pytest.mark.parametrize("by", ["order", "keys"])
def test_the_fitted_router_beats_the_others(by: str, trained: tuple[Model, Tensor]) -> None:
    """On text that neither the model nor the fit has seen."""
    parent, ids = trained
    losses, shares = {}, {}
    for router in ("fit", "keys", "random"):
        made = apply("split", [parent], ids=ids[:128], by=by, num_experts=5, top_k=2, router=router)
        losses[router] = loss(made.model, ids[128:])
        shares |= made.figures()
    assert shares["wanted_by_chance"] == pytest.approx(0.4)
    assert shares["wanted_by_fit"] > max(shares["wanted_by_keys"], 0.6)
    assert losses["fit"] < losses["keys"] and losses["fit"] < losses["random"], losses


def test_next_to_no_text_is_refused(tmp_path: Path) -> None:
    dense = saved("llama", tmp_path / "dense")
    with pytest.raises(ConfigError, match="64 tokens of text or more, and there are 20"):
        apply("split", [dense], ids=torch.arange(20)[None], router="fit", num_experts=4)


def test_where_tokens_get_every_expert_the_router_prefers_none(tmp_path: Path) -> None:
    """No fit is better than another: rows of zeros, so that the parts have even weights and are the dense layer."""
    dense = saved("llama", tmp_path / "dense")
    ids = torch.randint(0, 60, (2, 64), generator=torch.Generator().manual_seed(0))
    made = apply("split", [dense], ids=ids, router="fit", num_experts=4, top_k=4)
    assert loss(made.model, ids) == pytest.approx(loss(read_parent(dense), ids), rel=1e-5)
