"""The layouts that data come in. A new one is a file here and its name in FORMATS."""

from gpt2ft.data.formats import alpaca, dolly, messages, oasst, preferences, prompt_completion, sharegpt, text
from gpt2ft.data.formats.turns import Format, refuse_compared
from gpt2ft.data.reading import Malformed, Record, show

AnyFormat = Format | oasst.NestedTrees | oasst.FlatMessages | preferences.PreferenceFormat

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


# What can be read as preferences: OASST's trees have ranked replies, and conversations can be answered from a topic.
PREFERENCES: tuple[AnyFormat, ...] = (preferences.COMPLETIONS, preferences.CHOSEN_REJECTED, *FORMATS)


def detect(record: Record, as_preferences: bool = False) -> AnyFormat:
    """The format of a record, told by its keys.

    Raises:
        Malformed: if it has none.
    """
    formats = PREFERENCES if as_preferences else FORMATS
    if not as_preferences:
        refuse_compared(record)
    for format in formats:
        if format.matches(record):
            return format
    if any(format.matches(record) for format in PREFERENCES):
        raise Malformed(
            "must be a conversation to learn from, but is a preference (`chosen` and `rejected`, or `completions`), "
            "which launch/dpo.py trains on"
        )
    keys = ", ".join(map(show, record)) or "no keys"
    raise Malformed(f"must be {', '.join(format.name for format in formats)}, but holds {keys}")


def columns_to_read(names: list[str], as_preferences: bool = False) -> list[str]:
    """Of a table, only what its format reads: labels and the like take longer than the rest."""
    try:
        wanted = detect(dict.fromkeys(names), as_preferences).columns
    except Malformed:
        return names
    return [name for name in names if name in wanted]
