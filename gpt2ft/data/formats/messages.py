"""OpenAI's layout, also of smoltalk and ultrachat: {messages: [{role, content}, ...]}."""

from gpt2ft.data.formats.turns import Format, Turns
from gpt2ft.data.reading import Malformed, Record, objects, role_of, value


def chat_messages(record: Record, key: str) -> Turns:
    """The turns in the list under `key`."""
    found = []
    for number, message in enumerate(objects(record, key), start=1):
        try:
            found.append((role_of(message), value(message, "content", str, "a string")))
        except Malformed as malformed:
            raise Malformed(f"message {number} of `{key}`: {malformed}") from None
    return found


MESSAGES = Format("`messages` conversations", ("messages",), lambda record: chat_messages(record, "messages"))
