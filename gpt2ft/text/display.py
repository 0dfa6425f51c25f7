"""Text for people to look at."""

# Control characters but newline and tab: those of ASCII, delete, and the eight-bit ones that terminals obey too.
_SPELLED_OUT = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}


def visible(text: str) -> str:
    r"""`text` with its control characters spelled out, `\x1b` for escape, so that no text can drive a terminal."""
    return text.translate(_SPELLED_OUT)
