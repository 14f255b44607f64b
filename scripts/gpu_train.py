"""Training for ``gpu_check.py``: as many layers of OLMoE-1B-7B as the GPU's memory holds, through moetrain's trainer.

Tokens are random, so that experts' loads are nearly even. Printed: tokens per second and the share of the H100's peak
for each backend of the experts, on the same model; then where the time of a micro-batch and of an update goes, by part
and by kernel, from a profile.
"""

from __future__ import annotations

import importlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_times import runnable

ROOT = Path(__file__).resolve().parents[1]
PEAK_TFLOPS = 989.5  # H100 SXM, dense bfloat16 (NVIDIA's data sheet)
STEPS, WARM_UP, OTHERS = 30, 3, 5  # steps of the default backend, those of them not counted, steps of each other one
SEQ_LEN, MICRO_BATCH, GLOBAL_BATCH = 4096, 4, 16
KERNELS = 25  # that are printed, those that take most time
TINY_MODEL = ["model=tiny", "model.dim=32", "model.n_layers=2", "model.moe.expert_dim=32", "model.vocab_size=300"]


def train(device: str, tiny: bool, left: Callable[[], float]) -> list[dict[str, Any]]:
    """A row for each backend. left: the seconds that there still are. moetrain can be imported (``missing``)."""
    from moetrain.train.runtime import process_group, set_up_torch

    deterministic = torch.are_deterministic_algorithms_enabled()
    with tempfile.TemporaryDirectory() as folder:
        cfg = config(device, tiny, Path(folder))
        set_up_torch(cfg, 1)
        try:
            with process_group(torch.device(device), 600):
                return _train(cfg, tiny, left)
        finally:
            torch.use_deterministic_algorithms(deterministic)


def missing(wheels: Path | None) -> str | None:
    """Why moetrain's trainer cannot be imported, wheels unpacked where given; None when it is."""
    if not (ROOT / "moetrain").is_dir():
        return "there is no moetrain/ beside this script's folder"
    sys.path[:0] = [str(ROOT), str(ROOT / "launch")]  # this moetrain, not an installed one
    if wheels is not None:
        files = [str(file) for file in sorted(wheels.glob("*.whl"))]
        if not files:
            return f"there are no wheels in {wheels}"
        target = tempfile.mkdtemp(prefix="gpu_check-")
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", target, *files]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"the wheels in {wheels} cannot be installed: {done.stderr.strip().splitlines()[-1]}"
        sys.path.append(target)  # after what is installed already
    try:
        importlib.import_module("moetrain.config")
        importlib.import_module("moetrain.train.trainer")
    except ImportError as error:
        return f"{error}; --wheels DIR brings what is missing"
    return None


def config(device: str, tiny: bool, folder: Path) -> Any:
    """The run's config, with random tokens as its data."""
    from moetrain.config import load

    seq_len, micro, batch = (32, 2, 4) if tiny else (SEQ_LEN, MICRO_BATCH, GLOBAL_BATCH)
    overrides = TINY_MODEL if tiny else ["model=olmoe-1b-7b"]
    cfg = load(
        [*overrides, f"device={device}", f"run_dir={folder / 'run'}", "train.precision=bf16"]
        + [f"train.{k}={v}" for k, v in {"seq_len": seq_len, "micro_batch": micro, "global_batch": batch}.items()]
    )
    cfg.data = random_tokens(folder, cfg.model.vocab_size, 2**14 if tiny else 2**21)
    if not tiny:
        cfg.model.n_layers = layers_that_fit(cfg)
    return cfg


