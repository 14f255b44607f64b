"""The schema of a run: one dataclass per group of the Hydra tree, each field with its type, default and one-line help.

A field whose type is ``Kind`` names an entry of a registry (``config/registry.py``) by its ``kind`` key; its other keys
are the options that the entry declares. After ``config.load`` such a field holds the entry's options dataclass.
Defaults are given by keyword, ``Field(default=...)``, which is what type checkers understand.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from moetrain_launch.settings import LaunchConfig
from pydantic import Field
from pydantic.dataclasses import dataclass

from moetrain.config.fields import STRICT, Kind, NonNegative, PerLayerFloat, PerLayerInt, Positive
from moetrain.config.schema_data import DataConfig
from moetrain.config.schema_faults import FaultsConfig, SnapshotConfig
from moetrain.config.schema_sweep import SweepConfig

# Those of ``moe_kernels``. The first five are gated, with two input matrices; the others are plain, with one.
Activation: TypeAlias = Literal["swiglu", "geglu", "reglu", "gpt_oss", "swiglu_clamped", "gelu", "relu2"]
PLAIN = ("gelu", "relu2")
ExpertBackend: TypeAlias = Literal[
    "auto",
    "fastest",
    "loop",
    "grouped_mm",
    "cpu",
    "triton",
    "sonicmoe",
    "scattermoe",
    "grouped_gemm",
    "transformer_engine",
    "deep_gemm",
]


@dataclass(config=STRICT)
class RopeConfig:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) and its context extensions."""

    theta: float = Field(default=10000.0, gt=0, description="base of the rotation frequencies")
    fraction: float = Field(
        default=1.0, gt=0, le=1, description="gqa: share of a head's width that is rotated (GLM-4.5: 0.5)"
    )
    scaling: Literal["none", "linear", "llama3", "yarn"] = Field(default="none", description="context extension rule")
    factor: float = Field(default=1.0, gt=0, description="extension factor of the rule")
    original_max_seq_len: NonNegative = Field(default=0, description="context length before extension, in tokens")
    beta_fast: float = Field(default=32.0, description="yarn: rotations above which a frequency is left as it is")
    beta_slow: float = Field(default=1.0, description="yarn: rotations below which a frequency is fully interpolated")
    mscale: float = Field(default=0.0, description="yarn: numerator of the attention temperature (0: the default rule)")
    mscale_all_dim: float = Field(
        default=0.0, description="yarn: denominator of the attention temperature, DeepSeek's variant"
    )
    truncate: bool = Field(default=True, description="yarn: round the correction range to whole dimensions")
    low_freq_factor: float = Field(default=1.0, description="llama3: wavelengths longer than original/this are scaled")
    high_freq_factor: float = Field(default=4.0, description="llama3: wavelengths shorter than original/this are kept")
    interleaved: bool = Field(
        default=False, description="rotate neighbouring pairs (DeepSeek) instead of halves (Llama)"
    )


