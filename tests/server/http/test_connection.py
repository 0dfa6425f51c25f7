"""Connections that are slow, silent, too many or no HTTP, on an event loop of their own and without a model."""

import asyncio
import json
from time import monotonic

import pytest

pytest.importorskip("uvicorn", reason="needs the extra [serve]")

import uvicorn
from uvicorn.server import ServerState

from gpt2ft.server.http.connection import connection_class
from gpt2ft.server.openai.responses import render_error
from gpt2ft.settings.using import ServeSettings

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
LARGE = 30_000_000  # more than waits in any buffer on the way


async def answer(scope, receive, send):
    """An application: "ok", or at /large more than a client takes that does not read."""
    body = b"x" * LARGE if scope["path"] == "/large" else b"ok"
    length = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": length})
    await send({"type": "http.response.body", "body": body})


class Port:
    """A port on which the application answers."""

    def __init__(self, keep_alive=5, **settings):
        self.state = ServerState()
        self._keep_alive = keep_alive  # seconds
        self._settings = ServeSettings(**settings)

    async def __aenter__(self):
        config = uvicorn.Config(answer, lifespan="off", log_config=None, ws="none", timeout_keep_alive=self._keep_alive)
        config.load()
        make = connection_class(self._settings, render_error)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: make(config=config, server_state=self.state, app_state={}), "127.0.0.1", 0
        )
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self._server.close()

    async def connect(self, data=b""):
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(data)
        return reader, writer

    async def until_open(self, number):
        """Lets the server's side of the event loop go on until it has so many connections."""
        await self.until(lambda: len(self.state.connections) == number)

    async def until(self, is_met):
        async with asyncio.timeout(120):
            while not is_met():
                await asyncio.sleep(0)

    def skip(self, seconds):
        """Has all timers believe that so much time has passed."""
        asyncio.get_running_loop().time = lambda: monotonic() + seconds

    async def exchange(self, data):
        reader, writer = await self.connect(data)
        received = await self.rest(reader)
        writer.close()
        return received

    async def rest(self, reader):
        """All that comes until the server hangs up."""
        return await asyncio.wait_for(reader.read(), 120)


def error_of(received):
    """(status, code) of a refusal that ends its connection."""
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def on_port(scenario, **settings):
    """Return what the coroutine `scenario(port)` does."""

    async def run():
        async with Port(**settings) as port:
            return await scenario(port)

    return asyncio.run(run())


def test_a_head_that_is_too_slow_is_refused_and_silence_is_hung_up_on():
    async def scenario(port, data):
        reader, _ = await port.connect(data)
        await port.until(lambda: [len(each.conn.trailing_data[0]) for each in port.state.connections] == [len(data)])
        port.skip(1001)
        return await port.rest(reader)

    assert error_of(on_port(lambda port: scenario(port, GET[:20]), body_seconds=1000)) == (408, "request_timeout")
    assert on_port(lambda port: scenario(port, b""), body_seconds=1000) == b""


def test_a_second_head_that_is_too_slow_is_hung_up_on():
    async def scenario(port):
        reader, _ = await port.connect(GET + GET[:20])
        received = await reader.readuntil(b"ok")
        port.skip(1001)
        return received + await port.rest(reader)

    assert on_port(scenario, body_seconds=1000, keep_alive=1).count(b"HTTP/1.1 200") == 1


@pytest.mark.parametrize("data", [b"\x16\x03\x01\x02\x00\r\n\r\n", b"GET\r\n\r\n", GET.replace(b"Host", b"Bad Host")])
def test_bytes_that_are_no_http_are_refused(data):
    assert error_of(on_port(lambda port: port.exchange(data))) == (400, "invalid_http")


def test_too_many_connections_are_refused_until_one_ends():
    async def scenario(port):
        held = [await port.connect(GET) for _ in range(2)]
        for reader, _ in held:
            await reader.readuntil(b"ok")
        refused = await port.exchange(GET)
        held[0][1].close()
        await port.until_open(1)
        reader, _ = await port.connect(GET)
        await reader.readuntil(b"ok")
        return refused

    assert error_of(on_port(scenario, connections=2)) == (429, "rate_limit_exceeded")


def test_a_client_that_does_not_read_is_hung_up_on_and_one_that_reads_gets_it_all():
    async def scenario(port):
        request = GET.replace(b"GET /", b"GET /large")
        _, lazy = await port.connect(request)
        lazy.transport.pause_reading()
        reader, _ = await port.connect(request)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert len(await reader.readexactly(LARGE)) == LARGE
        port.skip(1001)
        await port.until_open(1)

    on_port(scenario, write_timeout=1000, keep_alive=9000)
