"""From text to shards: the right tokens, an honest split, nothing done twice, nothing left half."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from moetrain.config.errors import DataError
from moetrain.config.schema_data import DataConfig, SourceConfig
from moetrain.data import shards
from moetrain.data.dataset import TokenData
from moetrain.data.prepare import prepare
from moetrain.data.readers import digest_of
from moetrain.data.sources import SourceFile, find_files
from moetrain.data.split import DocumentKey, Keys, choose_held_out, cut_tail
from tests.data.conftest import WORDS, config, contents, document, write_corpus


def documents_of(data: TokenData, domain: str, split: str) -> list[str]:
    """The texts in a shard, decoded document by document."""
    tokenizer, ends = data.tokenizer(), np.cumsum(data.documents(domain, split))
    pieces = np.split(np.asarray(data.tokens(domain, split)), ends[:-1])
    assert all(piece[-1] == data.eos_id and data.eos_id not in piece[:-1] for piece in pieces)
    return [tokenizer.decode(piece[:-1].tolist(), skip_special_tokens=False) for piece in pieces]


def test_shards_hold_every_document_once_and_the_manifest_counts_them(data: TokenData) -> None:
    for i, domain in enumerate(WORDS):
        written = [document(domain, n) for n in range(30 * (i + 1))]
        train, val = documents_of(data, domain, "train"), documents_of(data, domain, "val")
        assert sorted(train + val) == sorted(written)
        assert train == [text for text in written if text in set(train)]  # in the order of the files
        info = data.manifest.domains[domain]
        assert (info.train.documents, info.val.documents, info.licence) == (len(train), len(val), "CC0-1.0")
        assert info.train.bytes + info.val.bytes == sum(len(text.encode()) for text in written)
        assert 0.025 <= info.val.bytes / (info.train.bytes + info.val.bytes) <= 0.0625
        ids = [Tokenizer.from_file(str(data.tokenizer_path)).encode(text).ids for text in written]
        assert info.train.tokens + info.val.tokens == sum(map(len, ids)) + len(written)


def test_text_that_spells_a_special_token_stays_text(tmp_path: Path) -> None:
    text = "before <|endoftext|> after\n" * 40
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    cfg = config(tmp_path, {"a": SourceConfig(paths=[str(tmp_path / "a.txt")])})
    prepare(cfg, progress=False)
    data = TokenData.open(cfg.dir)
    assert "".join(documents_of(data, "a", "train") + documents_of(data, "a", "val")) == text


def test_no_held_out_document_is_trained_on() -> None:
    texts = [f"text {n % 40} " * (1 + n % 7) for n in range(300)]  # most occur several times
    for fraction in (0.02, 0.1, 0.5):
        keys = [DocumentKey.of(text) for text in texts]
        held = choose_held_out(Keys(keys), fraction)
        inside = {texts[i] for i in held.whole}
        assert (
            held.cut is None and inside and inside.isdisjoint({t for i, t in enumerate(texts) if i not in held.whole})
        )
        share = sum(keys[i].size for i in held.whole) / sum(key.size for key in keys)
        assert fraction / 2 <= share <= 1.25 * fraction
        shuffled = choose_held_out(Keys(keys[::-1]), fraction)  # the choice is by text, not by place
        assert {texts[::-1][i] for i in shuffled.whole} == inside


@pytest.mark.parametrize("text", ["line of text\n" * 500, "one long line " * 500, "é" * 3000, "ab"])
def test_a_single_document_is_cut_near_the_wanted_byte(text: str) -> None:
    held = choose_held_out(Keys([DocumentKey.of(text)]), 0.1)
    assert held.whole == frozenset() and held.cut is not None and held.cut[0] == 0
    head, tail = cut_tail(text, held.cut[1])
    assert head + tail == text and head and tail
    if len(text) > 2:
        assert len(tail.encode()) == pytest.approx(0.1 * len(text.encode()), abs=13)
    if text.count("\n") > 1:
        assert head.endswith("\n")


def test_few_long_documents_are_topped_up_from_the_longest() -> None:
    sizes = [10, 50_000, 60_000, 40_000]
    held = choose_held_out(Keys(DocumentKey.of(chr(97 + i) * size) for i, size in enumerate(sizes)), 0.05)
    assert held.whole == {0} and held.cut == (2, round(0.05 * sum(sizes) - 10))


def test_a_second_call_does_nothing_until_text_or_config_change(tmp_path: Path) -> None:
    cfg = config(tmp_path, write_corpus(tmp_path / "text"))
    first = prepare(cfg, progress=False)
    before, stamp = contents(Path(cfg.dir)), os.stat(f"{cfg.dir}/manifest.json").st_mtime_ns

    def built_again() -> bool:
        nonlocal stamp
        old, stamp = stamp, os.stat(f"{cfg.dir}/manifest.json").st_mtime_ns
        return old != stamp

    assert prepare(cfg, progress=False) == first and not built_again()
    text = tmp_path / "text/sea.txt"
    os.utime(text, ns=(1, 1))  # touched, not changed
    assert prepare(cfg, progress=False) == first and not built_again()
    cfg.sources["sea"].weight = 0.7  # not a matter of tokens
    assert prepare(cfg, progress=False) == first and not built_again()
    for name in ("sea.val.bin", "food.train.idx"):
        (Path(cfg.dir) / name).write_bytes(b"damaged")
        assert prepare(cfg, progress=False) == first and built_again()
    text.write_text(text.read_text().replace("wave", "WAVE"))
    assert prepare(cfg, progress=False).fingerprint != first.fingerprint and built_again()
    text.write_text(text.read_text().replace("WAVE", "wave"))
    assert prepare(cfg, progress=False) == first and built_again()
    again = contents(Path(cfg.dir))
    assert {k: v for k, v in again.items() if k != "sources.json"} == {
        k: v for k, v in before.items() if k != "sources.json"
    }
    cfg.val_fraction = 0.1
    assert prepare(cfg, progress=False).recipe != first.recipe and built_again()


def test_a_touched_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at every start of a run, which would read the whole corpus each time after it was copied."""
    cfg, hashed = config(tmp_path, write_corpus(tmp_path / "text")), list[str]()
    first = prepare(cfg, progress=False)

    def digest(data: DataConfig, name: str, file: SourceFile) -> str:
        hashed.append(name)
        return digest_of(data, name, file)

    monkeypatch.setattr("moetrain.data.prepare.digest_of", digest)
    os.utime(tmp_path / "text/sea.txt", ns=(1, 1))
    assert [prepare(cfg, progress=False) for _ in range(3)] == [first] * 3 and hashed == ["sea"]


