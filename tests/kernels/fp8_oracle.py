"""DeepSeek-V3's FP8 recipe (arXiv 2412.19437, section 3.3) in NumPy, from its definition: E4M3 as a table of all its
numbers, and an expert layer in float64 in which nothing is rounded but what goes into a product."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# All numbers from 0 up, by code: 3 bits of mantissa, 4 of exponent with bias 7; code 127 is NaN (arXiv 2209.05433).
E4M3 = np.array([m * 2.0**-9 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:127])


def codes(x: Array) -> NDArray[np.uint8]:
    """The codes of the nearest numbers; of two that are as near, the even code."""
    above = np.searchsorted(E4M3, abs(x)).clip(1, 126)
    up, down = E4M3[above] - abs(x), abs(x) - E4M3[above - 1]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, above - 1)
    return np.where(np.signbit(x), code + 128, code).astype(np.uint8)


def number(code: NDArray[np.uint8]) -> Array:
    return np.where(code < 128, 1.0, -1.0) * E4M3[code % 128]


def scale_of(tile: Array, pow2: bool = False) -> float:
    scale = float(abs(tile).max()) / 448
    return 2.0 ** np.ceil(np.log2(scale)) if pow2 else scale


def rounded(x: Array, rows: int, columns: int, pow2: bool = False) -> Array:
    """What is left of a matrix after quantising it in tiles of rows x columns."""
    out = np.empty_like(x)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            tile = x[i : i + rows, j : j + columns]
            scale = scale_of(tile, pow2)
            out[i : i + rows, j : j + columns] = number(codes(tile / scale)) * scale
    return out


def expert(x: Array, w13: Array, w2: Array, s: Array, dy: Array) -> dict[str, Array]:
    """One SwiGLU expert on its rows x (r, D), with weights s (r,): output, and gradients for that of the output, dy."""
    w_gate, w_up, w_down = (rounded(w, 128, 128) for w in (*w13, w2))
    x8, dy8, s1 = rounded(x, 1, 128, pow2=True), rounded(dy, 1, 128, pow2=True), s[:, None]
    gate, up = x8 @ w_gate.T, x8 @ w_up.T
    sigmoid = 1 / (1 + np.exp(-gate))
    a = gate * sigmoid * up
    da = dy8 @ w_down
    dgate = s1 * da * up * (sigmoid + gate * sigmoid * (1 - sigmoid))
    dup = s1 * da * gate * sigmoid
    x_again = rounded(x8, 128, 1)
    return {
        "y": rounded(s1 * a, 1, 128) @ w_down.T,
        "x_ND": rounded(dgate, 1, 128) @ w_gate + rounded(dup, 1, 128) @ w_up,
        "w13": np.stack([rounded(d, 128, 1).T @ x_again for d in (dgate, dup)]),
        "w2": rounded(dy8, 128, 1).T @ rounded(s1 * a, 128, 1),
        "weight_R": (da * a).sum(1),
    }
