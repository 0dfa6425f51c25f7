"""Bodies of requests: what is read, what is passed over because it asks for nothing, and what is refused by name."""

import json

import pytest

from gpt2ft.server.errors import ApiError
from gpt2ft.server.openai.requests import NEUTRAL_VALUES, ChatRequest, CompletionRequest, parse

JSON = ["application/json"]
HI = {"messages": [{"role": "user", "content": "Hi"}]}
REPLY = {"role": "assistant", "content": "A drink."}


def chat(**parameters):
    return parse(ChatRequest, JSON, json.dumps(HI | parameters).encode())


def refusal(**parameters):
    """(status, code, param) of a chat that is refused."""
    with pytest.raises(ApiError) as error:
        chat(**parameters)
    return error.value.status, error.value.code, error.value.param


def test_parameters_are_read():
    given = {"model": "tiny", "temperature": 0, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1}
    given |= {"seed": -(2**63), "max_completion_tokens": 5, "stream": True}
    request = chat(**given, stop=["a", "b"], stream_options={"include_usage": True})
    assert request.model_dump(include=given.keys()) == given
    assert request.stop == ["a", "b"]
    assert request.includes_usage
    assert not chat(stream=True).includes_usage


def test_a_stop_may_be_one_string_and_a_content_may_be_parts():
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "tea?"}]
    request = chat(stop="x", messages=[{"role": "user", "content": parts}])
    assert request.stop == ["x"]
    assert request.messages[0].text == "What is tea?"


def test_a_completion_has_a_text():
    def complete(prompt):
        return parse(CompletionRequest, JSON, json.dumps({"prompt": prompt}).encode()).prompt

    assert complete("The kettle") == complete(["The kettle"]) == "The kettle"
    assert complete(None) == ""
    for prompt in ([1, 2], [1], [[1]], ["a", "b"], [["a"]], [None], [], {}, 5):
        with pytest.raises(ApiError) as error:
            complete(prompt)
        assert (error.value.status, error.value.param) == (400, "prompt")


@pytest.mark.parametrize("name", NEUTRAL_VALUES)
def test_what_asks_for_nothing_is_passed_over_and_what_asks_for_more_is_refused(name):
    for value in (*NEUTRAL_VALUES[name], None):
        assert chat(**{name: value}) == chat()
    for value in (7, "x", ["x"], {"x": 1}):
        assert refusal(**{name: value}) == (400, "unsupported_parameter", name)


def test_true_is_no_number_here():
    assert refusal(n=True) == (400, "unsupported_parameter", "n")
    assert refusal(logprobs=0) == (400, "unsupported_parameter", "logprobs")
    assert refusal(max_tokens=True) == (400, "invalid_value", "max_tokens")


def test_null_says_nothing():
    assert chat(temperature=None, stop=None, unheard_of=None) == chat()
    for nothing in ({"refusal": None, "tool_calls": None, "unheard_of": None}, {"tool_calls": [], "annotations": []}):
        assert chat(messages=[REPLY | nothing]) == chat(messages=[REPLY])
    nulls = {"stream_options": {"include_usage": None}, "prompt_cache_options": {"ttl": None}}
    assert chat(**nulls).includes_usage is False
    part = {"type": "text", "text": "A drink."}
    assert chat(messages=[REPLY | {"content": [part | {"file": None}]}]) == chat(messages=[REPLY])


@pytest.mark.parametrize(
    ("parameters", "code", "param"),
    [
        ({"unheard_of": 1}, "unknown_parameter", "unheard_of"),
        ({"temperature": 2.1}, "invalid_value", "temperature"),
        ({"temperature": "0.7"}, "invalid_value", "temperature"),
        ({"top_p": 0}, "invalid_value", "top_p"),
        ({"top_k": -1}, "invalid_value", "top_k"),
        ({"seed": 2**63}, "invalid_value", "seed"),
        ({"seed": 1.5}, "invalid_value", "seed"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"stop": ["a"] * 5}, "invalid_value", "stop"),
        ({"stop": ["a", ""]}, "invalid_value", "stop[1]"),
        ({"stop": "a" * 201}, "invalid_value", "stop[0]"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "unknown_parameter", "stream_options.x"),
        ({"user": 5}, "invalid_value", "user"),
        ({"prompt_cache_key": ["x"]}, "invalid_value", "prompt_cache_key"),
        ({"safety_identifier": 5}, "invalid_value", "safety_identifier"),
        ({"metadata": {"topic": 5}}, "invalid_value", "metadata.topic"),
        ({"prompt_cache_retention": "a week"}, "invalid_value", "prompt_cache_retention"),
        ({"prompt_cache_options": {"x": 1}}, "unknown_parameter", "prompt_cache_options.x"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": ["Hi"]}, "invalid_value", "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_value", "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "missing_required_parameter", "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "invalid_value", "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "name": 5}]}, "invalid_value", "messages[0].name"),
        ({"messages": [{"role": "user", "content": "x", "key": 5}]}, "unknown_parameter", "messages[0].key"),
        ({"messages": [REPLY | {"tool_calls": [{}]}]}, "unsupported_parameter", "messages[0].tool_calls"),
    ],
)
def test_the_first_problem_is_named(parameters, code, param):
    assert refusal(**parameters) == (400, code, param)


def test_no_refusal_repeats_what_people_wrote():
    for parameters in ({"temperature": "secret"}, {"messages": [{"role": "secret", "content": "secret"}]}):
        with pytest.raises(ApiError) as error:
            chat(**parameters)
        assert "secret" not in str(error.value)


@pytest.mark.parametrize("types", [[], ["text/plain"], JSON * 2, ["application/x-www-form-urlencoded"], [""]])
def test_only_json_is_read(types):
    with pytest.raises(ApiError) as error:
        parse(ChatRequest, types, json.dumps(HI).encode())
    assert (error.value.status, error.value.code) == (415, "unsupported_media_type")
    assert parse(ChatRequest, ["Application/JSON; charset=utf-8"], json.dumps(HI).encode()) == chat()


def test_a_body_that_nests_too_deeply_for_its_shape_is_refused():
    deep = "[" * 900 + "]" * 900
    with pytest.raises(ApiError) as error:
        parse(ChatRequest, JSON, b'{"messages": %s}' % deep.encode())
    assert error.value.status == 400
