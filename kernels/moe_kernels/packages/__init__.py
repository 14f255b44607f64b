"""Expert layers through packages that people may have, one file each: ``obstacle`` and ``expert_mlp``.

A package is imported when its backend is asked for by name, never for being there. None of them is needed.
"""

from moe_kernels.packages import deep_gemm, grouped_gemm, scattermoe, sonicmoe, transformer_engine

PACKAGES = {
    "sonicmoe": sonicmoe,
    "scattermoe": scattermoe,
    "grouped_gemm": grouped_gemm,
    "transformer_engine": transformer_engine,
    "deep_gemm": deep_gemm,
}
