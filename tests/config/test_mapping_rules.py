"""Every mapping is either legal, by rules written down here a second time, or refused with advice that mends it."""

from __future__ import annotations

import itertools
import math
import re
from types import SimpleNamespace

import pytest
import torch
import yaml
from hypothesis import event, given, settings
from hypothesis import strategies as st

from moetrain.config.advice import with_setting
from moetrain.config.check import Sizes, check_config, check_mapping
from moetrain.config.errors import ConfigError
from moetrain.config.schema import AttentionConfig, Config, ModelConfig, MoEConfig, ParallelConfig, TrainConfig
from moetrain.config.sizes import STAGES_PER_RANK, divisors
from moetrain.parallel.pipeline import SCHEDULES

few = st.sampled_from([1, 1, 1, 1, 2, 2, 3, 4])
mostly_none = st.sampled_from([*[None] * 9, 1, 2, 3])


@st.composite
def mappings(draw: st.DrawFn) -> tuple[Config, int]:
    """(config, world): small models under small mappings, of which a good part are legal."""
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    n_layers = pick(2, 4, 4, 6)
    kv_heads, group = pick(1, 2, 4, 8), pick(1, 1, 2, 3)
    per_layer = lambda *values: draw(st.one_of(st.just(values[0]), st.lists(st.sampled_from(values), min_size=n_layers, max_size=n_layers)))  # noqa: E731, E501  # fmt: skip
    moe = MoEConfig(
        num_experts=per_layer(8, 4, 12),
        top_k=2,
        expert_dim=per_layer(32, 64, 24, 27),
        shared_dim=per_layer(0, 32, 6),
        first_dense=pick(0, 1),
        bias=pick(False, False, True),
        activation=pick("swiglu", "swiglu", "gelu"),
    )
    attention = AttentionConfig(kind=pick("gqa", "mla"), n_heads=kv_heads * group, n_kv_heads=kv_heads,
                                kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
                                backend=pick("auto", "auto", "auto", "flash"))  # fmt: skip
    layout = pick(*[None] * 12, [2, 2], [1, 3], [1, 1, 1, 1], [2, 1, 1, 2], [4], [0, 4], [1, -1, 4])
    pp, etp = draw(few), pick(1, 1, 1, 2, 3)
    dense = {name: draw(few) for name in ("dp_replicate", "cp", "tp")}
    world = pp * math.prod(dense.values()) * pick(1, 1, 2, 4)
    world += pick(*[0] * 9, 1)
    parallel = ParallelConfig(
        pp=pp,
        **dense,
        dp_shard=pick(*[-1] * 9, 1, 2),
        ep=pick(-1, 3, *divisors(max(1, world // pp // etp)) * 2),
        etp=etp,
        context=pick("all_gather", "ring", "all_to_all"),
        schedule=pick(*STAGES_PER_RANK),
        stages_per_rank=draw(mostly_none),
        layout=layout,
        reshard_after_forward=pick(None, None, False, True),
    )
    cfg = Config(
        model=ModelConfig(
            vocab_size=pick(1024, 1026), dim=pick(64, 60), dense_dim=pick(256, 258), n_layers=n_layers, moe=moe,
            attention=attention,
        ),
        train=TrainConfig(
            seq_len=pick(64, 96, 100), global_batch=pick(16, 32, 48, 12), micro_batch=pick(1, 1, 2, 4),
            compile=pick(False, False, False, True),
        ),
        parallel=parallel,
        dispatch={"kind": pick("auto", "auto", "auto", "local")},
    )  # fmt: skip
    return cfg, world


def holds(cfg: Config, world: int) -> bool:
    """Whether the mapping is legal, in plain arithmetic."""
    p, m, t, a = cfg.parallel, cfg.model, cfg.train, cfg.model.attention
    known = p.pp * p.dp_replicate * p.cp * p.tp
    if world % known or (p.dp_shard != -1 and known * p.dp_shard != world):
        return False
    dp_shard, stage = world // known, world // p.pp
    data = p.dp_replicate * dp_shard
    if stage % (p.etp * abs(p.ep)):
        return False
    ep = stage // p.etp if p.ep == -1 else p.ep
    edp = stage // p.etp // ep
    moe = m.moe_layers()
    counts, widths, shared = (
        [m.layer_value(name, i) for i in moe] for name in ("num_experts", "expert_dim", "shared_dim")
    )
    kv_heads = a.n_kv_heads if a.kind == "gqa" else a.n_heads
    legal = [
        t.global_batch % (t.micro_batch * data) == 0,
        all(n % ep == 0 for n in counts),
        all(n % p.etp == 0 for n in widths),
        not m.moe.bias or m.dim % p.etp == 0 or not moe,
        all(n % p.tp == 0 for n in [m.vocab_size, a.n_heads, *shared]),
        len(moe) == m.n_layers or m.dense_dim % p.tp == 0,
        max(kv_heads, p.tp) % min(kv_heads, p.tp) == 0,
        p.cp == 1 or t.seq_len % (2 * p.cp) == 0,
        t.seq_len % (p.cp * p.tp) == 0,
        p.context != "all_to_all" or a.n_heads % (p.tp * p.cp) == 0,
        p.cp == 1 or p.context == "all_to_all" or a.backend == "auto",
        cfg.dispatch["kind"] != "local" or ep == 1,
    ]
    for width in widths if edp > 1 else []:
        inner = width // p.etp  # as etp leaves it
        legal.append(m.dim % edp == 0 or inner % edp == 0)
        legal.append(not m.moe.bias or inner % edp == 0 or (edp == 2 and m.moe.activation == "swiglu"))
        legal.append(not m.moe.bias or m.dim // p.etp % edp == 0)
    per_rank = p.stages_per_rank or (2 if p.pp > 1 and p.schedule not in ("1f1b", "gpipe") else 1)
    stages = p.pp * per_rank
    legal.append(stages <= m.n_layers)
    legal.append(p.layout is None or (len(p.layout) == stages and sum(p.layout) == m.n_layers and min(p.layout) > 0))
    if p.pp == 1:
        return all(legal) and per_rank == 1
    if p.schedule in ("gpipe", "1f1b"):
        legal.append(per_rank == 1)
    else:
        legal.append(per_rank == 2 or (per_rank > 2 and p.schedule.startswith("interleaved")))
    n = t.global_batch // (t.micro_batch * data)
    if p.schedule in ("1f1b", "dualpipev"):
        legal.append(n >= stages)
    if p.schedule.startswith("interleaved"):
        legal.append(n < p.pp or n % (n // p.pp) == 0)
    return all(legal)


def complaint(cfg: Config, world: int) -> str:
    """The refusal of a mapping, "" where it is legal."""
    try:
        check_mapping(cfg, world)
    except ConfigError as error:
        return str(error)
    return ""


def rule_of(message: str) -> str:
    """A refusal without its numbers and its advice."""
    return re.sub(r"\d+", "N", message.partition(";")[0])


@settings(max_examples=600, deadline=None)
@given(mappings())
def test_a_mapping_is_legal_or_refused_with_advice_that_mends_it(drawn: tuple[Config, int]) -> None:
    cfg, world = drawn
    message = complaint(cfg, world)
    assert (message == "") == holds(cfg, world), message
    event(rule_of(message)[:60] or "legal")
    if not message:
        sizes = check_mapping(cfg, world)
        assert sizes.pp * sizes.edp * sizes.ep * sizes.etp == sizes.world == world
        assert sizes.micro_batches(cfg) * cfg.train.micro_batch * sizes.data == cfg.train.global_batch
        held = [sizes.stages_of_rank(rank, cfg.parallel.schedule) for rank in range(sizes.pp)]
        assert sorted(itertools.chain.from_iterable(held)) == list(range(sizes.stages))
        return
    assert "\n" not in message
    if "the world size" in message or "only one of" in message:
        return  # those are tested in test_sizes.py
    assert re.search(r"\b(parallel|train|dispatch)\.\w+=", message)
    advice = message.partition("; nearest legal: ")[2]
    for key, word in re.findall(r"([a-z_.]+)=(\S+)", advice):
        changed = with_setting(cfg, key, yaml.safe_load(word))
        again = complaint(changed, world)
        assert rule_of(again) != rule_of(message), f"{message} -> {key}={word}: {again}"
        check_config(changed)
    if "no other" in message:
        [keys] = re.findall(r"no other (.*) is legal", message)
        for key in keys.split(" or "):
            for n in range(1, world + 1) if key.startswith("parallel.") else []:
                assert complaint(with_setting(cfg, key, n), world), f"{message}, but {key}={n} is"


def refused(world: int, says: str, **settings: object) -> None:
    cfg = Config(
        model=ModelConfig(n_layers=4, attention=AttentionConfig(n_heads=8, n_kv_heads=2), max_seq_len=128),
        train=TrainConfig(global_batch=16, micro_batch=1, seq_len=128),
    )
    for key, value in settings.items():
        cfg = with_setting(cfg, key.replace("__", "."), value)
    assert says in complaint(cfg, world), complaint(cfg, world)


def test_refusals_name_the_rule_the_sizes_and_the_nearest_legal_choices() -> None:
    refused(16, "parallel.ep=16 is more ranks than model.moe.num_experts=8: some would own no expert; "
            "nearest legal: parallel.ep=8", parallel__ep=16)  # fmt: skip
    refused(8, "parallel.pp=8 x 1 stages per rank = 8 stages for model.n_layers=4 layers: some stage would have no "
            "layer; nearest legal: parallel.pp=4", parallel__pp=8)  # fmt: skip
    refused(4, "train.seq_len=100 must be a multiple of 2 x parallel.cp=4 = 8: a rank takes a chunk from each end of "
            "the sequence; nearest legal: train.seq_len=96 or train.seq_len=104 or parallel.cp=2",
            parallel__cp=4, train__seq_len=100)  # fmt: skip
    refused(16, "nearest legal: parallel.tp=8", parallel__tp=16)
    refused(2, "parallel.layout=[1, 2] has 3 layers, the model has model.n_layers=4; nearest legal: "
            "parallel.layout=null", parallel__pp=2, parallel__layout=[1, 2])  # fmt: skip
    refused(4, "needs at least as many micro-batches as stages, 4, but train.global_batch=3 / (train.micro_batch=1 x "
            "1 data-parallel ranks) = 3; nearest legal: train.global_batch=4", parallel__pp=4,
            train__global_batch=3)  # fmt: skip
    refused(2, "experts are sharded over edp=2 ranks (world / pp / ep / etp), which must divide model.dim=128 and "
            "model.moe.expert_dim=27, since the experts have biases; nearest legal: parallel.ep=2",
            model__moe__bias=True, model__moe__activation="gelu", model__moe__expert_dim=27)  # fmt: skip


@pytest.mark.parametrize("schedule", STAGES_PER_RANK)
def test_the_schedules_demands_are_torch_own(schedule: str) -> None:
    """torch's constructors, which lay out all actions of all ranks, accept exactly the sizes that the rules accept."""
    for pp in (2, 3, 4):
        for per_rank in (1, 2, 3):
            for n in range(1, 14):
                cfg = Config(
                    model=ModelConfig(n_layers=12),
                    train=TrainConfig(global_batch=n, micro_batch=1),
                    parallel=ParallelConfig(pp=pp, schedule=schedule, stages_per_rank=per_rank),  # type: ignore[arg-type]
                )
                message = complaint(cfg, pp)
                try:
                    build(SCHEDULES[schedule], Sizes(pp=pp, stages_per_rank=per_rank), schedule, n)
                    accepted = True
                except ValueError:
                    accepted = False
                # torch would run an interleaved schedule with one stage per rank, in which nothing is interleaved.
                if not (per_rank == 1 and schedule.startswith("interleaved")):
                    assert (message == "") == accepted, f"pp {pp} x {per_rank}, {n} micro-batches: {message}"


def build(cls: type, sizes: Sizes, schedule: str, n: int) -> None:
    """Make torch's schedule for rank 0 with stages that cannot compute."""
    stages = [
        SimpleNamespace(
            group_size=sizes.pp, group_rank=0, stage_index=i, num_stages=sizes.stages, submod=torch.nn.Identity(),
            is_first=i == 0, is_last=i == sizes.stages - 1, has_backward=True, device=torch.device("cpu"), group=None,
            stage_index_to_group_rank={s: sizes.rank_of_stage(s, schedule) for s in range(sizes.stages)},
        )
        for i in sizes.stages_of_rank(0, schedule)
    ]  # fmt: skip
    single = schedule in ("gpipe", "1f1b")
    if single and len(stages) > 1:
        raise ValueError("takes one stage")
    cls(stages[0] if single else stages, n, loss_fn=lambda *_: None)
