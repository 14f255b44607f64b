"""The planner: memory against dry runs, model FLOPs against published ones, pipelines against closed forms, a search
whose mappings a run accepts, and its command line with wrong input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moetrain.cli import main
from moetrain.config import Config, load, save
from moetrain.config.check import check_mapping
from moetrain.config.errors import ConfigError
from moetrain.model.count import count_parameters, flops_per_token
from moetrain.planner.candidates import columns, row_of
from moetrain.planner.cluster import load_cluster
from moetrain.planner.dry_run import dry_run
from moetrain.planner.footprint import footprint
from moetrain.planner.legal import legal_mappings
from moetrain.planner.loads import probability, read_trace, zipf
from moetrain.planner.plan_check import compare
from moetrain.planner.plan_command import explain
from moetrain.planner.plan_words import read_mapping
from moetrain.planner.search import Problem, evaluate, priced, search
from moetrain.planner.shape import shape_of, with_mtp
from moetrain.planner.timeline import bound, simulate

SMALL = ["model.vocab_size=2048", "train.seq_len=4096", "train.micro_batch=1", "train.precision=bf16", "device=cuda"]


MIXTRAL = "model=mixtral-8x7b model.n_layers=2 train.global_batch=8"
DEEPSEEK = "model=deepseek-v3 model.moe.num_experts=64 train.global_batch=8"
QWEN = "model=qwen3-30b-a3b train.global_batch=8"
SHARED = "model=qwen2-57b-a14b model.n_layers=2 model.moe.num_experts=16 train.micro_batch=4 train.global_batch=32"


def config(*words: str) -> Config:
    return load([*SMALL, *words])


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (8, "model=qwen3-30b-a3b model.n_layers=4 parallel.ep=4 parallel.pp=2 train.global_batch=16"),
        (8, "model=qwen3-30b-a3b model.n_layers=2 parallel.ep=4 train.recompute=selective train.global_batch=8"),
        (1, "model=qwen3-30b-a3b model.n_layers=2 train.recompute=full train.global_batch=8"),
        (8, "model=qwen3-30b-a3b model.n_layers=2 parallel.ep=4 parallel.cp=2 train.global_batch=8 optim=muon"),
        (8, "model=mixtral-8x7b model.n_layers=2 parallel.ep=2 parallel.etp=2 parallel.tp=2 train.global_batch=8"),
        (4, "model=qwen2-57b-a14b model.n_layers=2 parallel.ep=4 parallel.tp=2 train.global_batch=8"),
        (4, "model=qwen3-30b-a3b model.n_layers=2 parallel.ep=4 dispatch=all_gather train.global_batch=8"),
        (4, "model=qwen3-30b-a3b model.n_layers=2 parallel.ep=4 dispatch=lsh train.global_batch=8"),
        (4, "model=tiny-deepseek parallel.ep=2 parallel.pp=2 train.seq_len=1024 train.global_batch=8"),
        (4, "model=tiny-gpt-oss parallel.ep=2 train.seq_len=512 train.global_batch=8 parallel.offload=optimizer"),
        (2, "model=tiny parallel.pp=2 model.tie_embeddings=true train.seq_len=512 train.global_batch=8"),
        (8, f"{MIXTRAL} parallel.etp=2"),
        (8, f"{MIXTRAL} parallel.ep=4 parallel.tp=2 train.precision=float32"),
        (4, f"{DEEPSEEK} model.n_layers=4 model.moe.num_experts=16 parallel.pp=4"),
        (8, f"{DEEPSEEK} model.n_layers=4 parallel.ep=8 train.micro_batch=4 train.global_batch=32"),
        (8, f"{QWEN} model.n_layers=2 parallel.ep=8 parallel.tp=2 model.vocab_size=151936"),
        (8, f"{QWEN} model.n_layers=8 parallel.pp=8 model.vocab_size=600000 train.recompute=full"),
        (8, f"{QWEN} model.n_layers=2 parallel.ep=8 dispatch=two_step dispatch.node_size=4"),
        (8, f"{QWEN} model.n_layers=2 parallel.ep=8 experts.fp8=true"),
        (8, f"{QWEN} model.n_layers=4 parallel.ep=4 experts.backend=grouped_mm"),
        (4, f"{SHARED} parallel.ep=4 train.recompute=full"),
        (4, f"{SHARED} parallel.ep=4 train.recompute=selective"),
        (4, f"{SHARED} parallel.ep=4 train.recompute=selective dispatch=all_gather experts.backend=grouped_mm"),
    ],
)
def test_memory_is_that_of_a_dry_run(world: int, words: str) -> None:
    """Which counts saved tensors and builds the optimizer, and lets dispatch=lsh compress nothing. Weights, gradients
    and state to the byte, activations to 5%, the total to 2%; and all pipeline ranks."""
    cfg = config(*words.split())
    sizes = check_mapping(cfg, world)
    p = Problem(cfg, load_cluster("h100"), world, sent=1.0)
    found = footprint(p.shape, columns([row_of(cfg, sizes)]), p.run())
    for rank, figures in enumerate(dry_run(cfg, sizes)):
        ours = {name: float(value[rank, 0]) for name, value in found.parts.items()}
        for name in ("weights", "gradients", "optimizer"):
            assert ours[name] == getattr(figures, name), (rank, name)
        assert ours["activations"] == pytest.approx(figures.activations, rel=0.05)
        assert ours["gathered"] == pytest.approx(figures.gathered, rel=0.05)
        assert ours["unreduced"] == pytest.approx(figures.unreduced, rel=0.05)
        assert float(found.host[rank, 0]) == figures.host
        assert float(found.totals[rank, 0]) == pytest.approx(figures.total, rel=0.02)


# anchors of published TFLOP/s over tokens/s, GFLOP per token (Megatron-Bridge's tables, at 4096 tokens)
@pytest.mark.parametrize(
    ("name", "mtp", "gflop"),
    [
        ("deepseek-v3", 1, 260.0),
        ("deepseek-v3", 0, 249.5),
        ("qwen3-235b-a22b", 0, 148.0),
        ("qwen3-30b-a3b", 0, 23.0),
        ("gpt-oss-120b", 0, 32.6),
    ],
)
def test_model_flops_are_the_published_ones(name: str, mtp: int, gflop: float) -> None:
    """Within 2%. And a shape has the parameters and FLOPs of the built model."""
    cfg = load([f"model={name}"]).model
    shape = shape_of(cfg)
    assert shape.count() == count_parameters(cfg).total
    assert shape.flops_per_token(4096) == pytest.approx(flops_per_token(cfg, 4096), rel=1e-9)
    shape = with_mtp(shape) if mtp else shape
    assert shape.flops_per_token(4096) / 1e9 == pytest.approx(gflop, rel=0.02)


@pytest.mark.parametrize(
    ("schedule", "pp", "vpp", "n", "bubbles"),
    [
        ("1f1b", 4, 1, 16, 3),  # (pp - 1)(F + B), arXiv 2104.04473
        ("gpipe", 4, 1, 16, 3),
        ("interleaved_1f1b", 4, 2, 16, 3 / 2),  # divided by the virtual stages
        ("zbv_zero_bubble", 4, 2, 16, 1 / 2),  # F = B = W: a third of that, arXiv 2401.10241
    ],
)
def test_pipelines_take_what_their_papers_say(schedule: str, pp: int, vpp: int, n: int, bubbles: float) -> None:
    """F = 1, B = 2 of a rank: n (F + B), and so many times (F + B) more. The closed form for many mappings agrees."""
    line = simulate(schedule, pp, vpp, n, [1 / vpp] * pp * vpp, [2 / vpp] * pp * vpp)
    assert line.seconds == pytest.approx(3 * n + 3 * bubbles)
    one = [np.array([x]) for x in (pp, vpp, n, 3.0, 3.0 * pp)]
    assert bound(schedule, *one)[0] == pytest.approx(line.seconds)


def test_slow_links_and_a_slow_stage_show_in_a_pipeline() -> None:
    even = simulate("1f1b", 4, 1, 8, [1.0] * 4, [2.0] * 4).seconds
    assert simulate("1f1b", 4, 1, 8, [1.0] * 4, [2.0] * 4, send=0.5).seconds > even
    assert simulate("1f1b", 4, 1, 8, [1.0, 1.0, 2.0, 1.0], [2.0, 2.0, 4.0, 2.0]).seconds >= 8 * 6.0


def problem(world: int = 16, *words: str) -> Problem:
    cfg = config("model=qwen3-30b-a3b", "model.n_layers=8", "train.global_batch=64", *words)
    return Problem(cfg, load_cluster("h100"), world, precisions=("bf16",))


def test_a_run_accepts_every_mapping_that_is_searched() -> None:
    """A draw of them through the checks of 'moetrain train', of those with copies of experts, and with split ones
    that all ranks have, too."""
    p = problem()
    m = legal_mappings(p.cfg, p.cluster, p.world, p.precisions, fssdp=True)
    assert len(m) > 1000
    placed, split = np.flatnonzero(m.placement), np.flatnonzero((m.ep == 1) & (m.etp > 1))
    rng = np.random.default_rng(0)
    for i in np.concatenate([rng.choice(x, n, replace=False) for x, n in ((len(m), 8), (placed, 4), (split, 4))]):
        row = m.row(int(i))
        words = [f"parallel.{k}={row[k]}" for k in ("pp", "cp", "tp", "ep", "etp", "schedule", "offload", "context")]
        words += [f"parallel.dp_replicate={row['rep']}", f"train.micro_batch={row['micro_batch']}"]
        words += [f"parallel.stages_per_rank={row['vpp']}"] if row["pp"] > 1 else []
        words += [f"experts/placement={row['placement']}", f"dispatch={row['dispatch']}"]
        cfg = load([*SMALL[:2], *SMALL[3:], "model=qwen3-30b-a3b", "model.n_layers=8", "train.global_batch=64", *words])
        sizes = check_mapping(cfg, p.world)
        assert (sizes.edp, sizes.dp_shard) == (row["edp"], row["dp"])


def test_every_mapping_of_a_search_fits_on_all_pipeline_ranks() -> None:
    """Also where one between the first and the last is the fullest, as with 8 stages of 48 layers split by cost."""
    p = Problem(config("model=qwen3-30b-a3b", "train.global_batch=128"), load_cluster("h100"), 16)
    m = legal_mappings(p.cfg, p.cluster, p.world, p.precisions)
    m = m.take((m.pp == 8) & (m.micro_batch <= 2))
    m = m.take(np.unique(np.linspace(0, len(m) - 1, 300).astype(int)))
    whole = [max(priced(p, m.take([i])).by_stage) for i in range(len(m))]
    assert evaluate(p, m)[1] == pytest.approx(whole)


def test_search_finds_the_fastest_that_fits() -> None:
    """Parts add up to the step; what is best fits; a mapping explained alone has the numbers of the search."""
    p = problem()
    found = search(p, top=3)
    best = found.best[0]
    assert best.seconds == min(plan.seconds for plan in found.best) and best.total <= p.capacity
    assert sum(best.parts.values()) == pytest.approx(best.seconds, rel=0.02)
    sizes = [t for _, t in found.frontier]
    assert sizes == sorted(sizes) and found.fit <= found.looked_at
    row = best.row
    one = explain(p, {"pp": row["pp"], "cp": row["cp"], "tp": row["tp"], "ep": row["ep"], "etp": row["etp"],
                      "dp_replicate": row["rep"], "micro_batch": row["micro_batch"], "recompute": row["recompute"],
                      "offload": row["offload"], "dispatch": row["dispatch"], "precision": "bf16",
                      "schedule": row["schedule"], "vpp": row["vpp"], "context": row["context"]})  # fmt: skip
    assert one.seconds == pytest.approx(best.seconds, rel=1e-6)


def test_uneven_loads_cost_time_and_may_not_fit(tmp_path: Path) -> None:
    """Zipf 0 is balanced; a trace of one hot expert of 8 on 8 ranks gives its rank 8/2 times the rows at top-2."""
    model = load(["model=tiny"]).model
    even = zipf(model, 0.0)
    assert even.slowest(4) == pytest.approx(1.0)
    assert zipf(model, 1.0).slowest(4) > 1.2
    counts = [50, 50, 0, 0, 0, 0, 0, 0]
    line = {"step": 1, "counts": {f"layers.{i}.moe": counts for i in range(4)}}
    (tmp_path / "loads.jsonl").write_text(json.dumps(line) + "\n")
    hot = read_trace(tmp_path, model)
    assert hot.slowest(8) == pytest.approx(4.0) and hot.slowest(4) == pytest.approx(4.0)
    full = hot.fullest(8)
    assert probability(full, 10.0, 1.0, 12.0) == 1.0 and probability(full, 10.0, 1.0, 14.0) == 0.0
    with pytest.raises(ConfigError, match="8 experts for 128"):
        read_trace(tmp_path, load(["model=qwen3-30b-a3b"], kinds=False).model)
    p = problem()
    row = {"ep": 8, "edp": 2, "dp": 16, "dispatch": "all_to_all", "precision": "bf16"}
    from moetrain.planner.search import priced

    balanced = priced(p, columns([row]))
    skewed = priced(replace(p, load=zipf(p.cfg.model, 1.0)), columns([row]))
    assert skewed.seconds > balanced.seconds and skewed.total > balanced.total
    assert skewed.out_of_memory is not None


def test_emitted_preset_is_what_train_accepts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Down to a dry run of it."""
    words = ["plan", "model=tiny", "cluster=h100", "gpus=4", "global_batch=16", "seq=256", "precision=bf16"]
    assert main([*words, "tokens=1e6", "--config-dir", str(tmp_path), "--emit", "experiment=mine", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["plans"][0]["gpu_hours"] > 0 and told["plans"][0]["by_stage"]
    assert (tmp_path / "experiment" / "mine.yaml").is_file()
    assert main(["train", "--config-dir", str(tmp_path), "experiment=mine", "dry_run=true", "device=cuda"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["world"] == 4
    assert main([*words, "--config-dir", str(tmp_path), "--emit", "experiment=mine"]) == 2  # not over what exists
    capsys.readouterr()
    words[3:5] = ["gpus=16", "global_batch=16"]
    assert main([*words, "--config-dir", str(tmp_path), "--emit", "experiment=two"]) == 0
    command = capsys.readouterr().out.splitlines()[-1].partition("; moetrain ")[2].split()
    assert command[-2:] == ["launch.nodes=2", "launch.ranks=8"]  # a node has 8 of the 16
    assert main([*command, "--print", "launch=slurm", f"run_dir={tmp_path}/run"]) == 0


def test_a_run_of_several_machines_is_checked_against_all_its_ranks(tmp_path: Path) -> None:
    """Two machines of two ranks are as fast as one of four."""
    lines = [json.dumps({"step": n, "tokens_per_s": 1000.0}) for n in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    found = []
    for nodes in (1, 2):
        mapping = ["parallel.ep=4", "train.micro_batch=1", f"launch.nodes={nodes}", f"launch.ranks={4 // nodes}"]
        cfg = load(["model=tiny", *mapping], kinds=False)
        save(cfg, tmp_path / "config.yaml")
        found.append(compare(tmp_path, "h100"))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("cluster=h100", "needs cluster=NAME and gpus=N"),
        ("cluster=h10 gpus=8", "did you mean 'h100'"),
        ("cluster=h100 gpus=0", "whole number"),
        ("cluster=h100 gpus=4096 seq=16 global_batch=8", "more than the 128 tokens"),
        ("cluster=h100 gpus=8 tokens=many", "tokens takes"),
        ("cluster=h100 gpus=8 zipf=-1", "zipf takes"),
        ("cluster=h100 gpus=8 seq=256 trace=nowhere", "cannot be read"),
        ("cluster=h100 gpus=8 zipf=1 trace=x", "one of them"),
        ("cluster=h100 gpus=8 mapping=pp", "cannot read 'pp'"),
        ("cluster=h100 gpus=8 mapping=recompute=half", "takes none, selective, full"),
        ("cluster=h100 gpus=8 mapping=ep=3 seq=256 global_batch=8", "parallel.ep"),
        ("cluster=h100 gpus=8 stack=megatro", "did you mean"),
        ("cluster=h100 gpus=7 global_batch=8 seq=256", "global_batch"),
        ("cluster=h100 gpus=8 seq=999999", "max_seq_len"),
        ("cluster=h100 gpus=8 --plot x.txt", "ends in .png"),
        ("cluster=h100 gpus=8 --emit name", "experiment=NAME"),
        ("cluster=h100 gpus=8 moe.experts=8", "not a setting"),
        ("cluster=h100 gpus=8 gpus=16", "gpus= is there twice"),
        ("cluster=h100 gpus=8 mapping=ep=2,ep=4", "mapping has ep twice"),
        ("cluster=h100 gpus=8 parallel.ep=4", "parallel.ep is searched"),
        ("cluster=h100 gpus=8 train.micro_batch=2 mapping=ep=2", "train.micro_batch is a word of mapping="),
        ("cluster=h100 gpus=8 seq=256 train.seq_len=512", "seq= and train.seq_len say the same"),
        ("cluster=v100 gpus=8 seq=256 precision=fp8", "GPUs of v100 have no FP8"),
        ("cluster=a100 gpus=8 seq=256 mapping=ep=2,precision=fp8", "GPUs of a100 have no FP8"),
        ("cluster=h100 gpus=8 ~balance.aux_loss --emit experiment=new", "a preset takes nothing out"),
    ],
)
def test_wrong_words_are_one_line(words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model=tiny", *words.split()]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_a_model_that_fits_nowhere_says_what_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    """With by how much."""
    assert main(["plan", "model=mixtral-8x7b", "cluster=v100", "gpus=8", "seq=4096", "global_batch=64"]) == 2
    error = capsys.readouterr().err
    assert "fits under no mapping" in error and "too many" in error and "gpus=" in error


def test_mapping_words() -> None:
    assert read_mapping("pp=8,recompute=full") == {"pp": 8, "recompute": "full"}
