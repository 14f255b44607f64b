"""Sample text from the model as it is trained: every rank runs the forward pass, since experts live on all of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from moetrain.evaluate.generate import draw
from moetrain.train.engine import Engine


@torch.no_grad()
def generate(engine: Engine, tokenizer: Any, prompt: str, max_tokens: int, temperature: float, seed: int) -> str:
    """``prompt`` continued by up to ``max_tokens`` tokens, drawn at ``temperature`` (0: the likeliest token).

    tokenizer: a ``tokenizers.Tokenizer``. Collective: all ranks run the same text, which rank 0 draws.
    """
    device = next(engine.model.parameters()).device
    engine.model.eval()
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([tokenizer.encode(prompt).ids], device=device)
    for _ in range(max_tokens):
        drawn = draw(engine.next_logits(tokens, tokens.shape[1] - 1), temperature, 1.0, generator).to(device)
        dist.broadcast(drawn, src=0)
        tokens = torch.cat([tokens, drawn[None]], dim=1)
    engine.model.train()
    return str(tokenizer.decode(tokens[0].tolist()))
