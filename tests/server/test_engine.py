"""Who waits, who leaves, and what becomes of the others: with a model that takes a step only when it is let."""

import logging
import threading
from copy import deepcopy

import pytest
import torch
from tests_of_serving import eventually, read_until

END = b"data: [DONE]\n\n\r\n0\r\n\r\n"


@pytest.fixture
def small(serving):
    """Two slots and one place in the queue, with a model that waits to be let on."""
    with serving(slots=2, queue=1, prefill_chunk=16) as running:
        running.gate.shut()
        yield running


def say_in_thread(running, answers, **asked):
    content = {"messages": [{"role": "user", "content": "What is tea?"}]} | asked
    thread = threading.Thread(target=lambda: answers.append(running.ask(content=content)))
    thread.start()
    return thread


def in_this_order(running, number, **asked):
    """Streams of which each has come to the engine before the next one is asked for."""
    connections = []
    for count in range(1, number + 1):
        connections.append(running.stream(**asked))
        eventually(lambda count=count: running.engine.num_unfinished == count)
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
    eventually(lambda: small.engine.num_unfinished == 3)
    status, headers, answer = small.ask(content={"messages": [{"role": "user", "content": "x"}]})
    assert (status, headers["Retry-After"], answer["error"]["code"]) == (429, "5", "rate_limit_exceeded")
    client = openai.OpenAI(base_url=f"{small.url}/v1", api_key="none", max_retries=0)
    with client, pytest.raises(openai.RateLimitError):
        client.completions.create(model="tiny", prompt="x")
    small.gate.open()
    for connection in connections:
        assert END in read_until(connection, END)


def test_a_reader_that_leaves_frees_its_slot_before_the_next_token(small):
    staying, leaving, waiting = in_this_order(small, 3, temperature=0, max_tokens=100)
    small.gate.let_pass()
    eventually(lambda: small.engine.num_running == 2)
    present = list(small.engine._running.values())
    leaving.close()
    eventually(lambda: any(reply.is_abandoned for reply in present), "notice of who left")
    assert (small.engine.num_running, small.engine.num_waiting) == (2, 1)
    passed = small.gate.num_passed
    small.gate.let_pass()  # the step that is under way
    eventually(lambda: small.engine.num_waiting == 0)
    assert small.gate.num_passed <= passed + 1
    assert small.engine.num_running == 2
    small.gate.open()
    assert END in read_until(staying, END)
    assert END in read_until(waiting, END)


def test_a_reader_that_leaves_while_it_waits_frees_its_place(small):
    *running, waiting = in_this_order(small, 3)
    waiting.close()
    eventually(lambda: small.engine.num_unfinished == 2, "a free place")  # though the model has not moved
    small.gate.open()
    for connection in running:
        assert END in read_until(connection, END)


def test_a_reader_that_leaves_while_its_prompt_is_read_frees_its_slot(small):
    connection = small.stream("tea " * 80)  # six steps
    eventually(lambda: small.engine.num_running == 1)
    small.gate.let_pass()
    [reply] = small.engine._running.values()
    connection.close()
    eventually(lambda: reply.is_abandoned, "notice of who left")
    small.gate.let_pass()
    eventually(lambda: small.engine.num_unfinished == 0)
    assert (reply.tokens, small.gate.num_passed <= 3) == (0, True)


def test_a_reader_that_never_reads_holds_up_nobody(serving, alone):
    """Its reply is complete while it has read nothing; the slot is another's then."""
    expected = alone([("user", "What is tea?")], 5, temperature=0)[0]
    with serving(slots=1, queue=1) as running:
        running.gate.shut()
        [lazy] = in_this_order(running, 1, max_tokens=100)
        running.gate.open()
        answer = running.say(max_tokens=5, temperature=0)
        assert answer["choices"][0]["message"]["content"] == expected
        eventually(lambda: running.engine.num_unfinished == 0)
        lazy.close()


def test_a_reply_that_takes_too_long_ends_as_at_its_longest(serving):
    with serving(slots=1, queue=1, request_timeout=0.2) as running:
        running.gate.shut()
        answers = []
        thread = say_in_thread(running, answers, max_tokens=100, stop=["no such"])
        eventually(lambda: running.engine.num_running == 1)
        [reply] = running.engine._running.values()
        reply.deadline = 0.0
        running.gate.let_pass()
        thread.join()
        [(status, _, answer)] = answers
        assert (status, answer["choices"][0]["finish_reason"]) == (200, "length")
        assert answer["usage"]["completion_tokens"] == 1


