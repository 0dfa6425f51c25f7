"""Replies and errors in OpenAI's shapes."""

import json

import pytest

from gpt2ft.inference.prompt_format import Prompt
from gpt2ft.server.errors import ApiError, internal, invalid, overloaded, unavailable
from gpt2ft.server.openai.responses import OpenAIResponseBuilder, ServedModel, render_error
from gpt2ft.server.reply import Delta, GenerationRequest, Reply

MODEL = ServedModel("tea", "fp_0", 5, {}, {})
USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


@pytest.fixture
def reply():
    """Four tokens behind a prompt of three, from which two turns were dropped."""
    request = GenerationRequest(Prompt([1, 2, 3], dropped_turns=2), None, 9, (), None)
    times = {"_first_came": 1.0, "_last_came": 2.5}
    return Reply(request, wake=lambda: None, num_tokens=4, finish_reason="stop", **times)


def builder(kind="chat", **more):
    return OpenAIResponseBuilder(kind, MODEL, unique="u", created=8, **more)


def read(events):
    return [json.loads(event) for event in events]


def test_a_whole_reply(reply):
    fixed = {"created": 8, "model": "tea", "system_fingerprint": "fp_0", "usage": USAGE, "dropped_turns": 2}
    fixed["tokens_per_second"] = 2.0
    ending = {"index": 0, "logprobs": None, "finish_reason": "stop"}
    assert json.loads(builder().whole(reply, "Tëa")) == fixed | {
        "id": "chatcmpl-u",
        "object": "chat.completion",
        "choices": [ending | {"message": {"role": "assistant", "content": "Tëa"}}],
    }
    assert json.loads(builder("text").whole(reply, "Tëa")) == fixed | {
        "id": "cmpl-u",
        "object": "text_completion",
        "choices": [ending | {"text": "Tëa"}],
    }
    assert builder().headers(reply) == {"x-request-id": "chatcmpl-u", "x-dropped-turns": "2"}


def test_two_replies_differ_in_their_ids():
    assert OpenAIResponseBuilder("chat", MODEL).id != OpenAIResponseBuilder("chat", MODEL).id


def test_a_stream_of_chat(reply):
    [opening] = read(builder().opening(reply))
    assert opening["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert (opening["object"], opening["dropped_turns"]) == ("chat.completion.chunk", 2)
    [chunk] = read(builder().chunks(reply, Delta("A ")))
    assert chunk["choices"] == [{"index": 0, "delta": {"content": "A "}, "logprobs": None, "finish_reason": None}]
    assert "usage" not in chunk
    assert builder().chunks(reply, Delta("")) == []
    *chunks, done = builder().chunks(reply, Delta("cup", "length"))
    text, end = read(chunks)
    assert (text["choices"][0]["delta"], end["choices"][0]["delta"]) == ({"content": "cup"}, {})
    assert [each["choices"][0]["finish_reason"] for each in (text, end)] == [None, "length"]
    assert ("tokens_per_second" in text, end["tokens_per_second"]) == (False, 2.0)
    assert done == b"[DONE]"


def test_a_stream_of_text(reply):
    [chunk] = read(builder("text").chunks(reply, Delta("A ")))
    assert (chunk["object"], chunk["choices"][0]["text"]) == ("text_completion", "A ")


def test_usage_comes_last_if_it_is_asked_for(reply):
    with_usage = builder(includes_usage=True)
    assert read(with_usage.opening(reply))[0]["usage"] is None
    *chunks, _ = with_usage.chunks(reply, Delta("", "stop"))
    end, usage = read(chunks)
    assert end["usage"] is None
    assert (usage["choices"], usage["usage"]) == ([], USAGE)


def test_a_stream_that_fails_ends_with_the_error_and_without_the_closing_word(reply):
    error = unavailable("stopped")
    text, failure = read(builder(includes_usage=True).chunks(reply, Delta("A", failure=error)))
    assert text["choices"][0]["delta"] == {"content": "A"}
    assert failure == json.loads(render_error(error))


@pytest.mark.parametrize(
    ("error", "kind", "param", "code"),
    [
        (invalid("m", "top_p"), "invalid_request_error", "top_p", "invalid_value"),
        (ApiError(401, "m", "invalid_api_key"), "invalid_request_error", None, "invalid_api_key"),
        (overloaded("m", 5), "rate_limit_error", None, "rate_limit_exceeded"),
        (unavailable("m"), "server_error", None, "service_unavailable"),
        (internal("m"), "server_error", None, "internal_error"),
    ],
)
def test_errors(error, kind, param, code):
    assert json.loads(render_error(error)) == {"error": {"message": "m", "type": kind, "param": param, "code": code}}


def test_the_model():
    defaults, limits = {"temperature": 0.5}, {"max_tokens": 7}
    model = ServedModel.now("tea", "0123456789abcdef", defaults, limits)
    assert model.fingerprint == "fp_0123456789"
    openai = {"id": "tea", "object": "model", "created": model.created, "owned_by": "gpt2ft"}
    assert model.describe() == openai | {"defaults": defaults, "limits": limits}
    model.refuse_another(None)
    model.refuse_another("tea")
    with pytest.raises(ApiError) as error:
        model.refuse_another("coffee")
    assert (error.value.status, error.value.code, error.value.param) == (404, "model_not_found", "model")
