"""The access middleware, which every request passes before the API: host, origin, key and body are checked.

The Host header must name this server (a page elsewhere that points its own name at this machine, DNS rebinding, names
another), the Origin header no other site. The key must be right if there is one, and the body bounded in size and time.
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

from gpt2ft.server.errors import ApiError, internal, log_failure
from gpt2ft.server.http.refusal import RenderError, refusal

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOCAL = ("localhost", "127.0.0.1", "::1")
METHODS = ("GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE")
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AccessPolicy:
    """The rules of the access middleware.

    Args:
        hosts: names and addresses that the Host header may give, beside those of this machine to itself.
        key: what must follow `Authorization: Bearer`; None asks for nothing.
        open_paths: need no key.
        body_bytes, body_seconds: the most that a body may have and take.
    """

    hosts: tuple[str, ...]
    key: str | None
    open_paths: frozenset[str]
    body_bytes: int
    body_seconds: float


class ClientLeft(Exception):
    """The client has hung up: there is nobody to answer."""


class AccessMiddleware:
    """An ASGI application around another.

    Args:
        api_paths: may be named in the log, as the open ones may; any other path is somebody's text.
        render_error: writes the bodies of refusals.
    """

    def __init__(self, app: App, policy: AccessPolicy, api_paths: frozenset[str], render_error: RenderError) -> None:
        self._app = app
        self._policy = policy
        self._logged_paths = policy.open_paths | api_paths
        self._render_error = render_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = monotonic()
        response = _Response(send)
        try:
            self._check(scope)
            body = await read_body(scope, receive, self._policy)
            await self._app(scope, _replay(body, receive), response.send)
        except ClientLeft:
            return
        except ApiError as error:
            await self._refuse(error, response, scope, receive)
        except Exception as error:
            log_failure(error)
            await self._refuse(internal(), response, scope, receive)
        finally:
            method = scope["method"] if scope["method"] in METHODS else "(other)"
            path = scope["path"] if scope["path"] in self._logged_paths else "(other)"
            log.info("%s %s %s %.0f ms", method, path, response.status or "left", (monotonic() - began) * 1000)

    async def _refuse(self, error: ApiError, response: "_Response", scope: Scope, receive: Receive) -> None:
        """Answer with an error, unless an answer has begun: the connection then ends before that is complete."""
        if response.status is None:
            await refusal(error, self._render_error, ends_connection=True)(scope, receive, response.send)

    def _check(self, scope: Scope) -> None:
        """Raise ApiError unless the request may come in."""
        self._check_host(scope)
        self._check_origin(scope)
        if self._policy.key is not None and scope["path"] not in self._policy.open_paths:
            self._check_key(scope, self._policy.key)

    def _check_host(self, scope: Scope) -> None:
        """Refuse requests that call this machine by another name."""
        hosts = header_values(scope, b"host")
        if len(hosts) != 1 or not self._is_ours(host_of(hosts[0]), scope):
            raise ApiError(
                403,
                "the Host header must name this server as it knows itself: start it with --allowed_hosts NAME to have "
                "it known by another name",
                "host_not_allowed",
            )

    def _check_origin(self, scope: Scope) -> None:
        """Refuse pages of other sites: browsers name the site whose page sends a request."""
        for origin in header_values(scope, b"origin"):
            if not self._is_ours(host_of(_netloc(origin)), scope):
                raise ApiError(403, "requests from pages of other sites are not served", "origin_not_allowed")

    def _is_ours(self, host: str | None, scope: Scope) -> bool:
        """The address at which the connection came in counts too: an address, unlike a name, is nobody else's."""
        own_address = (scope.get("server") or (None,))[0]
        return host is not None and host in {*LOCAL, *self._policy.hosts, own_address}

    def _check_key(self, scope: Scope, expected: str) -> None:
        given = header_values(scope, b"authorization")
        scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        if not hmac.compare_digest(key.strip().encode(), expected.encode()) or scheme.lower() != "bearer":
            raise ApiError(401, "the key must be given as `Authorization: Bearer KEY`, and be right", "invalid_api_key")


def header_values(scope: Scope, name: bytes) -> list[str]:
    """Return the values of a header, one for each time that it is given."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def host_of(text: str) -> str | None:
    """Return the name or address in `name:port`, in lower case; None if it holds something else."""
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


def _netloc(origin: str) -> str:
    """Return `name:port` of http://name:port."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


async def read_body(scope: Scope, receive: Receive, policy: AccessPolicy) -> bytes:
    """Return the whole body.

    Raises:
        ApiError: if it is too large or too slow.
        ClientLeft: if it never comes.
    """
    if header_values(scope, b"content-encoding") not in ([], ["identity"]):
        raise ApiError(415, "the body must not be compressed", "unsupported_media_type")
    too_large = ApiError(413, f"the body must have at most {policy.body_bytes:,} bytes", "request_too_large")
    announced = header_values(scope, b"content-length")
    if announced and int(announced[0]) > policy.body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(policy.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft
                body += message.get("body", b"")
                if len(body) > policy.body_bytes:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise ApiError(408, f"the body must arrive within {policy.body_seconds:g} s", "request_timeout") from None


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that brings the body that has been read, once, then whatever comes."""
    unread = [body]

    async def replay() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        return await receive()

    return replay


class _Response:
    """Sends a response on, with the headers that all have, and remembers its status."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
        await self._send(message)
