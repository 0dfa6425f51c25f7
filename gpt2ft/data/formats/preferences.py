"""Preferences: replies to one prompt, some better than others.

    chosen/rejected    {prompt, chosen, rejected}, each text or a list of messages; without `prompt`, or with it, both
                       may be whole conversations that share all but their last turn: as lists, or as HH-RLHF's
                       transcripts, "\\n\\nHuman: ... \\n\\nAssistant: ..."
    completions        {instruction, completions: [{response, overall_score}, ...]}, the original UltraFeedback

A record becomes a tree: the prompt, and the replies below it in the order of their ranks. Of completions, those of
equal score share a rank; so do `chosen` and `rejected` where `score_chosen` and `score_rejected` are equal. To each
conversation apply the rules of `turns`, so of a prompt that ends in an assistant turn the reply goes on with that turn.
"""

import math
import re
from collections.abc import Callable, Sequence

from gpt2ft.conversation import Message, MessageTree, Role, tidy
from gpt2ft.data.formats.messages import chat_messages
from gpt2ft.data.formats.turns import Format, Turns, clean, content_id, joined, with_system_turn
from gpt2ft.data.reading import Malformed, ReadContext, Record, objects, show, value

Transcript = tuple[Turns, int | None]  # a conversation that ends in a reply, and the rank of that reply

_SPEAKERS: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):|Human:.*\n\nAssistant:\s*\Z", re.DOTALL)  # or a stripped prompt
_ANY_REPLY: tuple[Role, str] = ("assistant", "any reply")


def preferences(transcripts: Callable[[Record], list[Transcript]]) -> Callable[..., MessageTree | None]:
    """Return the function that makes a tree of a record's prompt and replies, or None if they do not belong together.

    Args:
        transcripts: reads every reply with all that stands before it, or raises Malformed.
    """

    def tree(record: Record, where: str, context: ReadContext) -> MessageTree | None:
        found = transcripts(record)
        conversations = [with_system_turn(record, turns) for turns, _ in found]
        read = _messages_in(conversations)
        context.totals.trees += 1
        context.totals.messages += read
        conversations = [joined(turns) for turns in conversations]
        prompt = conversations[0][:-1]
        if any(turns[-1][0] != "assistant" for turns in conversations):
            context.dropped["does not end in a reply"] += read
            return None
        if any(turns[:-1] != prompt for turns in conversations):
            context.dropped["prompts that differ"] += read
            return None
        context.dropped["joined to the turn above"] += read - len(prompt) - len(conversations)
        kept = clean([*prompt, _ANY_REPLY], context)
        if kept[-1:] != [_ANY_REPLY]:
            context.dropped["below a dropped message"] += len(conversations) - 1
            context.dropped["in no pair"] += len(kept)
            return None
        replies = [(turns[-1][1], rank) for turns, (_, rank) in zip(conversations, found, strict=True)]
        context.dropped["empty"] += sum(not text for text, _ in replies)
        return _tree(kept[:-1], [reply for reply in replies if reply[0]], context.source)

    return tree


def _messages_in(transcripts: Sequence[Turns]) -> int:
    """Count the messages of some transcripts, once those that all open with; each has at least one of its own."""
    shared = 0
    for turns in zip(*(turns[:-1] for turns in transcripts), strict=False):
        if any(turn != turns[0] for turn in turns):
            break
        shared += 1
    return shared + sum(len(turns) - shared for turns in transcripts)


def _tree(prompt: Turns, replies: Sequence[tuple[str, int | None]], source: str) -> MessageTree:
    messages = [Message(role, text, index - 1 if index else None) for index, (role, text) in enumerate(prompt)]
    ordered = sorted(replies, key=lambda reply: (reply[1] is None, reply[1]))
    messages += [Message("assistant", text, len(prompt) - 1, rank) for text, rank in ordered]
    return MessageTree(content_id(prompt), source, tuple(messages))


