"""A reply between the thread that pushes and the reader that takes."""

import pytest

from gpt2ft.inference.detokenizer import IncrementalDetokenizer
from gpt2ft.inference.prompt_format import Prompt
from gpt2ft.inference.sampling import GREEDY
from gpt2ft.server.errors import internal
from gpt2ft.server.reply import Delta, GenerationRequest, Reply


@pytest.fixture
def reply(tokenizer):
    """reply(*stop_strings); it counts in `num_wakes`."""

    def make(*stop_strings):
        detokenizer = IncrementalDetokenizer(tokenizer, stop_strings)
        reply = Reply(GenerationRequest(Prompt([1]), GREEDY, 9, (), detokenizer), wake=lambda: wake())
        reply.num_wakes = 0

        def wake():
            reply.num_wakes += 1

        return reply

    return make


def test_text_collects_until_it_is_taken(reply, tokenizer):
    reply = reply()
    ids = tokenizer.encode("A hot drink.")
    for id in ids:
        reply.push(id, None)
    assert reply.take() == Delta("A hot drink.")
    assert reply.take() == Delta("")
    assert (reply.num_tokens, reply.num_wakes, reply.has_ended) == (len(ids), len(ids), False)


def test_the_speed_is_that_of_the_tokens_after_the_first(reply, tokenizer, monkeypatch):
    reply, times = reply(), iter((10.0, 10.5, 12.0))
    monkeypatch.setattr("gpt2ft.server.reply.perf_counter", lambda: next(times))
    first, *rest = tokenizer.encode("A hot drink")
    reply.push(first, None)
    assert reply.tokens_per_second is None
    for id in rest:
        reply.push(id, None)
    reply.push(None, "stop")  # which is no token
    assert reply.tokens_per_second == 2 / 2.0


def test_half_a_character_wakes_nobody_and_comes_with_the_end(reply, tokenizer):
    reply = reply()
    first, *rest = tokenizer.encode("🙂")
    assert rest
    reply.push(first, None)
    assert (reply.num_wakes, reply.take()) == (0, Delta(""))
    reply.push(None, "stop")
    assert reply.take() == Delta("\ufffd", "stop")
    assert reply.take().is_last


def test_a_stop_string_ends_it(reply, tokenizer):
    reply = reply("kettle")
    for id in tokenizer.encode("A kettle"):
        reply.push(id, None)
    assert reply.take() == Delta("A ", "stop")
    assert reply.has_ended


def test_a_failure_comes_after_the_text(reply, tokenizer):
    reply = reply()
    reply.push(tokenizer.encode("A")[0], None)
    error = internal()
    reply.fail(error)
    assert reply.take() == Delta("A", None, error)
    assert reply.has_ended
