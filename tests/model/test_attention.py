"""Every backend computes the rule: the same numbers and gradients as the dense mask, the block mask element by element.

FlexAttention has no backward on the CPU, and there computes every block: what it would skip is read off its mask.
"""

from functools import partial

import numpy as np
import pytest
import torch
from facts import tells
from torch.testing import assert_close

from gpt2ft.errors import SettingsError
from gpt2ft.model import attention
from gpt2ft.model.attention import attention_for, choose_backend
from gpt2ft.stream import block_kinds, segments, visible

N, H, D = 256, 3, 8
EXACT = {"rtol": 1e-10, "atol": 1e-10}  # in float64


@pytest.fixture(scope="module")
def forests(random_horizons):
    """Pairs (horizons [N], num_tokens): random forests, with a tail, without one, of tail alone, and deep chains."""
    random = np.random.default_rng(0)
    pairs = [(random_horizons(random, N, num_tokens, longest=40), num_tokens) for num_tokens in [N - 50, N - 1] * 2]
    pairs += [(random_horizons(random, N, N, longest=6), N), (torch.full((N,), N), N)]
    pairs += [(torch.arange(1, N + 1), 0), (deep_chain(), N - 4)]
    depths = [len(segment.ancestors) for horizons, n in pairs for segment in segments(horizons.tolist(), n)]
    assert max(depths) > 50
    assert sum(0 < depth < 10 for depth in depths) > 50
    assert sum(n < N for _, n in pairs) > 4
    return pairs


def deep_chain():
    """Under each node of three tokens first a leaf of one, then the next node: a branch at every step."""
    horizons = torch.arange(1, N + 1)
    for start in range(0, N - 4, 4):
        horizons[start : start + 3] = N - 4
    return horizons


def heads(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(N, H, D, dtype=dtype, generator=generator) for _ in range(3)]


