"""Expert math of mixture-of-experts layers as pure functions of tensors: a reference, and fast paths that match it.

Imports torch, and triton where its kernels run; usable without moetrain.
"""

from moe_kernels.activation import ACTIVATIONS, activate
from moe_kernels.api import BACKENDS, choose_backend, expert_mlp, moe_mlp
from moe_kernels.loss import VocabularyPart, linear_cross_entropy, token_counts
from moe_kernels.memory import keep_freed_memory
from moe_kernels.packages import PACKAGES
from moe_kernels.ternary import absmean, ternary
from moe_kernels.token_rounding import ROUNDINGS, round_tokens

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "PACKAGES",
    "ROUNDINGS",
    "VocabularyPart",
    "absmean",
    "activate",
    "choose_backend",
    "expert_mlp",
    "keep_freed_memory",
    "linear_cross_entropy",
    "moe_mlp",
    "round_tokens",
    "ternary",
    "token_counts",
]
