"""Ready-made tokens: OLMo's .npy and Megatron's pairs give the shards of the ids that they hold, and what cannot be
tokens of the tokenizer is refused in one line before anything is written."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moetrain.config.errors import DataError
from moetrain.config.schema_data import DataConfig, SourceConfig, TokenizerConfig
from moetrain.data import tokens
from moetrain.data.dataset import TokenData
from moetrain.data.prepare import prepare
from moetrain.data.tokenizer import ids_of
from tests.data.conftest import config, document

TEXTS = [document("food", n) for n in range(60)]
CODES = {"uint16": 8, "int32": 4, "int64": 5}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]], int]:
    """(tokenizer.json, ids of TEXTS, end-of-document id)."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.txt").write_text("%%\n".join(TEXTS), encoding="utf-8")
    cfg = config(folder, {"a": SourceConfig(paths=[str(folder / "a.txt")], delimiter="^%%\n")})
    prepare(cfg, progress=False)
    data = TokenData.open(cfg.dir)
    return data.tokenizer_path, ids_of(data.tokenizer(), TEXTS), data.eos_id


def flat(documents: list[list[int]], eos: int) -> list[int]:
    return [token for ids in documents for token in (*ids, eos)]


def pair(documents: list[list[list[int]]], dtype: str) -> dict[str, bytes]:
    """a.idx and a.bin of documents of sequences of ids, by the layout in megatron-core's indexed_dataset.py."""
    sequences = [sequence for sequences in documents for sequence in sequences]
    starts = np.cumsum([0] + [len(s) for s in sequences])[:-1] * np.dtype(dtype).itemsize
    bounds = np.cumsum([0] + [len(d) for d in documents])
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(sequences), len(bounds))
    lengths = np.array([len(s) for s in sequences], "<i4")
    index = head + lengths.tobytes() + starts.astype("<i8").tobytes() + bounds.astype("<i8").tobytes()
    return {"a.idx": index, "a.bin": np.array([t for s in sequences for t in s], dtype).tobytes()}


def in_sequences(documents: list[list[int]], eos: int | None) -> list[list[list[int]]]:
    """Each document in sequences of 50 ids; after the last of them ``eos``, if it is one."""
    ends = [] if eos is None else [eos]
    return [[[*d, *ends][i : i + 50] for i in range(0, len(d) + len(ends), 50)] for d in documents]


def source(folder: Path, tokenizer: Path, files: dict[str, bytes], **options: Any) -> DataConfig:
    """A data set whose only source is a folder of token files."""
    (folder / "tokens").mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / "tokens" / name).write_bytes(content)
    cfg = config(folder, {"a": SourceConfig(tokens=[str(folder / "tokens")], **options)})
    cfg.tokenizer = TokenizerConfig(path=str(tokenizer))
    return cfg


def numpy_file(path: Path, ids: list[int], dtype: str) -> bytes:
    np.save(path, np.array(ids, dtype))
    return path.read_bytes()


