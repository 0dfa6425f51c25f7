"""The requests of OpenAI's API, as far as one model serves them.

Every parameter is obeyed or refused by name. Those that we have nothing for are accepted where they ask for what
happens anyway: `n` = 1, `tools` = [] and so on.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from gpt2ft.server.errors import ApiError, invalid
from gpt2ft.server.openai.strict_json import TOO_DEEP, no_json, read_object

# The values of parameters that ask for what happens anyway; null is as good as absent everywhere.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
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
MAX_STOP_LENGTH = 200  # characters
INT64 = 2**63


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class TextPart(Body):
    type: Literal["text"]
    text: str


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
StopStrings = Annotated[list[StopString], Field(max_length=4), BeforeValidator(_as_list)]  # or a single one
Content = Annotated[list[TextPart], BeforeValidator(_as_parts)]  # or a text


class BaseRequest(Body):
    """The parameters of both kinds of requests; `top_k`, `min_p` and `repetition_penalty` are our own."""

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
    user: str | None = None  # it has no bearing on the reply

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


Shape = TypeVar("Shape", bound=BaseRequest)


def parse(shape: type[Shape], content_types: Sequence[str], body: bytes) -> Shape:
    """Return the request in the body of an HTTP request.

    Args:
        content_types: all that its headers give.
    Raises:
        ApiError: if the body holds none.
    """
    if [given.partition(";")[0].strip().lower() for given in content_types] != ["application/json"]:
        raise ApiError(415, "the Content-Type must be application/json, given once", "unsupported_media_type")
    given = read_object(body)
    if shape is ChatRequest and isinstance(given.get("messages"), list):
        given["messages"] = [_without_null(message) for message in given["messages"]]
    try:
        request = shape.model_validate(_without_neutral(given))
    except ValidationError as error:
        raise _first_problem(error) from None
    except RecursionError:
        raise no_json(TOO_DEEP) from None
    if request.stream_options is not None and not request.stream:
        raise invalid("`stream_options` needs `stream` = true", "stream_options")
    return request


def _without_null(message: Any) -> Any:
    """Drop what clients send back of our own replies: `tool_calls` = null and the like say nothing."""
    if not isinstance(message, dict):
        return message
    return {name: value for name, value in message.items() if value is not None or name in ("role", "content")}


def _without_neutral(given: dict[str, Any]) -> dict[str, Any]:
    """Drop parameters that are null or neutral; refuse those that ask for something that we do not have."""
    kept = {name: value for name, value in given.items() if value is not None}
    for name in [name for name in NEUTRAL_VALUES if name in kept]:
        value, accepted = kept.pop(name), NEUTRAL_VALUES[name]
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in accepted):
            only = " or ".join(json.dumps(one) for one in accepted)
            message = f"`{name}` must be {only} or left out: there is nothing else here"
            raise invalid(message, name, "unsupported_parameter")
    return kept


def _first_problem(error: ValidationError) -> ApiError:
    """Return the first problem of a request, without what the request holds."""
    problem = error.errors(include_input=False, include_url=False, include_context=False)[0]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"])
    param = path.removeprefix(".")  # such as messages[0].content
    if problem["type"] == "extra_forbidden":
        return invalid(f"there is no parameter `{param}` here: leave it out", param, "unknown_parameter")
    if problem["type"] == "missing":
        return invalid(f"`{param}` must be given", param, "missing_required_parameter")
    return invalid(f"`{param}`: {problem['msg'][0].lower()}{problem['msg'][1:]}", param)
