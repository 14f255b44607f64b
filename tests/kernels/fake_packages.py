"""Stand-ins for packages of GPU kernels: their public calls in plain torch, with the arguments that they document, and
strict about what the real ones are strict about. Sources: the files named below, as of 2026.
"""

from __future__ import annotations

import enum
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def install(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """Make ``import name`` find a module with these members, and its parents."""
    module = ModuleType(name)
    for key, value in members.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, child = name.rpartition(".")
    if parent:
        if parent not in sys.modules:
            install(monkeypatch, parent)
        monkeypatch.setattr(sys.modules[parent], child, module, raising=False)


def products(rows: Tensor, expert_R: Tensor, w_eXY: Tensor, b_eY: Tensor | None = None) -> Tensor:
    """Row by row: rows[r] @ w[expert_R[r]]."""
    out = torch.einsum("rx,rxy->ry", rows, w_eXY[expert_R])
    return out if b_eY is None else out + b_eY[expert_R]


def parallel_linear(
    inputs: Tensor,
    expert_weights: Tensor,
    k: int,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    expert_offsets: Tensor,
    expert_biases: Tensor | None = None,
    gates: Tensor | None = None,
    grouped_in: bool = False,
    grouped_out: bool = False,
) -> Tensor:
    """scattermoe/parallel_experts.py of shawntan/scattermoe: ParallelLinear, and kernels/ops.py scatter2scatter."""
    R, (E, X, _) = len(sorted_expert_idxs), expert_weights.shape
    assert inputs.is_contiguous() and inputs.shape[1] == X
    assert len(inputs) * k == R or (grouped_in and len(inputs) == R)
    assert sorted_scattered_idxs.sort().values.equal(torch.arange(R))
    assert expert_offsets.equal(sorted_expert_idxs.bincount(minlength=E).cumsum(0))
    assert sorted_expert_idxs.equal(sorted_expert_idxs.sort().values)
    rows = inputs if grouped_in else inputs[sorted_scattered_idxs // k]
    out = products(rows, sorted_expert_idxs, expert_weights, expert_biases)
    if not grouped_out:
        out = torch.zeros_like(out).index_put((sorted_scattered_idxs,), out)
    if gates is None:
        return out
    return (gates.unsqueeze(1) @ out.view(*gates.shape, -1)).squeeze(1)


class ActivationType(enum.Enum):
    """sonicmoe/enums.py of sonic-moe 0.1.2.post1."""

    SWIGLU = "swiglu"
    GEGLU = "geglu"


def moe_general_routing_inputs(
    x: Tensor,
    router_scores: Tensor,
    token_indices: Tensor,
    expert_indices: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    E: int,
    stream_id: int,
    activation_type: ActivationType,
    is_inference_mode_enabled: bool = False,
    concat_layout: bool = False,
) -> tuple[Tensor, Tensor]:
    """sonicmoe/functional/__init__.py of sonic-moe 0.1.2.post1. w1 (2 I, H, E), w2 (H, I, E), last dimension outermost
    in memory; the gate's rows of w1 and up's alternate, or with concat_layout all of the gate's come first."""
    assert (b1 is None) == (b2 is None) and isinstance(activation_type, ActivationType)
    assert w1.stride()[1] == 1 and w1.permute(2, 0, 1).is_contiguous() and w2.permute(2, 0, 1).is_contiguous()
    assert token_indices.dtype == expert_indices.dtype == torch.int32
    assert token_indices.equal(token_indices.sort().values) and not is_inference_mode_enabled
    expert_A, token_A = expert_indices.long(), token_indices.long()
    h = products(x[token_A], expert_A, w1.permute(2, 1, 0), b1)
    gate, up = h.chunk(2, -1) if concat_layout else (h[:, ::2], h[:, 1::2])
    f = nn.functional.silu(gate) if activation_type.value == "swiglu" else nn.functional.gelu(gate, approximate="tanh")
    y = products(f * up, expert_A, w2.permute(2, 1, 0), b2) * router_scores.float()[:, None].to(x.dtype)
    return torch.zeros_like(x).index_add(0, token_A, y), expert_A.bincount(minlength=E).int()


class _Gmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool) -> Tensor:
        ctx.save_for_backward(a, b, batch_sizes)
        ctx.trans_b = trans_b
        expert_R = torch.arange(len(b)).repeat_interleave(batch_sizes)
        return products(a, expert_R, b.transpose(1, 2) if trans_b else b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        a, b, batch_sizes = ctx.saved_tensors
        assert grad.is_contiguous() and ctx.trans_b
        da = products(grad, torch.arange(len(b)).repeat_interleave(batch_sizes), b)
        sizes = batch_sizes.tolist()
        parts = [dy.t() @ x for dy, x in zip(grad.split(sizes), a.split(sizes), strict=True)]
        nothing = torch.full_like(parts[0], float("nan"))  # what was in the memory
        return da, torch.stack([p if n else nothing for p, n in zip(parts, sizes, strict=True)]), None, None


def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """grouped_gemm/ops.py of tgale96/grouped_gemm 0.1 to 0.3. batch_sizes: int64, on the CPU."""
    assert batch_sizes.dtype == torch.int64 and batch_sizes.device.type == "cpu" and batch_sizes.sum() == len(a) > 0
    assert a.is_contiguous() and b.is_contiguous() and b.dim() == 3
    return _Gmm.apply(a, b, batch_sizes, trans_b)


class GroupedLinear(nn.Module):
    """transformer_engine/pytorch/module/grouped_linear.py of NVIDIA/TransformerEngine 2: parameters weight0, weight1,
    ... (out, in), which its forward looks up by name."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
    ) -> None:
        super().__init__()
        assert not bias and device == "meta", "a copy of the weights would be made"
        self.num_gemms = num_gemms
        for i in range(num_gemms):
            empty = torch.empty(out_features, in_features, dtype=params_dtype, device=device)
            self.register_parameter(f"weight{i}", nn.Parameter(empty))

    def forward(self, inp: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Tensor:
        assert len(m_splits) == self.num_gemms and isinstance(m_splits, list)
        weights = [getattr(self, f"weight{i}") for i in range(self.num_gemms)]
        pieces = inp.view(-1, inp.shape[-1]).split(m_splits)
        return torch.cat([x @ w.t() for x, w in zip(pieces, weights, strict=True)])


TILE = 4  # the real one's is 128


def m_grouped_nt(a: Tensor, b: Tensor, d: Tensor, grouped_layout: Tensor, compiled_dims: str = "nk") -> None:
    """m_grouped_bf16_gemm_nt_contiguous of deepseek-ai/DeepGEMM 2.1 to 2.8, csrc/apis/gemm.hpp: a (M, K), b (G, N, K),
    d (M, N). grouped_layout: int32 (M,), each row's group, -1 for padding, whose rows of d are not written."""
    assert grouped_layout.dtype == torch.int32 and len(grouped_layout) == len(a) == len(d) and len(a) % TILE == 0
    assert a.is_contiguous() and d.shape[1] == b.shape[1] and a.shape[1] == b.shape[2]
    for tile in grouped_layout.view(-1, TILE):
        assert len(set(tile.tolist()) - {-1}) == 1, "an expert's rows begin at a tile"
    real = grouped_layout >= 0
    d.fill_(float("nan"))
    d[real] = products(a[real], grouped_layout[real].long(), b.transpose(1, 2))


def m_grouped_nn(a: Tensor, b: Tensor, d: Tensor, grouped_layout: Tensor, compiled_dims: str = "nk") -> None:
    """m_grouped_bf16_gemm_nn_contiguous: b (G, K, N)."""
    m_grouped_nt(a, b.transpose(1, 2), d, grouped_layout)


def k_grouped_tn(
    a: Tensor,
    b: Tensor,
    d: Tensor,
    ks: list[int],
    ks_tensor: Tensor,
    c: Tensor | None = None,
    compiled_dims: str = "mn",
) -> None:
    """k_grouped_bf16_gemm_tn_contiguous: a (sum of ks, M), b (sum of ks, N), d (G, M, N); d = c + a^T b of each group,
    on Hopper with a c in float32 alone, which is d itself."""
    assert ks == ks_tensor.tolist() and ks_tensor.dtype == torch.int32 and all(k % TILE == 0 for k in ks)
    assert d.dtype == torch.float32 and c is d and sum(ks) == len(a) == len(b)
    d += torch.stack([x.t() @ y for x, y in zip(a.split(ks), b.split(ks), strict=True)])


DEEP_GEMM = {
    "__version__": "2.1.1+c9f8b34",
    "get_mk_alignment_for_contiguous_layout": lambda: TILE,
    "m_grouped_bf16_gemm_nt_contiguous": m_grouped_nt,
    "m_grouped_bf16_gemm_nn_contiguous": m_grouped_nn,
    "k_grouped_bf16_gemm_tn_contiguous": k_grouped_tn,
}


def install_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them."""
    install(monkeypatch, "scattermoe.parallel_experts", parallel_linear=parallel_linear)
    install(monkeypatch, "sonicmoe", moe_general_routing_inputs=moe_general_routing_inputs)
    install(monkeypatch, "sonicmoe.enums", ActivationType=ActivationType)
    install(monkeypatch, "grouped_gemm.ops", gmm=gmm)
    install(monkeypatch, "transformer_engine.pytorch", GroupedLinear=GroupedLinear)
    install(monkeypatch, "deep_gemm", **DEEP_GEMM)
