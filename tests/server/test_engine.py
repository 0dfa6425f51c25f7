"""Requests that wait, run, leave and fail side by side, with a model that takes a step only when it is let."""

import logging
import threading
from copy import deepcopy
from time import monotonic

import pytest
import torch
from running_server import read_until

from gpt2ft.server.reply import Reply

END = b"data: [DONE]\n\n\r\n0\r\n\r\n"


@pytest.fixture
def small(serving):
    """Two slots and one place in the queue, with a model that waits to be let on."""
    with serving(slots=2, queue=1, prefill_chunk=16) as running:
        running.gate.shut()
        yield running


def say_in_thread(running, answers, **parameters):
    content = {"messages": [{"role": "user", "content": "What is tea?"}]} | parameters
    thread = threading.Thread(target=lambda: answers.append(running.ask(content=content)))
    thread.start()
    return thread


def in_this_order(running, number, **parameters):
    """Streams of which each has come to the engine before the next one is asked for."""
    connections = []
    for count in range(1, number + 1):
        connections.append(running.stream(**parameters))
        running.until(lambda count=count: running.engine.num_unfinished == count)
    return connections


def test_tokens_are_sent_one_by_one_as_they_are_said(small, alone):
    _, _, tokens, _ = alone([("user", "What is tea?")], 20, temperature=0)
    assert tokens > 3
    connection = small.stream(temperature=0, max_tokens=20)
    received = read_until(connection, b'"role":"assistant"')
    for _ in range(3):
        small.gate.let_pass()
        received += read_until(connection, b'"delta":{"content":')
    assert small.engine.num_running == 1
    assert END not in received
    small.gate.open()
    read_until(connection, END)


def test_nobody_on_the_way_loses_patience_while_nothing_is_said(small, monkeypatch):
    monkeypatch.setattr("gpt2ft.server.http.streaming.KEEP_ALIVE", 0.05)
    connection = small.stream(max_tokens=2)
    received = read_until(connection, b": keep-alive\n\n")
    assert b"text/event-stream" in received
    assert b"X-Accel-Buffering: no" in received.replace(b"x-accel-buffering", b"X-Accel-Buffering")
    small.gate.open()
    read_until(connection, END)


def test_a_full_queue_is_answered_with_429_and_when_to_try_again(small):
    openai = pytest.importorskip("openai")
    connections = [small.stream() for _ in range(3)]
    small.until(lambda: small.engine.num_unfinished == 3)
    status, headers, answer = small.ask(content={"messages": [{"role": "user", "content": "x"}]})
    assert (status, headers["Retry-After"], answer["error"]["code"]) == (429, "5", "rate_limit_exceeded")
    client = openai.OpenAI(base_url=f"{small.url}/v1", api_key="none", max_retries=0)
    with client, pytest.raises(openai.RateLimitError):
        client.completions.create(model="tiny", prompt="x")
    small.gate.open()
    for connection in connections:
        assert END in read_until(connection, END)


def test_who_is_told_of_the_end_may_ask_again_at_once(serving, monkeypatch):
    unfinished = []
    end = Reply.end

    def count(reply, reason):
        end(reply, reason)
        unfinished.append(running.engine.num_unfinished)

    with serving(slots=1, queue=0) as running:
        monkeypatch.setattr(Reply, "end", count)
        running.say(max_tokens=2)
    assert unfinished == [0]


def test_a_reader_that_leaves_frees_its_slot_before_the_next_token(small, caplog):
    caplog.set_level(logging.INFO)
    staying, leaving, waiting = in_this_order(small, 3, temperature=0, max_tokens=100)
    small.gate.let_pass()
    small.until(lambda: small.engine.num_running == 2)
    leaving.close()
    small.until(lambda: ", abandoned, " in caplog.text, "notice of who left")
    assert (small.engine.num_running, small.engine.num_waiting) == (2, 1)
    passed = small.gate.num_passed
    small.gate.let_pass()  # the step that is under way
    small.until(lambda: small.engine.num_waiting == 0)
    assert small.gate.num_passed <= passed + 1
    assert small.engine.num_running == 2
    small.gate.open()
    assert END in read_until(staying, END)
    assert END in read_until(waiting, END)


def test_a_reader_that_leaves_while_it_waits_frees_its_place(small):
    *running, waiting = in_this_order(small, 3)
    waiting.close()
    small.until(lambda: small.engine.num_unfinished == 2, "a free place")  # though the model has not moved
    small.gate.open()
    for connection in running:
        assert END in read_until(connection, END)


def test_a_reader_that_leaves_while_its_prompt_is_read_frees_its_slot(small, caplog):
    caplog.set_level(logging.INFO)
    connection = small.stream("tea " * 80)  # six steps
    small.until(lambda: small.engine.num_running == 1)
    small.gate.let_pass()
    connection.close()
    small.until(lambda: " + 0 tokens, abandoned, " in caplog.text, "notice of who left")
    small.gate.let_pass()
    small.until(lambda: small.engine.num_unfinished == 0)
    assert small.gate.num_passed <= 3


