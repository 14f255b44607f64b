"""Context parallel: attention over split sequences is attention over whole ones, in its outputs and its gradients."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from moetrain_launch.fork import run_ranks
from torch import Tensor

from moetrain.config.errors import ConfigError
from moetrain.config.schema import ModelConfig
from moetrain.model.attention.kernels import Rule, attend
from moetrain.model.places import Places
from moetrain.parallel.chunks import Chunks, chunk_mask
from moetrain.parallel.context import CORES, cut, head_tail_index, split
from tests.model.test_decoder import build, ids, tiny

METHODS = list(CORES)
B, N = 2, 48
# heads, key/value heads, width of keys, width of values
HEADS = {"gqa": (4, 2, 8, 8), "mqa": (8, 1, 6, 6), "odd": (12, 3, 4, 4), "mla": (4, 4, 6, 4)}
# documents that end inside chunks, at their bounds, and whole chunks apart; others in the second sequence
LENGTHS = ((1, 5, 18, 12, 11, 1), (40, 8))


def documents(lengths: tuple[tuple[int, ...], ...] = LENGTHS) -> Tensor:
    """document_BN of documents of these lengths."""
    rows = [[number for number, length in enumerate(row) for _ in range(length)] for row in lengths]
    return torch.tensor(rows)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "documents": {"documents": True},
    "window": {"window": 7},
    "wide window": {"window": 29},
    "sinks": {"sinks": True},
    "all": {"documents": True, "window": 7, "sinks": True},
}


def inputs(heads: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v, sinks and a gradient of the output."""
    H, G, d, v = HEADS[heads]
    g = torch.Generator().manual_seed(0)
    shapes = [(B, N, H, d), (B, N, G, d), (B, N, G, v), (H,), (B, N, H, v)]
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def run_attention(core: Any, tensors: list[Tensor], index_N: Tensor, places: Places, case: dict[str, Any]) -> Any:
    """Output and gradients of q, k, v (and sinks) on the tokens of ``index_N``."""
    q, k, v, sinks, dout = (t if t.dim() == 1 else cut(t, index_N) for t in tensors)
    leaves = [t.clone().requires_grad_() for t in ((q, k, v, sinks) if case.get("sinks") else (q, k, v))]
    sinks_H = leaves[3] if case.get("sinks") else None
    rule = Rule(0.4, case.get("window"), sinks_H, case.get("backend", "math"))
    out = core(*leaves[:3], places, rule)
    out.backward(dout)
    return [t.detach() for t in (out, *(leaf.grad for leaf in leaves))]


def on_rank(methods: list[str], heads: str, cases: list[dict[str, Any]], dtype: torch.dtype) -> Any:
    group = dist.group.WORLD
    assert group is not None
    index = head_tail_index(N, group.size(), group.rank())
    results = []
    for method in methods:
        for case in cases:
            places = Places(N, index, documents() if case.get("documents") else None)
            results.append(run_attention(CORES[method](group), inputs(heads, dtype), index, places, case))
    return results


@pytest.mark.parametrize("heads", list(HEADS))
@pytest.mark.parametrize("cp", [2, 4])
def test_split_attention_is_whole_attention(cp: int, heads: str) -> None:
    cases = [{**case, "backend": backend} for case in CASES.values() for backend in ("math", "sdpa")]
    worlds = run_ranks(cp, on_rank, METHODS, heads, cases, torch.float64, timeout=180)
    for i, (method, case) in enumerate((method, case) for method in METHODS for case in cases):
        whole = Places(N, None, documents() if case.get("documents") else None)
        expected = run_attention(attend, inputs(heads), torch.arange(N), whole, {**case, "backend": "math"})
        for j, name in enumerate(("out", "q", "k", "v", "sinks")[: len(expected)]):
            if name == "sinks":
                got = sum(world[i][j] for world in worlds)
                torch.testing.assert_close(got, expected[j], rtol=1e-12, atol=1e-12, msg=f"{method} {case} {name}")
                continue
            for rank, world in enumerate(worlds):
                want = cut(expected[j], head_tail_index(N, cp, rank))
                torch.testing.assert_close(world[i][j], want, rtol=1e-12, atol=1e-12, msg=f"{method} {case} {name}")


def test_bf16_is_as_near_as_one_rank_is() -> None:
    """Each rank's output and gradients are no further from float64 than one-process bf16 attention is (twice, for
    rounding's luck)."""
    case = CASES["all"]
    exact = run_attention(attend, inputs("gqa"), torch.arange(N), Places(N, None, documents()), case)
    single = run_attention(attend, inputs("gqa", torch.bfloat16), torch.arange(N), Places(N, None, documents()), case)
    worlds = run_ranks(4, on_rank, METHODS, "gqa", [case], torch.bfloat16)
    for i in range(len(METHODS)):
        for j in range(4):
            wanted = [cut(exact[j], head_tail_index(N, 4, rank)) for rank in range(4)]
            got = torch.cat([world[i][j].double() for world in worlds])
            assert worlds[0][i][j].dtype == torch.bfloat16
            assert (got - torch.cat(wanted)).norm() <= 2 * (single[j].double() - exact[j]).norm()


def model_config(name: str) -> ModelConfig:
    """GQA with fewer key/value heads than 4 ranks, windows and sinks (GPT-OSS), or MLA; a dense and a MoE layer."""
    cfg = tiny(name)
    cfg.attention.n_heads = 4
    cfg.moe.first_dense = 1
    return cfg


