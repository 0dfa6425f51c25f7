"""The one thread that computes: replies to many requests are decoded together, and join and leave between tokens.

    submit(reply) --> waiting, up to `queue` --> running, up to `slots` --> ended
                          |                          |
                          `------ abandon(reply) ----'     a slot is free again before the next token

A reply collects its text until its reader takes it. Nothing here waits for a reader: what one has not taken is at most
the rest of its own reply, and whoever reads slowly holds up nobody.
"""

import logging
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from time import monotonic
from typing import NamedTuple

from gpt2ft.inference.detokenizer import IncrementalDetokenizer
from gpt2ft.inference.generate import Decoder, Step
from gpt2ft.inference.prompt_format import Prompt
from gpt2ft.inference.sampling import GREEDY, Sampling
from gpt2ft.server.errors import ApiError, overloaded, unavailable

log = logging.getLogger(__name__)

DEEPEST = 8  # frames of a traceback that the log shows

BROKEN = "the model's logits must be finite, but are not: its weights are damaged, or too large for its precision"
NOT_READY = "the model is not ready yet: try again in a moment"
STOPPING = "the server is being stopped: it takes no new requests"


@dataclass(frozen=True)
class GenerationRequest:
    """What a request asks of the model.

    Args:
        stop_ids: end the reply, and are not part of it.
        text: makes text of the ids; knows the stop strings.
    """

    prompt: Prompt
    sampling: Sampling
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    text: IncrementalDetokenizer


class Delta(NamedTuple):
    """What has come since the last time: text, and if that was the end, how it ended."""

    text: str
    finish: str | None  # "stop" or "length"
    failure: ApiError | None

    @property
    def is_end(self) -> bool:
        return self.finish is not None or self.failure is not None


@dataclass(eq=False)
class Reply:
    """One reply on its way from the engine, which pushes, to its reader, who takes.

    Args:
        wake: called by the engine's thread whenever there is something to `take`.
        deadline: of the monotonic clock; set by `Engine.submit`.
    """

    order: GenerationRequest
    wake: Callable[[], None]
    tokens: int = 0
    finish: str | None = None
    failure: ApiError | None = None
    deadline: float = 0.0
    is_abandoned: bool = False
    _texts: deque[str] = field(default_factory=deque)

    def take(self) -> Delta:
        """What has come since the last call."""
        finish, failure = self.finish, self.failure  # before the text, which is complete if one of them is set
        texts = [self._texts.popleft() for _ in range(len(self._texts))]
        return Delta("".join(texts), finish, failure)

    def push(self, id: int | None, finish: str | None) -> None:
        """What a step of the decoder brought."""
        text = self.order.text
        if id is not None:
            self.tokens += 1
            self._add(text.push(id))
            finish = "stop" if text.is_stopped else finish
        if finish is not None:
            self.end(finish)
        elif self._texts:
            self.wake()

    def end(self, finish: str) -> None:
        """No more ids come."""
        self._add(self.order.text.finish())
        self.finish = finish
        self.wake()

    def fail(self, error: ApiError) -> None:
        self.failure = error
        self.wake()

    def _add(self, text: str) -> None:
        if text:
            self._texts.append(text)

    @property
    def has_ended(self) -> bool:
        return self.finish is not None or self.failure is not None


