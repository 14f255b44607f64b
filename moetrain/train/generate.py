"""Sample text from the model as it is trained: every rank runs the forward pass, since experts live on all of them."""

from __future__ import annotations

import torch
import torch.distributed as dist

from moetrain.data.dataset import TokenData
from moetrain.data.tokenizer import ids_of
from moetrain.evaluate.generate import draw
from moetrain.train.engine import Engine


@torch.no_grad()
def generate(engine: Engine, data: TokenData, prompt: str, max_tokens: int, temperature: float, seed: int) -> str:
    """``prompt`` continued by ``max_tokens`` tokens, drawn at ``temperature`` (0: the likeliest token); an empty one
    from the token that ends documents.

    data: what the engine's model reads. Collective: all ranks run the same text, which rank 0 draws.
    """
    tokenizer = data.tokenizer()
    device = next(engine.model.parameters()).device
    engine.model.eval()
    generator = torch.Generator().manual_seed(seed)
    ids = ids_of(tokenizer, [prompt])[0] or [data.eos_id]
    tokens = torch.tensor([ids], device=device)
    for _ in range(max_tokens):
        drawn = draw(engine.next_logits(tokens, tokens.shape[1] - 1), temperature, 1.0, generator).to(device)
        dist.broadcast(drawn, src=0)
        tokens = torch.cat([tokens, drawn[None]], dim=1)
    engine.model.train()
    found = tokens[0].tolist()
    return prompt + str(tokenizer.decode(found))[len(tokenizer.decode(ids)) :]
