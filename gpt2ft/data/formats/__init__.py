"""The layouts that data come in. A new one is a file here and its name in FORMATS."""

from gpt2ft.data.formats import alpaca, dolly, messages, oasst, prompt_completion, sharegpt, text
from gpt2ft.data.formats.turns import Format
from gpt2ft.data.reading import Malformed, Record, show

AnyFormat = Format | oasst.NestedTrees | oasst.FlatMessages

# The first that matches a record is its format: what is more particular stands before what is less.
FORMATS: tuple[AnyFormat, ...] = (
    oasst.TREES,
    oasst.MESSAGES,
    messages.MESSAGES,
    sharegpt.CONVERSATIONS,
    prompt_completion.PAIRS,
    alpaca.INSTRUCTIONS,
    dolly.RECORDS,
    text.DOCUMENTS,
)


def detect(record: Record) -> AnyFormat:
    """The format of a record, told by its keys.

    Raises:
        Malformed: if it has none.
    """
    for format in FORMATS:
        if format.matches(record):
            return format
    if {"chosen", "rejected"} <= record.keys():
        raise Malformed("must be a conversation to learn from, but is a preference (`chosen` and `rejected`)")
    keys = ", ".join(map(show, record)) or "no keys"
    raise Malformed(f"must be {', '.join(format.name for format in FORMATS)}, but holds {keys}")


def columns_to_read(names: list[str]) -> list[str]:
    """Of a table, only what its format reads: labels and the like take longer than the rest."""
    try:
        wanted = detect(dict.fromkeys(names)).columns
    except Malformed:
        return names
    return [name for name in names if name in wanted]
