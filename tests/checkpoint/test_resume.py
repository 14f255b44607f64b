"""A run that is resumed goes on as if it had never stopped: bitwise in the same mapping, to rounding in another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from moetrain_launch.fork import run_ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moetrain.checkpoint import Checkpointer, apply_state, gather_state, load, newest, seed_step
from moetrain.checkpoint.state import to_cpu
from moetrain.config.errors import CheckpointError
from moetrain.optim import build_optimizer
from moetrain.optim.optimizers.adamw import AdamWOptions
from moetrain.optim.optimizers.muon import MuonOptions
from tests.optim.toy import Toy, toy, train, values

OPTIONS = [AdamWOptions(lr=0.02), MuonOptions(lr=0.02, adamw_lr=0.01)]
IDS = ["adamw", "muon"]


def language_model() -> nn.Module:
    torch.manual_seed(0)
    embed, head = nn.Embedding(13, 8), nn.Linear(8, 13, bias=False)
    model = nn.Sequential()
    model.add_module("embed", embed)
    model.add_module("hidden", nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Dropout(0.2), nn.Linear(12, 8)))
    model.add_module("norm", nn.RMSNorm(8))
    model.add_module("head", head)
    return model


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, which: range) -> list[float]:
    """Real training with dropout: the loss of each step. Data is drawn from the step's generator too."""
    losses = []
    for step in which:
        seed_step(7, step, 0)
        x = torch.randint(13, (16, 5))
        loss = nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def resume(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    path = newest(folder)
    assert path is not None
    state = gather_state(model, optimizer, {})
    load(path, state)
    return apply_state(model, optimizer, state)


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
@pytest.mark.parametrize("asynchronous", [True, False])
def test_losses_continue_bit_for_bit(options: Any, asynchronous: bool, tmp_path: Path) -> None:
    model = language_model()
    optimizer = build_optimizer(options, model)
    checkpointer = Checkpointer(tmp_path, 2, asynchronous)
    steps(model, optimizer, range(5))
    progress = {"step": 5, "tokens": 10**12, "by_domain": {"a": 1.5}, "bias_E": torch.arange(3), "note": None}
    checkpointer.save(5, gather_state(model, optimizer, progress))
    expected = steps(model, optimizer, range(5, 12))  # while the save is under way
    checkpointer.wait()
    assert checkpointer.failed == [] and checkpointer.last_good() == str(tmp_path / "step-5")

    model = language_model()
    optimizer = build_optimizer(options, model)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    found = resume(tmp_path, model, optimizer)
    assert torch.equal(found.pop("bias_E"), progress.pop("bias_E"))  # type: ignore[arg-type]
    assert found == progress
    assert steps(model, optimizer, range(5, 12)) == expected


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
@pytest.mark.parametrize(
    ("saved", "loaded"),
    [((2, 1), (0, 1)), ((1, 2), (0, 1)), ((0, 1), (2, 2)), ((2, 1), (1, 2)), ((2, 2), (2, 1))],
    ids=lambda m: f"ep{m[0]}-edp{m[1]}" if m[0] else "whole",
)
def test_checkpoints_move_between_mappings(
    options: Any, saved: tuple[int, int], loaded: tuple[int, int], tmp_path: Path
) -> None:
    """Experts over ep x edp ranks, the rest over all (FSDP2, uneven and empty shards), or one process without group."""
    model = toy()
    optimizer = build_optimizer(options, model)
    expected = train(model, optimizer, range(6))
    final = values(model)

    def first() -> None:
        model = toy(*saved)
        for i, block in enumerate(model.layers.values()):
            block.router.bias_E.fill_(i + 0.5)
        optimizer = build_optimizer(options, model)
        train(model, optimizer, range(3))
        checkpointer = Checkpointer(tmp_path, 2, True)
        # The first rank's progress is what counts
        checkpointer.save(3, gather_state(model, optimizer, {"step": 3, "rank": dist.get_rank() if saved[0] else 0}))
        for p in model.parameters():  # the save has its own copy
            (p.to_local() if isinstance(p, DTensor) else p).detach().fill_(float("nan"))
        checkpointer.wait()
        assert checkpointer.failed == []

    def second() -> tuple[list[float], dict[str, Tensor], dict[str, Any], list[Tensor]]:
        model = toy(*loaded)
        optimizer = build_optimizer(options, model)
        progress = resume(tmp_path, model, optimizer)
        biases = [block.router.bias_E for block in model.layers.values()]
        return train(model, optimizer, range(3, 6)), values(model), progress, biases

    on(saved, first)
    for losses, parameters, progress, biases in on(loaded, second):
        assert progress == {"step": 3, "rank": 0}
        assert [b[0].item() for b in biases] == [0.5, 1.5, 2.5]
        assert losses == pytest.approx(expected[3:], rel=1e-12)
        for name, p in parameters.items():
            torch.testing.assert_close(p, final[name], rtol=1e-9, atol=1e-11, msg=name)


def on(mapping: tuple[int, int], run: Any) -> list[Any]:
    return run_ranks(mapping[0] * mapping[1], run) if mapping[0] else [run()]


def test_ranks_with_other_layers_each(tmp_path: Path) -> None:
    """As pipeline stages have: each rank saves and loads the names that it holds, under names of the whole model."""

    def stage() -> nn.Module:
        model = toy()
        for i in {0, 1, 2} - ({0, 2} if dist.get_rank() == 0 else {1}):
            del model.layers[str(i)]
        return model

    def save_stage() -> None:
        model = stage()
        optimizer = build_optimizer(AdamWOptions(lr=0.02), model)
        train(model, optimizer, range(3))
        checkpointer = Checkpointer(tmp_path, 1, True)
        checkpointer.save(3, gather_state(model, optimizer, {"step": 3}))
        checkpointer.wait()

    def load_stage() -> dict[str, Tensor]:
        model = stage()
        optimizer = build_optimizer(AdamWOptions(lr=0.02), model)
        assert resume(tmp_path, model, optimizer) == {"step": 3}
        train(model, optimizer, range(3, 4))
        return values(model)

    run_ranks(2, save_stage)
    model = toy()
    optimizer = build_optimizer(AdamWOptions(lr=0.02), model)
    train(model, optimizer, range(4))
    expected = values(model)
    model = toy()
    optimizer = build_optimizer(AdamWOptions(lr=0.02), model)
    resume(tmp_path, model, optimizer)
    train(model, optimizer, range(3, 4))
    stages = run_ranks(2, load_stage)
    assert {n for names in stages for n in names} == set(expected)
    for found in (values(model), *stages):
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_hyperparameters_come_from_the_config(tmp_path: Path) -> None:
    model = toy()
    optimizer = build_optimizer(AdamWOptions(lr=0.5, weight_decay=0.3), model)
    train(model, optimizer, range(1))
    Checkpointer(tmp_path, 1, False).save(1, gather_state(model, optimizer, {}))
    optimizer = build_optimizer(AdamWOptions(lr=0.25, weight_decay=0.1), model)
    resume(tmp_path, model, optimizer)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.25, 0.1), (0.25, 0.0)]
    assert {int(s["step"]) for s in optimizer.state.values()} == {1}


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_a_checkpoint_of_step_0_changes_nothing(options: Any, tmp_path: Path) -> None:
    """Before the first step an optimizer has no state; saving makes it, and must not count it as a step."""
    model = toy()
    expected = train(model, build_optimizer(options, model), range(3))
    model = toy()
    optimizer = build_optimizer(options, model)
    Checkpointer(tmp_path, 1, False).save(0, gather_state(model, optimizer, {}))
    assert train(model, optimizer, range(3)) == expected
    model = toy()
    optimizer = build_optimizer(options, model)
    resume(tmp_path, model, optimizer)
    assert train(model, optimizer, range(3)) == expected


