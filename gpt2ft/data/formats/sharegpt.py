"""ShareGPT: {conversations: [{from: human, value}, {from: gpt, value}, ...]}."""

from gpt2ft.data.formats.turns import Format, Turns, conversation
from gpt2ft.data.reading import Malformed, Record, objects, role_of, value


def turns(record: Record) -> Turns:
    found = []
    for number, turn in enumerate(objects(record, "conversations"), start=1):
        try:
            found.append((role_of(turn, "from"), value(turn, "value", str, "a string")))
        except Malformed as malformed:
            raise Malformed(f"turn {number} of `conversations`: {malformed}") from None
    return found


FORMAT = Format("ShareGPT `conversations`", ("conversations",), conversation(turns))
