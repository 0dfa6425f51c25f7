"""Errors in the shape in which OpenAI's API reports them, which its clients turn into exceptions.

{"error": {"message": "`n` must be 1 ...", "type": "invalid_request_error", "param": "n", "code": "..."}}
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

JSON = "application/json"
FAILED = "something failed that should not: see the server's log"


class ApiError(Exception):
    """What a client is told instead of an answer.

    Args:
        status: of the HTTP response; below 500 the client can do something about it.
        param: the part of the request that it is about.
        code: for programs.
        retry_after: seconds after which it may be worth trying again.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        kind = {429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        if self.status >= 500:
            kind = "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def content(self) -> bytes:
        return json.dumps(self.body()).encode()

    def headers(self) -> dict[str, str]:
        headers = {"content-type": JSON}
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def invalid(message: str, param: str | None, code: str = "invalid_value") -> ApiError:
    """A request whose content cannot be served."""
    return ApiError(400, message, code, param)


def overloaded(message: str, retry_after: int) -> ApiError:
    return ApiError(429, message, "rate_limit_exceeded", retry_after=retry_after)


def unavailable(message: str, retry_after: int | None = None) -> ApiError:
    return ApiError(503, message, "service_unavailable", retry_after=retry_after)


def unfit(error: ValidationError) -> ApiError:
    """The first problem of a request, without what the request holds."""
    problem = error.errors(include_input=False, include_url=False, include_context=False)[0]
    param = spelled(problem["loc"])
    if problem["type"] == "extra_forbidden":
        return invalid(f"there is no parameter `{param}` here: leave it out", param, "unknown_parameter")
    if problem["type"] == "missing":
        return invalid(f"`{param}` must be given", param, "missing_required_parameter")
    return invalid(f"`{param}`: {problem['msg'][0].lower()}{problem['msg'][1:]}", param)


def spelled(path: Sequence[str | int]) -> str:
    """messages[0].content for ("messages", 0, "content")."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in path]
    return "".join(parts).removeprefix(".")


def raw_response(error: ApiError, reason: str, more: Mapping[str, str] = {}) -> bytes:
    """A whole HTTP response that ends the connection, for where nothing that could write one is there yet."""
    content = error.content()
    headers = error.headers() | {"content-length": str(len(content)), "connection": "close"} | more
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {error.status} {reason}\r\n{head}\r\n".encode() + content
