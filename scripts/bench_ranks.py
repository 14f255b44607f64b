"""A MoE layer on gloo ranks, for the benchmarks of dispatchers."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

ETP_DIM = {"w13": 2, "w2": 2}


@dataclass(frozen=True)
class Shape:
    """A MoE layer and its tokens per rank."""

    dim: int
    experts: int
    top_k: int
    expert_dim: int
    shared_dim: int
    tokens: int


def on_ranks(world: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """``fn(*args)`` on each of ``world`` gloo ranks; results in rank order."""
    context = mp.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        ranks = [
            context.Process(target=run_rank, args=(folder, rank, world, there, fn, args))
            for rank, (_, there) in enumerate(pipes)
        ]
        for process in ranks:
            process.start()
        for _, there in pipes:
            there.close()
        try:
            answers = [pickle.loads(here.recv_bytes()) for here, _ in pipes]
        except EOFError:
            raise SystemExit(f"bench: a rank of {fn.__name__} died; its error is above") from None
        finally:
            for process in ranks:
                process.join(5)
                process.kill()
    return answers


def run_rank(folder: str, rank: int, world: int, there: Any, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Body of one rank."""
    code = 1
    try:
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_SIZE=str(world))
        store = dist.FileStore(str(Path(folder) / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        there.send_bytes(pickle.dumps(fn(*args)))
        dist.barrier()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def build_layer(shape: Shape, kind: str, ep: int, etp: int, node_size: int = 1) -> Any:
    """A layer of ``shape``, the same weights on every rank, of which this rank keeps its part."""
    from torch.distributed.device_mesh import init_device_mesh

    from moetrain.config.schema import ExpertsConfig, ModelConfig, MoEConfig
    from moetrain.moe.build import build_moe_layer
    from moetrain.moe.dispatch import build_dispatcher

    moe = MoEConfig(
        num_experts=shape.experts, top_k=shape.top_k, expert_dim=shape.expert_dim, shared_dim=shape.shared_dim
    )
    cfg = ModelConfig(dim=shape.dim, moe=moe, router={"kind": "topk"})
    layer: Any = build_moe_layer(cfg, 0, {}, ExpertsConfig())
    generator = torch.Generator().manual_seed(0)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.02, generator=generator)
    options = {"kind": kind} | ({"node_size": node_size} if kind == "two_step" else {})
    mesh = init_device_mesh("cpu", (dist.get_world_size() // ep // etp, ep, etp), mesh_dim_names=("edp", "ep", "etp"))
    layer.dispatcher = build_dispatcher(options, shape.experts, mesh.get_group("ep"), mesh.get_group("etp"))
    for name, p in list(layer.experts.named_parameters()):
        part = p.detach().chunk(ep)[mesh.get_local_rank("ep")].chunk(etp, ETP_DIM[name])[mesh.get_local_rank("etp")]
        setattr(layer.experts, name, nn.Parameter(part.clone()))
    return layer


def tokens_of(shape: Shape, rank: int) -> Tensor:
    """x_TD of a rank."""
    return torch.randn(shape.tokens, shape.dim, generator=torch.Generator().manual_seed(100 + rank))


def step(layer: Any, x: Tensor) -> Tensor:
    """Forward and backward; gradients start anew. The output."""
    from moetrain.moe.routing import Carry, TokenContext

    layer.zero_grad(set_to_none=True)
    out, _ = layer(x.detach().requires_grad_(), Carry(x.new_zeros(0)), TokenContext(seq_len=len(x)))
    out.backward(torch.ones_like(out))
    return out.detach()


def print_table(rows: list[dict[str, Any]]) -> None:
    """Rows for people."""
    text = [list(rows[0]), *([f"{v:.3f}" if isinstance(v, float) else str(v) for v in r.values()] for r in rows)]
    widths = [max(len(line[i]) for line in text) for i in range(len(text[0]))]
    for line in text:
        print("  " + "  ".join(word.rjust(width) for word, width in zip(line, widths, strict=True)), flush=True)
