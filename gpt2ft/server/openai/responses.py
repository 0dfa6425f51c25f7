"""Replies, errors and the model in OpenAI's shapes.

{"error": {"message": "`n` must be 1 ...", "type": "invalid_request_error", "param": "n", "code": "..."}}
"""

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gpt2ft.inference.decoder import FinishReason
from gpt2ft.server.errors import ApiError
from gpt2ft.server.reply import Delta, Reply

Json = dict[str, Any]
Kind = Literal["chat", "text"]


@dataclass(frozen=True)
class ServedModel:
    """The model as clients know it.

    Args:
        fingerprint: of its weights.
        created: when it was loaded, in seconds since 1970.
        defaults: what holds where a request says nothing, by the names of its parameters.
        limits: the most that it may ask for, likewise.
    """

    name: str
    fingerprint: str
    created: int
    defaults: Mapping[str, float]
    limits: Mapping[str, float]

    @classmethod
    def now(cls, name: str, digest: str, defaults: Mapping[str, float], limits: Mapping[str, float]) -> "ServedModel":
        return cls(name, f"fp_{digest[:10]}", int(time.time()), defaults, limits)

    def refuse_another(self, name: str | None) -> None:
        """Raise ApiError if a request names another model; one that names none means this one."""
        if name not in (None, self.name):
            raise ApiError(404, f"there is no such model here: this is `{self.name}`", "model_not_found", "model")

    def describe(self) -> Json:
        """Return the model in OpenAI's shape; `defaults` and `limits` are our own."""
        openai = {"id": self.name, "object": "model", "created": self.created, "owned_by": "gpt2ft"}
        return openai | {"defaults": self.defaults, "limits": self.limits}


@dataclass(frozen=True)
class OpenAIResponseBuilder:
    """Writes one reply, whole or in chunks, with what all its chunks repeat.

    `dropped_turns`, the number of oldest turns that did not fit the context, and `tokens_per_second` are our own.
    """

    kind: Kind
    model: ServedModel
    includes_usage: bool = False
    unique: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def id(self) -> str:
        return {"chat": "chatcmpl-", "text": "cmpl-"}[self.kind] + self.unique

    def headers(self, reply: Reply) -> dict[str, str]:
        return {"x-request-id": self.id, "x-dropped-turns": str(reply.request.prompt.dropped_turns)}

    def whole(self, reply: Reply, text: str) -> bytes:
        content: Json = {"text": text} if self.kind == "text" else {"message": {"role": "assistant", "content": text}}
        return dumped(
            self._object(is_chunk=False)
            | {
                "choices": [_choice(content, reply.finish_reason)],
                "usage": _usage(reply),
                "dropped_turns": reply.request.prompt.dropped_turns,
                **_speed(reply),
            }
        )

    def opening(self, reply: Reply) -> list[bytes]:
        """Return the first chunk, before there is any text."""
        chunk = self._chunk({"role": "assistant", "content": ""}, None)
        return [dumped(chunk | {"dropped_turns": reply.request.prompt.dropped_turns})]

    def chunks(self, reply: Reply, delta: Delta) -> list[bytes]:
        """Return a chunk for the text, one for the end, one for the usage if it was asked for, and the closing word.

        A reply that failed ends with the error and without that word, which is how clients tell.
        """
        chunks = [self._chunk({"content": delta.text}, None)] if delta.text else []
        if delta.failure:
            chunks.append(error_object(delta.failure))
        if delta.finish_reason:
            chunks.append(self._chunk({}, delta.finish_reason) | _speed(reply))
            if self.includes_usage:
                chunks.append(self._object(is_chunk=True) | {"choices": [], "usage": _usage(reply)})
        return [*map(dumped, chunks), *([b"[DONE]"] if delta.finish_reason else [])]

    def _chunk(self, delta: Json, finish_reason: FinishReason | None) -> Json:
        content = {"text": delta.get("content", "")} if self.kind == "text" else {"delta": delta}
        chunk = self._object(is_chunk=True) | {"choices": [_choice(content, finish_reason)]}
        return chunk | {"usage": None} if self.includes_usage else chunk

    def _object(self, is_chunk: bool) -> Json:
        kind = "text_completion" if self.kind == "text" else "chat.completion" + ".chunk" * is_chunk
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": self.model.fingerprint,
        }


def _choice(content: Json, finish_reason: FinishReason | None) -> Json:
    return {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}


def _usage(reply: Reply) -> Json:
    prompt, completion = len(reply.request.prompt.ids), reply.num_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _speed(reply: Reply) -> Json:
    return {"tokens_per_second": reply.tokens_per_second and round(reply.tokens_per_second, 2)}


def error_object(error: ApiError) -> Json:
    kind = {429: "rate_limit_error"}.get(
        error.status, "server_error" if error.status >= 500 else "invalid_request_error"
    )
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def render_error(error: ApiError) -> bytes:
    """Return the body of a response that is an error."""
    return dumped(error_object(error))


def dumped(content: Json) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
