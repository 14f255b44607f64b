"""AFM-4.5B (Arcee, July 2025): transformers' ArceeForCausalLM."""

from __future__ import annotations

from typing import ClassVar

from moetrain.convert.families.llama import Llama
from moetrain.convert.family import register


@register
class Arcee(Llama):
    """Llama with a plain MLP, squared ReLU (arXiv 2109.08668), instead of a gated one."""

    name = "arcee"
    architecture = "ArceeForCausalLM"
    activations: ClassVar = {"relu2": "relu2", "gelu_pytorch_tanh": "gelu"}
