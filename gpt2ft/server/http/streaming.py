"""From a reply under way to an HTTP response: in pieces as they come, or whole. Whoever hangs up ends the reply."""

import asyncio
import json
import logging
from collections.abc import Mapping
from time import monotonic
from typing import Any

from starlette.responses import JSONResponse, Response

from gpt2ft.server.engine import Delta, Engine, GenerationRequest, Reply
from gpt2ft.server.http.access import ClientLeft, Receive, Send
from gpt2ft.server.openai.responses import Json, ResponseBuilder

KEEP_ALIVE = 15.0  # seconds without news after which a comment is sent, so that nobody on the way loses patience
STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}

log = logging.getLogger(__name__)


class StreamBridge:
    """Between the engine's thread, which has news, and the event loop, which waits for them."""

    def __init__(self, engine: Engine, order: GenerationRequest) -> None:
        """Puts the order in the queue.

        Raises:
            ApiError: if the engine does not take it.
        """
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self._engine = engine
        self._has_left = False
        self._began = monotonic()
        self.reply = Reply(order, self._wake)
        engine.submit(self.reply)

    async def news(self, seconds: float | None) -> Delta | None:
        """What has come since the last call, as soon as there is something; None if there was nothing for `seconds`.

        Raises:
            ClientLeft: if there is nobody to tell.
        """
        try:
            async with asyncio.timeout(seconds):
                await self._event.wait()
        except TimeoutError:
            return None
        self._event.clear()
        if self._has_left:
            raise ClientLeft
        return self.reply.take()

    async def watch(self, receive: Receive) -> None:
        """Until the client hangs up."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._has_left = True
        self._event.set()

    def close(self, id: str) -> None:
        reply = self.reply
        if not reply.has_ended:
            self._engine.abandon(reply)
        outcome = reply.finish or (reply.failure.code if reply.failure else "abandoned")
        tokens = f"{len(reply.order.prompt.ids)} + {reply.tokens} tokens"
        log.info("%s: %s, %s, %.1f s", id, tokens, outcome, monotonic() - self._began)

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._event.set)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self._engine.abandon(self.reply)


class ReplyResponse(Response):
    """Waits for the reply. As a response, since only the one who sends it can see that nobody is there any more."""

    def __init__(self, listener: StreamBridge, response_builder: ResponseBuilder) -> None:
        super().__init__()
        self._listener = listener
        self._envelope = response_builder
        dropped = listener.reply.order.prompt.dropped_turns
        self._own_headers = {"x-dropped-turns": str(dropped), "x-request-id": response_builder.full_id}

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(self._listener.watch(receive))
        try:
            await self._answer(scope, receive, send)
        except ClientLeft:
            pass
        finally:
            watch.cancel()
            self._listener.close(self._envelope.full_id)

    async def _answer(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        texts = []
        while True:
            news = await self._listener.news(None)
            texts.append(news.text)
            if news.failure:
                raise news.failure
            if news.finish:
                break
        content = self._envelope.whole(self._listener.reply, "".join(texts))
        await JSONResponse(content, headers=self._own_headers)(scope, receive, send)


class ReplyStream(ReplyResponse):
    """Sends the reply as it comes, as server-sent events."""

    async def _answer(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        headers = STREAM_HEADERS | self._own_headers
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": pairs})
        listener, response_builder = self._listener, self._envelope
        await self._send(send, event(response_builder.opening(listener.reply)))
        while True:
            news = await listener.news(KEEP_ALIVE)
            if news is None:
                await self._send(send, b": keep-alive\n\n")
                continue
            events = [*response_builder.pieces(news), *([news.failure.body()] if news.failure else [])]
            if news.finish:
                events += response_builder.closing(listener.reply)
            await self._send(send, b"".join(map(event, events)) + (b"data: [DONE]\n\n" if news.finish else b""))
            if news.is_end:
                await self._send(send, b"", more=False)
                return

    async def _send(self, send: Send, body: bytes, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": more})


def event(content: Json) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
