"""Benchmarks against named peers, each in one run: ``python scripts/bench.py step --json FILE``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

import bench_convert
import bench_data
import bench_dispatch
import bench_experts
import bench_lsh
import bench_overhead
import bench_placement
import bench_plan
import bench_simulate
import bench_step

# Of each: the file, and what it measures.
BENCHES = {
    "step": (bench_step, "tokens per second of a whole training step, against transformers' model of the same shape"),
    "experts": (bench_experts, "experts on CPU as shares of a dense product's rate, against torch's grouped_mm"),
    "dispatch": (bench_dispatch, "bytes, time and overlap of the dispatchers, against DeepSpeed's MoE layer"),
    "lsh": (bench_lsh, "rows sent and loss of dispatch=lsh, against uncompressed dispatch"),
    "placement": (bench_placement, "which ranks hold which experts, against plain expert parallelism"),
    "simulate": (bench_simulate, "the simulator of expert placement, beside Hecate's paper"),
    "plan": (bench_plan, "predicted against measured time and memory of six mappings on this machine's CPU"),
    "data": (bench_data, "a mixture of 1,000 sources, against Hugging Face datasets and megatron-core"),
    "convert": (bench_convert, "a 30B-shaped checkpoint there and back, against a file copy and transformers"),
    "overhead": (bench_overhead, "guards, metrics, spans, checks and snapshots, on against off"),
}


def main() -> int:
    """Run the benchmark that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (bench, what) in BENCHES.items():
        command = commands.add_parser(
            name, help=what, description=bench.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        bench.add_arguments(command)
        command.add_argument("--json", type=Path, metavar="FILE", help="write the rows here as JSON")
    args = parser.parse_args()
    if args.json is not None and not args.json.parent.is_dir():
        parser.error(f"--json: there is no folder '{args.json.parent}'")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    result = BENCHES[args.command][0].main(args)
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
