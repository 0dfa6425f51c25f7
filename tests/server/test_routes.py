"""Paths and methods: what is answered where, and in which shape all else is refused."""

import pytest


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("POST", "/v1", 404, "not_found"),
        ("GET", "/health/", 404, "not_found"),
        ("GET", "/docs", 404, "not_found"),
        ("GET", "/openapi.json", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/another", 404, "model_not_found"),
    ],
)
def test_all_else_is_refused_in_the_shape_of_the_api(server, method, path, status, code):
    answered, headers, answer = server.ask(path, method=method)
    assert (answered, answer["error"]["code"]) == (status, code)
    assert headers.get_content_type() == "application/json"


def test_states_and_models(server):
    assert server.ask("/health")[2] == {"status": "ok", "running": 0, "waiting": 0}
    assert server.ask("/ready")[2] == {"status": "ready"}
    [model] = server.ask("/v1/models")[2]["data"]
    assert server.ask("/v1/models/tiny")[2] == model
    assert model["id"] == "tiny"


def test_a_reply_names_the_model_by_its_weights(server):
    assert server.say(max_tokens=1)["system_fingerprint"] == "fp_0123456789"


def test_an_unforeseen_failure_is_answered_without_its_words(server, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("secret words")

    monkeypatch.setattr("gpt2ft.server.openai.conversion.turns_of", fail)
    status, _, answer = server.ask(content={"messages": [{"role": "user", "content": "x"}]})
    assert (status, answer["error"]["code"], answer["error"]["type"]) == (500, "internal_error", "server_error")
    server.until(lambda: "RuntimeError" in caplog.text)  # it is logged once it is answered
    assert "secret words" not in caplog.text + str(answer)
