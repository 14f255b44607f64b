"""A dry run against real runs: what autograd really keeps, what engines really hold, what collectives really send."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from moetrain_launch.fork import run_ranks

from moetrain.cli import main
from moetrain.config import Config
from moetrain.config.check import check_mapping
from moetrain.model.count import count_parameters
from moetrain.parallel.mesh import ParallelDims
from moetrain.parallel.stages import all_stages
from moetrain.planner.balanced import Balancer
from moetrain.planner.dry_run import RankFigures, dry_run
from moetrain.planner.groups import Meter, dry_world
from moetrain.planner.stage_run import run_stage
from tests.distributed.toy_run import load
from tests.planner.counted import by_ranks, real_kept, real_step

MLA = (
    "model.attention.kind=mla model.attention.qk_norm=none model.attention.q_lora_rank=8 "
    "model.attention.kv_lora_rank=8 "
    "model.attention.qk_nope_head_dim=8 model.attention.qk_rope_head_dim=4 model.attention.v_head_dim=6"
)
BAM = "model.attention.num_experts=2 model.attention.n_kv_heads=1 model.attention.shared_kv=true"
FUSED = "model.attention.backend=auto"


def toy(folder: Path, world: int, words: str) -> Config:
    """Routing that is forced to balance is the same in both."""
    return load(folder, ["device=cpu", "model/router=forced", f"launch.ranks={world}", *words.split()])


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (1, f"{FUSED} train.recompute=none"),
        (1, "train.recompute=selective experts.backend=loop"),
        (1, "experts.fp8=true"),
        (1, "model.moe.activation=relu2 model.activation=geglu model.norm_offset=1"),
        (1, f"{MLA} {FUSED} train.recompute=none"),
        (1, f"{MLA} {FUSED} train.recompute=selective"),
        (1, f"{MLA} train.recompute=full"),
        (1, f"{FUSED} model.attention.sinks=true model.attention.sliding_window=8 data.document_mask=true"),
        (2, f"{FUSED} parallel.pp=2 train.micro_batch=1 train.recompute=full"),
        (4, f"{FUSED} parallel.tp=2 parallel.cp=2 parallel.ep=2 parallel.etp=2"),
        (1, f"{BAM} {FUSED} model.parallel_block=true train.recompute=selective"),
        (4, f"{BAM} parallel.tp=2 parallel.cp=2"),
        (2, "train.precision=bf16"),
    ],
)
def test_activations_are_those_of_a_real_micro_batch(tmp_path: Path, world: int, words: str) -> None:
    cfg = toy(tmp_path, world, words)
    sizes = check_mapping(cfg, world)
    with dry_world(world):
        dims = ParallelDims.build(sizes, "cpu")
        meter, balancer = Meter(dims), Balancer(cfg, sizes)
        runs = [run_stage(cfg, dims, meter, stage, balancer, "cpu") for stage in all_stages(cfg, sizes)]
    real = run_ranks(world, real_kept, cfg)[0]
    for run, (kept, most) in zip(runs, real, strict=True):
        assert run.kept == pytest.approx(kept, rel=0.005)
        if cfg.train.precision != "bf16":  # which needs FSDP to be bf16
            assert run.kept + run.working == pytest.approx(most, rel=0.03)


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (4, "parallel.tp=2 parallel.ep=2 balance=[aux_loss] balance.aux_loss.scope=sequence"),
        (4, "parallel.dp_replicate=2 parallel.dp_shard=2 train.micro_batch=1 train.recompute=full"),
        (4, "parallel.cp=2 parallel.tp=2 parallel.ep=2 parallel.etp=2 train.micro_batch=2 model.moe.ternary=true"),
        (2, "parallel.cp=2 parallel.context=ring model.attention.sliding_window=6"),
        (2, f"{BAM} parallel.tp=2 parallel.ep=2 model.parallel_block=true optim=muon"),
        (4, "parallel.cp=2 parallel.context=all_to_all parallel.ep=2 train.micro_batch=1 train.precision=bf16"),
        (4, "parallel.ep=4 dispatch=two_step dispatch.node_size=2 train.micro_batch=2"),
        (2, "parallel.ep=2 dispatch=all_gather model.moe.capacity_factor=0.75 optim=muon"),
        (4, "optim=muon parallel.ep=2 train.micro_batch=1 train.recompute=selective parallel.prefetch=2"),
        (2, "parallel.offload=all parallel.ep=2 train.micro_batch=1 parallel.reshard_after_forward=false"),
        (4, "parallel.pp=2 train.micro_batch=1 model.tie_embeddings=true model.n_layers=3"),
        (4, "parallel.pp=2 parallel.schedule=zbv_zero_bubble train.micro_batch=1 model.n_layers=4 parallel.ep=2"),
        (2, "parallel.pp=2 parallel.schedule=interleaved_1f1b train.micro_batch=1 model.n_layers=4"),
        (4, "train.freeze=[layers.*.moe.shared.*,*.attention.*] parallel.ep=2 train.micro_batch=1"),
        (2, "train.freeze=[embed.*,layers.0.*,layers.1.*] train.micro_batch=1"),
        (4, "train.freeze=[embed.*,layers.0.*] parallel.pp=2 train.micro_batch=1 parallel.layout=[3,1]"),
        (4, "train.freeze=[*.experts.*,layers.3.*] parallel.pp=2 parallel.tp=2 train.micro_batch=1 optim=muon"),
    ],
)
def test_holds_and_sends_what_real_ranks_do(tmp_path: Path, world: int, words: str) -> None:
    """To the byte, and to the call."""
    cfg = toy(tmp_path, world, words)
    sizes = check_mapping(cfg, world)
    figures = dry_run(cfg, sizes)
    names = sorted({name for f in figures for name in f.traffic})
    ranks = run_ranks(world, real_step, cfg, names)
    for f in figures:
        real = ranks[f.pp_rank * world // sizes.pp]
        assert by_ranks(f.traffic, real["ranks"]) == real["counts"]
        assert (f.weights, f.gradients, f.optimizer) == (real["weights"], real["gradients"], real["optimizer"])
    total = sum(f.parameters for f in figures)
    assert total == count_parameters(cfg.model).total
    if sizes.tp * sizes.dp_replicate == 1 and not cfg.model.tie_embeddings:  # nothing has a copy
        assert sum(real["weights"] for real in ranks) == 4 * total


def test_micro_batches_under_way_follow_the_schedule(tmp_path: Path) -> None:
    """1F1B: as many as there are stages from here on; GPipe: all; interleaved: some more than 1F1B."""

    def one(schedule: str, layout: str = "[2,2]") -> list[RankFigures]:
        words = (
            f"parallel.pp=2 train.micro_batch=1 model.n_layers=4 parallel.schedule={schedule} parallel.layout={layout}"
        )
        cfg = toy(tmp_path, 2, words)
        return dry_run(cfg, check_mapping(cfg, 2))

    first, last = one("1f1b")
    all_first, all_last = one("gpipe")
    assert all_first.activations == 8 // 2 * first.activations
    assert all_last.activations == 8 * last.activations
    interleaved = one("interleaved_1f1b", "[1,1,1,1]")[0]
    assert first.activations < interleaved.activations < all_first.activations


def test_deepseek_v3_on_1024_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command in docs/parallel.md."""
    words = (
        "model=deepseek-v3 launch.ranks=1024 parallel.pp=16 parallel.ep=64 train.seq_len=4096 train.micro_batch=1 "
        "train.global_batch=4096 train.precision=bf16 train.recompute=full dry_run=true"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words.split()]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["parameters"] == 671_026_404_352
    ranks = found["ranks"]
    assert [r["stages"] for r in ranks] == [[i] for i in range(16)]
    assert [layer for r in ranks for layer in r["layers"]] == list(range(61))
    # 64 ranks share a stage's parameters, float32; layers that are whole on none of them.
    for r in ranks:
        assert r["weights"] == pytest.approx(4 * r["parameters"] / 64, rel=0.01)
        assert r["optimizer"] == pytest.approx(2 * r["weights"], rel=0.001)
    # Of a MoE layer and micro-batch: 4096 tokens to 8 experts each, 63/64 of them elsewhere, 7168 wide in bfloat16;
    # there, back, again for recomputation, and two gradients; and the integers that plan it.
    rows = 4096 * 8 * 63 / 64 * 7168 * 2
    sent = ranks[2]["collectives"]["ep"]["all_to_all"]
    assert sent["bytes"] == pytest.approx(4 * 64 * 6 * rows, rel=0.001)
    assert ranks[2]["collectives"]["pp"]["send"]["bytes"] == pytest.approx(2 * 64 * 4096 * 7168 * 2, rel=0.001)
    # Blocks' inputs of 16 micro-batches, and the stage's output.
    assert ranks[0]["activations"] == pytest.approx(16 * 5 * 4096 * 7168 * 2, rel=0.01)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", ["tiny-gpt-oss", "tiny-deepseek", "tiny-qwen2"])
