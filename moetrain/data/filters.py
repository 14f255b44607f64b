"""Quality filters: rules that a text must keep to be trained on, made for web pages in English.

``gopher`` has the rules of Gopher's MassiveText (Rae et al., 2021, arXiv 2112.11446, appendix A.1). Where the paper
leaves the reading open, what is done here is said beside the rule. A new filter is a function in FILTERS and a name in
``SourceConfig.filter``.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator

import numpy as np

STOP_WORDS = frozenset(["the", "be", "to", "of", "and", "that", "have", "with"])
BULLETS = tuple("•‣▪◦●-*")  # the paper says 'a bullet point'; - and * are how plain text writes one
ELLIPSES = ("...", "…")
# Most that a text may repeat, as shares of its lines, paragraphs or characters: table A1 of the paper.
DUPLICATE_LINES, DUPLICATE_PARAGRAPHS = 0.30, 0.30
DUPLICATE_LINE_CHARACTERS, DUPLICATE_PARAGRAPH_CHARACTERS = 0.20, 0.20
TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


def gopher(text: str) -> str | None:
    """Name of the first of Gopher's rules that ``text`` breaks, None when it keeps them all."""
    words = text.split()
    for rules in (quality_rules(text, words), repetition_rules(text, words)):
        for name, broken in rules:
            if broken:
                return name
    return None


def quality_rules(text: str, words: list[str]) -> Iterator[tuple[str, bool]]:
    """(name, whether it is broken) of the quality rules, one by one; stop at the first that is. Words are what white
    space separates."""
    count = len(words)
    yield "words", not 50 <= count <= 100_000
    yield "word length", not 3 <= sum(map(len, words)) / count <= 10
    yield "hash signs", text.count("#") / count > 0.1
    yield "ellipses", sum(text.count(ellipsis) for ellipsis in ELLIPSES) / count > 0.1
    lines = _pieces(text, "\n")
    yield "bullet lines", sum(line.startswith(BULLETS) for line in lines) / len(lines) > 0.9
    yield "ellipsis lines", sum(line.endswith(ELLIPSES) for line in lines) / len(lines) > 0.3
    yield "alphabetic words", sum(any(map(str.isalpha, word)) for word in words) / count < 0.8
    # two different ones, whatever their case and the punctuation around them
    found = {word.strip(string.punctuation).lower() for word in words} & STOP_WORDS
    yield "stop words", len(found) < 2


def repetition_rules(text: str, words: list[str]) -> Iterator[tuple[str, bool]]:
    """(name, whether it is broken) of the repetition rules. A duplicate is an occurrence after the first; lines and
    paragraphs are compared without the white space around them, and characters of words are counted without it."""
    for name, separator, most, most_characters in (
        ("line", "\n", DUPLICATE_LINES, DUPLICATE_LINE_CHARACTERS),
        ("paragraph", "\n\n", DUPLICATE_PARAGRAPHS, DUPLICATE_PARAGRAPH_CHARACTERS),
    ):
        pieces = _pieces(text, separator)
        again = _later_occurrences(pieces)
        yield f"duplicate {name}s", len(again) / len(pieces) > most
        yield f"duplicate {name} characters", sum(map(len, again)) / sum(map(len, pieces)) > most_characters
    for n, top, later in ngram_shares(words, max(DUPLICATE_NGRAMS)):
        if n in TOP_NGRAM:
            yield f"top {n}-gram", top > TOP_NGRAM[n]
        if n in DUPLICATE_NGRAMS:
            yield f"duplicate {n}-grams", later > DUPLICATE_NGRAMS[n]


def ngram_shares(words: list[str], longest: int) -> Iterator[tuple[int, float, float]]:
    """(n, top, later) for n = 2, 3, .. ``longest``, as long as an n-gram of the words occurs twice.

    ``top`` is the share of the words' characters that the occurrences of the most frequent n-gram have, ``later`` the
    share of those words that lie in an n-gram that came before.
    Among equally frequent n-grams the longest counts; in the second share every word counts once.
    """
    numbers: dict[str, int] = {}
    word_ids = np.fromiter((numbers.setdefault(word, len(numbers)) for word in words), np.int64, len(words))
    starts = np.concatenate([[0], np.cumsum([len(word) for word in words])])  # in characters, one more than words
    ids = word_ids
    for n in range(2, min(longest, len(words)) + 1):
        # an n-gram is an (n-1)-gram and a word, so equal numbers are equal n-grams: no hashing
        pairs = ids[:-1] * len(numbers) + word_ids[n - 1 :]
        _, first, ids, counts = np.unique(pairs, return_index=True, return_inverse=True, return_counts=True)
        most = counts.max()
        if most < 2:
            return
        frequent = first[counts == most]
        top = most * (starts[frequent + n] - starts[frequent]).max()
        later = np.flatnonzero(first[ids] != np.arange(len(ids)))
        open_close = np.bincount(later, minlength=len(words) + 1) - np.bincount(later + n, minlength=len(words) + 1)
        inside = np.cumsum(open_close)[:-1] > 0
        yield n, float(top / starts[-1]), float(np.diff(starts)[inside].sum() / starts[-1])


def _pieces(text: str, separator: str) -> list[str]:
    """The lines or paragraphs of a text that are not empty, without the white space around them."""
    return [stripped for piece in text.split(separator) if (stripped := piece.strip())]


def _later_occurrences(pieces: list[str]) -> list[str]:
    seen: set[str] = set()
    return [piece for piece in pieces if piece in seen or seen.add(piece)]  # type: ignore[func-returns-value]


FILTERS: dict[str, Callable[[str], str | None]] = {"none": lambda text: None, "gopher": gopher}