def random_tokens(folder: Path, vocab_size: int, count: int) -> Any:
    """Data of ``count`` random tokens, prepared in ``folder``."""
    import numpy as np
    from tokenizers import Tokenizer, models

    from moetrain.config.schema_data import DataConfig, SourceConfig, TokenizerConfig
    from moetrain.data.prepare import prepare

    words = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, vocab_size)}
    Tokenizer(models.WordLevel(words, unk_token="w1")).save(str(folder / "tokenizer.json"))
    ids = np.random.default_rng(0).integers(0, vocab_size, count)
    ids[:: min(1024, count // 16)] = 0
    ids.astype("<u2").tofile(folder / "ids.npy")  # bare, as OLMo's tools write them
    source = SourceConfig(tokens=[str(folder / "ids.npy")], token_dtype="uint16")
    data = DataConfig(
        name="random",
        dir=str(folder / "prepared"),
        sources={"random": source},
        tokenizer=TokenizerConfig(path=str(folder / "tokenizer.json")),
    )
    prepare(data, progress=False)
    return data


def layers_that_fit(cfg: Any) -> int:
    """Layers whose training fits the GPU's free memory, by an estimate: 16 bytes a parameter (float32 weights,
    gradients and two moments), the bfloat16 experts that backward keeps, activations with a half for what the estimate
    leaves out, and 5 GiB for the largest gradient, logits and the allocator."""
    from moetrain.model.count import count_parameters
    from moetrain.train.announce import activation_gib

    free = torch.cuda.mem_get_info()[0] / 2**30
    layers, most = 1, cfg.model.n_layers
    while layers < most:
        cfg.model.n_layers = layers + 1
        n = count_parameters(cfg.model)
        need = (16 * n.total + 2 * (n.total - n.embedding - n.head)) / 2**30 + 1.5 * activation_gib(cfg) + 5
        if need > free:
            break
        layers += 1
    return layers


def _train(cfg: Any, tiny: bool, left: Callable[[], float]) -> list[dict[str, Any]]:
    from moetrain.config.check import resolve_sizes
    from moetrain.model.count import count_parameters, flops_per_token
    from moetrain.moe.experts import Experts
    from moetrain.train.trainer import Trainer

    model, steps = cfg.model, 3 if tiny else STEPS
    print(f"\ntraining {model.name}: {model.n_layers} layers, {count_parameters(model).total:,} parameters", flush=True)
    began = time.perf_counter()
    trainer = Trainer(cfg, resolve_sizes(cfg.parallel, 1), Path(cfg.run_dir))
    print(f"  built in {time.perf_counter() - began:.1f} s", flush=True)
    flops, device = flops_per_token(model, cfg.train.seq_len), trainer.device.type
    experts = [module for module in trainer.engine.model.modules() if isinstance(module, Experts)]
    width = model.layer_value("expert_dim", model.moe_layers()[0])
    rows = []
    for backend in ("auto", *runnable(device, model.dim, width)):
        if left() < 30:
            break
        for module in experts:
            module.backend = backend
        taken, losses = [], []
        for _ in range(steps if backend == "auto" else min(steps, OTHERS)):
            figures = trainer.train_step()
            taken.append(figures["step_s"])
            losses.append(figures["loss"])
        step_s = statistics.median(taken[min(WARM_UP, len(taken) - 1) :])
        rate = figures["step_tokens"] / step_s
        row = {"model": model.name, "layers": model.n_layers, "backend": backend, "step_s": step_s, "tokens/s": rate}
        row |= {"TFLOP/s": rate * flops / 1e12, "of peak": rate * flops / 1e12 / PEAK_TFLOPS, "losses": losses}
        if device == "cuda":
            row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
        rows.append(row)
        print(f"  {backend:12} {rate:9.0f} tokens/s  {row['of peak']:6.2%} of {PEAK_TFLOPS} TFLOP/s  "
              f"step {step_s * 1e3:.0f} ms  loss {losses[0]:.3f} -> {losses[-1]:.3f}", flush=True)  # fmt: skip
    for module in experts:
        module.backend = "auto"
    rows.append({"parts": split_by_part(trainer)})
    return rows


def split_by_part(trainer: Any) -> dict[str, float]:
    """Milliseconds of a step of one micro-batch by part, forward and backward together, on the GPU or in the CPU's
    threads; printed, and the GPU's kernels too. The trainer takes no other step after it."""
    import moetrain.train.engine as engine

    model, device = trainer.engine.model, trainer.device.type
    dispatchers = {}
    for block in model.layers.values():
        _name(block.attention, "forward", "attention")
        if block.moe is not None:
            _name(block.moe.router, "forward", "router")
            _name(block.moe.experts, "forward", "experts")
            dispatchers[id(block.moe.dispatcher)] = block.moe.dispatcher
    for dispatcher in dispatchers.values():
        _name(dispatcher, "dispatch", "dispatch")
        _name(dispatcher, "combine", "dispatch")
    _name(model.vocabulary, "loss", "loss")
    _name(trainer.engine.optimizer, "step", "optimizer")
    _name(engine, "clip_gradients", "clipping")
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    batches = trainer.loader.step(trainer.step)[:1]
    trainer.engine.train_step(batches, trainer.step, 1.0)
    with torch.profiler.profile(activities=activities) as profile:
        trainer.engine.train_step(batches, trainer.step, 1.0)
    events = list(profile.events())
    parts = by_part(events, _on_gpu if device == "cuda" else lambda event: event.self_cpu_time_total)
    total = max(sum(parts.values()), 1e-9)
    print("  a step of one micro-batch:")
    for name, took in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"    {took:9.2f} ms {took / total:6.1%}  {name}", flush=True)
    for name, took, calls in by_kernel(events)[:KERNELS]:
        print(f"    {took:9.2f} ms {calls:6} calls  {name[:70]}", flush=True)
    return parts


def _name(owner: Any, method: str, part: str) -> None:
    """Put the calls of a method into a range of the profile."""
    call = getattr(owner, method)

    def inside(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(f"part:{part}"):
            return call(*args, **kwargs)

    setattr(owner, method, inside)


def by_kernel(events: list[Any]) -> list[tuple[str, float, int]]:
    """(name, milliseconds, calls) of what ran on the GPU, that which took most time first."""
    taken: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU and not event.is_user_annotation:
            taken[event.name].append(event.time_range.elapsed_us() / 1e3)
    return sorted(((name, sum(each), len(each)) for name, each in taken.items()), key=lambda row: -row[1])


def _on_gpu(event: Any) -> float:
    """Microseconds of the kernels that an event of the CPU has started itself. A range is listed among its own."""
    return sum(kernel.duration for kernel in event.kernels if kernel.name != event.name)


def by_part(events: list[Any], cost: Callable[[Any], float]) -> dict[str, float]:
    """Milliseconds of each part; cost: an event's own microseconds. What runs in backward belongs to the part whose
    forward made the node: both have the node's number. An operation without a node has the number of the next one, so
    the last with a number counts."""
    places = _places(events)
    made: dict[int, str] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        part, node = places[id(event)]
        if node is None and event.sequence_nr >= 0:
            made[event.sequence_nr] = part
    parts: dict[str, float] = defaultdict(float)
    for event in events:
        part, node = places[id(event)]
        parts[part if node is None else made.get(node, "rest")] += cost(event) / 1e3
    return dict(parts)


def _places(events: list[Any]) -> dict[int, tuple[str, int | None]]:
    """For each event, by its id(): (the part whose range it is in, or "rest"; the number of the node whose backward it
    is in, if it is)."""
    places: dict[int, tuple[str, int | None]] = {id(None): ("rest", None)}
    for event in events:
        above = []
        while id(event) not in places:
            above.append(event)
            event = event.cpu_parent
        for each in reversed(above):
            place = places[id(each.cpu_parent)]
            if each.name.startswith("part:"):
                place = each.name.removeprefix("part:"), None
            elif each.scope == 1 and each.sequence_nr >= 0:  # at::RecordScope::BACKWARD_FUNCTION
                place = "rest", each.sequence_nr
            places[id(each)] = place
    return places
