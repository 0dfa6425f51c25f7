"""The requests of OpenAI's API, as far as one model serves them.

Every parameter is obeyed or refused by name, but for those of `ParametersWithoutEffect`. Those that we have nothing for
are accepted where they ask for what happens anyway (`NEUTRAL_VALUES`): `n` = 1, `tools` = [] and so on.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from gpt2ft.conversation import TURN_ROLES, tidy
from gpt2ft.inference.prompt_format import Turn
from gpt2ft.server.errors import ApiError, invalid
from gpt2ft.server.openai.strict_json import TOO_DEEP, no_json, read_object

# The values of parameters that ask for what happens anyway.
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
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "audio": (),
    "moderation": (),
    "prediction": (),
    "web_search_options": (),
}
NEUTRAL_IN_MESSAGES: dict[str, tuple[Any, ...]] = {  # what clients send back of replies
    "audio": (),
    "function_call": (),
    "refusal": ("",),
    "tool_calls": ([],),
    "annotations": ([],),
}
MAX_STOP_LENGTH = 200  # characters
INT64 = 2**63


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, given: Any) -> Any:
        """Drop what is null: that is as good as absent, but for what must be given."""
        if not isinstance(given, dict):
            return given
        needed = {name for name, field in cls.model_fields.items() if field.is_required()}
        return {name: value for name, value in given.items() if value is not None or name in needed}


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class PromptCacheOptions(Body):
    mode: Literal["implicit", "explicit"] | None = None
    ttl: Literal["30m"] | None = None


class PromptCacheBreakpoint(Body):
    mode: Literal["explicit"]
    ttl: Literal["30m", "12h"] | None = None


class TextPart(Body):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: PromptCacheBreakpoint | None = None  # it has no bearing on the reply


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _only_text(prompt: Any) -> str:
    """Return the text of a prompt, which may be the only one of a list; null is the beginning of a document."""
    text = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else "" if prompt is None else prompt
    if not isinstance(text, str):
        raise PydanticCustomError("prompt_type", "must be one text, alone or in a list")
    return text


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
StopStrings = Annotated[list[StopString], Field(max_length=4), BeforeValidator(_as_list)]  # or a single one
Content = Annotated[list[TextPart], BeforeValidator(_as_parts)]  # or a text


class ParametersWithoutEffect(Body):
    """Parameters that tell OpenAI whose a request is and what to keep of it: they have no bearing on the reply."""

    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None  # older clients have the second
    prompt_cache_options: PromptCacheOptions | None = None
    metadata: dict[str, str] | None = None


class BaseRequest(ParametersWithoutEffect):
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

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None  # the template has no place for it

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)

    @property
    def turn(self) -> Turn:
        """The message as the template has it; `developer` is OpenAI's newer name of `system`."""
        return TURN_ROLES[self.role], tidy(self.text)


class ChatRequest(BaseRequest):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


class CompletionRequest(BaseRequest):
    prompt: Annotated[str, BeforeValidator(_only_text)]


Request = TypeVar("Request", bound=BaseRequest)
Shape = TypeVar("Shape", bound=Body)


def parse(shape: type[Request], content_types: Sequence[str], body: bytes) -> Request:
    """Return the request in the body of an HTTP request.

    Args:
        content_types: all that its headers give.
    Raises:
        ApiError: if the body holds none.
    """
    given = json_body(content_types, body)
    if shape is ChatRequest and isinstance(given.get("messages"), list):
        given["messages"] = [
            _without_neutral(message, NEUTRAL_IN_MESSAGES, f"messages[{number}].")
            for number, message in enumerate(given["messages"])
        ]
    request = validated(shape, _without_neutral(given, NEUTRAL_VALUES))
    if request.includes_usage and not request.stream:
        raise invalid("`stream_options.include_usage` needs `stream` = true", "stream_options")
    return request


def json_body(content_types: Sequence[str], body: bytes) -> dict[str, Any]:
    """Return the object in the body of an HTTP request; raise ApiError if it holds none."""
    if [given.partition(";")[0].strip().lower() for given in content_types] != ["application/json"]:
        raise ApiError(415, "the Content-Type must be application/json, given once", "unsupported_media_type")
    return read_object(body)


def validated(shape: type[Shape], given: dict[str, Any]) -> Shape:
    """Return an object in its shape; raise ApiError, with the first problem, if it has another."""
    try:
        return shape.model_validate(given)
    except ValidationError as error:
        raise _first_problem(error) from None
    except RecursionError:
        raise no_json(TOO_DEEP) from None


def _without_neutral(given: Any, neutral: Mapping[str, tuple[Any, ...]], path: str = "") -> Any:
    """Drop the parameters of an object that are null or neutral; refuse those that ask for what we do not have.

    Args:
        path: of the object, before the names of its parameters.
    """
    if not isinstance(given, dict):
        return given
    for name in [name for name in neutral if name in given]:
        value, accepted = given[name], (None, *neutral[name])
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in accepted):
            only = "".join(f"{json.dumps(one)} or " for one in neutral[name])
            message = f"`{path}{name}` must be {only}left out: there is nothing else here"
            raise invalid(message, path + name, "unsupported_parameter")
    return {name: value for name, value in given.items() if name not in neutral}


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
