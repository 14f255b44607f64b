"""A toy data set, for runs that need some text and no particular one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from moetrain.config.schema_data import DataConfig, SourceConfig, TokenizerConfig

TEXTS = {
    "letters": "abcdefghij klmnop qrstuv wxyz. ",
    "digits": "1 + 2 = 3; 40 - 5 = 35; 6 * 7 = 42. ",
}

SENTINELS = 20  # as many as the toy's tokenizer has room for, and more than its short windows need


def toy_data(folder: Path, like: DataConfig | None = None) -> DataConfig:
    """Two domains, each a file of 400 documents of 3 to 40 characters, written to ``folder``; ready for ``prepare``.

    A window of 16 tokens mostly holds several documents. like: what it says of windows holds and objectives.
    """
    like = like or DataConfig()
    sources = {}
    for name, text in TEXTS.items():
        lines = [(text * 2)[i % 7 : i % 7 + 3 + i * 11 % 38] for i in range(400)]
        file = folder / f"{name}.txt"
        if not file.exists():
            file.write_text("\n".join(f"{i} {line}" for i, line in enumerate(lines)))
        sources[name] = SourceConfig(paths=[str(file)], delimiter="\n")
    return DataConfig(
        name="toy",
        dir=str(folder / "prepared"),
        sources=sources,
        tokenizer=TokenizerConfig(vocab_size=300),
        document_mask=like.document_mask,
        packing=like.packing,
        objective=like.objective,
        fim=like.fim,
        ul2=replace(like.ul2, sentinels=min(like.ul2.sentinels, SENTINELS)),
    )
