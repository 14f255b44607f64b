"""``moetrain COMMAND [options] [key=value ...]``: each command is a few lines that call one function."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from shlex import quote
from typing import NoReturn

from moetrain_launch import local
from moetrain_launch.job import CANNOT_RUN, LaunchError

from moetrain import __version__
from moetrain.config import Config
from moetrain.config.check import check_mapping, resolve_sizes
from moetrain.config.errors import ConfigError, UserError
from moetrain.start import asks, load_run, refuse_no_run, refuse_sweep, start_run, sweep, under_launcher
from moetrain.terminal import Parser, command_parser, show_help, wide_console

USAGE = "moetrain COMMAND [options] [key=value ...]"


def train(argv: Sequence[str]) -> int:
    """Train a model; prepares the data and starts the ranks by itself."""
    parser = command_parser("train")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="continue the run (-m: sweep) in DIR")
    parser.add_argument("--config", type=Path, metavar="FILE", help="start from a saved config.yaml instead of presets")
    parser.add_argument("-m", "--multirun", action="store_true", help="run every combination of sweeps like a=1,2")
    args = parser.parse_intermixed_args(argv)
    if args.help:
        return show_help(parser, "train", args.overrides)
    if args.multirun:
        if args.config:
            raise ConfigError("-m composes its runs from presets; it does not go with --config")
        return sweep(args.overrides, args.config_dir, args.resume)
    base = args.config
    if args.resume:
        refuse_no_run(args.resume)
        base = base or args.resume / "config.yaml"
    cfg = load_run(
        args.overrides,
        base=base,
        resumed=bool(args.resume),
        config_dirs=args.config_dir,
        check=lambda cfg: check_mapping(cfg, int(os.environ["WORLD_SIZE"]) if under_launcher() else cfg.launch.world),
    )
    if cfg.dry_run:
        return show_dry_run(cfg)
    return start_run(cfg, args.resume, asks("run_dir", args.overrides), args.traceback)


def launch(argv: Sequence[str]) -> int:
    """Start a run by torchrun, Slurm (launch=slurm) or Kubernetes; or 'launch status|logs|cancel RUN_DIR'."""
    if argv and argv[0] in ("status", "logs", "cancel"):
        return launched(argv[0], argv[1:])
    parser = command_parser("launch")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="continue the run in DIR")
    parser.add_argument("--print", action="store_true", help="show what would be submitted or run, and do nothing")
    parser.add_argument("-m", "--multirun", action="store_true", help="a Slurm array of every combination of a=1,2")
    args = parser.parse_intermixed_args(argv)
    if args.help:
        return show_help(parser, "launch", args.overrides or ["launch"])
    if args.multirun and (args.resume or args.print):
        raise ConfigError("launch -m goes with neither --resume nor --print; 'moetrain train -m --resume DIR' goes on")
    from moetrain import launch as launching

    if args.multirun:
        print(f"started: {launching.start_sweep(args.overrides, args.config_dir)}")
        return 0
    if args.resume:
        refuse_no_run(args.resume)
    base, resumed = args.resume / "config.yaml" if args.resume else None, bool(args.resume)
    cfg = load_run(args.overrides, base=base, resumed=resumed, config_dirs=args.config_dir, check=launching.check_nodes)
    refuse_sweep(cfg)
    if args.resume:
        cfg.run_dir = str(args.resume)
    if args.print:
        print(launching.show(cfg, bool(args.resume)), end="")
    else:
        started = launching.start(cfg, bool(args.resume))
        print(f"started: {started}; see 'moetrain launch status {quote(launching.target(cfg))}'")
    return 0


def launched(what: str, argv: Sequence[str]) -> int:
    """Ask after a run that was launched, or stop it."""
    parser = Parser(prog=f"moetrain launch {what}", allow_abbrev=False)
    parser.add_argument("run", metavar="RUN_DIR", help="the run directory, or k8s:NAMESPACE/NAME")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    if what == "logs":
        parser.add_argument("-n", "--lines", type=int, default=20, help="how many of the last lines (20)")
        parser.add_argument("-f", "--follow", action="store_true", help="go on until the run ends")
    args = parser.parse_args(argv)
    from moetrain import launch as launching

    if what == "logs":
        launching.logs(args.run, args.lines, args.follow)
    else:
        print({"status": launching.status, "cancel": launching.cancel}[what](args.run))
    return 0


def prepare(argv: Sequence[str]) -> int:
    """Turn text into the token shards that training reads."""
    parser = command_parser("prepare")
    args = parser.parse_intermixed_args(argv)
    if args.help:
        return show_help(parser, "prepare", args.overrides or ["data"])
    cfg = load_run(args.overrides, config_dirs=args.config_dir)
    from moetrain.data.prepare import prepare as prepare_data

    prepare_data(cfg.data)
    print(f"prepared: {cfg.data.dir}")
    return 0


def data(argv: Sequence[str]) -> int:
    """Show how a run's weights changed, and how much of each domain it has read: data RUN_DIR."""
    parser = Parser(prog="moetrain data", allow_abbrev=False)
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="the run directory; its newest checkpoint is read"
    )
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    refuse_no_run(args.run_dir, "data")
    from moetrain.data.show import show

    show(args.run_dir, wide_console())
    return 0


