"""Conversations that every model has: the same prompts, below its own earlier replies, by greedy decoding."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt2ft.errors import SettingsError
from gpt2ft.inference.decoder import Decoder, suppressed_token_mask
from gpt2ft.inference.generate import generate
from gpt2ft.inference.prompt_format import TooLong, Turn, chat_prompt, prompt_format_for, prompt_limit, reply_text
from gpt2ft.model.gpt2 import GPT2
from gpt2ft.report.replies import Exchange
from gpt2ft.report.schema import Reply
from gpt2ft.text.tokenizer import ChatTokenizer

MAX_SEQUENCES = 16  # prompts that are answered together

Answer = Callable[[Sequence[Sequence[Turn]]], list[Reply]]


@dataclass(frozen=True)
class Prompt:
    """What the user says, turn by turn.

    Attributes:
        before: turns that stand above, others' replies among them.
        earlier: words of an earlier turn, one of which the last reply should hold; the turn itself has none of them.
    """

    turns: tuple[str, ...]
    before: tuple[Turn, ...] = ()
    earlier: tuple[str, ...] = ()


def read_prompts(file: Path) -> list[Prompt]:
    """Read prompts: a line of text each, or of .jsonl a string or {"turns": [...], "earlier": [...]}.

    Raises:
        SettingsError: naming the line that holds no prompt.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # JSON may hold other ends of lines
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"`prompts` = {file} cannot be read: {error}") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                prompts.append(_prompt(json.loads(line) if file.suffix == ".jsonl" else line.strip()))
            except (ValueError, TypeError, RecursionError) as error:
                raise SettingsError(
                    f'{file}, line {number}: a prompt must be a string or {{"turns": ["...", ...]}}, and "earlier" may '
                    f"hold words of an earlier turn ({error})"
                ) from error
    if not prompts:
        raise SettingsError(f"`prompts` = {file} must hold prompts, but holds none")
    return prompts


def _prompt(value: object) -> Prompt:
    record = {"turns": [value]} if isinstance(value, str) else dict(value)
    turns, earlier = record.pop("turns", ()), record.pop("earlier", ())
    for texts in (turns, earlier):
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"found {texts!r}")
        "".join(texts).encode()  # halves of surrogate pairs are no text
    if record or not turns:
        raise ValueError(f"found {', '.join(record) or 'no turn'}")
    return Prompt(tuple(turns), earlier=tuple(earlier))


def converse(answer: Answer, prompts: Sequence[Prompt]) -> list[list[Reply]]:
    """Return the replies of a model to every turn of every prompt."""
    said: list[list[Turn]] = [list(prompt.before) for prompt in prompts]
    replies: list[list[Reply]] = [[] for _ in prompts]
    for turn in range(max((len(prompt.turns) for prompt in prompts), default=0)):
        asked = [number for number, prompt in enumerate(prompts) if turn < len(prompt.turns)]
        for number in asked:
            said[number].append(("user", prompts[number].turns[turn]))
        for number, reply in zip(asked, answer([said[number] for number in asked]), strict=True):
            said[number].append(("assistant", reply["text"]))
            replies[number].append(reply)
    return replies


def exchanges(
    prompts: Sequence[Prompt], replies: Sequence[Sequence[Reply]], topic: tuple[str, ...] = ()
) -> list[Exchange]:
    """Return every turn with its reply, to be measured."""
    found = []
    for prompt, said in zip(prompts, replies, strict=True):
        for number, (turn, reply) in enumerate(zip(prompt.turns, said, strict=True), start=1):
            earlier = prompt.earlier if number == len(prompt.turns) else ()
            found.append(Exchange(turn, reply["text"], reply["stopped"], earlier, topic))
    return found


def fits(prompt: Prompt, gpt2: GPT2, tokenizer: ChatTokenizer, max_new_tokens: int) -> bool:
    """Return True if the first turn of a prompt fits a model's context, if need be without what stands above it."""
    turns = [*prompt.before, ("user", prompt.turns[0])]
    try:
        chat_prompt(prompt_format_for(tokenizer), turns, prompt_limit(gpt2.config.n_positions, max_new_tokens))
    except TooLong:
        return False
    return True


def greedy(
    gpt2: GPT2, tokenizer: ChatTokenizer, max_new_tokens: int, advance: Callable[[], object] = lambda: None
) -> Answer:
    """Return the function that answers conversations, in the chat template if the model was trained with it.

    It calls `advance` after each reply.
    It raises ValueError if the model's logits are not finite, and SettingsError if a prompt does not fit the context.
    """
    prompt_format = prompt_format_for(tokenizer)
    limit = prompt_limit(gpt2.config.n_positions, max_new_tokens)
    suppressed = suppressed_token_mask(tokenizer, gpt2.wte.weight, prompt_format.stop_ids)

    def answer(conversations: Sequence[Sequence[Turn]]) -> list[Reply]:
        try:
            ids = [chat_prompt(prompt_format, turns, limit).ids for turns in conversations]
        except TooLong as error:
            raise SettingsError(f"`prompts` must fit the context of every model: {error}") from error
        decoder = Decoder(gpt2, prompt_format.stop_ids, suppressed, min(len(ids), MAX_SEQUENCES))
        said = [
            reply_text(tokenizer, prompt_format, each.ids, each.stopped)
            for each in generate(decoder, ids, max_new_tokens, advance=advance)
        ]
        return [{"text": text, "stopped": stopped} for text, stopped in said]

    return answer
