"""Tensor parallelism against the one-process model: losses, logits and all gradients, in float64 within 1e-12."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from moetrain_launch.fork import run_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from moetrain.checkpoint.state import gather_state
from moetrain.comm.even import all_gather, all_gather_packed, all_reduce, reduce_scatter
from moetrain.config.errors import ConfigError
from moetrain.config.schema import AttentionConfig, ExpertsConfig, ModelConfig, MoEConfig, RopeConfig
from moetrain.model.decoder import Decoder
from moetrain.moe.balance import end_of_step
from moetrain.parallel import tensor
from moetrain.parallel.apply import initialize
from moetrain.parallel.fsdp import shard
from moetrain.train.step import clip_gradients

T = TypeVar("T")
B, N = 4, 16
BALANCE = {"z_loss": {"coef": 0.1}}
MLA = {"kind": "mla", "n_heads": 4, "kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 5}
# Each has a dense layer and MoE layers.
ATTENTIONS: dict[str, dict[str, Any]] = {
    "kv heads 2, biases, sinks, norm of heads, window": {
        "n_heads": 8,
        "n_kv_heads": 2,
        "head_dim": 4,
        "qkv_bias": True,
        "out_bias": True,
        "sinks": True,
        "qk_norm": "head",
        "sliding_window": 5,
        "sliding_layers": [1],
    },
    "kv heads 2, norm of all heads, clipped": {
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 4,
        "qk_norm": "full",
        "clip_qkv": 1.5,
    },
    "kv heads 4, norm of all heads": {"n_heads": 4, "n_kv_heads": 4, "head_dim": 4, "qk_norm": "full"},
    "2 experts, own keys": {
        "n_heads": 8,
        "n_kv_heads": 4,
        "head_dim": 4,
        "num_experts": 2,
        "sinks": True,
        "qkv_bias": True,
        "out_bias": True,
    },
    "2 experts, shared keys": {
        "n_heads": 8,
        "n_kv_heads": 2,
        "head_dim": 4,
        "num_experts": 2,
        "shared_kv": True,
        "qk_norm": "head",
    },
    "mla": MLA,
    "mla with a query latent": {**MLA, "q_lora_rank": 7},
}


def config(attention: str, tied: bool = False, **changes: Any) -> ModelConfig:
    moe = MoEConfig(num_experts=6, top_k=2, expert_dim=8, shared_dim=12, shared_gate=True, first_dense=1)
    sizes = {"vocab_size": 44, "dim": 20, "n_layers": 3, "dense_dim": 20, "tie_embeddings": tied, **changes}
    return ModelConfig(**sizes, attention=AttentionConfig(**ATTENTIONS[attention]), moe=moe)


def build(cfg: ModelConfig, dtype: torch.dtype = torch.float64) -> Decoder:
    """One process's model, with random values of order 1 also in norms, biases and sinks."""
    model = Decoder(cfg, BALANCE, ExpertsConfig(backend="loop")).to(dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.4, generator=generator)
    return model


def batch(cfg: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens_BN, targets_BN, weight_BN), the last for a sum of losses in which no two tokens count alike."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, cfg.vocab_size, (B, N), generator=generator)
    targets = tokens.roll(-1, 1)
    targets[torch.rand(B, N, generator=generator) < 0.2] = -100
    return tokens, targets, torch.rand(B, N, generator=generator, dtype=torch.float64)


def step(model: Decoder, cfg: ModelConfig, rows: slice, own: slice, reduction: str) -> dict[str, Tensor]:
    """Forward and backward on sequences ``rows``, of which stretch ``own`` is this rank's: shares of loss and terms."""
    tokens, targets, weight = (t[rows] for t in batch(cfg))
    loss, carry = model(tokens, targets, reduction=reduction)
    if reduction == "none":
        assert loss.shape == weight[:, own].shape
        loss = (loss * weight[:, own]).sum()
    ((loss + 0.1 * carry.aux_A.sum()) / targets.numel()).backward()
    return {"loss": loss.detach().double(), "aux": carry.aux_A.detach().sum().double()}


