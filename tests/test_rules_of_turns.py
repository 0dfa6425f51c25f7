"""One rule for what a turn may be, wherever `role` and `content` are read: data, /load, the server, the template."""

import json

import jinja2
import pytest

from gpt2ft.chat.session import Session
from gpt2ft.data.formats.chat_messages import chat_messages
from gpt2ft.data.reading import Malformed
from gpt2ft.inference.sampling import GREEDY
from gpt2ft.text.template import CHAT_TEMPLATE


def in_data(messages):
    role, text, _ = chat_messages({"messages": messages}, "messages")[-1]
    return role, text


def in_chat(messages):
    session = Session(None, GREEDY, 9)
    session.from_messages(messages)
    last = session.to_messages()[-1]
    return last["role"], last["content"]


def on_the_server(messages):
    requests = pytest.importorskip("gpt2ft.server.openai.requests")
    request = requests.parse(requests.ChatRequest, ["application/json"], json.dumps({"messages": messages}).encode())
    return request.messages[-1].turn


def in_the_template(messages):
    def refuse(message):
        raise ValueError(message)

    *_, last = jinja2.Template(CHAT_TEMPLATE).render(messages=messages, raise_exception=refuse).split("<|end|>")[:-1]
    role, _, text = last.removeprefix("<|").partition("|>")
    return role, text


READERS = pytest.mark.parametrize("read", [in_data, in_chat, on_the_server, in_the_template])


def part(text, **more):
    return {"type": "text", "text": text} | more


def after_a_question(message):
    return [{"role": "user", "content": "Hi"}] * (message.get("role") == "assistant") + [message]


@READERS
@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
@pytest.mark.parametrize("content", ["Be brief.", [part("Be "), part("brief.")], [part("Be brief.")]])
def test_what_a_turn_may_be(read, role, content):
    known = {"developer": "system"}.get(role, role)
    assert read(after_a_question({"role": role, "content": content})) == (known, "Be brief.")


@READERS
@pytest.mark.parametrize(
    "message",
    [
        {"content": "Hi"},
        {"role": "user"},
        *({"role": role, "content": "Hi"} for role in (None, 5, "", "tool", "function", "text", ["user"])),
        *({"role": "user", "content": content} for content in (None, 5, True, {}, part("Hi"))),
        *({"role": "user", "content": [one]} for one in ("Hi", None, 5, [], {}, {"text": "Hi"}, {"type": "text"})),
        *({"role": "user", "content": [part("Hi"), one]} for one in (part(None), part(5), part("x", type="image"))),
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    ],
)
def test_what_it_may_not_be(read, message):
    refusals = (ValueError, Malformed, pytest.importorskip("gpt2ft.server.errors").ApiError)
    with pytest.raises(refusals):
        read(after_a_question(message))