def test_health_answers_while_the_model_computes(small):
    connection = small.stream()
    eventually(lambda: small.engine.num_running == 1)
    for _ in range(3):
        assert small.ask("/health")[2] == {"status": "ok", "running": 1, "waiting": 0}
    small.gate.open()
    read_until(connection, END)


def test_readiness_comes_with_the_first_token(serving, speaking):
    model = deepcopy(speaking[0])
    shut = threading.Event()
    model.register_forward_pre_hook(lambda *_: shut.wait(60) and None)
    with serving(model=model, ready=False) as running:
        assert running.ask("/health")[0] == 200
        assert running.ask("/ready")[0] == 503
        status, headers, answer = running.ask(content={"messages": [{"role": "user", "content": "x"}]})
        assert (status, headers["Retry-After"], answer["error"]["code"]) == (503, "1", "service_unavailable")
        shut.set()
        eventually(lambda: running.ask("/ready")[0] == 200, "readiness")


def test_a_request_that_breaks_the_model_harms_no_other(serving, speaking, alone, caplog):
    """A position is damaged that only long conversations reach: they are told so, everybody else goes on."""
    fragile = deepcopy(speaking[0])
    with torch.no_grad():
        fragile.wpe.weight[80] = torch.nan
    long = "tea " * 85
    with caplog.at_level(logging.CRITICAL), serving(model=fragile, slots=3) as running:
        running.gate.shut()
        good = running.stream(max_tokens=30, temperature=0)
        eventually(lambda: running.engine.num_running == 1)
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


def test_a_model_that_is_damaged_while_it_serves_is_ready_no_more(serving, speaking, caplog):
    model = deepcopy(speaking[0])
    with caplog.at_level(logging.CRITICAL), serving(model=model) as running:
        assert running.ask("/ready")[0] == 200
        with torch.no_grad():
            model.ln_f.weight[0] = torch.nan
        assert running.ask(content={"messages": [{"role": "user", "content": "x"}]})[0] == 500
        assert running.ask("/ready")[0] == 503
        assert running.ask("/health")[0] == 200
        status, _, answer = running.ask(content={"messages": [{"role": "user", "content": "x"}]})
        assert (status, answer["error"]["code"]) == (503, "service_unavailable")


def test_a_computation_that_fails_is_answered_and_the_next_one_begins_anew(serving, speaking, caplog):
    model = deepcopy(speaking[0])
    failures = []

    def fail(*_):
        if failures:
            raise RuntimeError(failures.pop())

    model.register_forward_pre_hook(fail)
    with caplog.at_level(logging.INFO), serving(model=model) as running:
        failures.append("secret words")
        status, _, answer = running.ask(content={"messages": [{"role": "user", "content": "x"}]})
        assert (status, answer["error"]["code"]) == (500, "internal_error")
        assert running.say(max_tokens=1)
    assert "RuntimeError" in caplog.text
    assert "secret words" not in caplog.text


def test_told_to_stop_it_finishes_what_it_has_and_takes_nothing_new(small):
    connections = [small.stream(max_tokens=20) for _ in range(3)]
    eventually(lambda: small.engine.num_unfinished == 3)
    small.server.handle_exit(15, None)
    eventually(lambda: small.engine._is_draining)
    status, _, answer = small.ask(content={"messages": [{"role": "user", "content": "x"}]})
    assert (status, answer["error"]["code"]) == (503, "service_unavailable")
    assert small.ask("/ready")[0] == 503
    assert small.ask("/health")[0] == 200
    small.gate.open()
    for connection in connections:
        assert END in read_until(connection, END)


def test_what_does_not_finish_in_time_is_told_so(serving):
    with serving(slots=1, queue=1, shutdown_timeout=0.2) as running:
        running.gate.shut()
        connections = [running.stream(max_tokens=100), running.stream(max_tokens=100)]
        eventually(lambda: running.engine.num_unfinished == 2)
        running.server.handle_exit(15, None)
        eventually(lambda: running.engine._state == "stopped")
        running.gate.let_pass()
        for connection in connections:
            assert b"was stopped before the reply was complete" in read_until(connection, b"")
