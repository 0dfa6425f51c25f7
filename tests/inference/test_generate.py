"""Cached decoding equals the full forward pass, token for token, whatever is decoded beside it or was cached before."""

import random
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from gpt2ft.inference.cache import GROWTH, KeyValueCache
from gpt2ft.inference.generate import MOST_TOGETHER, Decoder, Reply, generate, suppressed_token_mask
from gpt2ft.inference.sampling import GREEDY, Sampling
from gpt2ft.model.attention import dense_attention
from gpt2ft.model.gpt2 import GPT2, GPT2Config
from gpt2ft.text.template import render_prompt

VOCABULARY, STOP = 61, 33
PROMPTS = [[1, 2, 3], [4] * 11, [5], [9, 8, 7, 6, 5, 4]]
SAMPLED = Sampling(temperature=1.2, top_p=0.95, repetition_penalty=1.1, seed=3)


@pytest.fixture(scope="module")
def model(lively):
    return lively(64, 32)


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
            return Reply(ids[len(prompt) :], True)
        ids.append(chosen)
    return Reply(ids[len(prompt) :], False)


def finished(decoder, slot):
    """Steps until the sequence in `slot` has ended: (ids, finish)."""
    ids = []
    while True:
        for at, id, finish in decoder.step():
            if at == slot:
                ids += [] if id is None else [id]
                if finish:
                    decoder.leave(slot)
                    return ids, finish


class TestOneByOne:
    def test_together_and_cached_equals_alone_and_uncached(self, model):
        replies = generate(model, PROMPTS, 40, [STOP], forbidden(), GREEDY)
        assert replies == [uncached(model, prompt, 40, forbidden()) for prompt in PROMPTS]
        assert {reply.stopped for reply in replies} == {True, False}
        assert len({id for reply in replies for id in reply.ids}) > 5

    def test_more_prompts_than_are_decoded_together(self, model):
        draw = random.Random(0)
        prompts = [[draw.randrange(VOCABULARY) for _ in range(draw.randrange(1, 20))] for _ in range(MOST_TOGETHER + 9)]
        for sampling in (GREEDY, SAMPLED):
            together = generate(model, prompts, 12, [STOP], forbidden(), sampling)
            assert together == [generate(model, [prompt], 12, [STOP], forbidden(), sampling)[0] for prompt in prompts]
            assert len({len(reply.ids) for reply in together}) > 5

    def test_replies_equal_those_of_transformers(self, model):
        transformers = pytest.importorskip("transformers")
        names = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
        shape = {name: getattr(model.config, name) for name in names}
        config = transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=STOP)
        theirs = transformers.GPT2LMHeadModel(config).double().eval()
        theirs.transformer.load_state_dict(model.state_dict())
        mask = forbidden()
        options = {"do_sample": False, "repetition_penalty": 1.3, "pad_token_id": STOP}
        options |= {"suppress_tokens": mask.nonzero()[:, 0].tolist(), "max_new_tokens": 12}
        sampling = Sampling(temperature=0, repetition_penalty=1.3)
        draw = random.Random(2)
        prompts = [[draw.randrange(STOP) for _ in range(draw.randrange(1, 15))] for _ in range(10)]
        replies = generate(model, prompts, 12, [STOP], mask, sampling)
        for prompt, reply in zip(prompts, replies, strict=True):
            said = theirs.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
            assert reply.ids + [STOP] * reply.stopped == said
        assert {reply.stopped for reply in replies} == {True, False}

    def test_no_prompts(self, model):
        assert generate(model, [], 40, [STOP], forbidden()) == []