def test_every_kind_of_model_for_a_gpu(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Biases and sinks, latent attention, gated shared experts; in bfloat16 the kernels are torch's grouped ones."""
    words = f"model={model} launch.nodes=2 launch.ranks=4 parallel.tp=2 parallel.ep=4 parallel.etp=2"
    assert main(["train", "dry_run=true", "train.global_batch=16", "train.precision=bf16", *words.split()]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["ranks"][0]
    assert {"tp", "ep", "etp", "fsdp", "world"} <= set(found["collectives"])
    assert found["total"] > found["weights"] + found["activations"] > 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("launch.ranks=8 parallel.pp=3", "must divide the world size 8"),
        ("launch.ranks=2 train.micro_batch=4 parallel.engine=deepspeed", "dry_run covers parallel.engine=torch"),
        (
            "launch.ranks=2 parallel.ep=2 dispatch=deep_ep train.precision=bf16",
            "dry_run does not cover dispatch=deep_ep",
        ),
        ("experts.backend=cpu", "experts.backend=cpu, in a dry run for device cuda"),
        ("-m parallel.prefetch=1,2", "take out -m"),
    ],
)
def test_refusals_are_one_line(
    words: str, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "model=tiny", "dry_run=true", *words.split()]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_a_launcher_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "model=tiny", "dry_run=true"]) == 2
    assert "without a launcher" in capsys.readouterr().err
