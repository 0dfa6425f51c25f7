"""Text for people to look at."""

# Control characters but newline and tab: those of ASCII, delete, and the eight-bit ones that terminals obey too.
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}


def escape_control_characters(text: str) -> str:
    r"""Return `text` with its control characters spelled out, `\x1b` for escape, so that no text drives a terminal."""
    return text.translate(_ESCAPES)
