"""Requests to the API in the engine's terms: messages become a prompt that fits, parameters override the settings."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from gpt2ft.inference.detokenizer import IncrementalDetokenizer
from gpt2ft.inference.model import InferenceModel
from gpt2ft.inference.prompt_format import TooLong, Turn
from gpt2ft.server.errors import invalid
from gpt2ft.server.openai.requests import BaseRequest, ChatMessage, ChatRequest, CompletionRequest
from gpt2ft.server.reply import GenerationRequest
from gpt2ft.settings.sections import SamplingDefaults, SamplingSettings
from gpt2ft.settings.using import ServeSettings


@dataclass(frozen=True)
class RequestConverter:
    """Makes a GenerationRequest of an API request.

    Args:
        settings: `messages` and `max_tokens`, the limits; `max_new_tokens` and the sampling where a request says
            nothing.
    """

    model: InferenceModel
    settings: ServeSettings

    @property
    def defaults(self) -> dict[str, float]:
        """The parameters where a request says nothing."""
        sampling = self.settings.model_dump(include=set(SamplingDefaults.model_fields))
        return sampling | {"max_tokens": min(self.settings.max_new_tokens, self.most_tokens)}

    @property
    def most_tokens(self) -> int:
        """The largest `max_tokens` of a request."""
        return self.settings.max_tokens or self.model.n_positions

    def chat(self, request: ChatRequest) -> GenerationRequest:
        """Raises ApiError if the messages make no conversation, or not one that fits."""
        most = self.settings.messages
        if len(request.messages) > most:
            raise invalid(f"`messages` must be at most {most}, but are {len(request.messages)}", "messages")
        turns = turns_of(request.messages)
        max_new_tokens = self._max_new_tokens(request, request.max_completion_tokens)
        with _fitting("messages"):
            prompt = self.model.chat_prompt(turns, max_new_tokens)
        detokenizer, stop_ids = self.model.chat_detokenizer(request.stop), self.model.prompt_format.stop_ids
        return GenerationRequest(prompt, self._sampling(request), max_new_tokens, tuple(stop_ids), detokenizer)

    def completion(self, request: CompletionRequest) -> GenerationRequest:
        """Raises ApiError if the prompt does not fit."""
        max_new_tokens = self._max_new_tokens(request)
        with _fitting("prompt"):
            prompt = self.model.text_prompt(request.prompt, max_new_tokens)
        tokenizer = self.model.tokenizer
        detokenizer, stop_ids = IncrementalDetokenizer(tokenizer, request.stop), (tokenizer.end_of_text_id,)
        return GenerationRequest(prompt, self._sampling(request), max_new_tokens, stop_ids, detokenizer)

    def _sampling(self, request: BaseRequest) -> SamplingSettings:
        names = set(SamplingSettings.model_fields)
        asked = request.model_dump(include=names, exclude_none=True)
        return SamplingSettings(**self.settings.model_dump(include=names) | asked)

    def _max_new_tokens(self, request: BaseRequest, max_completion_tokens: int | None = None) -> int:
        """Return `max_tokens` or its newer name, within the server's limit."""
        if max_completion_tokens is not None and request.max_tokens is not None:
            raise invalid("`max_tokens` and `max_completion_tokens` must not both be given", "max_tokens")
        name = "max_tokens" if max_completion_tokens is None else "max_completion_tokens"
        given = request.max_tokens if max_completion_tokens is None else max_completion_tokens
        if given is None:
            return int(self.defaults["max_tokens"])
        if given > self.most_tokens:
            raise invalid(f"`{name}` must be at most {self.most_tokens}, but is {given}", name)
        return given


def turns_of(messages: Sequence[ChatMessage]) -> list[Turn]:
    """Return the conversation; messages of one role in a row are joined by a blank line, as in training.

    Turns stay in the order in which they are given: the template renders any.

    Raises:
        ApiError: if there is none but empty system messages.
    """
    turns: list[Turn] = []
    for role, text in (message.turn for message in messages):
        if turns and turns[-1][0] == role:
            turns[-1] = (role, "\n\n".join(part for part in (turns[-1][1], text) if part))
        elif (role, text) != ("system", ""):
            turns.append((role, text))
    if not turns:
        raise invalid("`messages` must hold more than an empty system message", "messages")
    return turns


@contextmanager
def _fitting(param: str) -> Iterator[None]:
    """Turn the refusal of a text into that of a parameter."""
    try:
        yield
    except TooLong as error:
        raise invalid(f"{error}: shorten it", param, "context_length_exceeded") from None
    except ValueError as error:
        raise invalid(str(error), param) from None
