"""Models that no class of transformers has: exported with a module of their own, which transformers loads as remote
code (``trust_remote_code=True``)."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from moetrain.config.errors import ConvertError
from moetrain.config.registry import ROUTERS
from moetrain.config.schema import ModelConfig
from moetrain.config.typed import to_dict, validate
from moetrain.convert import remote
from moetrain.convert.family import Family, register
from moetrain.convert.layout import Piece, Rule, rule
from moetrain.moe.options import as_options

BIAS = rule("layers.{l}.moe.router.balance.bias.bias_E", "layers.{l}.moe.router.selection_bias")


class SameName(Rule):
    """Any tensor of ours, as it is."""

    def match(self, fqn: str) -> int | None:
        """Every tensor."""
        return -1

    def pieces(self, fqn: str, shape: tuple[int, ...]) -> Iterator[Piece]:
        """The tensor itself."""
        yield Piece(fqn, fqn, ())


@register
class Moetrain(Family):
    """All that ``ModelConfig`` can say, under our own names. The last choice of ``auto``."""

    name = "moetrain"
    architecture = "MoetrainForCausalLM"
    stock = False
    rules = (BIAS, SameName("", ("",)))
    zeros = (BIAS,)
    files: ClassVar = tuple(
        Path(remote.__file__).with_name(name) for name in ("configuration_moetrain.py", "modeling_moetrain.py")
    )

    def from_hf_config(self, config: Mapping[str, Any]) -> ModelConfig:
        """See ``Family``."""
        if not isinstance(config.get("moetrain"), dict):
            raise ConvertError("config.json of moetrain has no entry 'moetrain' with the model's config")
        cfg = validate(ModelConfig, config["moetrain"], "moetrain")
        cfg.router = as_options(ROUTERS, cfg.router)
        cfg.family = self.name
        return cfg

    def to_hf_config(self, cfg: ModelConfig) -> dict[str, Any]:
        """See ``Family``."""
        options = copy.copy(cfg)
        options.router = as_options(ROUTERS, cfg.router)
        configuration, modeling = (file.stem for file in self.files)
        return {
            "architectures": [self.architecture],
            "model_type": self.name,
            "auto_map": {
                "AutoConfig": f"{configuration}.MoetrainConfig",
                "AutoModelForCausalLM": f"{modeling}.{self.architecture}",
            },
            "tie_word_embeddings": False,  # where the head shares the embedding's weight, there is no head to tie
            "moetrain": json.loads(json.dumps(to_dict(options))),
        }

    def refusals(self, cfg: ModelConfig) -> list[str]:
        """None: the module is written for the whole of ``ModelConfig``; but only for routers that it knows."""
        kind = ROUTERS.entry_of(as_options(ROUTERS, cfg.router)).name
        return [] if kind == "topk" else [f"model.router.kind={kind}"]
