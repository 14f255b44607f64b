"""What a path holds: a run, a checkpoint of one, a Hugging Face folder, or one safetensors file with our names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moetrain.checkpoint import layout, newest
from moetrain.checkpoint.load import damage
from moetrain.checkpoint.weights import OPTIMIZER, SavedWeights, Spec
from moetrain.comm.ranks import Ranks
from moetrain.config import load, read
from moetrain.config.errors import CheckpointError, ConvertError
from moetrain.config.registry import ROUTERS
from moetrain.config.schema import Config, ExpertsConfig, ModelConfig
from moetrain.config.typed import to_dict, validate
from moetrain.convert.family import family_of
from moetrain.convert.files import TensorFile
from moetrain.convert.load import Imported, is_zero_bias, read_hf_config
from moetrain.convert.quantised import tensors_of
from moetrain.convert.source import Source
from moetrain.convert.tensors import SELECTION_BIAS, is_training_state
from moetrain.convert.tokenizer import tokenizer_at, tokenizer_of
from moetrain.data.sources import resolve
from moetrain.model.decoder import Decoder
from moetrain.moe.options import as_options

# Entry of a safetensors file of ours: the model's config as JSON.
MODEL_ENTRY = "moetrain_model"


@dataclass(frozen=True)
class Opened:
    """Weights with what belongs to them. path: of the files themselves (the step-N folder of a run).

    source: whole tensors under our names, all that ``model`` has and no more. tokenizer: see ``tokenizer_at``.
    """

    path: Path
    model: ModelConfig
    source: Source
    tokenizer: Path | None

    @property
    def has_bias(self) -> bool:
        """Whether there are selection biases, which the balance method "bias" holds."""
        return any(name.endswith(SELECTION_BIAS) for name in self.source.specs)


def open_weights(path: Path | str, verify: bool = True, ranks: Ranks | None = None) -> Opened:
    """The weights at ``path``. verify: compare a checkpoint's files with its manifest, the ``ranks`` sharing the work
    (collective, if there are several).

    Raises a UserError, one line, for a path that is none of what is read here, and for weights that are damaged or do
    not fit their config; all of it before a tensor is read.
    """
    path = Path(resolve(str(path)))
    if path.is_file() and path.suffix == ".safetensors":
        return _open_file(path)
    if (path / "config.json").is_file():
        return _open_hf(path)
    if (path / "config.yaml").is_file():
        return _open_run(path, verify, ranks)
    if (path / layout.MANIFEST).is_file() or (path / ".metadata").is_file():
        return _open_checkpoint(path, path.absolute().parent.parent, verify, ranks)
    if not path.exists():
        raise ConvertError(f"'{path}': there is no such file or folder")
    raise ConvertError(
        f"'{path}' holds no weights that are known here: a run directory has config.yaml, a checkpoint of one "
        f"{layout.MANIFEST}, a Hugging Face folder config.json; or give a *.safetensors file of 'moetrain convert'"
    )


def brings(path: str) -> dict[str, Any]:
    """The settings of a run that starts from the weights at ``path``: their model, their tokenizer if they have one,
    and the balance method that holds their selection biases, if there are any. Raises a UserError."""
    opened = open_weights(path, verify=False)
    found: dict[str, Any] = {"model": to_dict(opened.model)}
    if opened.tokenizer is not None:
        found["data"] = {"tokenizer": {"path": str(opened.tokenizer.absolute())}}
    if opened.has_bias:
        found["balance"] = to_dict(load(["balance=[bias]"]).balance)
    return found


def check_init(cfg: Config, opened: Opened) -> None:
    """Raise CheckpointError unless a run of ``cfg`` can start from ``opened``."""
    check_same(opened.source.specs, specs_of(cfg.model, cfg.balance), f"init={cfg.init}")


def has_optimizer(opened: Opened) -> bool:
    """Whether ``opened`` is a checkpoint that has an optimizer's state."""
    return isinstance(opened.source, SavedWeights) and bool(SavedWeights(opened.path, OPTIMIZER).specs)


