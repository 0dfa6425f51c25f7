"""Preferences: replies to one prompt, some better than others.

    chosen/rejected    {prompt, chosen, rejected}, each text or a list of messages, the prompt by any name that it has
                       beside a single reply; without it, or with it, both may be whole conversations that share all
                       but their last turn: as lists, or as the transcripts of HH-RLHF,
                       "\\n\\nHuman: ... \\n\\nAssistant: ..."
    completions        {instruction, completions: [{response, overall_score}, ...]}, the original UltraFeedback

A record becomes a tree: the prompt, and the replies below it in the order of their ranks. Of completions, those of
equal score share a rank; so do `chosen` and `rejected` where `score_chosen` and `score_rejected` are equal. To each
conversation apply the rules of `turns`, so of a prompt that ends in an assistant turn the reply goes on with that turn.
"""

import math
import re
from collections.abc import Sequence

from gpt2ft.conversation import Message, MessageTree, Role, tidy
from gpt2ft.data.formats.chat_messages import chat_messages
from gpt2ft.data.formats.column_names import CONTEXTS, CONVERSATIONS, PROMPTS
from gpt2ft.data.formats.keys import MARKS, is_empty, refuse_fractions, refuse_unread, weight_of
from gpt2ft.data.formats.layout import Format, Transcript, count_messages
from gpt2ft.data.formats.prompt_reply import asked, contexts_of
from gpt2ft.data.formats.turns import Turn, Turns, clean, content_id, joined, messages_of
from gpt2ft.data.reading import Malformed, ReadContext, Record, objects, show, value

_SPEAKERS: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):|Human:.*\n\nAssistant:\s*\Z", re.DOTALL)  # or a stripped prompt
_ANY_REPLY = Turn("assistant", "any reply")
_RESPONSE = ("response", "overall_score")
# Of UltraFeedback's completions: how each was asked for, and what was thought of it.
_PASSED_OVER = ("custom_system_prompt", "principle", "annotations", "critique")


def _replies(found: Sequence[Transcript], context: ReadContext) -> MessageTree | None:
    """Return the tree of the prompt and the replies of a record, or None if they do not belong together."""
    refuse_fractions(turns[-1].weight for turns, _ in found)
    read = count_messages([turns for turns, _ in found])
    conversations = [joined(turns) for turns, _ in found]
    prompt = conversations[0][:-1]
    if any(turns[-1].role != "assistant" for turns in conversations):
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
    replies = []
    for turns, (_, rank) in zip(conversations, found, strict=True):
        if not turns[-1].text:
            context.dropped["empty"] += 1
        elif context.filters.max_rank is not None and (rank or 0) > context.filters.max_rank:
            context.dropped["rank above limit"] += 1
        else:
            replies.append((turns[-1], rank))
    return _tree(kept[:-1], replies, context.source)


def _tree(prompt: Turns, replies: Sequence[tuple[Turn, int | None]], source: str) -> MessageTree:
    ordered = sorted(replies, key=lambda reply: (reply[1] is None, reply[1]))
    below = [Message("assistant", reply.text, len(prompt) - 1, rank, reply.weight) for reply, rank in ordered]
    return MessageTree(content_id(prompt), source, (*messages_of(prompt), *below))


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
    turns = [*_unmarked(turns[:-1]), turns[-1]]
    if all(turn.role == "assistant" for turn in turns):
        return [*_prompt(record, key), *turns]
    name = _prompt_name(record)
    if name is None or name in CONVERSATIONS:  # which have to repeat turns
        return turns
    if isinstance(record[name], str):
        prompt = tidy(asked(record, name))
        if any(role == "user" and tidy(text) == prompt for role, text, _ in turns):
            return turns
        if _is_text(record, name):
            raise Malformed(f"`{key}` must hold the text of `{name}` as a user turn, but does not")
    opening = _opening(record, name)
    if turns[: len(opening)] != opening:
        raise Malformed(f"`{key}` must go on from the turns in `{name}`, but does not")
    return turns


def _prompt_name(record: Record) -> str | None:
    """Return the key of the prompt: a text in any of its columns, or a list of messages."""
    given = [name for name in (*PROMPTS, *CONVERSATIONS) if record.get(name) is not None]
    return next((name for name in given if not is_empty(record[name])), given[0] if given else None)


