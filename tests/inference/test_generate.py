"""Cached decoding equals the full forward pass, token for token, for prompts of different lengths together."""

import pytest
import torch

from gpt2ft.inference.generate import generate
from gpt2ft.inference.sampling import greedy
from gpt2ft.model.attention import dense_attention
from gpt2ft.model.gpt2 import GPT2, GPT2Config

VOCABULARY, STOP = 61, 7
PROMPTS = [[1, 2, 3], [4] * 11, [5], [9, 8, 7, 6, 5, 4]]


@pytest.fixture(scope="module")
def model():
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=3, n_head=4)
    model = GPT2(config).initialize(torch.Generator().manual_seed(0))
    with torch.no_grad():  # large weights: the likeliest token then depends on all that came before
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def forbidden(*ids):
    mask = torch.zeros(64, dtype=torch.bool)
    mask[VOCABULARY:] = True
    mask[list(ids)] = True
    return mask


@torch.no_grad()
def uncached(model, prompt, most, mask):
    ids = list(prompt)
    for _ in range(min(most, model.config.n_positions - len(prompt))):
        horizons = torch.full((len(ids),), len(ids))
        hidden = model(torch.tensor(ids), torch.arange(len(ids)), dense_attention(horizons))
        chosen = int(model.logits(hidden[-1]).masked_fill(mask, -torch.inf).argmax())
        if chosen == STOP:
            return ids[len(prompt) :], True
        ids.append(chosen)
    return ids[len(prompt) :], False


def test_together_and_cached_equals_alone_and_uncached(model):
    replies = generate(model, PROMPTS, 40, [STOP], forbidden(), greedy)
    expected = [uncached(model, prompt, 40, forbidden()) for prompt in PROMPTS]
    assert [(reply.ids, reply.stopped) for reply in replies] == expected
    assert len({len(reply.ids) for reply in replies}) > 1
    assert len({id for reply in replies for id in reply.ids}) > 5


def test_a_reply_ends_where_the_context_does(model):
    mask = forbidden(STOP)
    replies = generate(model, PROMPTS, 1000, [STOP], mask, greedy)
    assert [len(reply.ids) for reply in replies] == [32 - len(prompt) for prompt in PROMPTS]
    assert not any(reply.stopped for reply in replies)


def test_forbidden_ids_are_never_said(model):
    free = {id for reply in generate(model, PROMPTS, 20, [STOP], forbidden(STOP), greedy) for id in reply.ids}
    banned = sorted(free)[:3]
    said = {id for reply in generate(model, PROMPTS, 20, [STOP], forbidden(STOP, *banned), greedy) for id in reply.ids}
    assert len(banned) == 3
    assert not said & set(banned)
    assert max(said | free) < VOCABULARY


def test_training_mode_is_restored_and_dropout_is_off_meanwhile():
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2, dropout=0.5)
    model = GPT2(config).initialize(torch.Generator().manual_seed(0)).train()
    first, second = (generate(model, PROMPTS, 10, [STOP], forbidden(), greedy) for _ in range(2))
    assert first == second
    assert model.training
