"""What prepare removes: exact duplicates, texts that break a rule of a quality filter, sources without a licence."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from moetrain.config.errors import DataError
from moetrain.config.schema_data import SourceConfig
from moetrain.data.dataset import TokenData
from moetrain.data.filters import FILTERS, gopher, ngram_shares, quality_rules, repetition_rules
from moetrain.data.manifest import Manifest
from moetrain.data.prepare import prepare
from tests.data.conftest import config, write_corpus
from tests.data.test_prepare import documents_of


def write_lines(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def test_duplicates_are_removed_exactly_and_the_first_domain_keeps_them(tmp_path: Path) -> None:
    rng = random.Random(0)
    pool = [f"text {n} " + "word " * (5 + n % 11) for n in range(400)]
    pool += [text + " " for text in pool[:50]]  # nearly the same is not the same
    texts = {name: [rng.choice(pool) for _ in range(300)] for name in ("first", "second", "third")}
    sources = {}
    for name, chosen in texts.items():
        half = len(chosen) // 2  # two files, so that copies lie in one file, in two, and in two domains
        write_lines(tmp_path / f"{name}1.jsonl", chosen[:half])
        write_lines(tmp_path / f"{name}2.jsonl", chosen[half:])
        sources[name] = SourceConfig(paths=[str(tmp_path / f"{name}*.jsonl")])
    cfg = config(tmp_path, sources)
    plain = prepare(cfg, progress=False)
    assert all(not domain.removed for domain in plain.domains.values()) and "removed" not in plain.table()
    cfg.deduplicate = True
    manifest = prepare(cfg, progress=False)
    assert manifest.recipe != plain.recipe and Manifest.load(Path(cfg.dir)) == manifest
    data, seen = TokenData.open(cfg.dir), set[str]()
    for name, chosen in texts.items():
        expected = []
        for text in chosen:
            if text not in seen:
                expected.append(text)
                seen.add(text)
        found = documents_of(data, name, "train") + documents_of(data, name, "val")
        assert sorted(found) == sorted(expected)
        removed = len(chosen) - len(expected)
        assert manifest.domains[name].removed == {"duplicate": removed} and removed > 50
        assert f"{name}: {removed} documents were removed: duplicate {removed}" in manifest.table()


def test_a_domain_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    sources = write_corpus(tmp_path / "text")
    cfg = config(tmp_path, {"sea": sources["sea"], "copy": sources["sea"]}, deduplicate=True)
    with pytest.raises(
        DataError, match=r"domain 'copy' has no text left: all its 30 documents .*\(duplicate 30\)"
    ) as error:
        prepare(cfg, progress=False)
    assert "\n" not in str(error.value) and not Path(cfg.dir).exists()


ORDINARY = """The harbour lies on the north side of the island, and every boat that comes in from the open sea must pass
the old fort first. We arrived late in the evening with the last of the wind. Nobody was awake, so we tied up beside a
fishing boat and slept on deck.

In the morning an old man came along the quay, looked at our ropes for a while, and asked what we had paid for them. He
did not believe the answer. - Then he laughed, sat down on the wall... and told us how his father made his own.
"""


def unique_words(length: int = 5) -> Iterator[str]:
    """Words of ``length`` letters that never come again."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return ("".join(reversed(word)) for word in itertools.product(letters, repeat=length))


def in_lines(words: list[str], prefix: str = "", suffix: str = "", every: int = 1) -> str:
    """Lines of ten words after two stop words; every ``every``-th has the prefix and the suffix."""
    lines = [" ".join(words[i : i + 10]) for i in range(0, len(words), 10)]
    marked = [prefix + line + suffix if i % every == 0 else line for i, line in enumerate(lines)]
    return "the with\n" + "\n".join(marked)


def take(count: int, length: int = 5) -> list[str]:
    return list(itertools.islice(unique_words(length), count))


def repeated(spans: list[list[str]], total: int) -> str:
    """Each span followed by a word that occurs once, then such words up to ``total`` words of five letters, and two
    stop words, all on one line."""
    fresh = (word for word in unique_words() if word < "y")
    words = [word for span in spans for word in (*span, next(fresh))]
    words += itertools.islice(fresh, total - len(words))
    return "the with " + " ".join(words)


