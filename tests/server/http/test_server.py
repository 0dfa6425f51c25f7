"""The end of a server: replies under way finish in their time, and nobody is left without a word."""

from time import monotonic

from processes import wait_until
from running_server import read_until

END = b"data: [DONE]\n\n\r\n0\r\n\r\n"
MESSAGES = {"messages": [{"role": "user", "content": "x"}]}


def test_told_to_stop_it_finishes_its_replies_and_takes_nothing_new(serving):
    with serving(slots=2, queue=1) as running:
        running.gate.shut()
        connections = [running.stream(max_tokens=20) for _ in range(3)]
        running.until(lambda: running.engine.num_unfinished == 3)
        running.server.handle_exit(15, None)
        running.until(lambda: running.ask("/ready")[0] == 503)
        status, _, answer = running.ask(content=MESSAGES)
        assert (status, answer["error"]["code"]) == (503, "service_unavailable")
        assert running.ask("/health")[0] == 200
        running.gate.open()
        for connection in connections:
            assert END in read_until(connection, END)


def test_replies_that_do_not_finish_in_time_are_told_so(serving, monkeypatch):
    with serving(slots=1, queue=1, shutdown_timeout=1000) as running:
        running.gate.shut()
        connections = [running.stream(max_tokens=100), running.stream(max_tokens=100)]
        running.until(lambda: running.engine.num_unfinished == 2)
        join = running.engine.join
        monkeypatch.setattr(running.engine, "join", lambda: (running.gate.open(), join()))  # it is stopped by then
        running.server.handle_exit(15, None)
        running.until(lambda: running.ask("/ready")[0] == 503)
        monkeypatch.setattr("gpt2ft.server.http.server.monotonic", lambda: monotonic() + 1001)
        for connection in connections:
            assert b"was stopped before the reply was complete" in read_until(connection, b"")


def test_a_second_signal_does_not_wait(serving, monkeypatch):
    with serving(slots=1, queue=1, shutdown_timeout=1000) as running:
        running.gate.shut()
        connection = running.stream(max_tokens=100)
        running.until(lambda: running.engine.num_running == 1)
        join = running.engine.join
        monkeypatch.setattr(running.engine, "join", lambda: (running.gate.let_pass(), join()))  # it is stopped by then
        running.server.handle_exit(15, None)
        running.server.handle_exit(2, None)
        assert END not in read_until(connection, b"")


def test_it_ends_by_itself_if_its_first_warm_up_fails(serving, inference_model, caplog):
    from copy import deepcopy

    import torch

    gpt2 = deepcopy(inference_model.gpt2)
    with torch.no_grad():
        gpt2.ln_f.weight[0] = torch.nan
    caplog.set_level("CRITICAL")
    with serving(gpt2=gpt2, ready=False) as running:
        wait_until(lambda: running.server.has_failed)