def same(got: Tensor, want: Tensor, what: str, tolerance: float = 1e-12) -> None:
    error = float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))
    assert error <= tolerance, f"{what}: relative error {error}"


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def stretch(mesh: Any) -> slice:
    n, rank = mesh.size(), mesh.get_local_rank()
    return slice(rank * N // n, (rank + 1) * N // n)


def split_equals_one_process(reference: Decoder, cfg: ModelConfig, reduction: str, recompute: str) -> None:
    """On every rank of a world that is tp."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    group, own = mesh.get_group(), stretch(mesh)
    model = copy.deepcopy(reference)
    tensor.split(model, mesh)
    for block in model.layers.values():
        block.recompute = recompute

    want = step(reference, cfg, slice(None), slice(None), reduction)
    for name, value in step(model, cfg, slice(None), own, reduction).items():
        same(all_reduce(value, group), want[name], name)
    tensor.sum_copies(tensor.copies(model), group)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert p.grad is not None and p.shape == q.shape, name
        if ".experts." in name:
            dist.all_reduce(p.grad, group=group)
        same(whole(p.grad), q.grad, f"gradient of {name}")
    loads, want_loads = end_of_step(model, group, 0).counts, end_of_step(reference, None, 0).counts
    assert {k: v.tolist() for k, v in loads.items()} == {k: v.tolist() for k, v in want_loads.items()}

    tokens, targets, _ = batch(cfg)
    with torch.no_grad():
        same(model(tokens)[0], reference(tokens)[0], "logits")
        losses, want_losses = (m(tokens, targets, reduction="none")[0] for m in (model, reference))
        same(losses, want_losses[:, own], "losses of the tokens")


def for_all(check: Callable[..., T], models: dict[str, tuple[Decoder, ModelConfig]], *args: Any) -> dict[str, T]:
    """``check`` of every model, one after the other on the same ranks: what torch learns once, it keeps."""
    found = {}
    for name, (model, cfg) in models.items():
        try:
            found[name] = check(model, cfg, *args)
        except Exception as error:
            error.add_note(f"attention: {name}")
            raise
    return found


@pytest.mark.parametrize(
    ("tp", "tied", "reduction", "recompute"),
    [(2, True, "sum", "none"), (2, False, "none", "full"), (4, True, "none", "selective"), (4, False, "sum", "none")],
)
def test_split_equals_one_process(tp: int, tied: bool, reduction: str, recompute: str) -> None:
    models = {name: (build(cfg), cfg) for name in ATTENTIONS for cfg in [config(name, tied)]}
    run_ranks(tp, for_all, split_equals_one_process, models, reduction, recompute, timeout=300)


@pytest.mark.parametrize(
    ("changes", "recompute"),
    [
        ({"norm_place": "post"}, "selective"),
        ({"parallel_block": True}, "full"),
        ({"rope": RopeConfig(fraction=0.5)}, "none"),
        ({"activation": "relu2", "norm_offset": 1.0}, "selective"),
        ({"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "logits_divisor": 2.0}, "full"),
    ],
)
def test_options_of_blocks_split_alike(changes: dict[str, Any], recompute: str) -> None:
    cfg = config("kv heads 2, norm of all heads, clipped", **changes)
    run_ranks(2, split_equals_one_process, build(cfg), cfg, "none", recompute)


def parts_equal_the_whole(reference: Decoder, cfg: ModelConfig) -> None:
    """The stages of a pipeline, one after the other: each is split by itself, and a shared table is in both."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    group, (tokens, targets, _) = mesh.get_group(), batch(cfg)
    parts = [
        Decoder(cfg, BALANCE, ExpertsConfig(backend="loop"), layers, first=first, last=not first).double()
        for layers, first in (((0, 1), True), ((), False), ((2,), False))
    ]
    parts[1].norm = parts[1].head = parts[1].embed = None  # a stage in the middle
    grads: dict[str, Tensor] = {}
    for part in parts:
        part.load_state_dict({k: v for k, v in reference.state_dict().items() if k in part.state_dict()})
        tensor.split(part, mesh)
    x = parts[0].embedded(tokens)
    carry = parts[0].first_carry(x)
    for part in parts:
        x, carry = part.forward_layers(x, carry, part.places(x, N))
    loss = parts[-1].output(x, targets)
    loss.backward()
    want, _ = reference(tokens, targets)
    want.backward()
    same(all_reduce(loss.detach(), group), want.detach(), "loss")
    for part in parts:
        tensor.sum_copies(tensor.copies(part), group)
        for name, p in part.named_parameters():
            if ".experts." not in name:
                grads[name] = grads.get(name, 0) + whole(p.grad)
    for name, q in reference.named_parameters():
        if ".experts." not in name:
            same(grads.pop(name), q.grad, f"gradient of {name}")
    assert not grads


@pytest.mark.parametrize("tied", [True, False])
def test_parts_of_a_pipeline(tied: bool) -> None:
    cfg = config("mla", tied)
    run_ranks(2, parts_equal_the_whole, build(cfg), cfg)


def half_precision_runs(reference: Decoder, cfg: ModelConfig) -> tuple[float, float]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = copy.deepcopy(reference)
    tensor.split(model, mesh)
    values = step(model, cfg, slice(None), stretch(mesh), "sum")
    tensor.sum_copies(tensor.copies(model), mesh.get_group())
    assert all(p.grad.dtype == p.dtype and whole(p.grad).isfinite().all() for p in model.parameters())
    assert model(batch(cfg)[0])[0].dtype == reference.norm.weight.dtype  # type: ignore[union-attr]
    return float(all_reduce(values["loss"], mesh.get_group())), float(
        step(reference, cfg, slice(None), slice(None), "sum")["loss"]
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_other_precisions(dtype: torch.dtype, tolerance: float) -> None:
    models = {name: (build(cfg, dtype), cfg) for name in ATTENTIONS for cfg in [config(name)]}
    for rank in run_ranks(2, for_all, half_precision_runs, models, timeout=300):
        for name, (got, want) in rank.items():
            assert got == pytest.approx(want, rel=tolerance), name


# FSDP's shards do not all divide evenly: 11 rows of the tables, 5 inner features, on 2 ranks.
UNEVEN = {"vocab_size": 22, "dense_dim": 10}


def sharded(cfg: ModelConfig, dtype: torch.dtype, source: Decoder | None) -> tuple[Decoder, Any]:
    """Split over tp, then FSDP over dp x cp, experts over all ranks; with the values of ``source`` or on meta."""
    dense = init_device_mesh("cpu", (2, 1, dist.get_world_size() // 2), mesh_dim_names=("dp_shard", "cp", "tp"))
    data = dense["dp_shard", "cp"]._flatten("dp_shard_cp")
    experts = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("edp",))
    if source is None:
        with torch.device("meta"):
            model = Decoder(cfg, BALANCE, ExpertsConfig(backend="loop")).to(dtype)
    else:
        model = copy.deepcopy(source)
    tensor.split(model, dense["tp"])
    shard(model, data, experts, "float64" if dtype == torch.float64 else "float32")
    return model, dense


def fsdp_equals_one_process(reference: Decoder, cfg: ModelConfig) -> None:
    model, mesh = sharded(cfg, torch.float64, reference)
    rank = mesh["dp_shard"].get_local_rank()
    want = step(reference, cfg, slice(None), slice(None), "sum")
    total = dict.fromkeys(want, torch.zeros((), dtype=torch.float64))
    for i in range(2):  # two micro-batches, reduced once
        model.set_requires_gradient_sync(i == 1)  # type: ignore[operator]
        rows = slice(2 * rank + i, 2 * rank + i + 1)
        got = step(model, cfg, rows, stretch(mesh["tp"]), "sum")
        total = {name: total[name] + value for name, value in got.items()}
    for name, value in total.items():
        dist.all_reduce(value)
        same(value, want[name], name)
    tensor.sum_copies(tensor.copies(model), mesh["tp"].get_group())
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert p.grad is not None
        # each micro-batch was divided by its own size, a quarter of the whole
        same(whole(p.grad) / 4, q.grad, f"gradient of {name}")
    ranks = dist.get_world_size()
    assert clip_gradients(model, 0.0, ranks) == pytest.approx(4 * clip_gradients(reference, 0.0, ranks), rel=1e-12)


@pytest.mark.parametrize("attention", ["kv heads 2, norm of all heads, clipped", "mla with a query latent"])
@pytest.mark.parametrize("tp", [2, 4])
def test_with_fsdp(attention: str, tp: int) -> None:
    cfg = config(attention, **(UNEVEN if tp == 2 else {}))
    run_ranks(2 * tp, fsdp_equals_one_process, build(cfg), cfg)


def initial_values_and_checkpoints(reference: Decoder, cfg: ModelConfig, folder: Path) -> None:
    model, _ = sharded(cfg, torch.float64, None)
    model.to_empty(device="cpu")
    initialize(model, cfg, seed=5)
    initialize(reference, cfg, seed=5)
    for (name, p), q in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert (name, p.shape) == (q[0], q[1].shape)
        assert torch.equal(whole(p), q[1]), name
    optimizers = [torch.optim.AdamW(m.parameters()) for m in (model, reference)]
    for m, optimizer in zip((model, reference), optimizers, strict=True):
        for p in m.parameters():
            p.grad = torch.ones_like(p) * 0.5
        optimizer.step()
    dcp.save(_tensors(model, optimizers[0]), checkpoint_id=folder / "split")
    if dist.get_rank() == 0:
        dcp.save(_tensors(reference, optimizers[1]), checkpoint_id=folder / "whole", no_dist=True)
    dist.barrier()
    for source in ("whole", "split"):
        for m, optimizer in zip((model, reference), optimizers, strict=True):
            state = _tensors(m, optimizer)
            want = {k: whole(v).clone() for k, v in state.items()}
            for v in state.values():
                v.detach().zero_()
            dcp.load(state, checkpoint_id=folder / source, no_dist=m is reference)
            for k, v in state.items():
                assert torch.equal(whole(v), want[k]), f"{k} loaded from the {source} model"


def _tensors(model: Decoder, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = gather_state(model, optimizer, {})
    return {**state["model"], **state["optim"]}


@pytest.mark.parametrize("changes", [{}, UNEVEN], ids=["even", "uneven"])
def test_initial_values_and_checkpoints_do_not_depend_on_the_mapping(changes: dict, tmp_path: Path) -> None:
    cfg = config("kv heads 2, norm of all heads, clipped", **changes)
    run_ranks(4, initial_values_and_checkpoints, build(cfg), cfg, tmp_path)


def collectives() -> None:
    rank, n = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    assert group is not None
    everyone = [torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(r)).double() for r in range(n)]
    x = everyone[rank].clone().requires_grad_()
    for dim in range(3):
        y = all_gather(x, group, dim)
        assert torch.equal(y, torch.cat(everyone, dim))
        weight = torch.arange(y.numel(), dtype=torch.float64).view_as(y)
        (grad,) = torch.autograd.grad((y * weight * (rank + 1)).sum(), x)
        assert torch.equal(grad, weight.chunk(n, dim)[rank] * sum(range(1, n + 1)))
        big = torch.cat(everyone, dim).requires_grad_()
        z = reduce_scatter(big * (rank + 1), group, dim)
        same(z, everyone[rank] * sum(range(1, n + 1)), "reduce_scatter")
        (grad,) = torch.autograd.grad((z * x.detach()).sum(), big)
        assert torch.equal(grad, torch.cat(everyone, dim) * (rank + 1))
    packed = all_gather_packed((x, 2 * x[..., :1]), group, 1)
    assert torch.equal(packed[0], torch.cat(everyone, 1)) and torch.equal(packed[1], 2 * packed[0][..., :1])
    with pytest.raises(ValueError, match=r"cannot cut 3 \(dimension 1\) in 2 equal parts"):
        reduce_scatter(x, group, 1)


def test_collectives() -> None:
    run_ranks(2, collectives)


def refuses(cfg: ModelConfig, message: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    with torch.device("meta"):
        model = Decoder(cfg, {}, ExpertsConfig())
    with pytest.raises(ConfigError, match=message) as error:
        tensor.split(model, mesh)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tp", "change", "message"),
    [
        (3, {}, "parallel.tp=3 must divide model.attention.n_heads=4"),
        (2, {"dense_dim": 15}, r"parallel.tp=2 must divide .* weight of shape \(15, 20\)"),
        (4, {"vocab_size": 42}, r"parallel.tp=4 must divide .* Embedding has a weight of shape \(42, 20\)"),
        (4, {"heads": (12, 6)}, "parallel.tp=4 must divide model.attention.n_kv_heads=6 or be a multiple of it"),
    ],
)
def test_sizes_that_do_not_divide(tp: int, change: dict, message: str) -> None:
    change = dict(change)
    heads = change.pop("heads", (4, 4))
    cfg = config("kv heads 4, norm of all heads", **change)
    cfg.attention.n_heads, cfg.attention.n_kv_heads = heads
    run_ranks(tp, refuses, cfg, message)
