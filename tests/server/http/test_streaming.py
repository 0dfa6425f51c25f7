"""Replies as HTTP responses, with an engine that only remembers and an API of the plainest shapes."""

import asyncio
import logging
import threading

import pytest

pytest.importorskip("starlette", reason="needs the extra [serve]")

from gpt2ft.inference.prompt_format import Prompt
from gpt2ft.server.errors import ApiError, internal, unavailable
from gpt2ft.server.http import streaming
from gpt2ft.server.http.streaming import StreamBridge, reply_stream, whole_reply
from gpt2ft.server.reply import GenerationRequest


class Letters:
    """Stands in for a detokenizer: an id is a letter."""

    is_stopped = False

    def push(self, id):
        return chr(id)

    def finish(self):
        return ""


class Engine:
    """Takes a reply and calls `talk(reply)` in a thread of its own."""

    def __init__(self, talk=lambda reply: None):
        self.talk = talk
        self.abandoned = threading.Event()

    def submit(self, reply):
        threading.Thread(target=self.talk, args=(reply,)).start()

    def abandon(self, reply):
        self.abandoned.set()


class Builder:
    """Writes texts in brackets."""

    id = "reply-1"

    def headers(self, reply):
        return {"x-own": "1"}

    def whole(self, reply, text):
        return f"<{text}>".encode()

    def opening(self, reply):
        return [b"<"]

    def chunks(self, reply, delta):
        return [part.encode() for part in (delta.text, delta.finish_reason and ">", delta.failure and "!") if part]


def say(text, finish="stop"):
    def talk(reply):
        for letter in text:
            reply.push(ord(letter), None)
        reply.push(None, finish)

    return talk


def bridge(engine):
    return StreamBridge(engine, GenerationRequest(Prompt([1, 2]), None, 9, (), Letters()))


async def hang_up():
    return {"type": "http.disconnect"}


async def stay():
    await asyncio.Event().wait()


def messages(kind, engine, receive=stay, on_message=lambda message: None):
    """Return all that is sent to a client."""

    async def run():
        sent = []

        async def send(message):
            sent.append(message)
            on_message(message)

        await kind(bridge(engine), Builder())({"type": "http"}, receive, send)
        return sent

    return asyncio.run(run())


def respond(*arguments):
    """(status, headers, body) of a response that is complete."""
    start, *parts = messages(*arguments)
    assert not parts[-1].get("more_body", False)
    return start["status"], dict(start["headers"]), b"".join(part["body"] for part in parts)


def test_a_whole_reply(caplog):
    caplog.set_level(logging.INFO)
    engine = Engine(say("tea"))
    status, headers, body = respond(whole_reply, engine)
    assert (status, headers[b"content-type"], headers[b"x-own"], body) == (200, b"application/json", b"1", b"<tea>")
    assert not engine.abandoned.is_set()
    assert "reply-1: 2 + 3 tokens, stop, " in caplog.text


def test_a_stream_is_events_up_to_its_end():
    status, headers, body = respond(reply_stream, Engine(say("tea")))
    assert (status, headers[b"content-type"]) == (200, b"text/event-stream; charset=utf-8")
    first, *events, last, end = body.split(b"\n\n")
    assert (first, last, end) == (b"data: <", b"data: >", b"")
    assert b"".join(event.removeprefix(b"data: ") for event in events) == b"tea"


def test_a_silent_stream_is_kept_alive(monkeypatch):
    monkeypatch.setattr(streaming, "KEEP_ALIVE", 0.01)
    kept_alive = threading.Event()

    def talk(reply):
        assert kept_alive.wait(120)
        say("tea")(reply)

    def notice(message):
        if message.get("body") == b": keep-alive\n\n":
            kept_alive.set()

    body = respond(reply_stream, Engine(talk), stay, notice)[2]
    assert body.startswith(b"data: <\n\n: keep-alive\n\n")
    assert body.endswith(b"data: >\n\n")


def test_a_failure_is_an_error_before_the_reply_and_an_event_amid_it():
    with pytest.raises(ApiError) as error:
        respond(whole_reply, Engine(lambda reply: reply.fail(unavailable("stopped"))))
    assert error.value.status == 503
    assert respond(reply_stream, Engine(lambda reply: reply.fail(internal())))[2] == b"data: <\n\ndata: !\n\n"


@pytest.mark.parametrize("kind", [whole_reply, reply_stream])
def test_a_client_that_leaves_ends_the_reply(kind, caplog):
    caplog.set_level(logging.INFO)
    engine = Engine()
    sent = messages(kind, engine, hang_up)
    assert engine.abandoned.is_set()
    assert "reply-1: 2 + 0 tokens, abandoned, " in caplog.text
    assert all(message.get("more_body", True) for message in sent)


def test_an_engine_that_refuses_is_not_waited_for():
    class Full(Engine):
        def submit(self, reply):
            raise unavailable("full")

    with pytest.raises(ApiError):
        respond(whole_reply, Full())


def test_a_loop_that_is_closed_gives_the_reply_up():
    engine = Engine()

    async def leave():
        return bridge(engine).reply

    reply = asyncio.run(leave())
    say("tea")(reply)
    assert engine.abandoned.is_set()
