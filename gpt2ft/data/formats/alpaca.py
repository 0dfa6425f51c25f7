"""Alpaca: {instruction, input, output}, where `input` may be empty or absent. It follows the instruction after a
blank line, as part of the same user turn."""

from gpt2ft.data.formats.turns import Format, Turns
from gpt2ft.data.reading import Record, value


def instruction_and(context: str | None, record: Record) -> str:
    """The user turn: what to do and, after a blank line, what to do it with."""
    return "\n\n".join(filter(None, (value(record, "instruction", str, "a string"), context)))


def turns(record: Record) -> Turns:
    context = value(record, "input", str, "a string or null", optional=True)
    return [
        ("user", instruction_and(context, record)),
        ("assistant", value(record, "output", str, "a string")),
    ]


INSTRUCTIONS = Format("Alpaca `instruction`/`input`/`output`", ("instruction", "output"), turns, also=("input",))