def run_decoder(name: str, method: str | None, masked: bool, recompute: str) -> Any:
    """Losses (sum and of each position), gradients and auxiliary sums; of this rank's tokens under ``method``."""
    cfg = model_config(name)
    model = build(cfg, {"z_loss": {"coef": 0.1}})
    if recompute != "compiled":
        for block in model.layers.values():
            block.recompute = recompute
    tokens = ids(cfg, B, N)
    targets, document_BN = tokens.roll(-1, 1), documents() if masked else None
    targets[0, 5:20] = -100
    if method is not None:
        split(model, dist.group.WORLD, method)  # type: ignore[arg-type]
        tokens, targets = (cut(t, model.index_of(N)) for t in (tokens, targets))  # type: ignore[misc]
    if recompute == "compiled":
        torch.compile = functools.partial(torch.compile, backend="eager")  # a rank is a fork: nobody else sees it
        for block in model.layers.values():
            block.compile_dense()
    with torch.no_grad():
        each, _ = model(tokens, targets, document_BN=document_BN, seq_len=N, reduction="none")
    loss, carry = model(tokens, targets, document_BN=document_BN, seq_len=N)
    (loss + carry.aux_A.sum()).backward()
    return each, loss.detach(), carry.aux_A.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "cp", "masked", "recompute"),
    [
        ("tiny-gpt-oss", 2, True, "none"),
        ("tiny-gpt-oss", 4, True, "full"),
        ("tiny-gpt-oss", 2, True, "compiled"),
        ("tiny-deepseek", 2, False, "selective"),
        ("tiny-deepseek", 4, True, "none"),
    ],
)
def test_shares_of_a_split_model_add_up(name: str, cp: int, masked: bool, recompute: str) -> None:
    each, loss, aux, gradients = run_decoder(name, None, masked, "none")
    for method in METHODS if recompute != "compiled" else ["ring"]:  # compiling takes long, and is alike for all
        ranks = run_ranks(cp, run_decoder, name, method, masked, recompute, timeout=240)
        for rank, (part, *_) in enumerate(ranks):
            torch.testing.assert_close(part, cut(each, head_tail_index(N, cp, rank)), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(sum(r[1] for r in ranks), loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(sum(r[2] for r in ranks), aux, rtol=1e-12, atol=0)
        for fqn, expected in gradients.items():
            got = sum(r[3][fqn] for r in ranks)
            scale = expected.norm()
            assert (got - expected).norm() <= 1e-12 * scale and scale > 0, (method, fqn)


def test_what_each_rank_needs_and_sees_against_a_count_by_hand() -> None:
    """Random lengths, windows and documents: index, needed chunks and masks, each token by token."""
    rng = random.Random(0)
    for _ in range(100):
        cp, C = rng.choice([2, 3, 4, 8]), rng.randint(1, 4)
        n = 2 * cp * C
        rows = [sorted(rng.randint(0, 3) for _ in range(n)), [0] * n] if rng.random() < 0.7 else None
        places = Places(n, None, None if rows is None else torch.tensor(rows))
        window = places.effective(rng.choice([None, rng.randint(1, n + 3)]))
        chunks = Chunks(cp, n, window)
        near = torch.tensor([[j <= i and (window is None or i - j < window) for j in range(n)] for i in range(n)])
        same = torch.tensor([[[x == y for y in row] for x in row] for row in rows or [[0] * n]])
        by_chunk = near.unflatten(0, (2 * cp, C)).unflatten(2, (2 * cp, C)).any(3).any(1)

        held = [head_tail_index(n, cp, rank).tolist() for rank in range(cp)]
        assert sorted(i for index in held for i in index) == list(range(n))
        for rank in range(cp):
            assert held[rank] == [i for c in chunks.held(rank) for i in range(c * C, (c + 1) * C)]
            needed = {c for own in chunks.held(rank) for c in range(2 * cp) if by_chunk[own, c]}
            assert chunks.needed(rank) == sorted(needed)
            sent = [chunks.held(source)[slot] for source in range(cp) for slot in chunks.slots(source, rank)]
            assert sorted(sent) == sorted(needed)
        for own in range(2 * cp):
            assert list(chunks.seen_by(own)) == [c for c in range(2 * cp) if by_chunk[own, c]]
            for keys in (chunks.seen_by(own), range(own, own + 1), range(max(0, own - 1), max(1, own))):
                seen = (near & same)[:, own * C : (own + 1) * C, keys.start * C : keys.stop * C]
                mask = chunk_mask(places, C, window, own, keys)
                if mask is None:
                    mask = torch.ones(C, C).bool().tril() if own in keys else torch.ones_like(seen[0])
                assert torch.equal(mask.view(-1, *seen.shape[1:]), seen)


def too_few_heads() -> str:
    with pytest.raises(ConfigError) as error:
        on_rank(["all_to_all"], "gqa", [{}], torch.float64)
    return str(error.value)


def test_sizes_that_do_not_divide_are_refused_with_the_sizes() -> None:
    with pytest.raises(ConfigError, match=r"sequences of 50 tokens .* parallel.cp=4 chunks; nearest length: 48"):
        head_tail_index(50, 4, 0)
    for text in run_ranks(3, too_few_heads):
        assert "parallel.cp=3" in text and "4 query heads" in text and "\n" not in text
