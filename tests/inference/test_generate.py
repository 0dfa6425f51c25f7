"""Completions equal those of transformers and of the full forward pass, and hold no control ids."""

import random
from copy import deepcopy

import pytest
import torch
from continuing import NUM_SLOTS, PROMPTS, SAMPLED, STOP, VOCABULARY, continued, suppressing, uncached

from gpt2ft.inference.decoder import Decoder, suppressed_token_mask
from gpt2ft.inference.sampling import GREEDY
from gpt2ft.model.gpt2 import GPT2, GPT2Config
from gpt2ft.settings.sections import SamplingSettings
from gpt2ft.text.template import render_prompt


@pytest.fixture(scope="module")
def model(lively):
    return lively(64, 32)


class TestOneByOne:
    def test_together_and_cached_equals_alone_and_uncached(self, model):
        replies = continued(model, PROMPTS, 40, [STOP], suppressing(), GREEDY)
        assert replies == [uncached(model, prompt, 40, suppressing()) for prompt in PROMPTS]
        assert {reply.stopped for reply in replies} == {True, False}
        assert len({id for reply in replies for id in reply.ids}) > 5

    def test_more_prompts_than_are_decoded_together(self, model):
        draw = random.Random(0)
        prompts = [[draw.randrange(VOCABULARY) for _ in range(draw.randrange(1, 20))] for _ in range(NUM_SLOTS + 9)]
        for sampling in (GREEDY, SAMPLED):
            together = continued(model, prompts, 12, [STOP], suppressing(), sampling)
            assert together == [
                continued(model, [prompt], 12, [STOP], suppressing(), sampling)[0] for prompt in prompts
            ]
            assert len({len(reply.ids) for reply in together}) > 5

    def test_replies_equal_those_of_transformers(self, model):
        transformers = pytest.importorskip("transformers")
        names = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
        shape = {name: getattr(model.config, name) for name in names}
        config = transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=STOP)
        theirs = transformers.GPT2LMHeadModel(config).double().eval()
        theirs.transformer.load_state_dict(model.state_dict())
        mask = suppressing()
        options = {"do_sample": False, "repetition_penalty": 1.3, "pad_token_id": STOP}
        options |= {"suppress_tokens": mask.nonzero()[:, 0].tolist(), "max_new_tokens": 12}
        sampling = SamplingSettings(temperature=0, repetition_penalty=1.3)
        draw = random.Random(2)
        prompts = [[draw.randrange(STOP) for _ in range(draw.randrange(1, 15))] for _ in range(10)]
        replies = continued(model, prompts, 12, [STOP], mask, sampling)
        for prompt, reply in zip(prompts, replies, strict=True):
            sampled = theirs.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
            assert reply.ids + [STOP] * reply.stopped == sampled
        assert {reply.stopped for reply in replies} == {True, False}

    def test_no_prompts(self, model):
        assert continued(model, [], 40, [STOP], suppressing()) == []


class TestEnds:
    def test_a_reply_ends_where_the_context_does(self, model):
        replies = continued(model, PROMPTS, 1000, [STOP], suppressing(STOP))
        assert [len(reply.ids) for reply in replies] == [32 - len(prompt) for prompt in PROMPTS]
        assert not any(reply.stopped for reply in replies)

    @pytest.mark.parametrize("most", [1, 2, 5])
    def test_a_reply_ends_after_max_new_tokens(self, model, most):
        assert {len(reply.ids) for reply in continued(model, PROMPTS, most, [STOP], suppressing(STOP))} == {most}

    def test_a_prompt_may_leave_room_for_one_token(self, model):
        assert len(continued(model, [[1] * 31], 5, [], suppressing())[0].ids) == 1

    @pytest.mark.parametrize(
        ("prompt", "most", "message"),
        [
            ([], 5, "from 1 to 31 tokens.*but has 0"),
            ([1] * 32, 5, "from 1 to 31 tokens.*but has 32"),
            ([1, 64], 5, "from 0 to 63, but one is 64"),
            ([1, -1], 5, "from 0 to 63, but one is -1"),
            ([1], 0, "`max_new_tokens` must be at least 1, but is 0"),
        ],
    )
    def test_what_cannot_be_continued_is_refused_before_anything_is_computed(
        self, model, count_read, prompt, most, message
    ):
        read = count_read(model)
        with pytest.raises(ValueError, match=message):
            continued(model, [[1, 2], prompt], most, [STOP], suppressing())
        assert not read

    def test_a_decoder_without_anything_to_say_is_refused(self, model):
        for mask, message in [
            (torch.ones(64, dtype=torch.bool), "leaves none"),
            (torch.zeros(63, dtype=torch.bool), r"bool \[64\]"),
            (torch.zeros(64), r"bool \[64\].*float32"),
        ]:
            with pytest.raises(ValueError, match=message):
                Decoder(model, [STOP], mask, 1)
        with pytest.raises(ValueError, match="`num_sequences` must be at least 1"):
            Decoder(model, [STOP], suppressing(), 0)


