"""What a request may ask, in OpenAI's terms.

Everything that is asked is done or refused by name. Parameters that we have nothing for are accepted where they ask
for what happens anyway: `n` = 1, `tools` = [] and so on.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from gpt2ft.server.errors import ApiError, invalid, unfit
from gpt2ft.server.openai.strict_json import DEEP, no_json, read_object

# What each parameter must be for there to be nothing to do; null is as good as absent everywhere.
NOTHING_TO_DO: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
UNSUPPORTED = "unsupported_parameter"
LONGEST_STOP = 200  # characters
INT64 = 2**63


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class TextPart(Body):
    type: Literal["text"]
    text: str


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


StopString = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
StopStrings = Annotated[list[StopString], Field(max_length=4), BeforeValidator(_listed)]  # or one that is no list
Content = Annotated[list[TextPart], BeforeValidator(_as_parts)]  # or text


class BaseRequest(Body):
    """What both kinds of requests may ask; `top_k`, `min_p` and `repetition_penalty` are our own."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    stop: StopStrings = []
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None  # who asks: it has no bearing on the reply

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatMessage(Body):
    role: Literal["system", "user", "assistant"]
    content: Content

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)


class ChatRequest(BaseRequest):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


class CompletionRequest(BaseRequest):
    prompt: str


Kind = TypeVar("Kind", bound=BaseRequest)


def parse(kind: type[Kind], content_types: Sequence[str], body: bytes) -> Kind:
    """A request from the body of an HTTP request.

    Raises:
        ApiError: if it is not one.
    """
    if [given.partition(";")[0].strip().lower() for given in content_types] != ["application/json"]:
        raise ApiError(415, "the Content-Type must be application/json, given once", "unsupported_media_type")
    asked = read_object(body)
    if kind is ChatRequest and isinstance(asked.get("messages"), list):
        asked["messages"] = [_without_null(message) for message in asked["messages"]]
    try:
        request = kind.model_validate(_supported(asked))
    except ValidationError as error:
        raise unfit(error) from None
    except RecursionError:
        raise no_json(DEEP) from None
    if request.stream_options is not None and not request.stream:
        raise invalid("`stream_options` needs `stream` = true", "stream_options")
    return request


def _without_null(message: Any) -> Any:
    """What clients send back of our own replies: `tool_calls` = null and the like say nothing."""
    if not isinstance(message, dict):
        return message
    return {name: value for name, value in message.items() if value is not None or name in ("role", "content")}


def _supported(asked: dict[str, Any]) -> dict[str, Any]:
    """Without what is null, and without what asks for nothing; refuses what asks for something that we do not have."""
    kept = {name: value for name, value in asked.items() if value is not None}
    for name in [name for name in NOTHING_TO_DO if name in kept]:
        value, accepted = kept.pop(name), NOTHING_TO_DO[name]
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in accepted):
            only = " or ".join(json.dumps(one) for one in accepted)
            raise invalid(f"`{name}` must be {only} or left out: there is nothing else here", name, UNSUPPORTED)
    return kept