def mapping(argv: Sequence[str]) -> int:
    """Show which rank is where in both grids and what each group is for: world=16 node=8 parallel.tp=2 ..."""
    parser = command_parser("mapping", json=True)
    args = parser.parse_intermixed_args(argv)
    if args.help:
        return show_help(parser, "mapping", args.overrides or ["parallel"])
    numbers, overrides = take_numbers(args.overrides, ("world", "node"))
    cfg = load_run(overrides, config_dirs=args.config_dir, kinds=False)
    sizes = resolve_sizes(cfg.parallel, numbers.get("world", cfg.launch.world))
    try:
        refused = ""
        check_mapping(cfg, sizes.world)
    except ConfigError as error:
        refused = str(error)
    from moetrain.planner.mapping import as_json, as_tables

    node = numbers.get("node", 8)
    if args.json:
        print(json.dumps(as_json(sizes, node, cfg.parallel.schedule, refused)))
        return 0
    tables = as_tables(sizes, node, cfg.parallel.schedule)
    wide_console(tables).print(tables)
    if refused:
        print(f"'moetrain train' would refuse this mapping for model {cfg.model.name}: {refused}")
    return 0


def parity(argv: Sequence[str]) -> int:
    """Prove on this machine that a mapping gives the loss of one process: world=8 steps=20 parallel.tp=2 ...

    On a small copy of the model. Exit code 1 where it does not.
    """
    parser = command_parser("parity")
    args = parser.parse_intermixed_args(argv)
    if args.help:
        return show_help(parser, "parity", args.overrides or ["parallel"])
    numbers, overrides = take_numbers(args.overrides, ("world", "steps"))
    ranks = lambda cfg: numbers.get("world", cfg.launch.world)  # noqa: E731
    cfg = load_run(overrides, config_dirs=args.config_dir, check=lambda cfg: check_mapping(cfg, ranks(cfg)))
    from moetrain.train import parity

    result = parity.of_small_copy(
        cfg, ranks(cfg), numbers.get("steps", 20), asks("train.precision", overrides), wide_console()
    )
    print(json.dumps(result))
    return 0 if result["within"] else 1


def mixture(argv: Sequence[str]) -> int:
    """Choose the data mixture by many small runs: search=DIR runs=64 ..., fit=DIR, cluster=DIR, collect=DIR."""
    parser = command_parser("mixture")
    args = parser.parse_intermixed_args(argv)
    # The matrices are small: more threads gain little, and on busy cores they wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from moetrain.mixture.command import run
    from moetrain.mixture.words import HELP, parse

    if args.help:
        print(HELP)
        return 0
    run(parse(args.overrides), args.config_dir, wide_console())
    return 0


def upcycle(argv: Sequence[str]) -> int:
    """Make a model with experts of dense ones, or grow or shrink one: method=sparse from=HF_DIR out=DIR ..."""
    parser = Parser(prog="moetrain upcycle", add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*", metavar="key=value")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--traceback", action="store_true")
    args = parser.parse_intermixed_args(argv)
    from moetrain.upcycle import words

    if args.help:
        print("\n".join(words.help_lines()))
        return 0
    asked = words.parse(args.words)
    from moetrain.upcycle.command import run

    run(asked)
    return 0


