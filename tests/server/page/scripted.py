"""The real server with a model that says what a test tells it to, when the test tells it to."""

import threading
from collections import deque

from processes import wait_until

from gpt2ft.inference.decoder import StepResult
from gpt2ft.inference.model import InferenceModel
from gpt2ft.inference.prompt_format import ChatPromptFormat
from gpt2ft.server import service
from gpt2ft.server.comparison import service as comparison
from gpt2ft.server.comparison.vote_file import VoteFile
from gpt2ft.server.http import connection
from gpt2ft.settings.using import ServeSettings

TIMEOUT = 120  # seconds until a test that forgot something fails
SLOTS = 4


class Gate(threading.Event):
    """A place in a reply where the model waits until the test opens the gate."""

    open = threading.Event.set


class Scripts:
    """Future replies, in the order in which they are asked for.

    A script is made of ids, gates, an exception where the computation fails, and the reason for its end.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.waiting = deque()
        self.was_left = threading.Event()  # a reply, before it was complete

    def add(self, *pieces, finish="stop"):
        """`pieces` of text, gates and exceptions."""
        script = deque()
        for piece in pieces:
            script.extend(self.tokenizer.encode(piece) if isinstance(piece, str) else [piece])
        self.waiting.append(script + deque([finish]))


class ScriptedDecoder:
    """Stands in for the `Decoder` that the engine drives."""

    def __init__(self, scripts):
        self.scripts = scripts
        self.running = {}

    @property
    def num_free(self):
        return SLOTS - len(self.running)

    def join(self, prompt_ids, sampling, max_new_tokens, stop_ids=None):
        slot = min(set(range(SLOTS)) - set(self.running))
        is_warm_up = stop_ids is None
        self.running[slot] = deque([*prompt_ids[:1], "length"]) if is_warm_up else self.scripts.waiting.popleft()
        return slot

    def step(self):
        steps = [self._step(slot, script) for slot, script in self.running.items() if not is_closed(script[0])]
        for script in [] if steps else self.running.values():
            script[0].wait(0.005)
        return steps

    def _step(self, slot, script):
        while isinstance(script[0], Gate):
            script.popleft()
        piece = script.popleft()
        if isinstance(piece, Exception):
            raise piece
        return StepResult(slot, None, piece) if isinstance(piece, str) else StepResult(slot, piece, None)

    def leave(self, slot):
        if self.running.pop(slot):
            self.scripts.was_left.set()


def is_closed(piece):
    return isinstance(piece, Gate) and not piece.is_set()


class ScriptedServer:
    """Can be stopped, and started again at the same address as something else."""

    def __init__(self, gpt2, tokenizer):
        self.scripts = Scripts(tokenizer)
        self.will_say = self.scripts.add
        self._model = InferenceModel(gpt2, tokenizer, ChatPromptFormat(tokenizer), "scripted", "0" * 10)
        self._port = 0

    def start(self, name="scripted", key=None, votes=None, **settings):
        """Compares two models, both of which say what the next script has, where there is a file for `votes`."""
        self._is_plain = (name, key, votes, settings) == ("scripted", None, None, {})
        listening = connection.listen("127.0.0.1", self._port, TIMEOUT)
        self._port = listening.getsockname()[1]
        settings = {"slots": SLOTS, "shutdown_timeout": 0.01} | settings
        given = ServeSettings(**settings)
        if votes is None:
            self._server = service.create(given, self._model, name, key)
        else:
            self._server = comparison.create(given, [self._model] * 2, name, key, VoteFile(votes))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]})
        self._thread.start()
        self._listening = listening

    def stop(self):
        self._server.should_exit = True
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()
        self._listening.close()

    def restart(self, **changes):
        self.stop()
        self.start(**changes)

    def until_asked(self):
        """Waits until all that will be said has been asked for."""
        wait_until(lambda: not self.scripts.waiting)

    def start_over(self):
        """For the next test."""
        assert not self.scripts.waiting, "a reply was not asked for"
        wait_until(lambda: self._server.engine.num_unfinished == 0)
        self.scripts.was_left.clear()
        if not self._is_plain:
            self.restart()

    @property
    def url(self):
        return f"http://127.0.0.1:{self._port}/"