@dataclass(config=STRICT)
class AttentionConfig:
    """Grouped-query attention (arXiv 2305.13245) or multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

    kind: Literal["gqa", "mla"] = Field(default="gqa", description="grouped-query or multi-head latent attention")
    n_heads: Positive = Field(default=4, description="query heads, of all attention experts together")
    n_kv_heads: Positive = Field(
        default=4, description="gqa: key/value heads, of all attention experts together; divides n_heads"
    )
    head_dim: Positive = Field(default=32, description="gqa: width of a head")
    qkv_bias: bool = Field(default=False, description="biases on the query, key and value projections")
    out_bias: bool = Field(default=False, description="bias on the output projection")
    qk_norm: Literal["none", "head", "full"] = Field(
        default="none",
        description="RMSNorm on queries and keys: over each head (Qwen3) or all heads together (OLMo 2, OLMoE)",
    )
    clip_qkv: float | None = Field(
        default=None, description="clamp queries, keys and values to +-this (OLMoE-0924: none)"
    )
    sliding_window: int | None = Field(
        default=None, description="tokens that a windowed layer attends to; null: full attention"
    )
    sliding_layers: list[int] | None = Field(
        default=None, description="layers that use the window; null: all, when one is set"
    )
    scale: float | None = Field(
        default=None,
        gt=0,
        description="gqa: factor on the scores (Granite: a number of its own); null: 1/sqrt(head_dim)",
    )
    sinks: bool = Field(default=False, description="a learned logit per head that takes part in the softmax (GPT-OSS)")
    num_experts: Positive = Field(
        default=1,
        description="gqa: experts that share out the heads, all at work on every token, weighed by a router (BAM)",
    )
    shared_kv: bool = Field(default=False, description="all attention experts use the same keys and values (BAM)")
    q_lora_rank: int | None = Field(default=None, description="mla: rank of the query compression; null: none")
    kv_lora_rank: NonNegative = Field(default=0, description="mla: rank of the key/value compression")
    qk_nope_head_dim: NonNegative = Field(default=0, description="mla: per-head width without rotation")
    qk_rope_head_dim: NonNegative = Field(
        default=0, description="mla: per-head width with rotation (key shared by heads)"
    )
    v_head_dim: NonNegative = Field(default=0, description="mla: per-head width of values")
    backend: Literal["auto", "flash", "flex", "native", "sdpa", "math"] = Field(
        default="auto",
        description="attention kernel; auto: on CUDA in bf16, with documents or a window, the first of flash "
        "(flash-attn, or torch's varlen_attn) and flex that can run; on the CPU in float32 or bf16 native (compiled "
        "once, where there is a compiler); else sdpa; math is the oracle",
    )

    def score_scale(self) -> float:
        """Factor on the products of queries and keys, for ``kind=gqa``."""
        return self.head_dim**-0.5 if self.scale is None else self.scale


@dataclass(config=STRICT)
class MoEConfig:
    """The MoE layers of a model. Numbers may be one value or one per decoder layer."""

    num_experts: PerLayerInt = Field(default=8, description="routed experts of a layer; 0 makes the layer dense")
    top_k: PerLayerInt = Field(default=2, description="experts per token")
    expert_dim: PerLayerInt = Field(default=256, description="inner width of a routed expert")
    shared_dim: PerLayerInt = Field(default=0, description="inner width of all shared experts together; 0: none")
    shared_gate: bool = Field(
        default=False, description="scale the shared experts by sigmoid of a learned gate (Qwen2-MoE)"
    )
    first_dense: NonNegative = Field(default=0, description="leading layers that are dense")
    every: Positive = Field(default=1, description="one MoE layer in this many, after the dense ones")
    activation: Activation = Field(
        default="swiglu",
        description="activation of the routed experts; geglu and gelu in their tanh form; gelu and relu2 have no gate",
    )
    bias: bool = Field(default=False, description="biases in the experts (GPT-OSS)")
    ternary: bool = Field(
        default=False,
        description="experts compute with weights -1, 0 or 1 times a scale, rounded from those that are trained (MoTE)",
    )
    capacity_factor: PerLayerFloat | None = Field(
        default=None, description="rows an expert takes, as a multiple of T*k/E on each rank; null: dropless"
    )
    drop_policy: Literal["score", "position", "random"] = Field(
        default="score",
        description="whom a full expert keeps: the highest weights, the earliest tokens, or a random draw",
    )


@dataclass(config=STRICT)
class ModelConfig:
    """One decoder-only transformer."""

    name: str = Field(default="tiny", description="name printed in logs and saved in exports")
    family: str = Field(
        default="auto", description="Hugging Face family for import and export; auto: chosen from the features"
    )
    vocab_size: Positive = Field(default=1024, description="rows of the embedding")
    dim: Positive = Field(default=128, description="model width")
    n_layers: Positive = Field(default=4, description="decoder layers")
    dense_dim: Positive = Field(default=512, description="inner width of the dense MLP layers")
    activation: Activation = Field(
        default="swiglu", description="activation of dense MLPs and shared experts, as model.moe.activation"
    )
    max_seq_len: Positive = Field(default=1024, description="longest sequence that the model is meant for, in tokens")
    norm_eps: float = Field(default=1e-6, gt=0, description="epsilon of RMSNorm")
    norm_offset: float = Field(default=0.0, description="added to the weights of all norms (Gemma: 1)")
    norm_place: Literal["pre", "post"] = Field(
        default="pre", description="where a block's norms are: before attention and MLP, or after them (OLMo 2)"
    )
    parallel_block: bool = Field(
        default=False, description="MLP or experts read the input of attention instead of its output (GPT-NeoX)"
    )
    embedding_multiplier: float = Field(default=1.0, gt=0, description="factor on the embeddings (Granite, Gemma)")
    residual_multiplier: float = Field(
        default=1.0, gt=0, description="factor on what attention and MLP add to the residual stream (Granite)"
    )
    logits_divisor: float = Field(default=1.0, gt=0, description="the head's outputs are divided by it (Granite)")
    tie_embeddings: bool = Field(default=False, description="the output head shares the embedding's weight")
    init_std: float = Field(default=0.02, gt=0, description="standard deviation of the normal initialisation")
    attention: AttentionConfig = Field(default_factory=AttentionConfig, description="attention")
    rope: RopeConfig = Field(default_factory=RopeConfig, description="rotary positions")
    moe: MoEConfig = Field(default_factory=MoEConfig, description="mixture-of-experts layers")
    router: Kind = Field(
        default_factory=lambda: {"kind": "topk"}, description="router", json_schema_extra={"registry": "ROUTERS"}
    )

    def layer_value(self, name: str, layer: int) -> Any:
        """Field ``moe.<name>`` at decoder layer ``layer`` (0-based), whether it is one value or one per layer."""
        value = getattr(self.moe, name)
        return value[layer] if isinstance(value, list) else value

    def is_moe(self, layer: int) -> bool:
        """Whether decoder layer ``layer`` (0-based) is a MoE layer."""
        after = layer - self.moe.first_dense
        return after >= 0 and (after + 1) % self.moe.every == 0 and self.layer_value("num_experts", layer) > 0

    def moe_layers(self) -> list[int]:
        """Numbers of the MoE layers, ascending."""
        return [i for i in range(self.n_layers) if self.is_moe(i)]


@dataclass(config=STRICT)
class ExpertsConfig:
    """How expert computation runs; never what it computes, but for the precision of ``fp8``."""

    backend: ExpertBackend = Field(
        default="auto",
        description="expert kernels; fastest times them at first use, so that runs agree up to rounding only; loop is "
        "the oracle that the others are tested against; the last five are packages to install",
    )
    overlap: bool = Field(
        default=False, description="compute the shared experts while the routed rows travel between ranks"
    )
    fp8: bool = Field(
        default=False,
        description="products of the routed experts in FP8 after DeepSeek-V3: on Hopper or later, emulated on CPU",
    )
    placement: Kind = Field(
        default_factory=lambda: {"kind": "ep"},
        description="which expert parallel ranks hold which experts",
        json_schema_extra={"registry": "PLACEMENTS"},
    )


@dataclass(config=STRICT)
class ParallelConfig:
    """Sizes of the two grids of ranks, pp x dp_replicate x dp_shard x cp x tp = pp x edp x ep x etp; -1 infers one."""

    engine: Literal["torch", "deepspeed"] = Field(
        default="torch", description="what runs the step: FSDP2 and torch's pipelines, or DeepSpeed's ZeRO"
    )
    pp: int = Field(default=1, description="pipeline stages' ranks")
    dp_replicate: int = Field(default=1, description="replicas of the sharded model (HSDP)")
    dp_shard: int = Field(default=-1, description="ranks that shard dense parameters (FSDP2)")
    cp: int = Field(default=1, description="context parallel ranks")
    tp: int = Field(default=1, description="tensor parallel ranks of attention and dense parts")
    ep: int = Field(default=1, description="expert parallel ranks")
    etp: int = Field(default=1, description="tensor parallel ranks inside an expert")
    context: Literal["all_gather", "ring", "all_to_all"] = Field(
        default="all_gather",
        description="how attention crosses cp ranks: gather all keys, take them rank by rank, or trade heads (Ulysses)",
    )
    schedule: Literal[
        "gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble", "dualpipev"
    ] = Field(default="1f1b", description="order in which a pipeline runs its micro-batches")
    stages_per_rank: Positive | None = Field(
        default=None,
        description="pipeline stages on each rank (virtual stages); null: 1, or 2 where the schedule needs it",
    )
    layout: list[int] | None = Field(
        default=None, description="layers of each pipeline stage, in order; null: split by cost"
    )
    reshard_after_forward: bool | None = Field(
        default=None,
        description="free gathered parameters after forward; saves memory, costs an all-gather; null: yes, but not in "
        "a pipeline, where every micro-batch would gather them again",
    )
    prefetch: NonNegative = Field(
        default=1, description="blocks whose parameters FSDP gathers ahead of the one that computes"
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        default="none", description="keep in host memory: nothing, optimizer state, or parameters as well"
    )
    zero: Literal[1, 2, 3] = Field(default=1, description="deepspeed: what ZeRO shards")
    nvme: str | None = Field(default=None, description="deepspeed: folder for offloaded optimizer state (zero=3)")
    timeout_s: Positive = Field(default=600, description="seconds after which a stuck collective ends the job")


@dataclass(config=STRICT)
class ScheduleConfig:
    """Learning rate over steps."""

    kind: Literal["cosine", "linear", "constant", "wsd"] = Field(
        default="cosine", description="shape after the warm-up"
    )
    warmup_steps: NonNegative = Field(default=10, description="steps of linear warm-up from 0")
    final_ratio: float = Field(default=0.1, ge=0, le=1, description="final learning rate as a share of the peak")
    decay_fraction: float = Field(
        default=0.2, ge=0, le=1, description="wsd: share of all steps spent in the final decay"
    )
    decay_steps: int | None = Field(
        default=None, description="steps that the decay spans, counted from step 0; null: train.steps"
    )


@dataclass(config=STRICT)
class ProfileConfig:
    """Where the time of steps goes."""

    time_split: bool = Field(default=True, description="log the shares of a step's parts on logged steps")
    steps: list[Positive] = Field(
        default_factory=list, description="steps whose traces of torch's profiler are written to profile/"
    )
    ranks: list[NonNegative] = Field(default_factory=lambda: [0], description="ranks that write traces")


@dataclass(config=STRICT)
class TrainConfig:
    """Length, batch, precision and memory of a run."""

    steps: Positive = Field(default=100, description="optimizer steps")
    seq_len: Positive = Field(default=128, description="tokens per sequence")
    global_batch: Positive = Field(default=8, description="sequences per step, over all ranks")
    micro_batch: Positive = Field(
        default=4, description="sequences per rank and forward pass; fixes gradient accumulation"
    )
    precision: Literal["float32", "bf16", "float64"] = Field(
        default="float32", description="compute dtype; bf16 keeps float32 weights and reductions"
    )
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="what backward recomputes: nothing, inside experts and MLPs (no dispatch again), or whole blocks",
    )
    compile: bool = Field(default=False, description="torch.compile the dense parts of each block")
    deterministic: bool = Field(default=True, description="deterministic algorithms only")
    freeze: list[str] = Field(
        default_factory=list,
        description="parameters that are not trained, as patterns of their names: [layers.*.moe.shared.*]",
    )
    clip_norm: float = Field(default=1.0, ge=0, description="largest gradient norm of the whole model; 0: no clipping")
    eval_every: NonNegative = Field(default=0, description="steps between evaluations; 0: only at the end")
    eval_sequences: NonNegative = Field(default=0, description="held-out sequences per domain and evaluation; 0: all")
    threads: NonNegative = Field(default=0, description="CPU threads per rank; 0: cores divided by ranks")
    trace: bool = Field(
        default=False, description="record how often each rank's tokens chose each expert, for 'moetrain simulate'"
    )
    profile: ProfileConfig = Field(default_factory=ProfileConfig, description="traces, and where a step's time goes")
    snapshot: SnapshotConfig = Field(default_factory=SnapshotConfig, description="state in shared memory")


@dataclass(config=STRICT)
class CheckpointConfig:
    """Saving training state."""

    every: NonNegative = Field(default=0, description="steps between checkpoints; 0: only at the end")
    keep: Positive = Field(default=2, description="checkpoints kept; older ones go once a newer one is whole")
    asynchronous: bool = Field(default=True, description="write in the background while training goes on")
    at_end: bool = Field(default=True, description="save one when the run ends")


@dataclass(config=STRICT)
class LogConfig:
    """What is reported, how often, and where."""

    every: Positive = Field(default=1, description="steps between log lines")
    progress: bool = Field(default=True, description="progress bar on the terminal")
    tensorboard: bool = Field(default=True, description="write TensorBoard events to the run directory")
    wandb: Literal["off", "auto", "online", "offline"] = Field(
        default="off", description="Weights & Biases; auto: online with a key, else offline"
    )
    wandb_project: str = Field(default="moetrain", description="project of the Weights & Biases run")
    peak_tflops: float | None = Field(
        default=None, description="device peak for model FLOP utilisation; null: known devices only"
    )


@dataclass(config=STRICT)
class ExportConfig:
    """Hugging Face checkpoint at the end of a run."""

    at_end: bool = Field(default=False, description="write export/ when training ends")
    verify: bool = Field(default=True, description="load the export with transformers and compare the held-out loss")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="dtype of the exported tensors")


@dataclass(config=STRICT)
class GenerateConfig:
    """Sample text at the end of a run."""

    prompts: list[str] = Field(default_factory=list, description="prompts that are continued when training ends")
    max_tokens: Positive = Field(default=48, description="tokens generated per prompt")
    temperature: float = Field(default=0.8, ge=0, description="sampling temperature; 0: the likeliest token")


@dataclass(config=STRICT)
class Config:
    """A whole run."""

    seed: int = Field(
        default=0, ge=0, lt=2**63, description="seed of initialisation, data order and all random choices"
    )
    run_dir: str = Field(default="runs/${model.name}", description="folder of everything that the run leaves")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="accelerator; auto: cuda where there is one"
    )
    init: str | None = Field(
        default=None,
        description="start from these weights, with their model: what 'moetrain convert' wrote, a run, a checkpoint "
        "of one, or a Hugging Face folder; null: random weights",
    )
    init_optimizer: bool = Field(
        default=False, description="take the optimizer's state from init as well, a run or a checkpoint that has it"
    )
    dry_run: bool = Field(
        default=False,
        description="only print memory and communication per rank, from one process, for any number of ranks",
    )
    model: ModelConfig = Field(default_factory=ModelConfig, description="the model")
    balance: dict[str, Kind] = Field(
        default_factory=dict,
        description="balance methods in use: name -> options",
        json_schema_extra={"registry": "BALANCE"},
    )
    experts: ExpertsConfig = Field(default_factory=ExpertsConfig, description="expert computation")
    dispatch: Kind = Field(
        default_factory=lambda: {"kind": "auto"},
        description="token dispatcher",
        json_schema_extra={"registry": "DISPATCHERS"},
    )
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description="parallel mapping")
    data: DataConfig = Field(default_factory=DataConfig, description="data")
    mixer: Kind = Field(
        default_factory=lambda: {"kind": "none"},
        description="changes the weights of the domains during the run",
        json_schema_extra={"registry": "MIXERS"},
    )
    optim: Kind = Field(
        default_factory=lambda: {"kind": "adamw"}, description="optimizer", json_schema_extra={"registry": "OPTIMIZERS"}
    )
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig, description="learning rate schedule")
    train: TrainConfig = Field(default_factory=TrainConfig, description="training")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="checkpoints")
    faults: FaultsConfig = Field(default_factory=FaultsConfig, description="what to do when something goes wrong")
    log: LogConfig = Field(default_factory=LogConfig, description="metrics and logs")
    export: ExportConfig = Field(default_factory=ExportConfig, description="Hugging Face export")
    generate: GenerateConfig = Field(default_factory=GenerateConfig, description="sample text")
    launch: LaunchConfig = Field(default_factory=LaunchConfig, description="how and where it starts")
    sweep: SweepConfig = Field(default_factory=SweepConfig, description="the runs of 'train -m'")