def convert(argv: Sequence[str]) -> int:
    """Turn weights into another form: to=hf from=RUN out=DIR, to=moetrain from=HF_DIR out=DIR."""
    args = command_parser("convert").parse_intermixed_args(argv)
    from moetrain.convert import command

    if args.help or not args.overrides:
        print(command.HELP)
        return 0 if args.help else 2
    print(command.run(command.parse(args.overrides)))
    return 0


def inspect(argv: Sequence[str]) -> int:
    """Show what weights look like, with a picture: parts, norms, outliers, how alike experts are: inspect PATH."""
    args = command_parser("inspect", json=True).parse_intermixed_args(argv)
    from moetrain.convert import look_report
    from moetrain.convert.look import look
    from moetrain.convert.open import open_weights

    if args.help or not args.overrides:
        print(look_report.HELP)
        return 0 if args.help else 2
    path, plot = look_report.parse(args.overrides)
    found = look(open_weights(path))
    if args.json:
        print(look_report.as_json(found))
    else:
        wide_console().print(look_report.as_tables(found))
    if plot is not None:
        look_report.draw(found, plot)
    return 0


def evaluate(argv: Sequence[str]) -> int:
    """Show how good a model is: loss and perplexity per domain, multiple-choice tasks, lm-evaluation-harness."""
    args = command_parser("eval", json=True).parse_intermixed_args(argv)
    from moetrain.evaluate import command

    if args.help or not args.overrides:
        print(command.HELP)
        return 0 if args.help else 2
    found = command.run(command.parse(args.overrides))
    if args.json:
        print(json.dumps(found))
    else:
        wide_console().print(*command.as_tables(found))
    return 0


def generate(argv: Sequence[str]) -> int:
    """Continue a text with a model: generate RUN prompt="Once upon a time" temperature=0.8 ..."""
    args = command_parser("generate").parse_intermixed_args(argv)
    from moetrain.evaluate import generate

    if args.help or not args.overrides:
        print(generate.HELP)
        return 0 if args.help else 2
    print(generate.run(args.overrides))
    return 0


def suggest(argv: Sequence[str]) -> int:
    """Suggest a learning rate and a batch size for a model and a number of tokens: suggest model=NAME tokens=20e9."""
    args = command_parser("suggest", json=True).parse_intermixed_args(argv)
    from moetrain.planner import suggest

    if args.help or not args.overrides:
        print(suggest.HELP)
        return 0 if args.help else 2
    tokens, overrides = suggest.take_tokens(args.overrides)
    found = suggest.suggest(load_run(overrides, config_dirs=args.config_dir), tokens)
    print(json.dumps(suggest.as_json(found)) if args.json else "\n".join(suggest.lines(found)))
    return 0


def simulate(argv: Sequence[str]) -> int:
    """Replay routing over a described cluster: step time and memory of ep, fssdp, lsh ...: simulate cluster=NAME."""
    args = command_parser("simulate", json=True).parse_intermixed_args(argv)
    from moetrain.planner import replay_report

    if args.help or not args.overrides:
        print(replay_report.HELP)
        return 0 if args.help else 2
    asked, settings = replay_report.parse(args.overrides)
    found = replay_report.simulate(asked, load_run(settings, config_dirs=args.config_dir))
    if args.json:
        print(json.dumps(replay_report.as_json(found)))
    else:
        table = replay_report.as_table(found)
        wide_console(table).print(replay_report.heading(found), table, sep="\n")
    return 0


def plan(argv: Sequence[str]) -> int:
    """Predict memory, speed and the best mapping: plan model=NAME cluster=h100 gpus=64; calibrate, check RUN_DIR."""
    parser = command_parser("plan", json=True)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time, memory and the frontier")
    parser.add_argument("--emit", metavar="experiment=NAME", help="write the best mapping as a preset")
    args = parser.parse_intermixed_args(argv)
    from moetrain.planner import plan_words

    if args.help or not args.overrides:
        print(plan_words.HELP)
        return 0 if args.help else 2
    if args.overrides[0] in ("calibrate", "check"):
        from moetrain.planner import calibrate, plan_check

        what, rest = args.overrides[0], args.overrides[1:]
        found = calibrate.run(rest) if what == "calibrate" else plan_check.run(rest, wide_console(), args.json)
        print(found) if found else None
        return 0
    from moetrain.planner.plan_command import run

    run(args.overrides, load_run, args.config_dir, wide_console(), args.json, args.plot, args.emit)
    return 0


