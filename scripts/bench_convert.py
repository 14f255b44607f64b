"""Converting a checkpoint of Qwen3-30B-A3B's shape, at --layers layers and with --vocab rows, of random bfloat16.

The same bytes for all, each contestant in a process of its own, one thread:
copy: the files, one after the other, each synced to the disk. transformers: from_pretrained, then save_pretrained.
to=moetrain, to=hf: 'moetrain convert' there and back; what comes back is compared with what was there, bit for bit.
inspect: 'moetrain inspect' of the same folder.

MB/s: size of the weights over the time from the first to the last byte, imports not counted. to=moetrain hashes what it
writes, syncs it and reads it back; to=hf first compares the checkpoint with its manifest. memory: peak resident size
less that after the imports; of mapped files what was touched is in it, which is how transformers reads.
All lies in a temporary folder (--folder), which holds at most two copies of the weights at a time, and is removed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_step import machine

LIMIT = 4 * 1000**3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench.py convert``."""
    parser.add_argument("--layers", type=int, default=1, help="decoder layers, of 1.3 GB each")
    parser.add_argument("--vocab", type=int, default=16384, help="rows of the embedding and of the head (151,936)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contestant; medians are shown")
    parser.add_argument("--folder", type=Path, default=None, help="where the temporary folder is made")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run all contestants; print a table and return it."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="moetrain-bench-", dir=args.folder) as name:
        folder = Path(name)
        there, ours, out = folder / "in", folder / "ours", folder / "out"
        made = child("make", str(args.layers), str(args.vocab), str(there))
        print(f"{made['parameters']:,} parameters, {made['bytes'] / 1e9:.2f} GB, {made['files']} files\n")
        print(f"{'':14}{'seconds':>9}{'MB/s':>9}{'of copy':>9}{'memory, MB':>12}")

        def run(what: str, source: Path, made_there: Path | None = None) -> None:
            found = []
            for _ in range(args.rounds):
                if made_there is not None and made_there.exists():
                    shutil.rmtree(made_there)
                found.append(child(what, str(source), *([] if made_there is None else [str(made_there)])))
            row = {key: statistics.median(one[key] for one in found) for key in ("seconds", "memory_mb")}
            row["mb_per_s"] = made["bytes"] / 1e6 / row["seconds"]
            rows.append({"what": what, **row})
            share = row["mb_per_s"] / rows[0]["mb_per_s"]
            print(f"{what:14}{row['seconds']:9.2f}{row['mb_per_s']:9,.0f}{share:9.2f}{row['memory_mb']:12,.0f}")

        run("copy", there, out)
        run("transformers", there, out)
        shutil.rmtree(out)
        run("inspect", there)
        run("to=moetrain", there, ours)
        before = child("digest", str(there))["tensors"]
        shutil.rmtree(there)
        run("to=hf", ours, out)
        same = child("digest", str(out))["tensors"] == before
    print(f"\nback bit for bit: {'yes' if same else 'NO'}")
    return {"machine": machine(), "layers": args.layers, "vocab": args.vocab, "bytes": made["bytes"],
            "rows": rows, "same": same}  # fmt: skip


def child(what: str, *words: str) -> dict[str, Any]:
    """``what``, in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, __file__, what, *words], capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{what} failed:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def memory(key: str) -> float:
    """Resident megabytes of this process: now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1000


def measured(work: Callable[[], object]) -> dict[str, Any]:
    """Time and memory of ``work``, whose imports are done."""
    before, began = memory("VmRSS"), time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - began, "memory_mb": memory("VmHWM") - before}


def make(layers: str, vocab: str, out: str) -> dict[str, Any]:
    """Random weights in Hugging Face form, made and written part by part."""
    import torch

    from moetrain.config import load
    from moetrain.convert.export import export_hf
    from moetrain.convert.open import specs_of

    cfg = load(["model=qwen3-30b-a3b", f"model.n_layers={layers}", f"model.vocab_size={vocab}"]).model

    class Random:
        specs = specs_of(cfg, {})

        def read(self, name: str, box: tuple[slice, ...] = ()) -> torch.Tensor:
            shape = self.specs[name].shape
            sizes = [s.stop - s.start for s in box] + list(shape[len(box) :])
            return torch.randn(sizes, dtype=torch.bfloat16) * 0.02

    nbytes = 2 * sum(torch.Size(spec.shape).numel() for spec in Random.specs.values())
    if 2 * nbytes > LIMIT:
        raise SystemExit(f"two copies of these weights take {2 * nbytes / 1e9:.1f} GB, more than {LIMIT / 1e9:.0f}")
    export_hf(cfg, Random(), out, dtype=torch.bfloat16, max_shard_bytes=500 * 1000**2)
    files = list(Path(out).glob("*.safetensors"))
    return {"bytes": nbytes, "parameters": nbytes // 2, "files": len(files)}


def copy(there: str, out: str) -> dict[str, Any]:
    """A plain copy."""

    def work() -> None:
        Path(out).mkdir()
        for file in sorted(Path(there).iterdir()):
            shutil.copyfile(file, Path(out) / file.name)
            with (Path(out) / file.name).open("rb") as copied:
                os.fsync(copied.fileno())

    return measured(work)


def by_transformers(there: str, out: str) -> dict[str, Any]:
    """The peer."""
    import torch
    import transformers
    from transformers.models.qwen3_moe import modeling_qwen3_moe  # noqa: F401  # imported when it is first used

    def work() -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(there, dtype=torch.bfloat16)
        model.save_pretrained(out)

    return measured(work)


def convert(to: str, there: str, out: str) -> dict[str, Any]:
    """'moetrain convert'."""
    import transformers  # noqa: F401

    from moetrain.convert.command import parse, run

    asked = parse([f"to={to}", f"from={there}", f"out={out}"])
    return measured(lambda: run(asked))


def inspect(there: str) -> dict[str, Any]:
    """'moetrain inspect'."""
    import transformers  # noqa: F401

    from moetrain.convert.look import look
    from moetrain.convert.open import open_weights

    return measured(lambda: look(open_weights(there)))


def digest(folder: str) -> dict[str, Any]:
    """Hash of every tensor."""
    import hashlib

    import torch

    from moetrain.convert.files import TensorFolder

    tensors = TensorFolder(Path(folder))
    return {
        "tensors": {
            name: hashlib.sha256(tensors.read(name).view(-1).view(torch.uint8).numpy()).hexdigest()
            for name in sorted(tensors.specs)
        }
    }


CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {
    "make": make,
    "copy": copy,
    "transformers": by_transformers,
    "to=moetrain": lambda there, out: convert("moetrain", there, out),
    "to=hf": lambda there, out: convert("hf", there, out),
    "inspect": inspect,
    "digest": digest,
}

if __name__ == "__main__":
    print(json.dumps(CHILDREN[sys.argv[1]](*sys.argv[2:])))
