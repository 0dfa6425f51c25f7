"""uvicorn, which on SIGTERM and Ctrl-C lets the replies under way finish, and answers new requests with 503."""

import asyncio
import socket
from time import monotonic
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from gpt2ft.server.engine import Engine
from gpt2ft.server.http.access import App
from gpt2ft.server.http.connection import connection_class
from gpt2ft.server.http.refusal import RenderError
from gpt2ft.settings.using import ServeSettings

if TYPE_CHECKING:
    from gpt2ft.server.comparison.engines import Engines

FLUSH_SECONDS = 5  # for the last text to reach its clients, once the engine has stopped


class Server(uvicorn.Server):
    """Listens until it is told to stop, or until a model fails its very first warm-up.

    The port stays open while replies finish, so that whoever asks meanwhile is told why not. A second signal ends all
    at once.

    Args:
        settings: of the connections, and `shutdown_timeout`.
    Attributes:
        has_failed: it has ended because of that warm-up.
    """

    def __init__(
        self, app: App, engine: "Engine | Engines", settings: ServeSettings, render_error: RenderError
    ) -> None:
        config = uvicorn.Config(
            app,
            http=connection_class(settings, render_error),  # type: ignore[arg-type]
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=FLUSH_SECONDS,
        )
        super().__init__(config)
        self.engine = engine
        self._shutdown_timeout = settings.shutdown_timeout
        self._num_signals = 0
        self._drain_deadline: float | None = None
        self._was_ready = False
        self.has_failed = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.engine.start()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Count the signal and no more: a signal handler may take no lock."""
        self._num_signals += 1

    async def on_tick(self, counter: int) -> bool:
        self._was_ready |= self.engine.is_ready
        self.has_failed = self.engine.is_damaged and not self._was_ready
        if self._num_signals and self._drain_deadline is None:
            self.engine.drain()
            self._drain_deadline = monotonic() + self._shutdown_timeout
        if self._num_signals > 1:
            self.force_exit = True
        return await super().on_tick(counter) or self._is_over()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.engine.stop()
        await asyncio.to_thread(self.engine.join)
        await super().shutdown(sockets)

    def _is_over(self) -> bool:
        if self._drain_deadline is None:
            return self.has_failed
        return self.force_exit or self.engine.num_unfinished == 0 or monotonic() > self._drain_deadline
