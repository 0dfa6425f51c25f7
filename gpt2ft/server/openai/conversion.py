"""What a request means for the model: its messages as a prompt that fits, its parameters over the server's own."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from gpt2ft.conversation import tidy
from gpt2ft.inference.detokenizer import IncrementalDetokenizer
from gpt2ft.inference.prompt_format import PromptFormat, TooLong, Turn, chat_prompt, prompt_limit, text_prompt
from gpt2ft.inference.sampling import Sampling
from gpt2ft.server.engine import GenerationRequest
from gpt2ft.server.errors import ApiError, invalid, spelled
from gpt2ft.server.openai.requests import BaseRequest, ChatMessage, ChatRequest, CompletionRequest
from gpt2ft.text.tokenizer import ChatTokenizer


@dataclass(frozen=True)
class Limits:
    """Of one request. `max_new_tokens` is what it gets without asking."""

    messages: int
    max_tokens: int
    max_new_tokens: int


@dataclass(frozen=True)
class RequestConverter:
    """Makes orders of requests.

    Args:
        n_positions: the context of the model.
        sampling: what holds where a request says nothing.
    """

    tokenizer: ChatTokenizer
    frame: PromptFormat
    n_positions: int
    sampling: Sampling
    limits: Limits

    def chat(self, request: ChatRequest) -> GenerationRequest:
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
        text = IncrementalDetokenizer(self.tokenizer, (*frame.stop_strings, *request.stop), frame.opens_with_space)
        return GenerationRequest(prompt, self._sampling(request), most, tuple(frame.stop_ids), text)

    def completion(self, request: CompletionRequest) -> GenerationRequest:
        """Raises ApiError if the prompt does not fit."""
        most = self._max_new_tokens(request)
        try:
            prompt = text_prompt(self.tokenizer, request.prompt, prompt_limit(self.n_positions, most))
        except ValueError as error:
            raise _too_long(error, "prompt") from None
        text = IncrementalDetokenizer(self.tokenizer, request.stop)
        return GenerationRequest(prompt, self._sampling(request), most, (self.tokenizer.end_of_text_id,), text)

    def _sampling(self, request: BaseRequest) -> Sampling:
        names = [field.name for field in fields(Sampling)]
        asked = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
        return replace(self.sampling, **asked)

    def _max_new_tokens(self, request: BaseRequest, newer: int | None = None) -> int:
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
