"""Cached decoding equals the full forward pass, whatever is decoded beside it or was cached before."""

import random
from itertools import pairwise

import pytest
import torch
from continuing import PROMPTS, SAMPLED, STOP, VOCABULARY, continued, finished, suppressing, uncached
from torch.testing import assert_close

from gpt2ft.inference import cache
from gpt2ft.inference.cache import GROWTH, KeyValueCache
from gpt2ft.inference.decoder import Decoder
from gpt2ft.inference.sampling import GREEDY
from gpt2ft.model.attention import dense_attention
from gpt2ft.settings.sections import SamplingSettings


@pytest.fixture(scope="module")
def model(lively):
    return lively(64, 32)


def test_attention_is_never_planned_anew_for_each_length(model, monkeypatch):
    """By cuDNN, which an H100 prefers; prompts and single tokens."""
    asked = []

    def sdpa(*arguments, **settings):
        asked.append(torch.backends.cuda.cudnn_sdp_enabled())
        return whole(*arguments, **settings)

    whole = cache.scaled_dot_product_attention
    monkeypatch.setattr(cache, "scaled_dot_product_attention", sdpa)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    decoder = Decoder(model, [STOP], suppressing(), 2)
    decoder.join([1, 2, 3], GREEDY, 4)
    decoder.step()
    decoder.join([1, 2], GREEDY, 4)
    decoder.step()
    assert len(asked) > 2
    assert not any(asked)


class TestSchedule:
    def test_whoever_joins_and_leaves_each_sequence_is_as_if_alone(self, model):
        """80 sequences in 5 slots; some give up early, some begin like another, each chooses in its own way."""
        draw = random.Random(1)
        sequences = [self.random_sequence(draw) for _ in range(60)]
        sequences += [([*prompt[:-1], 1, 2], *others) for prompt, *others in draw.sample(sequences, 20)]
        draw.shuffle(sequences)
        decoder = Decoder(model, [STOP], suppressing(), 5, prefill_chunk=7)
        present, sampled = {}, [[] for _ in sequences]  # slot -> number
        joined = left_early = joined_midway = gaps = waited = 0
        while joined < len(sequences) or present:
            while joined < len(sequences) and decoder.num_free and draw.random() < 0.6:
                joined_midway += any(sampled[number] for number in present.values())
                slot = decoder.join(*sequences[joined])
                assert slot not in present
                present[slot] = joined
                joined += 1
            gaps += any(b - a > 1 for a, b in pairwise(sorted(present)))
            steps = decoder.step()
            waited += len(present) > len(steps) > 0
            for slot, id, finish in steps:
                number = present[slot]
                sampled[number] += [] if id is None else [id]
                gives_up = draw.random() < 0.05
                if finish or gives_up:
                    expected, ended = self.alone(model, *sequences[number])
                    assert (sampled[number], finish) in [(expected, ended), (expected[: len(sampled[number])], None)]
                    left_early += not finish
                    decoder.leave(slot)
                    del present[slot]
        assert left_early > 10
        assert joined_midway > 30
        assert gaps > 10
        assert waited > 30  # whose prompt was not read to its end while others went on

    def random_sequence(self, draw):
        prompt = [draw.randrange(VOCABULARY) for _ in range(draw.randrange(1, 25))]
        sampling = draw.choice([GREEDY, SAMPLED, SamplingSettings(temperature=2.0, top_k=20, seed=draw.randrange(100))])
        return prompt, sampling, draw.randrange(1, 15)

    def alone(self, model, prompt, sampling, most):
        decoder = Decoder(model, [STOP], suppressing(), 1)
        return finished(decoder, decoder.join(prompt, sampling, most))

    def test_an_ended_sequence_keeps_its_slot_until_it_leaves(self, model):
        decoder = Decoder(model, [STOP], suppressing(STOP), 2)
        slot = decoder.join([1, 2], GREEDY, 1)
        assert [(step.slot, step.finish_reason) for step in decoder.step()] == [(slot, "length")]
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
        decoder = Decoder(model, [], suppressing(), 1)
        reply, _ = finished(decoder, decoder.join(prompt, SAMPLED, 6))
        read = count_read(model)
        again = then(prompt, reply)
        slot = decoder.join(again, SAMPLED, 8)
        (first,) = decoder.step()
        assert read == [num_read + 1]  # the last id of a prompt always is
        fresh = Decoder(model, [], suppressing(), 1)
        ids, finish = finished(decoder, slot)
        assert ([first.id, *ids], finish) == finished(fresh, fresh.join(again, SAMPLED, 8))

    def test_what_another_slot_holds_is_not_read_again(self, model, count_read):
        prompt = [1, 2, 3, 4, 5, 6, 8, 9, 10, 11]
        decoder = Decoder(model, [], suppressing(), 3)
        first = decoder.join(prompt, SAMPLED, 6)
        decoder.step()  # its prompt is read, and it goes on
        read = count_read(model)
        others = [decoder.join(ids, GREEDY, 6) for ids in (prompt, [*prompt, 50, 51])]
        replies = {slot: [] for slot in (first, *others)}
        while steps := decoder.step():
            for slot, id, _ in steps:
                replies[slot].append(id)
        assert read[0] == 1 + 1 + 2  # a token of the first, the last of the same prompt, and what the third adds
        for slot, ids in zip(others, (prompt, [*prompt, 50, 51]), strict=True):
            assert replies[slot] == uncached(model, ids, 6, suppressing()).ids

    def test_a_sequence_goes_where_most_of_it_is_cached(self, model):
        decoder = Decoder(model, [], suppressing(), 3)
        prompts = [[1] * 9, [2] * 9, [3] * 9]
        for prompt in prompts:
            decoder.join(prompt, GREEDY, 1)
        decoder.step()
        for slot in range(3):
            decoder.leave(slot)
        assert [decoder.join([*prompts[number], 5], GREEDY, 1) for number in (1, 2, 0)] == [1, 2, 0]

    def test_a_sequence_that_begins_like_no_other_goes_where_the_least_is_cached(self, model):
        decoder = Decoder(model, [], suppressing(), 3)
        for prompt in ([1] * 9, [2] * 4, [3] * 7):
            decoder.join(prompt, GREEDY, 1)
        decoder.step()
        for slot in range(3):
            decoder.leave(slot)
        assert decoder.join([4] * 9, GREEDY, 1) == 1