def test_a_reader_that_never_reads_holds_up_nobody(serving, alone):
    """Its reply is complete while it has read nothing; the slot is another's then."""
    expected = alone([("user", "What is tea?")], 5, temperature=0)[0]
    with serving(slots=1, queue=1) as running:
        running.gate.shut()
        [lazy] = in_this_order(running, 1, max_tokens=100)
        running.gate.open()
        answer = running.say(max_tokens=5, temperature=0)
        assert answer["choices"][0]["message"]["content"] == expected
        running.until(lambda: running.engine.num_unfinished == 0)
        lazy.close()


def test_a_reply_that_takes_too_long_ends_as_at_its_longest(serving, monkeypatch):
    with serving(slots=1, queue=1, request_timeout=1000) as running:
        running.gate.shut()
        answers = []
        thread = say_in_thread(running, answers, max_tokens=100, stop=["no such"])
        running.until(lambda: running.engine.num_running == 1)
        monkeypatch.setattr("gpt2ft.server.engine.monotonic", lambda: monotonic() + 1001)
        running.gate.let_pass()
        thread.join()
        [(status, _, answer)] = answers
        assert (status, answer["choices"][0]["finish_reason"]) == (200, "length")
        assert answer["usage"]["completion_tokens"] == 1


def test_health_answers_while_the_model_computes(small):
    connection = small.stream()
    small.until(lambda: small.engine.num_running == 1)
    for _ in range(3):
        assert small.ask("/health")[2] == {"status": "ok", "running": 1, "waiting": 0}
    small.gate.open()
    read_until(connection, END)


def test_readiness_comes_with_the_first_token(serving, inference_model):
    gpt2 = deepcopy(inference_model.gpt2)
    shut = threading.Event()
    gpt2.register_forward_pre_hook(lambda *_: shut.wait(60) and None)
    with serving(gpt2=gpt2, ready=False) as running:
        assert running.ask("/health")[0] == 200
        assert running.ask("/ready")[0] == 503
        status, headers, answer = running.ask(content={"messages": [{"role": "user", "content": "x"}]})
        assert (status, headers["Retry-After"], answer["error"]["code"]) == (503, "1", "service_unavailable")
        shut.set()
        running.until_ready()


def test_a_request_that_breaks_the_model_harms_no_other(serving, inference_model, alone, caplog):
    """A position is damaged that only long conversations reach: they are told so, everybody else goes on."""
    fragile = deepcopy(inference_model.gpt2)
    with torch.no_grad():
        fragile.wpe.weight[80] = torch.nan
    long = "tea " * 85
    with caplog.at_level(logging.CRITICAL), serving(gpt2=fragile, slots=3) as running:
        running.gate.shut()
        good = running.stream(max_tokens=30, temperature=0)
        running.until(lambda: running.engine.num_running == 1)
        running.gate.open()
        status, _, answer = running.ask(content={"messages": [{"role": "user", "content": long}]})
        assert (status, answer["error"]["code"], answer["error"]["type"]) == (500, "model_damaged", "server_error")
        assert running.ask("/ready")[0] == 200
        read_until(good, END)
        expected = alone([("user", "What is tea?")], 30, temperature=0)[0]
        assert running.say(max_tokens=30, temperature=0)["choices"][0]["message"]["content"] == expected
        streamed = read_until(running.stream(long), b"\r\n0\r\n\r\n")
        assert b'data: {"error":{' in streamed
        assert b"[DONE]" not in streamed


def test_a_model_that_is_damaged_while_it_serves_is_ready_no_more(serving, inference_model, caplog):
    gpt2 = deepcopy(inference_model.gpt2)
    with caplog.at_level(logging.CRITICAL), serving(gpt2=gpt2) as running:
        assert running.ask("/ready")[0] == 200
        with torch.no_grad():
            gpt2.ln_f.weight[0] = torch.nan
        assert running.ask(content={"messages": [{"role": "user", "content": "x"}]})[0] == 500
        assert running.ask("/ready")[0] == 503
        assert running.ask("/health")[0] == 200
        status, _, answer = running.ask(content={"messages": [{"role": "user", "content": "x"}]})
        assert (status, answer["error"]["code"]) == (503, "service_unavailable")


def test_a_computation_that_fails_is_answered_and_the_next_one_begins_anew(serving, inference_model, caplog):
    gpt2 = deepcopy(inference_model.gpt2)
    failures = []

    def fail(*_):
        if failures:
            raise RuntimeError(failures.pop())

    gpt2.register_forward_pre_hook(fail)
    with caplog.at_level(logging.INFO), serving(gpt2=gpt2) as running:
        failures.append("secret words")
        status, _, answer = running.ask(content={"messages": [{"role": "user", "content": "x"}]})
        assert (status, answer["error"]["code"]) == (500, "internal_error")
        assert running.say(max_tokens=1)
    assert "RuntimeError" in caplog.text
    assert "secret words" not in caplog.text
