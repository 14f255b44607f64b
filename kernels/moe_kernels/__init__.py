"""Expert math of mixture-of-experts layers as pure functions of tensors: a reference, and fast paths that match it.

Imports torch, and triton where its kernels run; usable without moetrain.
"""

from moe_kernels.activation import ACTIVATIONS, activate
from moe_kernels.api import BACKENDS, choose_backend, expert_mlp, moe_mlp
from moe_kernels.choice import OP_BACKENDS
from moe_kernels.fp8 import dequantize, quantize_blocks, quantize_rows
from moe_kernels.late import late_weight_gradients
from moe_kernels.linear import linear
from moe_kernels.loss import VocabularyPart, linear_cross_entropy, token_counts
from moe_kernels.memory import keep_freed_memory
from moe_kernels.norm import rms_norm
from moe_kernels.packages import PACKAGES
from moe_kernels.permutation import permute, sum_rows, unpermute
from moe_kernels.product import PRODUCT_BACKENDS, grouped_mm
from moe_kernels.rotary import rope
from moe_kernels.router import Choice, router_topk
from moe_kernels.ternary import absmean, ternary
from moe_kernels.token_rounding import ROUNDINGS, round_tokens

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "OP_BACKENDS",
    "PACKAGES",
    "PRODUCT_BACKENDS",
    "ROUNDINGS",
    "Choice",
    "VocabularyPart",
    "absmean",
    "activate",
    "choose_backend",
    "dequantize",
    "expert_mlp",
    "grouped_mm",
    "keep_freed_memory",
    "late_weight_gradients",
    "linear",
    "linear_cross_entropy",
    "moe_mlp",
    "permute",
    "quantize_blocks",
    "quantize_rows",
    "rms_norm",
    "rope",
    "round_tokens",
    "router_topk",
    "sum_rows",
    "ternary",
    "token_counts",
    "unpermute",
]
