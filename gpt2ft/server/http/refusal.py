"""An ApiError as an HTTP response; its body is written by the API in front of which it is raised."""

from collections.abc import Callable
from http import HTTPStatus

from starlette.responses import Response

from gpt2ft.server.errors import ApiError

RenderError = Callable[[ApiError], bytes]  # the JSON that clients of the API know


def refusal(error: ApiError, render: RenderError, ends_connection: bool = False) -> Response:
    """Return the response that tells a client of an error."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if ends_connection:
        headers["connection"] = "close"
    return Response(render(error), error.status, headers, "application/json")


def raw_refusal(error: ApiError, render: RenderError) -> bytes:
    """Return the whole response as bytes, for a connection on which nothing that could write one is there yet."""
    response = refusal(error, render, ends_connection=True)
    head = b"".join(name + b": " + value + b"\r\n" for name, value in response.raw_headers)
    status = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
    return status.encode() + head + b"\r\n" + response.body
