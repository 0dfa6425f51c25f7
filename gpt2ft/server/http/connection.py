"""uvicorn's HTTP connection with patience that ends: for a head that does not come, for a reader that does not read.

uvicorn itself waits for both without end, so that a few hundred idle sockets would use up the files of a process.
"""

import asyncio
import socket
from dataclasses import dataclass
from functools import partial
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from gpt2ft.server.errors import ApiError, overloaded, raw_response

WRITE_BUFFER = 16 * 1024  # bytes that may wait for a reader before it counts as slow


@dataclass(frozen=True)
class Patience:
    """`head_seconds` for the head of a request, `write_timeout` for a reader to take what is there."""

    head_seconds: float
    write_timeout: float
    connections: int


class Connection(H11Protocol):
    def __init__(self, *arguments: Any, patience: Patience, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.access_log = False  # it would hold whatever stands in a path; the door writes the log
        self._patience = patience
        self._head: asyncio.TimerHandle | None = None
        self._reader: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=WRITE_BUFFER)
        if len(self.connections) > self._patience.connections:
            self._refuse(overloaded("there are too many connections", 5), "Too Many Requests")
        else:
            self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._head = _cancelled(self._head)
        elif self._head is None and self.conn.trailing_data[0]:
            self._expect_head()

    def connection_lost(self, error: Exception | None) -> None:
        self._head, self._reader = _cancelled(self._head), _cancelled(self._reader)
        super().connection_lost(error)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._reader is None:
            self._reader = self.loop.call_later(self._patience.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        self._reader = _cancelled(self._reader)
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP."""
        self._refuse(ApiError(400, "this is not a valid HTTP request", "invalid_http"), "Bad Request")

    def _expect_head(self) -> None:
        self._head = self.loop.call_later(self._patience.head_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        if self.conn.trailing_data[0]:
            message = f"the head of a request must arrive within {self._patience.head_seconds:g} s"
            self._refuse(ApiError(408, message, "request_timeout"), "Request Timeout")
        else:
            self.transport.close()

    def _refuse(self, error: ApiError, reason: str) -> None:
        is_answering = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if not self.transport.is_closing() and not is_answering:
            self.transport.write(raw_response(error, reason))
        self.transport.close()


def connection_class(patience: Patience) -> partial[Connection]:
    """For uvicorn, which makes one for each connection."""
    return partial(Connection, patience=patience)


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def listen(host: str, port: int, write_timeout: float) -> socket.socket:
    """A listening socket; port 0 is a free one.

    What is sent last may wait in the kernel, where nothing of ours watches over it: it is given the same patience.

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
        if family == socket.AF_INET6:
            listening.setsockopt(
                socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1
            )  # addresses then look as the Host gives them
        listening.bind(address)
        listening.listen(1024)
    except OSError:
        listening.close()
        raise
    return listening