class TestSchedule:
    def test_whoever_joins_and_leaves_each_sequence_is_as_if_alone(self, model):
        """80 sequences in 5 slots; some give up early, some begin like another, each chooses in its own way."""
        draw = random.Random(1)
        sequences = [self.random_sequence(draw) for _ in range(60)]
        sequences += [([*prompt[:-1], 1, 2], *others) for prompt, *others in draw.sample(sequences, 20)]
        draw.shuffle(sequences)
        decoder = Decoder(model, [STOP], forbidden(), 5, prefill_chunk=7)
        present, said = {}, [[] for _ in sequences]  # slot -> number
        joined = left_early = joined_midway = gaps = waited = 0
        while joined < len(sequences) or present:
            while joined < len(sequences) and decoder.num_free and draw.random() < 0.6:
                joined_midway += any(said[number] for number in present.values())
                slot = decoder.join(*sequences[joined])
                assert slot not in present
                present[slot] = joined
                joined += 1
            gaps += any(b - a > 1 for a, b in pairwise(sorted(present)))
            steps = decoder.step()
            waited += len(present) > len(steps) > 0
            for slot, id, finish in steps:
                number = present[slot]
                said[number] += [] if id is None else [id]
                gives_up = draw.random() < 0.05
                if finish or gives_up:
                    expected, ended = self.alone(model, *sequences[number])
                    assert (said[number], finish) in [(expected, ended), (expected[: len(said[number])], None)]
                    left_early += not finish
                    decoder.leave(slot)
                    del present[slot]
        assert left_early > 10
        assert joined_midway > 30
        assert gaps > 10
        assert waited > 30  # whose prompt was not read to its end while others went on

    def random_sequence(self, draw):
        prompt = [draw.randrange(VOCABULARY) for _ in range(draw.randrange(1, 25))]
        sampling = draw.choice([GREEDY, SAMPLED, Sampling(temperature=2.0, top_k=20, seed=draw.randrange(100))])
        return prompt, sampling, draw.randrange(1, 15)

    def alone(self, model, prompt, sampling, most):
        decoder = Decoder(model, [STOP], forbidden(), 1)
        return finished(decoder, decoder.join(prompt, sampling, most))

    def test_an_ended_sequence_keeps_its_slot_until_it_leaves(self, model):
        decoder = Decoder(model, [STOP], forbidden(STOP), 2)
        slot = decoder.join([1, 2], GREEDY, 1)
        assert [(step.slot, step.finish) for step in decoder.step()] == [(slot, "length")]
        assert decoder.step() == []
        assert decoder.num_free == 1
        decoder.join([1, 2], GREEDY, 1)
        with pytest.raises(ValueError, match="all 2 slots are taken"):
            decoder.join([1, 2], GREEDY, 1)
        decoder.leave(slot)
        assert decoder.join([1, 2], GREEDY, 1) == slot


class TestPrefix:
    @pytest.mark.parametrize(
        ("then", "num_read"),
        [
            (lambda prompt, reply: [*prompt, *reply, 50, 51, 52], 3),  # the next turn: the last id was not read yet
            (lambda prompt, reply: [*prompt, 50, 51], 1),  # another reply
            (lambda prompt, reply: prompt, 0),  # the same again
            (lambda prompt, reply: prompt[:3], 0),  # less
            (lambda prompt, reply: [*prompt[:4], 60, *prompt[5:]], 5),  # another word in the middle
            (lambda prompt, reply: prompt[1:], 8),  # nothing in common
        ],
    )
    def test_only_what_is_new_is_read_and_nothing_changes(self, model, count_read, then, num_read):
        prompt = [1, 2, 3, 4, 5, 6, 8, 9, 10, 11]
        decoder = Decoder(model, [], forbidden(), 1)
        reply, _ = finished(decoder, decoder.join(prompt, SAMPLED, 6))
        read = count_read(model)
        again = then(prompt, reply)
        slot = decoder.join(again, SAMPLED, 8)
        (first,) = decoder.step()
        assert read == [num_read + 1]  # the last id of a prompt always is
        fresh = Decoder(model, [], forbidden(), 1)
        ids, finish = finished(decoder, slot)
        assert ([first.id, *ids], finish) == finished(fresh, fresh.join(again, SAMPLED, 8))

    def test_a_sequence_goes_where_most_of_it_is_cached(self, model):
        decoder = Decoder(model, [], forbidden(), 3)
        prompts = [[1] * 9, [2] * 9, [3] * 9]
        for prompt in prompts:
            decoder.join(prompt, GREEDY, 1)
        decoder.step()
        for slot in range(3):
            decoder.leave(slot)
        assert [decoder.join([*prompts[number], 5], GREEDY, 1) for number in (1, 2, 0)] == [1, 2, 0]

    def test_a_sequence_that_begins_like_no_other_goes_where_the_least_is_cached(self, model):
        decoder = Decoder(model, [], forbidden(), 3)
        for prompt in ([1] * 9, [2] * 4, [3] * 7):
            decoder.join(prompt, GREEDY, 1)
        decoder.step()
        for slot in range(3):
            decoder.leave(slot)
        assert decoder.join([4] * 9, GREEDY, 1) == 1