def _open_run(path: Path, verify: bool, ranks: Ranks | None) -> Opened:
    found = newest(path / "checkpoints", verify, ranks)
    if found is None:
        raise CheckpointError(f"run '{path}' has no checkpoint yet")
    return _open_checkpoint(found, path, False, ranks)


def _open_checkpoint(path: Path, run: Path, verify: bool, ranks: Ranks | None) -> Opened:
    if verify:
        problem = damage(path, True, ranks or Ranks())
        if problem is not None:
            raise CheckpointError(f"checkpoint {path} is damaged: {problem}")
    if not (run / "config.yaml").is_file():
        raise CheckpointError(
            f"checkpoint {path} has no config: '{run / 'config.yaml'}' is missing; it belongs in RUN/checkpoints/"
        )
    cfg = read(run / "config.yaml")
    saved = SavedWeights(path)
    _check_fits(saved, cfg.model, cfg.balance, f"checkpoint {path}")
    # Converted weights have their own tokenizer or none: the data that their config names has nothing to do with them.
    return Opened(path, cfg.model, saved, tokenizer_of(cfg) if saved.trained else tokenizer_at(run))


def _open_hf(path: Path) -> Opened:
    model = read_hf_config(path)
    model.name = Path(model.name).name
    theirs = tensors_of(path)
    family = family_of(model)
    has_bias = any(is_zero_bias(family, name) and bool(theirs.read(name).any()) for name in theirs.specs)
    ours = specs_of(model, {"bias": {}} if has_bias else {})
    return Opened(path, model, Imported(model, theirs, ours), tokenizer_at(path))


def _open_file(path: Path) -> Opened:
    file = TensorFile(path)
    try:
        model = validate(ModelConfig, json.loads(file.metadata[MODEL_ENTRY]), "model")
        model.router = as_options(ROUTERS, model.router)
    except KeyError:
        raise ConvertError(
            f"'{path}' has no {MODEL_ENTRY} in its header: 'moetrain convert to=safetensors' did not write it; for a "
            "Hugging Face checkpoint give its folder"
        ) from None
    _check_fits(file, model, {"bias": {}}, f"'{path}'")
    return Opened(path, model, file, tokenizer_at(path.parent))


def model_entry(model: ModelConfig) -> str:
    """What ``MODEL_ENTRY`` of a safetensors file is."""
    return json.dumps(to_dict(model))


def specs_of(model: ModelConfig, balance: dict[str, Any]) -> dict[str, Spec]:
    """Shapes, by name, of the parameters and selection biases of ``model``; dtypes are those of a new one."""
    with torch.device("meta"):
        whole = Decoder(model, balance, ExpertsConfig())
    return {name: Spec.of(t) for name, t in whole.state_dict().items() if not is_training_state(name)}


def _check_fits(source: Source, model: ModelConfig, balance: dict[str, Any], what: str) -> None:
    """Raise CheckpointError unless ``source`` has what the model has; takes training state out of its ``specs``."""
    for name in [name for name in source.specs if is_training_state(name)]:
        del source.specs[name]
    check_same(source.specs, specs_of(model, balance), what)


def check_same(saved: dict[str, Spec], wanted: dict[str, Spec], what: str) -> None:
    """Raise CheckpointError unless the names and shapes of ``saved`` are those that are ``wanted``; a selection bias
    may be missing."""
    for name, spec in wanted.items():
        if name in saved and saved[name].shape != spec.shape:
            raise CheckpointError(
                f"{what} does not fit the model: {name} has shape {saved[name].shape} there and {spec.shape} here"
            )
        if name not in saved and not name.endswith(SELECTION_BIAS):
            raise CheckpointError(f"{what} does not fit the model: it lacks {name}")
    unknown = next((name for name in saved if name not in wanted), None)
    if unknown is not None:
        hint = "; set balance=[bias]" if unknown.endswith(SELECTION_BIAS) else ""
        raise CheckpointError(f"{what} does not fit the model: the model has no {unknown}{hint}")
