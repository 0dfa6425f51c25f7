"""The thread that decodes: many replies are continued together, and join and leave between tokens.

    submit(reply) --> waiting, up to `queue` --> running, up to `slots` --> ended
                          |                          |
                          `------ abandon(reply) ----'     the slot is free again before the next token

A reply collects its text until its reader takes it. Nothing here waits for a reader: text that is not taken is at most
the rest of that one reply, so a slow reader holds up nobody.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Literal

from gpt2ft.inference.decoder import Decoder, StepResult
from gpt2ft.inference.sampling import GREEDY
from gpt2ft.server.errors import ApiError, internal, log_failure, overloaded, unavailable
from gpt2ft.server.reply import Reply
from gpt2ft.wording import counted

log = logging.getLogger(__name__)

State = Literal["starting", "ready", "damaged", "stopped"]  # the last two for good

NOT_FINITE = "the model's logits must be finite, but are not: its weights are damaged, or too large for its precision"


class Engine:
    """The owner of the decoder.

    Args:
        make_decoder: called in the engine's thread, at the start and whenever a computation has failed.
        warm_up_id: the prompt of the warm-up.
        capacity: how many requests may be here at once, in slots or waiting for one.
        request_timeout: seconds that one may take, waiting included.
    """

    def __init__(
        self, make_decoder: Callable[[], Decoder], warm_up_id: int, capacity: int, request_timeout: float
    ) -> None:
        self._make_decoder = make_decoder
        self._warm_up_id = warm_up_id
        self._capacity = capacity
        self._request_timeout = request_timeout
        self._waiting: deque[Reply] = deque()
        self._running: dict[int, Reply] = {}  # by slot
        self._changed = threading.Condition()
        self._state: State = "starting"
        self._is_draining = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- for other threads ---

    def start(self) -> None:
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """True once the warm-up has succeeded, as long as new requests are taken."""
        return self._state == "ready" and not self._is_draining

    @property
    def is_damaged(self) -> bool:
        """True once a warm-up has failed, as any other request then would."""
        return self._state == "damaged"

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Without those that have ended: who is told so may ask again before the slot is free."""
        return sum(not reply.has_ended for reply in list(self._running.values()))

    @property
    def num_unfinished(self) -> int:
        return self.num_waiting + self.num_running

    def refuse_if_unavailable(self) -> None:
        """Raise ApiError, with 503, unless new requests are taken."""
        if self._is_draining or self._state == "stopped":
            raise unavailable("the server is being stopped: it takes no new requests")
        if self._state == "starting":
            raise unavailable("the model is not ready yet: try again in a moment", retry_after=1)
        if self._state == "damaged":
            raise unavailable("the model has failed its warm-up: see the server's log, and start it again")

    def submit(self, reply: Reply) -> None:
        """Put a reply in the queue.

        Raises:
            ApiError: 503 if none is taken now, 429 if the queue is full.
        """
        with self._changed:
            self.refuse_if_unavailable()
            if self.num_unfinished >= self._capacity:
                raise overloaded(f"{counted(self.num_unfinished, 'request')} in work or waiting: try again later", 5)
            reply.deadline = monotonic() + self._request_timeout
            self._waiting.append(reply)
            self._changed.notify()

    def abandon(self, reply: Reply) -> None:
        """Free the place in the queue now, or the slot before the next token: the reader is gone."""
        with self._changed:
            reply.is_abandoned = True
            if reply in self._waiting:
                self._waiting.remove(reply)

    def drain(self) -> None:
        """Take no new requests; those that are here are finished."""
        self._is_draining = True

    def stop(self) -> None:
        """End all replies once the step under way is done."""
        with self._changed:
            self._state = "stopped"
            self._changed.notify()

    def join(self, timeout: float = 10.0) -> None:
        """Wait up to `timeout` seconds for the thread to end."""
        self._thread.join(timeout)

    # --- the thread ---

    def _run(self) -> None:
        self._start_decoder()
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
                self._fail_all(internal("the computation has failed: see the server's log"))
                self._start_decoder()
        self._fail_all(unavailable("the server was stopped before the reply was complete"))

    def _start_decoder(self) -> None:
        try:
            self._decoder = self._make_decoder()
            self._warm_up()
        except Exception as error:
            log_failure(error)
            self._set_state("damaged")

    def _warm_up(self) -> list[Reply]:
        """Decode one token, beside all else that is decoded; a model that cannot is damaged, and not just one reply.

        Returns the replies that broke meanwhile.
        """
        slot = self._decoder.join([self._warm_up_id], GREEDY, 1)
        steps = self._decoder.step()
        [warm_up] = [step for step in steps if step.slot == slot]
        self._decoder.leave(slot)
        broken = self._deliver(step for step in steps if step is not warm_up)
        if warm_up.finish_reason == "broken":
            log.error(NOT_FINITE)
            self._set_state("damaged")
        else:
            self._set_state("ready")
        return broken

    def _set_state(self, state: State) -> None:
        with self._changed:
            if self._state != "stopped":
                self._state = state
        if state == "damaged":
            self._fail_all(ApiError(500, NOT_FINITE, "model_damaged"))

    def _free_slots(self) -> None:
        """End replies whose readers are gone, and those that have taken too long."""
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
        """Let waiting replies join the decoder, the oldest first, while it has free slots."""
        while self._decoder.num_free:
            with self._changed:
                if not self._waiting:
                    return
                reply = self._waiting[0]
            request = reply.request
            slot = self._decoder.join(request.prompt.ids, request.sampling, request.max_new_tokens, request.stop_ids)
            with self._changed:  # other threads, which count replies, always find it in one of the two
                if reply.is_abandoned:
                    self._decoder.leave(slot)
                else:
                    self._running[slot] = self._waiting.popleft()

    def _step(self) -> None:
        broken = self._deliver(self._decoder.step())
        if broken:
            broken += self._warm_up()
        for reply in broken:  # after the warm-up: whoever is told so may ask whether the model is still ready
            reply.fail(ApiError(500, NOT_FINITE, "model_damaged"))

    def _deliver(self, steps: Iterable[StepResult]) -> list[Reply]:
        """Push ids to their replies, and free the slots of those that have ended. Returns the replies that broke."""
        broken = []
        for slot, id, finish_reason in steps:
            reply = self._running[slot]
            if finish_reason == "broken":
                broken.append(reply)
            else:
                reply.push(id, finish_reason)
            if finish_reason == "broken" or reply.has_ended:
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