class TestReading:
    def test_a_long_prompt_is_read_between_the_tokens_of_others(self, model, count_read):
        decoder = Decoder(model, [], forbidden(), 3, prefill_chunk=8)
        first = decoder.join([5], GREEDY, 30)
        decoder.step()
        long, after = decoder.join([1] * 20, GREEDY, 30), decoder.join([2] * 6, GREEDY, 30)
        read = count_read(model)
        slots = [[step.slot for step in decoder.step()] for _ in range(4)]
        assert slots == [[first], [first], [first, long], [first, long, after]]
        assert read == [8 + 1, 8 + 1, 4 + 4 + 1, 2 + 2]

    def test_whatever_is_read_at_once_the_replies_are_the_same(self, model):
        prompts = [[1, 2, 3] * 7, [4] * 20, [5]]
        expected = [uncached(model, prompt, 9, forbidden()).ids for prompt in prompts]
        for prefill_chunk in range(1, 25):
            decoder = Decoder(model, [STOP], forbidden(), 3, prefill_chunk)
            slots = [decoder.join(prompt, GREEDY, 9) for prompt in prompts]
            said = {slot: [] for slot in slots}
            finishes = {}
            while len(finishes) < 3:
                for slot, id, finish in decoder.step():
                    said[slot] += [] if id is None else [id]
                    finishes |= {slot: finish} if finish else {}
            assert [said[slot] for slot in slots] == expected

    def test_nothing_read_per_step_is_refused(self, model):
        with pytest.raises(ValueError, match="`prefill_chunk` must be at least 1, but is 0"):
            Decoder(model, [STOP], forbidden(), 1, prefill_chunk=0)


class TestStops:
    def test_each_sequence_has_stops_of_its_own_and_never_says_those_of_others(self, model):
        """The ids that end one kind of sequence are padding to another."""
        likely = generate(model, PROMPTS, 12, [STOP], forbidden(STOP))
        other = likely[0].ids[2]
        decoder = Decoder(model, [STOP, other], forbidden(), 4)
        ended = {decoder.join(prompt, GREEDY, 12, [other]): prompt for prompt in PROMPTS}
        replies = {slot: [] for slot in ended}
        finishes = {}
        while len(finishes) < len(ended):
            for slot, id, finish in decoder.step():
                replies[slot] += [] if id is None else [id]
                finishes |= {slot: finish} if finish else {}
        for slot, prompt in ended.items():
            alone = generate(model, [prompt], 12, [other], forbidden(STOP))[0]
            assert (replies[slot], finishes[slot] == "stop") == (alone.ids, alone.stopped)
        assert set(finishes.values()) == {"stop", "length"}


class TestBroken:
    @pytest.fixture
    def fragile(self, lively):
        """Any sequence with the id 7 has logits that are not finite."""
        model = lively(64, 32)
        with torch.no_grad():
            model.wte.weight[7] = torch.nan
        return model

    def test_a_broken_sequence_ends_alone(self, fragile):
        mask = forbidden(7)
        expected = uncached(fragile, [1, 2, 3], 10, mask)
        decoder = Decoder(fragile, [STOP], mask, 3)
        good = decoder.join([1, 2, 3], GREEDY, 10)
        said = [step.id for step in decoder.step()]
        bad = decoder.join([4, 7, 5], GREEDY, 10)
        steps = decoder.step()
        assert (bad, None, "broken") in steps
        assert decoder.step() != []
        said += [step.id for step in steps if step.slot == good]
        assert said == expected.ids[:2]

    def test_whoever_comes_next_into_its_slot_is_as_if_alone(self, fragile):
        """What is masked is multiplied by zero, which does not make zero of everything."""
        mask = forbidden(7)
        for steps_before_leaving, prefill_chunk in ((1, 100), (1, 4), (3, 100)):
            decoder = Decoder(fragile, [], mask, 2, prefill_chunk)
            bad = decoder.join([4, 5, 7, 7, 7, 7, 7, 6], GREEDY, 10)
            for _ in range(steps_before_leaving):
                decoder.step()
            decoder.leave(bad)
            slot = decoder.join([4, 5, 6], GREEDY, 5)
            assert slot == bad
            decoder.join([1] * 12, GREEDY, 100)  # longer, so that more of every slot is looked at
            ids, _ = finished(decoder, slot)
            assert ids == generate(fragile, [[4, 5, 6]], 5, [], mask)[0].ids


