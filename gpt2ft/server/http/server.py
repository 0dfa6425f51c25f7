"""uvicorn with an end that waits for replies: SIGTERM and Ctrl-C let them finish, and answer new requests with 503."""

import asyncio
import socket
from time import monotonic
from types import FrameType

import uvicorn

from gpt2ft.server.engine import Engine
from gpt2ft.server.http.access import App
from gpt2ft.server.http.connection import Patience, connection_class

LAST_SECONDS = 5  # for what has been said to reach its readers, once nothing more is


class Server(uvicorn.Server):
    """Listens until it is told to stop, or until the model fails its very first rehearsal.

    The port stays open while replies finish, so that whoever asks meanwhile is told why not. A second signal ends all
    at once.

    Args:
        shutdown_timeout: the longest time that replies are given to finish.
    Attributes:
        has_failed: it has ended because of that rehearsal.
    """

    def __init__(self, app: App, engine: Engine, patience: Patience, shutdown_timeout: float) -> None:
        config = uvicorn.Config(
            app,
            http=connection_class(patience),  # type: ignore[arg-type]
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=LAST_SECONDS,
        )
        super().__init__(config)
        self._engine = engine
        self._drain_seconds = shutdown_timeout
        self._num_signals = 0
        self._drain_ends: float | None = None
        self._was_ready = False
        self.has_failed = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._engine.start()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """As a signal handler it only takes note: locks are not for it."""
        self._num_signals += 1

    async def on_tick(self, counter: int) -> bool:
        self._was_ready |= self._engine.is_ready
        self.has_failed = self._engine.is_damaged and not self._was_ready
        if self._num_signals and self._drain_ends is None:
            self._engine.drain()
            self._drain_ends = monotonic() + self._drain_seconds
        if self._num_signals > 1:
            self.force_exit = True
        return await super().on_tick(counter) or self._is_over()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await asyncio.to_thread(self._engine.stop)
        await super().shutdown(sockets)

    def _is_over(self) -> bool:
        if self._drain_ends is None:
            return self.has_failed
        return self.force_exit or self._engine.num_unfinished == 0 or monotonic() > self._drain_ends
