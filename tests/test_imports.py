"""The design's import rules, read from the source files themselves."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("moetrain/**/*.py"), *ROOT.glob("kernels/**/*.py"), *ROOT.glob("launch/**/*.py")])

# From the ground up. A file imports from its own floor or below.
FLOORS: list[set[str]] = [
    {"moe_kernels"},
    {"moetrain.config", "moetrain.comm"},
    {"moetrain.moe"},
    {"moetrain.model"},
    {"moetrain.parallel"},
    {"moetrain.data", "moetrain.mixture", "moetrain.optim", "moetrain.checkpoint"}
    | {"moetrain.convert", "moetrain.upcycle", "moetrain.planner", "moetrain.report", "moetrain.evaluate"},
    {"moetrain.train"},
    {"moetrain.sweep"},
    {"moetrain.launch", "moetrain.start"},
    {"moetrain.terminal"},
    {"moetrain.cli"},
]
HEIGHT = {part: height for height, floor in enumerate(FLOORS) for part in floor}

# The few places that know the rank: the log, the writer of the run directory, and what one rank does for all of them.
KNOW_THE_RANK = {
    "moetrain/checkpoint/checkpointer.py",
    "moetrain/comm/ranks.py",
    "moetrain/train/finish.py",
    "moetrain/train/runtime.py",
    "moetrain/train/sinks.py",
    "moetrain/train/watch.py",
}


def module_of(file: Path) -> str:
    """Dotted name of a source file."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    parts = parts[1:] if parts[0] in ("kernels", "launch") else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """The part of the house that a module belongs to: "moetrain.moe", "moe_kernels" ..."""
    return ".".join(module.split(".")[:2]) if module.startswith("moetrain.") else module.split(".")[0]


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports, at any depth, relative imports made absolute."""
    package = module_of(file).split(".") if file.name == "__init__.py" else module_of(file).split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            # "from moetrain import config" names the part in the imported names
            yield from ((node.lineno, f"{name}.{alias.name}" if name == "moetrain" else name) for alias in node.names)


def where(file: Path, line: int) -> str:
    return f"{file.relative_to(ROOT)}:{line}"


def test_files_import_from_their_own_floor_or_below() -> None:
    broken = []
    for file in SOURCES:
        mine = part_of(module_of(file))
        for line, name in imports(file):
            part = part_of(name)
            if mine in HEIGHT and part in HEIGHT and HEIGHT[part] > HEIGHT[mine]:
                broken.append(f"{where(file, line)} imports {name}")
            if part.startswith("moetrain.") and part != "moetrain.__version__":
                assert part in HEIGHT, f"{where(file, line)}: {part} has no floor"
    assert not broken, broken


def test_every_part_has_a_floor() -> None:
    parts = {part_of(module_of(file)) for file in SOURCES}
    assert parts - set(HEIGHT) == {"moetrain", "moetrain_launch"}


@pytest.mark.parametrize(
    ("part", "never"),
    [
        ("moe_kernels", r"(?!torch\b|triton\b|moe_kernels\b|__future__)"),
        ("moetrain_launch", r"moetrain\b|moe_kernels\b"),
        ("moetrain.moe", r"hydra\b|omegaconf\b"),
        ("moetrain.model", r"hydra\b|omegaconf\b"),
        ("moetrain.comm", r"moetrain\b"),
        ("", r"scripts\b|tests\b"),
    ],
)
def test_parts_never_import(part: str, never: str) -> None:
    """moe_kernels needs torch and triton only (and Python's library); launch knows no models; models know no Hydra."""
    broken = []
    for file in SOURCES:
        if part and part_of(module_of(file)) != part:
            continue
        for line, name in imports(file):
            top = name.split(".")[0]
            own = part == "moetrain.comm" and (part_of(name) == part or name.startswith("moetrain.config.errors"))
            if re.match(never, name) and top not in sys.stdlib_module_names and not own:
                broken.append(f"{where(file, line)} imports {name}")
    assert not broken, broken


def test_building_a_model_loads_no_hydra() -> None:
    """Not even through other modules."""
    modules = [module_of(f) for f in SOURCES if part_of(module_of(f)) in ("moetrain.moe", "moetrain.model")]
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\nprint('hydra' in sys.modules)"
    )
    path = os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels", "launch"))
    command, env = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "False"


def test_no_global_holds_a_group_a_config_or_a_device() -> None:
    """By annotation, by the call that makes it, and by the ``global`` statement that would fill it later."""
    kinds = re.compile(r"\b(ProcessGroup|DeviceMesh|Config|ParallelDims|torch\.device|device)\b")
    makers = re.compile(r"(^|\.)(device|new_group|init_device_mesh|init_process_group|Config|load|build)$")
    broken = []
    for file in SOURCES:
        tree = ast.parse(file.read_text())
        for node in tree.body:
            if isinstance(node, ast.AnnAssign) and kinds.search(ast.unparse(node.annotation)):
                broken.append(where(file, node.lineno))
            value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
            if isinstance(value, ast.Call) and makers.search(ast.unparse(value.func)):
                broken.append(where(file, node.lineno))
        broken += [where(file, node.lineno) for node in ast.walk(tree) if isinstance(node, ast.Global)]
    assert not broken, broken


def test_few_files_know_the_rank() -> None:
    """Comparisons of a rank with 0 are found only where writing to the outside is decided."""
    rank = re.compile(r"(^|[._])(get_)?(local_|global_)?rank(\(.*\))?$")
    found = {}
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Compare):
                sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
                if any(rank.search(side) for side in sides) and "0" in sides:
                    found[file.relative_to(ROOT).as_posix()] = node.lineno
            elif (
                isinstance(node, ast.UnaryOp)
                and isinstance(node.op, ast.Not)
                and rank.search(ast.unparse(node.operand))
            ):
                found[file.relative_to(ROOT).as_posix()] = node.lineno
    assert set(found) <= KNOW_THE_RANK, {name: line for name, line in found.items() if name not in KNOW_THE_RANK}
