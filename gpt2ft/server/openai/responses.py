"""What replies look like in OpenAI's terms, whole and in pieces."""

import secrets
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from gpt2ft.server.engine import Delta, Reply

Json = dict[str, Any]
Shape = Literal["chat", "text"]


@dataclass(frozen=True)
class ResponseBuilder:
    """What all pieces of one answer say.

    `dropped_turns`, how many of the oldest turns did not fit the context, is our own.
    """

    kind: Shape
    model: str
    fingerprint: str  # of the weights
    includes_usage: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def full_id(self) -> str:
        return {"chat": "chatcmpl-", "text": "cmpl-"}[self.kind] + self.id

    def whole(self, reply: Reply, text: str) -> Json:
        content: Json = {"text": text} if self.kind == "text" else {"message": {"role": "assistant", "content": text}}
        return self._object(is_piece=False) | {
            "choices": [_choice(content, reply.finish)],
            "usage": usage(reply),
            "dropped_turns": reply.order.prompt.dropped_turns,
        }

    def opening(self, reply: Reply) -> Json:
        """The first piece, before there is any text."""
        delta = {"role": "assistant", "content": ""}
        return self._piece(delta, None) | {"dropped_turns": reply.order.prompt.dropped_turns}

    def pieces(self, news: Delta) -> list[Json]:
        """A piece for the text, and one for how it ended: as clients know it."""
        pieces = [self._piece({"content": news.text}, None)] if news.text else []
        return [*pieces, self._piece({}, news.finish)] if news.finish else pieces

    def closing(self, reply: Reply) -> list[Json]:
        """The usage, if it was asked for."""
        if not self.includes_usage:
            return []
        return [self._object(is_piece=True) | {"choices": [], "usage": usage(reply)}]

    def _piece(self, delta: Json, finish: str | None) -> Json:
        content = {"text": delta.get("content", "")} if self.kind == "text" else {"delta": delta}
        piece = self._object(is_piece=True) | {"choices": [_choice(content, finish)]}
        return piece | {"usage": None} if self.includes_usage else piece

    def _object(self, is_piece: bool) -> Json:
        kind = "text_completion" if self.kind == "text" else "chat.completion" + ".chunk" * is_piece
        return {
            "id": self.full_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def _choice(content: Json, finish: str | None) -> Json:
    return {"index": 0, **content, "logprobs": None, "finish_reason": finish}


def usage(reply: Reply) -> Json:
    prompt, completion = len(reply.order.prompt.ids), reply.tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def model_object(name: str, created: int) -> Json:
    return {"id": name, "object": "model", "created": created, "owned_by": "gpt2ft"}
