"""Two models compared by people: pairs of replies to one conversation, and the votes on them.

    POST /v1/pairs --> ask --> both engines --> offer --> an open pair
    POST /v1/votes --> vote --> a line of the file

Which of the two stands left is drawn for each pair. It leaves this process with the vote, into the file, and no other
way: replies are shown once both are complete, so that not even their speed tells.
"""

import logging
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from gpt2ft.inference.prompt_format import Turn
from gpt2ft.server.comparison.vote_file import VoteFile
from gpt2ft.server.engine import Engine
from gpt2ft.server.errors import ApiError, invalid
from gpt2ft.server.openai.conversion import RequestConverter, turns_of
from gpt2ft.server.openai.requests import Body, ChatRequest
from gpt2ft.server.reply import GenerationRequest, Reply

Json = dict[str, Any]
Vote = Literal["left", "right", "both_good", "both_bad"]

SCORES: dict[Vote, tuple[int, int]] = {"left": (1, 0), "right": (1, 0), "both_good": (1, 1), "both_bad": (0, 0)}
MOST_OPEN = 1000  # pairs that wait for a vote; the oldest give way
MOST_REMEMBERED = 100_000  # pairs that are gone, of which is known why

log = logging.getLogger(__name__)


class VoteRequest(Body):
    pair: str
    vote: Vote


@dataclass(frozen=True)
class Contestant:
    """One of the two models."""

    engine: Engine
    converter: RequestConverter


@dataclass(frozen=True)
class AskedPair:
    """A conversation to which both models are to reply."""

    prompt: Sequence[Turn]
    requests: Sequence[GenerationRequest]
    stops: Sequence[str]
    id: str = field(default_factory=lambda: f"pair-{secrets.token_hex(12)}")


@dataclass(frozen=True)
class Side:
    """A reply as it is offered, and what only its vote tells of it."""

    text: str
    reply: Reply
    contestant: Contestant

    def offered(self) -> Json:
        return {"content": self.text, "finish_reason": self.reply.finish_reason, "tokens": self.reply.num_tokens}

    def stored(self, side: str) -> Json:
        model, request = self.contestant.converter.model, self.reply.request
        return {
            "side": side,
            "model": model.source,
            "digest": model.digest,
            "seed": request.sampling.seed,
            "finish_reason": self.reply.finish_reason,
            "tokens": self.reply.num_tokens,
            "dropped_turns": request.prompt.dropped_turns,
        }


