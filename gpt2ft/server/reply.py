"""One reply between the API, which asks for it, the engine, which decodes it, and the stream, which takes its text."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

from gpt2ft.inference.decoder import FinishReason
from gpt2ft.inference.detokenizer import IncrementalDetokenizer
from gpt2ft.inference.prompt_format import Prompt
from gpt2ft.server.errors import ApiError
from gpt2ft.settings.sections import SamplingSettings


@dataclass(frozen=True)
class GenerationRequest:
    """A request in the engine's terms.

    Args:
        stop_ids: end the reply, and are not part of it.
        detokenizer: knows the stop strings; it belongs to this reply alone.
    """

    prompt: Prompt
    sampling: SamplingSettings
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    detokenizer: IncrementalDetokenizer


class Delta(NamedTuple):
    """The text since the last delta and, in the last one, how the reply ended."""

    text: str
    finish_reason: FinishReason | None = None
    failure: ApiError | None = None

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.failure is not None


@dataclass(eq=False)
class Reply:
    """One reply on its way from the engine, which pushes, to its reader, who takes.

    Args:
        wake: called by the engine's thread whenever there is something to `take`.
        deadline: of the monotonic clock; set by `Engine.submit`.
    """

    request: GenerationRequest
    wake: Callable[[], None]
    num_tokens: int = 0
    finish_reason: FinishReason | None = None
    failure: ApiError | None = None
    deadline: float = 0.0
    is_abandoned: bool = False
    _texts: deque[str] = field(default_factory=deque)
    _first_came: float = 0.0  # of the clock that only tells durations, as of the next
    _last_came: float = 0.0

    @property
    def has_ended(self) -> bool:
        return self.finish_reason is not None or self.failure is not None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens after the first by the time after it: not how long the reply waited, nor how its pieces travelled.

        None of fewer than two tokens.
        """
        seconds = self._last_came - self._first_came
        return (self.num_tokens - 1) / seconds if seconds > 0 else None

    def take(self) -> Delta:
        """Return what has come since the last call."""
        # The end is read before the text, which is complete once there is an end.
        finish_reason, failure = self.finish_reason, self.failure
        texts = [self._texts.popleft() for _ in range(len(self._texts))]
        return Delta("".join(texts), finish_reason, failure)

    def push(self, id: int | None, finish_reason: FinishReason | None) -> None:
        """Add what one step of the decoder brought."""
        detokenizer = self.request.detokenizer
        if id is not None:
            self.num_tokens += 1
            self._last_came = perf_counter()
            self._first_came = self._first_came or self._last_came
            self._add(detokenizer.push(id))
            finish_reason = "stop" if detokenizer.is_stopped else finish_reason
        if finish_reason is not None:
            self.end(finish_reason)
        elif self._texts:
            self.wake()

    def end(self, finish_reason: FinishReason) -> None:
        """Complete the reply: no more ids come."""
        self._add(self.request.detokenizer.finish())
        self.finish_reason = finish_reason
        self.wake()

    def fail(self, error: ApiError) -> None:
        self.failure = error
        self.wake()

    def _add(self, text: str) -> None:
        if text:
            self._texts.append(text)
