"""Tokens per second of a training step (forward, backward, clipping, AdamW): moetrain against transformers.

Both train the same weights on the same random tokens; the losses of the first step are printed side by side. Each
contestant lives in a process of its own, all of them take their steps in turn, and medians are compared, so that noise
of the machine meets all alike. moetrain steps as its trainer does (bf16: float32 weights and FSDP2, bfloat16
compute). transformers uses SDPA attention, torch's fused AdamW, and in bf16 the faster of autocast over float32 weights
and plain bfloat16 weights; heats find its fastest experts implementation first.

"At the dense rate" is how much faster than the peer a step would be that made the products of its layers (forward, and
twice that backward) at the rate of one large product of torch, measured just before, and did nothing else: what any
implementation could reach whose products are no faster than torch's.

Memory is the peak resident size of a contestant's process during its steps after the first (VmHWM, reset with
/proc/self/clear_refs), less its size before the model was built. So it has weights, gradients, optimizer state,
activations and what the allocator keeps, and not the libraries.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import multiprocessing as mp
import os
import platform
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LAYERS, DIM, HEADS, KV_HEADS = 4, 512, 8, 4
# name -> experts, expert width, experts per token, query/key norm (Mixtral has none, Qwen3-MoE one per head)
SHAPES = {"coarse": (8, 1024, 2, "none"), "fine": (64, 256, 8, "head")}
EXPERTS = ("grouped_mm", "batched_mm", "eager")
ADAMW = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
CLIP = 1.0


@dataclass(frozen=True)
class Spec:
    """One contestant. ``name`` "moetrain", or "transformers" with an experts implementation and a way to do bf16."""

    name: str
    shape: str
    dtype: str
    threads: int
    batch: int
    seq_len: int
    vocab: int
    weights: str
    experts: str = "auto"
    mode: str = ""
    keeps_memory: bool = False

    @property
    def label(self) -> str:
        """For people."""
        return self.name if self.name == "moetrain" else f"{self.name} {self.experts} {self.mode}".strip()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench.py step``."""
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bf16"], default=["float32", "bf16"])
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each contestant")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each contestant")
    parser.add_argument("--batch", type=int, default=4, help="sequences per step")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--vocab", type=int, default=8192, help="vocabulary")
    parser.add_argument(
        "--peers-keep-memory", action="store_true", help="give transformers moetrain's allocator setting as well"
    )
    parser.add_argument("--no-eager", action="store_true", help="leave out transformers' eager experts (slow)")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run all contests; prints a table row for each contestant and returns what goes into the JSON file."""
    for name in ("rounds", "threads", "batch", "seq_len", "vocab"):
        if getattr(args, name) < 1:
            raise SystemExit(f"bench: --{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            weights = str(Path(folder) / "weights")
            base = {"shape": shape, "threads": args.threads, "batch": args.batch, "seq_len": args.seq_len,
                    "vocab": args.vocab, "weights": weights}  # fmt: skip
            in_child(export_weights, Spec("moetrain", dtype="float32", **base))
            for dtype in args.dtypes:
                ours = Spec("moetrain", dtype=dtype, **base)
                rows += contest(ours, args.rounds, not args.no_eager, args.peers_keep_memory)
    return {"command": " ".join(sys.argv), "machine": machine(), "rows": rows}


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch
    import transformers

    flags = Path("/proc/cpuinfo").read_text().split()
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "amx_bf16": "amx_bf16" in flags,
        "avx512_bf16": "avx512_bf16" in flags,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load_average": os.getloadavg()[0],
    }


# ---- the contest -----------------------------------------------------------------------------------------------------


def contest(ours: Spec, rounds: int, with_eager: bool, keep: bool) -> list[dict[str, Any]]:
    """Heats among transformers' variants, then the final: moetrain, the fastest variant, and the fastest eager one."""
    print(f"\n{ours.shape}, {ours.dtype}, {ours.threads} threads", flush=True)
    heats = {}
    for peer in peers(ours, with_eager, keep):
        why = too_large(peer)
        seconds = None if why else min(race([peer], 2)[0]["seconds"])
        print(f"  heat: {peer.label:36s} {why or f'{seconds:.3f} s'}", flush=True)
        if seconds is not None:
            heats[peer] = seconds
    order = sorted(heats, key=lambda peer: heats[peer])
    finalists = list(dict.fromkeys([ours, order[0], *[p for p in order if p.experts == "eager"][:1]]))
    rate = in_pool(dense_rate, ours)
    results = race(finalists, rounds)
    our_median = statistics.median(results[0]["seconds"])
    rows = []
    for spec, result in zip(finalists, results, strict=True):
        median = statistics.median(result["seconds"])
        row = {k: v for k, v in asdict(spec).items() if k != "weights"} | {
            "pass": "step",
            "seconds": median,
            "seconds_min": min(result["seconds"]),
            "tokens_per_s": spec.batch * spec.seq_len / median,
            "moetrain_is_faster_by": median / our_median,
            "dense_gflops": rate / 1e9,
            "faster_at_the_dense_rate": median / (product_flops(ours) / rate),
            "peak_gib": result["peak_gib"],
            "first_loss": result["losses"][0],
            "loss_difference": abs(result["losses"][0] - results[0]["losses"][0]),
        }
        rows.append(row)
        print(describe(row, spec.label), flush=True)
    return rows


