"""A reply under way as an HTTP response, in pieces as they come or whole. A client that hangs up ends the reply."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from time import monotonic
from typing import Protocol

from starlette.responses import Response

from gpt2ft.server.engine import Engine
from gpt2ft.server.errors import ApiError
from gpt2ft.server.http.access import App, ClientLeft, Receive, Scope, Send
from gpt2ft.server.reply import Delta, GenerationRequest, Reply

KEEP_ALIVE = 15.0  # seconds without a token after which a comment is sent, so that no proxy gives the connection up
STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}

log = logging.getLogger(__name__)


class ResponseBuilder(Protocol):
    """Writes a reply in the shapes of an API, as JSON."""

    @property
    def id(self) -> str:
        """The name of this response, which no other has."""

    def headers(self, reply: Reply) -> Mapping[str, str]: ...

    def whole(self, reply: Reply, text: str) -> bytes: ...

    def opening(self, reply: Reply) -> Sequence[bytes]:
        """Return the events before there is any text."""

    def chunks(self, reply: Reply, delta: Delta) -> Sequence[bytes]:
        """Return the events that bring a delta; those of the last delta close the stream."""


class StreamBridge:
    """Hands deltas from the engine's thread to the event loop."""

    def __init__(self, engine: Engine, request: GenerationRequest) -> None:
        """Put the request in the engine's queue.

        Raises:
            ApiError: if the engine does not take it.
        """
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self._engine = engine
        self._client_has_left = False
        self._began = monotonic()
        self.reply = Reply(request, self._wake)
        engine.submit(self.reply)

    async def deltas(self, seconds: float | None = None) -> AsyncIterator[Delta | None]:
        """Yield text as it comes, up to the last delta, and None whenever nothing has come for `seconds`.

        Raises:
            ClientLeft: once the client has hung up.
        """
        is_over = False
        while not is_over:
            try:
                async with asyncio.timeout(seconds):
                    await self._event.wait()
            except TimeoutError:
                yield None
                continue
            self._event.clear()
            if self._client_has_left:
                raise ClientLeft
            delta = self.reply.take()
            is_over = delta.is_last
            yield delta

    async def whole_text(self) -> str:
        """Return the text of the reply, once it is complete.

        Raises:
            ApiError: if it fails.
            ClientLeft: once the client has hung up.
        """
        text = "".join([delta.text async for delta in self.deltas() if delta])
        if self.reply.failure:
            raise self.reply.failure
        return text

    async def wait_for_disconnect(self, receive: Receive) -> None:
        """Wait until the client hangs up."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._client_has_left = True
        self._event.set()

    def close(self, id: str) -> None:
        """Give the reply up if it has not ended, and log how it went."""
        reply = self.reply
        if not reply.has_ended:
            self._engine.abandon(reply)
        outcome = reply.finish_reason or (reply.failure.code if reply.failure else "abandoned")
        tokens = f"{len(reply.request.prompt.ids)} + {reply.num_tokens} tokens"
        log.info("%s: %s, %s, %.1f s", id, tokens, outcome, monotonic() - self._began)

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._event.set)
        except RuntimeError:  # the loop is closed: nobody waits for the reply
            self._engine.abandon(self.reply)


class AwaitedResponse(Response):
    """Waits for replies while it is sent, as only the one who sends is told that the client has hung up.

    Args:
        id: of the response, for the log.
        send_reply: sends all of it once it is called as an ASGI application; ClientLeft ends it.
    """

    def __init__(self, id: str, bridges: Sequence[StreamBridge], send_reply: App) -> None:
        super().__init__()
        self._id = id
        self._bridges = bridges
        self._send_reply = send_reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watches = [asyncio.create_task(bridge.wait_for_disconnect(receive)) for bridge in self._bridges]
        try:
            await self._send_reply(scope, receive, send)
        except ClientLeft:
            pass
        finally:
            for watch in watches:
                watch.cancel()
            for bridge in self._bridges:
                bridge.close(self._id)


def whole_reply(bridge: StreamBridge, builder: ResponseBuilder) -> Response:
    """Return the response that sends the reply once it is complete."""

    async def send_reply(scope: Scope, receive: Receive, send: Send) -> None:
        text, reply = await bridge.whole_text(), bridge.reply
        body, headers = builder.whole(reply, text), builder.headers(reply)
        await Response(body, headers=headers, media_type="application/json")(scope, receive, send)

    return AwaitedResponse(builder.id, [bridge], send_reply)


def reply_stream(bridge: StreamBridge, builder: ResponseBuilder) -> Response:
    """Return the response that sends the reply as it comes, as server-sent events."""

    async def send_reply(scope: Scope, receive: Receive, send: Send) -> None:
        reply = bridge.reply
        headers = STREAM_HEADERS | builder.headers(reply)
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": pairs})
        await _send_part(send, _events(builder.opening(reply)))
        async for delta in bridge.deltas(KEEP_ALIVE):
            await _send_part(send, b": keep-alive\n\n" if delta is None else _events(builder.chunks(reply, delta)))
        await _send_part(send, b"", is_last=True)

    return AwaitedResponse(builder.id, [bridge], send_reply)


def several_replies(
    id: str,
    requests: Iterable[tuple[Engine, GenerationRequest]],
    complete: Callable[[Sequence[Reply], Sequence[str]], bytes],
) -> Response:
    """Return the response that sends what is made of several replies, each of an engine of its own, once all are there.

    Args:
        complete: returns the body for the replies and their texts; it may wait, as it is called in a thread of its own.
    Raises:
        ApiError: if an engine does not take its request; the others are then given up.
    """
    bridges: list[StreamBridge] = []
    try:
        for engine, request in requests:
            bridges.append(StreamBridge(engine, request))
    except ApiError:
        for bridge in bridges:
            bridge.close(id)
        raise

    async def send_reply(scope: Scope, receive: Receive, send: Send) -> None:
        texts = [await bridge.whole_text() for bridge in bridges]  # none waits for another to be read
        body = await asyncio.to_thread(complete, [bridge.reply for bridge in bridges], texts)
        await Response(body, media_type="application/json")(scope, receive, send)

    return AwaitedResponse(id, bridges, send_reply)


async def _send_part(send: Send, body: bytes, is_last: bool = False) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": not is_last})


def _events(contents: Iterable[bytes]) -> bytes:
    return b"".join(b"data: " + content + b"\n\n" for content in contents)
