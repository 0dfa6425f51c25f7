"""Databricks' Dolly: {instruction, context, response}; the context goes where Alpaca's input goes."""

from gpt2ft.data.formats.alpaca import instruction_and
from gpt2ft.data.formats.turns import Format, Turns
from gpt2ft.data.reading import Record, value


def turns(record: Record) -> Turns:
    context = value(record, "context", str, "a string or null", optional=True)
    return [
        ("user", instruction_and(context, record)),
        ("assistant", value(record, "response", str, "a string")),
    ]


RECORDS = Format("Dolly `instruction`/`context`/`response`", ("instruction", "response"), turns, also=("context",))
