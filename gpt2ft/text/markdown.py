"""Text from elsewhere in Markdown: names, paths and replies are shown as they are, and mean nothing in it."""

import re

from gpt2ft.text.display import escape_control_characters


def shown(text: str) -> str:
    """Return text that can be written and looked at: control characters spelled out, halves of surrogates replaced."""
    return escape_control_characters(text).encode("utf-8", "replace").decode("utf-8")


def inline(text: str) -> str:
    """Return text that means nothing in Markdown, on one line."""
    return re.sub(r"([\\`*_\[\]<>|&~#!$])", r"\\\1", " ".join(shown(text).split()))


def fenced(text: str, language: str = "text") -> list[str]:
    """Return the lines of a block that nothing in the text can end."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", shown(text), fence, ""]
