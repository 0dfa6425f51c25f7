"""Alpaca: {instruction, input, output}, where `input` may be empty or absent. It follows the instruction after a
blank line, as part of the same user turn."""

from gpt2ft.data.formats.turns import Format, Turns, conversation
from gpt2ft.data.reading import Record, value


def instructed(record: Record, context_key: str, reply_key: str) -> Turns:
    """Return the instruction and, after a blank line, the context as a user turn, and the reply to it."""
    context = value(record, context_key, str, "a string or null", optional=True)
    prompt = "\n\n".join(filter(None, (value(record, "instruction", str, "a string"), context)))
    return [("user", prompt), ("assistant", value(record, reply_key, str, "a string"))]


def turns(record: Record) -> Turns:
    return instructed(record, "input", "output")


FORMAT = Format(
    "Alpaca `instruction`/`input`/`output`", ("instruction", "output"), conversation(turns), also=("input",)
)
