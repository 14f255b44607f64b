"""The words of ``moetrain mixture``: which there are, which go together, and what they may say."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moetrain.config.errors import ConfigError
from moetrain.config.presets import Presets, nearest
from moetrain.config.schema import Config
from moetrain.config.words import one_of, whole
from moetrain.mixture.plot import check_plot
from moetrain.mixture.predictors import PREDICTORS
from moetrain.mixture.propose import DRAWS
from moetrain.mixture.runs import LEAST_FIT
from moetrain.mixture.study import MEAN

HELP = f"""usage: moetrain mixture search=DIR runs=N [key=value ...] [settings of 'moetrain train']
       moetrain mixture fit=DIR [test=DIR] [key=value ...]
       moetrain mixture cluster=DIR [key=value ...] [settings of 'moetrain train']
       moetrain mixture collect=DIR

Learn from many small runs, each with its own mixture, how losses depend on the mixture; propose the mixture with
the lowest predicted loss, as settings for 'moetrain train'. docs/mixture.md tells more.

  search=DIR       do all of it: draw mixtures, train a small model on each, fit, propose. Everything is kept in DIR,
                   and the same command goes on where it was stopped
  runs=N           mixtures to try (RegMix); N,N,N: in rounds, each among what looked best so far (CLIMB)
  proxy=KIND       trained (default): a model for each mixture; merged: one for each domain, averaged for each mixture
  start=N          proxy=merged: steps of the shared start (default: half of train.steps)
  models=DIR       proxy=merged: models that there are, DIR/DOMAIN: run directories or folders of safetensors
  run=false        only draw the mixtures of the first round and print the sweep that trains them

  fit=DIR          fit runs that there are: a folder with a ..._mixture_... .csv and a ..._loss_... .csv (of several,
                   those that begin with train_), or fit=mixture.csv,loss.csv
  test=DIR         other runs, only to score the predictors on (of several files, those that begin with test_);
                   without it they are scored by cross-validation
  rows=N           learn from N of the runs only, chosen at random

  cluster=DIR      sort all documents of a data set into clusters by what they say: DIR becomes a data set whose domains
                   are the clusters, for search=
  clusters=N       how many at most (default 20)
  embed=DIR        a folder with a Hugging Face model whose hidden states stand for a document; default: its words

  collect=DIR      write the CSV files for fit= from a sweep of your own that set data.sources.NAME.weight

