"""Several engines, one for each model, that start, serve and end as one."""

from collections.abc import Sequence
from dataclasses import dataclass

from gpt2ft.server.engine import Engine


@dataclass(frozen=True)
class Engines:
    """What the server and its states ask of an engine, asked of all."""

    all: Sequence[Engine]

    def start(self) -> None:
        for engine in self.all:
            engine.start()

    @property
    def is_ready(self) -> bool:
        return all(engine.is_ready for engine in self.all)

    @property
    def is_damaged(self) -> bool:
        return any(engine.is_damaged for engine in self.all)

    @property
    def num_waiting(self) -> int:
        return sum(engine.num_waiting for engine in self.all)

    @property
    def num_running(self) -> int:
        return sum(engine.num_running for engine in self.all)

    @property
    def num_unfinished(self) -> int:
        return sum(engine.num_unfinished for engine in self.all)

    def refuse_if_unavailable(self) -> None:
        """Raise ApiError, with 503, unless all take new requests."""
        for engine in self.all:
            engine.refuse_if_unavailable()

    def drain(self) -> None:
        for engine in self.all:
            engine.drain()

    def stop(self) -> None:
        for engine in self.all:
            engine.stop()

    def join(self, timeout: float = 10.0) -> None:
        for engine in self.all:
            engine.join(timeout)
