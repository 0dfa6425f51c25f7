"""What a request may ask, in OpenAI's terms, and what that means for the model.

Everything that is asked is done or refused by name. Parameters that we have nothing for are accepted where they ask
for what happens anyway: `n` = 1, `tools` = [] and so on.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from gpt2ft.conversation import tidy
from gpt2ft.inference.frame import Frame, TooLong, Turn, chat_prompt, prompt_limit, text_prompt
from gpt2ft.inference.sampling import Sampling
from gpt2ft.inference.text_stream import ReplyText
from gpt2ft.serving.engine import Order
from gpt2ft.serving.errors import ApiError, invalid, spelled, unfit
from gpt2ft.text.tokenizer import ChatTokenizer

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
JSON = "invalid_json"
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


class Asked(Body):
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


class ChatRequest(Asked):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


class CompletionRequest(Asked):
    prompt: str


Kind = TypeVar("Kind", bound=Asked)


@dataclass(frozen=True)
class Limits:
    """Of one request. `max_new_tokens` is what it gets without asking."""

    messages: int
    max_tokens: int
    max_new_tokens: int


def parse(kind: type[Kind], content_types: Sequence[str], body: bytes) -> Kind:
    """A request from the body of an HTTP request.

    Raises:
        ApiError: if it is not one.
    """
    if [given.partition(";")[0].strip().lower() for given in content_types] != ["application/json"]:
        raise ApiError(415, "the Content-Type must be application/json, given once", "unsupported_media_type")
    asked = _object(body)
    if kind is ChatRequest and isinstance(asked.get("messages"), list):
        asked["messages"] = [_without_null(message) for message in asked["messages"]]
    try:
        request = kind.model_validate(_supported(asked))
    except ValidationError as error:
        raise unfit(error) from None
    except RecursionError:
        raise invalid("the body must not be nested this deeply", None, JSON) from None
    if request.stream_options is not None and not request.stream:
        raise invalid("`stream_options` needs `stream` = true", "stream_options")
    return request


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique)
        if b"\\u" in body:
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise invalid("the body must hold whole characters, but one is half a surrogate pair", None, JSON) from None
    except UnicodeDecodeError as error:
        raise invalid(f"the body must be UTF-8, but is not from byte {error.start} on", None, JSON) from None
    except RecursionError:
        raise invalid("the body must not be nested this deeply", None, JSON) from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise invalid(f"the body must be JSON, but is not: {error.msg} at {place}", None, JSON) from None
    except ValueError as error:  # a number of thousands of digits
        raise invalid(f"the body must be JSON that can be read: {error}", None, JSON) from None
    if not isinstance(found, dict):
        raise invalid("the body must be a JSON object", None, JSON)
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise invalid(f"the body must be JSON, which knows no {name}", None, JSON)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise invalid("the body must name each parameter once", None, JSON)
    return found


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


@dataclass(frozen=True)
class Interpreter:
    """Makes orders of requests.

    Args:
        n_positions: the context of the model.
        sampling: what holds where a request says nothing.
    """

    tokenizer: ChatTokenizer
    frame: Frame
    n_positions: int
    sampling: Sampling
    limits: Limits

    def chat(self, request: ChatRequest) -> Order:
        """Raises ApiError if the messages make no conversation, or not one that fits."""
        if len(request.messages) > self.limits.messages:
            raise invalid(
                f"`messages` must be at most {self.limits.messages}, but are {len(request.messages)}", "messages"
            )
        turns = turns_of(request.messages)
        most = self._max_new_tokens(request, request.max_completion_tokens)
        try:
            prompt = chat_prompt(self.frame, turns, prompt_limit(self.n_positions, most))
        except ValueError as error:
            raise _too_long(error, "messages") from None
        frame = self.frame
        text = ReplyText(self.tokenizer, (*frame.stop_strings, *request.stop), frame.opens_with_space)
        return Order(prompt, self._sampling(request), most, tuple(frame.stop_ids), text)

    def completion(self, request: CompletionRequest) -> Order:
        """Raises ApiError if the prompt does not fit."""
        most = self._max_new_tokens(request)
        try:
            prompt = text_prompt(self.tokenizer, request.prompt, prompt_limit(self.n_positions, most))
        except ValueError as error:
            raise _too_long(error, "prompt") from None
        text = ReplyText(self.tokenizer, request.stop)
        return Order(prompt, self._sampling(request), most, (self.tokenizer.end_of_text_id,), text)

    def _sampling(self, request: Asked) -> Sampling:
        names = [field.name for field in fields(Sampling)]
        asked = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
        return replace(self.sampling, **asked)

    def _max_new_tokens(self, request: Asked, newer: int | None = None) -> int:
        """`max_tokens`, or `max_completion_tokens` as chats call it now."""
        if newer is not None and request.max_tokens is not None:
            raise invalid("`max_tokens` and `max_completion_tokens` must not both be given", "max_tokens")
        asked = request.max_tokens if newer is None else newer
        if asked is None:
            return min(self.limits.max_new_tokens, self.limits.max_tokens)
        if asked > self.limits.max_tokens:
            name = "max_tokens" if newer is None else "max_completion_tokens"
            raise invalid(f"`{name}` must be at most {self.limits.max_tokens}, but is {asked}", name)
        return asked


def turns_of(messages: Sequence[ChatMessage]) -> list[Turn]:
    """The conversation; messages of one role that follow each other are joined by a blank line, as in training.

    Raises:
        ApiError: if system messages stand elsewhere than first, the assistant speaks first, or the user not last.
    """
    turns: list[Turn] = []
    for number, message in enumerate(messages):
        text = tidy(message.text)
        above = turns[-1][0] if turns else None
        if message.role == above:
            turns[-1] = (above, "\n\n".join(part for part in (turns[-1][1], text) if part))
        elif (message.role == "system" and turns) or (message.role == "assistant" and above != "user"):
            param = spelled(("messages", number, "role"))
            after = f"after {above}" if above else "at the beginning"
            raise invalid(f"`{param}` must be user {after}, but is {message.role}", param)
        else:
            turns.append((message.role, text))
    if turns[-1][0] != "user":
        raise invalid(f"the last message must be the user's, but is the {turns[-1][0]}'s", "messages")
    return [turn for turn in turns if turn != ("system", "")]


def _too_long(error: ValueError, param: str) -> ApiError:
    if isinstance(error, TooLong):
        return invalid(f"{error}: shorten it", param, "context_length_exceeded")
    return invalid(str(error), param)
