"""The layouts that data come in. A new name of a key is an entry in column_names.py; a new layout is a file here and
its name in the tuples below."""

import difflib
from collections.abc import Collection

from gpt2ft.data.formats import labelled, messages, oasst, preferences, prompt_reply, text
from gpt2ft.data.formats.keys import describes
from gpt2ft.data.formats.layout import Format, refuse_preference
from gpt2ft.data.reading import Malformed, Record, show

AnyFormat = Format | labelled.Labelled | oasst.NestedTrees | oasst.FlatMessages

# The first that matches a record is its format, so the more particular ones stand first.
CONVERSATION_FORMATS: tuple[AnyFormat, ...] = (
    oasst.TREES,
    oasst.MESSAGES,
    *messages.FORMATS,
    *prompt_reply.FORMATS,
    text.FORMAT,
)
# OASST's trees are preferences too, as they have ranked replies, and conversations can be answered from a topic.
PREFERENCE_FORMATS: tuple[AnyFormat, ...] = (
    preferences.COMPLETIONS,
    preferences.CHOSEN_REJECTED,
    *CONVERSATION_FORMATS,
)
# Of ranked replies the best and the worst are labelled by their ranks.
LABELLED_FORMATS: tuple[AnyFormat, ...] = (*labelled.FORMATS, *PREFERENCE_FORMATS)
_USUAL = ("messages", "prompt", "completion", "text")


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
            "which launch/dpo.py trains on",
            "another layout",
        )
    keys = ", ".join(map(show, record)) or "no keys"
    raise Malformed(
        f"must have a known layout, but holds {keys}; {_nearest(record, formats)}; say which key is which with "
        "`data.columns`, for example prompt=NAME,completion=NAME",
        "another layout",
    )


def _nearest(record: Record, formats: tuple[AnyFormat, ...]) -> str:
    """Name the layouts of which a record has most, misspellings counted."""
    found = [key.lower() for key in record]
    formats = tuple(format for format in formats if isinstance(format, Format))  # OASST's are told by a single key

    def likeness(format: Format) -> float:
        near = [difflib.get_close_matches(key, found, n=1, cutoff=0.7) for key in format.keys]
        return sum(map(bool, near)) / len(format.keys)

    best = max(map(likeness, formats))
    nearest = [format for format in formats if likeness(format) == best][:3]
    if not best:
        return f"usual ones are {', '.join(f'`{key}`' for key in _USUAL)}"
    return f"the nearest are {', or '.join(' with '.join(f'`{key}`' for key in format.keys) for format in nearest)}"


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
