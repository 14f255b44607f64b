"""A mixture of many sources, against Hugging Face `datasets.interleave_datasets` and megatron-core's BlendedDataset.

The same made-up tokens for all: --sources shards of --windows sequences each, in documents whose mean length differs
from source to source; weights 1, 1/2, 1/3 ... Every contestant runs in a process of its own, in turns, one thread, no
workers.

start: from its imports to its first sample: opening all sources, and whatever index it builds. again: a second start
of the same run, which Megatron serves from the index that it wrote to disk. long: a first start of a run of --long
samples. samples/s: one sample after the other, as the contestant hands it out. batches/s: batches of 8 as int64
tensors, by our loader (no prefetch) and torch's DataLoader, over a fifth of the samples.
memory: peak resident size, less that after the imports; mapped pages that were touched are in it.
off: over every prefix of the run, the largest difference of a source from its weight, in samples; in tokens (given in
sequences, looked at every 100 samples); and of its share of the tokens, over prefixes of 1 million tokens or more.

"rows = documents" is how interleave_datasets is used on text that is not packed: its probabilities are those of rows.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from bench_step import machine

SEQ_LEN, BATCH, SEED, EOS, VOCAB = 128, 8, 1, 0, 8000
MILLION = 1_000_000
SURPLUS = (
    0.1  # samples that Megatron prepares beyond each weight; with its default, 0.005, it ends with an IndexError here
)
CONTESTANTS = {
    "moetrain": ("moetrain", ""),
    "datasets, rows = sequences": ("datasets", "sequences"),
    "datasets, streaming, rows = sequences": ("datasets", "stream sequences"),
    "datasets, streaming, rows = documents": ("datasets", "stream documents"),
    "megatron-core": ("megatron", ""),
}
NEEDS = {"datasets": "datasets", "megatron": "megatron-core"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench.py data``."""
    parser.add_argument("--sources", type=int, default=1000, help="number of sources")
    parser.add_argument("--windows", type=int, default=64, help="sequences that each source holds")
    parser.add_argument("--samples", type=int, default=10_000, help="samples that each contestant deals")
    parser.add_argument("--long", type=int, default=5_000_000, help="samples of the long run that is only started")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contestant; medians are shown")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Make the data, run everyone, print the table and the JSON; returns what goes into the JSON file."""
    for name, least in (("sources", 2), ("windows", 2), ("samples", 100), ("long", 100), ("rounds", 1)):
        if getattr(args, name) < least:
            raise SystemExit(f"bench: --{name} must be at least {least}, not {getattr(args, name)}")
    contestants = dict(CONTESTANTS)
    for name, (library, _) in CONTESTANTS.items():
        try:
            version(NEEDS.get(library, "numpy"))
        except PackageNotFoundError:
            print(f"left out: {name} ('{NEEDS[library]}' is not installed)")
            del contestants[name]
    with tempfile.TemporaryDirectory(prefix="bench-data-") as scratch:
        folder = Path(scratch)
        make_sources(folder, args.sources, args.windows, "datasets, rows = sequences" in contestants)
        rows: dict[str, dict[str, Any]] = {name: {} for name in contestants}
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
        for number in range(args.rounds):
            for name in contestants:
                found[name].append(in_process(name, folder, args.samples, args.long, number))
        for name, runs in found.items():
            dealt = np.load(folder / f"dealt-{list(CONTESTANTS).index(name)}.npz")
            rows[name] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            rows[name] |= deviations(dealt["sources"], dealt["tokens"], weights(args.sources))
    print(table(rows))
    versions = {NEEDS[library]: version(NEEDS[library]) for name in rows if (library := CONTESTANTS[name][0]) in NEEDS}
    result = {"command": " ".join(sys.argv), "machine": machine(), "versions": versions, "sources": args.sources,
              "samples": args.samples, "rows": rows, "ratios": ratios(rows)}  # fmt: skip
    print(json.dumps(result))
    return result


def weights(sources: int) -> np.ndarray:
    """Shares of the sources: Zipf's law."""
    raw = 1 / np.arange(1, sources + 1)
    return raw / raw.sum()


# ---- the data --------------------------------------------------------------------------------------------------------