def test_every_form_of_the_same_ids_gives_the_same_shards(
    tmp_path: Path, tokenizer: tuple[Path, list[list[int]], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 64 ids, so that documents lie across them and end with them."""
    monkeypatch.setattr(tokens, "READ_IDS", 64)
    path, documents, eos = tokenizer
    ids = flat(documents, eos)
    half = len(flat(documents[:30], eos))
    forms: dict[str, tuple[dict[str, bytes], dict[str, Any]]] = {
        "raw": ({"a.npy": np.array(ids, "<u2").tobytes()}, {}),
        "doubled ends": ({"a.npy": np.array([eos, *flat(documents, eos)[:-1]], "<u2").tobytes()}, {}),
        "raw uint32": ({"a.npy": np.array(ids, "<u4").tobytes()}, {"token_dtype": "uint32"}),
        "two": (
            {"1.npy": np.array(ids[:half], "<u2").tobytes(), "2.npy": np.array(ids[half:], "<u2").tobytes()},
            {},
        ),
        "header": ({"a.npy": numpy_file(tmp_path / "x.npy", ids, "<u4")}, {}),
        "header int64": ({"a.npy": numpy_file(tmp_path / "x.npy", ids, ">i8")}, {}),
        "pair": (pair([[[*d, eos]] for d in documents], "uint16"), {}),
        "pair without ends": (pair([[d] for d in documents], "int32"), {}),
        "sequences": (pair(in_sequences(documents, eos), "int64"), {}),
        "sequences without ends": (pair(in_sequences(documents, None), "int32"), {}),
        "all in one": (pair([[flat(documents, eos)], [[]]], "int32"), {}),
    }
    shards = {}
    for name, (files, options) in forms.items():
        cfg = source(tmp_path / name, path, files, **options)
        manifest = prepare(cfg, progress=False)
        shards[name] = {file.name: file.read_bytes() for file in Path(cfg.dir).glob("a.*")}
        assert shards[name] == shards["raw"], name
        assert prepare(cfg, progress=False) == manifest
    data = TokenData.open(cfg.dir)
    found = [
        piece.tolist()
        for split in ("train", "val")
        for piece in np.split(np.asarray(data.tokens("a", split)), np.cumsum(data.documents("a", split))[:-1])
    ]
    assert sorted(found) == sorted([*d, eos] for d in documents)
    share = manifest.domains["a"].val.tokens / len(ids)
    assert 0.025 <= share <= 0.0625 + 0.001 and manifest.domains["a"].train.bytes == 0


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_megatron_core_writes_such_pairs_and_reads_ours(
    tmp_path: Path, tokenizer: tuple[Path, list[list[int]], int], dtype: str
) -> None:
    """Documents of several sequences, which its preprocessing by sentences makes."""
    indexed = pytest.importorskip(
        "megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed (extra 'megatron')"
    )
    torch = pytest.importorskip("torch")
    path, documents, eos = tokenizer
    sequences = in_sequences(documents, eos)
    theirs = indexed.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.dtype(dtype).type)
    for parts in sequences:
        theirs.add_document(torch.tensor([t for part in parts for t in part]), [len(part) for part in parts])
    theirs.finalize(str(tmp_path / "a.idx"))
    files = {name: (tmp_path / name).read_bytes() for name in ("a.idx", "a.bin")}
    assert files == pair(sequences, dtype)
    cfg = source(tmp_path, path, files)
    prepare(cfg, progress=False)
    read = [indexed.IndexedDataset(f"{cfg.dir}/a.{split}") for split in ("train", "val")]
    found = [part[i].tolist() for part in read for i in range(len(part))]
    assert sorted(found) == sorted([*d, eos] for d in documents)


PAIR = pair([[[5, 6], [7]], [[8]]], "uint16")
IDX = PAIR["a.idx"]
AT_LENGTHS, AT_POINTERS, AT_BOUNDS = 34, 34 + 12, 34 + 12 + 24


def changed(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def header(**options: Any) -> Callable[[Path], bytes]:
    return lambda path: numpy_file(path, **options)


def refusals() -> dict[str, tuple[dict[str, bytes | Callable[[Path], bytes]], dict[str, Any], str]]:
    raw = np.array([5, 6, 0, 7, 0], "<u2").tobytes()
    far = np.array([5, 6, 0, 60_000], "<u2").tobytes()
    return {
        "past the vocabulary": ({"a.npy": far}, {}, "id number 4 is 60000, but the tokenizer has [34]"),
        "pair past it": (PAIR | {"a.bin": far}, {}, "a.bin' id number 4 is 60000"),
        "negative": (pair([[[5, -1]]], "int32"), {}, "id number 2 is -1"),
        "two bytes read as four": ({"a.npy": raw + b"\1\0"}, {"token_dtype": "uint32"}, "token_dtype it has"),
        "four as two": ({"a.npy": np.arange(9, dtype="<u4").tobytes()}, {}, "looks like uint32 .*token_dtype=uint32"),
        "odd bytes": ({"a.npy": raw[:-1]}, {}, "9 bytes are no whole number of ids"),
        "empty": ({"a.npy": b""}, {}, "a.npy' is empty"),
        "no end": ({"a.npy": np.arange(5, 9, dtype="<u2").tobytes()}, {}, "never has the end-of-document token 0"),
        "floats": ({"a.npy": header(ids=[1], dtype="<f4")}, {}, "holds float32 of shape .1,., not a row"),
        "bytes": ({"a.npy": header(ids=[1], dtype="u1")}, {}, "holds uint8"),
        "cut header": ({"a.npy": b"\x93NUMPY\x01\x00\x76\x00{'descr'"}, {}, "damaged numpy header"),
        "cut after header": ({"a.npy": lambda p: numpy_file(p, [1, 0], "<u2")[:-2]}, {}, "130 bytes where .* 132"),
        "other dtype": ({"a.npy": header(ids=[1, 0], dtype="<u2")}, {"token_dtype": "uint32"}, "uint16 ids by its"),
        "half": ({"a.idx": IDX}, {}, "a.bin' is missing: Megatron's"),
        "foreign": (PAIR | {"a.idx": b"something else"}, {}, "a.idx' is not a token index .*; make or fetch"),
        "cut": (PAIR | {"a.idx": IDX[:-3]}, {}, "a.idx' is damaged: 91 bytes where its header asks for 94"),
        "float pair": (PAIR | {"a.idx": changed(IDX, 17, b"\7")}, {}, "dtype code 7; only version 1 with int32"),
        "cut bin": (PAIR | {"a.bin": PAIR["a.bin"][:-2]}, {}, "6 bytes do not hold the 4 uint16 ids"),
        "empty pair": (pair([[[]]], "uint16"), {}, "a.bin' is empty"),
        "pointers": (PAIR | {"a.idx": changed(IDX, AT_POINTERS, b"\2")}, {}, "do not follow each other"),
        "bounds": (PAIR | {"a.idx": changed(IDX, AT_BOUNDS + 8, b"\4")}, {}, "do not follow each other"),
        "lengths": (PAIR | {"a.idx": changed(IDX, AT_LENGTHS, b"\xff" * 4)}, {}, "do not follow each other"),
        "open end": (PAIR | {"a.idx": changed(IDX, AT_BOUNDS + 16, b"\2")}, {}, "3 sequences and documents of 2"),
        "text": ({"a.txt": b"text"}, {}, "holds 1 files and none with a known token ending"),
        "filter": ({"a.npy": raw}, {"filter": "gopher"}, "filter=gopher needs text"),
        "paths too": ({"a.npy": raw}, {"paths": ["x"]}, "has paths and tokens; give one"),
        "split": ({"a.npy": raw}, {"dataset_split": "train"}, "dataset_split is for dataset, but"),
    }


@pytest.mark.parametrize("name", refusals())
def test_what_cannot_be_tokens_is_refused(
    tmp_path: Path, tokenizer: tuple[Path, list[list[int]], int], name: str
) -> None:
    files, options, message = refusals()[name]
    contents = {n: c if isinstance(c, bytes) else c(tmp_path / "x.npy") for n, c in files.items()}
    cfg = source(tmp_path, tokenizer[0], contents, **options)
    with pytest.raises(DataError, match=message) as error:
        prepare(cfg, progress=False)
    assert "\n" not in str(error.value) and not Path(cfg.dir).exists()


def test_tokens_need_their_tokenizer_and_a_dtype_that_can_name_it(
    tmp_path: Path, tokenizer: tuple[Path, list[list[int]], int]
) -> None:
    cfg = source(tmp_path, tokenizer[0], PAIR)
    cfg.tokenizer = TokenizerConfig(path=None, vocab_size=400)
    with pytest.raises(DataError, match="tokens needs the tokenizer that made them"):
        prepare(cfg, progress=False)
    large = tmp_path / "large.json"
    words = {f"w{i}": i for i in range(70_000)}
    model = {"type": "WordLevel", "vocab": words | {"<|endoftext|>": 70_000}, "unk_token": "w0"}
    large.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    cfg.tokenizer = TokenizerConfig(path=str(large))
    with pytest.raises(DataError, match="holds uint16 ids, which cannot name the 70,001 tokens"):
        prepare(cfg, progress=False)
