"""A whole layer of routed experts: inputs, gradients, the definition, and what its backward keeps."""

from __future__ import annotations

import torch
from moe_kernels import activate, moe_mlp
from torch import Tensor


def make_layer(
    T: int, K: int, E: int, D: int, F: int, *, matrices: int = 2, bias: bool = False, dtype: torch.dtype = torch.float64
) -> tuple[dict[str, Tensor], Tensor]:
    """(inputs of ``moe_mlp`` but ids, rounded to dtype, in float64; ids_TK). The last expert gets no token."""
    g = torch.Generator().manual_seed(T + K + E)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype).double()

    inputs = {"x_TD": normal(T, D), "weights_TK": normal(T, K).sigmoid().to(dtype).double()}
    inputs |= {"w13": normal(E, matrices, F, D, scale=D**-0.5), "w2": normal(E, D, F, scale=F**-0.5)}
    if bias:
        inputs |= {"b13": normal(E, matrices, F), "b2": normal(E, D)}
    ids_TK = torch.rand(T, E - 1, generator=g).topk(K).indices
    return inputs, ids_TK


def by_definition(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    w13: Tensor,
    w2: Tensor,
    b13: Tensor | None = None,
    b2: Tensor | None = None,
    activation: str = "swiglu",
) -> Tensor:
    """One token and one expert at a time."""
    out = []
    for t, x_D in enumerate(x_TD):
        parts = []
        for e, weight in zip(ids_TK[t], weights_TK[t], strict=True):
            h = w13[e] @ x_D if b13 is None else w13[e] @ x_D + b13[e]
            y = w2[e] @ activate(h.unbind(), activation)
            parts.append(weight * (y if b2 is None else y + b2[e]))
        out.append(torch.stack(parts).sum(0))
    return torch.stack(out)


def run(layer, inputs: dict[str, Tensor], ids_TK: Tensor, dtype: torch.dtype, **more: str) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    """The output, and the gradients of <output, cos(1, 2, ...)> in every input, in float64."""
    leaves = {name: t.to(dtype).requires_grad_() for name, t in inputs.items()}
    out_TD = layer(ids_TK=ids_TK, **leaves, **more)
    assert out_TD.dtype == dtype
    upstream = torch.arange(1.0, out_TD.numel() + 1, dtype=torch.float64).cos().view_as(out_TD).to(dtype)
    grads = torch.autograd.grad(out_TD, list(leaves.values()), upstream)
    return {name: t.double() for name, t in zip(("out", *leaves), (out_TD.detach(), *grads), strict=True)}


def kept_bytes(T: int, K: int, E: int, D: int, F: int, backend: str) -> int:
    """Bytes of floats that backward keeps of a layer in bf16, beside parameters and routing weights."""
    inputs, ids_TK = make_layer(T, K, E, D, F, dtype=torch.bfloat16)
    leaves = {name: t.bfloat16().requires_grad_() for name, t in inputs.items()}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.is_floating_point():
            kept[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        moe_mlp(ids_TK=ids_TK, backend=backend, **leaves)  # type: ignore[arg-type]
    own = [t for t in kept.values() if t.shape != (T * K,)]  # the weights in order of expert
    parameters = {leaves[name].data_ptr() for name in ("w13", "w2", "weights_TK")}
    return sum(t.numel() * t.element_size() for t in own if t.data_ptr() not in parameters)
