"""Text on screens: control characters are spelled out, and everything else is left as it is."""

import pytest

from gpt2ft.text.display import escape_control_characters


@pytest.mark.parametrize(
    ("code", "shown"), [(0, r"\x00"), (27, r"\x1b"), (13, r"\x0d"), (127, r"\x7f"), (155, r"\x9b")]
)
def test_control_characters_are_spelled_out(code, shown):
    assert escape_control_characters(f"a{chr(code)}b") == f"a{shown}b"


def test_nothing_that_is_left_drives_a_terminal():
    shown = escape_control_characters("".join(map(chr, range(0x250))))
    assert {character for character in shown if not character.isprintable()} == {"\t", "\n", "\xa0", "\xad"}
    for text in ("What is tea?\n\tA hot drink.", "Thé, お茶 🍵", ""):
        assert escape_control_characters(text) == text
