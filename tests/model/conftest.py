"""What the tests of the model share: random forests, as horizons alone and as whole streams."""

import numpy as np
import pytest
import torch
from small_gpt2 import SHAPE, TOKENS


@pytest.fixture(scope="session")
def random_horizons():
    """random_horizons(random, length, num_tokens, longest): trees of nodes of 1 to `longest` tokens, then tail."""

    def make(random, length, num_tokens, longest):
        horizons = np.arange(1, length + 1)

        def lay(start, end):
            while start < end:
                subtree = min(end, start + int(random.integers(1, max(2, end - start + 1))))
                node = min(subtree, start + int(random.integers(1, longest + 1)))
                horizons[start:node] = subtree
                lay(node, subtree)
                start = subtree

        lay(0, num_tokens)
        return torch.from_numpy(horizons)

    return make


@pytest.fixture(scope="session")
def random_stream(random_tree):
    """random_stream(random, vocabulary): two supervised trees in 384 tokens and 300 targets, both with a tail.

    Tokens are random ids below `vocabulary`, the weights of the targets are random too.
    """
    from dataclasses import replace

    from gpt2ft.data.packing import build_stream
    from gpt2ft.data.token_tree import weigh

    def randomized(tree, random, vocabulary):
        tokens = random.integers(0, vocabulary, len(tree.tokens))
        weights = (tree.weights * random.uniform(0.5, 2.0, len(tree.weights))).astype(np.float32)
        return replace(tree, tokens=tokens, weights=weights)

    def make(random, vocabulary):
        while True:
            trees = [weigh(random_tree(random), "once") for _ in range(2)]
            if 250 < sum(len(tree.tokens) for tree in trees) < 380:
                return build_stream([randomized(tree, random, vocabulary) for tree in trees], 384, 300)

    return make


@pytest.fixture(scope="session")
def transformers_gpt2():
    """transformers_gpt2(shape): their GPT-2 with every parameter random, biases and norms too, and activations near 1.

    `shape` is (vocab_size, n_positions, n_embd, n_layer, n_head).
    """
    transformers = pytest.importorskip("transformers")

    def make(shape, **settings):
        names = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
        settings = dict(zip(names, shape, strict=True)) | {"bos_token_id": 0, "eos_token_id": 0} | settings
        config = transformers.GPT2Config(**settings)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.GPT2LMHeadModel(config).eval()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    scale = 0.1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
                    parameter.normal_(1.0 if "ln_" in name and name.endswith("weight") else 0.0, scale)
        return model

    return make


@pytest.fixture(scope="module")
def theirs(transformers_gpt2):
    """Their small model."""
    return transformers_gpt2(SHAPE)


@pytest.fixture(scope="module")
def expected(theirs):
    """Its logits, [LENGTH, vocabulary]."""
    with torch.no_grad():
        return theirs(TOKENS[None]).logits[0]


@pytest.fixture
def folder(theirs, tmp_path):
    """The same as `save_pretrained` leaves it."""
    theirs.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture(scope="session")
def read_gpt2():
    """read_gpt2(path): our model from a folder, by way of all of model/pretrained.py."""
    from gpt2ft.model.gpt2 import GPT2
    from gpt2ft.model.pretrained import find_folder, read_config, read_weights

    def read(path):
        folder = find_folder(str(path))
        config = read_config(folder)
        model = GPT2(config)
        model.load_state_dict(read_weights(folder, config))
        return model.eval()

    return read
