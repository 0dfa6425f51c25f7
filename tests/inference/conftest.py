"""What the tests of generation share: a model whose likeliest token depends on all that came before."""

import pytest
import torch


@pytest.fixture(scope="session")
def lively(tiny_gpt2):
    """lively(vocab_size, n_positions): large weights, and float64, so that rounding decides nothing."""

    def make(vocab_size, n_positions, scale=12.0):
        model = tiny_gpt2(vocab_size, n_positions, n_embd=32).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale)
        return model

    return make


@pytest.fixture
def count_read():
    """count_read(model): a list that receives the number of tokens of every forward pass."""
    handles = []

    def count(model):
        counts = []
        handles.append(model.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0]))))
        return counts

    yield count
    for handle in handles:
        handle.remove()
