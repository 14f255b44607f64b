"""Muon: every hidden matrix and slice of an expert weight gets torch.optim.Muon's update, however it is sharded."""

from __future__ import annotations

import pytest
import torch
from moetrain_launch.fork import run_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moetrain.optim import build_optimizer
from moetrain.optim.groups import role_of
from moetrain.optim.optimizers.muon import MuonOptions
from moetrain.optim.orthogonal import newton_schulz
from tests.optim.toy import loss_and_gradients, toy, train, values

MATRICES = {"wq.weight", "wo.weight", "experts.w13", "experts.w2"}


def is_matrix(name: str) -> bool:
    return any(name.endswith(end) for end in MATRICES)


def slices(x: Tensor) -> list[Tensor]:
    return list(x.reshape(-1, *x.shape[-2:]).unbind())


def test_newton_schulz_maps_singular_values_by_the_published_quintic() -> None:
    x = torch.randn(3, 2, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(newton_schulz(x, torch.float64), u @ torch.diag_embed(s) @ v, rtol=0, atol=1e-11)
    torch.testing.assert_close(newton_schulz(x.mT, torch.float64), newton_schulz(x, torch.float64).mT)
    assert newton_schulz(torch.zeros(2, 3, 4), torch.float32).count_nonzero() == 0


@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
def test_every_slice_moves_as_under_torch_muon_and_the_rest_as_under_torch_adamw(adjust_lr: str) -> None:
    model = toy(dtype=torch.float32)
    options = MuonOptions(lr=0.02, adamw_lr=0.03, weight_decay=0.1, adjust_lr=adjust_lr, ns_dtype="bfloat16")
    optimizer = build_optimizer(options, model)
    start = values(model)
    matrices = {n: [torch.nn.Parameter(m.clone()) for m in slices(w)] for n, w in start.items() if is_matrix(n)}
    rest = {n: torch.nn.Parameter(w.clone()) for n, w in start.items() if not is_matrix(n)}
    muon = torch.optim.Muon(
        [m for ms in matrices.values() for m in ms], lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust_lr
    )
    still = [p for n, p in rest.items() if "norm" in n or "bias" in n or n.endswith("b2")]
    decaying = [p for p in rest.values() if all(p is not s for s in still)]
    adamw = torch.optim.AdamW(
        [{"params": decaying}, {"params": still, "weight_decay": 0.0}], lr=0.03, betas=(0.9, 0.95), weight_decay=0.1
    )
    for step in range(4):
        loss_and_gradients(model, step)
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        for n, parts in matrices.items():
            for part, g in zip(parts, slices(gradients[n]), strict=True):
                part.grad = g.clone()
        for n, p in rest.items():
            p.grad = gradients[n]
        for o in (optimizer, muon, adamw):
            o.step()
    assert len(matrices) == 3 * len(MATRICES)
    for n, w in values(model).items():
        if n in matrices:
            # torch runs the iteration in bfloat16; one unit of its last place in a direction is 0.004 of an update
            for ours, theirs in zip(slices(w), matrices[n], strict=True):
                torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=2e-3 * options.lr * 4)
        else:
            torch.testing.assert_close(w, rest[n].detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("ep", "edp"), [(2, 1), (1, 2), (2, 2), (4, 1)])
@pytest.mark.parametrize("batch_elements", [2**27, 1], ids=["at once", "piece by piece"])
def test_sharded_equals_whole(ep: int, edp: int, batch_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """float64, 6 steps. The toy's matrices have 5 and 6 rows, so that shards over 2 and 4 ranks are uneven."""
    monkeypatch.setattr("moetrain.optim.orthogonal.BATCH_ELEMENTS", batch_elements)

    def run(ep: int, edp: int) -> tuple[list[float], dict[str, Tensor]]:
        model = toy(ep, edp)
        optimizer = build_optimizer(MuonOptions(lr=0.02, weight_decay=0.1), model)
        return train(model, optimizer, range(6)), values(model)

    losses, whole = run(0, 1)
    assert losses[-1] != losses[0]
    for sharded_losses, sharded in run_ranks(ep * edp, run, ep, edp):
        assert sharded_losses == pytest.approx(losses, rel=1e-12)
        for name, value in whole.items():
            torch.testing.assert_close(sharded[name], value, rtol=1e-9, atol=1e-11, msg=name)


def test_matrices_split_twice_are_gathered() -> None:
    """As tensor parallelism and FSDP together split them: both on the same dimension (strided), or one on each."""

    def run(sharded: bool) -> list[Tensor]:
        model = torch.nn.Sequential(torch.nn.Linear(6, 8, bias=False), torch.nn.Linear(8, 6, bias=False)).double()
        for i, linear in enumerate(model):
            linear.weight.data = torch.randn(
                linear.weight.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64
            )
        gradients = [p.detach() ** 2 for p in model.parameters()]
        if sharded:
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
            for i, linear in enumerate(model):
                linear.weight = torch.nn.Parameter(distribute_tensor(linear.weight.data, mesh["tp"], [Shard(i)]))
            fully_shard(model, mesh=mesh["dp"])
        optimizer = build_optimizer(MuonOptions(lr=0.1), model)
        for p, g in zip(model.parameters(), gradients, strict=True):
            if sharded:
                assert isinstance(p, DTensor)
                local = p.detach().to_local() ** 2
                g = DTensor.from_local(local, mesh, p.placements, shape=p.shape, stride=p.stride())
            p.grad = g
        optimizer.step()
        return [p.detach().full_tensor() if sharded else p.detach() for p in model.parameters()]

    whole = run(False)
    for sharded in run_ranks(4, run, True):
        for a, b in zip(whole, sharded, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_roles() -> None:
    model = toy()
    roles = {name: role_of(name, p) for name, p in model.named_parameters()}
    assert {n for n, r in roles.items() if r == "matrix"} == {n for n in roles if is_matrix(n)}
    assert roles["embed.weight"] == "embedding" and roles["head.weight"] == "head"
    assert roles["layers.0.router.weight"] == roles["layers.0.shared_gate.weight"] == "router"
    assert {roles[n] for n in ("layers.0.experts.b2", "layers.0.wq.bias", "norm.weight")} == {"vector"}
