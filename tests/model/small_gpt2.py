"""A small shape, tokens for it, and what a model of ours says to them."""

import torch

from gpt2ft.model.attention import attention_for

SHAPE = (60, 24, 16, 2, 2)  # vocab_size, n_positions, n_embd, n_layer, n_head
LENGTH = 24
TOKENS = torch.arange(LENGTH) * 7 % 60


@torch.no_grad()
def logits(model):
    """Logits [LENGTH, vocabulary] of TOKENS."""
    attend = attention_for(torch.full((LENGTH,), LENGTH), LENGTH, "dense")
    return model.logits(model(TOKENS, torch.arange(LENGTH), attend))
