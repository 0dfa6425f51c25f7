"""The layouts that data come in. A new one is a file here and its name in the tuples below."""

from collections.abc import Collection

from gpt2ft.data.formats import alpaca, dolly, messages, oasst, preferences, prompt_completion, text
from gpt2ft.data.formats.keys import describes
from gpt2ft.data.formats.layout import Format, refuse_preference
from gpt2ft.data.reading import Malformed, Record, show

AnyFormat = Format | oasst.NestedTrees | oasst.FlatMessages

# The first that matches a record is its format, so the more particular ones stand first.
CONVERSATION_FORMATS: tuple[AnyFormat, ...] = (
    oasst.TREES,
    oasst.MESSAGES,
    messages.MESSAGES,
    messages.SHAREGPT,
    messages.CONVERSATION,
    prompt_completion.FORMAT,
    alpaca.FORMAT,
    dolly.FORMAT,
    text.FORMAT,
)
# OASST's trees are preferences too, as they have ranked replies, and conversations can be answered from a topic.
PREFERENCE_FORMATS: tuple[AnyFormat, ...] = (
    preferences.COMPLETIONS,
    preferences.CHOSEN_REJECTED,
    *CONVERSATION_FORMATS,
)


def detect(record: Record, formats: tuple[AnyFormat, ...] = CONVERSATION_FORMATS) -> AnyFormat:
    """Return the format of a record, told by its keys.

    Raises:
        Malformed: if it has none of these.
    """
    if preferences.CHOSEN_REJECTED not in formats:
        refuse_preference(record)
    for format in formats:
        if format.matches(record):
            return format
    if any(format.matches(record) for format in PREFERENCE_FORMATS):
        raise Malformed(
            "must be a conversation to learn from, but is a preference (`chosen` and `rejected`, or `completions`), "
            "which launch/dpo.py trains on"
        )
    keys = ", ".join(map(show, record)) or "no keys"
    raise Malformed(f"must be {', '.join(format.name for format in formats)}, but holds {keys}")


def columns_to_read(
    names: list[str], formats: tuple[AnyFormat, ...] = CONVERSATION_FORMATS, ignored: Collection[str] = ()
) -> list[str]:
    """Return the columns of a table that its format reads, or must refuse: the rest may take long to read."""
    names = [name for name in names if name not in ignored]
    try:
        format = detect(dict.fromkeys(names), formats)
    except Malformed:
        return names
    return [name for name in names if name in format.columns or not (name in format.passed_over or describes(name))]