def test_prepared_data_outlives_its_sources(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = config(tmp_path, write_corpus(tmp_path / "text"))
    first = prepare(cfg, progress=False)
    for path in (tmp_path / "text").iterdir():
        path.unlink()
    assert prepare(cfg, progress=False) == first
    assert "going on with the data that was prepared" in caplog.text


def test_a_run_that_goes_on_keeps_the_data_that_it_began_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Text that has grown, and a new source beside a tokenizer that is trained here: what was prepared stays, since
    the run could not go on with anything else."""
    cfg = config(tmp_path, write_corpus(tmp_path / "text", documents=10))
    first, before = prepare(cfg, progress=False), contents(Path(cfg.dir))
    began = {name: info.train.sha256["bin"] for name, info in first.domains.items()}
    with open(tmp_path / "text/sea.txt", "a", encoding="utf-8") as file:
        file.write(document("sea", 1000))
    assert prepare(cfg, progress=False, began=began) == first and contents(Path(cfg.dir)) == before
    assert "the text has changed since" in caplog.text
    (tmp_path / "new.txt").write_text(document("food", 2000) * 3, encoding="utf-8")
    cfg.sources["new"] = SourceConfig(paths=[str(tmp_path / "new.txt")])
    with pytest.raises(DataError, match=r"a new tokenizer would be trained; keep the run's with data.tokenizer.path="):
        prepare(cfg, progress=False, began=began)
    cfg.tokenizer.path = f"{cfg.dir}/tokenizer.json"
    with pytest.raises(DataError, match=r"source 'sea' is not the text, .* that this run began with, so '.*' was left"):
        prepare(cfg, progress=False, began=began)
    assert contents(Path(cfg.dir)) == before
    write_corpus(tmp_path / "text", documents=10)
    again = prepare(cfg, progress=False, began=began)
    assert {name: again.domains[name].train for name in began} == {name: i.train for name, i in first.domains.items()}
    assert "new" in again.domains


@pytest.mark.parametrize(("delimiter", "warns"), [("^=====$", True), ("^=====\\r?$", False)])
def test_a_delimiter_that_divides_nothing_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, delimiter: str, warns: bool
) -> None:
    (tmp_path / "a.txt").write_bytes(b"\r\n=====\r\n".join([b"one " * 90, b"two " * 90, b"three " * 90]))
    sources = {"a": SourceConfig(paths=[str(tmp_path / "a.txt")], delimiter=delimiter)}
    cfg = config(tmp_path, sources)
    cfg.val_fraction = 0.3
    prepare(cfg)
    assert (f"delimiter '{delimiter}' divides none of its 1 files" in caplog.text) == warns


def test_two_processes_at_once_make_it_once(tmp_path: Path) -> None:
    cfg = config(tmp_path, write_corpus(tmp_path / "text", documents=10))
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=prepare, args=(cfg, False)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    TokenData.open(cfg.dir)


def test_a_file_system_without_locks_is_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Lustre is where it is mounted without flock."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", no_locks)
    prepare(config(tmp_path, write_corpus(tmp_path / "text", documents=10)), progress=False)


def test_full_disk_is_one_line_and_the_older_data_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(tmp_path, write_corpus(tmp_path / "text"))
    prepare(cfg, progress=False)
    before = contents(Path(cfg.dir))

    def full(self: shards.ShardWriter, ids: np.ndarray) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards.ShardWriter, "add", full)
    cfg.val_fraction = 0.2
    with pytest.raises(DataError, match=r"cannot write prepared data to .*: the disk is full; free space"):
        prepare(cfg, progress=False)
    assert contents(Path(cfg.dir)) == before
    monkeypatch.undo()
    prepare(cfg, progress=False)  # goes on with what is left in the hidden folder
    assert not list(tmp_path.glob(".prepared.partial"))


def source(*paths: str, **options: Any) -> dict[str, dict[str, Any]]:
    return {"a": {"paths": list(paths), **options}}


FILE = "{folder}/a.txt"
LATE = b"x\n" * 900_000 + b"y" * 1_500_000 + b"\nz\n"
# what it is: (content of a.txt, sources, message)
BAD_INPUT: dict[str, tuple[bytes, dict[str, dict[str, Any]], str]] = {
    "no sources": (b"x", {}, "data.sources is empty"),
    "no paths": (b"x", source(), "domain 'a' has no text: give data.sources.a.paths"),
    "missing file": (b"x", source("nowhere.txt"), "'nowhere.txt' does not exist"),
    "glob without match": (b"x", source("{folder}/*.rst"), "no file matches '.*rst'"),
    "folder without text": (b"x", source("{folder}/empty"), "holds 0 files and none with a known text ending"),
    "empty file": (b" \n\n", source(FILE), "domain 'a' has no text: its 1 files are empty"),
    "NUL bytes": (b"abc\0def", source(FILE), "a.txt' line 1 is not text: byte 3 is NUL"),
    "Latin-1": (b"caf\xe9 x", source(FILE), "a.txt' line 1 is not UTF-8 text: byte 3 is 0xe9"),
    "huge line": (b"x" * 2_100_000, source(FILE), "a.txt' line 1 has more than 1 MB"),
    "huge line, late": (LATE, source(FILE), "a.txt' line 900001 has more than 1 MB"),
    "one letter": (b"x", source(FILE), "too little text for a training and a held-out part"),
    "field of text": (b"x", source(FILE, field="content"), "field=content is for JSON lines and parquet"),
    "delimiter that fits everywhere": (b"x", source(FILE, delimiter="x*"), "fits between any two letters"),
    "bad delimiter": (b"x", source(FILE, delimiter="("), "is not a regular expression"),
    "group in delimiter": (b"x y", source(FILE, delimiter="( )"), "has a capturing group"),
    "negative weight": (b"x", source(FILE, weight=-1.0), "weight of domain 'a' is -1"),
    "zero weights": (b"x", source(FILE, weight=0.0), "the weights of all domains are 0"),
    "name": (b"x", {"a/b": {"paths": [FILE]}}, "'a/b' cannot be a file name"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    content, sources, message = BAD_INPUT[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_bytes(content)
    filled = {
        domain: SourceConfig(**options | {"paths": [path.format(folder=tmp_path) for path in options["paths"]]})
        for domain, options in sources.items()
    }
    cfg = config(tmp_path, filled, max_line_mb=1)
    with pytest.raises(DataError, match=message) as error:
        prepare(cfg, progress=False)
    assert "\n" not in str(error.value)
    assert not Path(cfg.dir).exists()
    if case != "one letter":  # here a whole reading of a source was kept
        assert not (tmp_path / ".prepared.partial").exists()


def test_missing_text_says_what_makes_it(tmp_path: Path) -> None:
    cfg = config(tmp_path, {"a": SourceConfig(paths=["nowhere"])}, made_by="python make.py")
    with pytest.raises(DataError, match=r"'nowhere' does not exist .*; make the text with: python make.py$"):
        prepare(cfg, progress=False)


def test_a_line_of_the_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"short\n" + b"ab " * 333_333 + b"\nshort\n")
    cfg = config(tmp_path, {"a": SourceConfig(paths=[str(tmp_path / "a.txt")])}, max_line_mb=1)
    assert prepare(cfg, progress=False).domains["a"].train.documents == 1


def test_folders_and_globs_give_each_text_file_once(tmp_path: Path) -> None:
    for name in ("b.md", "a.txt", "sub/c.py", "sub/picture.png", ".hidden/d.txt", "sub/empty.py"):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_text("" if "empty" in name else f"the text of {name}\n" * 20)
    paths = [str(tmp_path / "src"), str(tmp_path / "src/*.md"), str(tmp_path / "src/a.txt")]
    cfg = config(tmp_path, {"a": SourceConfig(paths=paths)})
    prepare(cfg, progress=False)
    data = TokenData.open(cfg.dir)
    texts = documents_of(data, "a", "train") + documents_of(data, "a", "val")
    assert {text.split()[3] for text in texts} == {"b.md", "a.txt", "sub/c.py"}


def test_prepared_data_in_a_folder_of_text_is_no_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As with data.sources.NAME.paths=[.]: every call found new text, and trained on its own manifest. What else is
    left out is said."""
    write_corpus(tmp_path)
    (tmp_path / "b.txt.gz").write_bytes(b"")
    cfg = config(tmp_path, {"a": SourceConfig(paths=[str(tmp_path)])})
    caplog.set_level("INFO")
    first = prepare(cfg, progress=False)
    assert "source 'a': files with other endings are left out: .gz 1" in caplog.text
    assert prepare(cfg, progress=False) == first and first.domains["a"].train.documents == 3


def test_a_folder_gives_what_it_links_to(tmp_path: Path) -> None:
    """Folders on other disks, each once, whatever these link to."""
    corpus, web, code = (tmp_path / name for name in ("corpus", "disk1/web", "disk2/code"))
    for folder, name in ((corpus / "own", "a"), (web / "2024", "b"), (code, "c"), (tmp_path, "no")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_text(name)
    links = {"web": web, "code": code, "again": corpus / "own", "around": tmp_path, "own/back": corpus}
    for name, to in links.items():
        (corpus / name).symlink_to(to)
    (web / "code").symlink_to(code)
    (code / "web").symlink_to(web)
    found = find_files("a", SourceConfig(paths=[str(corpus)]))
    assert [str(file.path.relative_to(corpus)) for file in found] == ["code/c.txt", "code/web/2024/b.txt", "own/a.txt"]


def test_a_folder_that_is_something_else_is_never_touched(tmp_path: Path) -> None:
    cfg = config(tmp_path, write_corpus(tmp_path / "text"))
    Path(cfg.dir).mkdir()
    (Path(cfg.dir) / "thesis.tex").write_text("ten years of work")
    with pytest.raises(DataError, match="exists and is not prepared data"):
        prepare(cfg, progress=False)
    (Path(cfg.dir) / "thesis.tex").unlink()
    prepare(cfg, progress=False)
    cfg.name = "another"
    with pytest.raises(DataError, match="holds the prepared data set 'test', not 'another'"):
        prepare(cfg, progress=False)
    for nothing in ("", ".", "/", ".."):
        cfg.dir = nothing
        with pytest.raises(DataError, match="names no folder that could be made; give one such as prepared/another"):
            prepare(cfg, progress=False)


def test_a_link_to_the_folder_stays_and_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shards belong on the disk that it leads to, also when they are made again; a mount point is refused before
    the work rather than after it."""
    cfg = config(tmp_path, write_corpus(tmp_path / "text"))
    disk = tmp_path / "disk"
    (disk / "empty").mkdir(parents=True)
    Path(cfg.dir).symlink_to(disk / "empty")
    for fraction in (0.05, 0.1, 0.15):
        cfg.val_fraction = fraction
        made = prepare(cfg, progress=False)
        assert Path(cfg.dir).is_symlink() and TokenData.open(cfg.dir).manifest == made
        assert {path.name for path in disk.iterdir()} == {"empty", ".empty.lock"}
    cfg.dir, cfg.val_fraction = str(disk / "empty"), 0.2
    monkeypatch.setattr("os.path.ismount", lambda path: path == disk / "empty")
    with pytest.raises(DataError, match="is a mount point"):
        prepare(cfg, progress=False)
    assert TokenData.open(cfg.dir).manifest == made


def test_opening_refuses_what_does_not_fit(tmp_path: Path) -> None:
    cfg = config(tmp_path, write_corpus(tmp_path / "text"))
    folder, vocab_size = Path(cfg.dir), prepare(cfg, progress=False).vocab_size
    with pytest.raises(DataError, match=f"has {vocab_size} tokens, the model's vocabulary 300; set model.vocab_size"):
        TokenData.open(folder, vocab_size=300)
    assert TokenData.open(folder, vocab_size=10_000).vocab_size == 10_000
    good = contents(folder)

    def refused(name: str, content: bytes, message: str) -> None:
        (folder / name).write_bytes(content)
        with pytest.raises(DataError, match=message) as error:
            TokenData.open(folder)
        assert "\n" not in str(error.value)
        (folder / name).write_bytes(good[name])

    flipped = bytearray(good["sea.train.bin"])
    flipped[100] ^= 1
    refused("sea.train.bin", bytes(flipped), "sea.train.bin' is damaged .its SHA-256")
    refused("sea.train.bin", good["sea.train.bin"][:-2], "sea.train.bin' is damaged")
    refused("sea.val.bin", good["food.val.bin"], "sea.val.bin' is damaged")
    refused("tokenizer.json", good["tokenizer.json"] + b" ", "tokenizer.json' is damaged")
    refused("manifest.json", good["manifest.json"][:200], "manifest.json' is damaged")
    refused("manifest.json", b"[]", "manifest.json' is damaged")
    manifest = json.loads(good["manifest.json"])
    manifest["domains"]["sea"]["train"]["tokens"] += 1
    refused("manifest.json", json.dumps(manifest).encode(), "domain 'sea' .* its manifest says")
    refused("manifest.json", json.dumps(manifest | {"version": 99}).encode(), "has version 99, this program reads 1")
    (folder / "sea.val.idx").unlink()
    with pytest.raises(DataError, match=r"sea.val.idx' is missing"):
        TokenData.open(folder)


def test_tokenizers_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    sources = write_corpus(tmp_path / "text", documents=3)
    cfg = config(tmp_path, sources, vocab_size=256)
    with pytest.raises(DataError, match="vocab_size=256 has no room for the 256 bytes"):
        prepare(cfg, progress=False)
    bad = tmp_path / "tokenizer.json"
    for content, message in [
        (None, "no tokenizer at"),
        ("{}", "not a tokenizer.json that tokenizers can read"),
        (
            '{"version":"1.0","added_tokens":[],"model":{"type":"BPE","vocab":{"a":0},"merges":[]}}',
            "no token that ends",
        ),
        (None, "has no token '</s>', which its tokenizer_config.json names as eos_token"),
    ]:
        if content is not None:
            bad.write_text(content)
        elif bad.exists():
            (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
        cfg.tokenizer.path = str(bad)
        with pytest.raises(DataError, match=message) as error:
            prepare(cfg, progress=False)
        assert "\n" not in str(error.value)


def test_a_hugging_face_folder_names_its_own_end_of_document(tmp_path: Path) -> None:
    first = config(tmp_path / "one", write_corpus(tmp_path / "text", documents=3))
    prepare(first, progress=False)
    folder = tmp_path / "hf"
    folder.mkdir()
    tokenizer = Tokenizer.from_file(f"{first.dir}/tokenizer.json")
    tokenizer.add_special_tokens(["<stop>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<stop>"}}')
    cfg = config(tmp_path / "two", first.sources)
    cfg.tokenizer.path = str(folder)
    manifest = prepare(cfg, progress=False)
    assert manifest.eos == "<stop>" and manifest.eos_id == tokenizer.token_to_id("<stop>")
    assert TokenData.open(cfg.dir).tokens("sea")[-1] == manifest.eos_id