def make_sources(folder: Path, sources: int, windows: int, arrow: bool) -> None:
    """Write every source as a shard in Megatron's format, and as saved data sets of rows if ``arrow``."""
    from moetrain.data.manifest import TOKENIZER_FILE, DomainInfo, Manifest, SplitInfo
    from moetrain.data.shards import ShardWriter, dtype_for, shard_prefix

    rng = np.random.default_rng(0)
    shards = folder / "shards"
    shards.mkdir()
    (shards / TOKENIZER_FILE).write_text("{}")
    domains = {}
    for number in range(sources):
        ids = rng.integers(1, VOCAB, windows * SEQ_LEN + 1).astype(np.int64)
        documents = cut(ids, 50 * 40 ** (number % 10 / 9), rng)  # means from 50 to 2,000 tokens
        infos = []
        for split, texts in (("train", documents), ("val", documents[:1])):
            writer = ShardWriter(shard_prefix(shards, name_of(number), split), dtype_for(VOCAB))
            for text in texts:
                writer.add(text)
            writer.close()
            infos.append(SplitInfo(len(texts), sum(map(len, texts)), 1, writer.sha256))
        domains[name_of(number)] = DomainInfo("", *infos)
        if arrow:
            save_rows(folder / "documents" / name_of(number), documents, number)
            rows = [ids[at : at + SEQ_LEN + 1] for at in range(0, windows * SEQ_LEN, SEQ_LEN)]
            save_rows(folder / "sequences" / name_of(number), rows, number)
    digest = hashlib.sha256(b"{}").hexdigest()  # of the tokenizer's file
    Manifest("bench", digest, digest, VOCAB, "<eos>", EOS, digest, domains).save(shards)


def cut(ids: np.ndarray, mean: float, rng: np.random.Generator) -> list[np.ndarray]:
    """``ids`` in documents of about ``mean`` tokens, each ended by EOS in place."""
    ends = [0]
    while ends[-1] < len(ids):
        ends.append(min(len(ids), ends[-1] + 2 + int(rng.exponential(mean))))
    ids[np.array(ends[1:]) - 1] = EOS
    return [ids[a:b] for a, b in itertools.pairwise(ends)]


def save_rows(folder: Path, rows: list[np.ndarray], number: int) -> None:
    """A saved data set with the rows' tokens and the number of their source."""
    import datasets

    datasets.disable_progress_bars()
    columns = {"input_ids": rows, "source": [number] * len(rows)}
    features = datasets.Features(
        {"input_ids": datasets.Sequence(datasets.Value("uint16")), "source": datasets.Value("int16")}
    )
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(folder))


def name_of(number: int) -> str:
    """Name of a source."""
    return f"s{number:05d}"


# ---- contestants -----------------------------------------------------------------------------------------------------

Dealt = tuple[int, int]  # source and tokens of a sample


class Contestant:
    """``open``: sources to a mixture, ready to deal. ``samples``: those from the first, one by one. ``batches``: the
    same in int64 tensors of 8 samples."""

    def __init__(self, folder: Path, samples: int, how: str) -> None:
        self.folder, self.count, self.how = folder, samples, how
        self.names = sorted(file.name.removesuffix(".train.idx") for file in (folder / "shards").glob("*.train.idx"))
        self.weights = weights(len(self.names))

    def open(self) -> None: ...

    def samples(self) -> Iterator[Dealt]: ...

    def batches(self) -> Iterator[Any]: ...


