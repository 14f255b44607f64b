"""What each parameter is to an optimizer, and the parameter groups that follow from it."""

from __future__ import annotations

import re
from typing import Any, Literal

from torch import Tensor, nn

from moetrain.config.errors import ConfigError

Role = Literal["matrix", "embedding", "head", "router", "vector"]

# Biases of batched experts are called b13 and b2: they have 2 or 3 dimensions and are still biases.
_BIAS = re.compile(r"bias|b\d*")


def role_of(fqn: str, p: Tensor) -> Role:
    """The role of parameter ``fqn``: told from its shape and from the model's names for its parts: embed, head, router.

    matrix: a hidden weight (.., F, D); dimensions before the last two number independent matrices, as those of experts.
    router: the router's weight, and any gate that maps to a single number. vector: norms, biases, attention sinks.
    """
    *modules, leaf = fqn.split(".")
    if p.dim() < 2 or _BIAS.fullmatch(leaf):
        return "vector"
    if "router" in modules or min(p.shape[-2:]) == 1:
        return "router"
    if "embed" in modules:
        return "embedding"
    return "head" if "head" in modules else "matrix"


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, each once. Raises ConfigError when there are none."""
    parameters = {fqn: p for fqn, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ConfigError("the model has no trainable parameter: nothing for an optimizer to do")
    return parameters


def decay_groups(
    parameters: dict[str, nn.Parameter], weight_decay: float, decay_embedding: bool, **settings: Any
) -> list[dict[str, Any]]:
    """``parameters`` in at most two groups: those that decay by ``weight_decay``, and those that do not.

    Norms, biases and other vectors never decay; weights with two dimensions or more do (as in GPT-3 and Megatron). That
    includes the embedding unless ``decay_embedding`` is False (OLMo 2, arXiv 2501.00656, leaves it out).
    settings: further keys of both groups. Groups are never empty: DCP cannot flatten the state of an empty one.
    """
    still: set[Role] = {"vector"} if decay_embedding else {"vector", "embedding"}
    decaying = [p for fqn, p in parameters.items() if role_of(fqn, p) not in still]
    others = [p for fqn, p in parameters.items() if role_of(fqn, p) in still]
    groups = [
        {"params": decaying, "weight_decay": weight_decay, **settings},
        {"params": others, "weight_decay": 0.0, **settings},
    ]
    return [group for group in groups if group["params"]]
