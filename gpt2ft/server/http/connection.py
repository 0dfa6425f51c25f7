"""An HTTP connection of uvicorn with timeouts: for a head that does not come, and for a client that does not read.

uvicorn itself waits for both without end, so that a few hundred idle sockets would use up the files of a process.
"""

import asyncio
import socket
from functools import partial
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from gpt2ft.server.errors import ApiError, overloaded
from gpt2ft.server.http.refusal import RenderError, raw_refusal
from gpt2ft.settings.using import ServeSettings

WRITE_BUFFER = 16 * 1024  # bytes that may wait for a client before it counts as slow


class Connection(H11Protocol):
    """One connection.

    Args:
        settings: `body_seconds` for a head to arrive, `write_timeout`, `connections`.
    """

    def __init__(self, *arguments: Any, settings: ServeSettings, render_error: RenderError, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.access_log = False  # it would hold whatever stands in a path; the access middleware writes the log
        self._settings = settings
        self._render_error = render_error
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=WRITE_BUFFER)
        if len(self.connections) > self._settings.connections:
            self._refuse(overloaded("there are too many connections", 5))
        else:
            self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._head_timer = _cancelled(self._head_timer)
        elif self._head_timer is None and self.conn.trailing_data[0]:
            self._expect_head()

    def connection_lost(self, error: Exception | None) -> None:
        self._head_timer, self._write_timer = _cancelled(self._head_timer), _cancelled(self._write_timer)
        super().connection_lost(error)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self._settings.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        self._write_timer = _cancelled(self._write_timer)
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP."""
        self._refuse(ApiError(400, "this is not a valid HTTP request", "invalid_http"))

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self._settings.body_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        if self.conn.trailing_data[0]:
            message = f"the head of a request must arrive within {self._settings.body_seconds:g} s"
            self._refuse(ApiError(408, message, "request_timeout"))
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        is_answering = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if not self.transport.is_closing() and not is_answering:
            self.transport.write(raw_refusal(error, self._render_error))
        self.transport.close()


def connection_class(settings: ServeSettings, render_error: RenderError) -> partial[Connection]:
    """Return the callable with which uvicorn makes each connection."""
    return partial(Connection, settings=settings, render_error=render_error)


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def listen(host: str, port: int, write_timeout: float) -> socket.socket:
    """Return a listening socket; port 0 is a free one.

    The last bytes of a response may wait in the kernel, where no timer of ours sees them: it is given the same timeout.

    Raises:
        OSError: if the address is not ours or taken.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(write_timeout * 1000))
        if family == socket.AF_INET6:  # an address of a client then looks as the Host header gives it
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind(address)
        listening.listen(1024)
    except OSError:
        listening.close()
        raise
    return listening