def describe(row: dict[str, Any], label: str) -> str:
    """A row for people."""
    speed = f"{row['tokens_per_s']:8.0f} tokens/s {row['seconds']:7.3f} s  x{row['moetrain_is_faster_by']:.2f}"
    speed += f" (x{row['faster_at_the_dense_rate']:.2f} at the dense rate)"
    return f"  {label:42s} {speed}  peak {row['peak_gib']:.2f} GiB  loss {row['first_loss']:.5f}"


def product_flops(spec: Spec) -> float:
    """Of a step's matrix products: 2 operations for each weight and token forward, 4 backward, causal attention too."""
    experts, width, top_k, _ = SHAPES[spec.shape]
    head_dim = DIM // HEADS
    attention = DIM * head_dim * 2 * (HEADS + KV_HEADS) + spec.seq_len * DIM  # two products, half of each seen
    layer = attention + DIM * experts + 3 * DIM * width * top_k
    return 6.0 * spec.batch * spec.seq_len * (LAYERS * layer + DIM * spec.vocab)


def dense_rate(spec: Spec) -> float:
    """Operations per second of one large product in the step's dtype, with its threads: the median of 9."""
    import torch

    torch.set_num_threads(spec.threads)
    dtype = torch.bfloat16 if spec.dtype == "bf16" else torch.float32
    a, b = torch.randn(2048, 1024).to(dtype), torch.randn(2048, 1024).to(dtype)
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        torch.mm(a, b.t())
        seconds.append(time.perf_counter() - start)
    return 2 * 2048 * 2048 * 1024 / statistics.median(seconds[3:])


def peers(ours: Spec, with_eager: bool, keep: bool) -> list[Spec]:
    """Every variant of transformers that may be the fastest."""
    modes = ["autocast", "bf16 weights"] if ours.dtype == "bf16" else [""]
    rest = {k: v for k, v in asdict(ours).items() if k not in ("name", "experts", "mode", "keeps_memory")}
    kinds = [e for e in EXPERTS if with_eager or e != "eager"]
    return [Spec("transformers", experts=e, mode=m, keeps_memory=keep, **rest) for e in kinds for m in modes]


def too_large(peer: Spec) -> str | None:
    """Why a variant cannot run here. batched_mm copies an expert's weights for every row."""
    _, width, top_k, _ = SHAPES[peer.shape]
    gib = peer.batch * peer.seq_len * top_k * 3 * width * DIM * (2 if peer.dtype == "bf16" else 4) / 2**30
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if peer.experts == "batched_mm" and 2 * gib > have:
        return f"left out: it gathers {gib:.0f} GiB of weights per layer, twice that with their gradient"
    return None


def race(specs: list[Spec], rounds: int) -> list[dict[str, Any]]:
    """Step times of contestants that take turns, after two steps each that are not timed."""
    context = mp.get_context("spawn")
    started = []
    for spec in specs:
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(there, spec))
        process.start()
        there.close()
        started.append((spec, here, process))
    results: list[dict[str, Any]] = [{"seconds": [], "losses": []} for _ in specs]
    try:
        for i in range(rounds + 2):
            for (spec, here, _), result in zip(started, results, strict=True):
                seconds, loss = ask(here, spec, i)
                result["losses"].append(loss)
                if i >= 2:
                    result["seconds"].append(seconds)
        for (spec, here, _), result in zip(started, results, strict=True):
            result["peak_gib"] = ask(here, spec, None)
    finally:
        for _, here, process in started:
            here.close()
            process.join(10)
            process.kill()
    return results


def ask(here: Connection, spec: Spec, message: int | None) -> Any:
    """One question to a contestant; its failure is raised here."""
    try:
        here.send(message)
        ok, answer = here.recv()
    except (EOFError, BrokenPipeError):
        ok, answer = False, "its process died (out of memory?)"
    if not ok:
        raise SystemExit(f"bench: {spec.label}, {spec.shape}, {spec.dtype} failed: {answer}")
    return answer


def in_pool(function: Any, *args: Any) -> Any:
    """What ``function`` returns in a fresh process."""
    with concurrent.futures.ProcessPoolExecutor(1, mp.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def in_child(function: Any, *args: Any) -> None:
    """Run ``function`` in a fresh process."""
    process = mp.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"bench: {function.__name__} failed")


# ---- in a contestant's process ---------------------------------------------------------------------------------------


