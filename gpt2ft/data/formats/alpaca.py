"""Alpaca: {instruction, input, output}, where `input` may be empty or absent. It follows the instruction after a
blank line, as part of the same user turn."""

from gpt2ft.data.formats.layout import conversation
from gpt2ft.data.formats.turns import Turn, Turns
from gpt2ft.data.reading import Record, value


def instructed(record: Record, context_key: str, reply_key: str) -> Turns:
    """Return the instruction and, after a blank line, the context as a user turn, and the reply to it."""
    context = value(record, context_key, str, "a string or null", optional=True)
    prompt = "\n\n".join(filter(None, (value(record, "instruction", str, "a string"), context)))
    return [Turn("user", prompt), Turn("assistant", value(record, reply_key, str, "a string"))]


def turns(record: Record) -> Turns:
    return instructed(record, "input", "output")


FORMAT = conversation(
    "Alpaca `instruction`/`input`/`output`",
    turns,
    ("instruction", "output"),
    also=("input",),
    passed_over=("text",),  # as published: the three once more, as one prompt
)