class TestSuppressed:
    def test_suppressed_ids_are_never_sampled(self, model):
        free = {id for reply in continued(model, PROMPTS, 20, [STOP], suppressing(STOP)) for id in reply.ids}
        banned = sorted(free)[:3]
        sampled = {
            id for reply in continued(model, PROMPTS, 20, [STOP], suppressing(STOP, *banned)) for id in reply.ids
        }
        assert len(banned) == 3
        assert not sampled & set(banned)
        assert max(sampled | free) < VOCABULARY

    @pytest.mark.parametrize(
        "sampling", [GREEDY, SamplingSettings(temperature=5.0, top_p=1.0, seed=0)], ids=["greedy", "hot"]
    )
    def test_control_and_padding_ids_are_never_sampled_however_likely(self, tiny_gpt2, tokenizer, sampling):
        model = tiny_gpt2(tokenizer.padded_size, 48)
        stops = [tokenizer.end_id, tokenizer.end_of_text_id]
        mask = suppressed_token_mask(tokenizer, model.wte.weight, stops)
        with torch.no_grad():  # every hidden state now points at the suppressed rows
            model.ln_f.bias.fill_(1.0)
            model.wte.weight[mask] += 5.0
        prompts = [render_prompt(tokenizer, [("user", text)]) for text in ("What is tea?", "Why?")]
        free = continued(model, prompts, 20, stops, torch.zeros_like(mask), sampling)
        assert all(mask[reply.ids].all() for reply in free)
        sampled = [id for reply in continued(model, prompts, 20, stops, mask, sampling) for id in reply.ids]
        assert len(sampled) > 10
        assert not tokenizer.control_ids & set(sampled)
        assert max(sampled) < len(tokenizer)

    def test_suppressed_is_padding_and_every_control_token_but_the_stops(self, tokenizer):
        table = torch.zeros(tokenizer.padded_size + 64, 1)
        stops = [tokenizer.end_id, tokenizer.end_of_text_id]
        chat = set(suppressed_token_mask(tokenizer, table, stops).nonzero()[:, 0].tolist())
        padding = set(range(len(tokenizer), len(table)))
        assert chat == padding | set(tokenizer.role_ids.values())
        assert padding
        document = set(suppressed_token_mask(tokenizer, table, [tokenizer.end_of_text_id]).nonzero()[:, 0].tolist())
        assert document == chat | {tokenizer.end_id}

    def test_the_repetition_penalty_spares_control_ids(self, model):
        """A model that would stop after a prompt full of stops still does, although it repeats no content any more."""
        draw = random.Random(0)
        prompts = [[id for _ in range(4) for id in (draw.randrange(VOCABULARY), STOP)] for _ in range(200)]
        heavy = SamplingSettings(temperature=0, repetition_penalty=1000.0)
        stopping = [prompt for prompt in prompts if continued(model, [prompt], 1, [STOP], suppressing())[0].stopped]
        assert len(stopping) > 3
        assert all(reply.stopped for reply in continued(model, stopping, 1, [STOP], suppressing(), heavy))
        for prompt, reply in zip(prompts, continued(model, prompts, 12, [], suppressing(STOP), heavy), strict=True):
            assert len({*prompt, *reply.ids}) == len({*prompt}) + 12

    def test_without_the_penalty_content_is_repeated(self, model):
        assert any(len({*reply.ids}) < 12 for reply in continued(model, PROMPTS, 12, [STOP], suppressing(STOP)))


class TestModel:
    def test_training_mode_is_restored_and_dropout_is_off_meanwhile(self):
        config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2, dropout=0.5)
        model = GPT2(config).initialize(torch.Generator().manual_seed(0)).train()
        first, second = (continued(model, PROMPTS, 10, [STOP], suppressing()) for _ in range(2))
        assert first == second
        assert model.training
        assert all(module.training for module in model.modules())
        continued(model.eval(), PROMPTS, 10, [STOP], suppressing())
        assert not model.training

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_any_dtype(self, lively, dtype):
        model = lively(64, 32, scale=2.0).to(dtype)
        decoder = Decoder(model, [], suppressing(), 2)
        for prompt in PROMPTS[:2]:
            decoder.join(prompt, SAMPLED, 20)
        sampled = [id for _ in range(20) for _, id, _ in decoder.step()]
        assert len(sampled) == 40
        assert decoder._cache.keys[0].dtype == dtype

    def test_no_gradients_are_kept(self, model):
        decoder = Decoder(model, [], suppressing(), 1)
        decoder.join([1, 2, 3], GREEDY, 5)
        decoder.step()
        assert not decoder._cache.keys[0].requires_grad

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_logits_that_are_not_finite_are_an_error(self, lively, value):
        model = lively(64, 32)
        with torch.no_grad():
            model.h[0].mlp.c_fc.bias[3] = value
        for sampling in (GREEDY, SAMPLED):
            with pytest.raises(ValueError, match="logits must be finite, but are not"):
                continued(model, PROMPTS, 10, [STOP], suppressing(), sampling)
        assert not model.training

    def test_padding_rows_may_hold_anything(self, lively):
        model = lively(64, 32)
        expected = continued(model, PROMPTS, 10, [STOP], suppressing())
        with torch.no_grad():
            model.wte.weight[VOCABULARY:] = torch.nan
        assert continued(model, PROMPTS, 10, [STOP], suppressing()) == expected


def test_float32_weights_generate_under_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        replies = continued(deepcopy(model).float(), PROMPTS, 8, [STOP], suppressing(STOP))
    assert {len(reply.ids) for reply in replies} == {8}
