"""Plain text, {text}: a document that is supervised from its first token to its last."""

from gpt2ft.data.formats.turns import Format, conversation
from gpt2ft.data.reading import value

FORMAT = Format(
    "plain `text`", ("text",), conversation(lambda record: [("text", value(record, "text", str, "a string"))])
)