@dataclass(frozen=True)
class OpenPair:
    asked: AskedPair
    left: Side
    right: Side
    deadline: float

    def record(self, vote: Vote) -> Json:
        """Return the line of a vote, a preference as training reads it. Replies of equal score are never compared."""
        sides = (("left", self.left), ("right", self.right))
        chosen, rejected = sides[::-1] if vote == "right" else sides
        request = self.left.reply.request
        settings = request.sampling.model_dump(exclude={"seed"})
        return {
            "prompt": [{"role": role, "content": text} for role, text in self.asked.prompt],
            "chosen": [{"role": "assistant", "content": chosen[1].text}],
            "rejected": [{"role": "assistant", "content": rejected[1].text}],
            "score_chosen": SCORES[vote][0],
            "score_rejected": SCORES[vote][1],
            "metadata": {
                "vote": vote,
                "chosen": chosen[1].stored(chosen[0]),
                "rejected": rejected[1].stored(rejected[0]),
                "settings": settings | {"max_tokens": request.max_new_tokens, "stop": list(self.asked.stops)},
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        }


class Comparison:
    """Pairs that wait for their votes.

    Args:
        vote_timeout: seconds that one waits.
    """

    def __init__(self, contestants: Sequence[Contestant], votes: VoteFile, vote_timeout: float) -> None:
        self.contestants = contestants
        self._votes = votes
        self._vote_timeout = vote_timeout
        self._open: dict[str, OpenPair] = {}  # the oldest first
        self._gone: dict[str, Literal["voted", "expired"]] = {}  # likewise
        self._lock = threading.Lock()  # also of the file: votes are stored one after the other

    @property
    def num_votes(self) -> int:
        return self._votes.count

    def ask(self, request: ChatRequest) -> AskedPair:
        """Return the request in the terms of both engines, with random numbers of its own for each.

        Raises:
            ApiError: if there is no reply to it, or none to learn from.
        """
        if request.stream:
            raise invalid("`stream` must be false: a pair comes once both replies are complete", "stream")
        prompt = turns_of(request.messages)
        _refuse_unlearnable(prompt)
        seed = secrets.randbits(31) if request.seed is None else request.seed
        requests = [
            contestant.converter.chat(request.model_copy(update={"seed": seed ^ number}))
            for number, contestant in enumerate(self.contestants)
        ]
        return AskedPair(prompt, requests, request.stop)

    def offer(self, asked: AskedPair, replies: Sequence[Reply], texts: Sequence[str]) -> Json:
        """Open a pair for its vote, the replies in random order, and return it as it is shown."""
        sides = [Side(*parts) for parts in zip(texts, replies, self.contestants, strict=True)]
        left = secrets.randbelow(2)
        pair = OpenPair(asked, sides[left], sides[1 - left], time.monotonic() + self._vote_timeout)
        with self._lock:
            self._open[asked.id] = pair
            self._expire()
        return {
            "id": asked.id,
            "object": "pair",
            "created": int(time.time()),
            "left": pair.left.offered(),
            "right": pair.right.offered(),
            "dropped_turns": max(request.prompt.dropped_turns for request in asked.requests),
            "votes": self.num_votes,
        }

    def vote(self, request: VoteRequest) -> Json:
        """Store a vote, once it is on the disk, and return how many there are.

        Raises:
            ApiError: 404, 409 or 410 if the pair is gone, 507 if the vote cannot be stored: it can then be cast again.
        """
        with self._lock:
            self._expire()
            pair = self._open.get(request.pair)
            if pair is None:
                raise _gone(self._gone.get(request.pair))
            try:
                self._votes.append(pair.record(request.vote))
            except (OSError, ValueError) as error:
                log.error("a vote could not be stored: %s", error)
                raise ApiError(
                    507,
                    "the vote could not be stored, as the server's disk is full or fails: vote again later",
                    "vote_not_stored",
                ) from None
            self._close(request.pair, "voted")
            return {"object": "vote", "pair": request.pair, "votes": self.num_votes}

    def _expire(self) -> None:
        for id, pair in list(self._open.items()):
            if len(self._open) <= MOST_OPEN and time.monotonic() < pair.deadline:
                return
            self._close(id, "expired")

    def _close(self, id: str, fate: Literal["voted", "expired"]) -> None:
        del self._open[id]
        self._gone[id] = fate
        if len(self._gone) > MOST_REMEMBERED:
            del self._gone[next(iter(self._gone))]


def _refuse_unlearnable(prompt: Sequence[Turn]) -> None:
    """Raise ApiError unless training reads the whole prompt, as it stands."""
    said = prompt[1:] if prompt[0][0] == "system" else prompt
    roles = [role for role, _ in said]
    if not said or roles[-1] != "user":
        raise invalid("`messages` must end with the user's, to which both models reply", "messages")
    if roles[0] != "user" or "system" in roles or not all(text for _, text in prompt):
        message = "`messages` must open with the user's, behind a system text at most, and hold no empty one"
        raise invalid(f"{message}: they are to be training data", "messages")


def _gone(fate: str | None) -> ApiError:
    if fate == "voted":
        return ApiError(409, "this pair has been voted on already", "pair_already_voted", "pair")
    if fate == "expired":
        return ApiError(410, "this pair has waited too long for its vote: ask for another", "pair_expired", "pair")
    return ApiError(404, "there is no such pair here: ask for another", "pair_not_found", "pair")