def with_top(n: int, times: int) -> str:
    return repeated([["zebra", "zonal", "zesty", "zippy"][:n]] * times, 1000)


def with_duplicates(n: int, times: int) -> str:
    words = (word for word in unique_words() if word > "y")
    spans = [list(itertools.islice(words, n)) for _ in range(times)]
    return repeated(spans + spans, 1000)


def alternating(again: list[str], fresh: list[str], separator: str) -> str:
    return "the with" + separator + separator.join(piece for pair in zip(again, fresh, strict=True) for piece in pair)


LINES = [" ".join(take(800)[i : i + 6]) for i in range(0, 720, 6)]  # 120 lines of six words
LONG_WORDS = [word + "fghij" for word in take(80)]
FOURS = [" ".join(LONG_WORDS[i : i + 4]) for i in range(0, 80, 4)] * 2
INDENTED = [f"{a}\n{' ' * 30}{b}" for a, b in zip(LONG_WORDS[:20], LONG_WORDS[20:40], strict=True)] * 2
PAIRS = [f"{a}\n{b}" for a, b in zip(LINES[:40], LINES[40:80], strict=True)]
TRIPLES = [f"{pair}\n{c}" for pair, c in zip(PAIRS, LINES[80:], strict=True)]
# rule: texts that break it and no other
BREAKS: dict[str, list[str]] = {
    "words": ["the with " + " ".join(take(47)), "the with " + " ".join(take(99_999))],
    "word length": [in_lines(take(400, 2)), in_lines([word + "abcdefg" for word in take(100)])],
    "hash signs": [in_lines(["#" + word if i % 9 == 0 else word for i, word in enumerate(take(300))])],
    "ellipses": [
        in_lines([word + mark if i % 10 in (2, 5) else word for i, word in enumerate(take(300))])
        for mark in ("...", "…")
    ],
    "bullet lines": [in_lines(take(300), prefix=bullet) for bullet in ("• ", "- ", "*")],
    "ellipsis lines": [in_lines(take(300), suffix=mark, every=3) for mark in ("...", " …")],
    "alphabetic words": [in_lines([f"{i + 10000}" if i % 4 == 0 else word for i, word in enumerate(take(300))])],
    "stop words": [" ".join(take(100)), "The the the " + " ".join(take(100))],
    "duplicate lines": [alternating(["okay"] * 40, LINES[:40], "\n")],
    "duplicate line characters": [alternating(FOURS, LINES[:40], "\n")],
    "duplicate paragraphs": [alternating(["okay"] * 40, TRIPLES, "\n\n")],
    "duplicate paragraph characters": [alternating(INDENTED, PAIRS, "\n\n")],
    "top 2-gram": [with_top(2, 101)],
    "top 3-gram": [with_top(3, 61)],
    "top 4-gram": [with_top(4, 41)],
    "duplicate 5-grams": [with_duplicates(5, 31)],
    "duplicate 6-grams": [with_duplicates(6, 24)],
    "duplicate 7-grams": [with_duplicates(7, 19)],
    "duplicate 8-grams": [with_duplicates(8, 16)],
    "duplicate 9-grams": [with_duplicates(9, 13)],
    "duplicate 10-grams": [with_duplicates(10, 11)],
}


def broken_rules(text: str) -> list[str]:
    words = text.split()
    return [name for name, broken in (*quality_rules(text, words), *repetition_rules(text, words)) if broken]


@pytest.mark.parametrize("rule", BREAKS)
def test_each_rule_of_gopher_removes_a_text_that_breaks_it_alone(rule: str) -> None:
    for text in BREAKS[rule]:
        assert broken_rules(text) == [rule] and gopher(text) == rule


