"""Conversations as lists: {messages: [{role, content}, ...]}, as OpenAI, smoltalk and ultrachat have them, ShareGPT's
{conversations: [{from, value}, ...]}, {conversation: [...]} of WildChat, LMSYS and Capybara, and others like them.

A list of texts alternates between user and assistant, the user first. One text is a transcript, in which lines open
with who speaks ("User: ..."), or Guanaco's, where "### Human: ..." may stand within a line.
"""

import re
from collections.abc import Iterable
from functools import partial
from itertools import cycle

from gpt2ft.conversation import Role
from gpt2ft.data.formats.chat_messages import chat_messages
from gpt2ft.data.formats.column_names import CONVERSATIONS
from gpt2ft.data.formats.layout import conversation
from gpt2ft.data.formats.turns import Turn
from gpt2ft.data.reading import ROLE_NAMES, Record, value

_KNOWN_AS = {"messages": "`messages` conversations", "conversations": "ShareGPT `conversations`"}
_PASSED_OVER = {
    "messages": ("parallel_tool_calls",),  # of OpenAI's fine-tuning: true or false, of tools that are refused
    "conversations": ("custom_instruction", "skip_prompt_formatting"),  # of OpenHermes: true or false
}


def _speaker(names: Iterable[str], flags: int = 0) -> re.Pattern[str]:
    return re.compile(rf"(?:^[ \t]*|###[ \t]*)({'|'.join(names)})[ \t]*:", re.MULTILINE | flags)


_SPEAKER = _speaker(ROLE_NAMES, re.IGNORECASE)


def _turns(record: Record, key: str) -> list[Turn]:
    found = record[key]
    if isinstance(found, str) and (turns := transcript(value(record, key, str, "text"))):
        return turns
    if isinstance(found, list) and found and all(isinstance(text, str) for text in found):
        roles: cycle[Role] = cycle(("user", "assistant"))
        return [Turn(next(roles), value({key: text}, key, str, "a list of texts")) for text in found]
    return chat_messages(record, key)


def transcript(text: str) -> list[Turn]:
    """Return the turns of a text that opens with who speaks, none if it does not, or only one of two ever does.

    Of the spellings of a role, only the first that occurs opens a turn: the others may be text.
    """
    spoken: dict[Role, str] = {}
    for name in _SPEAKER.findall(text):
        spoken.setdefault(ROLE_NAMES[name.lower()], name)
    if not {"user", "assistant"} <= spoken.keys() or not _SPEAKER.match(text.lstrip()):
        return []
    _, *parts = _speaker(spoken.values()).split(text.lstrip())
    return [Turn(ROLE_NAMES[name.lower()], said.strip()) for name, said in zip(parts[::2], parts[1::2], strict=True)]


FORMATS = tuple(
    conversation(
        _KNOWN_AS.get(key, f"`{key}` lists"), partial(_turns, key=key), (key,), passed_over=_PASSED_OVER.get(key, ())
    )
    for key in CONVERSATIONS
)
