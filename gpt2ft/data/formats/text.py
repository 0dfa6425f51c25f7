"""Plain text, {text}: a document that is supervised from its first token to its last."""

from gpt2ft.data.formats.layout import conversation
from gpt2ft.data.formats.turns import Turn
from gpt2ft.data.reading import value

FORMAT = conversation(
    "plain `text`",
    lambda record: [Turn("text", value(record, "text", str, "a string"))],
    ("text",),
    classes=("label",),  # of texts to classify, as imdb
)
