"""The data group of the schema (see ``schema.py``): where text comes from, how it is mixed, packed and loaded."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from moetrain.config.fields import STRICT, NonNegative, Positive


@dataclass(config=STRICT)
class SourceConfig:
    """One source of text; by default it is a domain of its own."""

    paths: list[str] = Field(
        default_factory=list,
        description="files, folders or globs; package: files that ship with moetrain start with 'moetrain:'",
    )
    dataset: str | None = Field(
        default=None,
        description="instead of paths: a Hugging Face data set by name or folder, or a folder of save_to_disk",
    )
    dataset_config: str | None = Field(default=None, description="configuration of the data set; null: its default")
    dataset_split: str | None = Field(default=None, description="split of the data set; null: train, or its only one")
    dataset_revision: str | None = Field(
        default=None, description="revision of a data set on the hub; null: the newest"
    )
    tokens: list[str] = Field(
        default_factory=list,
        description="instead of paths: files, folders or globs of ready tokens, .npy or Megatron's .idx with .bin",
    )
    token_dtype: Literal["uint16", "uint32"] | None = Field(
        default=None, description="ids of .npy files without a header; null: uint16 up to 65,536 tokens, else uint32"
    )
    domain: str | None = Field(default=None, description="domain that the source belongs to; null: its own name")
    weight: float | None = Field(
        default=None,
        description="share of training tokens (of its domain's, where that has several sources); null: in proportion "
        "to its tokens",
    )
    max_epochs: float | None = Field(
        default=None, gt=0, description="passes after which the source has run out; null: as its domain"
    )
    licence: str = Field(default="", description="licence tag of the text")
    delimiter: str | None = Field(
        default=None, description="regular expression between documents of a text file; null: one file, one document"
    )
    field: str = Field(default="text", description="field or column that holds the text of JSON lines and parquet")
    filter: Literal["none", "gopher"] = Field(
        default="none", description="quality filter; gopher: rules for web pages in English, arXiv 2112.11446 A.1"
    )


@dataclass(config=STRICT)
class DomainConfig:
    """A domain, a group of sources."""

    weight: float | None = Field(
        default=None, description="share of training tokens; null: in proportion to the domain's tokens"
    )
    max_epochs: float | None = Field(
        default=None, gt=0, description="passes after which a source of the domain has run out; null: data.max_epochs"
    )


@dataclass(config=STRICT)
class MixtureStepConfig:
    """Weights that hold from a point of the run on."""

    weights: dict[str, float] = Field(
        default_factory=dict,
        description="domain -> share of training tokens; those not named share the rest as they did before",
    )
    from_step: NonNegative | None = Field(default=None, description="optimizer step from which the weights hold")
    from_tokens: NonNegative | None = Field(default=None, description="or training tokens before the weights hold")


@dataclass(config=STRICT)
class TokenizerConfig:
    """Which tokenizer, or how to train one."""

    path: str | None = Field(
        default=None, description="tokenizer.json or a Hugging Face folder; null: train byte-level BPE on the data"
    )
    vocab_size: Positive = Field(default=1024, description="size of a tokenizer trained here")


@dataclass(config=STRICT)
class FimConfig:
    """Fill-in-the-middle (arXiv 2207.14255): data.objective=fim."""

    rate: float = Field(default=0.5, ge=0, le=1, description="share of documents that are rewritten")
    spm_rate: float = Field(default=0.5, ge=0, le=1, description="share of these with the suffix before the prefix")
    tokens: list[str] = Field(
        default_factory=lambda: ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"],
        description="the tokenizer's tokens for prefix, middle and suffix, in this order",
    )


@dataclass(config=STRICT)
class Ul2Config:
    """UL2's mixture of denoisers (arXiv 2205.05131): data.objective=ul2."""

    modes: list[str] = Field(
        default_factory=lambda: ["[R]", "[S]", "[X]"], description="the tokenizer's tokens for the three modes"
    )
    sentinel: str = Field(default="<extra_id_{}>", description="its sentinel tokens, {} is their number from 0")
    sentinels: Positive = Field(default=100, description="how many sentinel tokens there are")


@dataclass(config=STRICT)
class DataConfig:
    """Text sources and where their tokens are kept."""

    name: str = Field(default="demo", description="name of the data set")
    dir: str = Field(
        default="prepared/${data.name}", description="folder of prepared shards, made by 'moetrain prepare'"
    )
    sources: dict[str, SourceConfig] = Field(default_factory=dict, description="source name -> its text")
    made_by: str = Field(default="", description="command that makes the raw text; named where a path does not exist")
    domains: dict[str, DomainConfig] = Field(
        default_factory=dict, description="weights and epochs of domains that have several sources"
    )
    mixture: Literal["given", "proportional", "uniform", "temperature", "unimax"] = Field(
        default="given",
        description="weights of domains: as given, or a rule on their tokens instead (weight 0 still leaves one out)",
    )
    temperature: float = Field(
        default=2.0, gt=0, description="temperature: shares in proportion to tokens^(1/this); 1: proportional"
    )
    unimax_epochs: float = Field(
        default=4.0, gt=0, description="unimax: most passes over a domain in train.steps; else shares are even"
    )
    schedule: list[MixtureStepConfig] = Field(
        default_factory=list,
        description="changes of the weights, in order: {from_step (or from_tokens): N, weights: {NAME: share}}",
    )
    max_epochs: float | None = Field(
        default=None, gt=0, description="passes after which any source has run out; null: none ever does"
    )
    exhausted: Literal["reweight", "stop", "repeat"] = Field(
        default="reweight",
        description="when a source has run out: its share goes to the others, the run ends, or max_epochs only warns",
    )
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig, description="tokenizer")
    packing: Literal["cut", "best_fit"] = Field(
        default="cut",
        description="windows of one stream of text, or of whole documents with padding (needs document_mask)",
    )
    objective: Literal["next_token", "fim", "ul2"] = Field(
        default="next_token",
        description="what training predicts: next tokens, a document's middle (fim), or corrupted spans (ul2)",
    )
    fim: FimConfig = Field(default_factory=FimConfig, description="fill-in-the-middle")
    ul2: Ul2Config = Field(default_factory=Ul2Config, description="mixture of denoisers")
    document_mask: bool = Field(
        default=False, description="attention stays within a document, and positions start anew in each"
    )
    val_fraction: float = Field(
        default=0.05, gt=0, lt=1, description="share of each domain's documents (by bytes) held out"
    )
    max_line_mb: Positive = Field(default=64, description="longest line or parquet row that prepare accepts, in MB")
    invalid_utf8: Literal["refuse", "replace"] = Field(
        default="refuse", description="bytes that are not UTF-8: refuse the file, or replace them with U+FFFD and count"
    )
    deduplicate: bool = Field(
        default=False, description="remove documents whose text came before, in any domain; the first domain keeps it"
    )
    licences: list[str] | None = Field(
        default=None, description="licence tags that sources may have; others, and none, are refused; null: all"
    )
    processes: Positive = Field(
        default=1, description="processes that filter and tokenise in prepare; the result does not depend on it"
    )
    workers: NonNegative = Field(default=1, description="background batches that are loaded ahead of the step")
