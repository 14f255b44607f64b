"""A sweep before it runs: its words, the settings of ``sweep``, and the runs chosen so far, kept in ``sweep.yaml``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import Any

import yaml
from moetrain_launch import local, slurm
from moetrain_launch.job import LaunchError

from moetrain.config import Config, load, to_dict
from moetrain.config.check import check_mapping
from moetrain.config.errors import ConfigError
from moetrain.config.presets import parse
from moetrain.config.schema_sweep import SweepConfig
from moetrain.config.typed import validate
from moetrain.convert.open import brings
from moetrain.sweep.space import Space, axes, combinations, corners, space_of

FILE = "sweep.yaml"
VERSION = 1
TRIALS = 20  # of random and tpe, where the number is not given


@dataclass
class Sweep:
    """words: as given, with those of ``sweep.params``. runs: name -> words of those that are chosen."""

    folder: Path
    words: list[str]
    config_dirs: list[str]
    settings: SweepConfig
    runs: dict[str, list[str]] = field(default_factory=dict)

    @property
    def space(self) -> Space:
        """What is varied."""
        return space_of(self.words, self.config_dirs)

    @property
    def adaptive(self) -> bool:
        """Whether runs are chosen one by one, and not all at the start."""
        return self.settings.sampler != "grid"

    def config(self, name: str) -> Config:
        """The config of a run that is chosen, as it runs by itself. Raises ConfigError."""
        cfg = load_words(self.runs[name], self.config_dirs)
        elsewhere = self.settings.launcher in ("slurm", "submitit_local")  # jobs may start in another folder
        cfg.run_dir = str((self.folder.resolve() if elsewhere else self.folder) / name)
        if self.settings.launcher == "joblib" and self.settings.jobs > 1 and cfg.train.threads == 0:
            cfg.train.threads = max(1, local.cores() // (self.settings.jobs * cfg.launch.ranks))
        return cfg

    def save(self) -> None:
        """Write ``sweep.yaml``, whole or not at all. Raises ConfigError: it cannot be written."""
        table = {
            "sweep_version": VERSION,
            "config_dirs": self.config_dirs,
            "words": self.words,
            "sweep": to_dict(self.settings),
            "runs": self.runs,
        }
        temporary = self.folder / f"{FILE}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(yaml.safe_dump(table, sort_keys=False))
            temporary.replace(self.folder / FILE)
        except OSError as error:
            raise ConfigError(f"run_dir {self.folder} cannot be written: {error.strerror}; choose another") from error


def plan_sweep(overrides: Sequence[str], config_dirs: Sequence[str]) -> tuple[Sweep, Config]:
    """The sweep that ``overrides`` ask for, and the config of one of its runs. With grid all runs are chosen and
    checked, else every value of every key, the others at their first. Raises ConfigError."""
    settings, words = settings_of(overrides, config_dirs)
    space = space_of(words, config_dirs)
    folders = [str(Path(one).resolve()) for one in config_dirs]
    sweep = Sweep(Path(), words, folders, settings)
    if not sweep.adaptive:
        sweep.runs = {f"{n:03d}": chosen for n, chosen in enumerate(combinations(space))}
    elif not axes(space):
        raise ConfigError(f"sweep.sampler={settings.sampler} needs a key to vary, as optim.lr=interval(1e-4,1e-2)")
    configs = [load_words(words, folders) for words in sweep.runs.values() or corners(space)]
    check_settings(settings, configs)
    steps = max(cfg.train.steps for cfg in configs)
    if settings.prune != "none" and (settings.prune_after or 0) >= steps:
        raise ConfigError(f"sweep.prune_after={settings.prune_after} is no less than train.steps={steps}: no run would "
                          f"ever be stopped")  # fmt: skip
    sweep.folder = Path(configs[0].run_dir)
    return sweep, configs[0]


def settings_of(overrides: Sequence[str], config_dirs: Sequence[str]) -> tuple[SweepConfig, list[str]]:
    """The settings of ``sweep``, and ``overrides`` with the keys of ``sweep.params`` that they do not have. Raises
    ConfigError."""
    space = space_of(overrides, config_dirs)
    first = next(corners(space))
    settings = load(first, config_dirs=config_dirs, start=brings).sweep
    given = {override.key_or_group for override in parse(overrides)}
    more = [f"{key}={text}" for key, text in settings.params.items() if key.lstrip("+") not in given]
    return settings, [*overrides, *more]


def check_settings(settings: SweepConfig, configs: Sequence[Config]) -> None:
    """Raise ConfigError for settings that do not go together, or need a package that is not there."""
    if settings.sampler == "grid" and settings.trials is not None:
        raise ConfigError("sweep.trials is for sweep.sampler=random or tpe; grid runs every combination")
    if settings.launcher == "basic" and settings.jobs > 1:
        raise ConfigError(f"sweep.jobs={settings.jobs}: launcher basic runs one after the other; add "
                          f"sweep.launcher=joblib (or slurm)")  # fmt: skip
    if settings.prune != "none" and settings.metric.startswith("val_loss"):
        for t in (cfg.train for cfg in configs):
            if not 0 < t.eval_every < t.steps:
                raise ConfigError(
                    f"sweep.prune={settings.prune} needs {settings.metric} during a run: set train.eval_every below "
                    f"train.steps={t.steps}, or sweep.metric=loss"
                )
    if settings.sampler != "grid" or settings.prune != "none":
        need("optuna", f"sweep.{'sampler' if settings.sampler != 'grid' else 'prune'}")
    if settings.launcher == "joblib" or settings.jobs > 1:
        need("joblib", "sweep.jobs" if settings.launcher != "joblib" else "sweep.launcher=joblib")
    if settings.launcher in ("slurm", "submitit_local"):
        need("submitit", f"sweep.launcher={settings.launcher}")
    if settings.launcher == "slurm":
        try:
            slurm.refuse_partition(configs[0].launch.slurm.partition if configs else None)
        except LaunchError as error:
            raise ConfigError(f"sweep.launcher=slurm: {error}; sweep.launcher=joblib runs on this machine") from error


def need(package: str, what: str) -> None:
    """Raise ConfigError where ``package`` is not installed."""
    if find_spec(package) is None:
        raise ConfigError(f"{what} needs {package}, which is not installed here: pip install 'moetrain[sweep]'")


def load_words(words: Sequence[str], config_dirs: Sequence[str]) -> Config:
    """The config of one run of a sweep, which by itself is none. Raises ConfigError."""
    cfg = load(words, config_dirs=config_dirs, check=lambda cfg: check_mapping(cfg, cfg.launch.world), start=brings)
    if cfg.dry_run:
        raise ConfigError("dry_run=true shows one mapping at a time; take out -m")
    cfg.sweep = SweepConfig()
    return cfg


def note_sweep(sweep: Sweep) -> None:
    """Write ``sweep.yaml`` of a new sweep. Raises ConfigError: there is one, or a run."""
    folder = sweep.folder
    if (folder / FILE).exists():
        raise ConfigError(
            f"{folder} already holds a sweep; go on with it by 'moetrain train -m --resume {quote(str(folder))}', or "
            f"choose another run_dir"
        )
    if (folder / "config.yaml").exists():
        raise ConfigError(f"{folder} already holds a run; choose another run_dir for the sweep")
    sweep.save()


def read_sweep(folder: Path, changes: Sequence[str] = ()) -> Sweep:
    """The sweep in ``folder``; changes: words for settings of ``sweep``. Raises ConfigError."""
    try:
        table: Any = yaml.safe_load((folder / FILE).read_text(encoding="utf-8"))
        runs = {str(name): [str(word) for word in words] for name, words in table["runs"].items()}
        words, tree = list(table.get("words", [])), dict(table.get("sweep", {}))
        config_dirs = list(table.get("config_dirs", []))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
        raise ConfigError(f"-m --resume {folder}: not a sweep, it has no {FILE} that can be read") from None
    for override in parse(changes):
        name = override.key_or_group.removeprefix("sweep.")
        if name == override.key_or_group or override.is_sweep_override() or override.is_delete():
            raise ConfigError(f"'{override.input_line}': -m --resume DIR goes on with a sweep as it is; it takes only "
                              f"settings of the sweep itself, as sweep.trials=40")  # fmt: skip
        if name in ("sampler", "params"):
            raise ConfigError(f"sweep.{name} cannot change in the middle of a sweep; choose another run_dir")
        tree[name] = override.value()
    settings = validate(SweepConfig, tree, "sweep")
    sweep = Sweep(folder, words, config_dirs, settings, runs)
    check_settings(settings, [sweep.config(name) for name in list(runs)[:1]])
    return sweep


def exit_reason(run: Path) -> str | None:
    """Why the run in ``run`` ended; None where it has not."""
    try:
        return str(json.loads((run / "summary.json").read_text(encoding="utf-8"))["exit_reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def end(run: Path, reason: str, **figures: Any) -> None:
    """Write ``summary.json`` of a run that did not end by itself; the keys are those of docs/run-directory.md."""
    run.mkdir(parents=True, exist_ok=True)
    temporary = run / "summary.json.tmp"
    temporary.write_text(json.dumps({"version": 1, "exit_reason": reason, **figures}, indent=2) + "\n")
    temporary.replace(run / "summary.json")