def test_a_parameter_that_never_had_a_gradient(tmp_path: Path) -> None:
    """Its optimizer state does not exist, on disk neither; it resumes as zero."""
    model = toy()
    optimizer = build_optimizer(AdamWOptions(), model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.head.weight.grad = None
    optimizer.step()
    optimizer.zero_grad()
    Checkpointer(tmp_path, 1, False).save(1, gather_state(model, optimizer, {}))
    model = toy()
    optimizer = build_optimizer(AdamWOptions(), model)
    resume(tmp_path, model, optimizer)
    assert int(optimizer.state[model.head.weight]["step"]) == 0
    assert int(optimizer.state[model.embed.weight]["step"]) == 1


def test_another_model_or_optimizer_is_refused_by_name(tmp_path: Path) -> None:
    model = toy()
    optimizer = build_optimizer(AdamWOptions(), model)
    train(model, optimizer, range(1))
    checkpointer = Checkpointer(tmp_path, 1, False)
    checkpointer.save(1, gather_state(model, optimizer, {}))
    path = checkpointer.newest()
    assert path is not None

    def refusal(model: nn.Module, options: Any) -> str:
        before = {n: p.clone() for n, p in model.named_parameters()}
        state = gather_state(model, build_optimizer(options, model), {})
        with pytest.raises(CheckpointError) as error:
            load(path, state)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        message = str(error.value)
        assert "\n" not in message and str(path) in message
        return message

    assert "it lacks model.layers.3.norm.weight" in refusal(Toy(4), AdamWOptions())
    assert "model.layers.2.experts.b2 is not in this model" in refusal(Toy(2), AdamWOptions())
    wider = Toy()
    wider.embed = nn.Embedding(12, 6)
    assert "model.embed.weight has shape (11, 6) there and (12, 6) here" in refusal(wider, AdamWOptions())
    assert "it lacks optim.state.layers.0.wq.weight.momentum_buffer" in refusal(Toy(), MuonOptions())

    def of_ranks() -> str:
        model = toy(2, 1)
        if dist.get_rank() == 1:  # only one rank sees the difference; all must refuse
            model.register_buffer("more", torch.zeros(1))
        with pytest.raises(CheckpointError) as error:
            load(path, gather_state(model, build_optimizer(AdamWOptions(), model), {}))
        return str(error.value)

    assert ["it lacks model.more" in message for message in run_ranks(2, of_ranks)] == [True, True]

    weights_only = {"model": Toy().double().state_dict()}
    load(path, weights_only)
    for name, value in weights_only["model"].items():
        assert torch.equal(value, model.state_dict()[name])


class Unreadable:
    """Of no kind that a checkpoint may hold, whatever other libraries have told torch to trust."""


def test_the_copy_is_no_view_and_refuses_what_cannot_be_read_back() -> None:
    model = toy()
    state = gather_state(model, build_optimizer(AdamWOptions(), model), {"step": 1})
    copy = to_cpu(state)
    for section in ("model", "optim"):
        for name, value in state[section].items():
            assert copy[section][name].untyped_storage().data_ptr() != value.untyped_storage().data_ptr()
            assert torch.equal(copy[section][name], value)
    with pytest.raises(Exception, match=r"Unsupported|weights_only|WeightsUnpickler"):
        gather_state(model, build_optimizer(AdamWOptions(), model), {"path": Unreadable()})


def test_seeds_differ_by_step_and_rank_and_repeat() -> None:
    def draws(seed: int, step: int, rank: int) -> tuple[float, float, float]:
        import random

        import numpy

        seed_step(seed, step, rank)
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    every = [draws(*which) for which in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 11, 0), (0, 1, 1)]]
    assert len({d for draw in every for d in draw}) == 18
    assert draws(0, 1, 0) == every[2]