class Ours(Contestant):
    """moetrain's sampler and loader over the shards."""

    def open(self) -> None:
        from moetrain.data.dataset import TokenData
        from moetrain.data.sampler import Sampler

        self.data = TokenData.open(self.folder / "shards", vocab_size=VOCAB)
        shares = dict(zip(self.names, self.weights.tolist(), strict=True))
        self.sampler = Sampler(self.data, SEED, shares, SEQ_LEN)

    def samples(self) -> Iterator[Dealt]:
        number = {name: i for i, name in enumerate(self.names)}
        for i in range(self.count):
            name, ids = self.sampler[i]
            yield number[name], len(ids) - 1

    def batches(self) -> Iterator[Any]:
        from moetrain.data.loader import Loader

        loader = Loader(self.data, self.sampler, BATCH, BATCH, prefetch=0)
        for step in range(self.count // 5 // BATCH):
            yield loader.step(step)[0].tokens_BS


class Datasets(Contestant):
    """interleave_datasets over saved data sets."""

    def open(self) -> None:
        import datasets

        datasets.disable_progress_bars()
        kind = self.how.split()[-1]
        parts: list[Any] = [datasets.load_from_disk(str(self.folder / kind / name)) for name in self.names]
        if self.how.startswith("stream"):
            parts = [part.to_iterable_dataset() for part in parts]
        self.mixed: Any = datasets.interleave_datasets(
            parts, probabilities=self.weights.tolist(), seed=SEED, stopping_strategy="all_exhausted"
        )

    def samples(self) -> Iterator[Dealt]:
        rows = self.mixed.with_format("numpy")
        for row, _ in zip(rows, range(self.count), strict=False):
            ids = row["input_ids"]
            yield int(row["source"]), len(ids) - ("sequences" in self.how)

    def batches(self) -> Iterator[Any]:
        from torch.utils.data import DataLoader

        if "documents" in self.how:
            return  # rows of unlike lengths make no batch
        rows = self.mixed.with_format("torch")
        loader = DataLoader(rows, batch_size=BATCH)
        for batch, _ in zip(loader, range(self.count // 5 // BATCH), strict=False):
            yield batch["input_ids"].long()


class Megatron(Contestant):
    """BlendedDataset of GPTDatasets over the shards, with an index for ``samples``."""

    def ready(self) -> None:
        """What a training job has anyway before it opens data: a process group."""
        import torch.distributed as dist
        from megatron.core import parallel_state

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()

    def open(self) -> None:
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

        prefixes = [str(self.folder / "shards" / f"{name}.train") for name in self.names]
        config = GPTDatasetConfig(
            random_seed=SEED, sequence_length=SEQ_LEN, blend_per_split=[(prefixes, self.weights.tolist()), None, None],
            path_to_cache=str(self.folder / "cache"), tokenizer=Tokenizer(), reset_position_ids=False,
            reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
            mid_level_dataset_surplus=SURPLUS,
        )  # fmt: skip
        built = BlendedMegatronDatasetBuilder(GPTDataset, [self.count, None, None], lambda: True, config).build()
        self.mixed = built[0]

    def samples(self) -> Iterator[Dealt]:
        for i in range(self.count):
            sample = self.mixed[i]
            yield int(sample["dataset_id"]), len(sample["tokens"])

    def batches(self) -> Iterator[Any]:
        from torch.utils.data import DataLoader

        for batch, _ in zip(DataLoader(self.mixed, batch_size=BATCH), range(self.count // 5 // BATCH), strict=False):
            yield batch["tokens"]


class Tokenizer:
    """What GPTDataset asks of a tokenizer."""

    eod, pad, vocab_size, unique_identifiers = EOS, EOS, VOCAB, {"class": "bench"}


KINDS: dict[str, Callable[[Path, int, str], Contestant]] = {
    "moetrain": Ours,
    "datasets": Datasets,
    "megatron": Megatron,
}
IMPORTS = {
    "moetrain": ("moetrain.data.loader", "moetrain.data.sampler"),
    "datasets": ("datasets", "torch.utils.data"),
    "megatron": ("megatron.core.datasets.gpt_dataset", "megatron.core.datasets.blended_megatron_dataset_builder",
                 "torch.utils.data"),
}  # fmt: skip


def in_process(name: str, folder: Path, samples: int, long: int, number: int) -> dict[str, float]:
    """Run a contestant in a new process; what it found. ``number``: of the round."""
    found: dict[str, float] = {}
    for what, count in (("first", samples), ("again", samples), ("long", long)):
        if what != "again":
            shutil.rmtree(folder / "cache", ignore_errors=True)
        command = [sys.executable, __file__, name, str(folder), str(count), what]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise SystemExit(f"bench: {name} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
        found |= json.loads(done.stdout.splitlines()[-1])
    figures = f"start {found['start_s']:.2f} s, {found['samples_per_s']:,.0f} samples/s"
    print(f"round {number + 1}: {name}: {figures}", file=sys.stderr)
    return found


def child(name: str, folder: Path, samples: int, what: str) -> dict[str, float]:
    """Body of a contestant's process."""
    import importlib
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    library, how = CONTESTANTS[name]
    for module in IMPORTS[library]:
        importlib.import_module(module)
    contestant = KINDS[library](folder, samples, how)
    if isinstance(contestant, Megatron):
        contestant.ready()
    before = memory_mb("VmRSS")
    began = time.perf_counter()
    contestant.open()
    next(contestant.samples())
    start = time.perf_counter() - began
    if what != "first":
        return {f"start_{what}_s": start}
    opened = memory_mb("VmHWM") - before
    began = time.perf_counter()
    dealt = np.array(list(contestant.samples()), dtype=np.int32)
    took = time.perf_counter() - began
    peak = memory_mb("VmHWM") - before
    began = time.perf_counter()
    batches = sum(1 for _ in contestant.batches())
    batch_s = time.perf_counter() - began
    where = folder / f"dealt-{list(CONTESTANTS).index(name)}.npz"
    np.savez(where, sources=dealt[:, 0], tokens=dealt[:, 1])
    return {"start_s": start, "start_mb": opened, "peak_mb": peak, "samples": len(dealt),
            "samples_per_s": len(dealt) / took, "batches_per_s": batches / batch_s if batches else 0.0}  # fmt: skip


def memory_mb(what: str) -> float:
    """VmRSS (resident now) or VmHWM (its peak) of this process in MB. Unlike ru_maxrss, exec resets them."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024 / 1e6


# ---- what came out ---------------------------------------------------------------------------------------------------


def deviations(sources: np.ndarray, tokens: np.ndarray, shares: np.ndarray) -> dict[str, float]:
    """Largest distance from ``shares`` over all prefixes: in samples, in tokens (sequences), and as a share of the
    tokens after a million."""
    counts, sums = np.zeros(len(shares)), np.zeros(len(shares))
    most = {"off_samples": 0.0, "off_sequences": 0.0, "off_share": 0.0}
    for t, (source, size) in enumerate(zip(sources, tokens, strict=True), start=1):
        # Between its samples a source falls behind: it is furthest off just before and just after one.
        before = abs(counts[source] - shares[source] * (t - 1))
        counts[source] += 1
        sums[source] += size
        most["off_samples"] = max(most["off_samples"], before, abs(counts[source] - shares[source] * t))
        if t % 100 == 0:
            off, total = float(np.abs(sums - shares * sums.sum()).max()), float(sums.sum())
            most["off_sequences"] = max(most["off_sequences"], off / SEQ_LEN)
            if total >= MILLION:
                most["off_share"] = max(most["off_share"], off / total)
    most["off_samples"] = max(most["off_samples"], float(np.abs(counts - shares * len(sources)).max()))
    return most


COLUMNS = [("start_s", "start, s", "{:.2f}"), ("start_again_s", "again, s", "{:.2f}"),
           ("start_long_s", "long, s", "{:.2f}"), ("peak_mb", "memory, MB", "{:.0f}"),
           ("samples_per_s", "samples/s", "{:,.0f}"), ("batches_per_s", "batches/s", "{:,.0f}"),
           ("off_samples", "off, samples", "{:.2f}"), ("off_sequences", "off, tokens/128", "{:.2f}"),
           ("off_share", "off after 1M tokens", "{:.3%}")]  # fmt: skip


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows in Markdown; then each peer's cost in units of ours."""
    lines = [
        "| contestant | " + " | ".join(title for _, title, _ in COLUMNS) + " |",
        "| --- |" + " --- |" * len(COLUMNS),
    ]
    for name, row in rows.items():
        cells = [form.format(row[key]) if row[key] or "off" in key else "" for key, _, form in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| moetrain is better by | start | again | memory | samples/s | batches/s |",
        "| --- |" + " --- |" * 5,
    ]
    for name, ratio in ratios(rows).items():
        lines.append(f"| {name} | " + " | ".join(f"{value:.2f}" if value else "" for value in ratio.values()) + " |")
    return "\n".join(lines)


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each peer: by what factor moetrain is faster or smaller (below 1: the peer is)."""
    own = rows["moetrain"]
    found = {}
    for name, row in rows.items():
        if name != "moetrain":
            less = {key: row[key] / own[key] for key in ("start_s", "start_again_s", "start_long_s", "peak_mb")}
            more = {key: own[key] / row[key] if row[key] else 0.0 for key in ("samples_per_s", "batches_per_s")}
            found[name] = less | more
    return found


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))
