"""The objective of fine-tuning: minus the log-probs by their weights, over the sum of the weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gpt2ft.data.packing import build_stream
from gpt2ft.data.token_tree import weigh
from gpt2ft.objectives.sft import SFT


@pytest.fixture(params=["once", "leaves", "fractions"])
def streams(request, random_tree):
    """Five trees, each in a stream of its own and all in one, which have places to spare."""
    trees = [random_tree(np.random.default_rng(seed)) for seed in range(5)]
    if request.param == "fractions":
        draw = np.random.default_rng(0).choice
        fractions = [draw(np.array([0.1, 0.5, 1], np.float32), len(tree.weights)) for tree in trees]
        trees = [replace(tree, weights=tree.weights * w) for tree, w in zip(trees, fractions, strict=True)]
    trees = [weigh(tree, "once" if request.param == "once" else "leaves") for tree in trees]
    streams = [build_stream([tree], 800, 600) for tree in trees], build_stream(trees, 4000, 3000)
    assert max(float(stream.weights.max()) for stream in streams[0]) > (0 if request.param == "once" else 1)
    return streams


def test_a_step_is_the_mean_over_the_weights_however_it_is_cut(streams):
    alone, packed = streams
    log_probs = -torch.rand(len(packed.weights), generator=torch.Generator().manual_seed(0))  # of one sign, as any are
    real = packed.weights.nonzero()[:, 0]
    expected = -(packed.weights[real] * log_probs[real]).sum() / packed.weights[real].sum()
    assert float(SFT().loss(log_probs, packed) / SFT().normalizer(packed)) == pytest.approx(float(expected), rel=1e-6)
    parts = log_probs[real].split([int(stream.weights.count_nonzero()) for stream in alone])
    total = sum(
        SFT().loss(torch.nn.functional.pad(part, (0, len(stream.weights) - len(part))), stream)
        for part, stream in zip(parts, alone, strict=True)
    )
    normalizer = sum(SFT().normalizer(stream) for stream in alone)
    assert float(total / normalizer) == pytest.approx(float(expected), rel=1e-6)


def test_places_to_spare_have_no_gradient(streams):
    _, packed = streams
    log_probs = torch.randn(len(packed.weights), requires_grad=True)
    SFT().loss(log_probs, packed).backward()
    assert torch.equal(log_probs.grad, -packed.weights)
    assert (packed.weights == 0).any()


def test_nothing_is_logged_besides_the_loss(streams):
    _, packed = streams
    assert SFT().metric_names == ()
    assert SFT().metrics(torch.zeros(len(packed.weights)), packed).shape == (0,)
