"""Each parameter in the types of the openai client stands in the README's table, and does what its row says."""

import json
import re
from collections import defaultdict
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import gpt2ft
from gpt2ft.server.errors import ApiError
from gpt2ft.server.openai.conversion import RequestConverter
from gpt2ft.server.openai.requests import ChatRequest, CompletionRequest, parse
from gpt2ft.settings.using import ServeSettings

pytest.importorskip("openai", reason="needs the client whose types are read")

from openai.types import chat, completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from pydantic import TypeAdapter, ValidationError

BODIES = {
    ChatRequest: {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
    CompletionRequest: {"prompt": "The kettle"},
}
BREAKPOINT = {"mode": "explicit", "ttl": "12h"}
FUNCTION = {"name": "f", "arguments": "{}"}
MORE = {  # other values that the client's types allow than those that ask for nothing
    "model": ["tiny"],
    "messages": [[{"role": "system", "content": "Be brief."}]],
    "prompt": ["x", ["x"]],
    "max_tokens": [5],
    "max_completion_tokens": [5],
    "temperature": [0.5],
    "top_p": [0.5],
    "seed": [5],
    "stop": ["x", ["x", "y"]],
    "stream": [True],
    "stream_options": [{"include_usage": True}],
    "stream_options.include_usage": [True],
    "stream_options.include_obfuscation": [True],
    "user": ["somebody"],
    "safety_identifier": ["0123abcd"],
    "prompt_cache_key": ["conversation-1"],
    "prompt_cache_options": [{}, {"mode": "explicit"}, {"mode": "implicit", "ttl": "30m"}],
    "prompt_cache_retention": ["in_memory", "24h"],
    "metadata": [{}, {"topic": "tea"}],
    "n": [0, 2],
    "best_of": [2],
    "frequency_penalty": [0.5, -2],
    "presence_penalty": [0.5, -2],
    "top_logprobs": [1],
    "logprobs": [True, 0, 5],  # of a chat, of a completion
    "echo": [True],
    "store": [True],
    "suffix": ["x"],
    "logit_bias": [{"50256": -100}],
    "tools": [[{"type": "function", "function": {"name": "f"}}]],
    "functions": [[{"name": "f"}]],
    "tool_choice": ["required", {"type": "function", "function": {"name": "f"}}],
    "function_call": [{"name": "f"}],
    "parallel_tool_calls": [],
    "response_format": [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}],
    "modalities": [["audio"], ["text", "audio"]],
    "service_tier": ["flex", "scale", "priority", "fast"],
    "reasoning_effort": ["minimal", "low", "high"],
    "verbosity": ["low", "high"],
    "audio": [{"voice": "alloy", "format": "wav"}],
    "moderation": [{"model": "x"}],
    "prediction": [{"type": "content", "content": "Hi"}],
    "web_search_options": [{}],
    "messages[].role": ["developer", "system", "assistant"],
    "messages[].content": ["x", [{"type": "text", "text": "x"}]],
    "messages[].name": ["Ann"],
    "messages[].refusal": ["No."],
    "messages[].tool_calls": [[{"type": "function", "id": "1", "function": FUNCTION}]],
    "messages[].audio": [{"id": "1"}],
    "messages[].function_call": [FUNCTION],
    "messages[].tool_call_id": ["1"],
    "messages[].content[].type": [],
    "messages[].content[].text": ["x"],
    "messages[].content[].prompt_cache_breakpoint": [BREAKPOINT],
    "messages[].content[].image_url": [{"url": "x"}],
    "messages[].content[].input_audio": [{"data": "", "format": "wav"}],
    "messages[].content[].file": [{"file_id": "1"}],
    "messages[].content[].refusal": ["No."],
}
WRONG = [[5]]  # is nowhere of the right type
NEEDED = {
    "prompt",
    "messages",
    "messages[].role",
    "messages[].content",
    "messages[].content[].type",
    "messages[].content[].text",
}
OURS = {"top_k", "min_p", "repetition_penalty"}


def client_types():
    """{shape: {path: types}}, as the client that is installed has them; a path is written as in an error."""
    messages = get_args(chat.ChatCompletionMessageParam)
    parts = (*get_args(chat.ChatCompletionContentPartParam), chat.ChatCompletionContentPartRefusalParam)
    chats, texts = (
        {"": get_args(module.CompletionCreateParams), "stream_options.": [chat.ChatCompletionStreamOptionsParam]}
        for module in (chat_create_params, completion_create_params)
    )
    found = {ChatRequest: defaultdict(list), CompletionRequest: defaultdict(list)}
    chats |= {"messages[].": messages, "messages[].content[].": parts}
    for shape, objects in ((ChatRequest, chats), (CompletionRequest, texts)):
        for path, types in objects.items():
            for name, hint in chain.from_iterable(get_type_hints(type).items() for type in types):
                found[shape][path + name].append(hint)
    return found


