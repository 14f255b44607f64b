"""Top-k routing with a linear gate: the routers of Mixtral, Qwen3, OLMoE, GPT-OSS, DeepSeek-V2 and -V3, by options."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from moe_kernels import router_topk
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from moetrain.config.errors import ConfigError
from moetrain.config.fields import STRICT, Positive
from moetrain.config.registry import ROUTERS
from moetrain.config.schema import Config, ModelConfig
from moetrain.moe.routers import Router
from moetrain.moe.routing import Carry, Routing, TokenContext

# Keeps the sum of sigmoid scores that all underflow from dividing by zero (DeepSeek-V3's own guard).
TINY = 1e-20


@dataclass(config=STRICT)
class TopKOptions:
    """A linear gate, scores, and the top_k best experts."""

    score: Literal["softmax", "sigmoid"] = Field("softmax", description="how logits become scores")
    order: Literal["score_then_topk", "topk_then_score"] = Field(
        "score_then_topk", description="score all experts and choose, or choose by logits and score the chosen"
    )
    renormalize: bool = Field(True, description="divide the chosen scores by their sum")
    min_sum: Annotated[float, Field(ge=0)] = Field(
        0.0, description="renormalize: the sum counts as at least this (ERNIE 4.5: 1e-12)"
    )
    scale: Annotated[float, Field(gt=0)] = Field(1.0, description="factor on the routing weights, last of all")
    n_groups: Positive = Field(1, description="equal groups that the experts are cut into")
    topk_groups: Positive = Field(1, description="groups that a token may choose experts from")
    group_score: Literal["max", "top2_sum"] = Field(
        "top2_sum",
        description="a group's score: its best expert (DeepSeek-V2) or the sum of its best two (DeepSeek-V3)",
    )
    logits_bias: bool = Field(False, description="a learned bias on the logits (GPT-OSS)")
    force_balance: bool = Field(False, description="benchmarks: ignore the scores and hand experts out in turn")

    def check(self, cfg: Config) -> None:
        """Raise ConfigError where the groups do not fit a layer of the model."""
        if self.topk_groups > self.n_groups:
            raise ConfigError(
                f"model.router.topk_groups={self.topk_groups} is more than n_groups={self.n_groups}; lower topk_groups"
            )
        for layer in cfg.model.moe_layers() if self.n_groups > 1 else []:
            self._check_layer(cfg.model, layer)

    def _check_layer(self, model: ModelConfig, layer: int) -> None:
        experts, top_k = model.layer_value("num_experts", layer), model.layer_value("top_k", layer)
        size = experts // self.n_groups
        if experts % self.n_groups:
            raise ConfigError(
                f"layer {layer}: model.router.n_groups={self.n_groups} must divide model.moe.num_experts={experts}"
            )
        if top_k > self.topk_groups * size:
            raise ConfigError(
                f"layer {layer}: model.router.topk_groups={self.topk_groups} groups of {size} experts cannot give "
                f"model.moe.top_k={top_k}; raise topk_groups"
            )
        if self.group_score == "top2_sum" and size < 2:
            raise ConfigError(
                f"layer {layer}: model.router.group_score=top2_sum needs 2 experts or more in each of "
                f"n_groups={self.n_groups} groups, not {size}; use max or fewer groups"
            )


@ROUTERS.register("topk", TopKOptions)
class TopKRouter(Router):
    """weight (E, D), bias (E) or None. Computes in float32, or wider if its input is."""

    def __init__(self, options: TopKOptions, cfg: ModelConfig, layer: int, balance: nn.ModuleDict) -> None:
        super().__init__(cfg, layer, balance)
        self.options = options
        self.weight = nn.Parameter(torch.empty(self.n_experts, cfg.dim))
        self.bias = nn.Parameter(torch.empty(self.n_experts)) if options.logits_bias else None

    def forward(self, x_TD: Tensor, carry: Carry, context: TokenContext) -> tuple[Routing, Carry]:
        """x_TD (T, D) -> (routing in dense form unless capacity drops, carry with this layer's auxiliary terms)."""
        logits_TE = self._logits(x_TD)
        if self.options.order == "score_then_topk" and not self.options.min_sum:
            return self._at_once(logits_TE, carry, context)
        score_first = self.options.order == "score_then_topk"
        scores_TE = self._score(logits_TE) if score_first else logits_TE
        # Chosen without autograd and once per token: forward and recomputation then save the same tensors.
        ids_TK = context.memo.once("router.ids", lambda: self._choose(scores_TE.detach()))
        weights_TK = scores_TE.gather(1, ids_TK)
        if not score_first:
            weights_TK = self._score(weights_TK)
        if self.options.renormalize:
            weights_TK = weights_TK / self._sum(weights_TK)
        if self.options.scale != 1:
            weights_TK = weights_TK * self.options.scale

        def probs() -> Tensor:
            return self._normalised(scores_TE if score_first else self._score(logits_TE))

        return self.finish(logits_TE, probs, ids_TK, weights_TK, carry, context)

    def _at_once(self, logits_TE: Tensor, carry: Carry, context: TokenContext) -> tuple[Routing, Carry]:
        """Scores, choice, weights and loads in one operation; what was chosen once stays."""
        o, known_TK = self.options, context.memo.known("router.ids")
        if known_TK is None and o.force_balance:
            known_TK = self._in_turn(logits_TE)
        choice = router_topk(
            logits_TE, self.top_k, score=o.score, bias_E=self.selection_bias(), groups=o.n_groups,
            top_groups=o.topk_groups, group_score=o.group_score, renormalize=o.renormalize, scale=o.scale,
            with_scores=True, ids_TK=known_TK,
        )  # fmt: skip
        scores_TE = choice.scores_TE
        assert scores_TE is not None
        ids_TK = context.memo.once("router.ids", lambda: choice.ids_TK)

        def probs() -> Tensor:
            return self._normalised(scores_TE)

        return self.finish(logits_TE, probs, ids_TK, choice.weights_TK, carry, context, choice.counts_E)

    def _logits(self, x_TD: Tensor) -> Tensor:
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        bias_E = None if self.bias is None else self.bias.to(wide)
        return F.linear(x_TD.to(wide), self.weight.to(wide), bias_E)

    def _sum(self, weights_TK: Tensor) -> Tensor:
        sum_T1 = weights_TK.sum(dim=-1, keepdim=True)
        return sum_T1.clamp(min=self.options.min_sum) if self.options.min_sum else sum_T1 + TINY

    def _score(self, logits: Tensor) -> Tensor:
        return logits.softmax(dim=-1) if self.options.score == "softmax" else logits.sigmoid()

    def _normalised(self, scores_TE: Tensor) -> Tensor:
        """Scores of all experts that sum to 1."""
        return scores_TE if self.options.score == "softmax" else scores_TE / (scores_TE.sum(-1, keepdim=True) + TINY)

    def _in_turn(self, scores_TE: Tensor) -> Tensor:
        """ids_TK, every expert equally often."""
        T, E = scores_TE.shape
        return (torch.arange(T * self.top_k, device=scores_TE.device) % E).view(T, self.top_k)

    def _choose(self, scores_TE: Tensor) -> Tensor:
        """ids_TK, in descending order of biased score."""
        if self.options.force_balance:
            return self._in_turn(scores_TE)
        bias_E = self.selection_bias()
        scores_TE = scores_TE if bias_E is None else scores_TE + bias_E
        if self.options.n_groups > 1:
            scores_TE = self._close_groups(scores_TE)
        return scores_TE.topk(self.top_k, dim=-1).indices

    def _close_groups(self, scores_TE: Tensor) -> Tensor:
        """Scores with all but the best groups at -inf (node-limited routing; DeepSeek-V2, arXiv 2405.04434, 2.2.2)."""
        o = self.options
        scores_TGe = scores_TE.unflatten(1, (o.n_groups, -1))
        best_TG = scores_TGe.amax(dim=-1) if o.group_score == "max" else scores_TGe.topk(2, dim=-1).values.sum(dim=-1)
        open_Tg = best_TG.topk(o.topk_groups, dim=-1).indices
        closed_TG = torch.ones_like(best_TG, dtype=torch.bool).scatter_(1, open_Tg, False)
        return scores_TGe.masked_fill(closed_TG.unsqueeze(-1), float("-inf")).flatten(1)
