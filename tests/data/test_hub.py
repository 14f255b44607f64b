"""Hugging Face data sets: a saved one, and a folder through datasets.load_dataset, give the shards of the same texts in
JSON lines; what is wrong is one line that knows the right names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moetrain.config.errors import DataError
from moetrain.config.schema_data import SourceConfig
from moetrain.data.prepare import prepare
from tests.data.conftest import config, document

datasets = pytest.importorskip("datasets", reason="datasets is not installed (extra 'data')")

TEXTS = [document("food", n) for n in range(80)] + ["", " \n", "naïve 漢字 \U0001f600\n" * 30]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test may reach a network or the caches of this machine."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", tmp_path / "modules")


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """The texts as JSON lines, and saved by ``datasets``: one data set in three files, and one of two splits."""
    rows = [{"id": i, "content": text} for i, text in enumerate(TEXTS)]
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines/train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "lines/test.jsonl").write_text(json.dumps(rows[0]), encoding="utf-8")
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "saved", num_shards=3)
    datasets.DatasetDict({"train": data, "test": data.select(range(5))}).save_to_disk(tmp_path / "splits")
    return {name: tmp_path / name for name in ("lines", "saved", "splits")}


def shards(folder: Path, **options: Any) -> tuple[dict[str, bytes], str]:
    """(shards and tokenizer by name, fingerprint); a second call does nothing."""
    cfg = config(folder, {"a": SourceConfig(**{"field": "content"} | options)})
    manifest = prepare(cfg, progress=False)
    stamp = (Path(cfg.dir) / "manifest.json").stat().st_mtime_ns
    assert prepare(cfg, progress=False) == manifest
    assert (Path(cfg.dir) / "manifest.json").stat().st_mtime_ns == stamp
    files = [*Path(cfg.dir).glob("a.*"), Path(cfg.dir) / "tokenizer.json"]
    return {file.name: file.read_bytes() for file in files}, manifest.fingerprint


def test_a_data_set_gives_the_shards_of_its_texts(tmp_path: Path, folders: dict[str, Path]) -> None:
    expected, _ = shards(tmp_path / "0", paths=[str(folders["lines"] / "train.jsonl")])
    for name in ("saved", "splits", "lines"):
        found, first = shards(tmp_path / f"{name} 1", dataset=str(folders[name]))
        assert found == expected, name
        assert shards(tmp_path / f"{name} 2", dataset=str(folders[name]))[1] == first
    few, _ = shards(tmp_path / "few", dataset=str(folders["splits"]), dataset_split="test")
    assert few != expected


def test_a_changed_folder_is_prepared_again(tmp_path: Path, folders: dict[str, Path]) -> None:
    first, before = shards(tmp_path, dataset=str(folders["lines"]))
    lines = folders["lines"] / "train.jsonl"
    lines.write_text(lines.read_text().replace("soup", "broth"))
    second, after = shards(tmp_path, dataset=str(folders["lines"]))
    assert first != second and before != after


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "name": ({"dataset": "nobody/nothing"}, "'nobody/nothing' is no folder here, and the hub cannot be reached"),
    "folder": ({"dataset": "./nowhere"}, "folder './nowhere' does not exist"),
    "split": ({"dataset": "{lines}", "dataset_split": "val"}, "has no split 'val', but 'train', 'test'; set .*_split"),
    "saved split": ({"dataset": "{splits}", "dataset_split": "val"}, "has no split 'val', but 'train', 'test'; set"),
    "one split": ({"dataset": "{saved}", "dataset_split": "val"}, "holds one split, which has no name, not 'val'"),
    "config": ({"dataset": "{lines}", "dataset_config": "en"}, "another configuration: .*'en' not found. .*default"),
    "saved config": ({"dataset": "{saved}", "dataset_config": "en"}, "keeps one configuration"),
    "column": ({"dataset": "{lines}", "field": "text"}, "has no field 'text', but 'id', 'content'; set .*.field"),
    "saved column": ({"dataset": "{saved}", "field": "text"}, "has no field 'text', but 'id', 'content'; set"),
    "numbers": ({"dataset": "{lines}", "field": "id"}, "column 'id' holds int64, not text"),
    "saved numbers": ({"dataset": "{saved}", "field": "id"}, "column 'id' holds int64, not text"),
    "as paths": ({"paths": ["{saved}"]}, "save_to_disk wrote; give it as data.sources.a.dataset"),
    "both": ({"dataset": "{saved}", "paths": ["x"]}, "has paths and dataset; give one of them"),
    "delimiter": ({"dataset": "{saved}", "delimiter": "x"}, "delimiter is for paths, but the source has dataset"),
    "split of paths": ({"paths": ["{lines}"], "dataset_split": "train"}, "dataset_split is for dataset"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_wrong_is_one_line(tmp_path: Path, folders: dict[str, Path], name: str) -> None:
    options, message = json.loads(json.dumps(REFUSALS[name][0])), REFUSALS[name][1]
    for key, value in options.items():
        options[key] = [v.format(**folders) for v in value] if isinstance(value, list) else value.format(**folders)
    cfg = config(tmp_path, {"a": SourceConfig(**{"field": "content"} | options)})
    with pytest.raises(DataError, match=message) as error:
        prepare(cfg, progress=False)
    assert "\n" not in str(error.value) and not Path(cfg.dir).exists()


def test_a_damaged_saved_folder_is_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    saved, (first, second, _) = folders["saved"], sorted(folders["saved"].glob("*.arrow"))
    cfg = config(tmp_path, {"a": SourceConfig(dataset=str(saved), field="content")})
    whole, state = second.read_bytes(), (saved / "state.json").read_text()

    def refused(message: str) -> None:
        with pytest.raises(DataError, match=message) as error:
            prepare(cfg, progress=False)
        assert "\n" not in str(error.value)

    for content, message in (
        (whole[: len(whole) // 2], f"{second.name}' is not an Arrow stream, or damaged or cut off after row 0"),
        (b"something else", "is not an Arrow stream, or damaged"),
        (b"", "is not an Arrow stream, or damaged"),
    ):
        second.write_bytes(content)
        refused(message)
    second.write_bytes(whole)
    first.unlink()
    refused(f"{first.name}' is missing, which its state.json names")
    for text, message in (("{", "state.json' is damaged"), ("{}", "names no data files")):
        (saved / "state.json").write_text(text)
        refused(message)
    (saved / "state.json").write_text(state.replace('"_data_files"', '"_indices_data_files": [1], "_data_files"'))
    refused("selection of rows by index")
