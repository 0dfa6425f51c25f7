"""GPT-2 against transformers' in several shapes, plain and as a tree; what it starts from; where dropout acts."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gpt2ft.data.packing import build_stream
from gpt2ft.model.attention import attention_for
from gpt2ft.model.gpt2 import GPT2, GPT2Config, parameter_shapes
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.model.pretrained import published_config
from gpt2ft.settings.choices import PUBLISHED_MODELS

# vocab_size, n_positions, n_embd, n_layer, n_head
SHAPES = {
    "one head": (50, 16, 8, 1, 1),
    "narrow and deep": (101, 64, 32, 6, 2),
    "odd head width": (77, 40, 45, 3, 5),
    "heads of one": (64, 33, 12, 2, 12),
    "the width of 124M": (50257, 1024, 768, 2, 12),
}


def causal(length):
    return attention_for(torch.full((length,), length), length, "dense")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_logits_are_those_of_transformers(shape, transformers_gpt2, read_gpt2, tmp_path):
    theirs = transformers_gpt2(shape)
    theirs.save_pretrained(tmp_path)
    ours = read_gpt2(tmp_path)
    vocabulary, n_positions = shape[:2]
    length = min(n_positions, 64)
    positions = torch.arange(n_positions - length, n_positions)  # the last ones, so that all of wpe is there
    tokens = torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens[None], position_ids=positions[None]).logits[0]
    found = ours.logits(ours(tokens, positions, causal(length)))
    assert found.shape == (length, vocabulary)
    assert expected.std() > 0.3
    assert (found - expected).abs().max() <= 1e-4


@torch.no_grad()
def test_a_tree_holds_what_transformers_computes_path_by_path(random_tree, transformers_gpt2, read_gpt2, tmp_path):
    shape = (200, 512, 32, 3, 4)
    theirs = transformers_gpt2(shape)
    theirs.save_pretrained(tmp_path)
    ours = read_gpt2(tmp_path)
    random = np.random.default_rng(2)
    trees = [random_tree(random) for _ in range(3)]
    trees = [replace(tree, tokens=random.integers(0, 200, len(tree.tokens))) for tree in trees]
    size = sum(len(tree.tokens) for tree in trees)
    stream = build_stream(trees, size + 9, size)
    attend = attention_for(stream.horizons, stream.num_tokens, "segments")
    found = ours.logits(ours(stream.tokens, stream.positions, attend))
    at, num_paths, num_shared = 0, 0, 0
    for tree in trees:
        for leaf in sorted(set(range(len(tree.parents))) - set(tree.parents.tolist())):
            path = tree.path_to(leaf)
            index = np.concatenate([np.arange(tree.lengths[node]) + tree.starts[node] for node in path])
            expected = theirs(torch.from_numpy(tree.tokens[index])[None]).logits[0]
            assert (found[at + index] - expected).abs().max() <= 1e-4
            num_paths, num_shared = num_paths + 1, num_shared + len(index)
        at += len(tree.tokens)
    assert num_paths > 3 * len(trees)
    assert num_shared > 1.5 * at  # many tokens are on several paths


def test_parameters_have_the_names_and_sizes_of_the_published_models():
    sizes = {"distilgpt2": 81_912_576, "gpt2": 124_439_808, "gpt2-medium": 354_823_168}
    sizes |= {"gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
    assert sizes.keys() == PUBLISHED_MODELS.keys()
    for name, size in sizes.items():
        with torch.device("meta"):
            model = GPT2(published_config(name))
        assert sum(parameter.numel() for parameter in model.parameters()) == size
        assert model.state_dict().keys() == dict(model.named_parameters()).keys()


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="`n_embd` must be a multiple of `n_head` = 5, but is 64"):
        GPT2Config(100, n_embd=64, n_head=5)


class TestInitialize:
    CONFIG = GPT2Config(500, 200, n_embd=128, n_layer=8, n_head=4)

    def make(self, seed=0):
        return GPT2(self.CONFIG).initialize(torch.Generator().manual_seed(seed))

    def test_is_that_of_the_paper(self):
        spreads = {"positions": 0.01, "residual": 0.02 / 4, "matrix": 0.02}  # 1 / sqrt(2 * 8 layers) = 1 / 4
        kinds = dict.fromkeys(["bias", "norm", *spreads], 0)
        for name, parameter in self.make().named_parameters():
            if name.endswith("bias"):
                kinds["bias"] += 1
                assert (parameter == 0).all()
            elif "ln_" in name:
                kinds["norm"] += 1
                assert (parameter == 1).all()
            else:
                kind = "positions" if name == "wpe.weight" else "residual" if "c_proj" in name else "matrix"
                kinds[kind] += 1
                assert parameter.std().item() == pytest.approx(spreads[kind], rel=0.02)
                assert abs(parameter.mean().item()) < spreads[kind] * 0.04
        assert kinds == {"bias": 8 * 6 + 1, "norm": 17, "positions": 1, "residual": 16, "matrix": 17}

    def test_the_generator_alone_decides(self):
        first, again, other = (self.make(seed).state_dict() for seed in (0, 0, 1))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["h.3.mlp.c_fc.weight"], other["h.3.mlp.c_fc.weight"])
        assert not torch.equal(first["h.3.mlp.c_fc.weight"], first["h.4.mlp.c_fc.weight"])


class TestDropout:
    def outputs(self, model, times=2):
        torch.manual_seed(0)
        return [model(torch.arange(20), torch.arange(20), causal(20)) for _ in range(times)]

    def test_acts_in_training_alone(self):
        plain = GPT2(GPT2Config(50, 32, n_embd=16, n_layer=2, n_head=2)).initialize(torch.Generator().manual_seed(0))
        dropped = GPT2(replace(plain.config, dropout=0.2))
        dropped.load_state_dict(plain.state_dict())
        one, other = self.outputs(dropped.train())
        assert not torch.equal(one, other)
        for model in (plain.train(), plain.eval(), dropped.eval()):
            for output in self.outputs(model):
                assert torch.equal(output, self.outputs(plain)[0])

    def test_stands_where_gpt2_has_it(self):
        """On the embeddings and on both residual branches: with all of it dropped nothing is left to compute."""
        model = GPT2(GPT2Config(50, 32, n_embd=16, n_layer=2, n_head=2, dropout=0.999999))
        model.initialize(torch.Generator().manual_seed(0)).train()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # so that both branches have something to add, even of nothing
                torch.nn.init.ones_(parameter)
        seen = []
        model.ln_f.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        self.outputs(model, times=1)
        assert (seen[0] == 0).all()
        assert sum(isinstance(module, torch.nn.Dropout) for module in model.modules()) == 1 + 2 * 2


@pytest.mark.parametrize("shape", [(61, 32, 48, 3, 4), (128, 64, 32, 1, 2)])
def test_the_shapes_told_are_those_built(shape):
    config = GPT2Config(*shape[:3], n_layer=shape[3], n_head=shape[4])
    assert parameter_shapes(config) == {name: tuple(p.shape) for name, p in GPT2(config).named_parameters()}


def test_recomputing_gives_the_same_bits_and_keeps_less(random_stream):
    """With dropout on, as it is drawn again."""
    config = GPT2Config(128, 384, 64, 3, 4, dropout=0.3)
    stream = random_stream(np.random.default_rng(0), 100)

    def run(activation_checkpointing):
        """Log-probs, gradients, and how many numbers were kept for the backward pass."""
        gpt2 = GPT2(config).initialize(torch.Generator().manual_seed(0)).train()
        gpt2.activation_checkpointing = activation_checkpointing
        kept = []

        def keep(tensor):
            kept.append(tensor.numel())
            return tensor

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            log_probs = TargetLogProbs(gpt2, 100, "segments")(stream)
        (log_probs * stream.weights).sum().backward()
        return [log_probs.detach(), *(parameter.grad for parameter in gpt2.parameters())], sum(kept)

    (expected, most), (found, least) = run(False), run(True)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert least < most / 2