class Engine:
    """Owns the decoder.

    Args:
        make_decoder: called in the engine's thread, at the start and whenever a computation has failed.
        rehearsal_id: a prompt of one token.
        capacity: how many requests may be here at once, in slots or waiting for one.
        seconds: the longest that one may take, waiting included.
    """

    def __init__(self, make_decoder: Callable[[], Decoder], rehearsal_id: int, capacity: int, seconds: float) -> None:
        self._make_decoder = make_decoder
        self._rehearsal_id = rehearsal_id
        self._capacity = capacity
        self._seconds = seconds
        self._waiting: deque[Reply] = deque()
        self._running: dict[int, Reply] = {}  # by slot
        self._changed = threading.Condition()
        self._state = "starting"  # then "ready", "damaged" for ever, or "stopped"
        self._is_draining = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- for other threads ---

    def start(self) -> None:
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether the model has answered its rehearsal, and new requests are taken."""
        return self._state == "ready" and not self._is_draining

    @property
    def is_damaged(self) -> bool:
        """Whether the model has failed a rehearsal, as it then would any other."""
        return self._state == "damaged"

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting) + len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def refuse_if_unavailable(self) -> None:
        """Raises ApiError, with 503, unless new requests are taken."""
        if self._is_draining or self._state == "stopped":
            raise unavailable(STOPPING)
        if self._state == "starting":
            raise unavailable(NOT_READY, retry_after=1)
        if self._state == "damaged":
            raise unavailable("the model has failed its rehearsal: see the server's log, and start it again")

    def submit(self, reply: Reply) -> None:
        """Puts a reply in the queue.

        Raises:
            ApiError: 503 if none is taken now, 429 if the queue is full.
        """
        with self._changed:
            self.refuse_if_unavailable()
            if self.num_unfinished >= self._capacity:
                raise overloaded(f"{self.num_unfinished} requests are being served or wait: try again later", 5)
            reply.deadline = monotonic() + self._seconds
            self._waiting.append(reply)
            self._changed.notify()

    def abandon(self, reply: Reply) -> None:
        """The reader is gone: frees the place in the queue now, or the slot before the next token."""
        with self._changed:
            reply.is_abandoned = True
            if reply in self._waiting:
                self._waiting.remove(reply)

    def drain(self) -> None:
        """Takes no new requests; those that are here are finished."""
        self._is_draining = True

    def stop(self, patience: float = 10.0) -> None:
        """Ends everything, and waits for the thread as long as `patience`, in seconds."""
        with self._changed:
            self._state = "stopped"
            self._changed.notify()
        self._thread.join(patience)

    # --- the thread ---

    def _run(self) -> None:
        self._start_over()
        while self._state != "stopped":
            with self._changed:
                while not self._waiting and not self._running and self._state != "stopped":
                    self._changed.wait()
            try:
                self._free_slots()
                self._admit()
                self._step()
            except Exception as error:
                log_failure(error)
                self._fail_all(ApiError(500, "the computation has failed: see the server's log", "internal_error"))
                self._start_over()
        self._fail_all(unavailable("the server was stopped before the reply was complete"))

    def _start_over(self) -> None:
        """A new decoder, and a token from it as a rehearsal."""
        try:
            self._decoder = self._make_decoder()
            self._rehearse()
        except Exception as error:
            log_failure(error)
            self._set_state("damaged")

    def _rehearse(self) -> list[Reply]:
        """One token, beside whatever else is decoded. A model that cannot say it is damaged, and not just a reply.

        Returns the replies that broke meanwhile.
        """
        slot = self._decoder.join([self._rehearsal_id], GREEDY, 1)
        steps = self._decoder.step()
        [rehearsal] = [step for step in steps if step.slot == slot]
        self._decoder.leave(slot)
        broken = self._deliver(step for step in steps if step is not rehearsal)
        if rehearsal.finish == "broken":
            log.error(BROKEN)
            self._set_state("damaged")
        else:
            self._set_state("ready")
        return broken

    def _set_state(self, state: str) -> None:
        with self._changed:
            if self._state != "stopped":
                self._state = state
        if state == "damaged":
            self._fail_all(ApiError(500, BROKEN, "model_damaged"))

    def _free_slots(self) -> None:
        """Of readers that are gone and of replies that have taken too long."""
        now = monotonic()
        for slot, reply in list(self._running.items()):
            if reply.is_abandoned:
                self._leave(slot)
            elif now > reply.deadline:
                reply.end("length")
                self._leave(slot)
        with self._changed:
            late = [reply for reply in self._waiting if now > reply.deadline]
            for reply in late:
                self._waiting.remove(reply)
        for reply in late:
            reply.fail(overloaded("no slot became free in time: try again later", 30))

    def _admit(self) -> None:
        while self._decoder.num_free:
            with self._changed:
                if not self._waiting:
                    return
                reply = self._waiting[0]
            order = reply.order
            slot = self._decoder.join(order.prompt.ids, order.sampling, order.max_new_tokens, order.stop_ids)
            with self._changed:  # it is in one of the two at any time, as others count them
                if reply.is_abandoned:
                    self._decoder.leave(slot)
                else:
                    self._running[slot] = self._waiting.popleft()

    def _step(self) -> None:
        broken = self._deliver(self._decoder.step())
        if broken:
            broken += self._rehearse()
        for reply in broken:  # after the rehearsal: whoever is told so may ask whether the model is still ready
            reply.fail(ApiError(500, BROKEN, "model_damaged"))

    def _deliver(self, steps: Iterable[Step]) -> list[Reply]:
        """Hands on what was said, and frees the slots of what has ended. Returns the replies that broke."""
        broken = []
        for slot, id, finish in steps:
            reply = self._running[slot]
            if finish == "broken":
                broken.append(reply)
            else:
                reply.push(id, finish)
            if finish == "broken" or reply.has_ended:
                self._leave(slot)
        return broken

    def _leave(self, slot: int) -> None:
        self._decoder.leave(slot)
        del self._running[slot]

    def _fail_all(self, error: ApiError) -> None:
        with self._changed:
            replies = [*self._running.values(), *self._waiting]
            self._running.clear()
            self._waiting.clear()
        for reply in replies:
            reply.fail(error)


def log_failure(error: BaseException) -> None:
    """Where and as what something failed. Not its message: that might hold what people wrote."""
    frames = traceback.extract_tb(error.__traceback__)[-DEEPEST:]
    places = "".join(f"\n  {frame.filename}:{frame.lineno} in {frame.name}" for frame in frames)
    log.error("%s%s", type(error).__name__, places)
