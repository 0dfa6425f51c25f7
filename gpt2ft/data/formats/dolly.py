"""Databricks' Dolly: {instruction, context, response}; the context goes where Alpaca's input goes."""

from gpt2ft.data.formats.alpaca import instructed
from gpt2ft.data.formats.layout import conversation
from gpt2ft.data.formats.turns import Turns
from gpt2ft.data.reading import Record


def turns(record: Record) -> Turns:
    return instructed(record, "context", "response")


FORMAT = conversation("Dolly `instruction`/`context`/`response`", turns, ("instruction", "response"), also=("context",))
