"""A conversation with a model: its turns, how they are made to fit the context, and replies that come piece by piece.

    session = Session(inference_model, SamplingSettings(), max_new_tokens=256)
    session.say("What is tea?")
    for piece in session.reply():
        print(piece, end="")

Nothing here prints.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

from gpt2ft.conversation import TURN_ROLES, tidy, turn_text
from gpt2ft.inference.decoder import Decoder, FinishReason, refuse_broken
from gpt2ft.inference.detokenizer import IncrementalDetokenizer
from gpt2ft.inference.model import InferenceModel
from gpt2ft.inference.prompt_format import Prompt, TooLong, Turn
from gpt2ft.random import seed_for
from gpt2ft.settings.sections import SamplingSettings

Pieces = Generator[str, None, None]  # pieces of text as they come; to close it is to interrupt
Finish = FinishReason | Literal["context", "interrupted"]


@dataclass(frozen=True)
class Statistics:
    """The cost of a reply, and how it ended.

    Args:
        seconds: of the model, not of who reads the pieces.
        finish: "stop" if the model ended it, "length" after `max_new_tokens`, "context" where the context was full,
            "interrupted" if it was not let finish.
        dropped_turns: how many of the oldest turns the model did not see.
    """

    tokens: int
    seconds: float
    finish: Finish
    prompt_tokens: int
    dropped_turns: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Session:
    """One conversation. User and assistant take turns; what the model has read stays cached for the next reply.

    With a seed in `sampling`, the same actions on a new conversation give the same replies, and each reply draws
    numbers of its own, so that `retry` does not say the same again (unless the temperature is 0).

    A reply that its reader abandons counts as interrupted as soon as the session is asked for anything else.

    Attributes:
        turns: (role, text) from the first on, without the system text.
        system: the text of a system turn before the others, or None. It can be set at any time.
        sampling: can be set at any time.
        max_new_tokens: of one reply; can be set at any time.
        last: `Statistics` of the last reply or continuation, or None.
    """

    def __init__(self, model: InferenceModel, sampling: SamplingSettings, max_new_tokens: int) -> None:
        self.model = model
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.turns: list[Turn] = []
        self._messages: list[str] = []  # those that were joined to the last user turn
        self.system: str | None = None
        self.last: Statistics | None = None
        self._decoder: Decoder | None = None
        self._num_replies = 0
        self._under_way: Pieces | None = None

    @property
    def max_new_tokens(self) -> int:
        return self._max_new_tokens

    @max_new_tokens.setter
    def max_new_tokens(self, number: int) -> None:
        if number < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1, but is {number}")
        self._max_new_tokens = number

    # --- messages and replies ---

    def say(self, text: str) -> None:
        """Add a user turn. Two in a row become one, joined by a blank line as in training data."""
        self._settle()
        if not self._awaits_reply():
            self._messages = []
            self.turns.append(("user", ""))
        self._messages.append(tidy(text))
        self.turns[-1] = ("user", "\n\n".join(self._messages))

    def reply(self, should_stop: Callable[[], bool] = lambda: False) -> Pieces:
        """Yield the assistant's reply, piece by piece; however it ends, its text becomes a turn.

        A reply that is interrupted before it has any text makes no turn, and can be asked for again.

        Args:
            should_stop: asked before each token.
        Raises:
            ValueError: if there is nothing to reply to, or the last message is too long for the context: it is
                then taken back.
        """
        self._settle()
        if not self._awaits_reply():
            raise ValueError("there must be a message to reply to, but there is none: say something first")
        self._under_way = self._reply(self._prompt(), should_stop)
        return self._under_way

    def complete(self, text: str, should_stop: Callable[[], bool] = lambda: False) -> Pieces:
        """Yield how a document goes on that begins with `text`, up to `<|endoftext|>`; turns play no part in it.

        Raises:
            ValueError: if `text` is too long for the context.
        """
        self._settle()
        tokenizer = self.model.tokenizer
        try:
            prompt = self.model.text_prompt(text, self.max_new_tokens)
        except TooLong as error:
            raise ValueError(f"{error}: shorten it") from error
        decoder = self.model.decoder([tokenizer.end_of_text_id])
        self._under_way = self._pieces(decoder, prompt, IncrementalDetokenizer(tokenizer), should_stop)
        return self._under_way

    def undo(self) -> None:
        """Take back the last message and the reply to it.

        Raises:
            ValueError: if there is none.
        """
        self._settle()
        if not self.turns:
            raise ValueError("there must be a message to take back, but there is none")
        if self._awaits_reply():
            self._take_back()
        else:
            del self.turns[-2:]

    def retry(self) -> None:
        """Take back the last reply, if its message has one, so that `reply` draws another.

        Raises:
            ValueError: if there is no message.
        """
        self._settle()
        if not self.turns:
            raise ValueError("there must be a message to reply to again, but there is none: say something first")
        if not self._awaits_reply():
            self.turns.pop()

    def new(self) -> None:
        """Begin a new conversation; the system text stays."""
        self._settle()
        self.turns.clear()
        self.last = None
        self._num_replies = 0

    def to_messages(self) -> list[dict[str, str]]:
        """Return the conversation as {"role", "content"}, the system text first."""
        self._settle()
        return [{"role": role, "content": text} for role, text in self._all_turns()]

    def from_messages(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Replace the conversation and the system text by what `to_messages` has given.

        Raises:
            ValueError: if a message is damaged or out of turn; the conversation is then as it was.
        """
        turns = _checked(messages)
        self.new()
        self.system = turns.pop(0)[1] if turns and turns[0][0] == "system" else None
        self.turns = turns
        self._messages = [turns[-1][1]] if self._awaits_reply() else []

    # --- inside ---

    def _awaits_reply(self) -> bool:
        return bool(self.turns) and self.turns[-1][0] == "user"

    def _take_back(self) -> None:
        """Remove the last message, and no other that it was joined to."""
        turn = self.turns.pop()
        if len(self._messages) > 1 and turn[1] == "\n\n".join(self._messages):
            self._messages.pop()
            self.turns.append(("user", "\n\n".join(self._messages)))

    def _all_turns(self) -> list[Turn]:
        return [*([] if self.system is None else [("system", tidy(self.system))]), *self.turns]

    def _prompt(self) -> Prompt:
        try:
            return self.model.chat_prompt(self._all_turns(), self.max_new_tokens)
        except TooLong as error:
            self._take_back()
            raise ValueError(f"{error}: it is taken back, shorten it") from error

    def _reply(self, prompt: Prompt, should_stop: Callable[[], bool]) -> Pieces:
        said: list[str] = []
        if self._decoder is None:
            self._decoder = self.model.decoder(self.model.prompt_format.stop_ids)
        pieces = self._pieces(self._decoder, prompt, self.model.chat_detokenizer(), should_stop)
        try:
            with closing(pieces):
                for piece in pieces:
                    said.append(piece)
                    yield piece
        except (Exception, KeyboardInterrupt):
            self._decoder = None  # which may have been left half-way
            raise
        finally:
            if said or (self.last is not None and self.last.finish != "interrupted"):
                self.turns.append(("assistant", "".join(said)))

    def _pieces(
        self, decoder: Decoder, prompt: Prompt, detokenizer: IncrementalDetokenizer, should_stop: Callable[[], bool]
    ) -> Pieces:
        """Decode behind a prompt. Sets `last`, however it ends."""
        most, tokens, finish, seconds = self.max_new_tokens, 0, None, 0.0
        self.last = None
        slot = decoder.join(prompt.ids, self._next_sampling(), most)
        try:
            while finish is None and not should_stop():
                began = perf_counter()
                steps = decoder.step()
                seconds += perf_counter() - began
                for _, id, finish in steps:  # none while a long prompt is read
                    refuse_broken(finish, self.model.gpt2)
                    if id is not None:
                        tokens += 1
                        piece = detokenizer.push(id)
                        finish = "stop" if detokenizer.is_stopped else finish
                        if piece:
                            yield piece
            if rest := detokenizer.finish():
                yield rest
        finally:
            decoder.leave(slot)
            if finish == "length" and tokens < most:
                finish = "context"
            finish = "interrupted" if finish in (None, "broken") else finish
            self.last = Statistics(tokens, seconds, finish, len(prompt.ids), prompt.dropped_turns)

    def _next_sampling(self) -> SamplingSettings:
        """Give each reply, a repeated one too, random numbers of its own."""
        self._num_replies += 1
        if self.sampling.seed is None:
            return self.sampling
        return self.sampling.model_copy(update={"seed": seed_for(self.sampling.seed, "reply", self._num_replies)})

    def _settle(self) -> None:
        """End a reply that its reader has abandoned, so that it is among the turns before they change."""
        if self._under_way is not None:
            self._under_way.close()
            self._under_way = None


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """Return the turns in saved messages: perhaps a system text, then user and assistant in turn.

    Each is what `TURN_ROLES` and `turn_text` say.
    """
    if not isinstance(messages, list | tuple):
        raise ValueError(f"the messages must be a list, but are {type(messages).__name__}")
    turns: list[Turn] = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"message {number} must hold `role` and `content`, but is {message!r:.80}")
        try:
            text = turn_text(message["content"])
        except ValueError as error:
            raise ValueError(
                f"message {number} cannot be read: `content` {error}, but is {message['content']!r:.80}"
            ) from None
        role = TURN_ROLES.get(message["role"]) if isinstance(message["role"], str) else None
        above = turns[-1][0] if turns else ""
        allowed = {"": ("system", "user"), "user": ("assistant",)}.get(above, ("user",))
        if role not in allowed:
            rule = " or ".join(allowed) + (f" after {above}" if above else "")
            raise ValueError(f"message {number}: `role` must be {rule}, but is {message['role']!r}")
        turns.append((role, text))
    return turns