Of search= and fit=:
  target=COLUMN    the loss to make small (search=: a domain); 'mean', the default: the mean of all
  predictor=NAME   what the proposal goes by: {", ".join(PREDICTORS)}
  cap=X            no domain gets more than X times its prior (search=: its weight in the config, else its share of the
                   tokens; fit=: its mean weight in the fit runs)
  draws=N          mixtures that the search tries (default {DRAWS})
  seed=N           of everything random (default 0)
  plot=FILE        a picture of predicted and true losses, and of the mixture (search=: default DIR/mixture.png)"""

SHARED = ("target", "predictor", "cap", "draws", "seed", "plot")
VERBS = {
    "search": ("runs", "proxy", "start", "models", "run", *SHARED),
    "fit": ("test", "rows", *SHARED),
    "cluster": ("clusters", "embed", "seed"),
    "collect": (),
}
TAKE_SETTINGS = ("search", "cluster")
MOST_CLUSTERS = 1000


@dataclass(frozen=True)
class Asked:
    """The words of the command line, as HELP explains them. verb: the one of ``VERBS`` that is there, ``where`` its
    value. settings: words for the config."""

    verb: str
    where: str
    test: str = ""
    target: str = MEAN
    predictor: str = "default"
    rows: int | None = None
    cap: float | None = None
    draws: int = DRAWS
    seed: int = 0
    plot: str = ""
    runs: tuple[int, ...] = ()
    proxy: str = "trained"
    start: int | None = None
    models: str = ""
    run: bool = True
    clusters: int = 20
    embed: str = ""
    settings: list[str] = field(default_factory=list)


def parse(words: Sequence[str]) -> Asked:
    """Read words like "fit=DIR". Raises ConfigError for one that is unknown, given twice, or has no such value."""
    given, settings = split(words)
    verb = next(name for name in VERBS if name in given)
    for name in given:
        if name != verb and name not in VERBS[verb]:
            raise ConfigError(f"mixture: {name}= does not go with {verb}=; see 'moetrain mixture --help'")
    predictor = given.get("predictor", "default")
    if predictor not in PREDICTORS:
        raise ConfigError(f"no predictor is called '{predictor}'; {nearest(predictor, list(PREDICTORS))}")
    if "plot" in given:
        check_plot(given["plot"])
    asked = Asked(
        verb=verb,
        where=given[verb],
        test=given.get("test", ""),
        target=given.get("target", MEAN),
        predictor=predictor,
        rows=whole("mixture", given, "rows", 0, LEAST_FIT) if "rows" in given else None,
        cap=read_cap(given["cap"]) if "cap" in given else None,
        draws=whole("mixture", given, "draws", DRAWS, 1000),
        seed=whole("mixture", given, "seed", 0, 0),
        plot=given.get("plot", ""),
        runs=read_rounds(given["runs"]) if "runs" in given else (),
        proxy=one_of("mixture", given, "proxy", ("trained", "merged")),
        start=whole("mixture", given, "start", 0, 0) if "start" in given else None,
        models=given.get("models", ""),
        run=one_of("mixture", given, "run", ("true", "false")) == "true",
        clusters=whole("mixture", given, "clusters", 20, 2),
        embed=given.get("embed", ""),
        settings=settings,
    )
    check_together(asked)
    return asked


def split(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Our words and the settings among ``words``. Raises ConfigError: no verb, two, or words that nothing knows."""
    known = [*dict.fromkeys(name for verb, names in VERBS.items() for name in (verb, *names))]
    names = [word.partition("=")[0] for word in words]
    verbs = [verb for verb in VERBS if verb in names]
    if len(verbs) != 1:
        what = f"{' and '.join(verbs)} do not go together" if verbs else f"give one of {', '.join(VERBS)} =DIR"
        raise ConfigError(f"mixture: {what}; see 'moetrain mixture --help'")
    others = settings_known() if verbs[0] in TAKE_SETTINGS else []
    given: dict[str, str] = {}
    settings = []
    for word, name in zip(words, names, strict=True):
        if name in known:
            value = word.partition("=")[2]
            if not value or name in given:
                raise ConfigError(
                    f"mixture: {name} is " + ("given twice" if name in given else f"empty; give {name}=VALUE")
                )
            given[name] = value
        elif others and ("." in name or name.lstrip("+~").split("/")[0] in others):
            settings.append(word)
        else:
            raise ConfigError(f"mixture: there is no setting '{name}'; {nearest(name, [*known, *others])}")
    return given, settings


def settings_known() -> list[str]:
    """First parts of the words that ``moetrain train`` takes."""
    fields = [one.name for one in dataclasses.fields(Config)]
    return [*fields, *(group.split("/")[0] for group in Presets.find().groups())]


def check_together(asked: Asked) -> None:
    """Raise ConfigError for words that make no sense beside each other."""
    if asked.verb == "search":
        if not asked.runs:
            raise ConfigError("mixture: give runs=N, how many mixtures to try; the authors of RegMix took 512")
        if sum(asked.runs[:1]) < LEAST_FIT:
            raise ConfigError(f"runs={asked.runs[0]}: the first round needs {LEAST_FIT} mixtures at least")
        if asked.proxy != "merged" and (asked.start is not None or asked.models):
            raise ConfigError("start= and models= are for proxy=merged")
        if asked.start is not None and asked.models:
            raise ConfigError("start= is for models trained here; with models= they are there already")
        if asked.proxy == "merged" and not asked.run:
            raise ConfigError("run=false is for proxy=trained; there is no sweep with proxy=merged")
    for word in asked.settings:
        if word.split("=")[0] in ("run_dir", "dry_run"):
            raise ConfigError(f"'{word}' does not go with {asked.verb}=, which has its own folders")
    if asked.clusters > MOST_CLUSTERS:
        raise ConfigError(f"clusters={asked.clusters}: at most {MOST_CLUSTERS}")
    for name, folder in (("embed", asked.embed), ("models", asked.models)):
        if folder and not Path(folder).is_dir():
            raise ConfigError(f"{name}={folder}: there is no such folder")


def read_rounds(value: str) -> tuple[int, ...]:
    """ "64" or "64,32,16". Raises ConfigError."""
    if not re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*", value):
        raise ConfigError(f"runs takes a number, or one for each round as 64,32,16; got '{value}'")
    return tuple(int(number) for number in value.split(","))


def read_cap(value: str) -> float:
    """A number above 1: with 1 only the prior itself would be left. Raises ConfigError."""
    if not re.fullmatch(r"\d+(\.\d+)?", value) or float(value) <= 1:
        raise ConfigError(f"cap takes a number above 1, how many times its prior a domain may get; got '{value}'")
    return float(value)
