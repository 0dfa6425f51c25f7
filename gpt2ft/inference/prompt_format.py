"""From a conversation to a prompt: rendered as the model knows it, and made to fit its context."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from gpt2ft.conversation import Role
from gpt2ft.text.context import kept_turns
from gpt2ft.text.template import render_prompt, render_turn
from gpt2ft.text.tokenizer import ChatTokenizer
from gpt2ft.wording import counted

Turn = tuple[Role, str]


class PromptFormat(Protocol):
    """A way to render turns as a prompt, and the end of a reply to it.

    Attributes:
        generation_prompt: the ids after the turns, which ask for the reply.
        stop_ids, stop_strings: end a reply and are not part of it.
        strips_leading_space: white space at the beginning of a reply belongs to the format, not to the reply.
    """

    generation_prompt: list[int]
    stop_ids: list[int]
    stop_strings: tuple[str, ...]
    strips_leading_space: bool

    def render(self, turns: Sequence[Turn]) -> list[list[int]]:
        """The ids of each turn."""


class ChatPromptFormat:
    """The chat template, for models that were trained with it."""

    stop_strings = ()
    strips_leading_space = False

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self.generation_prompt = render_prompt(tokenizer, [])
        self.stop_ids = [tokenizer.end_id, tokenizer.end_of_text_id]

    def render(self, turns: Sequence[Turn]) -> list[list[int]]:
        return [render_turn(self._tokenizer, role, text) for role, text in turns]


class PlainPromptFormat:
    """Turns as plain text, for base models, whose chat tokens mean nothing yet. Unlike the template, text can forge it.

    Answer in rhyme.

    User: What is tea?
    Assistant: A friend to me.
    User: And cold?
    Assistant:
    """

    stop_strings = ("\nUser:",)
    strips_leading_space = True  # a word has its space before it: "Assistant: A" is "Assistant", ":", " A"

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self.generation_prompt = tokenizer.encode("Assistant:")
        self.stop_ids = [tokenizer.end_of_text_id]

    def render(self, turns: Sequence[Turn]) -> list[list[int]]:
        before = {"system": "", "user": "User: ", "assistant": "Assistant: "}
        after = {"system": "\n\n", "user": "\n", "assistant": "\n"}
        return [self._tokenizer.encode(before[role] + text + after[role]) for role, text in turns]


def prompt_format_for(tokenizer: ChatTokenizer) -> PromptFormat:
    """The chat template if the model was trained with its tokens, plain text if not."""
    return ChatPromptFormat(tokenizer) if tokenizer.has_chat_tokens else PlainPromptFormat(tokenizer)


@dataclass(frozen=True)
class Prompt:
    """The ids that the model continues; `dropped_turns` of the oldest turns had to give way."""

    ids: list[int]
    dropped_turns: int = 0


class TooLong(ValueError):
    """A text that cannot be made to fit. The message says what must hold and what was found, not what to do."""


def prompt_limit(n_positions: int, max_new_tokens: int) -> int:
    """Tokens that a prompt may have: the reply is left `max_new_tokens`, but at most a quarter of the context."""
    return n_positions - min(max_new_tokens, n_positions // 4)


def chat_prompt(prompt_format: PromptFormat, turns: Sequence[Turn], limit: int) -> Prompt:
    """Ask for a reply to `turns`, within `limit` tokens.

    Raises:
        TooLong: if not even the user's last message, and what follows it, fits beside the system text.
    """
    rendered = prompt_format.render(turns)
    lengths = [len(ids) for ids in rendered]
    room = limit - len(prompt_format.generation_prompt)
    kept = kept_turns([role for role, _ in turns], lengths, room)
    if kept is None:
        first = 1 if turns[0][0] == "system" and len(turns) > 1 else 0
        beside = f" beside the system text of {lengths[0]}" if first else ""
        last = max((turn for turn, (role, _) in enumerate(turns) if role == "user"), default=first)
        fitting = max(0, room - sum(lengths[:first]))
        raise TooLong(
            f"a message must have at most {counted(fitting, 'token')}{beside}, but this one has {sum(lengths[last:])}"
        )
    return Prompt(
        [*(id for turn in kept for id in rendered[turn]), *prompt_format.generation_prompt], len(turns) - len(kept)
    )


def text_prompt(tokenizer: ChatTokenizer, text: str, limit: int) -> Prompt:
    """The beginning of a document, within `limit` tokens.

    Raises:
        TooLong: if it has more.
    """
    ids = tokenizer.encode(text) or [tokenizer.end_of_text_id]
    if len(ids) > limit:
        raise TooLong(f"the text must have at most {counted(limit, 'token')}, but has {len(ids)}")
    return Prompt(ids)


def reply_text(
    tokenizer: ChatTokenizer, prompt_format: PromptFormat, ids: Sequence[int], stopped: bool
) -> tuple[str, bool]:
    """Return the text of a whole reply up to what ends it, and True if something did."""
    text = tokenizer.decode(list(ids))
    text = text.lstrip() if prompt_format.strips_leading_space else text
    for stop in prompt_format.stop_strings:
        text, found, _ = text.partition(stop)
        stopped = stopped or bool(found)
    return text, stopped
