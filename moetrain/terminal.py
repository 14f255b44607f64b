"""How commands read their words and show tables and help on the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from moetrain.config.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


class Parser(argparse.ArgumentParser):
    """Argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see '{self.prog} --help'")


def command_parser(name: str, json: bool = False) -> Parser:
    """What every command understands: overrides, and how to show errors and help. json: it can print JSON, too."""
    parser = Parser(prog=f"moetrain {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, and presets as group=NAME")
    parser.add_argument("-h", "--help", action="store_true", help="show this; 'train --help optim' shows one group")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    parser.add_argument("--config-dir", action="append", default=[], metavar="DIR", help="a folder of your own presets")
    if json:
        parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    return parser


def wide_console(*whole: RenderableType) -> Console:
    """The terminal. A pipe or a file gets wide lines, so that grep finds a name with its description. whole: tables of
    numbers, none of which is cut off; on a narrow terminal their lines go on in the next."""
    from rich.console import Console
    from rich.measure import Measurement

    endless = Console(width=10_000, height=25)
    needed = max((Measurement.get(endless, endless.options, one).minimum for one in whole), default=0)
    size = Console().size
    width = max(size.width if sys.stdout.isatty() else 180, needed)
    return Console(width=width, height=size.height, highlight=False)


def show_help(parser: Parser, command: str, only: Sequence[str]) -> int:
    """Print a command's options, the presets, and every setting (or those below the paths in ``only``)."""
    from rich.markup import escape
    from rich.table import Table

    from moetrain.config import help

    console = wide_console()
    tables: list[tuple[str, list[help.Row]]] = []
    if not only:
        console.print(parser.format_help(), markup=False)
        tables.append(("presets, chosen with group=NAME", help.presets()))
    for path in only or [""]:
        found = [(section.title, section.rows) for section in help.sections(path)]
        if not found:
            raise ConfigError(f"'{path}' is not a setting or a group; see 'moetrain {command} --help'")
        tables += found
    for title, rows in tables:
        console.print(title, markup=False)
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for row in rows:
            default = f"= {row.default}" if row.default else ""
            table.add_row(f"  {escape(row.path)}", escape(f"{row.type} {default}"), escape(row.description))
        console.print(table, "")
    return 0
