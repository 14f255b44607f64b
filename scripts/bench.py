"""Benchmarks against named peers, each in one run: ``python scripts/bench.py step --json FILE``.

step: tokens per second of a whole training step against transformers' model of the same shape (``bench_step.py``).
experts: rates of the experts on CPU as shares of a dense product's, against torch's grouped_mm (``bench_experts.py``).
dispatch: bytes, time and overlap of the dispatchers, against DeepSpeed's MoE layer (``bench_dispatch.py``).
placement: which ranks hold which experts, against plain expert parallelism (``bench_placement.py``).
data: a mixture of 1,000 sources, against Hugging Face datasets and megatron-core (``bench_data.py``).
convert: a 30B-shaped checkpoint there and back, against a file copy and transformers (``bench_convert.py``).
"""

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
import bench_placement
import bench_step


def main() -> int:
    """Run the benchmark that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", help="a training step against transformers", description=bench_step.__doc__,
                               formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    bench_step.add_arguments(step)
    experts = commands.add_parser("experts", help="the experts on CPU", description=bench_experts.__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    bench_experts.add_arguments(experts)
    dispatch = commands.add_parser("dispatch", help="what dispatchers move", description=bench_dispatch.__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    bench_dispatch.add_arguments(dispatch)
    placement = commands.add_parser("placement", help="which ranks hold which experts",
                                    description=bench_placement.__doc__,
                                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    bench_placement.add_arguments(placement)
    data = commands.add_parser("data", help="a mixture of many sources", description=bench_data.__doc__,
                               formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    bench_data.add_arguments(data)
    convert = commands.add_parser("convert", help="checkpoints there and back", description=bench_convert.__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    bench_convert.add_arguments(convert)
    for command in (step, experts, dispatch, placement, data, convert):
        command.add_argument("--json", type=Path, metavar="FILE", help="write the rows here as JSON")
    args = parser.parse_args()
    if args.json is not None and not args.json.parent.is_dir():
        parser.error(f"--json: there is no folder '{args.json.parent}'")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    benches = {
        "step": bench_step,
        "experts": bench_experts,
        "dispatch": bench_dispatch,
        "placement": bench_placement,
        "data": bench_data,
        "convert": bench_convert,
    }
    result = benches[args.command].main(args)
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