def serve(there: Connection, spec: Spec) -> None:
    """Build the contestant, then answer: a step number with (seconds, loss), None with the peak memory in GiB."""
    try:
        import torch

        torch.set_num_threads(spec.threads)
        contestant = (Moetrain if spec.name == "moetrain" else Transformers)(spec)
        before = resident_kib("VmRSS")
        contestant.build()
        while True:
            message = there.recv()
            if message is None:
                there.send((True, (resident_kib("VmHWM") - before) / 2**20))
                continue
            generator = torch.Generator().manual_seed(message)
            tokens_BS = torch.randint(spec.vocab, (spec.batch, spec.seq_len), generator=generator)
            start = time.perf_counter()
            loss = contestant.step(tokens_BS, message)
            seconds = time.perf_counter() - start
            if message == 0:
                Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
            there.send((True, (seconds, loss)))
    except EOFError:
        pass
    except Exception as error:
        traceback.print_exc()
        there.send((False, str(error).splitlines()[0]))


def resident_kib(field: str) -> int:
    """A line of /proc/self/status: VmRSS (now) or VmHWM (peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def config(spec: Spec) -> Any:
    """moetrain's config of a shape."""
    from moetrain.config import load

    experts, width, top_k, qk_norm = SHAPES[spec.shape]
    model = {"vocab_size": spec.vocab, "dim": DIM, "n_layers": LAYERS, "max_seq_len": spec.seq_len,
             "attention.n_heads": HEADS, "attention.n_kv_heads": KV_HEADS, "attention.head_dim": DIM // HEADS,
             "attention.qk_norm": qk_norm, "moe.num_experts": experts, "moe.top_k": top_k,
             "moe.expert_dim": width}  # fmt: skip
    train = {"precision": spec.dtype, "seq_len": spec.seq_len, "micro_batch": spec.batch, "global_batch": spec.batch,
             "clip_norm": CLIP}  # fmt: skip
    optim = {"lr": ADAMW["lr"], "eps": ADAMW["eps"], "weight_decay": ADAMW["weight_decay"]}
    return load(
        ["balance=none", "optim=adamw"]
        + [f"model.{k}={v}" for k, v in model.items()]
        + [f"train.{k}={v}" for k, v in train.items()]
        + [f"optim.{k}={v}" for k, v in optim.items()]
    )


def build_ours(spec: Spec) -> tuple[Any, Any]:
    """(config, engine) on one rank."""
    import torch

    from moetrain.config.check import check_mapping
    from moetrain.parallel.mesh import ParallelDims
    from moetrain.train.engine import build_engine

    cfg = config(spec)
    dims = ParallelDims.build(check_mapping(cfg, 1), "cpu")
    return cfg, build_engine(cfg, dims, torch.device("cpu"))


def export_weights(spec: Spec) -> None:
    """moetrain's initial weights as a Hugging Face checkpoint in the folder ``spec.weights``."""
    import torch

    from moetrain.convert.export import export_hf
    from moetrain.train.runtime import process_group

    with process_group(torch.device("cpu"), 600):
        cfg, engine = build_ours(spec)
        export_hf(cfg.model, engine.model.state_dict(), Path(spec.weights))


class Moetrain:
    """The trainer's step on one rank: fused AdamW, clipping, loads."""

    def __init__(self, spec: Spec) -> None:
        import torch

        from moetrain.train import trainer  # noqa: F401  # all libraries in memory before it is measured
        from moetrain.train.runtime import process_group, set_up_torch

        self.spec = spec
        set_up_torch(config(spec), 1)
        torch.set_num_threads(spec.threads)
        self.group = process_group(torch.device("cpu"), 600)
        self.group.__enter__()

    def build(self) -> None:
        """The model and its optimizer."""
        _, self.engine = build_ours(self.spec)

    def step(self, tokens_BS: Any, step: int) -> float:
        """One optimizer step; the loss before it."""
        import torch

        from moetrain.data.loader import Batch

        targets_BS = torch.nn.functional.pad(tokens_BS[:, 1:], (0, 1), value=-100)
        n = len(tokens_BS)
        batch = Batch(tokens_BS, targets_BS, list(range(n)), torch.zeros(n, dtype=torch.int64))
        return self.engine.train_step([batch], step, 1.0).loss


class Transformers:
    """MixtralForCausalLM or Qwen3MoeForCausalLM, whichever class holds the exported weights."""

    def __init__(self, spec: Spec) -> None:
        import transformers
        from moe_kernels import keep_freed_memory

        if spec.keeps_memory:
            keep_freed_memory()
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        transformers.MixtralForCausalLM, transformers.Qwen3MoeForCausalLM  # noqa: B018  # imported before it is measured
        self.spec = spec

    def build(self) -> None:
        """The model and its optimizer."""
        import torch
        from transformers import AutoModelForCausalLM

        dtype = torch.bfloat16 if self.spec.mode == "bf16 weights" else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(
            self.spec.weights, dtype=dtype, attn_implementation="sdpa", experts_implementation=self.spec.experts
        ).train()
        self.model.config.use_cache = False
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, **ADAMW)  # type: ignore[arg-type]

    def step(self, tokens_BS: Any, step: int) -> float:
        """One optimizer step; the loss before it."""
        import torch

        with torch.autocast("cpu", torch.bfloat16, enabled=self.spec.mode == "autocast"):
            loss = self.model(input_ids=tokens_BS, labels=tokens_BS).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())