def _is_text(record: Record, name: str) -> bool:
    return isinstance(record[name], str) and not _TRANSCRIPT.match(record[name])


def _read_of(record: Record) -> frozenset[str]:
    """Return the keys of a prompt that is a text, and of what goes on with it."""
    name = _prompt_name(record)
    if name is None or name in CONVERSATIONS:
        return frozenset()
    return frozenset((name, *(contexts_of(name) if _is_text(record, name) else ())))


def _turns(record: Record, key: str, role: Role) -> list[Turn]:
    """Return the turns under `key`: messages, one message, a transcript, or one text of that role."""
    if isinstance(record[key], dict):
        return chat_messages({key: [record[key]]}, key)
    if isinstance(record[key], list):
        return chat_messages(record, key)
    text = value(record, key, str, "a string or a list of messages")
    if not _TRANSCRIPT.match(text):
        return [Turn(role, text)]
    _, *parts = _SPEAKER.split(f"\n\n{text.lstrip()}")
    return [Turn(_SPEAKERS[speaker], turn.strip()) for speaker, turn in zip(parts[::2], parts[1::2], strict=True)]


def _unmarked(turns: Turns) -> list[Turn]:
    """Return turns of a prompt, which is never learnt: their marks say nothing."""
    return [turn._replace(weight=1.0) for turn in turns]


def _opening(record: Record, key: str) -> list[Turn]:
    """Return the turns of a prompt."""
    turns = _unmarked(_turns(record, key, "user"))
    return turns[:-1] if turns[-1:] == [Turn("assistant", "")] else turns  # "\n\nAssistant:" opens the reply


def _prompt(record: Record, key: str) -> Turns:
    """Return the turns under `prompt`, or whatever else it is called, which `key` answers."""
    name = _prompt_name(record)
    if name is None:
        raise Malformed(
            f"`prompt` must be given where `{key}` is a reply alone, or `{key}` must be a transcript that opens with "
            f'"\\n\\nHuman:" or a list of messages, but is {show(record[key])}'
        )
    turns = [Turn("user", asked(record, name))] if _is_text(record, name) else _opening(record, name)
    if not turns or turns[-1].role != "user":
        found = f"ends in one of the role {turns[-1].role}" if turns else "is empty"
        raise Malformed(f"`{name}` must end in a user turn where `{key}` is a reply alone, but {found}")
    return turns


def _completions(record: Record) -> list[Transcript]:
    instruction = Turn("user", value(record, "instruction", str, "a string"))
    replies = [_scored(reply) for reply in objects(record, "completions")]
    if not replies:
        return [([instruction], None)]  # which ends in no reply
    order = sorted({score for _, score in replies if score is not None}, reverse=True)
    ranks = [None if score is None else order.index(score) for _, score in replies]
    return [([instruction, reply], rank) for (reply, _), rank in zip(replies, ranks, strict=True)]


def _scored(completion: Record) -> tuple[Turn, float | None]:
    refuse_unread(completion, _RESPONSE + _PASSED_OVER + MARKS)
    text = value(completion, "response", str, "a string")
    return Turn("assistant", text, weight_of(completion, "assistant")), _score(completion)


def _score(reply: Record) -> float | None:
    """Return None where it is missing, which tables and JSON may write as NaN."""
    score = reply.get("overall_score")
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
        raise Malformed(f"`overall_score` must be a number or null, but is {show(score)}")
    return None if score is None or math.isnan(score) else score


CHOSEN_REJECTED = Format(
    "`chosen`/`rejected` preferences",
    ("chosen", "rejected"),
    _chosen_and_rejected,
    _replies,
    also=("score_chosen", "score_rejected"),
    sometimes=(*PROMPTS, *CONTEXTS, *CONVERSATIONS),
    read_of=_read_of,
    compared=True,
)
COMPLETIONS = Format(
    "`completions` with scores",
    ("instruction", "completions"),
    _completions,
    _replies,
    passed_over=("correct_answers", "incorrect_answers"),
    compared=True,
)