def make_report(argv: Sequence[str]) -> int:
    """Write one HTML page about a run, several runs side by side, or a sweep: report RUN_DIR [RUN_DIR ...]."""
    parser = Parser(prog="moetrain report", allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="run directories, or folders of sweeps")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page; without: report.html in the first RUN_DIR")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    from moetrain.report import write_report

    print(f"report: {write_report(args.runs, args.out)}")
    return 0


def watch(argv: Sequence[str]) -> int:
    """Show a run in the terminal while it is written: watch RUN_DIR."""
    parser = Parser(prog="moetrain watch", allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    from moetrain.report.live import watch as watch_run

    watch_run(args.run, wide_console())
    return 0


def version(argv: Sequence[str]) -> int:
    """Print the versions of moetrain, Python and torch."""
    command_parser("version").parse_args(argv)
    import platform
    from importlib.metadata import version as installed

    print(f"moetrain {__version__}, Python {platform.python_version()}, torch {installed('torch')}")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "launch": launch,
    "prepare": prepare,
    "data": data,
    "mapping": mapping,
    "parity": parity,
    "mixture": mixture,
    "convert": convert,
    "upcycle": upcycle,
    "inspect": inspect,
    "eval": evaluate,
    "generate": generate,
    "suggest": suggest,
    "simulate": simulate,
    "plan": plan,
    "report": make_report,
    "watch": watch,
    "version": version,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0, 1 a run failed, 2 the input cannot run, 130 Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    set_up_log()
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            show_commands()
            return 0 if words else 2
        if words[0] in ("-V", "--version"):
            words[0] = "version"
        if words[0] not in COMMANDS:
            from moetrain.config.presets import nearest

            raise ConfigError(f"there is no command '{words[0]}'; {nearest(words[0], list(COMMANDS))}")
        return COMMANDS[words[0]](words[1:])
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, LaunchError, OSError) as error:
        if "--traceback" in words:
            raise
        return report(error)


def report(error: Exception) -> int:
    """Show ``error`` as one line, or leave it for the process that started this rank; return the exit code."""
    line = " ".join(str(error).split())
    code = error.exit_code if isinstance(error, UserError) else CANNOT_RUN if isinstance(error, LaunchError) else 1
    local.show_error(line, code)
    return code


def show_dry_run(cfg: Config) -> int:
    """Print what every rank of ``cfg`` would hold and send, then all numbers as one line of JSON."""
    if "WORLD_SIZE" in os.environ:
        raise ConfigError("dry_run=true is one process for any number of ranks; start it without a launcher")
    from moetrain.planner.dry_report import as_json, as_tables
    from moetrain.planner.dry_run import dry_run

    sizes = check_mapping(cfg, cfg.launch.world)
    figures = dry_run(cfg, sizes)
    tables = as_tables(cfg, sizes, figures)
    wide_console(tables).print(tables)
    print(as_json(cfg, sizes, figures))
    return 0


def take_numbers(words: Sequence[str], names: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """The whole numbers that ``words`` like "world=16" give to ``names``, and the other words. Raises ConfigError."""
    numbers, others = {}, []
    for word in words:
        name, _, value = word.partition("=")
        if name not in names:
            others.append(word)
        elif not value.isascii() or not value.isdigit() or int(value) < 1:
            raise ConfigError(f"{name} takes a whole number of 1 or more; got '{value}'")
        else:
            numbers[name] = int(value)
    return numbers, others


def set_up_log() -> None:
    """Show moetrain's log lines on the terminal; a run adds its own log file."""
    logger = logging.getLogger("moetrain")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def show_commands() -> None:
    """Print the commands."""
    print(f"usage: {USAGE}\n")
    for name, function in COMMANDS.items():
        print(f"  {name:10} {(function.__doc__ or '').splitlines()[0]}")
    print("\n'moetrain train --help' lists every setting, 'moetrain train --help optim' those of one group.")


def entry() -> NoReturn:
    """The console command."""
    try:
        code = main()
    except Exception:
        if "RANK" not in os.environ:
            raise
        traceback.print_exc()
        code = 1
    if code and "RANK" in os.environ:
        # A rank that fails may leave collectives and their threads behind, on which the usual exit would abort.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    entry()
