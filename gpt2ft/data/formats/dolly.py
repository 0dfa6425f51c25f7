"""Databricks' Dolly: {instruction, context, response}; the context goes where Alpaca's input goes."""

from gpt2ft.data.formats.alpaca import instructed
from gpt2ft.data.formats.turns import Format, Turns, conversation
from gpt2ft.data.reading import Record


def turns(record: Record) -> Turns:
    return instructed(record, "context", "response")


FORMAT = Format(
    "Dolly `instruction`/`context`/`response`", ("instruction", "response"), conversation(turns), also=("context",)
)