def test_texts_within_the_rules_pass() -> None:
    passes = [
        ORDINARY,
        "the with " + " ".join(take(48)),  # 50 words
        in_lines(take(300), prefix="• ", every=2),
        in_lines(take(300), suffix="...", every=4),
        in_lines([word + "#" if i % 11 == 0 else word for i, word in enumerate(take(300))]),
        'He said: "The!" -- (WITH) ' + " ".join(take(100)),
        with_top(2, 98),
        with_duplicates(5, 29),
        with_duplicates(10, 9),
    ]
    for text in passes:
        assert broken_rules(text) == [] and gopher(text) is None and FILTERS["none"]("") is None


def test_shares_of_ngrams_are_those_counted_one_by_one() -> None:
    rng = random.Random(0)
    for length in (2, 9, 40, 200):
        words = rng.choices(["a", "bb", "ccc", "dddd", "eeeee", "ffffff"], k=length)
        found = {n: (top, later) for n, top, later in ngram_shares(words, 10)}
        for n in range(2, 11):
            ngrams = [tuple(words[i : i + n]) for i in range(length - n + 1)]
            counts, seen, inside = Counter(ngrams), set[tuple[str, ...]](), set[int]()
            for i, ngram in enumerate(ngrams):
                inside |= set(range(i, i + n)) if ngram in seen else set()
                seen.add(ngram)
            if max(counts.values(), default=0) < 2:
                assert n not in found
                continue
            most = max(counts.values())
            top = max(len("".join(ngram)) for ngram, count in counts.items() if count == most) * most
            later = sum(len(words[i]) for i in inside)
            whole = len("".join(words))
            assert found[n] == pytest.approx((top / whole, later / whole), rel=1e-12)


def test_a_filter_removes_from_its_own_domain_before_duplicates_are_sought(tmp_path: Path) -> None:
    good = [f"{ORDINARY}{word}" for word in take(60)]
    bad = [f"Too short {word}" for word in take(20)]
    write_lines(tmp_path / "web.jsonl", [*good, *bad, *bad, BREAKS["stop words"][0], good[0]])
    own = [f"Hello {word}" for word in take(30)]
    write_lines(tmp_path / "chat.jsonl", [*bad, *good[:5], *own])
    sources = {name: SourceConfig(paths=[str(tmp_path / f"{name}.jsonl")]) for name in ("web", "chat")}
    cfg = config(tmp_path, sources, deduplicate=True)
    plain = prepare(cfg, progress=False)
    sources["web"].filter = "gopher"
    manifest = prepare(cfg, progress=False)
    assert manifest.recipe != plain.recipe and Manifest.load(Path(cfg.dir)) == manifest
    assert manifest.domains["web"].removed == {"gopher words": 40, "gopher stop words": 1, "duplicate": 1}
    assert manifest.domains["chat"].removed == {"duplicate": 5}
    assert "web: 42 documents were removed: gopher words 40, " in manifest.table()
    data = TokenData.open(cfg.dir)
    for name, texts in (("web", good), ("chat", bad + own)):
        found = documents_of(data, name, "train") + documents_of(data, name, "val")
        assert sorted(found) == sorted(texts)


def test_a_source_without_an_allowed_licence_is_refused_before_any_work(tmp_path: Path) -> None:
    sources = write_corpus(tmp_path / "text")  # all CC0-1.0
    cfg = config(tmp_path, sources, licences=["MIT", "cc0-1.0 "])
    manifest = prepare(cfg, progress=False)
    cfg.licences = None
    assert prepare(cfg, progress=False).recipe == manifest.recipe  # no matter of tokens
    sources["sea"].licence, sources["sea"].paths, sources["food"].licence = "GPL-3.0", ["nowhere"], ""
    for allowed, message in [
        (["MIT", "CC0-1.0"], r"does not allow 'sea' \(GPL-3.0\), 'food' \(no licence\); allowed: MIT, CC0-1.0; remove"),
        ([], r"does not allow 'sea' \(GPL-3.0\), 'code' \(CC0-1.0\), 'food' \(no licence\); allowed: none"),
        (["", "GPL-3.0", "CC0-1.0"], r"does not allow 'food' \(no licence\);"),
    ]:
        cfg.licences = allowed
        with pytest.raises(DataError, match=message) as error:  # not that 'nowhere' does not exist
            prepare(cfg, progress=False)
        assert "\n" not in str(error.value)
