"""What the tests of generation share."""

import pytest


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
