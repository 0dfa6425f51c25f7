"""OpenAI's layout, also of smoltalk and ultrachat: {messages: [{role, content}, ...]}."""

from gpt2ft.data.formats.turns import Format, Turns, conversation
from gpt2ft.data.reading import Malformed, Record, objects, role_of, show, value


def chat_messages(record: Record, key: str) -> Turns:
    """Return the turns in the list under `key`."""
    found = []
    for number, message in enumerate(objects(record, key), start=1):
        try:
            for other in ("tool_calls", "function_call"):
                if message.get(other):
                    raise Malformed(f"`{other}` must be empty or absent, as it is not read and would be lost")
            if message.get("weight") not in (None, 1):
                raise Malformed(
                    f"`weight` must be 1 or absent, as every reply is trained on, but is {show(message['weight'])}"
                )
            found.append((role_of(message), value(message, "content", str, "a string")))
        except Malformed as malformed:
            raise Malformed(f"message {number} of `{key}`: {malformed}") from None
    return found


FORMAT = Format(
    "`messages` conversations", ("messages",), conversation(lambda record: chat_messages(record, "messages"))
)
