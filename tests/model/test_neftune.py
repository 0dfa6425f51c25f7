"""NEFTune's noise: that of transformers on one conversation, and of each token one for all its paths in a tree."""

import numpy as np
import pytest
import torch

from gpt2ft.model.attention import dense_attention
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.model.neftune import embedding_noise, longest_paths
from gpt2ft.settings.scripts import DPOSettings
from gpt2ft.stream import visible

VOCABULARY = 90


def test_the_longest_path_through_each_token(random_stream):
    for seed in range(5):
        stream = random_stream(np.random.default_rng(seed), VOCABULARY)
        found = longest_paths(stream.positions, stream.horizons)
        ends = zip(range(len(found)), stream.horizons.tolist(), strict=True)
        assert found.tolist() == [1 + int(stream.positions[index:end].max()) for index, end in ends]
    assert len(set(found.tolist())) > 3
    assert longest_paths(torch.arange(7), torch.full((7,), 7)).tolist() == [7] * 7


def test_one_conversation_gets_the_noise_of_transformers():
    """Of a sequence without padding, from the same state of the generator."""
    theirs = pytest.importorskip("transformers.integrations.neftune").neftune_post_forward_hook
    length, width, alpha = 50, 64, 5.0
    embedding = torch.nn.Embedding(VOCABULARY, width).train()
    embedding.neftune_noise_alpha = alpha
    embedded = embedding(torch.arange(length))[None].detach()
    torch.manual_seed(3)
    expected = theirs(embedding, None, embedded) - embedded
    torch.manual_seed(3)
    found = embedding_noise(alpha, torch.arange(length), torch.full((length,), length), width)
    torch.testing.assert_close(found, expected[0], rtol=0, atol=1e-6)
    bound = alpha / (length * width) ** 0.5
    assert 0.99 * bound < float(found.abs().max()) <= bound
    assert float(found.std()) == pytest.approx(bound / 3**0.5, rel=0.05)


@torch.no_grad()
def test_it_is_there_in_training_alone_and_by_the_seed(tiny_gpt2, random_stream):
    stream, gpt2 = random_stream(np.random.default_rng(0), VOCABULARY), tiny_gpt2(128, 384)
    quiet, noisy = (TargetLogProbs(gpt2, VOCABULARY, "segments", alpha) for alpha in (0.0, 5.0))

    def drawn(seed):
        torch.manual_seed(seed)
        return noisy.train()(stream)

    assert torch.equal(noisy.eval()(stream), quiet.eval()(stream))
    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert not torch.equal(drawn(1), quiet.train()(stream))


@torch.no_grad()
def test_with_it_a_tree_still_equals_its_paths(tiny_gpt2, random_stream):
    stream, gpt2 = random_stream(np.random.default_rng(1), VOCABULARY), tiny_gpt2(128, 384).eval()
    noise = embedding_noise(5.0, stream.positions, stream.horizons, gpt2.config.n_embd)
    hidden = gpt2(stream.tokens, stream.positions, dense_attention(stream.horizons), noise)
    for index in range(0, stream.num_tokens, 37):
        path = visible(stream.horizons)[index].nonzero()[:, 0]
        whole = dense_attention(torch.full_like(path, len(path)))
        alone = gpt2(stream.tokens[path], torch.arange(len(path)), whole, noise[path])
        torch.testing.assert_close(hidden[path], alone, rtol=1e-4, atol=1e-5)
    other = gpt2(stream.tokens, stream.positions, dense_attention(stream.horizons))
    assert not torch.allclose(hidden, other, atol=1e-3)


def test_preferences_have_none():
    settings = DPOSettings(model={"neftune_alpha": 5.0}, data={"train": ["quickstart"]})
    assert any("`model.neftune_alpha`" in problem for problem in settings.problems())
