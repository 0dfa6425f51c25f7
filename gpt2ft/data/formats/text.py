"""Plain text, {text}: a document that is learnt from its first token to its last."""

from gpt2ft.data.formats.turns import Format
from gpt2ft.data.reading import value

DOCUMENTS = Format("plain `text`", ("text",), lambda record: [("text", value(record, "text", str, "a string"))])