def table():
    """{path: what the README says of it}"""
    readme = (Path(gpt2ft.__file__).parent / "server" / "README.md").read_text(encoding="utf-8")
    rows = readme.partition("| parameter | |\n")[2].partition("\n\n")[0].splitlines()[1:]
    cells = [re.fullmatch(r"\| (.*) \| (.*) \|", row).groups() for row in rows]
    return {name: says for names, says in cells for name in re.findall("`(.+?)`", names)}


TYPES, TABLE = client_types(), table()
CASES = [(shape, path) for shape, types in TYPES.items() for path in types]


def plain_body(shape, path):
    return BODIES[shape] | ({"stream": True} if path.startswith("stream_options") else {})


def with_value(shape, path, value):
    """A request with this value at `path`."""
    body = at = deepcopy(plain_body(shape, path))
    *above, name = path.split(".")
    for step in above:
        at = at.setdefault(step.removesuffix("[]"), {})
        at = at[0] if step.endswith("[]") else at
    at[name] = value
    return body


@pytest.fixture
def heard(inference_model):
    """heard(shape, body): all of a request that has a bearing on its reply."""
    converter = RequestConverter(inference_model, ServeSettings())

    def hear(shape, body):
        request = parse(shape, ["application/json"], json.dumps(body).encode())
        made = (converter.chat if shape is ChatRequest else converter.completion)(request)
        by_request = (request.model, request.stop, request.stream, request.includes_usage)
        return made.prompt, made.sampling, made.max_new_tokens, *by_request

    return hear


def test_every_parameter_stands_in_the_table_and_none_but_ours_besides():
    known = set().union(*TYPES.values())
    assert len(known) > 50
    assert set(TABLE) == known | OURS
    assert set(MORE) == known


@pytest.mark.parametrize("path", sorted(MORE.keys() - {"stop", "prompt"}))  # whose type is the client's own
def test_the_values_that_are_tried_are_ones_that_the_client_s_types_allow(path):
    adapters = [TypeAdapter(hint) for types in TYPES.values() for hint in types.get(path, ())]

    def is_allowed(adapter, value):
        try:
            adapter.validate_python(value, strict=True)
            return True
        except ValidationError:
            return False

    for value in MORE[path]:
        assert any(is_allowed(adapter, value) for adapter in adapters), value


@pytest.mark.parametrize(("shape", "path"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_a_parameter_does_what_the_table_says(heard, shape, path):
    says, plain = TABLE[path], heard(shape, plain_body(shape, path))
    is_accepted = says.startswith(("obeyed", "accepted"))

    def is_refused(value):
        with pytest.raises(ApiError) as error:
            heard(shape, with_value(shape, path, value))
        place = error.value.param.replace("[0]", "[]")
        return error.value.status == 400 and (place.startswith(path) if is_accepted else place == path)

    neutral = re.findall("`(.+?)`", says) if says.startswith("only") else []
    for value in [*map(json.loads, neutral), *([] if path in NEEDED else [None])]:
        assert heard(shape, with_value(shape, path, value)) == plain
    for value in MORE[path]:
        if is_accepted:
            assert (heard(shape, with_value(shape, path, value)) == plain) == says.startswith("accepted")
        else:
            assert is_refused(value)
    assert is_refused(WRONG)


@pytest.mark.parametrize(
    ("path", "accepted"),
    [("messages[].role", {"system", "developer", "user", "assistant"}), ("messages[].content[].type", {"text"})],
)
def test_roles_and_kinds_of_parts_are_those_that_the_readme_names(heard, path, accepted):
    met = set(chain.from_iterable(map(get_args, TYPES[ChatRequest][path])))
    assert len(met) > len(accepted)
    for value in met:
        body = with_value(ChatRequest, path, value)
        if value in accepted:
            assert heard(ChatRequest, body)
        else:
            with pytest.raises(ApiError) as error:
                heard(ChatRequest, body)
            assert (error.value.status, error.value.param.replace("[0]", "[]")) == (400, path)