class TestEnds:
    def test_a_reply_ends_where_the_context_does(self, model):
        replies = generate(model, PROMPTS, 1000, [STOP], forbidden(STOP))
        assert [len(reply.ids) for reply in replies] == [32 - len(prompt) for prompt in PROMPTS]
        assert not any(reply.stopped for reply in replies)

    @pytest.mark.parametrize("most", [1, 2, 5])
    def test_a_reply_ends_after_max_new_tokens(self, model, most):
        assert {len(reply.ids) for reply in generate(model, PROMPTS, most, [STOP], forbidden(STOP))} == {most}

    def test_a_prompt_may_leave_room_for_one_token(self, model):
        assert len(generate(model, [[1] * 31], 5, [], forbidden())[0].ids) == 1

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
            generate(model, [[1, 2], prompt], most, [STOP], forbidden())
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
            Decoder(model, [STOP], forbidden(), 0)


class TestForbidden:
    def test_forbidden_ids_are_never_said(self, model):
        free = {id for reply in generate(model, PROMPTS, 20, [STOP], forbidden(STOP)) for id in reply.ids}
        banned = sorted(free)[:3]
        said = {id for reply in generate(model, PROMPTS, 20, [STOP], forbidden(STOP, *banned)) for id in reply.ids}
        assert len(banned) == 3
        assert not said & set(banned)
        assert max(said | free) < VOCABULARY

    @pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=5.0, top_p=1.0, seed=0)], ids=["greedy", "hot"])
    def test_control_and_padding_ids_are_never_said_however_much_the_model_wants_to(
        self, tiny_gpt2, tokenizer, sampling
    ):
        model = tiny_gpt2(tokenizer.padded_size, 48)
        mask = suppressed_token_mask(tokenizer, model.wte.weight)
        stops = [tokenizer.end_id, tokenizer.end_of_text_id]
        with torch.no_grad():  # every hidden state now points at the forbidden rows
            model.ln_f.bias.fill_(1.0)
            model.wte.weight[mask] += 5.0
        prompts = [render_prompt(tokenizer, [("user", text)]) for text in ("What is tea?", "Why?")]
        free = generate(model, prompts, 20, stops, torch.zeros_like(mask), sampling)
        assert all(mask[reply.ids].all() for reply in free)
        said = [id for reply in generate(model, prompts, 20, stops, mask, sampling) for id in reply.ids]
        assert len(said) > 10
        assert not tokenizer.control_ids & set(said)
        assert max(said) < len(tokenizer)

    def test_unsayable_is_padding_and_every_control_token_but_the_stops(self, tokenizer):
        table = torch.zeros(tokenizer.padded_size, 1)
        chat = set(suppressed_token_mask(tokenizer, table).nonzero()[:, 0].tolist())
        padding = set(range(len(tokenizer), tokenizer.padded_size))
        assert chat == padding | set(tokenizer.role_ids.values())
        assert padding
        document = set(suppressed_token_mask(tokenizer, table, [tokenizer.end_of_text_id]).nonzero()[:, 0].tolist())
        assert document == chat | {tokenizer.end_id}

    def test_the_repetition_penalty_spares_control_ids(self, model):
        """A model that would stop after a prompt full of stops still does, although it repeats no content any more."""
        draw = random.Random(0)
        prompts = [[id for _ in range(4) for id in (draw.randrange(VOCABULARY), STOP)] for _ in range(200)]
        heavy = Sampling(temperature=0, repetition_penalty=1000.0)
        stopping = [prompt for prompt in prompts if generate(model, [prompt], 1, [STOP], forbidden())[0].stopped]
        assert len(stopping) > 3
        assert all(reply.stopped for reply in generate(model, stopping, 1, [STOP], forbidden(), heavy))
        for prompt, reply in zip(prompts, generate(model, prompts, 12, [], forbidden(STOP), heavy), strict=True):
            assert len({*prompt, *reply.ids}) == len({*prompt}) + 12

    def test_without_the_penalty_content_is_repeated(self, model):
        assert any(len({*reply.ids}) < 12 for reply in generate(model, PROMPTS, 12, [STOP], forbidden(STOP)))


