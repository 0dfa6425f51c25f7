"""What a request meets before the API does: whether it may come in, and whether its body does.

It must name a host that is ours (a page elsewhere that has its own name point at this machine names another), come
from no other site, carry the key if there is one, and bring a body of a bounded size in a bounded time.
"""

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from ipaddress import ip_address
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

from gpt2ft.server.engine import log_failure
from gpt2ft.server.errors import FAILED, ApiError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

LOCAL = ("localhost", "127.0.0.1", "::1")
METHODS = ("GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE")
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AccessPolicy:
    """Who may come in.

    Args:
        hosts: names and addresses that the Host header may give, beside those of this machine to itself.
        key: what must follow `Authorization: Bearer`; None asks for nothing.
        open_paths: need no key.
        body_bytes, body_seconds: the most that a body may have and take.
    """

    hosts: tuple[str, ...]
    key: str | None
    body_bytes: int
    body_seconds: float
    open_paths: frozenset[str] = frozenset()


class ClientLeft(Exception):
    """There is nobody to answer any more."""


class AccessMiddleware:
    """An ASGI application around another.

    Args:
        routes: paths that may be named in the log; others are somebody's text.
    """

    def __init__(self, app: App, access: AccessPolicy, routes: frozenset[str]) -> None:
        self._app = app
        self._access = access
        self._routes = routes

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = monotonic()
        answer = _Answer(send)
        try:
            self._let_in(scope)
            body = await read_body(scope, receive, self._access)
            await self._app(scope, _replay(body, receive), answer.send)
        except ClientLeft:
            return
        except ApiError as error:
            await answer.refuse(error)
        except Exception as error:
            log_failure(error)
            await answer.refuse(ApiError(500, FAILED, "internal_error"))
        finally:
            method = scope["method"] if scope["method"] in METHODS else "(other)"
            path = scope["path"] if scope["path"] in self._routes else "(other)"
            log.info("%s %s %s %.0f ms", method, path, answer.status or "left", (monotonic() - began) * 1000)

    def _let_in(self, scope: MutableMapping[str, Any]) -> None:
        self._check_host(scope)
        self._check_origin(scope)
        if self._access.key is not None and scope["path"] not in self._access.open_paths:
            self._check_key(scope)

    def _check_host(self, scope: MutableMapping[str, Any]) -> None:
        """Against DNS rebinding."""
        given = header(scope, b"host")
        if len(given) != 1 or not self._is_ours(host_of(given[0]), scope):
            raise ApiError(
                403,
                "the Host header must name this server as it knows itself: start it with --allowed_hosts NAME to have "
                "it known by another name",
                "host_not_allowed",
            )

    def _check_origin(self, scope: MutableMapping[str, Any]) -> None:
        """Browsers name the site whose page sends a request."""
        for origin in header(scope, b"origin"):
            if not self._is_ours(host_of(urlsplit_host(origin)), scope):
                raise ApiError(403, "requests from pages of other sites are not served", "origin_not_allowed")

    def _is_ours(self, host: str | None, scope: MutableMapping[str, Any]) -> bool:
        """The address at which the connection came in counts too: an address, unlike a name, is nobody else's."""
        came_in_at = (scope.get("server") or (None,))[0]
        return host is not None and host in {*LOCAL, *self._access.hosts, came_in_at}

    def _check_key(self, scope: MutableMapping[str, Any]) -> None:
        given = header(scope, b"authorization")
        scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        expected = (self._access.key or "").encode()
        if not hmac.compare_digest(key.strip().encode(), expected) or scheme.lower() != "bearer":
            raise ApiError(401, "the key must be given as `Authorization: Bearer KEY`, and be right", "invalid_api_key")


def header(scope: MutableMapping[str, Any], name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def host_of(text: str) -> str | None:
    """The name or address in `name:port`, in lower case; None if it holds something else."""
    name, port = text.strip().lower(), ""
    if name.startswith("["):
        name, closing, port = name[1:].partition("]")
        if not closing or (port and not port.startswith(":")):
            return None
        port = port[1:]
        try:
            name = str(ip_address(name))
        except ValueError:
            return None
    elif ":" in name:
        name, _, port = name.partition(":")
    return name if name and (not port or port.isdecimal()) else None


def urlsplit_host(origin: str) -> str:
    """`name:port` of http://name:port."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


async def read_body(scope: MutableMapping[str, Any], receive: Receive, access: AccessPolicy) -> bytes:
    """The whole body.

    Raises:
        ApiError: if it is too large or too slow.
        ClientLeft: if it never comes.
    """
    if header(scope, b"content-encoding") not in ([], ["identity"]):
        raise ApiError(415, "the body must not be compressed", "unsupported_media_type")
    announced = header(scope, b"content-length")
    if announced and int(announced[0]) > access.body_bytes:
        raise _too_large(access)
    parts, size = [], 0
    try:
        async with asyncio.timeout(access.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > access.body_bytes:
                    raise _too_large(access)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise ApiError(408, f"the body must arrive within {access.body_seconds:g} s", "request_timeout") from None


def _too_large(access: AccessPolicy) -> ApiError:
    return ApiError(413, f"the body must have at most {access.body_bytes:,} bytes", "request_too_large")


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body that has been read, once, then whatever comes."""
    waiting = [body]

    async def replay() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replay


class _Answer:
    """Passes an answer on, with the headers that all answers have."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
        await self._send(message)

    async def refuse(self, error: ApiError) -> None:
        """Where an answer has begun nothing can be said any more: the connection ends before it is complete."""
        if self.status is not None:
            return
        content = error.content()
        headers = error.headers() | {"content-length": str(len(content)), "connection": "close"}
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": error.status, "headers": pairs})
        await self._send({"type": "http.response.body", "body": content})
