"""Compiles for Hopper what ``gpu_check.py`` launches, on a machine without a GPU: ``python scripts/gpu_cache.py DIR``.

A GPU's minutes are short, and half of them would go into compiling, 0.5 s a kernel. ``gpu_check.py --cache DIR`` takes
the kernels from there, on another machine and under another Python too. For Triton 3.6, some of whose inner parts are
exchanged. The kernels are called as ever, on the CPU, on few rows; nothing is launched, and all that is read is zeros.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import pkgutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

HOPPER = 90
NOT_CODE = ("extern_libs", "backend_name", "debug", "ptx_version", "ptx_options")  # options that are paths or versions


def use(folder: Path) -> None:
    """Let triton find kernels in ``folder``, and put there what is missing. Before any kernel is compiled."""
    import triton
    from triton.compiler import compiler
    from triton.runtime import jit

    if not triton.__version__.startswith("3.6."):
        sys.exit(f"gpu_cache: it knows Triton 3.6 alone, and this is {triton.__version__}; do without it")

    def key(src: Any, backend: object, options: Any, env_vars: object) -> str:
        """Triton's own has a hash of its library, which differs between builds for two Pythons."""
        kept = sorted((name, str(value)) for name, value in vars(options).items() if name not in NOT_CODE)
        return f"{triton.__version__} {src.hash()} {kept}"

    compiler.get_cache_key = jit.get_cache_key = key
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str(folder.resolve())
    for group in folder.glob("*/__grp__*.json"):  # they name their files by whole paths
        paths = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.resolve().parent / name) for name in paths}}))


def compile_only() -> list[str]:
    """From now on kernels are compiled for Hopper, not launched. What could not be is added to the list returned."""
    import moe_kernels.gpu
    from triton.backends.compiler import GPUTarget
    from triton.runtime import autotuner, driver, jit

    class Driver:
        """Names the target, and nothing else."""

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", HOPPER, 32)

    failed: list[str] = []
    compile_one = jit.JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        try:
            compile_one(self, *args, grid=grid, warmup=True, **options)
        except Exception as error:  # the compiler's own are of many types
            failed.append(f"{self.__name__}: {str(error).strip().splitlines()[-1]}")

    def run_all(self: Any, *args: Any, **options: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(options):
            self.fn.run(*args, **options, **config.all_kwargs())

    driver.set_active(Driver())
    jit.JITFunction.run, autotuner.Autotuner.run = run, run_all
    torch.cuda.get_device_capability = lambda *_: divmod(HOPPER, 10)
    torch.Tensor.new_empty = torch.Tensor.new_zeros  # type: ignore[method-assign]
    for module in pkgutil.iter_modules(moe_kernels.gpu.__path__):
        importlib.import_module(f"moe_kernels.gpu.{module.name}")
    from moe_kernels.gpu import tiles

    tiles.has_copy_engine = lambda device: True
    os.environ["TRITON_INTERPRET"] = "1"  # after the imports: the kernels are real, and "can run" on the CPU
    return failed


def layers(tiny: bool) -> None:
    """Layers as ``gpu_times`` and, with float32 weights and each row's weight apart, as the trainer calls them."""
    from gpu_times import ROUNDED, SHAPES, TINY
    from moe_kernels import expert_mlp, moe_mlp

    for s in [TINY] if tiny else [*SHAPES, *ROUNDED]:
        w13, w2 = torch.empty(s.E, 2, s.F, s.D).bfloat16(), torch.empty(s.E, s.D, s.F).bfloat16()
        x_TD, weights_TK, ids_TK = torch.zeros(256, s.D), torch.zeros(256, s.K), torch.arange(256 * s.K) % s.E
        leaves = [t.bfloat16().requires_grad_() for t in (x_TD, weights_TK, w13, w2)]
        out = moe_mlp(leaves[0], ids_TK.view(256, s.K), *leaves[1:], backend="triton")
        torch.autograd.grad(out, leaves, torch.zeros_like(out))
    D, F, E, K = (32, 16, 8, 2) if tiny else (2048, 1024, 64, 8)  # OLMoE's
    x_ND, index_R = torch.zeros(256, D).bfloat16().requires_grad_(), torch.arange(256 * K) % 256
    w13, w2 = torch.empty(E, 2, F, D).requires_grad_(), torch.empty(E, D, F).requires_grad_()
    weight_R, row_TK = torch.zeros(256 * K).requires_grad_(), torch.arange(256 * K).view(K, 256).t()
    counts = torch.full((E,), 256 * K // E)
    rows = {"index_R": index_R, "weight_R": weight_R, "row_TK": row_TK}
    out = expert_mlp(x_ND, counts, w13, w2, backend="triton", **rows)  # type: ignore[arg-type]
    torch.autograd.grad(out, [x_ND, w13, w2, weight_R], torch.zeros_like(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="kernels come there: cubins and json, some 10 MB")
    parser.add_argument("--tiny", action="store_true", help="those of one small shape: to see that it works")
    args = parser.parse_args()
    if args.folder.exists() and not args.folder.is_dir():
        parser.error(f"{args.folder} is not a folder; name one, or what is to become one")
    use(args.folder)
    failed = compile_only()
    layers(args.tiny)
    if not args.tiny:
        from gpu_check import checks
        from gpu_ops import cases, run_case

        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # of zeros: all fail
            checks("cpu", tiny=False)
        for case in cases("cpu", tiny=False):
            run_case(case, case.dtype, "triton")
    for file in args.folder.glob("*/*"):
        if file.suffix not in (".json", ".cubin"):
            file.unlink()  # what the compiler had in between
    print(f"{len(list(args.folder.glob('*/*.cubin')))} kernels in {args.folder}")
    if failed:
        sys.exit(f"gpu_cache: not compiled: {'; '.join(sorted(set(failed)))}")


if __name__ == "__main__":
    main()