class TestModel:
    def test_training_mode_is_restored_and_dropout_is_off_meanwhile(self):
        config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2, dropout=0.5)
        model = GPT2(config).initialize(torch.Generator().manual_seed(0)).train()
        first, second = (generate(model, PROMPTS, 10, [STOP], forbidden()) for _ in range(2))
        assert first == second
        assert model.training
        assert all(module.training for module in model.modules())
        generate(model.eval(), PROMPTS, 10, [STOP], forbidden())
        assert not model.training

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_any_dtype(self, lively, dtype):
        model = lively(64, 32, scale=2.0).to(dtype)
        decoder = Decoder(model, [], forbidden(), 2)
        for prompt in PROMPTS[:2]:
            decoder.join(prompt, SAMPLED, 20)
        said = [id for _ in range(20) for _, id, _ in decoder.step()]
        assert len(said) == 40
        assert decoder._cache.keys[0].dtype == dtype

    def test_no_gradients_are_kept(self, model):
        decoder = Decoder(model, [], forbidden(), 1)
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
                generate(model, PROMPTS, 10, [STOP], forbidden(), sampling)
        assert not model.training

    def test_padding_rows_may_hold_anything(self, lively):
        model = lively(64, 32)
        expected = generate(model, PROMPTS, 10, [STOP], forbidden())
        with torch.no_grad():
            model.wte.weight[VOCABULARY:] = torch.nan
        assert generate(model, PROMPTS, 10, [STOP], forbidden()) == expected


class TestCache:
    def test_room_grows_with_what_is_cached_up_to_the_context(self, lively):
        model = lively(64, 2 * GROWTH + 20)
        decoder = Decoder(model, [], forbidden(), 2)
        decoder.join([1] * 10, GREEDY, 1000)
        decoder.join([2] * 5, SAMPLED, 1000)
        rooms = {}
        while steps := decoder.step():
            rooms.setdefault(decoder._cache.keys[0].shape[2], len(steps))
        assert list(rooms) == [GROWTH, 2 * GROWTH, 2 * GROWTH + 20]
        for sampling, prompt, slot in ((GREEDY, [1] * 10, 0), (SAMPLED, [2] * 5, 1)):
            alone = generate(model, [prompt], 1000, [], forbidden(), sampling)[0].ids
            assert decoder._cached[slot] == (prompt + alone)[:-1]

    def test_attention_over_cached_and_new_tokens_equals_the_dense_mask(self, model):
        """Sequences read in several goes of several tokens, behind each other and side by side."""
        draw = torch.Generator().manual_seed(0)
        q, k, v = torch.randn(3, 12, 2, 16, dtype=torch.float64, generator=draw)
        expected = dense_attention(torch.full((12,), 12))(q, k, v, 0)
        cache = KeyValueCache(model, 4)
        for slot in (0, 2):
            for start, end in ((0, 5), (5, 6), (6, 10)):
                cache.make_room(end)
                new = slice(start, end)
                assert_close(cache.prefill(slot, start)(q[new], k[new], v[new], 0), expected[new])
        pair = [x[[10, 10]] for x in (q, k, v)]
        cache.make_room(11)
        assert_close(cache.step([0, 2], [10, 10])(*pair, 0), expected[[10, 10]])


def test_float32_weights_generate_under_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        replies = generate(deepcopy(model).float(), PROMPTS, 8, [STOP], forbidden(STOP))
    assert {len(reply.ids) for reply in replies} == {8}
