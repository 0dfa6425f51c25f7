"""Errors as HTTP responses."""

import pytest

pytest.importorskip("starlette", reason="needs the extra [serve]")

from gpt2ft.server.errors import ApiError, overloaded
from gpt2ft.server.http.refusal import raw_refusal, refusal


def render(error):
    return f"<{error}>".encode()


def test_the_api_writes_the_body_and_http_the_rest():
    response = refusal(overloaded("full", 7), render)
    assert (response.status_code, response.body) == (429, b"<full>")
    assert response.headers["retry-after"] == "7"
    assert response.headers["content-type"] == "application/json"
    assert "connection" not in response.headers
    assert refusal(ApiError(401, "who?", "invalid_api_key"), render).headers["www-authenticate"] == "Bearer"


def test_a_raw_one_is_a_whole_response_that_ends_its_connection():
    import h11

    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
    client.receive_data(raw_refusal(ApiError(408, "late", "request_timeout"), render))
    response, data = client.next_event(), client.next_event()
    assert (response.status_code, response.reason, bytes(data.data)) == (408, b"Request Timeout", b"<late>")
    assert dict(response.headers)[b"connection"] == b"close"
    assert isinstance(client.next_event(), h11.EndOfMessage)
