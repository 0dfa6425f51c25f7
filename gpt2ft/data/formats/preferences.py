"""Preferences: replies to one prompt, some better than others.

    chosen/rejected    {prompt, chosen, rejected}, each text or a list of messages; without `prompt`, or with it, both
                       may be whole conversations that share all but their last message: as lists, or as HH-RLHF's
                       transcripts, "\\n\\nHuman: ... \\n\\nAssistant: ..."
    completions        {instruction, completions: [{response, overall_score}, ...]}, the original UltraFeedback

A record becomes a tree: the prompt, and the replies below it in the order of their ranks. Of completions, those of
equal score share a rank; so do `chosen` and `rejected` where `score_chosen` and `score_rejected` are equal.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gpt2ft.conversation import Message, MessageTree, tidy
from gpt2ft.data.formats.messages import chat_messages
from gpt2ft.data.formats.turns import BESIDE_THE_TURNS, Turns, beside_the_turns, clean, content_id
from gpt2ft.data.reading import Malformed, Reading, Record, objects, show, value

Transcript = tuple[Turns, int | None]  # a conversation that ends in a reply, and the rank of that reply

_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class PreferenceFormat:
    """One prompt a record.

    `name` says what the data are, for people. A record that has all of `keys` is one. `transcripts` gives every reply
    with all that stands before it, or raises Malformed. Of a table, the columns `keys` and `also` are read.
    """

    name: str
    keys: tuple[str, ...]
    transcripts: Callable[[Record], list[Transcript]]
    also: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        return self.keys + self.also + BESIDE_THE_TURNS

    def matches(self, record: Record) -> bool:
        return all(key in record for key in self.keys)

    def tree(self, record: Record, where: str, reading: Reading) -> MessageTree | None:
        """The prompt in a record with its replies, or None if they do not belong together.

        Raises:
            Malformed: if the record cannot be read.
        """
        beside = beside_the_turns(record)
        transcripts = self.transcripts(record)
        said = [[(role, tidy(text)) for role, text in (*beside, *turns)] for turns, _ in transcripts]
        prompt = said[0][:-1]
        reading.totals.trees += 1
        reading.totals.messages += len(prompt) + len(said)
        if any(turns[-1:] == [] or turns[-1][0] != "assistant" for turns in said):
            reading.dropped["does not end in a reply"] += len(prompt) + len(said)
            return None
        if any(turns[:-1] != prompt for turns in said):
            reading.dropped["prompts that differ"] += len(prompt) + len(said)
            return None
        if not prompt or prompt[-1][0] != "user":
            raise Malformed("the prompt must end in a user turn, but " + ("does not" if prompt else "there is none"))
        kept = clean([*prompt, ("assistant", "any reply")], reading)
        if len(kept) < 2 or kept[-1] != ("assistant", "any reply"):
            reading.dropped["below a dropped message"] += len(said) - 1
            reading.dropped["in no pair"] += len(kept)
            return None
        replies = [(turns[-1][1], rank) for turns, (_, rank) in zip(said, transcripts, strict=True)]
        reading.dropped["empty"] += sum(not text for text, _ in replies)
        return _tree(kept[:-1], [reply for reply in replies if reply[0]], reading.source)


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
    """The prompt and one reply, wherever the prompt stands."""
    prompt = record.get("prompt")
    if isinstance(record[key], list):
        turns = chat_messages(record, key)
        if not turns:
            raise Malformed(f"`{key}` must hold messages, but is empty")
        if turns[0][0] == "assistant":
            return [*_prompt(record, key), *turns]
        if isinstance(prompt, str) and not any(role == "user" and text == prompt for role, text in turns):
            raise Malformed(f"`{key}` must hold the text of `prompt` as a user turn, but does not")
        if isinstance(prompt, list) and turns[: len(prompt)] != chat_messages(record, "prompt"):
            raise Malformed(f"`{key}` must go on from the messages in `prompt`, but does not")
        return turns
    text = value(record, key, str, "a string or a list of messages")
    if _SPEAKER.match(text):
        if isinstance(prompt, str) and not text.startswith(prompt.rstrip()):
            raise Malformed(f"`{key}` must go on from the transcript in `prompt`, but does not")
        return _spoken(text)
    return [*_prompt(record, key), ("assistant", text)]


def _prompt(record: Record, key: str) -> Turns:
    """What stands under `prompt`, which `key` needs."""
    prompt = record.get("prompt")
    if prompt is None:
        raise Malformed(
            f"`prompt` must be given where `{key}` is a reply alone, or `{key}` must be a transcript that opens with "
            f'"\\n\\nHuman:" or a list of messages, but is {show(record[key])}'
        )
    if isinstance(prompt, list):
        return chat_messages(record, "prompt")
    text = value(record, "prompt", str, "a string or a list of messages")
    if not _SPEAKER.match(text):
        return [("user", text)]
    turns = _spoken(text)
    return turns[:-1] if turns[-1] == ("assistant", "") else turns  # "\n\nAssistant:" opens the reply


def _spoken(text: str) -> Turns:
    """The turns of a transcript."""
    _, *parts = _SPEAKER.split(text)
    return [(_SPEAKERS[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _completions(record: Record) -> list[Transcript]:
    instruction = value(record, "instruction", str, "a string")
    replies = [(value(reply, "response", str, "a string"), _score(reply)) for reply in objects(record, "completions")]
    if not replies:
        raise Malformed("`completions` must hold replies, but is empty")
    order = sorted({score for _, score in replies if score is not None}, reverse=True)
    turns = ([("user", instruction), ("assistant", text)] for text, _ in replies)
    ranks = (None if score is None else order.index(score) for _, score in replies)
    return list(zip(turns, ranks, strict=True))


def _score(reply: Record) -> float | None:
    score = reply.get("overall_score")
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
        raise Malformed(f"`overall_score` must be a number or null, but is {show(score)}")
    return score


CHOSEN_REJECTED = PreferenceFormat(
    "`chosen`/`rejected` preferences",
    ("chosen", "rejected"),
    _chosen_and_rejected,
    also=("prompt", "score_chosen", "score_rejected"),
)
COMPLETIONS = PreferenceFormat("`completions` with scores", ("instruction", "completions"), _completions)
