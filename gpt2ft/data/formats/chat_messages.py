"""A list of messages as turns, in the spellings that it comes in.

    {role, content}    OpenAI's
    {from, value}      ShareGPT's; other names of both stand in column_names.py
    {input, output}    Capybara's: a user turn and its reply, by any names that these have in a record

A text may be a list of text parts, as in OpenAI's requests.
"""

from collections.abc import Iterable

from gpt2ft.data.formats.column_names import PROMPTS, REPLIES, ROLES, TEXTS
from gpt2ft.data.formats.keys import MARKS, refuse_unread, weight_of
from gpt2ft.data.formats.turns import Turn
from gpt2ft.data.reading import Malformed, Record, objects, role_of, show, value

_PLAIN = {frozenset(spelling): spelling for spelling in ROLES.items()}  # messages that hold nothing else


def chat_messages(record: Record, key: str) -> list[Turn]:
    """Return the turns in the list under `key`.

    Raises:
        Malformed: if they cannot be read, or hold what would be lost.
    """
    found: list[Turn] = []
    for number, message in enumerate(objects(record, key), start=1):
        try:
            found += _turns(message)
        except Malformed as malformed:
            raise Malformed(f"message {number} of `{key}`: {malformed}", malformed.reason) from None
    return found


def _turns(message: Record) -> list[Turn]:
    plain = _PLAIN.get(frozenset(message))
    role_key, text_key = plain or (_given(message, ROLES), _given(message, TEXTS))
    if not text_key and (not role_key or _given(message, PROMPTS + REPLIES)):
        return _exchange(message)
    role_key = role_key or next((role for role, text in ROLES.items() if text == text_key), "role")
    text_key = text_key or ROLES[role_key]
    if not plain:
        refuse_unread(message, (role_key, text_key, *MARKS))
    role = role_of(message, role_key)
    return [Turn(role, _text(message, text_key), 1.0 if plain else weight_of(message, role))]


def _exchange(message: Record) -> list[Turn]:
    """Return a user turn and its reply, and the system turn before them where there is one."""
    prompt, reply = _given(message, PROMPTS), _given(message, REPLIES)
    if not prompt and not reply:
        raise Malformed(
            "must hold a role and a text (`role` and `content`, or `from` and `value`), or a user turn and its reply "
            "(`input` and `output`), but holds none of these"
        )
    prompt, reply = prompt or "input", reply or "output"
    refuse_unread(message, ("system", prompt, reply, *MARKS))
    system = value(message, "system", str, "a string or null", optional=True)
    told = Turn("assistant", _text(message, reply), weight_of(message, "assistant"))
    return [*([Turn("system", system)] if system else []), Turn("user", _text(message, prompt)), told]


def _given(message: Record, names: Iterable[str]) -> str | None:
    """Return the first of the names under which a message holds something."""
    return next((name for name in names if message.get(name) is not None), None)


def _text(message: Record, key: str) -> str:
    if not isinstance(message.get(key), list):
        return value(message, key, str, "a string or a list of text parts")
    texts = []
    for part in objects(message, key):
        if part.get("type") != "text":
            raise Malformed(f"`{key}` must hold parts of the type text, but holds one of type {show(part.get('type'))}")
        refuse_unread(part, ("type", "text"))
        texts.append(value(part, "text", str, "a string"))
    return "".join(texts)
