"""Which tensor of a Hugging Face checkpoint is which of ours: a family's rules, applied to the tensors of a model."""

from __future__ import annotations

from collections.abc import Iterable

from moetrain.config.errors import ConvertError
from moetrain.convert.family import Family
from moetrain.convert.layout import Piece, Rule

# Persistent buffers of training alone, with no meaning in an exported model.
TRAINING_STATE = (".balance.aux_loss.",)
# Buffers that an exported model may need, and that change nothing while they are zero.
SELECTION_BIAS = ".balance.bias.bias_E"


def is_training_state(fqn: str) -> bool:
    """Whether our tensor ``fqn`` is left out of checkpoints in Hugging Face form."""
    return any(part in fqn for part in TRAINING_STATE)


def find_rule(rules: Iterable[Rule], fqn: str) -> Rule | None:
    """The rule about our tensor ``fqn``."""
    return next((r for r in rules if r.match(fqn) is not None), None)


def pieces_of(family: Family, fqn: str, shape: tuple[int, ...]) -> list[Piece]:
    """The tensors that our ``fqn`` becomes. Raises ConvertError when no rule covers it."""
    found = find_rule(family.rules, fqn)
    if found is None:
        raise ConvertError(f"no rule of family {family.name} covers our tensor '{fqn}'; it cannot be exported")
    return list(found.pieces(fqn, shape))


def pieces_in_memory(family: Family, fqn: str, shape: tuple[int, ...]) -> list[Piece]:
    """The same tensors as transformers' models name them in memory; empty where that is no different."""
    found = find_rule(family.in_memory, fqn)
    return [] if found is None else list(found.pieces(fqn, shape))