def by_hand(q, k, v, horizons):
    """softmax(q k / sqrt(D)) v over what is visible, one head after the other."""
    scores = torch.einsum("qhd,khd->hqk", q, k) / D**0.5
    scores = scores.masked_fill(~visible(horizons), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


@pytest.mark.parametrize("backend", ["dense", "segments"])
def test_values_and_gradients_are_those_of_the_rule(backend, forests):
    for seed, (horizons, num_tokens) in enumerate(forests):
        inputs = [x.requires_grad_() for x in heads(seed)]
        upstream = heads(seed + 100)[0]
        ours = attention_for(horizons, num_tokens, backend)(*inputs, layer=0)
        expected = by_hand(*inputs, horizons)
        assert_close(ours, expected, **EXACT)
        # Where q and k touch nothing, as in a stream of tail alone, they may stay out of the graph.
        found = torch.autograd.grad(ours, inputs, upstream, materialize_grads=True)
        assert_close(found, torch.autograd.grad(expected, inputs, upstream), **EXACT)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_computes_the_same(forests):
    for seed, (horizons, num_tokens) in enumerate(forests):
        inputs = heads(seed, torch.float32)
        with torch.no_grad():
            ours = attention_for(horizons, num_tokens, "flex")(*inputs, layer=0)
        assert_close(ours, by_hand(*inputs, horizons), rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_flex_compiled_skips_nothing_that_is_visible(forests, random_horizons):
    """The compiled kernel reads the lists of blocks, which the plain one does not."""
    from torch.nn.attention.flex_attention import flex_attention

    kernel = torch.compile(flex_attention, dynamic=False)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(attention, "_flex_kernel", lambda device_type: kernel)
        for seed, (horizons, num_tokens) in enumerate(forests):
            inputs = heads(seed, torch.float32)
            ours = attention_for(horizons, num_tokens, "flex")(*inputs, layer=0)
            assert_close(ours, by_hand(*inputs, horizons), rtol=1e-4, atol=1e-5)


class TestBlockMask:
    @pytest.fixture(scope="class")
    def masks(self, random_horizons):
        """Pairs (horizons [1024], the block mask that the kernel is handed)."""
        random = np.random.default_rng(1)
        forests = [random_horizons(random, 1024, 1000, longest=longest) for longest in [5, 50, 200, 400, 400] * 4]
        forests += [torch.full((1024,), 1024), torch.arange(1, 1025)]
        handed = []

        def kernel(q, k, v, block_mask):
            handed.append(block_mask)
            return q

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "_flex_kernel", lambda device_type: kernel)
            for horizons in forests:
                attention_for(horizons, 1000, "flex")(*torch.zeros(3, 1024, H, D), layer=0)
        assert len(handed) == len(forests)
        return list(zip(forests, handed, strict=True))

    def test_is_the_rule_at_every_element(self, masks):
        index = torch.arange(1024)
        num_full, num_partial, num_empty, num_extra = 0, 0, 0, 0
        for horizons, mask in masks:
            partial = self.listed(mask.kv_num_blocks, mask.kv_indices)
            full = self.listed(mask.full_kv_num_blocks, mask.full_kv_indices)
            rule = mask.mask_mod(0, 0, index[:, None], index[None, :])
            expected = visible(horizons)
            assert not (partial & full).any()
            assert torch.equal(self.widened(full) | self.widened(partial) & rule, expected)
            num_extra += int((partial & ~expected.view(8, 128, 8, 128).any(3).any(1)).sum())
            num_full, num_partial = num_full + int(full.sum()), num_partial + int(partial.sum())
            num_empty += int((~(full | partial)).tril().sum())
        assert num_extra == 0  # nothing is computed in vain
        assert min(num_full, num_partial, num_empty) > 50

    def test_lists_queries_by_key_as_it_lists_keys_by_query(self, masks):
        """The transposed lists are what the backward pass reads."""
        for horizons, mask in masks:
            some, full = block_kinds(horizons, 128)
            assert torch.equal(self.listed(mask.q_num_blocks, mask.q_indices), (some & ~full).t())
            assert torch.equal(self.listed(mask.full_q_num_blocks, mask.full_q_indices), full.t())

    @staticmethod
    def listed(counts, indices):
        """bool [8, 8] of the blocks that FlexAttention's lists name."""
        blocks = torch.zeros(8, 8, dtype=torch.bool)
        for row in range(8):
            blocks[row, indices[0, 0, row, : counts[0, 0, row]].long()] = True
        return blocks

    @staticmethod
    def widened(blocks):
        return blocks.repeat_interleave(128, 0).repeat_interleave(128, 1)

    def test_a_stream_of_no_whole_blocks_is_refused(self):
        with pytest.raises(ValueError, match="the stream length must be a multiple of 128, but is 100"):
            attention_for(torch.arange(1, 101), 0, "flex")


def test_the_backend_follows_the_device(monkeypatch):
    monkeypatch.setattr(attention, "compiler_problem", lambda: None)
    assert choose_backend("auto", torch.device("cuda"), "attention") == "flex"
    assert choose_backend("auto", torch.device("cpu"), "attention") == "segments"
    assert choose_backend("dense", torch.device("cuda"), "attention") == "dense"


@pytest.mark.parametrize("asked", ["auto", "flex"])
def test_flex_that_cannot_be_compiled_is_refused(asked, monkeypatch):
    monkeypatch.setattr(attention, "compiler_problem", lambda: "there is no C compiler: install gcc")
    with pytest.raises(SettingsError) as refusal:
        choose_backend(asked, torch.device("cuda"), "model.attention")
    assert tells(str(refusal.value), "no C compiler ... install gcc ... `--model.attention dense`")
    assert choose_backend("dense", torch.device("cuda"), "model.attention") == "dense"


def test_flex_on_a_cpu_is_refused():
    with pytest.raises(SettingsError) as refusal:
        choose_backend("flex", torch.device("cpu"), "attention")
    assert tells(str(refusal.value), "FlexAttention ... CPU ... no backward pass ... `--attention segments`")


def test_segments_are_never_planned_anew_for_each_length(monkeypatch):
    """By cuDNN, which an H100 prefers."""
    asked = []

    def sdpa(*arguments, **settings):
        asked.append(torch.backends.cuda.cudnn_sdp_enabled())
        return whole(*arguments, **settings)

    whole = attention.scaled_dot_product_attention
    monkeypatch.setattr(attention, "scaled_dot_product_attention", sdpa)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    attention_for(deep_chain(), N - 4, "segments")(*heads(), layer=0)
    assert asked
    assert not any(asked)
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_past_the_limit_of_recompilations_flex_is_an_error(monkeypatch):
    """It would be computed N x N otherwise, without a word."""
    from torch._dynamo.exc import FailOnRecompileLimitHit

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    kernel = attention._flex_kernel.__wrapped__("cuda")
    monkeypatch.setattr(attention, "_flex_kernel", lambda device_type: kernel)
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        for horizons in (torch.arange(1, 129), torch.full((128,), 128)):  # of one size: compiled once
            attention_for(horizons, 0, "flex")(*torch.zeros(3, 128, H, D), layer=0)
        with pytest.raises(FailOnRecompileLimitHit):
            attention_for(torch.arange(1, 257), 0, "flex")(*torch.zeros(3, 256, H, D), layer=0)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="`backend` must be flex, segments or dense, but is 'sparse'"):
        attention_for(torch.arange(1, 9), 8, "sparse")
