"""Every preset of this part builds a layer, every kind has a preset, and mistakes get one line."""

from __future__ import annotations

import pytest

from moetrain import config
from moetrain.config.errors import ConfigError
from moetrain.config.presets import Presets
from moetrain.config.registry import BALANCE, DISPATCHERS, ROUTERS
from moetrain.moe.build import build_moe_layer
from moetrain.moe.dispatch import build_dispatcher

GROUPS = Presets.find().groups()
SMALL = ["model.moe.num_experts=16", "model.moe.top_k=2"]


@pytest.mark.parametrize("group", ["model/router", "balance", "dispatch"])
def test_every_preset_builds_a_layer(group: str) -> None:
    for name in GROUPS[group]:
        cfg = config.load([f"{group}={name}", *SMALL, "train.precision=bf16"])
        layer = build_moe_layer(cfg.model, 0, cfg.balance, cfg.experts)
        assert list(layer.router.balance) == list(cfg.balance)
        if name in ("auto", "local"):
            build_dispatcher(cfg.dispatch, 16, None)


def test_every_kind_has_a_preset() -> None:
    loaded = [config.load([f"model/router={name}", *SMALL]).model.router for name in GROUPS["model/router"]]
    routers = {ROUTERS.entry_of(options).name for options in loaded}
    assert routers == set(ROUTERS.names())
    assert set(GROUPS["dispatch"]) == set(DISPATCHERS.names())
    assert set(BALANCE.names()) <= set(GROUPS["balance"])


def test_a_schedule_can_be_given_on_the_command_line() -> None:
    cfg = config.load(["balance=[aux_loss,bias]", "balance.aux_loss.coef={0: 0.01, 1000: 0.001}"])
    assert cfg.balance["aux_loss"].coef == {0: 0.01, 1000: 0.001}


MISTAKES = {
    "balance.aux_loss.coef=-1": "balance.aux_loss.coef takes float >= 0 or mapping of int to float >= 0; got -1",
    "balance.aux_loss.coef={}": "balance.aux_loss.coef takes float >= 0",
    "balance.aux_loss.scope=batch": "takes one of sequence, step, micro_batch",
    "balance.aux_los.coef=1": "did you mean 'aux_loss'?",
    "model.router.kind=topp": "did you mean 'topk'?",
    "model.router.score=relu": "takes one of softmax, sigmoid",
    "model.router.scale=0": "takes float > 0",
    "model.router.n_groups=3": "n_groups=3 must divide model.moe.num_experts=16",
    "model.router.topk_groups=2": "topk_groups=2 is more than n_groups=1",
    "model.router={n_groups: 8, topk_groups: 1, group_score: max}|model.moe.top_k=3": "cannot give model.moe.top_k=3",
    "model.router={n_groups: 16, topk_groups: 4}": "needs 2 experts or more in each of n_groups=16 groups",
    "dispatch=local|parallel.ep=2": "use dispatch=all_to_all or parallel.ep=1",
    "dispatch.kind=local|dispatch.overlap=true": "dispatch.overlap is not a setting",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_get_one_line_that_says_what_to_do(words: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.load([*SMALL, *words.split("|")])
    assert MISTAKES[words] in str(error.value)
    assert "\n" not in str(error.value)
