"""A list of messages as turns, in the spellings that it comes in.

    {role, content}    OpenAI's
    {from, value}      ShareGPT's
    {input, output}    Capybara's: a user turn and its reply

A text may be a list of text parts, as in OpenAI's requests.
"""

from gpt2ft.data.formats.keys import MARKS, is_masked, refuse_unread
from gpt2ft.data.formats.turns import Turn
from gpt2ft.data.reading import Malformed, Record, objects, role_of, show, value

_SPELLINGS = (("role", "content"), ("from", "value"), ("input", "output"))
_PLAIN = {frozenset(spelling): spelling for spelling in _SPELLINGS}  # messages that hold nothing else


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
            raise Malformed(f"message {number} of `{key}`: {malformed}") from None
    return found


def _turns(message: Record) -> list[Turn]:
    plain = _PLAIN.get(frozenset(message))
    first, second = plain or _spelling(message)
    if not plain:
        refuse_unread(message, (first, second, *MARKS))
    role = "assistant" if first == "input" else role_of(message, first)
    turn = Turn(role, _text(message, second), not plain and is_masked(message, role))
    return [Turn("user", _text(message, first)), turn] if first == "input" else [turn]


def _spelling(message: Record) -> tuple[str, str]:
    given = [pair for pair in _SPELLINGS if message.get(pair[0]) is not None or message.get(pair[1]) is not None]
    if len(given) == 1:
        return given[0]
    known = ", or ".join(f"`{one}` and `{other}`" for one, other in _SPELLINGS)
    raise Malformed(f"must hold {known}, but holds {'more than one of these' if given else 'none of these'}")


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