def _chosen_and_rejected(record: Record) -> list[Transcript]:
    found = [_transcript(record, key) for key in ("chosen", "rejected")]
    scores = [record.get(f"score_{key}") for key in ("chosen", "rejected")]
    is_tie = scores[0] is not None and scores[0] == scores[1]
    return [(found[0], 0), (found[1], 0 if is_tie else 1)]


def _transcript(record: Record, key: str) -> Turns:
    """Return the prompt and one reply, wherever the prompt stands."""
    turns = _turns(record, key, "assistant")
    if not turns:
        raise Malformed(f"`{key}` must hold messages, but is empty")
    if all(role == "assistant" for role, _ in turns):
        return [*_prompt(record, key), *turns]
    prompt = record.get("prompt")
    if isinstance(prompt, str) and any(role == "user" and tidy(text) == tidy(prompt) for role, text in turns):
        return turns
    if isinstance(prompt, str) and not _TRANSCRIPT.match(prompt):
        raise Malformed(f"`{key}` must hold the text of `prompt` as a user turn, but does not")
    opening = _opening(record, "prompt") if prompt is not None else []
    if turns[: len(opening)] != opening:
        raise Malformed(f"`{key}` must go on from the turns in `prompt`, but does not")
    return turns


def _turns(record: Record, key: str, role: Role) -> list[tuple[Role, str]]:
    """Return the turns under `key`: messages, a transcript, or one text of that role."""
    if isinstance(record[key], list):
        return list(chat_messages(record, key))
    text = value(record, key, str, "a string or a list of messages")
    if not _TRANSCRIPT.match(text):
        return [(role, text)]
    _, *parts = _SPEAKER.split(f"\n\n{text.lstrip()}")
    return [(_SPEAKERS[speaker], turn.strip()) for speaker, turn in zip(parts[::2], parts[1::2], strict=True)]


def _opening(record: Record, key: str) -> list[tuple[Role, str]]:
    """Return the turns of a prompt."""
    turns = _turns(record, key, "user")
    return turns[:-1] if turns[-1:] == [("assistant", "")] else turns  # "\n\nAssistant:" opens the reply


def _prompt(record: Record, key: str) -> Turns:
    """Return the turns under `prompt`, or `question` (Intel's orca_dpo_pairs), which `key` answers."""
    name = next((name for name in ("prompt", "question") if record.get(name) is not None), None)
    if name is None:
        raise Malformed(
            f"`prompt` must be given where `{key}` is a reply alone, or `{key}` must be a transcript that opens with "
            f'"\\n\\nHuman:" or a list of messages, but is {show(record[key])}'
        )
    turns = _opening(record, name)
    if not turns or turns[-1][0] != "user":
        found = f"ends in one of the role {turns[-1][0]}" if turns else "is empty"
        raise Malformed(f"`{name}` must end in a user turn where `{key}` is a reply alone, but {found}")
    return turns


def _completions(record: Record) -> list[Transcript]:
    instruction = ("user", value(record, "instruction", str, "a string"))
    replies = [(value(reply, "response", str, "a string"), _score(reply)) for reply in objects(record, "completions")]
    if not replies:
        return [([instruction], None)]  # which ends in no reply
    order = sorted({score for _, score in replies if score is not None}, reverse=True)
    ranks = [None if score is None else order.index(score) for _, score in replies]
    return [([instruction, ("assistant", text)], rank) for (text, _), rank in zip(replies, ranks, strict=True)]


def _score(reply: Record) -> float | None:
    """Return None where it is missing, which tables and JSON may write as NaN."""
    score = reply.get("overall_score")
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
        raise Malformed(f"`overall_score` must be a number or null, but is {show(score)}")
    return None if score is None or math.isnan(score) else score


CHOSEN_REJECTED = Format(
    "`chosen`/`rejected` preferences",
    ("chosen", "rejected"),
    preferences(_chosen_and_rejected),
    also=("prompt", "question", "score_chosen", "score_rejected"),
)
COMPLETIONS = Format("`completions` with scores", ("instruction", "completions"), preferences(_completions))