class TestReading:
    def test_a_long_prompt_is_read_between_the_tokens_of_others(self, model, count_read):
        decoder = Decoder(model, [], suppressing(), 3, prefill_chunk=8)
        first = decoder.join([5], GREEDY, 30)
        decoder.step()
        long, after = decoder.join([1] * 20, GREEDY, 30), decoder.join([2] * 6, GREEDY, 30)
        read = count_read(model)
        slots = [[step.slot for step in decoder.step()] for _ in range(4)]
        assert slots == [[first], [first], [first, long], [first, long, after]]
        assert read == [8 + 1, 8 + 1, 4 + 4 + 1, 2 + 2]

    def test_whatever_is_read_at_once_the_replies_are_the_same(self, model):
        prompts = [[1, 2, 3] * 7, [4] * 20, [5]]
        expected = [uncached(model, prompt, 9, suppressing()).ids for prompt in prompts]
        for prefill_chunk in range(1, 25):
            decoder = Decoder(model, [STOP], suppressing(), 3, prefill_chunk)
            slots = [decoder.join(prompt, GREEDY, 9) for prompt in prompts]
            sampled = {slot: [] for slot in slots}
            finishes = {}
            while len(finishes) < 3:
                for slot, id, finish in decoder.step():
                    sampled[slot] += [] if id is None else [id]
                    finishes |= {slot: finish} if finish else {}
            assert [sampled[slot] for slot in slots] == expected

    def test_nothing_read_per_step_is_refused(self, model):
        with pytest.raises(ValueError, match="`prefill_chunk` must be at least 1, but is 0"):
            Decoder(model, [STOP], suppressing(), 1, prefill_chunk=0)


class TestStops:
    def test_each_sequence_has_stops_of_its_own_and_never_samples_those_of_others(self, model):
        """The ids that end one kind of sequence are padding to another."""
        likely = continued(model, PROMPTS, 12, [STOP], suppressing(STOP))
        other = likely[0].ids[2]
        decoder = Decoder(model, [STOP, other], suppressing(), 4)
        ended = {decoder.join(prompt, GREEDY, 12, [other]): prompt for prompt in PROMPTS}
        replies = {slot: [] for slot in ended}
        finishes = {}
        while len(finishes) < len(ended):
            for slot, id, finish in decoder.step():
                replies[slot] += [] if id is None else [id]
                finishes |= {slot: finish} if finish else {}
        for slot, prompt in ended.items():
            alone = continued(model, [prompt], 12, [other], suppressing(STOP))[0]
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
        mask = suppressing(7)
        expected = uncached(fragile, [1, 2, 3], 10, mask)
        decoder = Decoder(fragile, [STOP], mask, 3)
        good = decoder.join([1, 2, 3], GREEDY, 10)
        sampled = [step.id for step in decoder.step()]
        bad = decoder.join([4, 7, 5], GREEDY, 10)
        steps = decoder.step()
        assert (bad, None, "broken") in steps
        assert decoder.step() != []
        sampled += [step.id for step in steps if step.slot == good]
        assert sampled == expected.ids[:2]

    def test_whoever_comes_next_into_its_slot_is_as_if_alone(self, fragile):
        """What is masked is multiplied by zero, which does not make zero of everything."""
        mask = suppressing(7)
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
            assert ids == continued(fragile, [[4, 5, 6]], 5, [], mask)[0].ids


class TestCache:
    def test_room_grows_with_what_is_cached_up_to_the_context(self, lively):
        model = lively(64, 2 * GROWTH + 20)
        decoder = Decoder(model, [], suppressing(), 2)
        decoder.join([1] * 10, GREEDY, 1000)
        decoder.join([2] * 5, SAMPLED, 1000)
        rooms = {}
        while steps := decoder.step():
            rooms.setdefault(decoder._cache.keys[0].shape[2], len(steps))
        assert list(rooms) == [GROWTH, 2 * GROWTH, 2 * GROWTH + 20]
        for sampling, prompt, slot in ((GREEDY, [1] * 10, 0), (SAMPLED, [2] * 5, 1)):
            alone = continued(model, [prompt], 1000, [], suppressing(), sampling)[0].ids
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
                assert_close(cache.prefill(slot, start, end)(q[new], k[new], v[new], 0), expected[new])
        pair = [x[[10, 10]] for x in (q, k, v)]
        cache.make_room(11)
        assert_close(cache.step([0, 2], [10, 10])(*pair, 0), expected[[10, 10]])
